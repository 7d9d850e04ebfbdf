//! The end of a cube that fills no block: copied into a block of whoever names the cube, which goes on there with the same
//! bits as if it had computed all of it.

use std::path::Path;

use mneme::engine::{GenerateRequest, SamplingParams, SharedPrefix, Task};
use mneme::paging::faulty::FaultyFiles;

use crate::deposits::deposit;
use crate::support::engine::{Output, TestEngine, collect, request};
use crate::support::random::Random;
use crate::support::tiny_model::{Family, TinyModel, VOCAB};
use crate::tiers::{NUM_OUTPUT, bits};
use crate::vault::Tiers;
use crate::{GEMMA, IS_FAST};

/// The first is for families that go through one case alone.
const LENGTHS: [usize; 5] = [17, 1, 15, 16, 40];

/// Asks as somebody of another domain, who names the cube or not.
fn ask(engine: &TestEngine, prompt: &[u32], num_shared: Option<usize>) -> Output {
    let sampling =
        SamplingParams { temperature: 0.0, max_tokens: NUM_OUTPUT, logprobs: Some(VOCAB), ..Default::default() };
    let shared_prefix = num_shared.map(|num_tokens| SharedPrefix { num_tokens, domain: "team".into() });
    let task = Task::Generate(Box::new(sampling));
    let request = GenerateRequest { domain: "ana".into(), shared_prefix, ..request(prompt, task) };
    collect(engine.handle.submit(request).unwrap())
}

fn cube_and_prompt(num_tokens: usize) -> (Vec<u32>, Vec<u32>) {
    let mut random = Random::new(num_tokens as u64);
    let cube = random.tokens(num_tokens, VOCAB);
    let prompt = [&cube[..], &random.tokens(21, VOCAB)].concat();
    (cube, prompt)
}

fn check(model: &Path, family: Family, num_tokens: usize) {
    let (cube, prompt) = cube_and_prompt(num_tokens);
    let (num_full, num_tail) = (num_tokens / 16 * 16, num_tokens % 16);
    let mut tiers = Tiers::new(family);
    let wanted = bits(&ask(&tiers.start(model), &prompt, None));
    tiers.files = FaultyFiles::new(2);
    let engine = tiers.start(model);
    deposit(&engine, &cube, "team", true);
    let found = ask(&engine, &prompt, Some(num_tokens));
    assert_eq!((found.reuse.device_tokens, found.reuse.disk_tokens), (num_full, num_tail), "{family:?} {num_tokens}");
    assert_eq!((found.cached_tokens, bits(&found)), (num_tokens, wanted.clone()), "{family:?} {num_tokens}");
    // What went on behind the tail is found as what it is: full blocks of the asker.
    let again = ask(&engine, &prompt, Some(num_tokens));
    assert_eq!((again.reuse.device_tokens, bits(&again)), ((num_tokens + 20) / 16 * 16, wanted.clone()));
    drop(engine);
    tiers.files.restart();
    let engine = tiers.start(model);
    let (_, other) = cube_and_prompt(num_tokens);
    let changed = [&other[..num_tokens], &Random::new(99).tokens(21, VOCAB)].concat();
    let unaware = bits(&ask(&Tiers::new(family).start(model), &changed, None));
    let found = ask(&engine, &changed, Some(num_tokens));
    assert_eq!(found.reuse.disk_tokens, num_tokens, "{family:?} {num_tokens} after a restart: {:?}", found.reuse);
    assert_eq!(bits(&found), unaware, "{family:?} {num_tokens} after a restart");
    drop(engine);
    tiers.files = FaultyFiles::new(3);
    tiers.host_bytes = 20 * tiers.block_bytes();
    let engine = tiers.start(model);
    deposit(&engine, &cube, "team", true);
    let found = ask(&engine, &prompt, Some(num_tokens));
    assert_eq!((found.reuse.device_tokens, found.reuse.host_tokens), (num_full, num_tail), "{family:?} {num_tokens}");
    assert_eq!(bits(&found), wanted, "{family:?} {num_tokens} from the host");
}

#[test]
fn a_cube_of_any_length_is_used_to_its_last_token() {
    for &family in crate::FAMILIES {
        let model = TinyModel::new(family, 3).write();
        let lengths = if IS_FAST || family == GEMMA { &LENGTHS[..] } else { &LENGTHS[..1] };
        lengths.iter().for_each(|num_tokens| check(model.path(), family, *num_tokens));
    }
}

/// Several who name the same cube at once: each goes on in a block of its own.
#[test]
fn a_tail_is_copied_and_never_shared() {
    let model = TinyModel::new(Family::Llama, 3).write();
    let tiers = Tiers::new(Family::Llama);
    let (cube, _) = cube_and_prompt(23);
    let prompts: Vec<_> = (0..4).map(|seed| [&cube[..], &Random::new(seed).tokens(20, VOCAB)].concat()).collect();
    let alone: Vec<_> = {
        let engine = tiers.start(model.path());
        prompts.iter().map(|prompt| ask(&engine, prompt, None).tokens).collect()
    };
    let engine = tiers.start(model.path());
    deposit(&engine, &cube, "team", true);
    let submit = |prompt: &Vec<u32>| {
        let shared_prefix = Some(SharedPrefix { num_tokens: 23, domain: "team".into() });
        let sampling = SamplingParams { temperature: 0.0, max_tokens: NUM_OUTPUT, ..Default::default() };
        let task = Task::Generate(Box::new(sampling));
        engine.handle.submit(GenerateRequest { domain: "ana".into(), shared_prefix, ..request(prompt, task) }).unwrap()
    };
    let streams: Vec<_> = prompts.iter().map(submit).collect();
    let outputs: Vec<_> = streams.into_iter().map(collect).collect();
    assert!(outputs.iter().map(|output| &output.tokens).eq(&alone));
    // Computing a few tokens may turn out to be cheaper than fetching them.
    assert!(outputs.iter().all(|output| [16, 23].contains(&output.cached_tokens)));
    assert!(outputs.iter().any(|output| output.cached_tokens == 23));
}

/// The last token of a prompt is computed, for its logits.
#[test]
fn a_prompt_that_is_the_cube_takes_all_but_its_last_token() {
    let model = TinyModel::new(Family::Llama, 3).write();
    for (num_tokens, num_cached) in [(1, 0), (16, 0), (17, 16), (18, 17)] {
        let tiers = Tiers::new(Family::Llama);
        let (cube, _) = cube_and_prompt(num_tokens);
        let engine = tiers.start(model.path());
        let wanted = bits(&ask(&engine, &cube, None));
        deposit(&engine, &cube, "team", true);
        let found = ask(&engine, &cube, Some(num_tokens));
        assert_eq!((found.cached_tokens, bits(&found)), (num_cached, wanted), "{num_tokens} tokens");
    }
}

/// What lay in the rest of the block when it was saved does not go to disk.
#[test]
fn nothing_but_its_tokens_is_kept_of_a_partial_block() {
    let model = TinyModel::new(Family::Llama, 3).write();
    let mut tiers = Tiers::new(Family::Llama);
    tiers.setup.limits.num_blocks = 64;
    let engine = tiers.start(model.path());
    for seed in 0..8 {
        engine.greedy(&Random::new(seed).tokens(200, VOCAB), 1);
    }
    let deposited = deposit(&engine, &[1, 2, 3], "team", true).deposited.unwrap();
    drop(engine);
    let mut bytes = vec![0; tiers.block_bytes()];
    let store = tiers.open_store();
    assert_eq!(store.read(&deposited.tail.unwrap(), &[1, 2, 3], &mut bytes), mneme::paging::Found::Whole);
    let num_set = bytes.iter().filter(|byte| **byte != 0).count();
    // Three of sixteen tokens, and what little of a block its end is filled up with.
    assert!(num_set > 0 && num_set <= bytes.len() * 3 / 16, "{num_set} of {} bytes", bytes.len());
}
