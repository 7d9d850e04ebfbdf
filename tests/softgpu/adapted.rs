//! Adapters on the device: what the CPU backend computes with f32 activations is what CUDA must come to. That nothing but the
//! request decides it `generation/adapters.rs` tests for every device.

use mneme::backend::DType;
use mneme::backend::cpu::Isa;
use mneme::engine::{LoadedAdapter, OutputStream, SamplingParams};

use crate::adapters::{COMPOSITIONS, adapters, compose, load, submit};
use crate::families::{check_tokens, differences, tolerances};
use crate::support::engine::{Output, Setup, TestEngine, collect, greedy};
use crate::support::random::Random;
use crate::support::tiny_adapter::TinyAdapter;
use crate::support::tiny_model::{Family, TinyModel, VOCAB};

/// What a prompt gives on an engine under every composition, all at once.
fn run_all(engine: &TestEngine, adapters: &[TinyAdapter], prompt: &[u32], sampling: &SamplingParams) -> Vec<Output> {
    let loaded: Vec<LoadedAdapter> = adapters.iter().map(|adapter| load(engine, adapter)).collect();
    let streams: [OutputStream; COMPOSITIONS.len()] =
        COMPOSITIONS.map(|composition| submit(engine, prompt, sampling.clone(), compose(&loaded, composition)));
    streams.into_iter().map(collect).collect()
}

fn check(family: Family, dtype: DType) {
    let model = TinyModel::new(family, 31);
    let (written, adapters) = (model.write(), adapters(&model));
    // Beyond it bf16 adapters are multiplied in pairs.
    let isa = Isa::best().min(Isa::Avx512);
    let exact = Setup { isa, dtype: Some(DType::F32), kv_dtype: DType::F32, ..Setup::default() };
    let cpu = TestEngine::start_on_cpu(written.path(), exact);
    let setup = Setup { kv_dtype: dtype, ..Setup::default() };
    let gpu = TestEngine::start_on_softgpu(written.path(), setup);
    let prompt = Random::new(4).tokens(40, VOCAB);
    let sampling = SamplingParams { logprobs: Some(VOCAB), prompt_logprobs: Some(VOCAB), ..greedy(6) };
    let [wanted, found] = [&cpu, &gpu].map(|engine| run_all(engine, &adapters, &prompt, &sampling));
    let base = &wanted[0];
    let (most, most_mean) = tolerances(dtype);
    for ((wanted, found), composition) in wanted.iter().zip(&found).zip(COMPOSITIONS) {
        let what = format!("{family:?} in {dtype} under {composition:?}");
        let (worst, mean) = differences(found, wanted);
        eprintln!("{what}: worst {worst:.5}, mean {mean:.6}");
        assert!(worst < most && mean < most_mean, "{what}: off by {worst}, {mean} on average");
        check_tokens(found, wanted, most, &what);
        // The first composition is none.
        if !composition.is_empty() {
            let (_, without) = differences(found, base);
            assert!(without > 5.0 * most_mean, "{what}: only {without} on average from no adapters");
        }
    }
}

#[test]
fn llama_is_the_cpus_in_f16() {
    check(Family::Llama, DType::F16);
}

#[test]
fn llama3_is_the_cpus_in_bf16() {
    check(Family::Llama3, DType::BF16);
}

#[test]
fn qwen3_is_the_cpus_in_bf16() {
    check(Family::Qwen3, DType::BF16);
}

#[test]
fn gemma2_is_the_cpus_in_f16() {
    check(Family::Gemma2, DType::F16);
}

#[test]
fn qwen2_is_the_cpus_in_bf16() {
    check(Family::Qwen2, DType::BF16);
}

#[test]
fn gemma3_is_the_cpus_in_f16() {
    check(Family::Gemma3, DType::F16);
}
