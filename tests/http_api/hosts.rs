//! A server that is open because it listens on loopback is open to this machine's programs, not to any page in its
//! browser.

use mneme::server::ServerConfig;
use serde_json::json;

use crate::client::Reply;
use crate::fake_engine::Script;
use crate::{TestServer, chat_body};

fn chat_to(server: &TestServer, host: &str, headers: &str) -> Reply {
    let body = chat_body(json!({})).to_string();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n{headers}\r\n",
        body.len()
    );
    server.send(&[head.as_bytes(), body.as_bytes()].concat())
}

#[test]
fn a_name_that_was_pointed_at_loopback_is_refused() {
    let server = TestServer::start(Script::say("a"));
    let port = server.address().port();
    for host in ["attacker.example".to_owned(), format!("attacker.example:{port}"), format!("192.0.2.7:{port}")] {
        let reply = chat_to(&server, &host, "");
        assert_eq!(reply.status, 403, "{host}: {}", reply.text());
        let error = &reply.json()["error"];
        assert_eq!((&error["type"], &error["code"]), (&json!("PermissionDeniedError"), &json!("host_not_allowed")));
        let message = error["message"].as_str().expect("a message");
        assert!(message.contains(&host) && message.contains("--allowed-host"), "{message}");
        let get = format!("GET /v1/models HTTP/1.1\r\nHost: {host}\r\n\r\n");
        assert_eq!(server.send(get.as_bytes()).status, 403, "{host}");
    }
    assert!(server.requests.is_empty(), "nothing reached the engine");
    for host in [format!("localhost:{port}"), format!("127.0.0.1:{port}"), format!("[::1]:{port}")] {
        assert_eq!(chat_to(&server, &host, "").status, 200, "{host}");
    }
    assert_eq!(server.send(b"GET /health HTTP/1.0\r\n\r\n").status, 200, "a probe without a Host");
}

#[test]
fn names_that_were_allowed_are_answered() {
    let config = ServerConfig { allowed_hosts: vec!["models.example".into()], ..ServerConfig::default() };
    let server = TestServer::with_config(Script::say("a"), config);
    assert_eq!(chat_to(&server, "models.example:8000", "").status, 200);
    assert_eq!(chat_to(&server, "attacker.example", "").status, 403);
}

#[test]
fn a_key_opens_the_server_under_any_name() {
    let config = ServerConfig { api_keys: vec!["secret".into()], ..ServerConfig::default() };
    let server = TestServer::with_config(Script::say("a"), config);
    assert_eq!(chat_to(&server, "models.example", "Authorization: Bearer secret\r\n").status, 200);
    assert_eq!(chat_to(&server, "models.example", "").status, 401);
}

/// A page may send a request that needs no permission, but never one that runs the model, and it reads no answer.
#[test]
fn pages_of_other_origins_are_given_no_permission() {
    let server = TestServer::start(Script::say("a"));
    let preflight = server.send(
        b"OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nOrigin: https://attacker.example\r\n\
          Access-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: content-type\r\n\r\n",
    );
    assert_eq!(preflight.status, 405);
    let body = chat_body(json!({})).to_string();
    let simple = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nOrigin: https://attacker.example\r\n\
         Content-Type: text/plain\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let simple = server.send(simple.as_bytes());
    assert_eq!(simple.status, 415);
    let answer = chat_to(&server, "localhost", "Origin: https://attacker.example\r\n");
    assert_eq!(answer.status, 200);
    for reply in [preflight, simple, answer] {
        let permission = reply.headers.iter().find(|(name, _)| name.to_lowercase().starts_with("access-control"));
        assert_eq!(permission, None);
    }
}
