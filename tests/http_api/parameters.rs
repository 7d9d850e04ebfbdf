//! Parameter cubes: an adapter under a cube's name, for those whom its access list lets, as long as its files hold what they
//! held.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use mneme::server::{AdapterRegistry, CubeService, ServedModel, ServerConfig, ServerThread};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::adapters::{adapter, takes_adapters};
use crate::client::Reply;
use crate::fake_cubes::FakeCubes;
use crate::fake_engine::{self, Script};
use crate::{TestServer, completion_body, served_model};

struct Setup {
    server: TestServer,
    cubes: Arc<FakeCubes>,
    root: TempDir,
}

/// A server that may load what lies below `root`, with nothing loaded.
fn serve(config: ServerConfig, cubes: CubeService, root: Option<&Path>) -> TestServer {
    let fake = fake_engine::start(Script::say("a"), 64);
    let engine = takes_adapters(fake.handle);
    let roots: Vec<_> = root.map(Path::to_owned).into_iter().collect();
    let registry = AdapterRegistry::new(engine.clone(), &roots).unwrap();
    let model = ServedModel { adapters: Some(registry), cubes: Some(cubes), ..served_model(engine.clone()) };
    let thread = ServerThread::start(ServerConfig { port: 0, ..config }, model).unwrap();
    TestServer { thread, engine, requests: fake.requests }
}

/// Adapters `a` and `b`.
fn root() -> TempDir {
    let root = tempfile::tempdir().unwrap();
    for (seed, name) in [(1, "a"), (2, "b")] {
        let folder = root.path().join(name);
        std::fs::create_dir(&folder).unwrap();
        adapter(4, seed).write_into(&folder);
    }
    root
}

impl Setup {
    fn new() -> Self {
        Self::with_config(ServerConfig::default())
    }

    fn with_config(config: ServerConfig) -> Self {
        let (cubes, root) = (Arc::new(FakeCubes::default()), root());
        let server = serve(config, cubes.service(), Some(root.path()));
        Self { server, cubes, root }
    }

    fn send(&self, method: &str, path: &str, key: &str, body: &Value) -> Reply {
        send(&self.server, method, path, key, body)
    }

    fn create(&self, name: &str, path: &str) -> Reply {
        self.send("POST", "/v1/memcubes", "", &json!({ "name": name, "kind": "parameter", "adapter": path }))
    }

    fn applied(&self, fields: Value) -> Vec<(String, f32)> {
        applied(&self.server, fields)
    }
}

fn send(server: &TestServer, method: &str, path: &str, key: &str, body: &Value) -> Reply {
    let body = body.to_string();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    server.send(head.as_bytes())
}

/// What reaches the engine: digests and scales.
fn applied(server: &TestServer, fields: Value) -> Vec<(String, f32)> {
    let reply = server.complete(fields.clone());
    assert_eq!(reply.status, 200, "{fields}: {}", reply.text());
    let request = server.requests.recv().unwrap();
    request.adapters.iter().map(|applied| (applied.adapter.digest().to_string(), applied.scale)).collect()
}

fn message(reply: &Reply) -> String {
    reply.json()["error"]["message"].as_str().unwrap().to_owned()
}

fn digest(cube: &Value) -> String {
    cube["adapter"]["digest"].as_str().unwrap().to_owned()
}

#[test]
fn an_adapter_is_a_cube_and_its_name_an_adapters() {
    let setup = Setup::new();
    let made = setup.create("ana/style", "a");
    assert_eq!(made.status, 201, "{}", made.text());
    let made = made.json();
    let source = setup.root.path().canonicalize().unwrap().join("a");
    assert_eq!(made["adapter"]["source"], source.display().to_string());
    assert_eq!((&made["kind"], &made["adapter"]["rank"]), (&json!("parameter"), &json!(4)));
    assert!(made["bytes"].as_u64().unwrap() > 0 && made["binding"].is_null());
    let wanted = digest(&made);
    for (fields, scale) in [
        (json!({ "memory": { "adapters": ["ana/style"] } }), 1.0),
        (json!({ "memory": { "adapters": [{ "name": "ana/style@1", "scale": -0.5 }] } }), -0.5),
        (json!({ "memory": { "cubes": ["ana/style"] } }), 1.0),
        (json!({ "model": "tiny@ana/style" }), 1.0),
        (json!({ "model": "tiny+ana/style:0.25" }), 0.25),
        (json!({ "model": "ana/style" }), 1.0),
        (json!({ "lora_path": "ana/style" }), 1.0),
    ] {
        assert_eq!(setup.applied(fields), [(wanted.clone(), scale)]);
    }
    let list = setup.send("GET", "/v1/memcubes?kind=parameter", "", &json!({})).json();
    assert_eq!(list["data"][0]["name"], "ana/style");
    assert_eq!(list["data"][0]["hits"], 7);
}

#[test]
fn who_may_read_a_cube_finds_it_among_the_models() {
    let keys = ["ana".to_owned(), "bob".to_owned()].to_vec();
    let setup = Setup::with_config(ServerConfig { api_keys: keys, ..ServerConfig::default() });
    let body = json!({ "name": "ana/style", "kind": "parameter", "adapter": "a" });
    assert_eq!(setup.send("POST", "/v1/memcubes", "ana", &body).status, 201);
    let ids = |key: &str| -> Vec<String> {
        let list = setup.send("GET", "/v1/models", key, &json!({})).json();
        list["data"].as_array().unwrap().iter().map(|card| card["id"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(ids("ana").last().unwrap(), "ana/style");
    assert!(!ids("bob").contains(&"ana/style".to_owned()));
    for name in ["ana/style", "ana/style@1"] {
        let card = setup.send("GET", &format!("/v1/models/{name}"), "ana", &json!({})).json();
        assert_eq!((&card["id"], &card["parent"], &card["merged"]), (&json!(name), &json!("tiny"), &json!(false)));
        assert!(card["root"].as_str().unwrap().ends_with("/a") && card["created"].as_u64().unwrap() > 1 << 30);
        assert_eq!(setup.send("GET", &format!("/v1/models/{name}"), "bob", &json!({})).status, 404);
        let body = json!({ "model": name, "prompt": "Tea." });
        for (path, body) in [("/tokenize", body), ("/detokenize", json!({ "model": name, "tokens": [1] }))] {
            assert_eq!(setup.send("POST", path, "ana", &body).status, 200);
            assert_eq!(setup.send("POST", path, "bob", &body).status, 404);
        }
    }
}

#[test]
fn text_and_adapters_go_together_in_one_call() {
    let setup = Setup::new();
    let wanted = digest(&setup.create("ana/style", "a").json());
    let text = json!({ "name": "ana/notes", "text": "Tea.", "target": "completion" });
    assert_eq!(setup.send("POST", "/v1/memcubes", "", &text).status, 201);
    let fields = json!({ "memory": { "cubes": ["ana/notes", "ana/style"] } });
    let reply = setup.server.complete(fields);
    assert_eq!(reply.status, 200, "{}", reply.text());
    let memory = &reply.json()["memory"];
    assert_eq!(memory["cubes"], json!([{ "name": "ana/notes", "version": 1, "mode": "prefix" }]));
    assert_eq!(memory["adapters"], json!([{ "digest": wanted, "scale": 1.0 }]));
    let request = setup.server.requests.recv().unwrap();
    assert!(request.shared_prefix.is_some() && request.adapters.len() == 1);
    let refused = |fields: Value| {
        let reply = setup.server.complete(fields.clone());
        assert_eq!(reply.status, 400, "{fields}: {}", reply.text());
        message(&reply)
    };
    let mode = json!({ "memory": { "cubes": [{ "name": "ana/style", "mode": "link" }] } });
    assert!(refused(mode).contains("memory.adapters takes a scale"));
    assert!(refused(json!({ "memory": { "adapters": ["ana/notes"] } })).contains("no adapter"));
    let many = vec!["ana/style"; 9];
    assert!(refused(json!({ "memory": { "cubes": many } })).contains("8 adapters"));
}

#[test]
fn a_cubes_name_versions_and_end_are_the_adapters() {
    let setup = Setup::new();
    let first = digest(&setup.create("ana/style", "a").json());
    let act = |path: &str, body: Value| setup.send("POST", path, "", &body);
    assert_eq!(act("/v1/memcubes/ana/style/rename", json!({ "name": "ana/voice" })).status, 200);
    assert_eq!(setup.server.complete(json!({ "model": "tiny+ana/style" })).status, 404);
    let grown = act("/v1/memcubes/ana/voice/append", json!({ "adapter": "b" }));
    assert_eq!(grown.status, 200, "{}", grown.text());
    let second = digest(&grown.json());
    assert_ne!(first, second);
    let one = |name: &str| setup.applied(json!({ "memory": { "adapters": [name] } })).remove(0).0;
    assert_eq!((one("ana/voice"), one("ana/voice@1")), (second, first.clone()));
    let text = act("/v1/memcubes/ana/voice/append", json!({ "text": "x" }));
    assert_eq!((text.status, &text.json()["error"]["param"]), (400, &json!("adapter")));
    assert_eq!(act("/v1/memcubes/ana/voice@1/fork", json!({ "name": "ana/old" })).status, 201);
    assert_eq!(setup.send("DELETE", "/v1/memcubes/ana/voice", "", &json!({})).status, 200);
    assert_eq!(setup.server.complete(json!({ "memory": { "adapters": ["ana/voice"] } })).status, 404);
    assert_eq!(one("ana/old"), first);
}

#[test]
fn who_may_not_read_a_cube_does_not_find_its_adapter() {
    let api_keys = vec!["ana".to_owned(), "bert".to_owned()];
    let admin_api_key = Some("root".to_owned());
    let setup = Setup::with_config(ServerConfig { api_keys, admin_api_key, ..ServerConfig::default() });
    let body = json!({ "name": "team/style", "kind": "parameter", "adapter": "a" });
    let denied = setup.send("POST", "/v1/memcubes", "ana", &body);
    assert_eq!(denied.status, 403, "files are the admin's to read: {}", denied.text());
    assert_eq!(setup.send("POST", "/v1/memcubes", "root", &body).status, 201);
    let uses = [
        json!({ "memory": { "adapters": ["team/style"] } }),
        json!({ "memory": { "cubes": ["team/style"] } }),
        json!({ "model": "tiny+team/style:2" }),
        json!({ "model": "tiny@team/style" }),
    ];
    let statuses = |key: &str| {
        let ask = |fields: &Value| setup.send("POST", "/v1/completions", key, &completion_body(fields.clone())).status;
        uses.iter().map(ask).collect::<Vec<_>>()
    };
    assert_eq!(statuses("bert"), [404; 4]);
    assert_eq!(setup.server.requests.len(), 0);
    let acl = json!({ "acl": { "visibility": "public" } });
    assert_eq!(setup.send("PATCH", "/v1/memcubes/team/style", "root", &acl).status, 200);
    assert_eq!(statuses("bert"), [200; 4]);
}

#[test]
fn an_adapter_is_found_again_after_a_restart_unless_its_files_changed() {
    let (root, vault_folder) = (root(), tempfile::tempdir().unwrap());
    let cubes = Arc::new(FakeCubes::default());
    let use_it = json!({ "memory": { "adapters": ["ana/style"] } });
    let verify = |server: &TestServer| send(server, "POST", "/v1/memcubes/ana/style/verify", "", &json!({})).json();
    let wanted = {
        let (service, _vault) = cubes.service_in(vault_folder.path());
        let server = serve(ServerConfig::default(), service, Some(root.path()));
        let body = json!({ "name": "ana/style", "kind": "parameter", "adapter": "a" });
        let made = send(&server, "POST", "/v1/memcubes", "", &body);
        assert_eq!(made.status, 201, "{}", made.text());
        assert_eq!(verify(&server)["whole"], 1);
        digest(&made.json())
    };
    // Whoever may use the cube needs no root.
    let (service, _vault) = cubes.service_in(vault_folder.path());
    let server = serve(ServerConfig::default(), service, None);
    adapter(4, 9).write_into(&root.path().join("a"));
    let changed = server.complete(use_it.clone());
    assert_eq!(changed.status, 409, "{}", changed.text());
    assert!(message(&changed).contains("has changed since the cube was made"), "{}", changed.text());
    assert_eq!(verify(&server)["damaged"], 1);
    std::fs::remove_file(root.path().join("a/adapter_model.safetensors")).unwrap();
    let gone = server.complete(use_it.clone());
    assert_eq!(gone.status, 409, "{}", gone.text());
    assert_eq!(verify(&server)["missing"], 1);
    assert_eq!(server.requests.len(), 0, "nothing reached the engine");
    adapter(4, 1).write_into(&root.path().join("a"));
    assert_eq!(verify(&server)["whole"], 1);
    assert_eq!(applied(&server, use_it), [(wanted, 1.0)]);
}

#[test]
fn what_cannot_be_a_parameter_cube_is_refused() {
    let setup = Setup::new();
    std::fs::create_dir(setup.root.path().join("bad")).unwrap();
    std::fs::write(setup.root.path().join("bad/adapter_config.json"), "{}").unwrap();
    std::fs::write(setup.root.path().join("bad/adapter_model.safetensors"), "x").unwrap();
    for (status, param, fields) in [
        (400, "adapter", json!({ "kind": "parameter" })),
        (400, "adapter", json!({ "kind": "parameter", "text": "x" })),
        (400, "adapter", json!({ "adapter": "a" })),
        (404, "adapter", json!({ "kind": "parameter", "adapter": "nowhere" })),
        (404, "adapter", json!({ "kind": "parameter", "adapter": "../../etc" })),
        (400, "adapter", json!({ "kind": "parameter", "adapter": "bad" })),
    ] {
        let mut body = json!({ "name": "ana/x" });
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let reply = setup.send("POST", "/v1/memcubes", "", &body);
        assert_eq!(
            (reply.status, &reply.json()["error"]["param"]),
            (status, &json!(param)),
            "{body}: {}",
            reply.text()
        );
    }
    let erased = json!({ "name": "ana/x", "kind": "parameter", "adapter": "a", "erase_on_free": true });
    let reply = setup.send("POST", "/v1/memcubes", "", &erased);
    assert_eq!(reply.status, 400, "{}", reply.text());
    assert_eq!(setup.create("ana/style", "a").status, 201);
    let mark = setup.send("PATCH", "/v1/memcubes/ana/style", "", &json!({ "erase_on_free": true }));
    assert!(mark.status == 400 && message(&mark).contains("files"), "{}", mark.text());
    let export = setup.send("POST", "/v1/memcubes/ana/style/export", "", &json!({}));
    assert!(export.status == 409 && message(&export).contains("files of its own"), "{}", export.text());
    setup.cubes.has_other_weights.store(true, Ordering::SeqCst);
    let other = setup.server.complete(json!({ "memory": { "adapters": ["ana/style"] } }));
    assert!(other.status == 409 && message(&other).contains("another model"), "{}", other.text());
    let closed = serve(ServerConfig::default(), Arc::new(FakeCubes::default()).service(), None);
    let body = json!({ "name": "ana/x", "kind": "parameter", "adapter": "a" });
    let reply = send(&closed, "POST", "/v1/memcubes", "", &body);
    assert!(reply.status == 403 && message(&reply).contains("--lora-root"), "{}", reply.text());
}
