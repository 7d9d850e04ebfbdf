//! The same prompt with its beginning from the device, from the host, from disk, after a restart, and computed.

use std::path::PathBuf;

use mneme::engine::{FetchDecision, SamplingParams, TokenLogprobs};

use crate::support::engine::{Output, TestEngine, collect, limits};
use crate::support::random::Random;
use crate::support::tiny_model::{Family, TinyModel, VOCAB};
use crate::vault::Tiers;
use crate::{GEMMA, IS_FAST};

pub const NUM_OUTPUT: usize = if IS_FAST { 24 } else { 8 };

/// A prompt whose first `num_shared` tokens another one has had.
fn prompts(num_shared: usize) -> (Vec<u32>, Vec<u32>) {
    let mut random = Random::new(num_shared as u64);
    let shared = random.tokens(num_shared, VOCAB);
    let with = |random: &mut Random| [&shared[..], &random.tokens(21, VOCAB)].concat();
    (with(&mut random), with(&mut random))
}

fn ask(engine: &TestEngine, prompt: &[u32]) -> Output {
    let sampling =
        SamplingParams { temperature: 0.0, max_tokens: NUM_OUTPUT, logprobs: Some(VOCAB), ..Default::default() };
    collect(engine.submit(prompt, sampling))
}

/// Tokens and the bits of all logits.
pub fn bits(output: &Output) -> (Vec<u32>, Vec<Vec<(u32, u32)>>) {
    let row = |row: &TokenLogprobs| row.top.iter().map(|top| (top.id, top.logprob.to_bits())).collect();
    (output.tokens.clone(), output.logprobs.iter().map(row).collect())
}

/// Pushes everything else out of the device.
fn flood(engine: &TestEngine) {
    for seed in 100..104 {
        engine.greedy(&Random::new(seed).tokens(200, VOCAB), 1);
    }
}

#[test]
fn every_tier_gives_the_same_bits() {
    for &family in crate::FAMILIES {
        let model = TinyModel::new(family, 3).write();
        let lengths = [17, 1, 15, 16, 64, 100];
        for &num_shared in if IS_FAST || family == GEMMA { &lengths[..] } else { &lengths[..1] } {
            let (first, second) = prompts(num_shared);
            let shared_tokens = num_shared / 16 * 16;
            let mut tiers = Tiers::new(family);
            tiers.setup.limits.num_blocks = 64;
            let wanted = bits(&ask(&tiers.start(model.path()), &second));

            tiers.files = mneme::paging::faulty::FaultyFiles::new(2);
            let engine = tiers.start(model.path());
            ask(&engine, &first);
            let from_device = ask(&engine, &second);
            assert_eq!(from_device.reuse.device_tokens, shared_tokens, "{family:?} {num_shared}");
            assert_eq!(bits(&from_device), wanted, "{family:?}, {num_shared} tokens from the device");
            drop(engine);

            tiers.files.restart();
            let engine = tiers.start(model.path());
            let from_disk = ask(&engine, &second);
            assert_eq!(from_disk.reuse.disk_tokens, (num_shared + 21 - 1) / 16 * 16, "{family:?} {num_shared}");
            assert_eq!(bits(&from_disk), wanted, "{family:?}, {num_shared} tokens after a restart");
        }
    }
}

#[test]
fn the_host_tier_gives_the_same_bits() {
    let mut num_host_tokens = 0;
    for &family in crate::FAMILIES {
        let model = TinyModel::new(family, 3).write();
        let (first, second) = prompts(96);
        let mut tiers = Tiers::new(family);
        tiers.setup.limits = mneme::engine::SchedulerLimits { num_blocks: 20, max_model_len: 320, ..limits() };
        tiers.host_bytes = 200 * tiers.block_bytes();
        let wanted = bits(&ask(&tiers.start(model.path()), &second));
        let engine = tiers.start(model.path());
        ask(&engine, &first);
        flood(&engine);
        let found = ask(&engine, &second);
        num_host_tokens += found.reuse.host_tokens;
        assert_eq!(bits(&found), wanted, "{family:?}: {:?}", found.reuse);
    }
    // How much got there before it was overwritten is a race; that nothing ever does would be a fault.
    assert!(num_host_tokens > 0);
}

/// What is damaged on disk is computed again, and the answer does not show it.
#[test]
fn damaged_blocks_are_computed_again() {
    let model = TinyModel::new(Family::Llama, 3).write();
    let (first, second) = prompts(160);
    let tiers = Tiers::new(Family::Llama);
    let engine = tiers.start(model.path());
    ask(&engine, &first);
    let wanted = bits(&ask(&engine, &second));
    drop(engine);
    let size = |path: &PathBuf| tiers.files.contents(path).map_or(0, |contents| contents.len());
    let path = tiers.files.paths().into_iter().max_by_key(size).unwrap();
    // The blocks are the end of the file.
    let num_bits = 8 * size(&path) as u64;
    for block in 1..6 {
        tiers.files.flip_bit(&path, num_bits - block * 8 * tiers.block_bytes() as u64 + 1234);
    }
    let engine = tiers.start(model.path());
    let found = ask(&engine, &second);
    assert_eq!(found.reuse.decision, FetchDecision::Lost, "{:?}", found.reuse);
    assert!(found.reuse.disk_tokens < 176);
    assert_eq!(bits(&found), wanted);
}

/// Several times as many tokens as the device holds: everything ends, with the tokens it has alone.
#[test]
fn sequences_that_outgrow_the_device_end_as_they_would_alone() {
    let model = TinyModel::new(Family::Qwen3, 3).write();
    let mut tiers = Tiers::new(Family::Qwen3);
    tiers.setup.limits = mneme::engine::SchedulerLimits { num_blocks: 24, max_model_len: 320, ..limits() };
    let num_output = if IS_FAST { 60 } else { 30 };
    let prompts: Vec<_> = (0..12).map(|seed| Random::new(seed).tokens(60 + 3 * seed as usize, VOCAB)).collect();
    let alone: Vec<_> = {
        let engine = tiers.start(model.path());
        prompts.iter().map(|prompt| engine.greedy(prompt, num_output)).collect()
    };
    for host_blocks in [0, 100] {
        tiers.files = mneme::paging::faulty::FaultyFiles::new(3);
        tiers.host_bytes = host_blocks * tiers.block_bytes();
        let engine = tiers.start(model.path());
        let streams: Vec<_> =
            prompts.iter().map(|prompt| engine.submit(prompt, crate::support::engine::greedy(num_output))).collect();
        for (stream, wanted) in streams.into_iter().zip(&alone) {
            assert_eq!(&collect(stream).tokens, wanted);
        }
    }
}
