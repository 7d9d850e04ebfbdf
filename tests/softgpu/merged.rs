//! Copies with adapters merged into them on the device: the CPU's numbers, so what is computed with them is what the CPU
//! computes, and what adding the adapters computes, but for roundings.

use mneme::backend::DType;
use mneme::backend::cpu::Isa;
use mneme::engine::{MergeRule, SamplingParams};
use mneme::telemetry::MergeStage;

use crate::families::{check_tokens, differences, tolerances};
use crate::merging::{Served, merging};
use crate::support::engine::{Output, Setup, TestEngine, collect, greedy};
use crate::support::random::Random;
use crate::support::tiny_model::{Family, TinyModel, VOCAB};

/// One adapter, and two of different ranks, one of them subtracted and of some modules alone.
const COMPOSITIONS: [&[(usize, f32)]; 2] = [&[(0, 1.0)], &[(0, 0.7), (1, -0.5)]];

fn run(served: &Served, prompt: &[u32], composition: &[(usize, f32)]) -> Output {
    let sampling = SamplingParams { logprobs: Some(VOCAB), prompt_logprobs: Some(VOCAB), ..greedy(6) };
    collect(served.submit(prompt, sampling, composition))
}

fn check(family: Family, dtype: DType) {
    let model = TinyModel::new(family, 31);
    let written = model.write();
    let prompt = Random::new(4).tokens(40, VOCAB);
    let (most, most_mean) = tolerances(dtype);
    for composition in COMPOSITIONS {
        let what = format!("{family:?} in {dtype} under {composition:?}");
        // Weights of the device's type, multiplied by f32.
        let isa = Isa::best().min(Isa::Avx512);
        let exact = Setup { isa, dtype: Some(dtype), kv_dtype: DType::F32, ..Setup::default() };
        let on_cpu = Served::with(TestEngine::start_on_cpu(written.path(), merging(exact)), &model, MergeRule::Always);
        let setup = Setup { kv_dtype: dtype, ..Setup::default() };
        let on_gpu =
            |rule| Served::with(TestEngine::start_on_softgpu(written.path(), merging(setup.clone())), &model, rule);
        let (merged, added) = (on_gpu(MergeRule::Always), on_gpu(MergeRule::Never));
        on_cpu.merge(composition);
        merged.merge(composition);
        let wanted = run(&on_cpu, &prompt, composition);
        let (found, applied) = (run(&merged, &prompt, composition), run(&added, &prompt, composition));
        assert_eq!([&wanted, &found, &applied].map(|output| output.reuse.is_merged), [true, true, false]);
        assert_eq!(added.metrics().stage(), MergeStage::None);
        // The CPU multiplies by f32; both of the device's forms have its roundings.
        for (form, other, times) in [("merged on the CPU", &wanted, 1.0), ("added", &applied, 2.0)] {
            let (worst, mean) = differences(&found, other);
            eprintln!("{what}, {form}: worst {worst:.5}, mean {mean:.6}");
            let is_close = worst < times * most && mean < times * most_mean;
            assert!(is_close, "{what}, {form}: off by {worst}, {mean} on average");
            assert!(mean > 0.0, "{what}, {form}: to the bit");
            check_tokens(&found, other, times * most, &what);
        }
        let (_, without) = differences(&found, &run(&merged, &prompt, &[]));
        assert!(without > 5.0 * most_mean, "{what}: only {without} on average from no adapters");
    }
}

#[test]
fn llama_is_the_cpus_in_bf16() {
    check(Family::Llama, DType::BF16);
}

#[test]
fn llama3_is_the_cpus_in_f16() {
    check(Family::Llama3, DType::F16);
}

#[test]
fn qwen2_is_the_cpus_in_bf16() {
    check(Family::Qwen2, DType::BF16);
}

#[test]
fn qwen3_is_the_cpus_in_f16() {
    check(Family::Qwen3, DType::F16);
}

#[test]
fn gemma2_is_the_cpus_in_bf16() {
    check(Family::Gemma2, DType::BF16);
}

#[test]
fn gemma3_is_the_cpus_in_f16() {
    check(Family::Gemma3, DType::F16);
}
