//! Requests that come while nobody knows yet which model this is.

use std::sync::mpsc::{Sender, channel};

use mneme::Error;
use mneme::engine::{Task, TierConfig};
use mneme::paging::VaultOpener;

use crate::IS_FAST;
use crate::support::engine::{Output, Setup, TestEngine, collect, greedy, request};
use crate::support::random::Random;
use crate::support::tiny_model::{Family, TinyModel, VOCAB};
use crate::vault::{Tiers, wait_until_open};

/// Tokens that take longer than opening a vault.
const NUM_BUSY: usize = if IS_FAST { 400 } else { 120 };

/// An engine with room for two sequences at a time whose vault opens on a message.
fn start(tiers: &Tiers, seed: u64, identity: &[u8]) -> (TestEngine, Sender<()>) {
    let model = TinyModel::new(Family::Llama, seed).write();
    let (open, gate) = channel();
    let engine = tiers.start_closed(model.path(), identity, move || gate.recv().unwrap());
    (engine, open)
}

/// Asks for `prompt` before the vault opens, and has it computed after that.
fn ask_across_opening(engine: &TestEngine, open: &Sender<()>, prompt: &[u32]) -> Output {
    let mut busy = engine.submit(&[1, 2, 3], greedy(NUM_BUSY));
    let mut first = Output::default();
    let mut listen = |count: usize| (0..count).for_each(|_| first.absorb(busy.blocking_next().unwrap()));
    listen(2);
    let stream = engine.submit(prompt, greedy(4));
    // The engine has taken the request when it has taken further steps.
    listen(3);
    open.send(()).unwrap();
    first.finish(busy);
    wait_until_open(engine);
    collect(stream)
}

/// Two models that are called the same share a vault: what came too early for the identity finds nothing of the other's.
#[test]
fn a_request_that_came_before_the_model_was_known_finds_nothing_of_another() {
    let mut tiers = Tiers::new(Family::Llama);
    tiers.setup.limits.max_num_seqs = 1;
    let prompt = Random::new(5).tokens(100, VOCAB);
    let (engine, open) = start(&tiers, 1, b"one");
    ask_across_opening(&engine, &open, &prompt);
    drop(engine);
    let (engine, open) = start(&tiers, 2, b"two");
    let found = ask_across_opening(&engine, &open, &prompt);
    assert_eq!((found.cached_tokens, found.reuse.disk_tokens), (0, 0), "{:?}", found.reuse);
    drop(engine);
    let (engine, open) = start(&Tiers::new(Family::Llama), 2, b"two");
    assert_eq!(ask_across_opening(&engine, &open, &prompt).tokens, found.tokens);
}

/// A deposit that came too early is refused: nobody would find it after a restart.
#[test]
fn a_deposit_that_came_before_the_model_was_known_is_not_acknowledged() {
    let mut tiers = Tiers::new(Family::Llama);
    tiers.setup.limits.max_num_seqs = 1;
    let (engine, open) = start(&tiers, 1, b"one");
    let mut busy = engine.submit(&[1, 2, 3], greedy(NUM_BUSY));
    let mut first = Output::default();
    let mut listen = |count: usize| (0..count).for_each(|_| first.absorb(busy.blocking_next().unwrap()));
    listen(2);
    let prompt = Random::new(5).tokens(100, VOCAB);
    let early = engine.handle.submit(request(&prompt, Task::Deposit { is_durable: true, kept_in: None })).unwrap();
    listen(3);
    open.send(()).unwrap();
    first.finish(busy);
    let early = collect(early);
    wait_until_open(&engine);
    let again =
        collect(engine.handle.submit(request(&prompt, Task::Deposit { is_durable: true, kept_in: None })).unwrap());
    // It may have been looked at when the vault was open already; what is acknowledged is found again.
    let num_computed = if early.deposited.is_some() { 4 } else { 100 };
    assert_eq!(again.deposited.unwrap().computed_tokens, num_computed, "{:?}", early.reason);
}

/// An engine goes on without a vault that cannot be opened, and says so.
#[test]
fn a_vault_that_cannot_be_opened_is_said() {
    let model = TinyModel::new(Family::Llama, 1).write();
    let open_vault: VaultOpener = Box::new(|| Err(Error::Device("the disk is gone".into())));
    let tiers = TierConfig { open_vault: Some(open_vault), ..TierConfig::default() };
    let engine = crate::start_with_tiers(model.path(), Setup::default(), tiers);
    assert_eq!(engine.greedy(&[1, 2, 3], 4).len(), 4);
    let lines = engine.stop().degradations().lines();
    assert!(lines.len() == 1 && lines[0].starts_with("vault: ") && lines[0].ends_with("the disk is gone"), "{lines:?}");
}
