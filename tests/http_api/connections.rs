//! How connections begin, idle, break and end.

use std::sync::mpsc;

use mneme::engine::request::FinishReason;
use mneme::server::ServerConfig;
use serde_json::json;

use crate::client::{get, post};
use crate::fake_engine::Script;
use crate::{TestServer, chat_body, completion_body};

fn hanging_server() -> (TestServer, mpsc::Receiver<String>) {
    let (report, cancelled) = mpsc::channel();
    (TestServer::start(Script::Hang(report)), cancelled)
}

fn completion(fields: serde_json::Value) -> Vec<u8> {
    post("/v1/completions", completion_body(fields).to_string().as_bytes(), "")
}

#[test]
fn leaving_a_stream_cancels_it() {
    let (server, cancelled) = hanging_server();
    let mut connection = server.connect();
    connection.send(&completion(json!({ "stream": true, "request_id": "left" })));
    assert_eq!(connection.receive_head().0, 200);
    connection.receive_chunk().expect("a first chunk");
    assert_eq!(server.get("/load").json()["server_load"], 1);
    drop(connection);
    assert_eq!(cancelled.recv().unwrap(), "cmpl-left-0");
}

#[test]
fn leaving_before_the_answer_cancels_every_choice() {
    let (server, cancelled) = hanging_server();
    let mut connection = server.connect();
    connection.send(&completion(json!({ "n": 2, "request_id": "left" })));
    drop(connection);
    let mut ids = [cancelled.recv().unwrap(), cancelled.recv().unwrap()];
    ids.sort();
    assert_eq!(ids, ["cmpl-left-0", "cmpl-left-1"]);
}

#[test]
fn a_stop_string_cancels_the_rest() {
    let (server, cancelled) = hanging_server();
    let reply = server.complete(json!({ "stop": "x", "request_id": "done" })).json();
    assert_eq!(reply["choices"][0]["stop_reason"], "x");
    assert_eq!(cancelled.recv().unwrap(), "cmpl-done-0");
}

#[test]
fn a_connection_carries_one_request_after_another() {
    let server = TestServer::start(Script::say("ab"));
    let mut connection = server.connect();
    for stream in [false, true, false] {
        connection.send(&completion(json!({ "stream": stream })));
        assert_eq!(connection.receive().status, 200);
    }
    connection.send(&completion(json!({ "n": 0 })));
    assert_eq!(connection.receive().status, 400);
    connection.send(&get("/health", ""));
    assert_eq!(connection.receive().status, 200);
}

#[test]
fn requests_may_come_in_chunks() {
    let server = TestServer::start(Script::say("ab"));
    let mut connection = server.connect();
    connection.send(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n",
    );
    for piece in completion_body(json!({})).to_string().as_bytes().chunks(5) {
        connection.send(format!("{:x}\r\n", piece.len()).as_bytes());
        connection.send(piece);
        connection.send(b"\r\n");
    }
    connection.send(b"0\r\n\r\n");
    assert_eq!(connection.receive().json()["choices"][0]["text"], "ab");
}

#[test]
fn what_is_no_http_is_refused() {
    let server = TestServer::start(Script::say("a"));
    let long = format!("GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: {}\r\n\r\n", "x".repeat(100 << 10));
    let many = format!("GET /health HTTP/1.1\r\nHost: localhost\r\n{}\r\n", "X-Many: x\r\n".repeat(200));
    for (request, status) in [("nonsense\r\n\r\n", 400), (&long, 431), (&many, 431)] {
        assert_eq!(server.send(request.as_bytes()).status, status);
    }
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn failures_in_the_middle_of_a_stream_are_told_before_done() {
    for (script, kind) in [
        (Script::Fail(FinishReason::Error("broken".into())), "InternalServerError"),
        (Script::Fail(FinishReason::Abort), "ServiceUnavailableError"),
        (Script::Vanish, "InternalServerError"),
    ] {
        let server = TestServer::start(script);
        let events = server.chat(json!({ "stream": true })).events();
        assert_eq!(events[1]["choices"][0]["delta"]["content"], "x");
        let error = &events.last().unwrap()["error"];
        assert_eq!(error["type"], kind);
        assert!(!error["message"].as_str().unwrap().contains("broken"), "causes stay in the log");
    }
}

#[test]
fn failures_have_a_status_when_nothing_was_sent() {
    for (script, status) in [
        (Script::Fail(FinishReason::Error("broken".into())), 500),
        (Script::Fail(FinishReason::Abort), 503),
        (Script::Vanish, 500),
    ] {
        assert_eq!(TestServer::start(script).chat(json!({})).status, status);
    }
}

#[test]
fn an_engine_that_ended_is_unhealthy() {
    let server = TestServer::start(Script::Vanish);
    assert_eq!(server.get("/health").status, 200);
    server.chat(json!({}));
    assert_eq!(server.get("/health").status, 503);
    let server = TestServer::start(Script::say("a"));
    server.engine.drain();
    assert_eq!(server.get("/health").status, 503);
    let reply = server.chat(json!({}));
    assert_eq!((reply.status, reply.header("retry-after")), (503, Some("1")));
}

#[test]
fn a_full_queue_asks_to_come_back() {
    let server = TestServer::with_queue(Script::Sleep, ServerConfig::default(), 1);
    let reply = server.complete(json!({ "n": 2 }));
    assert_eq!((reply.status, reply.header("retry-after")), (503, Some("1")));
    assert_eq!(reply.json()["error"]["type"], "ServiceUnavailableError");
    assert_eq!(server.get("/load").json()["server_load"], 0);
}

#[test]
fn a_reader_that_does_not_read_holds_up_nobody() {
    let server = TestServer::start(Script::Say(vec![b'x'; 200]));
    let mut slow = server.connect();
    for _ in 0..50 {
        slow.send(&completion(json!({ "stream": true, "max_tokens": 200, "logprobs": 20 })));
    }
    assert_eq!(server.chat(json!({ "max_tokens": 1 })).status, 200);
    for _ in 0..50 {
        assert_eq!(slow.receive().events().len(), 201);
    }
}

#[test]
fn silence_is_filled_with_comments() {
    let (report, cancelled) = mpsc::channel();
    let config = ServerConfig { keep_alive_interval: std::time::Duration::from_millis(1), ..ServerConfig::default() };
    let server = TestServer::with_config(Script::Hang(report), config);
    let mut connection = server.connect();
    connection.send(&completion(json!({ "stream": true })));
    connection.receive_head();
    while connection.receive_chunk().expect("the stream goes on") != b": keep-alive\n\n" {}
    drop(connection);
    cancelled.recv().unwrap();
}

#[test]
fn running_calls_end_before_the_server_does() {
    let (server, cancelled) = hanging_server();
    let mut connection = server.connect();
    connection.send(&post("/v1/chat/completions", chat_body(json!({ "stream": true })).to_string().as_bytes(), ""));
    connection.receive_head();
    connection.receive_chunk().expect("a first chunk");
    let mut probe = server.connect();
    probe.send(&get("/health", ""));
    assert_eq!(probe.receive().status, 200);
    server.thread.shutdown();
    let health = || {
        let mut probe = server.connect();
        probe.send(&get("/health", ""));
        probe.receive().status
    };
    while health() == 200 {}
    assert_eq!(health(), 503);
    assert_eq!(server.complete(json!({})).status, 503);
    drop(connection);
    cancelled.recv().unwrap();
    server.thread.join().unwrap();
    assert!(probe.is_closed());
}
