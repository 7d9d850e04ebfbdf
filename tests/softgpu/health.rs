//! What `/health` says of a device that fails, or has less than was wanted: requests end with an error or are answered, and the
//! reason is there.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mneme::backend::DType;
use mneme::engine::{EngineHandle, FinishReason, SamplingParams};
use mneme::server::{ServedModel, ServerConfig, ServerThread};
use mneme::text::{GrammarEngine, Tokenizer};
use serde_json::{Value, json};

use crate::faults::{Doomed, library_without};
use crate::landing::{
    MAX_ENGINES, NUM_BYTES, NUM_HOST_BLOCKS, engine_with_blocks_below, engine_with_blocks_on_the_host,
    engine_with_room_below, prompts,
};
use crate::serving::{COMPLETION, Served, ask, model as model_of_text};
use crate::support::engine::{TestEngine, collect, greedy};
use crate::support::random::Random;
use crate::support::tiny_model::{Family, TinyModel, Written};
use crate::support::{byte_tokenizer, softgpu};
use crate::vault::Tiers;

const FAMILY: Family = Family::Llama;

fn model() -> Written {
    TinyModel::new(FAMILY, 3).write()
}

/// A server over an engine of this process; it ends when dropped.
struct Server(Option<ServerThread>);

impl Server {
    fn over(engine: &EngineHandle) -> Self {
        let (file, config) = byte_tokenizer::files();
        let tokenizer = Arc::new(Tokenizer::from_json(file.as_bytes(), Some(config.as_bytes())).unwrap());
        let model = ServedModel {
            names: vec!["tiny".into()],
            engine: engine.clone(),
            grammar: Arc::new(GrammarEngine::new(Arc::clone(&tokenizer)).unwrap()),
            tokenizer,
            template: None,
            default_sampling: SamplingParams::default(),
            created: 0,
            root: String::new(),
            cubes: None,
            adapters: None,
        };
        Self(Some(ServerThread::start(ServerConfig { port: 0, ..ServerConfig::default() }, model).unwrap()))
    }

    fn ask(&self, request: &str, body: &str) -> (u16, Value) {
        answer_of(&ask(&self.0.as_ref().unwrap().address().to_string(), request, body))
    }

    /// The status and the answer to a prompt.
    fn complete(&self, prompt: &[u32], max_tokens: usize) -> (u16, Value) {
        let body = json!({ "model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0 });
        self.ask("POST /v1/completions", &body.to_string())
    }

    /// What it goes on without, while it serves.
    fn degraded(&self) -> Vec<String> {
        degraded_of(self.ask("GET /health", ""))
    }

    /// Asserts that it does not serve any more because of `wanted`.
    fn assert_ended(&self, wanted: &str) {
        for path in ["/health", "/ping"] {
            let (status, body) = self.ask(&format!("GET {path}"), "");
            let message = body["error"]["message"].as_str().unwrap();
            assert!(status == 503 && message.contains(wanted), "{path}: {status} {body}");
        }
        assert_eq!(self.complete(&[1, 2, 3], 1).0, 503);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(thread) = self.0.take() {
            thread.shutdown();
            thread.join().unwrap();
        }
    }
}

fn answer_of(answer: &str) -> (u16, Value) {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), serde_json::from_str(body).unwrap())
}

fn degraded_of((status, body): (u16, Value)) -> Vec<String> {
    assert_eq!(status, 200, "{body}");
    let lines: Vec<String> = serde_json::from_value(body["degraded"].clone()).unwrap_or_default();
    assert_eq!(body["status"], if lines.is_empty() { "ok" } else { "degraded" });
    lines
}

/// Whether these lines are of such conditions.
fn are(lines: &[String], wanted: &[&str]) -> bool {
    lines.len() == wanted.len() && lines.iter().zip(wanted).all(|(line, wanted)| line.starts_with(wanted))
}

#[test]
fn a_device_lost_between_requests_is_said() {
    if !softgpu::is_alone("health::a_device_lost_between_requests_is_said") {
        return;
    }
    let model = model();
    let engine = engine_with_blocks_on_the_host(model.path(), FAMILY);
    let server = Server::over(&engine.handle);
    assert!(server.degraded().is_empty());
    // Copies to the host alone ask streams.
    softgpu::fail("cuStreamQuery=700");
    let (status, body) = server.complete(&Random::new(40).tokens(100, NUM_BYTES), 1);
    // Copies of what was there before may find it before the request has ended, or come.
    assert!([200, 500, 503].contains(&status), "{body}");
    Doomed::new(engine).end("CUDA_ERROR_ILLEGAL_ADDRESS");
    server.assert_ended("CUDA_ERROR_ILLEGAL_ADDRESS");
}

/// An engine, with a server, whose host tier has what both prompts begin with, unless it was lost on its way down.
fn served_with_blocks_on_the_host(model: &Path) -> (TestEngine, Server) {
    let engine = engine_with_room_below(softgpu::backend(DType::BF16), model, FAMILY, DType::BF16, 0);
    let server = Server::over(&engine.handle);
    assert_eq!(server.complete(&prompts()[0], 4).0, 200);
    for seed in 100..103 {
        server.complete(&Random::new(seed).tokens(200, NUM_BYTES), 1);
    }
    assert!(server.degraded().is_empty());
    (engine, server)
}

#[test]
fn a_landing_that_fails_is_said() {
    if !softgpu::is_alone("health::a_landing_that_fails_is_said") {
        return;
    }
    let model = model();
    let fails = |_| {
        let (engine, server) = served_with_blocks_on_the_host(model.path());
        softgpu::fail("cuStreamQuery=700");
        let (status, body) = server.complete(&prompts()[1], 4);
        Doomed::new(engine).end("CUDA_ERROR_ILLEGAL_ADDRESS");
        server.assert_ended("CUDA_ERROR_ILLEGAL_ADDRESS");
        softgpu::revive();
        assert!([200, 500, 503].contains(&status), "{body}");
        status == 500
    };
    assert!((0..MAX_ENGINES).any(fails));
}

/// Blocks that cannot come up are computed, which is said until others have come up.
#[test]
fn lost_copies_are_said_until_some_arrive() {
    if !softgpu::is_alone("health::lost_copies_are_said_until_some_arrive") {
        return;
    }
    let model = model();
    let loses = |_| {
        let (engine, server) = served_with_blocks_on_the_host(model.path());
        softgpu::fail("cuMemcpy2DAsync_v2=1");
        let (status, body) = server.complete(&prompts()[1], 4);
        softgpu::fail("");
        assert_eq!(status, 200, "{body}");
        (!server.degraded().is_empty()).then_some((engine, server))
    };
    let (_engine, server) = (0..MAX_ENGINES).find_map(loses).unwrap();
    assert!(
        are(&server.degraded(), &["copies: KV blocks of lower tiers were late or lost"]),
        "{:?}",
        server.degraded()
    );
    let come_up = |seed: u64| {
        assert_eq!(server.complete(&Random::new(seed).tokens(300, NUM_BYTES), 1).0, 200);
        assert_eq!(server.complete(&prompts()[1], 4).0, 200);
        server.degraded().is_empty()
    };
    assert!((200..220).any(come_up));
}

#[test]
fn late_copies_are_said() {
    if !softgpu::is_alone("health::late_copies_are_said") {
        return;
    }
    let model = model();
    let [first, second] = prompts();
    let mut tiers = Tiers::new(FAMILY);
    {
        let engine = tiers.start(model.path());
        assert_eq!(Server::over(&engine.handle).complete(&first, 4).0, 200);
    }
    tiers.fetch_wait = Duration::from_millis(100);
    let engine = tiers.start(model.path());
    let server = Server::over(&engine.handle);
    softgpu::stall_copies(true);
    let (status, body) = server.complete(&second, 4);
    softgpu::stall_copies(false);
    assert_eq!(status, 200, "{body}");
    assert!(are(&server.degraded(), &["copies: "]), "{:?}", server.degraded());
}

/// A step waits for a copy that never ends, or a copy to the host does not end: the device is given up.
#[test]
fn copies_that_stand_still_end_the_engine() {
    if !softgpu::is_alone("health::copies_that_stand_still_end_the_engine") {
        return;
    }
    let model = model();
    let is_waited_for = (0..MAX_ENGINES).any(|_| {
        let backend = softgpu::backend(DType::BF16);
        let patience = backend.copy_patience();
        let engine = engine_with_blocks_below(backend, model.path(), FAMILY);
        let server = Server::over(&engine.handle);
        softgpu::stall_copies(true);
        // Taken by the engine before nobody has patience any more; where its blocks were lost on their way down it is computed.
        let stream = engine.submit(&prompts()[1], greedy(250));
        patience.set(Duration::ZERO);
        let output = collect(stream);
        Doomed::new(engine).end("have not ended");
        server.assert_ended("copies between the host and the device have not ended");
        softgpu::stall_copies(false);
        matches!(output.reason, Some(FinishReason::Error(why)) if why.contains("have not ended"))
    });
    assert!(is_waited_for);
}

/// A host tier grows as far as memory can be page-locked.
#[test]
fn a_host_tier_that_cannot_grow_is_said() {
    if !softgpu::is_alone("health::a_host_tier_that_cannot_grow_is_said") {
        return;
    }
    let model = model();
    let (slab_len, block_bytes) = (4, Tiers::new(FAMILY).block_bytes() as u64);
    let engine = engine_with_room_below(softgpu::backend(DType::BF16), model.path(), FAMILY, DType::BF16, slab_len);
    let (server, num_pinned) = (Server::over(&engine.handle), softgpu::pinned_bytes());
    // Two slabs, what each I/O thread takes for itself, and not another slab.
    softgpu::limit_pinned(num_pinned + (2 * slab_len as u64 + 2) * block_bytes);
    let fill = |seed: u64| {
        assert_eq!(server.complete(&Random::new(seed).tokens(200, NUM_BYTES), 1).0, 200);
        server.degraded()
    };
    let lines = (0..20).map(fill).find(|lines| lines.len() == 2).unwrap();
    assert!(
        are(&lines, &["pinned_memory: the system page-locks no ", "host_tier: the host tier has room for "]),
        "{lines:?}"
    );
    let num_slots = lines[1].split(' ').find_map(|word| word.parse::<u64>().ok()).unwrap();
    assert!((slab_len as u64..=2 * slab_len as u64 + 2).contains(&num_slots), "{lines:?}");
    assert!(lines[1].ends_with(&format!(" {num_slots} KV blocks, not {NUM_HOST_BLOCKS}")), "{lines:?}");
    assert!(softgpu::pinned_bytes() >= num_pinned + num_slots * block_bytes);
    // What there is of it is used on.
    (20..30).for_each(|seed| drop(fill(seed)));
    engine.stop();
}

/// Nothing is page-locked before a block goes down, and then a slab.
#[test]
fn a_host_tier_takes_memory_as_it_fills() {
    if !softgpu::is_alone("health::a_host_tier_takes_memory_as_it_fills") {
        return;
    }
    let model = model();
    let (slab_len, block_bytes) = (40, Tiers::new(FAMILY).block_bytes() as u64);
    let backend = softgpu::backend(DType::BF16);
    let engine = engine_with_room_below(backend, model.path(), FAMILY, DType::BF16, slab_len);
    let num_before = softgpu::pinned_bytes();
    let num_taken = |seed: u64| {
        engine.greedy(&Random::new(seed).tokens(20, NUM_BYTES), 1);
        (softgpu::pinned_bytes() - num_before) / block_bytes
    };
    let num_blocks = (0..100).map(num_taken).find(|num_blocks| *num_blocks >= slab_len as u64).unwrap();
    // Each I/O thread has a block of its own.
    assert!(num_blocks <= slab_len as u64 + 2, "{num_blocks} blocks");
    assert!(engine.handle.degradations().lines().is_empty());
}

/// Without page-locked memory blocks come up whole, and the tier has its size.
#[test]
fn pageable_memory_is_said() {
    if !softgpu::is_alone("health::pageable_memory_is_said") {
        return;
    }
    let model = model();
    softgpu::limit_pinned(0);
    let engine = engine_with_blocks_on_the_host(model.path(), FAMILY);
    let server = Server::over(&engine.handle);
    assert_eq!(server.complete(&prompts()[1], 4).0, 200);
    assert!(are(&server.degraded(), &["pinned_memory: the system page-locks no "]), "{:?}", server.degraded());
}

/// Steps are launched kernel by kernel.
#[test]
fn a_driver_without_graphs_is_said() {
    softgpu::end_without_kernels();
    if softgpu::is_replaced() {
        return;
    }
    let (model, folder) = (model_of_text(), tempfile::tempdir().unwrap());
    library_without("cuGraphLaunch", folder.path());
    let arguments = ["--no-vault", "--kv-cache-memory-bytes", "4M"];
    let mut served = Served::start_on("softgpu", folder, &model, &arguments, &[]);
    let address = served.address();
    let (status, body) = answer_of(&ask(&address, "POST /v1/completions", COMPLETION));
    assert_eq!(status, 200, "{body}");
    let degraded = degraded_of(answer_of(&ask(&address, "GET /health", "")));
    assert!(are(&degraded, &["cuda_graphs: the NVIDIA driver has no cuGraphLaunch"]), "{degraded:?}");
}
