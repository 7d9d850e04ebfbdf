//! A request's output is bit-identical however it is served: alone or among others, whole or in chunks, preempted or
//! not, from a warm prefix cache or a cold one, on one thread or three, in blocks of any size.

use mneme::backend::DType;
use mneme::backend::cpu::Isa;
use mneme::engine::{OutputStream, SamplingParams, SchedulerLimits, TokenLogprobs};

use crate::support::engine::{Output, Setup, TestEngine, collect, limits};
use crate::support::random::Random;
use crate::support::tiny_model::{Family, TinyModel, VOCAB};
use crate::{GEMMA, NUM_WORKLOADS, kinds};

const MAX_MODEL_LEN: usize = 160;

struct Request {
    prompt: Vec<u32>,
    sampling: SamplingParams,
}

/// Everything of an output that must not change, floats by their bits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fingerprint {
    tokens: Vec<u32>,
    logprobs: Vec<(u32, u32)>,
    prompt_logprobs: Vec<(u32, u32)>,
}

fn bits<'a>(rows: impl Iterator<Item = &'a TokenLogprobs>) -> Vec<(u32, u32)> {
    rows.flat_map(|row| row.top.iter().chain([&row.chosen]).map(|top| (top.id, top.logprob.to_bits()))).collect()
}

pub(crate) fn fingerprint(output: &Output) -> Fingerprint {
    Fingerprint {
        tokens: output.tokens.clone(),
        logprobs: bits(output.logprobs.iter()),
        prompt_logprobs: bits(output.prompt_logprobs.iter().flatten()),
    }
}

/// Requests that share a beginning or do not, greedy or sampled, with and without log-probabilities.
fn workload(random: &mut Random) -> Vec<Request> {
    let num_shared = random.below(64);
    let shared = random.tokens(num_shared, VOCAB);
    let make = |random: &mut Random| {
        let mut prompt = if random.once_in(2) { shared.clone() } else { vec![] };
        let num_own = random.within(1, 70);
        prompt.extend(random.tokens(num_own, VOCAB));
        let mut sampling = SamplingParams { temperature: 0.0, max_tokens: random.within(1, 24), ..Default::default() };
        match random.below(4) {
            0 => {}
            1 => sampling.logprobs = Some(3),
            2 => sampling.prompt_logprobs = Some(2),
            _ => {
                sampling.temperature = 0.9;
                sampling.top_p = 0.95;
                sampling.repetition_penalty = 1.1;
                sampling.seed = Some(random.next());
                sampling.logprobs = Some(1);
            }
        }
        Request { prompt, sampling }
    };
    (0..random.within(3, 8)).map(|_| make(random)).collect()
}

/// Runs all at once; some arrive only when an earlier one has begun.
fn run_together(engine: &TestEngine, requests: &[Request], random: &mut Random) -> Vec<Output> {
    let mut running: Vec<(Output, OutputStream)> = Vec::new();
    for request in requests {
        if !running.is_empty() && random.once_in(3) {
            let at = random.below(running.len());
            let (output, stream) = &mut running[at];
            if let Some(event) = stream.blocking_next() {
                output.absorb(event);
            }
        }
        running.push((Output::default(), engine.submit(&request.prompt, request.sampling.clone())));
    }
    running.into_iter().map(|(output, stream)| output.finish(stream)).collect()
}

/// A way to serve.
struct Variant {
    name: &'static str,
    limits: SchedulerLimits,
    num_threads: usize,
}

fn variants() -> Vec<Variant> {
    let base = SchedulerLimits { max_model_len: MAX_MODEL_LEN, ..limits() };
    let cold = SchedulerLimits { prefix_caching: false, ..base };
    let variant = |name, limits, num_threads| Variant { name, limits, num_threads };
    vec![
        variant("in a batch", cold, 1),
        variant("in chunks of 7", SchedulerLimits { max_num_batched_tokens: 7, ..cold }, 1),
        variant("in chunks of 33, cached", SchedulerLimits { max_num_batched_tokens: 33, ..base }, 2),
        variant("few prompt logits", SchedulerLimits { max_prompt_logits: 5, ..base }, 1),
        variant("preempted", SchedulerLimits { num_blocks: 11, ..cold }, 1),
        variant("preempted, cached", SchedulerLimits { num_blocks: 11, max_num_batched_tokens: 33, ..base }, 1),
        variant("blocks of 32", SchedulerLimits { block_size: 32, ..base }, 3),
        variant("blocks of 64", SchedulerLimits { block_size: 64, num_blocks: 64, ..base }, 1),
    ]
}

pub(crate) fn check(family: Family, isa: Isa, dtype: Option<DType>, kv_dtype: DType) {
    let model = TinyModel::new(family, 1).write();
    let setup = |limits: SchedulerLimits, num_threads: usize| Setup {
        limits,
        dtype,
        kv_dtype,
        isa,
        num_threads,
        ..Setup::default()
    };
    let start = |variant: &Variant| crate::start(model.path(), setup(variant.limits, variant.num_threads));
    let variants = variants();
    let alone = start(&variants[0]);
    let engines: Vec<TestEngine> = variants.iter().map(start).collect();
    let mut num_cached = 0;
    // Some times the layers, a quarter of the seeds.
    let num_seeds = if family.is_gemma() { NUM_WORKLOADS.div_ceil(4) } else { NUM_WORKLOADS };
    let is_preempting = |variant: &Variant| variant.limits.num_blocks == 11;
    // How often blocks run out depends on when requests arrive: it goes on until they have.
    let has_preempted = |(variant, engine): (&Variant, &TestEngine)| {
        !is_preempting(variant) || engine.handle.metrics().num_preemptions.get() > 0
    };
    for seed in 0..10 * num_seeds {
        if seed >= num_seeds && variants.iter().zip(&engines).all(has_preempted) {
            break;
        }
        let random = &mut Random::new(seed * 1000 + isa as u64);
        let requests = workload(random);
        let wanted: Vec<Fingerprint> = requests
            .iter()
            .map(|request| fingerprint(&collect(alone.submit(&request.prompt, request.sampling.clone()))))
            .collect();
        for (variant, engine) in variants.iter().zip(&engines) {
            let passes = if variant.limits.prefix_caching { 2 } else { 1 };
            for pass in 0..passes {
                let outputs = run_together(engine, &requests, random);
                for (at, (output, wanted)) in outputs.iter().zip(&wanted).enumerate() {
                    let what = format!("{family:?} on {isa}, {}, seed {seed}, pass {pass}, request {at}", variant.name);
                    assert_eq!(&fingerprint(output), wanted, "{what}");
                    num_cached += output.cached_tokens;
                }
            }
        }
    }
    assert!(num_cached > 0, "nothing ever came from the prefix cache");
    for (variant, engine) in variants.iter().zip(engines) {
        let num_preemptions = engine.stop().metrics().num_preemptions.get();
        assert_eq!(num_preemptions > 0, is_preempting(variant), "{}: {num_preemptions}", variant.name);
    }
}

fn check_family(family: Family) {
    for (isa, dtype, kv_dtype) in kinds() {
        check(family, isa, dtype, kv_dtype);
    }
}

#[test]
fn llama_output_depends_on_the_request_alone() {
    check_family(Family::Llama);
}

#[test]
fn llama3_output_depends_on_the_request_alone() {
    check_family(Family::Llama3);
}

#[test]
fn qwen2_output_depends_on_the_request_alone() {
    check_family(Family::Qwen2);
}

#[test]
fn qwen3_output_depends_on_the_request_alone() {
    check_family(Family::Qwen3);
}

#[test]
fn gemma2_output_depends_on_the_request_alone() {
    check_family(Family::Gemma2);
}

#[test]
fn gemma3_output_depends_on_the_request_alone() {
    check_family(GEMMA);
}

/// Quantised weights run through other kernels.
#[test]
fn quantised_output_depends_on_the_request_alone() {
    use crate::support::tiny_gguf::Storage;
    let storage_of = |name: &str| if name.contains("norm") { Storage::F32 } else { Storage::Q8_0 };
    let model = TinyModel::new(Family::Llama, 1).write_gguf(storage_of);
    for (isa, ..) in kinds().into_iter().filter(|(_, dtype, _)| dtype.is_none()) {
        let start = |limits| crate::start(model.path(), Setup { limits, isa, ..Setup::default() });
        let alone = start(SchedulerLimits { prefix_caching: false, ..limits() });
        let chunked = start(SchedulerLimits { max_num_batched_tokens: 7, ..limits() });
        for seed in 0..NUM_WORKLOADS {
            let random = &mut Random::new(seed);
            let requests = workload(random);
            let outputs = run_together(&chunked, &requests, random);
            for (request, output) in requests.iter().zip(outputs) {
                let wanted = collect(alone.submit(&request.prompt, request.sampling.clone()));
                assert_eq!(fingerprint(&output), fingerprint(&wanted), "{isa}, seed {seed}");
            }
        }
    }
}

#[test]
fn embeddings_depend_on_the_prompt_alone() {
    let model = TinyModel::new(GEMMA, 1).write();
    let start = |limits| crate::start(model.path(), Setup { limits, ..Setup::default() });
    let whole = start(limits());
    let chunked = start(SchedulerLimits { max_num_batched_tokens: 7, ..limits() });
    let tiny = start(SchedulerLimits { max_model_len: MAX_MODEL_LEN, num_blocks: 10, ..limits() });
    for seed in 0..NUM_WORKLOADS {
        let random = &mut Random::new(seed);
        let requests = workload(random);
        let wanted = whole.embed(&requests[0].prompt);
        assert!(wanted.iter().any(|value| value.abs() > 0.01));
        for engine in [&whole, &chunked, &tiny] {
            let others: Vec<OutputStream> =
                requests.iter().map(|request| engine.submit(&request.prompt, request.sampling.clone())).collect();
            assert_eq!(engine.embed(&requests[0].prompt), wanted, "seed {seed}");
            others.into_iter().for_each(|stream| drop(collect(stream)));
        }
    }
}
