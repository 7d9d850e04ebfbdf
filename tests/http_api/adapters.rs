//! Adapters over HTTP: names, compositions, loading and unloading below a root, and what is refused.

#![allow(clippy::unwrap_used)]

use std::path::PathBuf;
use std::sync::Arc;

use mneme::adapters::{BaseShapes, GgufConventions};
use mneme::backend::sim::SimLoraLoader;
use mneme::engine::handle::EngineHandle;
use mneme::engine::{AdapterSpace, AdapterStore, MergeRule};
use mneme::server::{AdapterRegistry, MergeRules, ServedModel, ServerConfig, ServerThread};
use mneme::telemetry::EngineMetrics;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::client::{self, Reply};
use crate::fake_engine::{self, Script};
use crate::support::tiny_adapter::TinyAdapter;
use crate::{TestServer, served_model};

const GGUF: GgufConventions = GgufConventions { architecture: "llama", interleaved_heads: None };
const SHAPES: BaseShapes = BaseShapes {
    num_layers: 1,
    hidden_size: 8,
    intermediate_size: 16,
    q_size: 8,
    kv_size: 8,
    vocab_size: 32,
    gguf: GGUF,
};
const PAGE_BYTES: usize = 1024;
const NUM_PAGES: usize = 4;

struct Setup {
    server: TestServer,
    root: TempDir,
}

/// The same engine, which reads adapters for [`SHAPES`].
pub(crate) fn takes_adapters(engine: EngineHandle) -> EngineHandle {
    let space = AdapterSpace { shapes: SHAPES, page_bytes: PAGE_BYTES, num_pages: NUM_PAGES, host_bytes: 1 << 20 };
    let metrics = Arc::new(EngineMetrics::new("tiny", 16, NUM_PAGES));
    engine.with_adapters(Arc::new(AdapterStore::new(SimLoraLoader, space, metrics)))
}

pub(crate) fn adapter(rank: usize, seed: u64) -> TinyAdapter {
    TinyAdapter::new(&[("model.layers.0.self_attn.q_proj".into(), 8, 8)], rank, seed)
}

impl Setup {
    /// Adapters `a` and `b` from the start; `c` and `d` lie below the root.
    fn new(is_open: bool) -> Self {
        Self::with_config(is_open, ServerConfig::default())
    }

    fn with_config(is_open: bool, config: ServerConfig) -> Self {
        let root = tempfile::tempdir().unwrap();
        for (seed, name) in ["a", "b", "c", "d"].into_iter().enumerate() {
            let folder = root.path().join(name);
            std::fs::create_dir(&folder).unwrap();
            adapter(4, seed as u64).write_into(&folder);
        }
        let fake = fake_engine::start(Script::say("a"), 64);
        let engine = takes_adapters(fake.handle);
        let roots: Vec<PathBuf> = is_open.then(|| root.path().to_owned()).into_iter().collect();
        let mut rules = MergeRules::default();
        rules.set(Some("b"), MergeRule::Always);
        let registry = AdapterRegistry::new(engine.clone(), &roots).unwrap().with_merge_rules(rules);
        for name in ["a", "b"] {
            registry.load(name, &root.path().join(name), false).unwrap();
        }
        let model = ServedModel { adapters: Some(registry), ..served_model(engine.clone()) };
        let thread = ServerThread::start(ServerConfig { port: 0, ..config }, model).unwrap();
        Self { server: TestServer { thread, engine, requests: fake.requests }, root }
    }

    fn load(&self, fields: Value) -> Reply {
        self.server.post("/v1/load_lora_adapter", &fields)
    }

    /// What reached the engine: digests and scales.
    fn applied(&self, model: &str) -> Vec<(String, f32)> {
        let reply = self.server.complete(json!({ "model": model }));
        assert_eq!(reply.status, 200, "{model}: {}", reply.text());
        assert_eq!(reply.json()["model"], model);
        let request = self.server.requests.recv().unwrap();
        request.adapters.iter().map(|applied| (applied.adapter.digest().to_string(), applied.scale)).collect()
    }

    fn digest(&self, name: &str) -> String {
        self.applied(name).remove(0).0
    }
}

fn message(reply: &Reply) -> String {
    reply.json()["error"]["message"].as_str().unwrap().to_owned()
}

#[test]
fn a_models_name_means_the_model_an_adapter_or_a_sum_of_several() {
    let setup = Setup::new(false);
    assert_eq!(setup.applied("tiny"), []);
    assert_eq!(setup.applied("org/tiny"), []);
    let (a, b) = (setup.digest("a"), setup.digest("b"));
    assert_ne!(a, b);
    assert_eq!(setup.applied("a"), [(a.clone(), 1.0)]);
    assert_eq!(setup.applied("tiny+a"), [(a.clone(), 1.0)]);
    assert_eq!(setup.applied("org/tiny+b:-0.5+a:0.7"), [(b, -0.5), (a, 0.7)]);
    for (model, status) in [
        ("c", 404),
        ("a+b", 404),
        ("tiny+", 404),
        ("tiny+a+c:1", 404),
        ("tiny+a:", 400),
        ("tiny+a:x", 400),
        ("tiny+a:inf", 400),
        ("tiny+a:NaN", 400),
    ] {
        let reply = setup.server.complete(json!({ "model": model }));
        assert_eq!(reply.status, status, "{model}: {}", reply.text());
        assert_eq!(reply.json()["error"]["param"], "model");
    }
    assert!(setup.server.requests.is_empty(), "nothing reached the engine");
}

#[test]
fn the_fields_of_other_servers_name_adapters() {
    let setup = Setup::new(false);
    let (a, b) = (setup.digest("a"), setup.digest("b"));
    let applied = |fields: Value| {
        let reply = setup.server.complete(fields);
        assert_eq!(reply.status, 200, "{}", reply.text());
        let request = setup.server.requests.recv().unwrap();
        let facts = request.adapters.iter().map(|applied| (applied.adapter.digest().to_string(), applied.scale));
        facts.collect::<Vec<_>>()
    };
    let lora = json!([{ "id": 1, "scale": 0.5 }, { "id": 0, "scale": -1.0 }]);
    assert_eq!(applied(json!({ "lora": lora })), [(b.clone(), 0.5), (a.clone(), -1.0)]);
    assert_eq!(applied(json!({ "lora_path": "b" })), [(b.clone(), 1.0)]);
    assert_eq!(applied(json!({ "lora": [], "lora_path": null })), []);
    let merged = json!({ "ids": ["b", "a"], "weights": [2.0, -0.5], "merge_strategy": "linear", "density": 0.2 });
    assert_eq!(applied(json!({ "merged_adapters": merged })), [(b.clone(), 2.0), (a.clone(), -0.5)]);
    assert_eq!(applied(json!({ "merged_adapters": { "ids": ["a"] } })), [(a.clone(), 1.0)]);
    let in_memory = json!({ "adapters": ["b", { "name": "a", "scale": 0.25 }] });
    assert_eq!(applied(json!({ "model": "a", "memory": in_memory })), [(a.clone(), 1.0), (b, 1.0), (a, 0.25)]);
    for (fields, status, param) in [
        (json!({ "lora": [{ "id": 2, "scale": 1.0 }] }), 400, "lora"),
        (json!({ "lora_path": "c" }), 404, "lora_path"),
        (json!({ "lora": [{ "id": 0, "scale": 1e39 }] }), 400, "model"),
        (json!({ "merged_adapters": { "ids": ["a", "c"] } }), 404, "merged_adapters"),
        (json!({ "merged_adapters": { "ids": ["a", "b"], "weights": [1.0] } }), 400, "merged_adapters"),
        (json!({ "merged_adapters": { "ids": ["a"], "merge_strategy": "dare_ties" } }), 400, "merged_adapters"),
        (
            json!({ "merged_adapters": { "ids": ["a"], "merge_strategy": "sum" } }),
            400,
            "merged_adapters.merge_strategy",
        ),
        (json!({ "memory": { "adapters": ["c"] } }), 404, "memory.adapters"),
        (json!({ "memory": { "adapters": [{ "scale": 1.0 }] } }), 400, "memory.adapters[0]"),
        (json!({ "model": format!("tiny{}", "+a".repeat(9)) }), 400, "model"),
    ] {
        let reply = setup.server.complete(fields);
        assert_eq!((reply.status, &reply.json()["error"]["param"]), (status, &json!(param)), "{}", reply.text());
    }
}

#[test]
fn names_and_calls_have_rules_of_merging() {
    let setup = Setup::new(false);
    let rules = |fields: Value| {
        let reply = setup.server.complete(fields);
        assert_eq!(reply.status, 200, "{}", reply.text());
        let request = setup.server.requests.recv().unwrap();
        request.adapters.iter().map(|applied| applied.adapter.merge_rule()).collect::<Vec<_>>()
    };
    assert_eq!(rules(json!({ "model": "a" })), [MergeRule::Auto]);
    assert_eq!(rules(json!({ "model": "tiny+a+b" })), [MergeRule::Auto, MergeRule::Always]);
    assert_eq!(rules(json!({ "model": "b", "memory": {"merge": "auto"} })), [MergeRule::Always]);
    assert_eq!(rules(json!({ "model": "tiny+a+b", "memory": {"merge": "never"} })), [MergeRule::Never; 2]);
    assert_eq!(rules(json!({ "lora_path": "b", "memory": {"merge": "never"} })), [MergeRule::Never]);
    assert_eq!(rules(json!({ "memory": {"merge": "never"} })), []);
    let refused = setup.server.complete(json!({ "model": "a", "memory": {"merge": "always"} }));
    assert_eq!(refused.status, 400, "a call cannot demand what costs others memory: {}", refused.text());
    let card = setup.server.get("/v1/models/a").json();
    assert_eq!(card["merged"], json!(false));
    assert!(setup.server.get("/v1/models/tiny").json().get("merged").is_none());
}

#[test]
fn embeddings_and_tokens_know_adapters_too() {
    let setup = Setup::new(false);
    let body = json!({ "model": "a", "input": "hi" });
    assert_eq!(setup.server.post("/v1/embeddings", &body).status, 200);
    assert_eq!(setup.server.requests.recv().unwrap().adapters.len(), 1);
    assert_eq!(setup.server.post("/tokenize", &json!({ "model": "a", "prompt": "hi" })).status, 200);
    assert_eq!(setup.server.post("/tokenize", &json!({ "model": "c", "prompt": "hi" })).status, 404);
}

#[test]
fn models_lists_adapters_behind_their_model() {
    let setup = Setup::new(false);
    let list = setup.server.get("/v1/models").json();
    let facts: Vec<_> = list["data"].as_array().unwrap().iter().map(|card| (&card["id"], &card["parent"])).collect();
    let (tiny, none) = (json!("tiny"), Value::Null);
    let names = [json!("tiny"), json!("org/tiny"), json!("a"), json!("b")];
    assert_eq!(facts, [(&names[0], &none), (&names[1], &none), (&names[2], &tiny), (&names[3], &tiny)]);
    let card = setup.server.get("/v1/models/a").json();
    assert_eq!(card["root"], setup.root.path().join("a").display().to_string());
    assert_eq!((&card["object"], &card["id"]), (&json!("model"), &json!("a")));
    assert_eq!(setup.server.get("/v1/models/c").status, 404);
}

#[test]
fn adapters_come_and_go_below_the_root() {
    let setup = Setup::new(true);
    let path = setup.root.path().join("c");
    let body = json!({ "lora_name": "mine", "lora_path": path });
    let reply = setup.load(body.clone());
    assert_eq!((reply.status, reply.text()), (200, "Success: LoRA adapter 'mine' added successfully."));
    let first = setup.digest("mine");
    let again = setup.load(body);
    assert_eq!(again.status, 400);
    assert!(message(&again).contains("already been loaded"), "{}", again.text());
    // In place, from a path relative to the root.
    let replaced = setup.load(json!({ "lora_name": "mine", "lora_path": "d", "load_inplace": true }));
    assert_eq!(replaced.status, 200, "{}", replaced.text());
    assert_ne!(setup.digest("mine"), first);
    assert_eq!(setup.server.get("/v1/models").json()["data"].as_array().unwrap().len(), 5);
    let unload = || setup.server.post("/v1/unload_lora_adapter", &json!({ "lora_name": "mine" }));
    let reply = unload();
    assert_eq!((reply.status, reply.text()), (200, "Success: LoRA adapter 'mine' removed successfully."));
    assert_eq!(unload().status, 404);
    assert_eq!(setup.server.complete(json!({ "model": "mine" })).status, 404);
}

#[test]
fn gguf_files_are_adapters_too() {
    let setup = Setup::new(true);
    adapter(4, 2).write_gguf(&setup.root.path().join("c.gguf"), 2);
    let load = |name: &str, path: &str| setup.load(json!({ "lora_name": name, "lora_path": path }));
    let reply = load("gguf", "c.gguf");
    assert_eq!((reply.status, reply.text()), (200, "Success: LoRA adapter 'gguf' added successfully."));
    assert_eq!(load("folder", "c").status, 200);
    let card = setup.server.get("/v1/models/gguf").json();
    assert_eq!(card["root"], setup.root.path().canonicalize().unwrap().join("c.gguf").display().to_string());
    let outside = tempfile::tempdir().unwrap();
    adapter(4, 2).write_gguf(&outside.path().join("d.gguf"), 2);
    std::os::unix::fs::symlink(outside.path().join("d.gguf"), setup.root.path().join("link.gguf")).unwrap();
    assert_eq!(load("x", "link.gguf").status, 404);
    assert_eq!(load("x", "nowhere.gguf").status, 404);
    std::fs::write(setup.root.path().join("bad.gguf"), b"GGUF\x03\0\0\0").unwrap();
    let damaged = load("x", "bad.gguf");
    assert_eq!(damaged.status, 400, "{}", damaged.text());
    assert!(message(&damaged).contains("cut short"), "{}", damaged.text());
}

#[test]
fn what_lies_outside_the_root_is_not_there() {
    let setup = Setup::new(true);
    let outside = adapter(4, 9).write();
    let link = setup.root.path().join("link");
    std::os::unix::fs::symlink(outside.path(), &link).unwrap();
    // A folder below the root whose weights are elsewhere.
    let mixed = setup.root.path().join("mixed");
    std::fs::create_dir(&mixed).unwrap();
    std::fs::copy(setup.root.path().join("a/adapter_config.json"), mixed.join("adapter_config.json")).unwrap();
    let weights = "adapter_model.safetensors";
    std::os::unix::fs::symlink(outside.path().join(weights), mixed.join(weights)).unwrap();
    let escape = format!("../{}", outside.path().file_name().unwrap().to_str().unwrap());
    for path in [outside.path().to_str().unwrap(), link.to_str().unwrap(), "mixed", &escape, "nowhere", "../../etc"] {
        let reply = setup.load(json!({ "lora_name": "x", "lora_path": path }));
        assert_eq!(reply.status, 404, "{path}: {}", reply.text());
        assert_eq!(message(&reply), format!("No adapter found for 'x' at '{path}'."));
    }
}

#[test]
fn damaged_and_too_large_adapters_change_nothing() {
    let setup = Setup::new(true);
    let before = setup.digest("a");
    let folder = setup.root.path().join("c");
    let replace = || setup.load(json!({ "lora_name": "a", "lora_path": "c", "load_inplace": true }));
    adapter(200, 1).write_into(&folder);
    assert_eq!(replace().status, 503, "200 ranks are more than {NUM_PAGES} pages");
    std::fs::write(folder.join("adapter_model.safetensors"), [0; 100]).unwrap();
    let damaged = replace();
    assert_eq!(damaged.status, 400, "{}", damaged.text());
    assert!(message(&damaged).contains("safetensors"), "{}", damaged.text());
    std::fs::remove_file(folder.join("adapter_model.safetensors")).unwrap();
    assert_eq!(replace().status, 404);
    assert_eq!(setup.digest("a"), before);
    for name in ["", "x+y", "x@y", "x y", "tiny", &"n".repeat(257)] {
        let reply = setup.load(json!({ "lora_name": name, "lora_path": "d" }));
        assert_eq!(reply.status, 400, "{name}: {}", reply.text());
    }
}

#[test]
fn without_a_root_nobody_may_load() {
    let setup = Setup::new(false);
    let load = setup.load(json!({ "lora_name": "x", "lora_path": setup.root.path().join("c") }));
    let unload = setup.server.post("/v1/unload_lora_adapter", &json!({ "lora_name": "a" }));
    for reply in [load, unload] {
        assert_eq!(reply.status, 403);
        assert!(message(&reply).contains("--lora-root"), "{}", reply.text());
    }
    assert_eq!(setup.applied("a").len(), 1);
}

#[test]
fn with_an_admin_key_only_its_holder_changes_adapters() {
    let config = ServerConfig { admin_api_key: Some("root".into()), ..ServerConfig::default() };
    let setup = Setup::with_config(true, config);
    let post = |path: &str, body: &Value, key: &str| {
        let header = format!("Authorization: Bearer {key}\r\n");
        setup.server.send(&client::post(path, body.to_string().as_bytes(), &header))
    };
    let load = json!({ "lora_name": "c", "lora_path": setup.root.path().join("c") });
    let unload = json!({ "lora_name": "a" });
    for (path, body) in [("/v1/load_lora_adapter", &load), ("/v1/unload_lora_adapter", &unload)] {
        assert_eq!(setup.server.post(path, body).status, 403);
        assert_eq!(post(path, body, "other").status, 403);
        let reply = post(path, body, "root");
        assert_eq!(reply.status, 200, "{}", reply.text());
    }
    assert_eq!(setup.server.complete(json!({ "model": "c" })).status, 200, "others may use it");
}
