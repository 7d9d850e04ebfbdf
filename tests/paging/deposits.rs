//! Prompts whose KV is kept on demand: told apart, acknowledged, found again.

use std::sync::Arc;

use mneme::engine::{Deposited, FinishReason, GenerateRequest, SharedPrefix, Task};
use mneme::paging::Found;
use mneme::paging::faulty::Fault;

use crate::gate::GatedFiles;
use crate::support::engine::{Output, TestEngine, collect, greedy, request};
use crate::support::random::Random;
use crate::support::tiny_model::{Family, TinyModel, VOCAB};
use crate::vault::{Tiers, wait_until_open};

pub fn deposit(engine: &TestEngine, prompt: &[u32], domain: &str, is_durable: bool) -> Output {
    let request =
        GenerateRequest { domain: domain.into(), ..request(prompt, Task::Deposit { is_durable, kept_in: None }) };
    collect(engine.handle.submit(request).unwrap())
}

#[test]
fn what_was_acknowledged_is_there_after_a_crash() {
    let model = TinyModel::new(Family::Llama, 3).write();
    for num_tokens in [1, 15, 16, 17, 100] {
        let tiers = Tiers::new(Family::Llama);
        let prompt = Random::new(num_tokens as u64).tokens(num_tokens, VOCAB);
        let engine = tiers.start(model.path());
        let output = deposit(&engine, &prompt, "team", true);
        assert_eq!(output.reason, Some(FinishReason::Stop { token: None }));
        let Deposited { blocks, tail, restored_tokens, computed_tokens, .. } = output.deposited.unwrap();
        assert_eq!((blocks.len(), tail.is_some()), (num_tokens / 16, num_tokens % 16 > 0));
        assert_eq!((restored_tokens, computed_tokens), (0, num_tokens));
        // As if the power had gone: the engine never gets to close anything.
        tiers.files.stop_at(0);
        drop(engine);
        tiers.files.restart();
        let store = tiers.open_store();
        let mut bytes = vec![0; tiers.block_bytes()];
        for (number, hash) in blocks.iter().chain(&tail).enumerate() {
            let tokens = &prompt[number * 16..prompt.len().min(number * 16 + 16)];
            assert_eq!(store.read(hash, tokens, &mut bytes), Found::Whole, "block {number} of {num_tokens} tokens");
        }
    }
}

#[test]
fn a_second_deposit_computes_next_to_nothing() {
    let model = TinyModel::new(Family::Llama, 3).write();
    let tiers = Tiers::new(Family::Llama);
    let prompt = Random::new(5).tokens(100, VOCAB);
    let first = deposit(&tiers.start(model.path()), &prompt, "", true).deposited.unwrap();
    let second = deposit(&tiers.start(model.path()), &prompt, "", true).deposited.unwrap();
    assert_eq!((second.restored_tokens, second.computed_tokens), (96, 4));
    assert_eq!((second.blocks, second.tail), (first.blocks, first.tail));
}

/// A shared beginning is found in its own domain, what follows it stays in the caller's.
#[test]
fn a_shared_beginning_is_found_and_the_rest_stays_private() {
    let model = TinyModel::new(Family::Llama, 3).write();
    let tiers = Tiers::new(Family::Llama);
    let cube = Random::new(5).tokens(64, VOCAB);
    let prompt = [&cube[..], &Random::new(6).tokens(40, VOCAB)].concat();
    let engine = tiers.start(model.path());
    let ask = |domain: &str, shared: Option<&str>| {
        let shared_prefix = shared.map(|domain| SharedPrefix { num_tokens: 64, domain: domain.into() });
        let task = Task::Generate(Box::new(greedy(4)));
        let request = GenerateRequest { domain: domain.into(), shared_prefix, ..request(&prompt, task) };
        collect(engine.handle.submit(request).unwrap())
    };
    deposit(&engine, &cube, "team", true);
    let ana = ask("ana", Some("team"));
    assert_eq!(ana.cached_tokens, 64, "the cube's blocks are shared");
    assert_eq!(ask("ben", Some("team")).cached_tokens, 64, "and nothing of what ana asked");
    assert_eq!(ask("ana", Some("team")).cached_tokens, 96, "which she finds again");
    assert_eq!(ask("ana", None).cached_tokens, 0, "who does not name the cube does not find it");
    assert_eq!(ask("team", None).cached_tokens, 64);
    assert_eq!(ask("ana", Some("team")).tokens, ana.tokens);
}

/// What a request computed is kept for others, under a name of theirs, without being computed again.
#[test]
fn what_was_computed_in_one_domain_is_kept_in_another() {
    let model = TinyModel::new(Family::Llama, 3).write();
    let tiers = Tiers::new(Family::Llama);
    let prompt = Random::new(5).tokens(100, VOCAB);
    let ask = |engine: &TestEngine, domain: &str, task: Task| {
        let request = GenerateRequest { domain: domain.into(), ..request(&prompt, task) };
        collect(engine.handle.submit(request).unwrap())
    };
    let generate = || Task::Generate(Box::new(greedy(4)));
    let engine = tiers.start(model.path());
    let wanted = ask(&engine, "ana", generate());
    let kept = ask(&engine, "ana", Task::Deposit { is_durable: true, kept_in: Some("team".into()) });
    let kept = kept.deposited.unwrap();
    assert_eq!((kept.restored_tokens, kept.computed_tokens), (96, 4));
    assert_eq!(ask(&engine, "ben", generate()).cached_tokens, 0);
    drop(engine);
    let engine = tiers.start(model.path());
    let found = ask(&engine, "team", generate());
    assert_eq!((found.reuse.disk_tokens, &found.tokens), (96, &wanted.tokens));
    let directly = deposit(&engine, &prompt, "team", true).deposited.unwrap();
    assert_eq!((directly.blocks, directly.tail), (kept.blocks, kept.tail));
}

#[test]
fn a_disk_that_fails_refuses_and_loses_nothing_else() {
    let model = TinyModel::new(Family::Llama, 3).write();
    for fault in [Fault::NoSpace, Fault::WriteError, Fault::SyncError, Fault::ReadOnly] {
        let tiers = Tiers::new(Family::Llama);
        let prompt = Random::new(5).tokens(100, VOCAB);
        let engine = tiers.start(model.path());
        let wanted = engine.greedy(&prompt, 8);
        tiers.files.inject(Some(fault));
        let output = deposit(&engine, &Random::new(6).tokens(100, VOCAB), "", true);
        assert!(matches!(output.reason, Some(FinishReason::Error(_))), "{fault:?}: {:?}", output.reason);
        assert!(output.deposited.is_none());
        assert_eq!(engine.greedy(&prompt, 8), wanted, "{fault:?}: the engine serves on");
    }
}

/// An engine that ends while blocks are on their way to disk says so.
#[test]
fn who_waits_for_a_deposit_is_told_that_the_engine_ends() {
    let model = TinyModel::new(Family::Llama, 3).write();
    let tiers = Tiers::new(Family::Llama);
    let (files, gate) = GatedFiles::new(&tiers.files);
    let engine = tiers.start_over(model.path(), b"test", Arc::new(tiers.open_store_on(files)), || ());
    wait_until_open(&engine);
    gate.close();
    let asked = request(&[1, 2, 3], Task::Deposit { is_durable: true, kept_in: None });
    let stream = engine.handle.submit(asked).unwrap();
    gate.wait_for_somebody();
    let thread = engine.leave();
    assert_eq!(collect(stream).reason, Some(FinishReason::Abort));
    gate.open();
    thread.join().unwrap();
}

/// Blocks go to disk by what they hold, also where requests share none on the device.
#[test]
fn a_deposit_ends_where_no_blocks_are_shared() {
    let model = TinyModel::new(Family::Llama, 3).write();
    let mut tiers = Tiers::new(Family::Llama);
    tiers.setup.limits.prefix_caching = false;
    let prompt = Random::new(5).tokens(100, VOCAB);
    let deposited = deposit(&tiers.start(model.path()), &prompt, "", true).deposited.unwrap();
    assert_eq!((deposited.blocks.len(), deposited.tail.is_some()), (6, true));
    let store = tiers.open_store();
    assert!(deposited.blocks.iter().chain(&deposited.tail).all(|hash| store.contains(hash)));
}
