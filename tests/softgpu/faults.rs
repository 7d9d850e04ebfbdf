//! Faults that the software GPU plays: what is lost ends with an error and nothing hangs, what can go on with less does, with
//! the same bits.

use std::path::Path;
use std::thread::JoinHandle;
use std::time::Duration;

use mneme::backend::cuda::CudaBackend;
use mneme::backend::{DType, Device, Transfer, kernel_source};
use mneme::engine::{EngineHandle, FetchDecision, FinishReason, OutputStream, SubmitError, Task, TierConfig};

use crate::command::{doctor, driver_folder, mneme, mneme_with};
use crate::landing::{NUM_SHARED, ask, engine_with_blocks_on_the_host, prompts};
use crate::serving::{COMPLETION, Served, ask as ask_http, model as model_of_text};
use crate::support::engine::{Output, Setup, TestEngine, collect, greedy, limits, request};
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
pub(crate) fn error_of(output: &Output) -> &str {
    match &output.reason {
        Some(FinishReason::Error(why)) => why,
        other => panic!("a request ended with {other:?}"),
    }
}

/// An engine that is going to end with an error.
pub(crate) struct Doomed {
    pub(crate) handle: EngineHandle,
    thread: JoinHandle<()>,
}

impl Doomed {
    pub(crate) fn new(engine: TestEngine) -> Self {
        Self { handle: engine.handle.clone(), thread: engine.leave() }
    }

    fn submit(&self, prompt: &[u32], max_tokens: usize) -> OutputStream {
        self.handle.submit(request(prompt, Task::Generate(Box::new(greedy(max_tokens))))).unwrap()
    }

    /// Waits for its end, which its handle, and so the server's health, tells with the reason.
    pub(crate) fn end(self, wanted: &str) {
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

/// Half of what was wanted is enough for a slab of the host tier.
#[test]
fn a_slab_is_as_large_as_can_be_page_locked() {
    if !softgpu::is_alone("faults::a_slab_is_as_large_as_can_be_page_locked") {
        return;
    }
    let (backend, room) = (backend(), 230 << 10);
    let transfer = backend.create_transfer().unwrap();
    // Room behind what the backend has for itself.
    let pinned = backend.allocate_host(1).unwrap();
    softgpu::limit_pinned(softgpu::pinned_bytes() + room);
    for (wanted, found) in [(50, Some(50)), (100, Some(50)), (400, Some(50)), (1000, None)] {
        let blocks = transfer.allocate_host_blocks(wanted, 4096).unwrap();
        assert_eq!(blocks.map(|blocks| blocks.len()), found, "{wanted} blocks");
    }
    drop(pinned);
}

/// A block goes through page-locked memory of its size, where there is less in parts, and without any all the same.
#[test]
fn blocks_go_through_less_memory_in_parts() {
    if !softgpu::is_alone("faults::blocks_go_through_less_memory_in_parts") {
        return;
    }
    const BLOCK_BYTES: usize = 3 << 20;
    let backend = backend();
    let arena = backend.allocate(2 * BLOCK_BYTES).unwrap();
    for (room, wanted) in [(4 << 20, BLOCK_BYTES as u64), (600 << 10, 384 << 10), (100 << 10, 0)] {
        let (mut transfer, num_before) = (backend.create_transfer().unwrap(), softgpu::pinned_bytes());
        softgpu::limit_pinned(num_before + room);
        let mut random = Random::new(room);
        // The second is cut in other places.
        let blocks = [BLOCK_BYTES, BLOCK_BYTES - 77].map(|len| random.tokens(len, 256));
        for (at, block) in blocks.iter().enumerate() {
            let write = &mut |bytes: &mut [u8]| {
                bytes.iter_mut().zip(block).for_each(|(byte, number)| *byte = *number as u8);
                Ok(())
            };
            transfer.fill(&arena, at * BLOCK_BYTES, block.len(), write).unwrap();
        }
        assert_eq!(softgpu::pinned_bytes() - num_before, wanted);
        for (at, block) in blocks.iter().enumerate() {
            let read = &mut |bytes: &[u8]| {
                assert!(bytes.iter().map(|byte| u32::from(*byte)).eq(block.iter().copied()), "room for {room}");
                Ok(())
            };
            transfer.show(&arena, at * BLOCK_BYTES, block.len(), read).unwrap();
        }
        assert_eq!(backend.degradations().lines().is_empty(), wanted == BLOCK_BYTES as u64);
    }
}

/// Whichever allocation of an engine's fails: that of its KV blocks is tried again with fewer, the others say what to do.
#[test]
fn a_pool_that_the_device_does_not_give_gets_smaller() {
    if !softgpu::is_alone("faults::a_pool_that_the_device_does_not_give_gets_smaller") {
        return;
    }
    let model = model();
    let num_wanted = limits().num_blocks;
    let start = |rule: String| {
        let arm = || softgpu::fail(&rule);
        let started = TestEngine::try_start(backend(), model.path(), Setup::default(), TierConfig::default(), arm);
        softgpu::fail("");
        started
    };
    let mut smaller = Vec::new();
    for skip in 0.. {
        match start(format!("cuMemAlloc_v2=2@{skip}x2")) {
            Err(error) => assert!(error.to_string().contains("give a smaller --kv-cache-memory-bytes"), "{error}"),
            Ok(engine) if engine.handle.info().num_blocks == num_wanted => break,
            Ok(engine) => {
                assert_eq!(engine.handle.info().num_blocks, num_wanted * 7 / 8 * 7 / 8);
                assert!(engine.handle.degradations().lines()[0].starts_with("kv_pool: the device gives no "));
                assert_eq!(engine.greedy(&[1, 2, 3], 3).len(), 3);
                smaller.push(skip);
            }
        }
    }
    assert_eq!(smaller.len(), 1, "one of them is that of the pool");
    let error = start(format!("cuMemAlloc_v2=2@{}", smaller[0])).err().unwrap().to_string();
    assert!(error.contains("give a smaller --kv-cache-memory-bytes"), "{error}");
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
    match engine.handle.submit(request(&prompts()[1], Task::Generate(Box::new(greedy(4))))) {
        Ok(stream) => {
            let why = error_of(&collect(stream)).to_owned();
            engine.end(&why);
        }
        // A copy down may have met it before.
        Err(refused) => {
            assert_eq!(refused, SubmitError::ShuttingDown);
            engine.end("CUDA_ERROR_ILLEGAL_ADDRESS");
        }
    }
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
pub(crate) fn library_without(function: &str, folder: &Path) {
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

/// A driver without a function is said to be too old, not called; a server that may do without it computes on the CPU.
#[test]
fn a_driver_without_a_function_is_refused() {
    softgpu::end_without_kernels();
    if softgpu::is_replaced() {
        return;
    }
    let model = model_of_text();
    for function in ["cuMemcpy2DAsync_v2", "cuDriverGetVersion", "cuLaunchKernel", "cuInit"] {
        let folder = tempfile::tempdir().unwrap();
        library_without(function, folder.path());
        let is_told = |text: &str| text.contains(&format!("has no {function}")) && text.contains("update it to R525");
        let cuda = doctor(folder.path())["cuda"].clone();
        assert!(is_told(cuda["problem"].as_str().unwrap()), "{cuda}");
        for device in ["cuda", "softgpu"] {
            let arguments = ["serve", model.path().to_str().unwrap(), "--no-vault", "--device", device];
            let output = mneme(&arguments, folder.path());
            let text = String::from_utf8_lossy(&output.stderr);
            assert!(!output.status.success() && is_told(&text) && !text.contains("panicked"), "{text}");
        }
        let mut served = Served::start_on("auto", folder, &model, &["--no-vault"], &[]);
        assert!(is_told(&served.wait_for("computing on the CPU")));
        let answer = ask_http(&served.address(), "POST /v1/completions", COMPLETION);
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        let health = ask_http(&served.address(), "GET /health", "");
        assert!(health.starts_with("HTTP/1.1 200") && health.contains("gpu: computing on the CPU: "), "{health}");
        assert!(is_told(&health), "{health}");
    }
}

/// So is one that is too old for the kernels.
#[test]
fn an_old_driver_is_refused() {
    softgpu::end_without_kernels();
    // NVRTC compiles for the driver that there is.
    if softgpu::is_replaced() || kernel_source().unwrap() != "compiled into this program" {
        return;
    }
    let (model, folder) = (model_of_text(), driver_folder());
    let run = |arguments: &[&str], version: &str| {
        let output = mneme_with(arguments, folder.path(), &[("SOFTGPU_DRIVER_VERSION", version)]);
        (output.status.success(), String::from_utf8([output.stdout, output.stderr].concat()).unwrap())
    };
    let (_, said) = run(&["doctor"], "11080");
    let needed = said.split("supports CUDA 11.8 and the kernels need ").nth(1).unwrap().split(':').next().unwrap();
    let arguments = ["serve", model.path().to_str().unwrap(), "--no-vault", "--device", "softgpu"];
    let (is_serving, refused) = run(&arguments, "11080");
    assert!(!is_serving && refused.contains(&format!("need {needed}: update it to R5")), "{refused}");
    let (major, minor) = needed.split_once('.').unwrap();
    let (_, said) =
        run(&["doctor"], &format!("{}", 1000 * major.parse::<u32>().unwrap() + 10 * minor.parse::<u32>().unwrap()));
    assert!(said.contains(&format!("supports CUDA {needed}")) && !said.contains("update it"), "{said}");
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
