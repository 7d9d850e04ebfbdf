//! Faults that the software GPU plays: what is lost ends with an error and nothing hangs, what can go on with less does, with
//! the same bits.

use std::path::Path;
use std::thread::JoinHandle;
use std::time::Duration;

use mneme::backend::cuda::CudaBackend;
use mneme::backend::{DType, Device};
use mneme::engine::{EngineHandle, FetchDecision, FinishReason, OutputStream, SubmitError, Task};

use crate::landing::{NUM_SHARED, ask, engine_with_blocks_on_the_host, prompts};
use crate::support::engine::{Output, Setup, TestEngine, collect, greedy, request};
use crate::support::random::Random;
use crate::support::softgpu;
use crate::support::tiny_model::{Family, TinyModel, VOCAB, Written};
use crate::tiers::bits;
use crate::vault::Tiers;

const FAMILY: Family = Family::Llama;

fn model() -> Written {
    TinyModel::new(FAMILY, 3).write()
}

fn backend() -> CudaBackend {
    softgpu::backend(DType::BF16)
}

/// What a request ended with; it was an error.
fn error_of(output: &Output) -> &str {
    match &output.reason {
        Some(FinishReason::Error(why)) => why,
        other => panic!("a request ended with {other:?}"),
    }
}

/// An engine that is going to end with an error.
struct Doomed {
    handle: EngineHandle,
    thread: JoinHandle<()>,
}

impl Doomed {
    fn new(engine: TestEngine) -> Self {
        Self { handle: engine.handle.clone(), thread: engine.leave() }
    }

    fn submit(&self, prompt: &[u32], max_tokens: usize) -> OutputStream {
        self.handle.submit(request(prompt, Task::Generate(Box::new(greedy(max_tokens))))).unwrap()
    }

    /// Waits for its end, which its handle, and so the server's health, tells with the reason.
    fn end(self, wanted: &str) {
        self.thread.join().unwrap_err();
        assert!(!self.handle.is_accepting());
        let why = self.handle.failure().unwrap();
        assert!(why.contains(wanted), "{why}");
        let refused = self.handle.submit(request(&[1], Task::Embed));
        assert_eq!(refused.err(), Some(SubmitError::ShuttingDown));
    }
}

/// Steps that are launched, steps that are replayed, and waits for them.
#[test]
fn a_lost_device_ends_every_request() {
    if !softgpu::is_alone("faults::a_lost_device_ends_every_request") {
        return;
    }
    let model = model();
    for (rules, wanted) in [
        ("cuLaunchKernel=719@30", "CUDA_ERROR_LAUNCH_FAILED"),
        ("cuGraphLaunch=214@3", "CUDA_ERROR_ECC_UNCORRECTABLE"),
        ("cuEventSynchronize=700@12", "CUDA_ERROR_ILLEGAL_ADDRESS"),
    ] {
        let engine = Doomed::new(TestEngine::start(backend(), model.path(), Setup::default()));
        softgpu::fail(rules);
        let mut random = Random::new(1);
        let streams: Vec<OutputStream> = (1..4).map(|at| engine.submit(&random.tokens(5 * at, VOCAB), 60)).collect();
        for output in streams.into_iter().map(collect) {
            let why = error_of(&output);
            assert!(why.contains(wanted), "{rules}: {why}");
        }
        engine.end(wanted);
        softgpu::revive();
    }
}

/// Nobody asks for anything when the device is lost: a copy finds it.
#[test]
fn a_device_that_is_lost_between_requests_ends_the_engine() {
    if !softgpu::is_alone("faults::a_device_that_is_lost_between_requests_ends_the_engine") {
        return;
    }
    let model = model();
    let engine = engine_with_blocks_on_the_host(model.path(), FAMILY);
    let prompt = Random::new(40).tokens(100, VOCAB);
    // Copies to the host alone ask streams, and begin when the request has ended.
    softgpu::fail("cuStreamQuery=700");
    collect(engine.submit(&prompt, greedy(1)));
    Doomed::new(engine).end("CUDA_ERROR_ILLEGAL_ADDRESS");
}

/// Less page-locked memory than is wanted, and none.
#[test]
fn memory_that_cannot_be_page_locked_is_done_without() {
    if !softgpu::is_alone("faults::memory_that_cannot_be_page_locked_is_done_without") {
        return;
    }
    let model = model();
    let [_, second] = prompts();
    let wanted = ask(&engine_with_blocks_on_the_host(model.path(), FAMILY), &second);
    assert_eq!(wanted.reuse.decision, FetchDecision::Attached);
    for most in [1 << 20, 0] {
        softgpu::limit_pinned(most);
        let found = ask(&engine_with_blocks_on_the_host(model.path(), FAMILY), &second);
        let fetched = (FetchDecision::Fetched, NUM_SHARED);
        assert_eq!((found.reuse.decision, found.reuse.host_tokens), fetched, "{most} bytes");
        assert_eq!(bits(&found), bits(&wanted), "{most} bytes");
    }
}

/// Half of what was wanted is enough for a host tier.
#[test]
fn a_host_tier_is_as_large_as_can_be_page_locked() {
    if !softgpu::is_alone("faults::a_host_tier_is_as_large_as_can_be_page_locked") {
        return;
    }
    let (backend, room) = (backend(), 230 << 10);
    // Room behind what the backend has for itself.
    let pinned = backend.allocate_host(1).unwrap();
    softgpu::limit_pinned(softgpu::pinned_bytes() + room);
    for (wanted, found) in [(50, Some(50)), (100, Some(50)), (400, Some(50)), (1000, None)] {
        let blocks = backend.allocate_host_blocks(wanted, 4096).unwrap();
        assert_eq!(blocks.map(|blocks| blocks.len()), found, "{wanted} blocks");
    }
    drop(pinned);
}

/// Copies that cannot even be queued: the blocks are computed, and the engine goes on.
#[test]
fn blocks_that_cannot_come_up_are_computed() {
    if !softgpu::is_alone("faults::blocks_that_cannot_come_up_are_computed") {
        return;
    }
    let model = model();
    let [_, second] = prompts();
    let wanted = ask(&engine_with_blocks_on_the_host(model.path(), FAMILY), &second);
    let engine = engine_with_blocks_on_the_host(model.path(), FAMILY);
    softgpu::fail("cuMemcpy2DAsync_v2=1");
    let found = ask(&engine, &second);
    assert_eq!((found.reuse.decision, found.reuse.host_tokens), (FetchDecision::Lost, 0));
    assert_eq!(bits(&found), bits(&wanted));
    softgpu::fail("");
    assert_eq!(bits(&ask(&engine, &second)), bits(&wanted));
}

/// A copy that fails on the device: a step may have used what lies there.
#[test]
fn a_landing_that_fails_ends_the_engine() {
    if !softgpu::is_alone("faults::a_landing_that_fails_ends_the_engine") {
        return;
    }
    let model = model();
    let engine = Doomed::new(engine_with_blocks_on_the_host(model.path(), FAMILY));
    softgpu::fail("cuStreamQuery=700");
    let output = collect(engine.submit(&prompts()[1], 4));
    let why = error_of(&output).to_owned();
    engine.end(&why);
}

/// Nobody waits for whole blocks that are late: they are computed.
#[test]
fn blocks_that_stand_still_are_computed() {
    if !softgpu::is_alone("faults::blocks_that_stand_still_are_computed") {
        return;
    }
    let model = model();
    let [first, second] = prompts();
    let mut tiers = Tiers::new(FAMILY);
    let wanted = bits(&ask(&tiers.start(model.path()), &second));
    ask(&tiers.start(model.path()), &first);
    tiers.fetch_wait = Duration::from_millis(100);
    let engine = tiers.start(model.path());
    softgpu::stall_copies(true);
    let found = ask(&engine, &second);
    assert_eq!((found.reuse.decision, bits(&found)), (FetchDecision::Late, wanted.clone()));
    softgpu::stall_copies(false);
    assert_eq!(bits(&ask(&engine, &second)), wanted);
}

/// A copy of the software GPU's library in which nobody finds a function: the table of symbols has it as the library's own.
fn library_without(function: &str, folder: &Path) {
    let mut bytes = std::fs::read(softgpu::library()).unwrap();
    let number =
        |at: usize, len: usize| bytes[at..at + len].iter().rev().fold(0, |sum, byte| sum << 8 | usize::from(*byte));
    // Of ELF: where section headers are and how many; of each the type, offset, size and link.
    let header = |index: usize| number(0x28, 8) + index * number(0x3a, 2);
    let section = |index: usize| (number(header(index) + 0x18, 8), number(header(index) + 0x20, 8));
    let is_dynamic = |index: &usize| number(header(*index) + 4, 4) == 11;
    let symbols = (0..number(0x3c, 2)).find(is_dynamic).unwrap();
    let (first_name, _) = section(number(header(symbols) + 0x28, 4));
    let ((start, len), wanted) = (section(symbols), [function.as_bytes(), b"\0"].concat());
    let is_wanted = |at: &usize| bytes[first_name + number(*at, 4)..].starts_with(&wanted);
    let symbol = (start..start + len).step_by(24).find(is_wanted).unwrap();
    // A binding of 0 is local.
    bytes[symbol + 4] &= 0xf;
    std::fs::write(folder.join("libcuda.so.1"), bytes).unwrap();
}

/// A driver without a function is said to be too old, not called.
#[test]
fn a_driver_without_a_function_is_refused() {
    softgpu::end_without_kernels();
    if softgpu::is_replaced() {
        return;
    }
    for function in ["cuMemcpy2DAsync_v2", "cuLaunchKernel", "cuInit"] {
        let folder = tempfile::tempdir().unwrap();
        library_without(function, folder.path());
        let cuda = crate::command::doctor(folder.path())["cuda"].clone();
        let problem = cuda["problem"].as_str().unwrap();
        assert!(problem.contains(function) && problem.contains("update"), "{problem}");
    }
}

/// Without the functions for graphs steps are launched kernel by kernel.
#[test]
fn a_driver_without_graphs_is_enough() {
    softgpu::end_without_kernels();
    if softgpu::is_replaced() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    library_without("cuGraphLaunch", folder.path());
    softgpu::pass_with("faults::requests_without_graphs", &folder.path().join("libcuda.so.1"));
}

/// What `a_driver_without_graphs_is_enough` runs.
#[test]
#[ignore = "wants a driver without graphs"]
fn requests_without_graphs() {
    let model = model();
    let engine = TestEngine::start(backend(), model.path(), Setup::default());
    assert_eq!(engine.greedy(&[1, 2, 3], 12).len(), 12);
    assert_eq!(engine.stop().metrics().repeated_steps.get(), 0);
}
