//! `/v1/embeddings`, `/v1/models` and the routes about the server itself.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use mneme::telemetry::Degradation;
use serde_json::{Value, json};

use crate::TestServer;
use crate::client::post;
use crate::fake_engine::{HIDDEN_SIZE, MAX_MODEL_LEN, Script};

/// 1, 2, .. num, scaled to length 1.
fn unit_vector(num: usize) -> Vec<f32> {
    let norm = (1..=num).map(|x| (x * x) as f64).sum::<f64>().sqrt();
    (1..=num).map(|x| (x as f64 / norm) as f32).collect()
}

fn floats(vector: &Value) -> Vec<f32> {
    vector.as_array().expect("a list").iter().map(|x| x.as_f64().expect("a number") as f32).collect()
}

#[test]
fn vectors_have_length_one() {
    let server = TestServer::start(Script::Echo);
    let reply = server.post_ok("/v1/embeddings", &json!({ "model": "tiny", "input": ["ab", "c"] }));
    assert_eq!(reply["object"], "list");
    assert_eq!(reply["data"].as_array().unwrap().len(), 2);
    assert_eq!(reply["data"][1]["index"], 1);
    assert_eq!(reply["data"][1]["object"], "embedding");
    assert_eq!(floats(&reply["data"][0]["embedding"]), unit_vector(HIDDEN_SIZE));
    assert_eq!(reply["usage"], json!({ "prompt_tokens": 3, "total_tokens": 3 }));
}

#[test]
fn base64_holds_the_same_floats() {
    let server = TestServer::start(Script::Echo);
    let body = json!({ "model": "tiny", "input": [[97], [98]], "encoding_format": "base64", "dimensions": 3 });
    let reply = server.post_ok("/v1/embeddings", &body);
    let bytes = BASE64_STANDARD.decode(reply["data"][0]["embedding"].as_str().unwrap()).unwrap();
    let vector: Vec<f32> = bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    assert_eq!(vector, unit_vector(3));
}

#[test]
fn bad_embeddings_are_refused() {
    let server = TestServer::start(Script::Echo);
    for (fields, param) in [
        (json!({ "input": "a", "dimensions": 0 }), "dimensions"),
        (json!({ "input": "a", "dimensions": HIDDEN_SIZE + 1 }), "dimensions"),
        (json!({ "input": "a", "encoding_format": "hex" }), "encoding_format"),
        (json!({ "input": "" }), "input"),
        (json!({ "input": [] }), "input"),
        (json!({ "input": [[]] }), "input"),
        (json!({ "input": null }), "input"),
        (json!({}), "input"),
    ] {
        let reply = server.post("/v1/embeddings", &fields);
        assert_eq!(reply.status, 400, "{fields}");
        assert_eq!(reply.json()["error"]["param"], param, "{fields}");
    }
}

#[test]
fn models_are_listed_and_described() {
    let server = TestServer::start(Script::Echo);
    let list = server.get("/v1/models").json();
    assert_eq!(list["object"], "list");
    let card = &list["data"][1];
    assert_eq!(card["id"], "org/tiny");
    assert_eq!(card["object"], "model");
    assert_eq!(card["owned_by"], "mneme");
    assert_eq!(card["max_model_len"], MAX_MODEL_LEN);
    for path in ["/v1/models/org/tiny", "/v1/models/org%2Ftiny"] {
        assert_eq!(server.get(path).json(), *card);
    }
    assert_eq!(server.get("/v1/models/other").status, 404);
}

#[test]
fn the_server_tells_about_itself() {
    let server = TestServer::start(Script::Echo);
    for path in ["/health", "/ping"] {
        let reply = server.get(path);
        assert_eq!((reply.status, reply.json()), (200, json!({ "status": "ok" })), "{path}");
    }
    server.engine.degradations().report(Degradation::KvPool, "half of it");
    server.engine.degradations().report(Degradation::Gpu, "none");
    let degraded = json!({ "status": "degraded", "degraded": ["gpu: none", "kv_pool: half of it"] });
    for reply in [server.get("/health"), server.get("/ping"), server.send(&post("/ping", b"", ""))] {
        assert_eq!((reply.status, reply.json()), (200, degraded.clone()));
    }
    server.engine.degradations().clear(Degradation::Gpu);
    assert_eq!(server.get("/health").json()["degraded"], json!(["kv_pool: half of it"]));
    assert_eq!(server.get("/version").json()["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(server.get("/load").json(), json!({ "server_load": 0 }));
    let metrics = server.get("/metrics");
    assert!(metrics.header("content-type").unwrap().starts_with("application/openmetrics-text"));
    assert!(metrics.text().contains("vllm:num_requests_running{model_name=\"tiny\",engine=\"0\"} 0"));
}

#[test]
fn the_openapi_document_describes_the_fields() {
    let server = TestServer::start(Script::Echo);
    let document = server.get("/openapi.json").json();
    for path in ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models/{id}", "/tokenize"] {
        assert!(document["paths"].get(path).is_some(), "{path}");
    }
    let schemas = &document["components"]["schemas"];
    assert!(schemas["SamplingRequest"]["properties"]["temperature"].is_object());
    let text = document.to_string();
    let references = text.split("#/components/schemas/").skip(1).map(|rest| rest.split('"').next().unwrap());
    for name in references {
        assert!(schemas.get(name).is_some(), "{name} is referred to but not described");
    }
}
