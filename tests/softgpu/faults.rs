//! Faults that the software GPU plays: what is lost ends with an error and nothing hangs, what can go on with less does, with
//! the same bits.

use std::thread::JoinHandle;
use std::time::Duration;

use mneme::backend::cuda::CudaBackend;
use mneme::backend::{DType, Device};
use mneme::engine::{EngineHandle, FetchDecision, FinishReason, OutputStream, SubmitError, Task};

use crate::landing::{NUM_SHARED, ask, engine_on, engine_with_blocks_on_the_host, prompts};
use crate::paging_tiers::bits;
use crate::support::engine::{Output, TestEngine, collect, greedy, request};
use crate::support::random::Random;
use crate::support::softgpu;
use crate::support::tiny_model::{Family, TinyModel, VOCAB, Written};
use crate::vault::Tiers;

const FAMILY: Family = Family::Llama;

/// More than a copy takes beside the kernels of a tiny model.
const PATIENCE: Duration = Duration::from_secs(2);

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

/// Copies stand still while a step waits for them: it is not waited for without end, nor is the end of the engine.
#[test]
fn a_step_behind_copies_that_stand_still_ends() {
    if !softgpu::is_alone("faults::a_step_behind_copies_that_stand_still_ends") {
        return;
    }
    let model = model();
    let backend = backend().with_copy_patience(PATIENCE);
    let engine = Doomed::new(engine_on(backend, model.path(), FAMILY));
    softgpu::stall_copies(true);
    let output = collect(engine.submit(&prompts()[1], 4));
    assert!(error_of(&output).contains("have not ended"), "{:?}", output.reason);
    engine.end("have not ended");
    softgpu::stall_copies(false);
}

/// Nobody waits for whole blocks that are late: they are computed.
#[test]
fn blocks_that_stand_still_are_computed() {
    if !softgpu::is_alone("faults::blocks_that_stand_still_are_computed") {
        return;
    }
    let model = model();
    let [first, second] = prompts();
    let tiers = Tiers::new(FAMILY);
    let wanted = bits(&ask(&tiers.start(model.path()), &second));
    ask(&tiers.start(model.path()), &first);
    let engine = tiers.start(model.path());
    softgpu::stall_copies(true);
    let found = ask(&engine, &second);
    assert_eq!((found.reuse.decision, bits(&found)), (FetchDecision::Late, wanted.clone()));
    softgpu::stall_copies(false);
    assert_eq!(bits(&ask(&engine, &second)), wanted);
}
