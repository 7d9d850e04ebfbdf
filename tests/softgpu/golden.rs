//! Golden data on the software GPU: a tiny model with adapters against PEFT, and the tokens of SmolLM2-135M against the
//! CPU backend, which real golden data is for.

use std::io::Write;

use mneme::backend::DType;
use mneme::engine::SamplingParams;

use crate::support::engine::{Setup, TestEngine, collect, greedy, limits};
use crate::support::peft::{self, Tolerance};
use crate::support::{golden, models};

/// How far bf16 arithmetic may move a logit; a margin below it decides nothing.
const NOISE: f32 = 0.25;

/// Few: a token of this model takes the software GPU seconds.
const NUM_OUTPUT: usize = 4;

#[test]
fn smollm2_generates_the_tokens_of_the_cpu() {
    let Some(path) = models::model_path("smollm2-135m-instruct") else { return };
    let records = golden::load("smollm2-135m").records;
    let record = records.iter().min_by_key(|record| record.prompt_ids.len()).unwrap();
    let setup = Setup { dtype: Some(DType::BF16), tied: true, ..Setup::default() };
    let wanted = {
        let cpu = TestEngine::start_on_cpu(&path, setup.clone());
        collect(cpu.submit(&record.prompt_ids, SamplingParams { logprobs: Some(2), ..greedy(NUM_OUTPUT) }))
    };
    let gpu = TestEngine::start_on_softgpu(&path, Setup { limits: limits(), ..setup });
    let found = collect(gpu.submit(&record.prompt_ids, greedy(NUM_OUTPUT))).tokens;
    let text = format!("SmolLM2: {} prompt tokens, CPU {:?}, GPU {found:?}\n", record.prompt_ids.len(), wanted.tokens);
    std::io::stderr().write_all(text.as_bytes()).unwrap();
    assert_eq!(found.len(), NUM_OUTPUT);
    if let Some(step) = found.iter().zip(&wanted.tokens).position(|(a, b)| a != b) {
        let [best, second] = [0, 1].map(|rank| wanted.logprobs[step].top[rank].logprob);
        assert!(best - second <= NOISE, "differs at step {step}, where the CPU's margin is {}", best - second);
    }
}

/// Each adapter, both composed, all beside each other, added and merged.
#[test]
fn a_tiny_model_with_adapters_matches_peft() {
    // Two layers of random weights pass on each rounding of an activation as it is.
    for (dtype, most) in [(DType::BF16, 0.8), (DType::F16, 0.1)] {
        let tolerance = Tolerance { most, most_mean: most / 10.0 };
        let setup = Setup { kv_dtype: dtype, ..Setup::default() };
        peft::check_added(TestEngine::start_on_softgpu(&peft::model(), setup.clone()), tolerance);
        peft::check_merged(|| TestEngine::start_on_softgpu(&peft::model(), peft::merging(setup.clone())), tolerance);
    }
}
