//! `/v1/completions`.

use serde_json::{Value, json};

use crate::fake_engine::Script;
use crate::{TestServer, completion_body, joined};

fn text(event: &Value) -> Option<&str> {
    event["choices"][0]["text"].as_str()
}

#[test]
fn an_answer_has_what_openai_requires() {
    let server = TestServer::start(Script::say("hello"));
    let reply = server.complete(json!({})).json();
    assert!(reply["id"].as_str().unwrap().starts_with("cmpl-"));
    assert_eq!(reply["object"], "text_completion");
    let choice = json!({
        "index": 0, "text": "hello", "logprobs": null, "finish_reason": "stop", "stop_reason": null,
    });
    assert_eq!(reply["choices"], json!([choice]));
    assert_eq!(reply["usage"]["total_tokens"], 7);
}

#[test]
fn sixteen_tokens_are_the_default() {
    let server = TestServer::start(Script::say(&"x".repeat(20)));
    let reply = server.complete(json!({})).json();
    assert_eq!(reply["choices"][0]["text"], "x".repeat(16));
    assert_eq!(reply["choices"][0]["finish_reason"], "length");
}

#[test]
fn prompts_come_in_four_forms() {
    let server = TestServer::start(Script::Echo);
    for (prompt, texts) in [
        (json!("ab"), vec!["ab"]),
        (json!(["ab", "c"]), vec!["ab", "c"]),
        (json!([97, 98]), vec!["ab"]),
        (json!([[97, 98], [99]]), vec!["ab", "c"]),
    ] {
        let reply = server.complete(json!({ "prompt": prompt })).json();
        let found: Vec<_> = reply["choices"].as_array().unwrap().iter().map(|choice| &choice["text"]).collect();
        assert_eq!(found, texts, "{prompt}");
        let rendered = server.post_ok("/v1/completions/render", &completion_body(json!({ "prompt": prompt })));
        assert_eq!(rendered.as_array().unwrap().len(), texts.len());
        assert_eq!(rendered[0]["token_ids"], json!([97, 98]));
    }
}

#[test]
fn choices_of_several_prompts_are_numbered_prompt_by_prompt() {
    let server = TestServer::start(Script::Echo);
    let reply = server.complete(json!({ "prompt": ["a", "b"], "n": 2 })).json();
    let texts: Vec<_> = reply["choices"].as_array().unwrap().iter().map(|choice| &choice["text"]).collect();
    assert_eq!(texts, ["a", "a", "b", "b"]);
    assert_eq!(reply["usage"]["prompt_tokens"], 2);
}

#[test]
fn every_token_has_a_chunk_even_half_a_character() {
    let server = TestServer::start(Script::say("h\u{e9}!"));
    let events = server.complete(json!({ "stream": true, "stream_options": { "include_usage": true } })).events();
    let texts: Vec<_> = events.iter().filter_map(text).collect();
    assert_eq!(texts, ["h", "", "\u{e9}", "!", ""]);
    assert_eq!(events[4]["choices"][0]["finish_reason"], "stop");
    assert_eq!(events[5]["choices"], json!([]));
    assert_eq!(events[5]["usage"]["completion_tokens"], 4);
}

#[test]
fn text_held_for_a_stop_string_comes_at_the_end() {
    let server = TestServer::start(Script::say("a ST"));
    let events = server.complete(json!({ "stream": true, "stop": "STOP" })).events();
    assert_eq!(joined(&events, text), "a ST");
    assert_eq!(events.last().unwrap()["choices"][0]["stop_reason"], Value::Null);
}

#[test]
fn logprobs_are_parallel_lists() {
    let server = TestServer::start(Script::say("ab"));
    let reply = server.complete(json!({ "logprobs": 1 })).json();
    let expected = json!({
        "text_offset": [0, 1], "token_logprobs": [-0.5, -0.5], "tokens": ["a", "b"],
        "top_logprobs": [{ "a": -0.5 }, { "b": -0.5 }],
    });
    assert_eq!(reply["choices"][0]["logprobs"], expected);
}

#[test]
fn echo_begins_with_the_prompt_and_its_logprobs() {
    let server = TestServer::start(Script::say("c"));
    let expected = json!({
        "text_offset": [0, 1, 2], "token_logprobs": [null, -0.5, -0.5], "tokens": ["a", "b", "c"],
        "top_logprobs": [null, { "b": -0.5 }, { "c": -0.5 }],
    });
    let fields = json!({ "prompt": "ab", "echo": true, "logprobs": 1 });
    let reply = server.complete(fields.clone()).json();
    assert_eq!(reply["choices"][0]["text"], "abc");
    assert_eq!(reply["choices"][0]["logprobs"], expected);
    assert!(reply["choices"][0].get("prompt_logprobs").is_none());

    let events = server.complete(crate::merged(fields, json!({ "stream": true }))).events();
    assert_eq!(joined(&events, text), "abc");
    assert_eq!(events[0]["choices"][0]["logprobs"]["tokens"], json!(["a", "b"]));
    assert_eq!(events[1]["choices"][0]["logprobs"]["text_offset"], json!([2]));
}

#[test]
fn zero_tokens_only_read_the_prompt() {
    let server = TestServer::start(Script::say("more"));
    let reply = server.complete(json!({ "prompt": "ab", "echo": true, "logprobs": 0, "max_tokens": 0 })).json();
    assert_eq!(reply["choices"][0]["text"], "ab");
    assert_eq!(reply["choices"][0]["logprobs"]["token_logprobs"], json!([null, -0.5]));
    assert_eq!(reply["choices"][0]["finish_reason"], "length");
    assert_eq!(reply["usage"]["completion_tokens"], 0);
}

#[test]
fn token_ids_come_on_request() {
    let server = TestServer::start(Script::say("c"));
    let fields = json!({ "prompt": "ab", "return_token_ids": true });
    let choice = server.complete(fields.clone()).json()["choices"][0].clone();
    assert_eq!((&choice["prompt_token_ids"], &choice["token_ids"]), (&json!([97, 98]), &json!([99])));
    let events = server.complete(crate::merged(fields, json!({ "stream": true }))).events();
    assert_eq!(events[0]["choices"][0]["prompt_token_ids"], json!([97, 98]));
    assert_eq!(events[1]["choices"][0]["token_ids"], json!([99]));
}

#[test]
fn long_prompts_can_be_cut_at_their_beginning() {
    let server = TestServer::start(Script::Echo);
    let reply = server.complete(json!({ "prompt": "abcdef", "truncate_prompt_tokens": 2 })).json();
    assert_eq!(reply["choices"][0]["text"], "ef");
    let long = "x".repeat(1000);
    assert_eq!(server.complete(json!({ "prompt": long, "truncate_prompt_tokens": -1 })).status, 200);
}

#[test]
fn a_body_that_is_prepared_on_another_thread_gives_the_same_answer() {
    let server = TestServer::start(Script::say("a"));
    let reply = server.complete(json!({ "user": "x".repeat(100_000) })).json();
    assert_eq!(reply["choices"][0]["text"], "a");
}
