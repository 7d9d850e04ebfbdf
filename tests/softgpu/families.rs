//! Tiny models of every family: what the CPU backend computes with f32 activations is what CUDA must come to.

use mneme::backend::DType;
use mneme::engine::SamplingParams;

use crate::support::engine::{Output, Setup, TestEngine, collect, greedy};
use crate::support::random::Random;
use crate::support::tiny_gguf::Storage;
use crate::support::tiny_model::{Family, TinyModel, VOCAB, WINDOW, Written};

/// Longer than the sliding window and than the context that RoPE scaling stretches.
const PROMPT: usize = 100;
const NUM_OUTPUT: usize = 8;

/// How far activations of 16 bits, or a KV cache of fp8 beside bf16, may move a log-probability: at worst, and on average
/// over all tokens.
pub(crate) fn tolerances(kv_dtype: DType) -> (f64, f64) {
    match kv_dtype {
        DType::F16 => (0.06, 0.006),
        DType::F8E4M3 => (3.7, 0.17),
        _ => (0.4, 0.04),
    }
}

fn run(engine: &TestEngine, prompt: &[u32]) -> Output {
    let sampling = SamplingParams { logprobs: Some(VOCAB), prompt_logprobs: Some(VOCAB), ..greedy(NUM_OUTPUT) };
    collect(engine.submit(prompt, sampling))
}

/// Worst and mean difference of the log-probabilities of all tokens behind every prompt position.
pub(crate) fn differences(found: &Output, wanted: &Output) -> (f64, f64) {
    assert_eq!(found.prompt_logprobs.len(), wanted.prompt_logprobs.len());
    let (mut worst, mut sum, mut count) = (0.0f64, 0.0, 0usize);
    for (found, wanted) in found.prompt_logprobs.iter().zip(&wanted.prompt_logprobs).skip(1) {
        let (found, wanted) = (found.as_ref().unwrap(), wanted.as_ref().unwrap());
        let mut by_id = [f32::NAN; VOCAB];
        wanted.top.iter().for_each(|top| by_id[top.id as usize] = top.logprob);
        for top in &found.top {
            let off = f64::from((top.logprob - by_id[top.id as usize]).abs());
            assert!(off.is_finite());
            worst = worst.max(off);
            sum += off;
            count += 1;
        }
    }
    (worst, sum / count as f64)
}

/// The same tokens up to one that the tolerance may decide.
pub(crate) fn check_tokens(found: &Output, wanted: &Output, tolerance: f64, what: &str) {
    for (step, (found, wanted_id)) in found.tokens.iter().zip(&wanted.tokens).enumerate() {
        if found != wanted_id {
            let [best, second] = [0, 1].map(|rank| wanted.logprobs[step].top[rank].logprob);
            let gap = f64::from(best - second);
            return assert!(gap < 2.0 * tolerance, "{what}: token {step} is {found}, wanted {wanted_id}, gap {gap}");
        }
    }
    assert_eq!(found.tokens.len(), wanted.tokens.len(), "{what}");
}

fn check(written: &Written, on_cpu: Setup, dtype: DType, what: &str) {
    let prompt = Random::new(3).tokens(PROMPT, VOCAB);
    let cpu = TestEngine::start_on_cpu(written.path(), on_cpu);
    let gpu = TestEngine::start_on_softgpu(written.path(), Setup { kv_dtype: dtype, ..Setup::default() });
    let (wanted, found) = (run(&cpu, &prompt), run(&gpu, &prompt));
    let (worst, mean) = differences(&found, &wanted);
    eprintln!("{what} {dtype}: worst {worst:.5}, mean {mean:.6}");
    let (most, most_mean) = tolerances(dtype);
    assert!(worst < most && mean < most_mean, "{what} in {dtype}: off by {worst}, {mean} on average");
    check_tokens(&found, &wanted, most, what);
    let (wanted, found) = (cpu.embed(&prompt), gpu.embed(&prompt));
    let worst = wanted.iter().zip(&found).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    eprintln!("{what} {dtype}: embedding {worst:.6}");
    assert!(f64::from(worst) < most / 10.0, "{what} in {dtype}: an embedding is off by {worst}");
}

fn check_family(family: Family) {
    let model = TinyModel::new(family, 11).write();
    for dtype in [DType::BF16, DType::F16] {
        let exact = Setup { dtype: Some(DType::F32), kv_dtype: DType::F32, ..Setup::default() };
        check(&model, exact, dtype, &format!("{family:?}"));
    }
}

#[test]
fn llama_is_the_cpus() {
    check_family(Family::Llama);
}

#[test]
fn llama3_is_the_cpus() {
    check_family(Family::Llama3);
}

#[test]
fn qwen2_is_the_cpus() {
    check_family(Family::Qwen2);
}

#[test]
fn qwen3_is_the_cpus() {
    check_family(Family::Qwen3);
}

#[test]
fn gemma2_is_the_cpus() {
    check_family(Family::Gemma2);
}

#[test]
fn gemma3_is_the_cpus() {
    const { assert!(PROMPT > 3 * WINDOW) };
    check_family(Family::Gemma3);
}

/// Quantised checkpoints are unpacked, on the CPU to f32.
#[test]
fn quantised_weights_are_what_their_blocks_say() {
    let storage_of = |name: &str| match name {
        _ if name.contains("norm") => Storage::F32,
        _ if name.contains("mlp") => Storage::Q4_0,
        _ => Storage::Q8_0,
    };
    let model = TinyModel::new(Family::Llama, 5).write_gguf(storage_of);
    let exact = Setup { dtype: Some(DType::F32), kv_dtype: DType::F32, ..Setup::default() };
    check(&model, exact, DType::BF16, "quantised");
}
