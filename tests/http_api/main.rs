//! The HTTP server over a scripted engine: every route, every refusal, every way a client can leave.

mod client;
mod fake_cubes;
mod fake_engine;

mod adapters;
mod chat;
mod completions;
mod connections;
mod cubes;
mod embeddings;
mod errors;
mod hosts;
mod parameters;
mod prefills;
mod saves;
mod snapshots;
#[path = "../support/mod.rs"]
mod support;
mod transfers;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crossbeam::channel::Receiver;
use mneme::engine::handle::EngineHandle;
use mneme::engine::request::{GenerateRequest, SamplingParams, Task};
use mneme::server::{CubeService, ServedModel, ServerConfig, ServerThread};
use mneme::text::{ChatTemplate, GrammarEngine};
use serde_json::{Value, json};

use self::client::{Connection, Reply};
use self::fake_engine::Script;

const TEMPLATE: &str = "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}</s>{% endfor %}\
                        {% if tools %}tools:{{ tools | length }} in <tool_call>{% endif %}\
                        {% if add_generation_prompt %}<s>assistant:{% endif %}";

/// A running server.
struct TestServer {
    thread: ServerThread,
    engine: EngineHandle,
    requests: Receiver<GenerateRequest>,
}

impl TestServer {
    fn start(script: Script) -> Self {
        Self::with_config(script, ServerConfig::default())
    }

    fn with_config(script: Script, config: ServerConfig) -> Self {
        Self::with_queue(script, config, 64)
    }

    fn with_queue(script: Script, config: ServerConfig, queue_len: usize) -> Self {
        let fake = fake_engine::start(script, queue_len);
        let config = ServerConfig { port: 0, drain_timeout: Duration::from_secs(5), ..config };
        let thread = ServerThread::start(config, served_model(fake.handle.clone())).expect("a free port");
        Self { thread, engine: fake.handle, requests: fake.requests }
    }

    fn with_cubes(config: ServerConfig, cubes: CubeService) -> Self {
        let fake = fake_engine::start(Script::say("a"), 64);
        let model = ServedModel { cubes: Some(cubes), ..served_model(fake.handle.clone()) };
        let thread = ServerThread::start(ServerConfig { port: 0, ..config }, model).expect("a free port");
        Self { thread, engine: fake.handle, requests: fake.requests }
    }

    fn address(&self) -> SocketAddr {
        self.thread.address()
    }

    fn connect(&self) -> Connection {
        Connection::open(self.address())
    }

    fn send(&self, request: &[u8]) -> Reply {
        let mut connection = self.connect();
        connection.send_some(request);
        connection.receive()
    }

    fn get(&self, path: &str) -> Reply {
        self.send(&client::get(path, ""))
    }

    fn post(&self, path: &str, body: &Value) -> Reply {
        self.send(&client::post(path, body.to_string().as_bytes(), ""))
    }

    fn post_ok(&self, path: &str, body: &Value) -> Value {
        let reply = self.post(path, body);
        assert_eq!(reply.status, 200, "{}", reply.text());
        reply.json()
    }

    fn chat(&self, fields: Value) -> Reply {
        self.post("/v1/chat/completions", &chat_body(fields))
    }

    fn complete(&self, fields: Value) -> Reply {
        self.post("/v1/completions", &completion_body(fields))
    }

    /// The sampling parameters of the next request that reached the engine.
    fn next_sampling(&self) -> SamplingParams {
        match self.requests.recv().expect("the engine runs").task {
            Task::Generate(sampling) => *sampling,
            Task::Embed | Task::Deposit { .. } => panic!("something else was asked for"),
        }
    }
}

fn served_model(engine: EngineHandle) -> ServedModel {
    let tokenizer = Arc::new(fake_engine::tokenizer());
    ServedModel {
        names: vec!["tiny".into(), "org/tiny".into()],
        engine,
        template: Some(Arc::new(ChatTemplate::new(Some(TEMPLATE), Some("<s>"), Some("</s>")).expect("a template"))),
        grammar: Arc::new(GrammarEngine::new(tokenizer.clone()).expect("the vocabulary has an end token")),
        tokenizer,
        default_sampling: SamplingParams::default(),
        created: 1_700_000_000,
        root: "models/tiny".into(),
        cubes: None,
        adapters: None,
    }
}

fn chat_body(fields: Value) -> Value {
    merged(json!({ "model": "tiny", "messages": [{ "role": "user", "content": "hi" }] }), fields)
}

fn completion_body(fields: Value) -> Value {
    merged(json!({ "model": "tiny", "prompt": "hi" }), fields)
}

fn merged(mut body: Value, fields: Value) -> Value {
    let Value::Object(fields) = fields else { panic!("fields are an object") };
    body.as_object_mut().expect("a body is an object").extend(fields);
    body
}

/// The text of a stream's chunks, by `text`.
fn joined(events: &[Value], text: impl Fn(&Value) -> Option<&str>) -> String {
    events.iter().filter_map(text).collect()
}
