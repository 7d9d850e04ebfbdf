//! Requests as the server parses, plans and answers them, over a connection to a real one with a scripted engine that
//! says the prompt again. Nothing a client sends is the server's failure, and every answer is JSON or an event stream.

#![no_main]
#![allow(dead_code)]

#[path = "../../tests/http_api/client.rs"]
mod client;
#[path = "../../tests/http_api/fake_engine.rs"]
mod fake_engine;
mod panics;

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};

use libfuzzer_sys::fuzz_target;
use mneme::engine::request::SamplingParams;
use mneme::server::{ServedModel, ServerConfig, ServerThread};
use mneme::text::{ChatTemplate, GrammarEngine};

use crate::client::Connection;
use crate::fake_engine::Script;

const TEMPLATE: &str = "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}</s>{% endfor %}\
                        {% if tools %}{{ tools | tojson }} in <tool_call>{% endif %}";

const PATHS: [&str; 7] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/chat/completions/render",
    "/v1/completions/render",
    "/tokenize",
    "/detokenize",
];

/// More than one call may have sequences.
const QUEUE_LEN: usize = 512;

fn server() -> SocketAddr {
    static SERVER: OnceLock<ServerThread> = OnceLock::new();
    SERVER.get_or_init(start).address()
}

fn start() -> ServerThread {
    let engine = fake_engine::start(Script::Echo, QUEUE_LEN).handle;
    let tokenizer = Arc::new(fake_engine::tokenizer());
    let model = ServedModel {
        names: vec!["tiny".into()],
        engine,
        template: Some(Arc::new(ChatTemplate::new(Some(TEMPLATE), None, None).expect("a template"))),
        grammar: Arc::new(GrammarEngine::new(Arc::clone(&tokenizer)).expect("the vocabulary has an end token")),
        tokenizer,
        default_sampling: SamplingParams::default(),
        created: 0,
        root: "tiny".into(),
    };
    ServerThread::start(ServerConfig { port: 0, ..ServerConfig::default() }, model).expect("a free port")
}

fuzz_target!(init: panics::let_the_code_catch(), |input: &[u8]| {
    let Some((path, body)) = input.split_first() else { return };
    let path = PATHS[usize::from(*path) % PATHS.len()];
    let mut connection = Connection::open(server());
    connection.send(&client::post(path, body, "Connection: close\r\n"));
    let reply = connection.receive();
    assert!(reply.status == 200 || (400..500).contains(&reply.status), "{} {}", reply.status, reply.text());
    if reply.header("content-type").is_some_and(|kind| kind.starts_with("text/event-stream")) {
        reply.events();
    } else {
        reply.json();
    }
});
