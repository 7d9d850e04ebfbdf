//! The engine with products by cuBLASLt: answers are near the CPU's, steps are replayed, and bits depend on what is computed
//! together, which they do not with our own kernels.

use mneme::backend::DType;
use mneme::backend::cuda::CudaBackend;
use mneme::engine::SamplingParams;

use crate::families::{check_tokens, differences, tolerances};
use crate::graphs;
use crate::invariance::fingerprint;
use crate::support::engine::{Output, Setup, TestEngine, collect, greedy, limits};
use crate::support::random::Random;
use crate::support::softgpu;
use crate::support::tiny_model::{Family, TinyModel, VOCAB, Written};

fn model(family: Family) -> Written {
    TinyModel::new(family, 17).write()
}

/// What a prompt gives when so many tokens are computed in one step.
fn ask(backend: CudaBackend, model: &Written, max_num_batched_tokens: usize) -> Output {
    let setup =
        Setup { limits: mneme::engine::SchedulerLimits { max_num_batched_tokens, ..limits() }, ..Setup::default() };
    let engine = TestEngine::start(backend, model.path(), setup);
    let sampling = SamplingParams { logprobs: Some(VOCAB), prompt_logprobs: Some(VOCAB), ..greedy(4) };
    collect(engine.submit(&Random::new(9).tokens(60, VOCAB), sampling))
}

#[test]
fn answers_are_near_the_cpus_and_steps_are_replayed() {
    for (family, dtype) in [(Family::Llama, DType::BF16), (Family::Gemma3, DType::F16)] {
        let model = model(family);
        let Some(backend) = softgpu::fast_backend(dtype) else { return };
        let (found, num_replayed) = graphs::run(backend, model.path(), dtype);
        assert!(num_replayed >= 8, "only {num_replayed} steps were replayed");
        let exact = Setup { dtype: Some(DType::F32), kv_dtype: DType::F32, ..Setup::default() };
        let cpu = TestEngine::start_on_cpu(model.path(), exact);
        let requests = graphs::requests();
        for (at, (prompt, sampling)) in requests.into_iter().enumerate().filter(|(_, (_, s))| s.seed.is_none()) {
            let on_cpu = collect(cpu.submit(&prompt, sampling));
            check_tokens(&found[at], &on_cpu, tolerances(dtype).0, &format!("{family:?}, request {at}"));
        }
    }
}

/// A prompt in one step and in four: this is what the tests of invariance would find.
#[test]
fn bits_depend_on_what_is_computed_together() {
    let model = model(Family::Llama);
    let Some(fast) = softgpu::fast_backend(DType::BF16) else { return };
    let (whole, parts) = (ask(fast, &model, 512), ask(softgpu::fast_backend(DType::BF16).unwrap(), &model, 16));
    let (worst, mean) = differences(&parts, &whole);
    let (most, most_mean) = tolerances(DType::BF16);
    assert!(worst < most && mean < most_mean, "off by {worst}, {mean} on average");
    if !softgpu::is_replaced() {
        assert_ne!(fingerprint(&parts), fingerprint(&whole));
    }
    let exact = || softgpu::backend(DType::BF16);
    assert_eq!(fingerprint(&ask(exact(), &model, 16)), fingerprint(&ask(exact(), &model, 512)));
}
