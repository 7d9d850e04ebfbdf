//! The step loop allocates nothing: memory is taken when a request arrives and when the engine starts, for the largest
//! step there can be.
//!
//! The allocator counts what every thread but the test's own asks for while counting is on, so kernels on the pool's
//! threads are covered as well.

#![allow(unsafe_code, missing_docs, clippy::unwrap_used)]

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use mneme::backend::DType;
use mneme::backend::cpu::Isa;
use mneme::engine::{
    AppliedAdapter, GenerateRequest, LoadedAdapter, MergeConfig, MergeRule, OutputEvent, OutputStream, SchedulerLimits,
    Task,
};
use mneme::telemetry::MergeStage;
use support::engine::{Setup, TestEngine, collect, greedy, limits, request};
use support::random::Random;
use support::tiny_adapter::{ALL, TinyAdapter};
use support::tiny_gguf::Storage;
use support::tiny_model::{Family, TinyModel, VOCAB};

static COUNTING: AtomicBool = AtomicBool::new(false);
/// Set by `MNEME_TRACE_ALLOCATIONS`: show where the first one is made.
static TRACING: AtomicBool = AtomicBool::new(false);

static NUM_ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static IS_TEST: Cell<bool> = const { Cell::new(false) };
}

struct CountingAllocator;

fn count() {
    if COUNTING.load(Ordering::Relaxed) && !IS_TEST.get() {
        NUM_ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        if TRACING.swap(false, Ordering::SeqCst) {
            eprintln!("{}", std::backtrace::Backtrace::force_capture());
        }
    }
}

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's promise.
        unsafe { System.realloc(block, layout, new_size) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

/// What other threads allocated while `work` ran.
fn allocations_during(work: impl FnOnce()) -> u64 {
    NUM_ALLOCATIONS.store(0, Ordering::SeqCst);
    COUNTING.store(true, Ordering::SeqCst);
    work();
    COUNTING.store(false, Ordering::SeqCst);
    NUM_ALLOCATIONS.load(Ordering::SeqCst)
}

fn engine_limits() -> SchedulerLimits {
    SchedulerLimits { max_model_len: 4096, num_blocks: 1024, max_num_batched_tokens: 64, ..limits() }
}

fn read_tokens(stream: &mut OutputStream, count: usize) {
    let mut num_tokens = 0;
    while num_tokens < count {
        match stream.blocking_next() {
            Some(OutputEvent::Token { .. }) => num_tokens += 1,
            Some(OutputEvent::Started { .. }) => {}
            other => panic!("the output ended early: {other:?}"),
        }
    }
}

fn num_steps(engine: &TestEngine) -> u64 {
    engine.handle.metrics().num_steps.load(Ordering::Relaxed)
}

/// Tokens of each sequence in a warm-up, which goes through the shapes that are counted, and tokens that are counted.
#[derive(Clone, Copy)]
struct Decode {
    warm_up: usize,
    counted: usize,
}

/// Allocations in the steps of a running batch, which fill many blocks.
fn check_decode(engine: &TestEngine, what: &str) {
    check_decode_of(engine, what, Decode { warm_up: 400, counted: 200 });
}

fn check_decode_of(engine: &TestEngine, what: &str, tokens: Decode) {
    let random = &mut Random::new(1);
    let mut submit = || -> Vec<OutputStream> {
        (0..8).map(|at| engine.submit(&random.tokens(20 + at, VOCAB), greedy(2000))).collect()
    };
    submit().iter_mut().for_each(|stream| read_tokens(stream, tokens.warm_up));
    let mut streams = submit();
    streams.iter_mut().for_each(|stream| read_tokens(stream, 20));
    let before = num_steps(engine);
    let num_allocations =
        allocations_during(|| streams.iter_mut().for_each(|stream| read_tokens(stream, tokens.counted)));
    assert!(num_steps(engine) >= before + tokens.counted as u64 / 2);
    assert_eq!(num_allocations, 0, "{what}: decode steps allocate");
}

/// Allocations in the steps of a batch in which some use merged adapters, some add them, and some have none.
fn check_merged(model: &TinyModel) {
    let merge = MergeConfig { is_enabled: true, ..MergeConfig::default() };
    let setup = Setup { limits: engine_limits(), merge, ..Setup::default() };
    let engine = TestEngine::start_on_cpu(model.write().path(), setup);
    let load = |seed: u64, rule: MergeRule| {
        let adapter = engine.handle.load_adapter(TinyAdapter::of(model, &ALL, 8, seed).write().path()).unwrap();
        adapter.with_merge_rule(rule)
    };
    let loaded = [load(1, MergeRule::Always), load(2, MergeRule::Auto)];
    let random = &mut Random::new(4);
    let mut submit = |adapter: Option<&LoadedAdapter>| {
        let adapters = adapter.map(|adapter| AppliedAdapter { adapter: adapter.clone(), scale: 1.0 });
        let task = Task::Generate(Box::new(greedy(2000)));
        let request = request(&random.tokens(20, VOCAB), task);
        engine.handle.submit(GenerateRequest { adapters: adapters.into_iter().collect(), ..request }).unwrap()
    };
    let metrics = &engine.handle.metrics().merges;
    read_tokens(&mut submit(Some(&loaded[0])), 2);
    while metrics.stage() != MergeStage::Merged {
        std::thread::yield_now();
    }
    let mut batch = || -> Vec<OutputStream> {
        [None, Some(&loaded[0]), Some(&loaded[1]), Some(&loaded[0])].map(&mut submit).into_iter().collect()
    };
    batch().iter_mut().for_each(|stream| read_tokens(stream, 400));
    let mut streams = batch();
    streams.iter_mut().for_each(|stream| read_tokens(stream, 20));
    let before = metrics.num_tokens(true);
    let num_allocations = allocations_during(|| streams.iter_mut().for_each(|stream| read_tokens(stream, 200)));
    assert!(metrics.num_tokens(true) >= before + 200 && metrics.stage() == MergeStage::Merged);
    assert_eq!(num_allocations, 0, "steps with merged adapters allocate");
}

/// Allocations in the steps of a long prompt, after another of its kind.
fn check_prefill(engine: &TestEngine, what: &str) {
    let random = &mut Random::new(2);
    let (prompt_len, chunk) = (1500, engine_limits().max_num_batched_tokens);
    drop(collect(engine.submit(&random.tokens(prompt_len, VOCAB), greedy(2))));
    let mut fewest = None;
    for _ in 0..50 {
        let before = num_steps(engine);
        let mut stream = engine.submit(&random.tokens(prompt_len, VOCAB), greedy(1000));
        // Taking the request in allocates; its first step is behind that.
        while num_steps(engine) < before + 2 {
            std::thread::yield_now();
        }
        let first = num_steps(engine) - before;
        let num_allocations = allocations_during(|| drop(stream.blocking_next()));
        if first + 10 >= (prompt_len / chunk) as u64 {
            continue;
        }
        // A thread that is put to sleep for the first time may allocate, whichever it is; a step that allocates does so
        // every time.
        if num_allocations == 0 {
            return;
        }
        fewest = fewest.min(Some(num_allocations)).or(Some(num_allocations));
    }
    if let Some(fewest) = fewest {
        panic!("{what}: prefill steps allocate, {fewest} times at least");
    }
    panic!("{what}: the test thread never saw ten steps of a prefill");
}

/// Allocations in the steps that are the first to have a full budget of tokens and a long context: memory for them was
/// taken at start. The prompt waits for a place while it is taken in, so that nothing but steps is counted.
fn check_first_large_steps(model: &Path, setup: &Setup, what: &str) {
    let random = &mut Random::new(3);
    let limits = SchedulerLimits { max_num_seqs: 2, ..engine_limits() };
    let mut fewest = None;
    for _ in 0..20 {
        let engine = TestEngine::start_on_cpu(model, Setup { limits, ..setup.clone() });
        let num_waiting = || engine.handle.metrics().num_requests_waiting.get();
        let mut running = [2000, 300].map(|count| engine.submit(&random.tokens(20, VOCAB), greedy(count)));
        running.iter_mut().for_each(|stream| read_tokens(stream, 5));
        let mut large = engine.submit(&random.tokens(1500, VOCAB), greedy(2));
        while num_waiting() == 0 && large.try_next().is_none() {
            std::thread::yield_now();
        }
        let mut was_waiting = false;
        let num_allocations = allocations_during(|| {
            was_waiting = num_waiting() == 1;
            drop(large.blocking_next());
        });
        match (was_waiting, num_allocations) {
            (true, 0) => return,
            // As above: whichever thread sleeps for the first time.
            (true, found) => fewest = fewest.min(Some(found)).or(Some(found)),
            (false, _) => {}
        }
    }
    panic!("{what}: the first large steps allocate, {fewest:?} times at least");
}

/// One test: counting is for the whole process.
#[test]
fn steps_allocate_nothing() {
    IS_TEST.set(true);
    let allocate = || std::thread::spawn(|| drop(std::hint::black_box(vec![1u8; 100]))).join().unwrap();
    assert!(allocations_during(allocate) > 0, "counting does not count");
    let own = || drop(std::hint::black_box(vec![1u8; 100]));
    assert_eq!(allocations_during(own), 0, "the test's own allocations are counted");
    let quantised = |name: &str| if name.contains("norm") { Storage::F32 } else { Storage::Q8_0 };
    TRACING.store(std::env::var_os("MNEME_TRACE_ALLOCATIONS").is_some(), Ordering::SeqCst);
    for family in [Family::Llama, Family::Gemma3] {
        let model = TinyModel::new(family, 1).write();
        for isa in Isa::available() {
            let setup = Setup { limits: engine_limits(), isa, ..Setup::default() };
            check_first_large_steps(model.path(), &setup, &format!("{family:?} {isa}"));
            let engine = TestEngine::start_on_cpu(model.path(), setup);
            check_decode(&engine, &format!("{family:?} {isa}"));
            check_prefill(&engine, &format!("{family:?} {isa}"));
        }
    }
    let model = TinyModel::new(Family::Llama, 1).write_gguf(quantised);
    for dtype in [None, Some(DType::F32)] {
        let setup = Setup { limits: engine_limits(), dtype, ..Setup::default() };
        check_first_large_steps(model.path(), &setup, "quantised");
        let engine = TestEngine::start_on_cpu(model.path(), setup);
        check_decode(&engine, "quantised");
        check_prefill(&engine, "quantised");
    }
    check_merged(&TinyModel::new(Family::Llama, 1));
    #[cfg(feature = "cuda")]
    check_gpu();
}

/// What the backend itself allocates; the driver's own memory is not counted.
#[cfg(feature = "cuda")]
fn check_gpu() {
    if let Err(error) = mneme::backend::kernel_source() {
        return eprintln!("skipped: the steps of the CUDA backend, because {error}");
    }
    let model = TinyModel::new(Family::Gemma3, 1).write();
    let engine = TestEngine::start_on_softgpu(model.path(), Setup { limits: engine_limits(), ..Setup::default() });
    check_decode_of(&engine, "CUDA", Decode { warm_up: 50, counted: 20 });
}
