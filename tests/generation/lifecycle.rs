//! Requests that arrive together, in order of priority, too many, too long, or whose callers leave.

use std::sync::atomic::Ordering;

use mneme::backend::DType;
use mneme::backend::cpu::{CpuBackend, Isa};
use mneme::engine::{
    BACKGROUND, Engine, EngineConfig, FinishReason, GenerateRequest, MergeConfig, OutputEvent, OutputStream,
    SamplingParams, SchedulerLimits, SubmitError, Task,
};
use mneme::models::{Checkpoint, Model};

use crate::IS_FAST;
use crate::support::engine::{Output, Setup, TestEngine, collect, greedy, limits, metric, request};
use crate::support::random::Random;
use crate::support::tiny_model::{Family, TinyModel, VOCAB};

fn start(limits: SchedulerLimits) -> TestEngine {
    let model = TinyModel::new(Family::Llama, 4).write();
    crate::start(model.path(), Setup { limits, ..Setup::default() })
}

/// Long enough a context that a request without a limit is still running when others have arrived.
fn one_at_a_time() -> SchedulerLimits {
    SchedulerLimits { max_num_seqs: 1, max_model_len: 16_384, num_blocks: 1024, ..limits() }
}

fn prompt(len: usize) -> Vec<u32> {
    Random::new(len as u64).tokens(len, VOCAB)
}

fn generate(prompt: &[u32], max_tokens: usize) -> GenerateRequest {
    request(prompt, Task::Generate(Box::new(greedy(max_tokens))))
}

fn error_of(stream: OutputStream) -> String {
    match collect(stream).reason {
        Some(FinishReason::Error(text)) => text,
        other => panic!("wanted an error, found {other:?}"),
    }
}

/// A request that keeps the engine busy until it is dropped.
fn busy(engine: &TestEngine) -> OutputStream {
    let mut stream = engine.submit(&prompt(4), greedy(usize::MAX));
    stream.blocking_next().unwrap();
    stream
}

fn wait_for_queue(engine: &TestEngine, len: i64) {
    while engine.handle.metrics().num_requests_waiting.get() != len {
        assert!(!engine.handle.is_stopping(), "the engine failed");
        std::thread::yield_now();
    }
}

#[test]
fn urgent_requests_run_first() {
    let engine = start(one_at_a_time());
    let blocker = busy(&engine);
    let mut streams: Vec<OutputStream> = [5, 1, 3, 1]
        .into_iter()
        .map(|priority| engine.handle.submit(GenerateRequest { priority, ..generate(&prompt(20), 8) }).unwrap())
        .collect();
    wait_for_queue(&engine, 4);
    drop(blocker);
    // Only one runs at a time: when one has begun, the one before it has ended.
    for [before, next] in [[1, 3], [3, 2], [2, 0]] {
        let begun = matches!(streams[next].blocking_next(), Some(OutputEvent::Started { .. }));
        assert!(begun, "request {next} begins with something else");
        let events: Vec<OutputEvent> = std::iter::from_fn(|| streams[before].try_next()).collect();
        assert!(matches!(events.last(), Some(OutputEvent::Finished(_))), "request {next} overtook {before}");
    }
}

#[test]
fn a_prompt_that_arrives_many_times_is_computed_once() {
    let engine = start(limits());
    let blocker = busy(&engine);
    let (num_requests, prompt_len, num_output) = (6, 100, 5);
    let streams: Vec<OutputStream> =
        (0..num_requests).map(|_| engine.handle.submit(generate(&prompt(prompt_len), num_output)).unwrap()).collect();
    drop(blocker);
    let outputs: Vec<_> = streams.into_iter().map(collect).collect();
    assert!(outputs.iter().all(|output| output.tokens == outputs[0].tokens && output.tokens.len() == num_output));
    let shared = (prompt_len - 1) / 16 * 16;
    assert_eq!(outputs.iter().filter(|output| output.cached_tokens == shared).count(), num_requests - 1);
    // Once more without the blocker, whose number of steps is unknown.
    let engine = start(limits());
    let streams: Vec<OutputStream> =
        (0..num_requests).map(|_| engine.handle.submit(generate(&prompt(prompt_len), num_output)).unwrap()).collect();
    streams.into_iter().for_each(|stream| drop(collect(stream)));
    let num_computed = prompt_len + (num_requests - 1) * (prompt_len - shared) + num_requests * (num_output - 1);
    assert_eq!(metric(&engine.stop(), "iteration_tokens_total_sum"), num_computed as f64);
}

#[test]
fn salts_separate_the_prefix_cache() {
    let engine = start(limits());
    let cached = |salt: Option<&str>| {
        let request = GenerateRequest { domain: salt.unwrap_or_default().to_owned(), ..generate(&prompt(64), 2) };
        let output = collect(engine.handle.submit(request).unwrap());
        (output.cached_tokens, output.tokens)
    };
    let (first, tokens) = cached(Some("a"));
    assert_eq!(first, 0);
    assert_eq!(cached(Some("b")), (0, tokens.clone()));
    assert_eq!(cached(None), (0, tokens.clone()));
    assert_eq!(cached(Some("a")), (48, tokens.clone()));
    assert_eq!(cached(Some("b")), (48, tokens.clone()));
    assert_eq!(cached(None), (48, tokens));
}

#[test]
fn cancelled_requests_leave_nothing_behind() {
    let engine = start(SchedulerLimits { num_blocks: 64, ..limits() });
    let wanted = engine.greedy(&prompt(50), 20);
    let random = &mut Random::new(1);
    let mut open: Vec<OutputStream> = Vec::new();
    for _ in 0..crate::NUM_CANCELLED {
        let len = random.within(1, 80);
        let task = match random.below(4) {
            0 => Task::Embed,
            1 => Task::Generate(Box::new(SamplingParams { prompt_logprobs: Some(1), ..greedy(80) })),
            _ => Task::Generate(Box::new(greedy(80))),
        };
        loop {
            match engine.handle.submit(request(&prompt(len), task_again(&task))) {
                Ok(stream) => break open.push(stream),
                Err(SubmitError::QueueFull) => drop(open.pop()),
                Err(error) => panic!("{error}"),
            }
        }
        if random.once_in(3) {
            let at = random.below(open.len());
            let mut stream = open.swap_remove(at);
            if random.once_in(4) {
                let _ = stream.blocking_next();
            }
        }
    }
    drop(open);
    let after = loop {
        match engine.handle.submit(generate(&prompt(50), 20)) {
            Ok(stream) => break collect(stream),
            Err(SubmitError::QueueFull) => std::thread::yield_now(),
            Err(error) => panic!("{error}"),
        }
    };
    assert_eq!(after.tokens, wanted);
    let handle = engine.stop();
    let metrics = handle.metrics();
    assert_eq!(metrics.kv_cache_usage_perc.get(), 0.0);
    assert_eq!((metrics.num_requests_running.get(), metrics.num_requests_waiting.get()), (0, 0));
}

fn task_again(task: &Task) -> Task {
    match task {
        Task::Embed => Task::Embed,
        Task::Deposit { is_durable, kept_in } => Task::Deposit { is_durable: *is_durable, kept_in: kept_in.clone() },
        Task::Generate(sampling) => Task::Generate(sampling.clone()),
    }
}

#[test]
fn a_full_queue_refuses() {
    let engine = start(SchedulerLimits { max_num_waiting: 4, ..one_at_a_time() });
    // The queue is long, and one runs at a time.
    let num_output = if IS_FAST { 5 } else { 1 };
    let wanted = engine.greedy(&prompt(10), num_output);
    let blocker = busy(&engine);
    let mut accepted = Vec::new();
    let error = loop {
        match engine.handle.submit(generate(&prompt(10), num_output)) {
            Ok(stream) => accepted.push(stream),
            Err(error) => break error,
        }
        assert!(accepted.len() < 1000, "the queue has no end");
    };
    assert_eq!(error, SubmitError::QueueFull);
    drop(blocker);
    assert!(accepted.into_iter().all(|stream| collect(stream).tokens == wanted));
}

/// Whatever ends the engine, a panic of its thread included, no caller waits for ever.
#[test]
fn an_engine_that_is_gone_leaves_no_stream_open() {
    let written = TinyModel::new(Family::Llama, 4).write();
    let backend = CpuBackend::new(Isa::best(), 1).unwrap();
    let model = Model::load(&backend, &Checkpoint::open(written.path()).unwrap(), None, 1024).unwrap();
    let config = EngineConfig {
        model_name: "test".into(),
        limits: limits(),
        min_kv_tokens: limits().max_model_len,
        kv_dtype: DType::BF16,
        eos_token_ids: vec![],
        seed: 1,
        merge: MergeConfig::default(),
        adapter_host_bytes: 0,
    };
    let (engine, handle) = Engine::new(backend, model, config).unwrap();
    let stream = handle.submit(generate(&prompt(10), 5)).unwrap();
    drop(engine);
    let output = collect(stream);
    assert_eq!((output.tokens.len(), output.reason), (0, None));
    assert_eq!(handle.submit(generate(&prompt(10), 5)).err(), Some(SubmitError::ShuttingDown));
}

#[test]
fn draining_finishes_what_was_accepted() {
    let engine = start(SchedulerLimits { max_num_seqs: 2, ..limits() });
    let streams: Vec<OutputStream> =
        (0..5).map(|at| engine.handle.submit(generate(&prompt(10 + at), 40)).unwrap()).collect();
    engine.handle.drain();
    assert_eq!(engine.handle.submit(generate(&prompt(10), 5)).err(), Some(SubmitError::ShuttingDown));
    for stream in streams {
        let output = collect(stream);
        assert_eq!((output.tokens.len(), output.reason), (40, Some(FinishReason::Length)));
    }
    assert!(engine.handle.is_stopping());
}

#[test]
fn impossible_prompts_get_an_error_and_the_engine_goes_on() {
    let engine = start(limits());
    let wanted = engine.greedy(&prompt(10), 5);
    let longest = limits().max_model_len - 1;
    for (bad, text) in [
        (vec![1; longest + 1], "the prompt has 1024 tokens, wanted 1 to 1023"),
        (vec![], "the prompt has 0 tokens, wanted 1 to 1023"),
        (vec![1, 300], "prompt token 300 is outside the vocabulary of 300"),
        (vec![u32::MAX], "outside the vocabulary"),
    ] {
        let error = error_of(engine.handle.submit(generate(&bad, 5)).unwrap());
        assert!(error.contains(text), "{error}");
    }
    let error = error_of(engine.handle.submit(request(&vec![1; longest + 2], Task::Embed)).unwrap());
    assert!(error.contains("wanted 1 to 1024"), "{error}");
    assert_eq!(collect(engine.submit(&vec![1; longest], greedy(9))).tokens.len(), 1);
    assert_eq!(engine.greedy(&prompt(10), 5), wanted);
}

/// The rows that one step brings to the host: a long embedding beside as many sampled sequences as there can be.
#[test]
fn embeddings_and_samples_share_a_step() {
    let engine = start(limits());
    let long = prompt(1000);
    let wanted = engine.embed(&long);
    let num_sampled = if IS_FAST { 300 } else { 100 };
    let sampled = SamplingParams { seed: Some(1), max_tokens: num_sampled, ..Default::default() };
    let mut samples: Vec<OutputStream> = (0..15).map(|at| engine.submit(&prompt(4 + at), sampled.clone())).collect();
    for stream in &mut samples {
        stream.blocking_next().unwrap();
    }
    assert_eq!(engine.embed(&long), wanted);
    for stream in samples {
        assert_eq!(collect(stream).tokens.len(), num_sampled);
    }
}

/// What runs in the background takes no place in anybody's step, steps aside when somebody comes, and ends all the same.
#[test]
fn the_background_waits_for_everybody_else() {
    let limits = SchedulerLimits { max_num_batched_tokens: 16, ..limits() };
    let (num_tokens, num_background_steps) = (300, 600 / 16 + 1);
    let embed = || GenerateRequest { priority: BACKGROUND, ..request(&prompt(600), Task::Embed) };
    let engine = start(limits);
    let mut foreground = engine.handle.submit(generate(&prompt(10), num_tokens)).unwrap();
    let _ = foreground.blocking_next();
    let background = engine.handle.submit(embed()).unwrap();
    assert_eq!(Output::default().finish(foreground).reason, Some(FinishReason::Length));
    let alone = collect(background).embedding;
    let num_steps = |engine: &TestEngine| engine.handle.metrics().num_steps.load(Ordering::Relaxed) as usize;
    let num_done = num_steps(&engine);
    // A step is counted when its events have been sent.
    assert!(num_done >= num_tokens + num_background_steps - 1, "{num_done} steps: both ran in some of them");
    let background = engine.handle.submit(embed()).unwrap();
    while num_steps(&engine) <= num_done + 1 {
        std::thread::yield_now();
    }
    assert_eq!(collect(engine.handle.submit(generate(&prompt(10), 5)).unwrap()).tokens.len(), 5);
    assert_eq!(collect(background).embedding, alone);
}
