//! Cubes as files over HTTP: out of one server, into another, and what is refused on the way.

use std::sync::atomic::Ordering;

use mneme::server::{RequestLimits, ServerConfig};
use serde_json::{Value, json};

use crate::client::Reply;
use crate::cubes::{Setup, chat_tokens};

const TEXT: &str = "Ana likes tea and cycling.";

fn export(setup: &Setup, name: &str) -> Vec<u8> {
    let reply = setup.send("POST", &format!("/v1/memcubes/{name}/export"), "", None);
    assert_eq!((reply.status, reply.header("content-type")), (200, Some("application/octet-stream")));
    let length = reply.header("content-length").and_then(|length| length.parse::<usize>().ok());
    assert_eq!(length, Some(reply.body.len()));
    reply.body
}

fn import(setup: &Setup, query: &str, key: &str, file: &[u8]) -> Reply {
    let head = format!(
        "POST /v1/memcubes/import{query} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n\
         Content-Type: application/octet-stream\r\nContent-Length: {}\r\n\r\n",
        file.len()
    );
    setup.server.send(&[head.as_bytes(), file].concat())
}

fn refused(reply: &Reply) -> (u16, String) {
    (reply.status, reply.json()["error"]["message"].as_str().expect("a message").to_owned())
}

#[test]
fn a_cube_goes_from_one_server_to_another() {
    let setup = Setup::new();
    setup.create("ana/notes", TEXT);
    setup.ok("PATCH", "/v1/memcubes/ana/notes", Some(json!({ "tags": ["tea"], "semantic_type": "fact", "ttl_s": 9 })));
    let file = export(&setup, "ana/notes");
    let other = Setup::new();
    let made = import(&other, "", "", &file);
    assert_eq!(made.status, 201, "{}", made.text());
    let made = made.json();
    let num_tokens = chat_tokens(TEXT).len();
    for (field, value) in [
        ("name", json!("ana/notes")),
        ("version", json!(1)),
        ("origin", json!("import")),
        ("tags", json!(["tea"])),
        ("semantic_type", json!("fact")),
        ("ttl_s", Value::Null),
        ("restored_tokens", json!(num_tokens)),
        ("computed_tokens", json!(0)),
    ] {
        assert_eq!(made[field], value, "{field}");
    }
    assert!(other.cubes.prefills().is_empty(), "nothing was computed");
    let shown = |setup: &Setup, name: &str| setup.get(&format!("{name}?include=payload"));
    let (here, there) = (shown(&setup, "ana/notes"), shown(&other, "ana/notes"));
    assert_eq!((&there["text"], &there["token_ids"]), (&here["text"], &here["token_ids"]));
    assert!(there["binding"]["domain"].as_str().unwrap().starts_with("import/"));
    let verified = other.ok("POST", "/v1/memcubes/ana/notes/verify", None);
    assert_eq!((&verified["whole"], &verified["missing"]), (&json!(num_tokens.div_ceil(16)), &json!(0)));
    // Under another name as well, and out again.
    assert_eq!(import(&other, "?name=ana/copy", "", &export(&other, "ana/notes")).status, 201);
}

#[test]
fn a_text_travels_alone() {
    let setup = Setup::new();
    setup.ok("POST", "/v1/memcubes", Some(json!({ "name": "ana/plain", "text": TEXT, "kind": "plaintext" })));
    let file = export(&setup, "ana/plain");
    let made = import(&setup, "?name=ana/again", "", &file).json();
    assert_eq!((&made["kind"], &made["restored_tokens"]), (&json!("plaintext"), &json!(0)));
    assert_eq!(setup.get("ana/again?include=payload")["text"], TEXT);
}

#[test]
fn another_models_blocks_are_refused_or_computed_anew() {
    let setup = Setup::new();
    setup.create("ana/notes", TEXT);
    setup.ok("POST", "/v1/memcubes", Some(json!({ "name": "ana/ids", "token_ids": [1, 2, 3] })));
    let (file, ids) = (export(&setup, "ana/notes"), export(&setup, "ana/ids"));
    let other = Setup::new();
    other.cubes.has_other_weights.store(true, Ordering::SeqCst);
    let reply = import(&other, "", "", &file);
    let (status, message) = refused(&reply);
    assert_eq!((status, &reply.json()["error"]["code"]), (409, &json!("other_model")));
    assert!(message.contains("another model") && message.contains("rebuild=true"), "{message}");
    let made = import(&other, "?rebuild=true", "", &file).json();
    assert_eq!((&made["restored_tokens"], &made["computed_tokens"]), (&json!(0), &json!(chat_tokens(TEXT).len())));
    assert_eq!(other.get("ana/notes")["binding"]["domain"], "public");
    // The vocabulary is the same, so tokens without a text will do.
    let made = import(&other, "?rebuild=true", "", &ids).json();
    assert_eq!(made["computed_tokens"], 3, "{made}");
    other.cubes.has_other_vocabulary.store(true, Ordering::SeqCst);
    let (status, message) = refused(&import(&other, "?rebuild=true&name=ana/x", "", &ids));
    assert!(status == 409 && message.contains("no text"), "{message}");
    assert_eq!(import(&other, "?rebuild=true&name=ana/y", "", &file).status, 201, "a text is tokenized anew");
}

#[test]
fn what_is_no_cubes_file_is_refused() {
    let setup = Setup::new();
    setup.create("ana/notes", TEXT);
    let file = export(&setup, "ana/notes");
    let mut flipped = file.clone();
    *flipped.last_mut().unwrap() ^= 1;
    let huge = [&u64::MAX.to_le_bytes()[..], b"{}"].concat();
    let longer = [&file[..], b"x"].concat();
    for damaged in [&b""[..], b"{}", &huge, &file[..file.len() - 1], &file[..20], &flipped, &longer] {
        let (status, message) = refused(&import(&setup, "?name=ana/new", "", damaged));
        assert!(status == 400 && message.contains("cannot be imported"), "{status} {message}");
    }
    assert_eq!(setup.send("GET", "/v1/memcubes/ana/new", "", None).status, 404);
    let taken = refused(&import(&setup, "", "", &file));
    assert!(taken.0 == 409 && taken.1.contains("already"), "{}", taken.1);
    assert_eq!(import(&setup, "?name=nonsense", "", &file).json()["error"]["param"], "name");
}

#[test]
fn a_file_is_bounded() {
    let setup = Setup::new();
    setup.create("ana/notes", TEXT);
    let file = export(&setup, "ana/notes");
    let request_limits = RequestLimits { max_import_bytes: file.len() as u64 - 1, ..RequestLimits::default() };
    let small = Setup::with_config(ServerConfig { request_limits, ..ServerConfig::default() });
    assert_eq!(import(&small, "", "", &file).status, 413);
    assert_eq!(small.send("GET", "/v1/memcubes/ana/notes", "", None).status, 404);
}

#[test]
fn blocks_that_are_gone_are_not_exported() {
    let setup = Setup::new();
    setup.cubes.has_no_disk.store(true, Ordering::SeqCst);
    setup.create("ana/notes", TEXT);
    let (status, error) = setup.refused("POST", "/v1/memcubes/ana/notes/export", None);
    assert!(status == 409 && error["message"].as_str().unwrap().contains("not on disk"), "{error}");
}

#[test]
fn a_cube_that_is_to_be_erased_leaves_nothing_on_disk() {
    let setup = Setup::new();
    setup.create("ana/notes", TEXT);
    setup.create("ana/other", "Something else that is longer than a block.");
    setup.ok("PATCH", "/v1/memcubes/ana/notes", Some(json!({ "erase_on_free": true })));
    let num_blocks = setup.cubes.store.hashes().len();
    let deleted = setup.ok("DELETE", "/v1/memcubes/ana/notes", None);
    assert!(deleted["reason"].as_str().unwrap().contains("overwritten"), "{deleted}");
    assert_eq!(setup.cubes.store.hashes().len(), num_blocks - chat_tokens(TEXT).len().div_ceil(16));
    assert_eq!(setup.ok("POST", "/v1/memcubes/ana/other/verify", None)["missing"], 0);
}

#[test]
fn nobody_exports_the_cubes_of_others_or_imports_into_their_names() {
    let setup = Setup::with_keys();
    let body = json!({ "name": "ana/notes", "text": TEXT });
    assert_eq!(setup.send("POST", "/v1/memcubes", "ana", Some(body)).status, 201);
    let export = |key: &str| setup.send("POST", "/v1/memcubes/ana/notes/export", key, None);
    assert_eq!(export("bert").status, 404);
    let file = export("ana").body;
    assert_eq!(import(&setup, "?name=ana/mine", "bert", &file).status, 403);
    let made = import(&setup, "?name=bert/mine", "bert", &file).json();
    let again = import(&setup, "?name=ana/again", "ana", &file).json();
    assert_ne!(made["binding"]["domain"], again["binding"]["domain"], "neither learns of the other's import");
}
