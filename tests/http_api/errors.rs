//! What is refused, and how the client learns why.

use mneme::server::{RequestLimits, ServerConfig};
use serde_json::{Value, json};

use crate::client::{Reply, get, post};
use crate::fake_engine::{MAX_MODEL_LEN, Script, VOCAB_SIZE};
use crate::{TestServer, chat_body, completion_body};

fn assert_refused(reply: &Reply, param: &str, case: &Value) {
    assert_eq!(reply.status, 400, "{case}: {}", reply.text());
    let error = &reply.json()["error"];
    assert_eq!(error["type"], "BadRequestError", "{case}");
    assert_eq!(error["param"], param, "{case}: {error}");
    let message = error["message"].as_str().expect("a message");
    let field = param.split(['[', '.']).next().expect("a name");
    assert!(message.contains(field) || message.contains("grammar"), "{case}: {error}");
    assert!(error.get("code").is_some());
}

#[test]
fn bad_fields_of_both_endpoints_are_named() {
    let server = TestServer::start(Script::say("a"));
    let many: Vec<_> = (0..20).map(|i| format!("stop{i}")).collect();
    let bias: serde_json::Map<_, _> = (0..2000).map(|i| (i.to_string(), json!(1))).collect();
    for (field, value) in [
        ("model", json!(7)),
        ("temperature", json!(-0.1)),
        ("temperature", json!(2.1)),
        ("temperature", json!("warm")),
        ("temperature", json!(1e300)),
        ("top_p", json!(1.5)),
        ("top_p", json!(-1)),
        ("top_k", json!(-2)),
        ("top_k", json!(1.5)),
        ("min_p", json!(2)),
        ("typical_p", json!(0)),
        ("repetition_penalty", json!(0)),
        ("frequency_penalty", json!(3)),
        ("presence_penalty", json!(-3)),
        ("logit_bias", json!({ "x": 1 })),
        ("logit_bias", json!({ "97": 101 })),
        ("logit_bias", json!({ VOCAB_SIZE.to_string(): 1 })),
        ("logit_bias", bias.into()),
        ("logit_bias", json!([1])),
        ("seed", json!(1.5)),
        ("n", json!(0)),
        ("n", json!(129)),
        ("n", json!(-1)),
        ("stop", json!(7)),
        ("stop", json!("")),
        ("stop", json!(["a", ""])),
        ("stop", json!(many)),
        ("stop", json!("x".repeat(1001))),
        ("stop_token_ids", json!([VOCAB_SIZE])),
        ("min_tokens", json!(-1)),
        ("min_tokens", json!(u64::MAX)),
        ("ignore_eos", json!("yes")),
        ("prompt_logprobs", json!(21)),
        ("prompt_logprobs", json!(-2)),
        ("allowed_token_ids", json!([])),
        ("allowed_token_ids", json!([VOCAB_SIZE])),
        ("bad_words", json!([" "])),
        ("max_tokens", json!(-1)),
        ("max_tokens", json!("1")),
        ("stream", json!("true")),
        ("stream_options", json!({ "include_usage": true })),
        ("priority", json!("high")),
        ("cache_salt", json!("")),
        ("request_id", json!("a b")),
        ("truncate_prompt_tokens", json!(0)),
        ("truncate_prompt_tokens", json!(MAX_MODEL_LEN)),
        ("structured_outputs", json!({})),
        ("structured_outputs", json!({ "regex": "a", "choice": ["b"] })),
        ("structured_outputs", json!({ "regex": "(" })),
    ] {
        let case = json!({ field: value });
        assert_refused(&server.chat(case.clone()), field, &case);
        assert_refused(&server.complete(case.clone()), field, &case);
    }
    assert!(server.requests.is_empty(), "nothing reached the engine");
}

#[test]
fn bad_fields_of_completions_are_named() {
    let server = TestServer::start(Script::say("a"));
    for (field, value) in [
        ("prompt", json!(null)),
        ("prompt", json!("")),
        ("prompt", json!([])),
        ("prompt", json!([[]])),
        ("prompt", json!([1.5])),
        ("prompt", json!({})),
        ("prompt", json!([-1])),
        ("prompt", json!([VOCAB_SIZE])),
        ("prompt", json!(vec!["a"; 257])),
        ("logprobs", json!(21)),
        ("logprobs", json!(true)),
        ("suffix", json!("end")),
        ("echo", json!(1)),
    ] {
        let case = json!({ field: value });
        assert_refused(&server.complete(case.clone()), field, &case);
    }
    assert_refused(&server.post("/v1/completions", &json!({})), "prompt", &json!({}));
    let case = json!({ "prompt": vec!["a"; 100], "n": 100 });
    assert_refused(&server.complete(case.clone()), "n", &case);
    let case = json!({ "prompt_logprobs": 1, "stream": true });
    assert_refused(&server.complete(case.clone()), "prompt_logprobs", &case);
}

#[test]
fn bad_fields_of_chats_are_named() {
    let server = TestServer::start(Script::say("a"));
    let function = |name: &str| json!({ "type": "function", "function": { "name": name } });
    for (field, case) in [
        ("messages", json!({ "messages": [] })),
        ("messages", json!({ "messages": "hi" })),
        ("messages[0]", json!({ "messages": ["hi"] })),
        ("messages[0].role", json!({ "messages": [{ "content": "hi" }] })),
        ("messages[0].role", json!({ "messages": [{ "role": 1, "content": "hi" }] })),
        ("messages[0].content", json!({ "messages": [{ "role": "user", "content": 7 }] })),
        ("messages", json!({ "messages": [{ "role": "user", "content": [{ "type": "image_url" }] }] })),
        ("max_tokens", json!({ "max_tokens": 0 })),
        ("max_completion_tokens", json!({ "max_completion_tokens": 0 })),
        ("logprobs", json!({ "logprobs": 5 })),
        ("top_logprobs", json!({ "logprobs": true, "top_logprobs": 21 })),
        ("top_logprobs", json!({ "top_logprobs": 2 })),
        ("tools", json!({ "tools": {} })),
        ("tools[0]", json!({ "tools": [{ "type": "custom" }] })),
        ("tools[0].function.name", json!({ "tools": [function("a b")] })),
        ("tools[1].function.name", json!({ "tools": [function("a"), function("a")] })),
        ("tools", json!({ "tools": vec![function("a"); 129] })),
        ("tool_choice", json!({ "tool_choice": "required" })),
        ("tool_choice", json!({ "tool_choice": "maybe" })),
        ("tool_choice", json!({ "tools": [function("a")], "tool_choice": function("b") })),
        ("response_format.type", json!({ "response_format": { "type": "xml" } })),
        ("response_format", json!({ "response_format": "json" })),
        ("continue_final_message", json!({ "continue_final_message": true, "add_generation_prompt": true })),
        ("chat_template_kwargs", json!({ "chat_template_kwargs": [] })),
    ] {
        let reply = server.chat(case.clone());
        assert_eq!(reply.status, 400, "{case}: {}", reply.text());
        assert_eq!(reply.json()["error"]["param"], field, "{case}: {}", reply.text());
    }
    let reply = server.post("/v1/chat/completions", &json!({ "model": "tiny" }));
    assert_eq!(reply.json()["error"]["param"], "messages");
}

#[test]
fn a_prompt_that_fills_the_context_is_refused_with_both_lengths() {
    let server = TestServer::start(Script::say("a"));
    for len in [MAX_MODEL_LEN, MAX_MODEL_LEN + 50] {
        let reply = server.complete(json!({ "prompt": "x".repeat(len) }));
        assert_eq!(reply.status, 400);
        let error = &reply.json()["error"];
        assert_eq!(error["code"], "context_length_exceeded");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(&MAX_MODEL_LEN.to_string()) && message.contains(&len.to_string()), "{message}");
    }
    assert_eq!(server.complete(json!({ "prompt": "x".repeat(MAX_MODEL_LEN - 1) })).status, 200);
}

#[test]
fn unknown_models_and_routes_are_not_found() {
    let server = TestServer::start(Script::say("a"));
    let reply = server.chat(json!({ "model": "gpt-5" }));
    assert_eq!(reply.status, 404);
    assert_eq!(reply.json()["error"]["type"], "NotFoundError");
    assert_eq!(reply.json()["error"]["param"], "model");
    assert_eq!(server.get("/v2/nothing").json()["error"]["type"], "NotFoundError");
    let reply = server.get("/v1/completions");
    assert_eq!((reply.status, reply.json()["error"]["type"].as_str()), (405, Some("MethodNotAllowedError")));
}

#[test]
fn what_is_no_json_object_is_refused() {
    let server = TestServer::start(Script::say("a"));
    let deep = format!("{{\"prompt\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
    let deep_unknown = format!("{{\"prompt\":\"a\",\"x\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
    let cases: [&[u8]; 10] = [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\"text\"",
        b"{\"prompt\":\"a\"} trailing",
        b"{\"prompt\":\"\xff\xfe\"}",
        b"{\"prompt\":\"\\ud800\"}",
        b"{\"prompt\":\"a\",\"prompt\":\"b\"}",
        deep.as_bytes(),
    ];
    for case in cases {
        let reply = server.send(&post("/v1/completions", case, ""));
        let shown = String::from_utf8_lossy(&case[..case.len().min(60)]);
        assert_eq!(reply.status, 400, "{shown}: {}", reply.text());
        assert_eq!(reply.json()["error"]["type"], "BadRequestError", "{shown}");
    }
    // Fields nobody reads are skipped without recursion.
    let reply = server.send(&post("/v1/completions", deep_unknown.as_bytes(), ""));
    assert!([200, 400].contains(&reply.status), "{}", reply.text());
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn only_json_is_read() {
    let server = TestServer::start(Script::say("a"));
    let body = completion_body(json!({})).to_string();
    for (content_type, status) in [
        ("application/json; charset=utf-8", 200),
        ("application/vnd.api+json", 200),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
    ] {
        let len = body.len();
        let request = format!(
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: {content_type}\r\nContent-Length: {len}\r\n\r\n{body}"
        );
        assert_eq!(server.send(request.as_bytes()).status, status, "{content_type}");
    }
}

#[test]
fn large_bodies_are_refused_before_they_are_read() {
    let request_limits = RequestLimits { max_body_bytes: 1000, ..RequestLimits::default() };
    let server = TestServer::with_config(Script::say("a"), ServerConfig { request_limits, ..ServerConfig::default() });
    let reply = server.complete(json!({ "prompt": "x".repeat(2000) }));
    assert_eq!((reply.status, reply.json()["error"]["type"].as_str()), (413, Some("RequestTooLargeError")));
    let head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 999999999\r\n\r\n";
    assert_eq!(server.send(head.as_bytes()).status, 413);
}

#[test]
fn keys_guard_every_route_but_the_probes() {
    let api_keys = vec!["secret".to_owned(), "other".to_owned()];
    let server = TestServer::with_config(Script::say("a"), ServerConfig { api_keys, ..ServerConfig::default() });
    for path in ["/v1/models", "/metrics", "/version", "/load", "/openapi.json", "/nothing", "/v1/completions"] {
        let reply = server.get(path);
        assert_eq!(reply.status, 401, "{path}");
        assert_eq!(reply.json()["error"]["code"], "invalid_api_key");
        assert_eq!(reply.header("www-authenticate"), Some("Bearer"));
        assert_eq!(server.send(&get(path, "Authorization: Bearer wrong\r\n")).status, 401, "{path}");
    }
    for path in ["/health", "/ping"] {
        assert_eq!(server.get(path).status, 200);
    }
    // The answer comes although the body never does.
    let head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n";
    assert_eq!(server.send(head.as_bytes()).status, 401);
    let body = chat_body(json!({})).to_string();
    let request = post("/v1/chat/completions", body.as_bytes(), "Authorization: Bearer other\r\n");
    assert_eq!(server.send(&request).status, 200);
}

#[test]
fn request_ids_come_back() {
    let server = TestServer::start(Script::say("a"));
    let body = chat_body(json!({})).to_string();
    let reply = server.send(&post("/v1/chat/completions", body.as_bytes(), "X-Request-Id: abc-1\r\n"));
    assert_eq!(reply.header("x-request-id"), Some("abc-1"));
    assert_eq!(reply.json()["id"], "chatcmpl-abc-1");
    let made = server.get("/nothing");
    assert_eq!(made.header("x-request-id").unwrap().len(), 32);
    let unusable = server.send(&get("/health", "X-Request-Id: a b\r\n"));
    assert_ne!(unusable.header("x-request-id"), Some("a b"));
}
