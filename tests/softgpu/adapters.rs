//! Adapters on the device: what the CPU backend computes with f32 activations is what CUDA must come to, and a request
//! has the same bits whatever runs beside it.

use mneme::backend::DType;
use mneme::backend::cpu::Isa;
use mneme::engine::{
    AppliedAdapter, GenerateRequest, LoadedAdapter, OutputStream, SamplingParams, SchedulerLimits, Task,
};
use mneme::telemetry::Evictor;

use crate::families::{check_tokens, differences, tolerances};
use crate::invariance::fingerprint;
use crate::support::engine::{Output, Setup, TestEngine, collect, greedy, limits, request};
use crate::support::random::Random;
use crate::support::tiny_adapter::{ALL, TinyAdapter};
use crate::support::tiny_model::{Family, TinyModel, VOCAB};

/// Adapters of a request, by number.
type Composition = &'static [(usize, f32)];

const COMPOSITIONS: [Composition; 6] =
    [&[], &[(0, 1.0)], &[(1, 0.7)], &[(2, -0.5)], &[(0, 0.7), (1, 0.3)], &[(2, 1.5), (0, 0.7), (1, 0.3)]];

/// Of a rank of no whole vector, one of a whole tile, and a subset of the modules.
fn adapters(model: &TinyModel) -> [TinyAdapter; 3] {
    [
        TinyAdapter::of(model, &ALL, 3, 1),
        TinyAdapter::of(model, &ALL, 16, 2),
        TinyAdapter::of(model, &["self_attn.v_proj", "mlp.down_proj"], 40, 3),
    ]
}

/// An engine with adapters in it.
struct Adapted {
    engine: TestEngine,
    loaded: Vec<LoadedAdapter>,
}

impl Adapted {
    fn new(engine: TestEngine, adapters: &[TinyAdapter]) -> Self {
        let load = |adapter: &TinyAdapter| engine.handle.load_adapter(adapter.write().path()).unwrap();
        let loaded = adapters.iter().map(load).collect();
        Self { engine, loaded }
    }

    fn submit(&self, prompt: &[u32], sampling: &SamplingParams, composition: Composition) -> OutputStream {
        let applied = |&(at, scale): &(usize, f32)| AppliedAdapter { adapter: self.loaded[at].clone(), scale };
        let task = Task::Generate(Box::new(sampling.clone()));
        let adapters = composition.iter().map(applied).collect();
        self.engine.handle.submit(GenerateRequest { adapters, ..request(prompt, task) }).unwrap()
    }

    /// What the prompt gives under every composition, all at once.
    fn run_all(&self, prompt: &[u32], sampling: &SamplingParams) -> Vec<Output> {
        let streams = COMPOSITIONS.map(|composition| self.submit(prompt, sampling, composition));
        streams.into_iter().map(collect).collect()
    }
}

fn check(family: Family, dtype: DType) {
    let model = TinyModel::new(family, 31);
    let (written, adapters) = (model.write(), adapters(&model));
    // Beyond it bf16 adapters are multiplied in pairs.
    let isa = Isa::best().min(Isa::Avx512);
    let exact = Setup { isa, dtype: Some(DType::F32), kv_dtype: DType::F32, ..Setup::default() };
    let cpu = Adapted::new(TestEngine::start_on_cpu(written.path(), exact), &adapters);
    let setup = Setup { kv_dtype: dtype, ..Setup::default() };
    let gpu = Adapted::new(TestEngine::start_on_softgpu(written.path(), setup), &adapters);
    let prompt = Random::new(4).tokens(40, VOCAB);
    let sampling = SamplingParams { logprobs: Some(VOCAB), prompt_logprobs: Some(VOCAB), ..greedy(6) };
    let (wanted, found) = (cpu.run_all(&prompt, &sampling), gpu.run_all(&prompt, &sampling));
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
fn qwen2_is_the_cpus_in_bf16() {
    check(Family::Qwen2, DType::BF16);
}

#[test]
fn gemma3_is_the_cpus_in_f16() {
    check(Family::Gemma3, DType::F16);
}

/// Alone and whole; all at once, in chunks, with a cache of prefixes.
#[test]
fn a_request_has_the_same_bits_alone_and_among_other_adapters() {
    let model = TinyModel::new(Family::Qwen3, 5);
    let (written, adapters) = (model.write(), adapters(&model));
    let start = |limits: SchedulerLimits| {
        let setup = Setup { limits, ..Setup::default() };
        Adapted::new(TestEngine::start_on_softgpu(written.path(), setup), &adapters)
    };
    let alone = start(SchedulerLimits { prefix_caching: false, ..limits() });
    let together = start(SchedulerLimits { max_num_batched_tokens: 23, num_blocks: 70, ..limits() });
    let never = TestEngine::start_on_softgpu(written.path(), Setup::default());
    let mut random = Random::new(8);
    let shared = random.tokens(33, VOCAB);
    let sampling = SamplingParams { logprobs: Some(3), ..greedy(5) };
    let requests: Vec<(Vec<u32>, Composition)> = (0..2 * COMPOSITIONS.len())
        .map(|at| {
            let own = 1 + 7 * (at % 5);
            let prompt = [&shared[..33 * (at % 2)], &random.tokens(own, VOCAB)].concat();
            (prompt, COMPOSITIONS[at % COMPOSITIONS.len()])
        })
        .collect();
    let submitted = requests.iter().map(|(prompt, composition)| together.submit(prompt, &sampling, composition));
    let streams: Vec<OutputStream> = submitted.collect();
    for ((prompt, composition), stream) in requests.iter().zip(streams) {
        let found = fingerprint(&collect(stream));
        let wanted = fingerprint(&collect(alone.submit(prompt, &sampling, composition)));
        assert_eq!(found, wanted, "{composition:?}");
        if composition.is_empty() {
            let base = fingerprint(&collect(never.submit(prompt, sampling.clone())));
            assert_eq!(found, base, "an engine without adapters says something else");
        }
    }
}

/// Adapters that have no room beside each other come and go, through the device's copies, and change nothing.
#[test]
fn adapters_take_turns_in_a_small_pool() {
    let model = TinyModel::new(Family::Qwen3, 6);
    let (written, adapters) = (model.write(), adapters(&model));
    let start = |num_blocks: usize| {
        let limits = SchedulerLimits { num_blocks, max_model_len: 96, ..limits() };
        Adapted::new(TestEngine::start_on_softgpu(written.path(), Setup { limits, ..Setup::default() }), &adapters)
    };
    let (roomy, tight) = (start(200), start(28));
    let sampling = SamplingParams { logprobs: Some(3), ..greedy(5) };
    let mut random = Random::new(9);
    let requests: Vec<(Vec<u32>, Composition)> =
        (0..10).map(|at| (random.tokens(10 + 5 * (at % 4), VOCAB), COMPOSITIONS[at % 5])).collect();
    let run_all = |adapted: &Adapted| -> Vec<_> {
        let submitted = requests.iter().map(|(prompt, composition)| adapted.submit(prompt, &sampling, composition));
        let streams: Vec<OutputStream> = submitted.collect();
        streams.into_iter().map(|stream| fingerprint(&collect(stream))).collect()
    };
    assert_eq!(run_all(&tight), run_all(&roomy));
    let evictions = |adapted: &Adapted| adapted.engine.handle.metrics().adapters.num_evictions(Evictor::Adapter);
    assert_eq!(evictions(&roomy), 0);
    assert!(evictions(&tight) > 0);
}
