//! `memory.save`: prompt and answer as a cube, and answers that stay whatever becomes of that.

use std::sync::atomic::Ordering;

use mneme::engine::SharedPrefix;
use mneme::server::BlockSource;
use serde_json::{Value, json};

use crate::client::{self, Reply};
use crate::cubes::{Setup, chat_tokens, tokens};
use crate::fake_cubes::Prefill;
use crate::{chat_body, completion_body};

const SAVE: &str = "ana/session";

fn complete(setup: &Setup, fields: Value) -> Value {
    setup.ok("POST", "/v1/completions", Some(completion_body(fields)))
}

fn source(shared_prefix: Option<SharedPrefix>) -> Option<BlockSource> {
    Some(BlockSource { domain: "public".into(), shared_prefix })
}

#[test]
fn prompt_and_answer_become_a_cube_and_then_its_next_version() {
    let setup = Setup::new();
    let memory = json!({ "save": { "name": SAVE } });
    let answer = complete(&setup, json!({ "memory": memory }));
    assert_eq!(answer["choices"][0]["text"], "a");
    let token_ids = tokens("hia");
    let wanted = Prefill { token_ids: token_ids.clone(), domain: "public".into(), durable: true, source: source(None) };
    assert_eq!(setup.cubes.prefills(), [wanted]);
    let saved = &answer["memory"]["saved"];
    for (field, value) in [
        ("name", json!(SAVE)),
        ("version", json!(1)),
        ("num_tokens", json!(3)),
        ("restored_tokens", json!(0)),
        ("computed_tokens", json!(3)),
    ] {
        assert_eq!(saved[field], value, "{field}");
    }
    assert!(saved.get("error").is_none(), "{saved}");
    assert_eq!((&answer["memory"]["cubes"], &answer["memory"]["exact"]), (&json!([]), &json!(true)));
    let cube = setup.get(&format!("{SAVE}?include=payload"));
    assert_eq!((&cube["origin"], &cube["token_ids"]), (&json!("inference"), &json!(token_ids)));
    assert_eq!(cube["binding"]["form"], "prefix");
    let again = complete(&setup, json!({ "prompt": "ho", "memory": memory }));
    assert_eq!(again["memory"]["saved"]["version"], 2);
    assert_eq!(setup.get(&format!("{SAVE}?include=payload"))["token_ids"], json!(tokens("hoa")));
    assert_eq!(setup.get(&format!("{SAVE}@1?include=payload"))["token_ids"], json!(token_ids));
}

/// A conversation goes on behind what was saved, token by token as it was.
#[test]
fn a_saved_answer_is_the_beginning_of_the_next_prompt() {
    let setup = Setup::new();
    let id = setup.create("ana/notes", "Tea.")["id"].clone();
    let body = json!({ "memory": { "cubes": ["ana/notes"], "save": { "name": SAVE, "durable": false } } });
    let answer = setup.ok("POST", "/v1/chat/completions", Some(chat_body(body)));
    let prefill = setup.cubes.prefills().remove(1);
    let num_tokens = chat_tokens("Tea.").len();
    assert_eq!(prefill.source, source(Some(SharedPrefix { num_tokens, domain: "public".into() })));
    assert!(!prefill.durable && prefill.token_ids.starts_with(&chat_tokens("Tea.")));
    assert_eq!(answer["memory"]["cubes"][0]["name"], "ana/notes");
    assert_eq!(answer["memory"]["saved"]["num_tokens"], prefill.token_ids.len());
    assert_eq!(setup.get(SAVE)["parents"], json!([id]));
    let render = completion_body(json!({ "prompt": "!", "memory": { "cubes": [SAVE] } }));
    let rendered = setup.ok("POST", "/v1/completions/render", Some(render));
    assert_eq!(rendered[0]["token_ids"], json!([prefill.token_ids, tokens("!")].concat()));
}

#[test]
fn a_stream_tells_in_its_last_chunk() {
    let setup = Setup::new();
    for (path, body) in
        [("/v1/completions", completion_body(json!({}))), ("/v1/chat/completions", chat_body(json!({})))]
    {
        for options in [json!(null), json!({ "include_usage": true })] {
            let mut body = body.clone();
            body["stream"] = json!(true);
            body["stream_options"] = options.clone();
            body["memory"] = json!({ "save": { "name": SAVE } });
            let reply = setup.server.send(&client::post(path, body.to_string().as_bytes(), ""));
            let events = reply.events();
            let (last, others) = events.split_last().unwrap();
            assert!(last["memory"]["saved"]["version"].is_u64(), "{path}: {last}");
            assert_eq!((&last["choices"], last["usage"].is_object()), (&json!([]), options.is_object()));
            assert!(others.iter().all(|event| event.get("memory").is_none()));
        }
    }
    assert_eq!(setup.get(SAVE)["version"], 4);
}

#[test]
fn a_save_that_fails_does_not_lose_the_answer() {
    let setup = Setup::new();
    setup.cubes.is_loading.store(true, Ordering::SeqCst);
    let answer = complete(&setup, json!({ "memory": { "save": { "name": SAVE } } }));
    assert_eq!(answer["choices"][0]["text"], "a");
    let saved = &answer["memory"]["saved"];
    assert_eq!((&saved["version"], &saved["num_tokens"]), (&Value::Null, &json!(3)));
    assert!(saved["error"]["message"].as_str().unwrap().contains("weights"), "{saved}");
    assert_eq!(setup.send("GET", &format!("/v1/memcubes/{SAVE}"), "", None).status, 404);
}

#[test]
fn what_cannot_be_saved_is_refused_before_it_runs() {
    let setup = Setup::new();
    setup.create("ana/text", "Tea.");
    setup.create("ana/frozen", "Tea.");
    setup.ok("POST", "/v1/memcubes/ana/frozen/freeze", None);
    setup.ok("POST", "/v1/memcubes", Some(json!({ "name": "ana/plain", "text": "Tea.", "kind": "plaintext" })));
    let named = |name: &str| json!({ "memory": { "save": { "name": name } } });
    let linked = json!({ "cubes": ["ana/text"], "compose": "link", "save": { "name": SAVE } });
    for (fields, status) in [
        (named("no-namespace"), 400),
        (named("ana/session@3"), 400),
        (named("ana/frozen"), 409),
        (named("ana/plain"), 409),
        (json!({ "n": 2, "memory": { "save": { "name": SAVE } } }), 400),
        (json!({ "prompt": ["a", "b"], "memory": { "save": { "name": SAVE } } }), 400),
        (json!({ "memory": linked }), 400),
    ] {
        let (found, error) = setup.refused("POST", "/v1/completions", Some(completion_body(fields.clone())));
        assert_eq!((found, &error["param"]), (status, &json!("memory.save")), "{fields}: {error}");
    }
    assert!(setup.server.requests.is_empty(), "nothing ran");
}

#[test]
fn nobody_saves_into_the_cubes_of_others() {
    let setup = Setup::with_keys();
    let save = |key: &str| -> Reply {
        let body = completion_body(json!({ "memory": { "save": { "name": SAVE } } }));
        setup.send("POST", "/v1/completions", key, Some(body))
    };
    assert_eq!(save("ana").status, 200);
    let prefill = setup.cubes.prefills().remove(0);
    assert_eq!(prefill.domain, "ana", "what is kept belongs to the namespace");
    assert!(prefill.source.unwrap().domain.starts_with("key/"), "what is found to who asks");
    let refused = save("bert");
    assert_eq!((refused.status, refused.json()["error"]["param"].as_str()), (403, Some("memory.save")));
}
