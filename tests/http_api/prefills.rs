//! Cubes that lost KV get it back while nobody wants anything, over a real engine with a tiny model.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use mneme::kv::BlockHash;
use mneme::memory::{Binding, Catalog, CatalogLimits, Digest, Form, SystemClock};
use mneme::paging::faulty::FaultyFiles;
use mneme::paging::{BlockFormat, BlockStore, OpenedVault, StoreConfig};
use mneme::server::{CubeService, OpenBlocks, ServedModel, ServerConfig, ServerThread, VaultEngine};
use mneme::telemetry::PrefillOutcome;
use serde_json::{Value, json};

use crate::client;
use crate::served_model;
use crate::support::engine::{Setup, TestEngine, limits};
use crate::support::tiny_model::{Family, HEAD_DIM, NUM_KV_HEADS, TinyModel};

const IDENTITY: &[u8] = b"tiny";

struct World {
    thread: ServerThread,
    engine: TestEngine,
    store: Arc<BlockStore>,
}

impl World {
    fn new() -> Self {
        let (family, setup) = (Family::Llama, Setup { limits: limits(), ..Setup::default() });
        let block_size = setup.limits.block_size;
        let numbers = family.num_layers() * 2 * NUM_KV_HEADS * HEAD_DIM * block_size;
        let block_bytes = (numbers * setup.kv_dtype.block_bytes()).next_multiple_of(4096);
        let format = BlockFormat { block_bytes, block_size, layout: "test".into() };
        let config = StoreConfig { format, max_bytes: 64 << 20, segment_bytes: 4 << 20 };
        let store = Arc::new(BlockStore::open(Arc::new(FaultyFiles::new(1)), Path::new("/vault"), config).unwrap().0);
        let open: Arc<OnceLock<OpenBlocks>> = Arc::default();
        let (opened, shared) = (Arc::clone(&open), Arc::clone(&store));
        let open_vault = Box::new(move || {
            let _ = opened.set(OpenBlocks { store: Arc::clone(&shared), binding: binding(), block_bytes });
            Ok(OpenedVault { identity: binding().identity.as_bytes().to_vec(), store: Some(shared) })
        });
        let tiers = mneme::engine::TierConfig { open_vault: Some(open_vault), ..Default::default() };
        let model = TinyModel::new(family, 3).write();
        let backend = mneme::backend::cpu::CpuBackend::new(setup.isa, setup.num_threads).unwrap();
        let engine = TestEngine::start_with_tiers(backend, model.path(), setup, tiers);
        let catalog = Arc::new(Catalog::in_memory(Arc::new(SystemClock), CatalogLimits::default()));
        let cubes = VaultEngine::new(engine.handle.clone(), Arc::clone(&catalog), open);
        let cubes = Some(CubeService { catalog, engine: Arc::new(cubes) });
        let model = ServedModel { cubes, ..served_model(engine.handle.clone()) };
        let config = ServerConfig { port: 0, prefill_interval: Duration::from_millis(1), ..ServerConfig::default() };
        Self { thread: ServerThread::start(config, model).unwrap(), engine, store }
    }

    fn send(&self, request: &[u8]) -> client::Reply {
        let mut connection = client::Connection::open(self.thread.address());
        connection.send_some(request);
        connection.receive()
    }

    fn get(&self, name: &str) -> Value {
        self.send(&client::get(&format!("/v1/memcubes/{name}?include=payload"), "")).json()
    }

    /// The vault opens beside the first calls.
    fn create(&self, name: &str, token_ids: &[u32]) -> Value {
        let body = json!({ "name": name, "token_ids": token_ids }).to_string();
        loop {
            let reply = self.send(&client::post("/v1/memcubes", body.as_bytes(), ""));
            match reply.status {
                201 => return reply.json(),
                503 => {}
                _ => panic!("{}", reply.text()),
            }
        }
    }

    fn num_done(&self) -> u64 {
        self.engine.handle.metrics().prefills.num(PrefillOutcome::Done)
    }

    fn blocks(&self, name: &str) -> Vec<BlockHash> {
        let shown = self.get(name);
        let hashes =
            shown["blocks"].as_array().unwrap().iter().chain(shown["tail"].is_string().then(|| &shown["tail"]));
        hashes.map(|hash| hash.as_str().unwrap().parse::<Digest>().unwrap().into()).collect()
    }
}

fn binding() -> Binding {
    let digest = Digest::of(IDENTITY);
    Binding {
        weights: digest,
        architecture: "llama".parse().unwrap(),
        dtype: "bf16".parse().unwrap(),
        tokenizer: digest,
        template: None,
        identity: digest,
        form: Form::Prefix,
        domain: "".parse().unwrap(),
    }
}

#[test]
fn kv_that_a_cube_has_lost_is_computed_while_nothing_else_is_to_be() {
    let world = World::new();
    let token_ids: Vec<u32> = (1..=50).collect();
    let made = world.create("ana/notes", &token_ids);
    assert_eq!((&made["missing"], world.num_done()), (&Value::Null, 0));
    let blocks = world.blocks("ana/notes");
    assert_eq!(blocks.len(), 4);
    assert!(world.store.erase(&blocks).unwrap());
    while world.num_done() == 0 {
        std::thread::yield_now();
    }
    assert_eq!(world.store.count_missing(&blocks), 0);
    let shown = world.get("ana/notes");
    assert_eq!((&shown["missing"], &shown["version"]), (&Value::Null, &json!(1)));
    let metrics = world.send(&client::get("/metrics", ""));
    let line =
        metrics.text().lines().find(|line| line.starts_with("mneme:cube_prefills_total") && line.contains("done"));
    assert!(line.is_some_and(|line| line.ends_with(" 1")), "{line:?}");
}
