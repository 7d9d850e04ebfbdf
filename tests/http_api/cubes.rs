//! MemCubes over HTTP: every route, every refusal, and what one principal learns of another's.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use mneme::server::ServerConfig;
use serde_json::{Value, json};

use crate::client::Reply;
use crate::fake_cubes::{BYTES_PER_TOKEN, FakeCubes, Prefill};
use crate::fake_engine::{BOS, MAX_MODEL_LEN, Script, VOCAB_SIZE};
use crate::{TestServer, chat_body, completion_body};

pub(crate) struct Setup {
    pub(crate) server: TestServer,
    pub(crate) cubes: Arc<FakeCubes>,
}

impl Setup {
    pub(crate) fn new() -> Self {
        Self::with_config(ServerConfig::default())
    }

    pub(crate) fn with_config(config: ServerConfig) -> Self {
        let cubes = Arc::new(FakeCubes::default());
        Self { server: TestServer::with_cubes(config, cubes.service()), cubes }
    }

    pub(crate) fn with_keys() -> Self {
        let cubes = Arc::new(FakeCubes::default());
        let api_keys = vec!["ana".to_owned(), "bert".to_owned()];
        let config = ServerConfig { api_keys, ..ServerConfig::default() };
        Self { server: TestServer::with_cubes(config, cubes.service()), cubes }
    }

    pub(crate) fn send(&self, method: &str, path: &str, key: &str, body: Option<Value>) -> Reply {
        let body = body.map(|body| body.to_string());
        let content = body.as_ref().map_or_else(String::new, |body| {
            format!("Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}", body.len())
        });
        let end = if body.is_none() { "Content-Length: 0\r\n\r\n" } else { "" };
        let head =
            format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n{content}{end}");
        self.server.send(head.as_bytes())
    }

    pub(crate) fn ok(&self, method: &str, path: &str, body: Option<Value>) -> Value {
        let reply = self.send(method, path, "", body);
        assert!([200, 201].contains(&reply.status), "{method} {path}: {}", reply.text());
        reply.json()
    }

    pub(crate) fn create(&self, name: &str, text: &str) -> Value {
        let reply = self.send("POST", "/v1/memcubes", "", Some(json!({ "name": name, "text": text })));
        assert_eq!(reply.status, 201, "{}", reply.text());
        reply.json()
    }

    pub(crate) fn get(&self, name: &str) -> Value {
        self.ok("GET", &format!("/v1/memcubes/{name}"), None)
    }

    pub(crate) fn refused(&self, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
        let reply = self.send(method, path, "", body);
        (reply.status, reply.json()["error"].clone())
    }
}

pub(crate) fn tokens(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

/// The tokens of a text cube: the template's head and the text.
pub(crate) fn chat_tokens(text: &str) -> Vec<u32> {
    [vec![BOS], tokens("system:"), tokens(text)].concat()
}

#[test]
fn a_text_becomes_a_cube_with_blocks() {
    let setup = Setup::new();
    let text = "Ana likes tea and cycling.";
    let made = setup.create("ana/notes", text);
    let wanted = chat_tokens(text);
    assert_eq!(
        setup.cubes.prefills(),
        [Prefill { token_ids: wanted.clone(), domain: "public".into(), durable: true, source: None }]
    );
    for (field, value) in [
        ("object", json!("memcube")),
        ("name", json!("ana/notes")),
        ("kind", json!("activation")),
        ("version", json!(1)),
        ("state", json!("generated")),
        ("owner", json!("local")),
        ("origin", json!("user_input")),
        ("priority", json!(5)),
        ("restored_tokens", json!(0)),
        ("computed_tokens", json!(wanted.len())),
        ("bytes", json!(wanted.len() as u64 * BYTES_PER_TOKEN)),
        ("acl", json!({ "visibility": "private", "read": [], "write": [], "share": [] })),
    ] {
        assert_eq!(made[field], value, "{field}");
    }
    assert!(made["reason"].as_str().unwrap().contains("computed"));
    assert_eq!(made["binding"]["num_tokens"], wanted.len());
    assert_eq!(made["binding"]["form"], "prefix");
    assert_eq!(made["binding"]["position_base"], 0);
    assert!(made["binding"]["template"].is_string());
    assert!(made.get("text").is_none(), "content is shown when asked for");
    let again = setup.create("ana/same", text);
    assert_eq!((again["restored_tokens"].as_u64(), again["computed_tokens"].as_u64()), (Some(34), Some(0)));
    assert_ne!(again["id"], made["id"]);
}

#[test]
fn messages_tokens_and_plain_text_are_kept_as_what_they_are() {
    let setup = Setup::new();
    let post = |body: Value| setup.ok("POST", "/v1/memcubes", Some(body));
    let messages = json!([{ "role": "user", "content": "Who?" }, { "role": "assistant", "content": "Ana." }]);
    post(json!({ "name": "ana/talk", "messages": messages }));
    let talk = [vec![BOS], tokens("user:Who?"), vec![BOS + 1, BOS], tokens("assistant:Ana."), vec![BOS + 1]].concat();
    assert_eq!(setup.cubes.prefills()[0].token_ids, talk);
    let made = post(json!({ "name": "ana/ids", "token_ids": [1, 2, 3], "durable": false }));
    assert_eq!(made["binding"]["template"], Value::Null);
    let prefill = setup.cubes.prefills().remove(0);
    assert_eq!((prefill.token_ids, prefill.durable), (vec![1, 2, 3], false));
    post(json!({ "name": "ana/raw", "text": "Once", "target": "completion" }));
    assert!(setup.cubes.prefills()[0].token_ids.ends_with(&tokens("Once")));
    let plain = post(json!({ "name": "ana/plain", "text": "Once", "kind": "plaintext" }));
    assert!(setup.cubes.prefills().is_empty(), "a plaintext cube needs no model");
    assert_eq!((&plain["kind"], &plain["binding"], &plain["bytes"]), (&json!("plaintext"), &Value::Null, &json!(0)));
    let shown = |name: &str| setup.get(&format!("{name}?include=payload"));
    assert_eq!(shown("ana/talk")["messages"], messages);
    assert_eq!(shown("ana/ids")["token_ids"], json!([1, 2, 3]));
    assert_eq!(shown("ana/ids")["blocks"], json!([]));
    assert_eq!(shown("ana/ids")["tail"].as_str().unwrap().len(), 64);
    assert_eq!(shown("ana/plain")["text"], "Once");
}

#[test]
fn cubes_are_listed_filtered_and_searched() {
    let setup = Setup::new();
    for name in ["ana/a", "ana/b", "bert/a"] {
        setup.create(name, &format!("About {name}"));
    }
    setup.ok("PATCH", "/v1/memcubes/ana/b", Some(json!({ "tags": ["x", "y z"] })));
    let names = |query: &str| -> Vec<String> {
        let list = setup.ok("GET", &format!("/v1/memcubes{query}"), None);
        assert_eq!((&list["object"], &list["principal"]), (&json!("list"), &json!("local")));
        list["data"].as_array().unwrap().iter().map(|cube| cube["name"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(names(""), ["ana/a", "ana/b", "bert/a"]);
    assert_eq!(names("?namespace=ana"), ["ana/a", "ana/b"]);
    assert_eq!(names("?kind=activation&state=generated&tag=y%20z"), ["ana/b"]);
    assert_eq!(names("?q=ABOUT%20BERT"), ["bert/a"]);
    assert!(names("?kind=parameter").is_empty());
    let first = setup.ok("GET", "/v1/memcubes?limit=2", None);
    assert_eq!(first["next_after"], "ana/b");
    assert_eq!(names("?limit=2&after=ana/b"), ["bert/a"]);
    for query in ["?kind=music", "?state=asleep", "?limit=-1", "?include=everything", "?after=ana"] {
        assert_eq!(setup.refused("GET", &format!("/v1/memcubes{query}"), None).0, 400, "{query}");
    }
}

#[test]
fn appending_keeps_the_tokens_there_are() {
    let setup = Setup::new();
    setup.create("ana/notes", "Ana likes tea.");
    setup.cubes.prefills();
    let grown = setup.ok("POST", "/v1/memcubes/ana/notes/append", Some(json!({ "text": " And rain." })));
    assert_eq!((&grown["version"], &grown["restored_tokens"]), (&json!(2), &json!(16)));
    assert_eq!(setup.cubes.prefills()[0].token_ids, chat_tokens("Ana likes tea. And rain."));
    assert_eq!(setup.get("ana/notes?include=payload")["text"], "Ana likes tea. And rain.");
    let old = setup.get("ana/notes@1?include=payload");
    assert_eq!((&old["text"], &old["newest_version"]), (&json!("Ana likes tea."), &json!(2)));
    let messages = |role: &str, content: &str| json!([{ "role": role, "content": content }]);
    let talk = json!({ "name": "ana/talk", "messages": messages("user", "Who?") });
    setup.ok("POST", "/v1/memcubes", Some(talk));
    let body = json!({ "messages": messages("assistant", "Ana.") });
    setup.ok("POST", "/v1/memcubes/ana/talk/append", Some(body));
    let whole = [vec![BOS], tokens("user:Who?"), vec![BOS + 1, BOS], tokens("assistant:Ana."), vec![BOS + 1]].concat();
    assert_eq!(setup.cubes.prefills()[1].token_ids, whole);
    setup.ok("POST", "/v1/memcubes", Some(json!({ "name": "ana/plain", "text": "a", "kind": "plaintext" })));
    setup.ok("POST", "/v1/memcubes/ana/plain/append", Some(json!({ "text": "b" })));
    assert_eq!(setup.get("ana/plain?include=payload")["text"], "ab");
    for (name, body) in [
        ("ana/notes", json!({ "messages": messages("user", "x") })),
        ("ana/notes", json!({ "token_ids": [1] })),
        ("ana/talk", json!({ "text": "x" })),
        ("ana/plain", json!({ "messages": messages("user", "x") })),
        ("ana/notes", json!({})),
        ("ana/notes", json!({ "text": "x".repeat(MAX_MODEL_LEN) })),
    ] {
        let (status, error) = setup.refused("POST", &format!("/v1/memcubes/{name}/append"), Some(body.clone()));
        assert_eq!(status, 400, "{name} {body}: {error}");
    }
    setup.cubes.has_other_vocabulary.store(true, Ordering::SeqCst);
    let (status, _) = setup.refused("POST", "/v1/memcubes/ana/notes/append", Some(json!({ "text": "x" })));
    assert_eq!(status, 409, "token ids of another vocabulary cannot be continued");
}

#[test]
fn every_action_does_what_it_says() {
    let setup = Setup::new();
    setup.create("ana/a", "A text that is longer than a block.");
    let post = |path: &str, body: Option<Value>| setup.ok("POST", &format!("/v1/memcubes/{path}"), body);
    assert_eq!(post("ana/a/pin", None)["priority"], "pinned");
    assert_eq!(post("ana/a/unpin", Some(json!({})))["priority"], 5);
    let fork = post("ana/a/fork", Some(json!({ "name": "ana/deep/er" })));
    assert_eq!(fork["parents"], json!([setup.get("ana/a")["id"]]));
    assert_eq!(post("ana/deep/er/freeze", None)["state"], "frozen");
    let (status, error) = setup.refused("DELETE", "/v1/memcubes/ana/deep/er", None);
    assert_eq!((status, &error["type"]), (409, &json!("ConflictError")));
    assert_ne!(post("ana/deep/er/unfreeze", None)["state"], "frozen");
    assert_eq!(post("ana/deep/er/rename", Some(json!({ "name": "ana/b" })))["name"], "ana/b");
    assert_eq!(setup.refused("GET", "/v1/memcubes/ana/deep/er", None).0, 404);
    let whole = post("ana/b/verify", None);
    assert_eq!((&whole["whole"], &whole["missing"], &whole["damaged"]), (&json!(3), &json!(0), &json!(0)));
    let lineage = setup.get("ana/a/lineage");
    assert_eq!(lineage["descendants"][0]["name"], "ana/b");
    let deleted = setup.ok("DELETE", "/v1/memcubes/ana/a", None);
    assert_eq!((&deleted["deleted"], &deleted["name"]), (&json!(true), &json!("ana/a")));
    assert_eq!(setup.get("ana/b/lineage")["ancestors"][0]["ending"], "deleted");
    assert_eq!(setup.refused("DELETE", "/v1/memcubes/ana/a", None).0, 404);
    assert_eq!(post("ana/b/verify", None)["whole"], 3, "the fork keeps the blocks");
    setup.cubes.lose_blocks();
    assert_eq!(post("ana/b@1/verify", None)["missing"], 3);
    let reply = setup.send("GET", "/v1/memcubes/events", "", None);
    assert_eq!(reply.header("content-type"), Some("application/x-ndjson"));
    let events: Vec<Value> = reply.text().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let kinds: Vec<&str> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    let wanted = ["created", "pinned", "unpinned", "forked", "frozen", "unfrozen", "renamed", "deleted", "end"];
    assert_eq!(kinds, wanted);
    let since = |events: &[Value]| events.last().unwrap()["next_since"].as_u64().unwrap();
    let path = format!("/v1/memcubes/events?since={}", since(&events));
    assert_eq!(setup.send("GET", &path, "", None).text().lines().count(), 1);
    assert_eq!(setup.send("GET", "/v1/memcubes/events?type=renamed&cube=ana/b", "", None).text().lines().count(), 2);
}

#[test]
fn headers_are_changed_field_by_field() {
    let setup = Setup::new();
    setup.create("ana/a", "Text");
    let patch = |body: Value| setup.ok("PATCH", "/v1/memcubes/ana/a", Some(body));
    let changed = patch(json!({
        "tags": ["b", "a"], "semantic_type": "fact", "ttl_s": 60, "half_life_s": 5, "priority": "pinned",
        "sensitivity": ["medical"], "erase_on_free": true, "acl": { "visibility": "public" }, "unknown": 1
    }));
    assert_eq!(changed["tags"], json!(["a", "b"]));
    assert!(changed["expires_at"].is_string());
    let changed = patch(json!({ "ttl_s": null, "semantic_type": null }));
    assert_eq!(
        (&changed["ttl_s"], &changed["expires_at"], &changed["semantic_type"]),
        (&Value::Null, &Value::Null, &Value::Null)
    );
    assert_eq!((&changed["half_life_s"], &changed["priority"]), (&json!(5), &json!("pinned")));
    for (field, value) in [
        ("ttl_s", json!(0)),
        ("ttl_s", json!(-1)),
        ("half_life_s", json!("long")),
        ("priority", json!(10)),
        ("semantic_type", json!("song")),
        ("tags", json!("a")),
        ("tags", json!(["a\n"])),
        ("tags", json!((0..100).map(|i| i.to_string()).collect::<Vec<_>>())),
        ("acl", json!({ "visibility": "private", "read": ["bert"] })),
        ("acl", json!({ "visibility": "shared", "read": ["a b"] })),
        ("name", json!("ana/b")),
        ("owner", json!("bert")),
        ("kind", json!("plaintext")),
    ] {
        let (status, error) = setup.refused("PATCH", "/v1/memcubes/ana/a", Some(json!({ field: value })));
        assert_eq!(status, 400, "{field} {value}: {error}");
        assert!(error["param"].as_str().is_some_and(|param| param.starts_with(field)), "{field} {value}: {error}");
    }
}

#[test]
fn bad_requests_reach_no_engine() {
    let setup = Setup::new();
    setup.create("ana/a", "Text");
    setup.cubes.prefills();
    for (param, status, body) in [
        ("name", 400, json!({ "text": "x" })),
        ("name", 400, json!({ "name": "ana", "text": "x" })),
        ("name", 400, json!({ "name": "../a", "text": "x" })),
        ("name", 400, json!({ "name": "ana/lineage", "text": "x" })),
        ("name", 400, json!({ "name": "Ana/a", "text": "x" })),
        ("text", 400, json!({ "name": "ana/b" })),
        ("text", 400, json!({ "name": "ana/b", "text": "x", "token_ids": [1] })),
        ("text", 400, json!({ "name": "ana/b", "text": "" })),
        ("text", 400, json!({ "name": "ana/b", "text": 7 })),
        ("text", 400, json!({ "name": "ana/b", "text": "x".repeat(MAX_MODEL_LEN) })),
        ("messages", 400, json!({ "name": "ana/b", "messages": [] })),
        ("messages[0].role", 400, json!({ "name": "ana/b", "messages": [{ "content": "x" }] })),
        (
            "messages",
            400,
            json!({ "name": "ana/b", "messages": [{ "role": "user", "content": [{ "type": "image_url" }] }] }),
        ),
        ("token_ids", 400, json!({ "name": "ana/b", "token_ids": [] })),
        ("token_ids", 400, json!({ "name": "ana/b", "token_ids": [VOCAB_SIZE] })),
        ("token_ids", 400, json!({ "name": "ana/b", "token_ids": [1], "kind": "plaintext" })),
        ("kind", 400, json!({ "name": "ana/b", "text": "x", "kind": "music" })),
        ("adapter", 400, json!({ "name": "ana/b", "text": "x", "kind": "parameter" })),
        ("target", 400, json!({ "name": "ana/b", "text": "x", "target": "radio" })),
        ("parents[0]", 400, json!({ "name": "ana/b", "text": "x", "parents": ["ana/a"] })),
        ("", 409, json!({ "name": "ana/a", "text": "x" })),
    ] {
        let (found, error) = setup.refused("POST", "/v1/memcubes", Some(body.clone()));
        assert_eq!(found, status, "{body}: {error}");
        assert_eq!(error["param"].as_str().unwrap_or_default(), param, "{body}: {error}");
    }
    assert!(setup.cubes.prefills().is_empty());
    for (method, path, status) in [
        ("GET", "/v1/memcubes/ana", 400),
        ("GET", "/v1/memcubes/ana/a@0", 400),
        ("GET", "/v1/memcubes/ana/a@2", 404),
        ("GET", "/v1/memcubes/ana/../a", 400),
        ("GET", "/v1/memcubes/ana%2f..%2fa", 400),
        ("GET", "/v1/memcubes/ana%2fa", 200),
        ("GET", "/v1/memcubes/ana/b/lineage", 404),
        ("POST", "/v1/memcubes/ana/a", 404),
        ("POST", "/v1/memcubes/ana/a/explode", 404),
        ("POST", "/v1/memcubes/ana/a/distill", 501),
        ("POST", "/v1/memcubes/ana/b/pin", 404),
        ("PUT", "/v1/memcubes/ana/a", 405),
        ("DELETE", "/v1/memcubes/ana/a@1", 400),
    ] {
        assert_eq!(setup.send(method, path, "", None).status, status, "{method} {path}");
    }
    setup.cubes.is_loading.store(true, Ordering::SeqCst);
    assert_eq!(setup.refused("POST", "/v1/memcubes", Some(json!({ "name": "ana/b", "text": "x" }))).0, 503);
}

/// Every text's tokens are those of its cube, wherever it stands; a cube of another mode is computed among them.
#[test]
fn linked_cubes_are_pieces_of_the_prompt() {
    let setup = Setup::new();
    setup.create("ana/a", "Tea and rain.");
    setup.create("ana/b", "Oranges.");
    setup.ok("POST", "/v1/memcubes", Some(json!({ "name": "ana/plain", "text": "Bread.", "kind": "plaintext" })));
    let cubes = json!(["ana/b", { "name": "ana/a", "mode": "text" }, "ana/plain", "ana/a"]);
    let memory = json!({ "cubes": cubes, "compose": "link", "recompute_tokens": 2 });
    let answer = setup.ok("POST", "/v1/chat/completions", Some(chat_body(json!({ "memory": memory }))));
    let request = setup.server.requests.recv().unwrap();
    let whole = "Oranges.\n\nTea and rain.\n\nBread.\n\nTea and rain.";
    assert!(request.prompt.starts_with(&chat_tokens(whole)), "{:?}", request.prompt);
    let head = chat_tokens("").len();
    let found: Vec<_> =
        request.pieces.iter().map(|piece| (piece.start - head, &piece.source, piece.source_start)).collect();
    let alone = &request.pieces[1].source;
    assert!(alone.ends_with(&tokens("Bread.")) && alone.len() <= 7, "{alone:?}");
    let (oranges, tea) = (chat_tokens("Oranges."), chat_tokens("Tea and rain."));
    assert_eq!(found, [(0, &oranges, head), (25, alone, alone.len() - 6), (33, &tea, head)]);
    assert!(request.pieces.iter().all(|piece| piece.num_recomputed == 2 && piece.domain == "public"));
    assert!(request.shared_prefix.is_none());
    let used = &answer["memory"];
    let modes: Vec<&Value> = used["cubes"].as_array().unwrap().iter().map(|cube| &cube["mode"]).collect();
    assert_eq!(
        (modes, &used["exact"]),
        (vec![&json!("link"), &json!("text"), &json!("link"), &json!("link")], &json!(false))
    );
    assert_eq!(used["linked_tokens"], 0, "this engine moves nothing");
    // A completion has a BOS where texts begin with one.
    let memory = json!({ "cubes": ["ana/b"], "compose": "link" });
    setup.ok("POST", "/v1/completions", Some(completion_body(json!({ "memory": memory }))));
    let request = setup.server.requests.recv().unwrap();
    assert!(request.prompt.ends_with(&tokens("Oranges.hi")), "{:?}", request.prompt);
    assert_eq!((request.pieces.len(), request.pieces[0].start), (1, request.prompt.len() - 10));
}

/// Token ids stand as they are, a conversation as the tokens it has; a BOS stands at the beginning of a prompt alone.
#[test]
fn token_ids_and_messages_are_linked_as_the_tokens_they_have() {
    let setup = Setup::new();
    let post = |body: Value| setup.ok("POST", "/v1/memcubes", Some(body));
    post(json!({ "name": "ana/ids", "token_ids": [BOS, 5, 6, 7] }));
    post(json!({ "name": "ana/more", "token_ids": [8, 9] }));
    setup.create("ana/text", "Tea.");
    let talk = |content: &str| json!([{ "role": "user", "content": content }]);
    post(json!({ "name": "ana/talk", "messages": talk("Who?") }));
    post(json!({ "name": "ana/other", "messages": talk("Why?") }));
    let ask = |path: &str, body: Value| {
        setup.ok("POST", path, Some(body));
        let request = setup.server.requests.recv().unwrap();
        let pieces: Vec<_> =
            request.pieces.iter().map(|piece| (piece.start, piece.num_tokens, piece.source_start)).collect();
        (request.prompt, pieces, request.pieces)
    };
    let memory = |cubes: Value| json!({ "memory": { "cubes": cubes, "compose": "link" } });
    let body = completion_body(memory(json!(["ana/more", "ana/ids", "ana/text"])));
    let (prompt, places, pieces) = ask("/v1/completions", body);
    assert_eq!(prompt, [vec![8, 9, 5, 6, 7], tokens("Tea.hi")].concat());
    assert_eq!(places, [(0, 2, 0), (2, 3, 1), (5, 4, chat_tokens("").len())]);
    assert_eq!(pieces[1].source, [BOS, 5, 6, 7]);
    let (prompt, places, _) = ask("/v1/chat/completions", chat_body(memory(json!(["ana/ids", "ana/more"]))));
    let chat = [vec![BOS], tokens("user:hi"), vec![BOS + 1, BOS], tokens("assistant:")].concat();
    assert_eq!((prompt, places), ([vec![BOS, 5, 6, 7, 8, 9], chat.clone()].concat(), vec![(0, 4, 0), (4, 2, 0)]));
    let (prompt, places, _) = ask("/v1/chat/completions", chat_body(memory(json!(["ana/talk", "ana/other"]))));
    let message = |text: &str| [tokens(&format!("user:{text}")), vec![BOS + 1]].concat();
    // The second conversation's first token is a BOS in this vocabulary.
    let wanted = [vec![BOS], message("Who?"), message("Why?"), chat].concat();
    assert_eq!((prompt, places), (wanted, vec![(0, 11, 0), (11, 10, 1)]));
}

/// How much of each cube is computed is the cube's, else the call's, else what is usual.
#[test]
fn blended_cubes_are_pieces_with_chosen_tokens() {
    let setup = Setup::new();
    setup.create("ana/a", "Tea and rain.");
    let cubes = json!([
        "ana/a",
        { "name": "ana/a", "recompute_share": 1 },
        { "name": "ana/a", "mode": "link" },
        { "name": "ana/a", "recompute_share": 0 }
    ]);
    let ask = |memory: Value| {
        let answer = setup.ok("POST", "/v1/chat/completions", Some(chat_body(json!({ "memory": memory }))));
        let pieces = setup.server.requests.recv().unwrap().pieces;
        let amounts: Vec<_> = pieces.iter().map(|piece| (piece.num_recomputed, piece.num_chosen)).collect();
        (amounts, answer["memory"].clone())
    };
    // A token a byte: 13.
    let (amounts, used) = ask(json!({ "cubes": cubes, "compose": "blend", "recompute_share": 0.5 }));
    assert_eq!(amounts, [(16, 7), (16, 13), (16, 0), (16, 0)]);
    let modes: Vec<&Value> = used["cubes"].as_array().unwrap().iter().map(|cube| &cube["mode"]).collect();
    assert_eq!(modes, ["blend", "blend", "link", "blend"]);
    assert_eq!((&used["exact"], &used["chosen_tokens"]), (&json!(false), &json!(0)), "this engine moves nothing");
    let (amounts, _) = ask(json!({ "cubes": ["ana/a"], "compose": "blend", "recompute_tokens": 0 }));
    assert_eq!(amounts, [(0, 2)]);
}

#[test]
fn what_cannot_be_linked_is_refused() {
    let setup = Setup::new();
    setup.create("ana/a", "Tea.");
    let messages = json!([{ "role": "user", "content": "Who?" }]);
    setup.ok("POST", "/v1/memcubes", Some(json!({ "name": "ana/talk", "messages": messages })));
    let bare = json!({ "name": "ana/bare", "messages": messages, "kind": "plaintext" });
    setup.ok("POST", "/v1/memcubes", Some(bare));
    setup.ok("POST", "/v1/memcubes", Some(json!({ "name": "ana/ids", "token_ids": [1, 2, 3] })));
    for (param, status, memory) in [
        ("memory.recompute_share", 400, json!({ "cubes": ["ana/a"], "compose": "blend", "recompute_share": 1.5 })),
        ("memory.recompute_share", 400, json!({ "cubes": [{ "name": "ana/a", "recompute_share": -0.1 }] })),
        ("memory", 400, json!({ "cubes": ["ana/bare"], "compose": "blend" })),
        ("memory", 400, json!({ "cubes": ["ana/a", "ana/ids"], "compose": "link" })),
        ("memory", 400, json!({ "cubes": ["ana/a", "ana/talk"], "compose": "link" })),
        ("memory", 400, json!({ "cubes": ["ana/a", { "name": "ana/a", "mode": "prefix" }], "compose": "link" })),
        ("memory.recompute_tokens", 400, json!({ "cubes": ["ana/a"], "compose": "link", "recompute_tokens": 5000 })),
    ] {
        let body = chat_body(json!({ "memory": memory }));
        let (found, error) = setup.refused("POST", "/v1/chat/completions", Some(body));
        assert_eq!((found, error["param"].as_str()), (status, Some(param)), "{memory}: {error}");
    }
    let memory = json!({ "cubes": ["ana/a"], "compose": "link" });
    let body = completion_body(json!({ "memory": memory, "prompt_logprobs": 1 }));
    assert_eq!(setup.refused("POST", "/v1/completions", Some(body)).0, 400);
    let memory = |cube: &str| json!({ "memory": { "cubes": [cube], "compose": "link" } });
    assert_eq!(setup.refused("POST", "/v1/completions", Some(completion_body(memory("ana/talk")))).0, 400);
    setup.cubes.has_other_vocabulary.store(true, Ordering::SeqCst);
    let (status, error) = setup.refused("POST", "/v1/completions", Some(completion_body(memory("ana/ids"))));
    assert_eq!((status, error["param"].as_str()), (409, Some("memory.cubes")), "{error}");
    assert!(setup.server.requests.try_recv().is_err());
}

#[test]
fn a_server_without_cubes_says_so() {
    let server = TestServer::start(Script::say("a"));
    for path in ["/v1/memcubes", "/v1/memcubes/ana/a", "/v1/memcubes/events"] {
        let reply = server.get(path);
        assert_eq!((reply.status, &reply.json()["error"]["type"]), (501, &json!("NotImplementedError")), "{path}");
    }
    assert_eq!(server.post("/v1/memcubes", &json!({ "name": "ana/a", "text": "x" })).status, 501);
}

#[test]
fn one_key_learns_nothing_of_anothers_cubes() {
    let setup = Setup::with_keys();
    let ana = |method: &str, path: &str, body: Option<Value>| setup.send(method, path, "ana", body);
    let bert = |method: &str, path: &str, body: Option<Value>| setup.send(method, path, "bert", body);
    let reply = ana("POST", "/v1/memcubes", Some(json!({ "name": "ana/secret", "text": "The code is 4711." })));
    assert_eq!(reply.status, 201, "{}", reply.text());
    assert_eq!(setup.cubes.prefills()[0].domain, "ana", "with keys every namespace is a domain");
    let name = json!({ "name": "bert/copy" });
    for (method, action, body) in [
        ("GET", "", None),
        ("GET", "@1", None),
        ("GET", "?include=payload", None),
        ("GET", "/lineage", None),
        ("PATCH", "", Some(json!({ "tags": [] }))),
        ("PATCH", "", Some(json!({ "acl": { "visibility": "public" } }))),
        ("DELETE", "", None),
        ("POST", "/append", Some(json!({ "text": "x" }))),
        ("POST", "/fork", Some(name.clone())),
        ("POST", "/rename", Some(name.clone())),
        ("POST", "/freeze", None),
        ("POST", "/unfreeze", None),
        ("POST", "/pin", None),
        ("POST", "/unpin", None),
        ("POST", "/verify", None),
    ] {
        let hidden = bert(method, &format!("/v1/memcubes/ana/secret{action}"), body.clone());
        let missing = bert(method, &format!("/v1/memcubes/ana/nothing{action}"), body);
        assert_eq!(hidden.status, 404, "{method} {action}");
        assert_eq!(hidden.text().replace("secret", "nothing"), missing.text(), "{method} {action}");
    }
    let taken = |name: &str| bert("POST", "/v1/memcubes", Some(json!({ "name": name, "text": "x" })));
    assert_eq!(taken("ana/secret").status, 403);
    assert_eq!(taken("ana/secret").text(), taken("ana/nothing").text());
    assert_eq!(bert("GET", "/v1/memcubes?q=4711", None).json()["data"], json!([]));
    assert_eq!(bert("GET", "/v1/memcubes/events", None).text().lines().count(), 1);
    assert_eq!(setup.send("GET", "/v1/memcubes", "wrong", None).status, 401);

    let principal = bert("GET", "/v1/memcubes", None).json()["principal"].as_str().unwrap().to_owned();
    let shared = json!({ "acl": { "visibility": "shared", "read": [principal] } });
    assert_eq!(ana("PATCH", "/v1/memcubes/ana/secret", Some(shared)).status, 200);
    let seen = bert("GET", "/v1/memcubes/ana/secret", None).json();
    assert_eq!(seen["acl"], json!({ "visibility": "shared" }), "who else may read is not for readers");
    let denied = bert("DELETE", "/v1/memcubes/ana/secret", None);
    assert_eq!((denied.status, &denied.json()["error"]["type"]), (403, &json!("PermissionDeniedError")));
    assert_eq!(bert("POST", "/v1/memcubes/ana/secret/fork", Some(name)).status, 201);
}

#[test]
fn cubes_outlive_the_server() {
    let folder = tempfile::tempdir().unwrap();
    let cubes = Arc::new(FakeCubes::default());
    let (service, vault) = cubes.service_in(folder.path());
    let setup = Setup { server: TestServer::with_cubes(ServerConfig::default(), service), cubes: Arc::clone(&cubes) };
    let made = setup.create("ana/notes", "Ana likes tea and cycling.");
    setup.create("ana/gone", "x");
    setup.ok("DELETE", "/v1/memcubes/ana/gone", None);
    setup.server.thread.shutdown();
    let Setup { server, .. } = setup;
    server.thread.join().unwrap();
    drop(vault);
    let (service, _vault) = cubes.service_in(folder.path());
    let setup = Setup { server: TestServer::with_cubes(ServerConfig::default(), service), cubes };
    let found = setup.get("ana/notes");
    assert_eq!((&found["id"], &found["state"]), (&made["id"], &json!("archived")));
    assert_eq!(setup.refused("GET", "/v1/memcubes/ana/gone", None).0, 404);
    assert_eq!(setup.create("ana/other", "Ana likes tea and cycling.")["computed_tokens"], 0);
    setup.ok("DELETE", "/v1/memcubes/ana/other", None);
    setup.ok("DELETE", "/v1/memcubes/ana/notes", None);
    assert_eq!(
        setup.create("ana/notes", "Ana likes tea and cycling.")["restored_tokens"],
        0,
        "the last one releases them"
    );
}

/// What `mneme cube` printed, and whether it went well.
fn command(setup: &Setup, arguments: &[&str]) -> (bool, String) {
    let url = format!("http://{}/v1", setup.server.address());
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_mneme"))
        .args(["cube", "--url", &url, "--api-key", "ana"])
        .args(arguments)
        .output()
        .expect("the program runs");
    let printed = if output.status.success() { output.stdout } else { output.stderr };
    (output.status.success(), String::from_utf8(printed).expect("output is UTF-8"))
}

#[test]
fn the_command_line_does_the_same() {
    let setup = Setup::with_keys();
    for (arguments, wanted) in [
        ("create ana/a --text Tea --tag x", "ana/a@1\trestored 0, computed 11 tokens\n"),
        ("append ana/a --text Time", "ana/a@2\trestored 0, computed 15 tokens\n"),
        ("fork ana/a@1 ana/b", "ana/b@1\tpriority 5\n"),
        ("pin ana/b", "ana/b@1\tpriority pinned\n"),
        ("unpin ana/b", "ana/b@1\tpriority 5\n"),
        ("rename ana/b ana/c", "ana/c@1\tpriority 5\n"),
        ("verify ana/a", "ana/a@2\t1 blocks whole, 0 missing, 0 damaged\n"),
        (
            "list --namespace ana --tag x",
            "ana/a\t2\tactivation\tgenerated\t15\t1500\nana/c\t1\tactivation\tgenerated\t11\t1100\n",
        ),
        ("delete ana/c", "ana/c\tdeleted\n"),
    ] {
        let arguments: Vec<&str> = arguments.split(' ').collect();
        assert_eq!(command(&setup, &arguments), (true, wanted.to_owned()), "{arguments:?}");
    }
    let (_, shown) = command(&setup, &["show", "ana/a", "--payload"]);
    assert!(shown.contains("text\tTeaTime\n") && shown.contains("version\t2\n"), "{shown}");
    let (_, json) = command(&setup, &["--json", "show", "ana/a@1"]);
    assert_eq!(serde_json::from_str::<Value>(&json).unwrap()["version"], 1);
    let (succeeded, error) = command(&setup, &["show", "ana/c"]);
    assert!(!succeeded && error.contains("There is no cube `ana/c`."), "{error}");
}

#[test]
fn the_openapi_document_has_the_routes_of_cubes() {
    let setup = Setup::new();
    let document = setup.ok("GET", "/openapi.json", None);
    for (path, method) in [
        ("/v1/memcubes", "post"),
        ("/v1/memcubes", "get"),
        ("/v1/memcubes/events", "get"),
        ("/v1/memcubes/{name}", "get"),
        ("/v1/memcubes/{name}", "patch"),
        ("/v1/memcubes/{name}", "delete"),
        ("/v1/memcubes/{name}/lineage", "get"),
        ("/v1/memcubes/{name}/{action}", "post"),
    ] {
        assert!(document["paths"][path][method].is_object(), "{method} {path}");
    }
}
