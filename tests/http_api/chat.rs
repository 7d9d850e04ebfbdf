//! `/v1/chat/completions`.

use serde_json::{Value, json};

use crate::fake_engine::{CACHED_TOKENS, Script};
use crate::{TestServer, joined};

/// "<s>user:hi</s><s>assistant:"; control tokens are one token each.
const PROMPT_TOKENS: usize = 1 + 7 + 1 + 1 + 10;

fn content(event: &Value) -> Option<&str> {
    event["choices"][0]["delta"]["content"].as_str()
}

#[test]
fn an_answer_has_what_openai_requires() {
    let server = TestServer::start(Script::say("hello"));
    let reply = server.chat(json!({})).json();
    let id = reply["id"].as_str().unwrap();
    assert!(id.starts_with("chatcmpl-"), "{id}");
    assert_eq!(reply["object"], "chat.completion");
    assert_eq!(reply["model"], "tiny");
    let choice = &reply["choices"][0];
    assert_eq!(choice["message"], json!({ "role": "assistant", "content": "hello", "refusal": null }));
    assert_eq!(choice["finish_reason"], "stop");
    assert_eq!(choice["logprobs"], Value::Null);
    assert_eq!(
        reply["usage"],
        json!({
            "prompt_tokens": PROMPT_TOKENS, "completion_tokens": 5, "total_tokens": PROMPT_TOKENS + 5,
            "prompt_tokens_details": {
                "cached_tokens": CACHED_TOKENS,
                "device_cached_tokens": 0,
                "host_cached_tokens": 0,
                "storage_cached_tokens": 0,
            },
        })
    );
}

#[test]
fn a_stream_has_role_text_end_usage_and_done_in_this_order() {
    let server = TestServer::start(Script::say("abc"));
    let events = server.chat(json!({ "stream": true, "stream_options": { "include_usage": true } })).events();
    assert_eq!(events[0]["choices"][0]["delta"], json!({ "role": "assistant", "content": "" }));
    let texts: Vec<_> = events[1..4].iter().filter_map(content).collect();
    assert_eq!(texts, ["a", "b", "c"]);
    assert_eq!(events[4]["choices"][0]["delta"], json!({}));
    assert_eq!(events[4]["choices"][0]["finish_reason"], "stop");
    assert_eq!(events[5]["choices"], json!([]));
    assert_eq!(events[5]["usage"]["completion_tokens"], 3);
    assert_eq!(events.len(), 6);
    assert!(events[..5].iter().all(|event| event.get("usage").is_none()));
    assert!(events.iter().all(|event| event["id"] == events[0]["id"]));
}

#[test]
fn usage_comes_with_every_chunk_when_asked_for() {
    let server = TestServer::start(Script::say("ab"));
    let options = json!({ "include_usage": true, "continuous_usage_stats": true });
    let events = server.chat(json!({ "stream": true, "stream_options": options })).events();
    let counts: Vec<_> = events.iter().map(|event| event["usage"]["completion_tokens"].as_u64().unwrap()).collect();
    assert_eq!(counts, [0, 1, 2, 2, 2]);
}

#[test]
fn half_a_character_waits_for_its_other_half() {
    let server = TestServer::start(Script::say("h\u{e9}!"));
    let events = server.chat(json!({ "stream": true, "logprobs": true, "return_token_ids": true })).events();
    let texts: Vec<_> = events.iter().filter_map(content).collect();
    assert_eq!(texts, ["", "h", "\u{e9}", "!"]);
    assert_eq!(events[2]["choices"][0]["logprobs"]["content"].as_array().unwrap().len(), 2);
    assert_eq!(events[2]["choices"][0]["token_ids"], json!([0xc3, 0xa9]));
}

#[test]
fn stop_strings_end_the_text_and_the_request() {
    let server = TestServer::start(Script::say("one STOP two"));
    for stream in [false, true] {
        let reply = server.chat(json!({ "stop": ["STOP", "never"], "stream": stream }));
        let (text, choice) = match stream {
            false => {
                let choice = reply.json()["choices"][0].clone();
                (choice["message"]["content"].as_str().unwrap().to_owned(), choice)
            }
            true => {
                let events = reply.events();
                (joined(&events, content), events.last().unwrap()["choices"][0].clone())
            }
        };
        assert_eq!(text, "one ");
        assert_eq!(choice["finish_reason"], "stop");
        assert_eq!(choice["stop_reason"], "STOP");
    }
    let reply = server.chat(json!({ "stop": "STOP", "include_stop_str_in_output": true })).json();
    assert_eq!(reply["choices"][0]["message"]["content"], "one STOP");
}

#[test]
fn stop_tokens_are_reported() {
    let server = TestServer::start(Script::say("abc"));
    let reply = server.chat(json!({ "stop_token_ids": [b'c'] })).json();
    assert_eq!(reply["choices"][0]["message"]["content"], "ab");
    assert_eq!(reply["choices"][0]["stop_reason"], b'c');
}

#[test]
fn several_choices_share_one_call() {
    let server = TestServer::start(Script::say("ab"));
    let reply = server.chat(json!({ "n": 3, "seed": 7 })).json();
    let indices: Vec<_> = reply["choices"].as_array().unwrap().iter().map(|choice| &choice["index"]).collect();
    assert_eq!(indices, [0, 1, 2]);
    assert_eq!(reply["usage"]["prompt_tokens"], PROMPT_TOKENS);
    assert_eq!(reply["usage"]["completion_tokens"], 6);
    assert_eq!([(); 3].map(|()| server.next_sampling().seed), [Some(7), Some(8), Some(9)]);

    let events = server.chat(json!({ "n": 3, "stream": true })).events();
    for index in 0..3 {
        let own = events.iter().map(|event| &event["choices"][0]).filter(|choice| choice["index"] == index);
        let own: Vec<_> = own.collect();
        assert_eq!(own[0]["delta"]["role"], "assistant");
        assert_eq!(own.last().unwrap()["finish_reason"], "stop");
        assert_eq!(own.len(), 4);
    }
}

#[test]
fn logprobs_have_tokens_bytes_and_alternatives() {
    let server = TestServer::start(Script::say("a"));
    let reply = server.chat(json!({ "logprobs": true, "top_logprobs": 2 })).json();
    let logprobs = &reply["choices"][0]["logprobs"];
    let expected = json!({
        "content": [{
            "token": "a", "logprob": -0.5, "bytes": [97],
            "top_logprobs": [
                { "token": "a", "logprob": -0.5, "bytes": [97] },
                { "token": "b", "logprob": -9999.0, "bytes": [98] },
            ],
        }],
        "refusal": null,
    });
    assert_eq!(*logprobs, expected);
    let reply = server.chat(json!({ "prompt_logprobs": 0 })).json();
    let prompt_logprobs = reply["prompt_logprobs"].as_array().unwrap();
    assert_eq!(prompt_logprobs.len(), PROMPT_TOKENS);
    assert_eq!(prompt_logprobs[0], Value::Null);
    assert_eq!(prompt_logprobs[1]["117"], json!({ "logprob": -0.5, "rank": 1, "decoded_token": "u" }));
}

#[test]
fn max_tokens_cuts_and_is_clamped_to_the_context() {
    let server = TestServer::start(Script::say("abcdef"));
    let reply = server.chat(json!({ "max_completion_tokens": 2, "max_tokens": 4 })).json();
    assert_eq!(reply["choices"][0]["message"]["content"], "ab");
    assert_eq!(reply["choices"][0]["finish_reason"], "length");
    assert_eq!(server.chat(json!({ "max_tokens": 1_000_000 })).status, 200);
}

#[test]
fn parameters_reach_the_engine() {
    let server = TestServer::start(Script::say("a"));
    let fields = json!({
        "temperature": 0.5, "top_p": 0.25, "top_k": 4, "min_p": 0.125, "typical_p": 0.75,
        "repetition_penalty": 1.5, "frequency_penalty": -1, "presence_penalty": 2, "logit_bias": { "97": -100 },
        "seed": -1, "stop_token_ids": [5], "min_tokens": 1, "ignore_eos": true, "allowed_token_ids": [97],
        "bad_words": ["no"], "max_tokens": 9, "logprobs": true, "top_logprobs": 3, "prompt_logprobs": 1,
        "no_stop_trim": true, "user": "me", "metadata": { "deep": [1, { "x": null }] },
    });
    assert_eq!(server.chat(fields).status, 200);
    let sampling = server.next_sampling();
    assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k), (0.5, 0.25, 4));
    assert_eq!((sampling.min_p, sampling.typical_p, sampling.repetition_penalty), (0.125, 0.75, 1.5));
    assert_eq!((sampling.frequency_penalty, sampling.presence_penalty), (-1.0, 2.0));
    assert_eq!(sampling.logit_bias, [(97, -100.0)]);
    assert_eq!(sampling.seed, Some(u64::MAX));
    assert_eq!((sampling.stop_token_ids, sampling.min_tokens, sampling.ignore_eos), (vec![5], 1, true));
    assert_eq!(sampling.allowed_token_ids, Some(vec![97]));
    assert_eq!(sampling.bad_words, [b"no".map(u32::from).to_vec(), b" no".map(u32::from).to_vec()]);
    assert_eq!((sampling.max_tokens, sampling.logprobs, sampling.prompt_logprobs), (9, Some(3), Some(1)));
}

#[test]
fn nulls_mean_defaults() {
    let server = TestServer::start(Script::say("a"));
    let names = ["temperature", "top_p", "n", "stop", "max_tokens", "stream", "stream_options", "logit_bias", "tools"];
    let fields = names.iter().map(|name| (name.to_string(), Value::Null)).collect();
    let reply = server.chat(Value::Object(fields));
    assert_eq!(reply.status, 200, "{}", reply.text());
}

#[test]
fn priority_and_salt_reach_the_engine() {
    let server = TestServer::start(Script::say("a"));
    let id = server.chat(json!({ "priority": -3, "cache_salt": "pepper", "request_id": "mine" })).json()["id"].clone();
    assert_eq!(id, "chatcmpl-mine");
    let request = server.requests.recv().unwrap();
    assert_eq!((request.priority, request.domain.as_str()), (-3, "salt/pepper"));
}

#[test]
fn the_last_message_can_be_continued() {
    let server = TestServer::start(Script::Echo);
    let messages = json!([{ "role": "user", "content": "hi" }, { "role": "assistant", "content": "I am" }]);
    let reply = server.chat(json!({ "messages": messages, "continue_final_message": true })).json();
    assert_eq!(reply["choices"][0]["message"]["content"], "user:hiassistant:I am");
}

#[test]
fn responses_can_be_bound_to_a_form() {
    let server = TestServer::start(Script::say("{}"));
    for fields in [
        json!({ "response_format": { "type": "json_object" } }),
        json!({ "response_format": { "type": "json_schema", "json_schema": {
            "name": "x", "schema": { "type": "object" } } } }),
        json!({ "structured_outputs": { "json": "{\"type\": \"object\"}" } }),
        json!({ "structured_outputs": { "regex": "[ab]+" } }),
        json!({ "structured_outputs": { "choice": ["yes", "no"] } }),
        json!({ "structured_outputs": { "grammar": "start: \"a\"" } }),
    ] {
        let reply = server.chat(fields.clone());
        assert_eq!(reply.status, 200, "{fields}: {}", reply.text());
        assert!(server.next_sampling().grammar.is_some(), "{fields}");
    }
    assert_eq!(server.chat(json!({ "response_format": { "type": "text" } })).status, 200);
    assert!(server.next_sampling().grammar.is_none());
}

fn tools() -> Value {
    let parameters = json!({ "type": "object", "properties": { "city": { "type": "string" } } });
    json!([{ "type": "function", "function": { "name": "weather", "parameters": parameters } }])
}

const CALL: &str = "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\":\"Rome\"}}\n</tool_call>";

#[test]
fn calls_are_told_from_content() {
    let server = TestServer::start(Script::say(&format!("Let me see.\n{CALL}\n{CALL}")));
    let reply = server.chat(json!({ "tools": tools() })).json();
    let message = &reply["choices"][0]["message"];
    assert_eq!(message["content"], "Let me see.");
    let calls = message["tool_calls"].as_array().unwrap();
    assert_eq!(calls.len(), 2);
    assert_eq!(calls[0]["type"], "function");
    assert_eq!(calls[0]["function"], json!({ "name": "weather", "arguments": "{\"city\":\"Rome\"}" }));
    assert_ne!(calls[0]["id"], calls[1]["id"]);
    assert_eq!(reply["choices"][0]["finish_reason"], "tool_calls");
    assert!(server.next_sampling().grammar.is_none());
}

#[test]
fn calls_stream_with_their_index() {
    let server = TestServer::start(Script::say(&format!("Well.\n{CALL}\n{CALL}")));
    let events = server.chat(json!({ "tools": tools(), "stream": true })).events();
    assert_eq!(joined(&events, content), "Well.");
    let calls = events.iter().filter_map(|event| event["choices"][0]["delta"]["tool_calls"].as_array()).flatten();
    let calls: Vec<_> = calls.collect();
    assert_eq!([&calls[0]["index"], &calls[1]["index"]], [0, 1]);
    assert_eq!(calls[1]["function"], json!({ "name": "weather", "arguments": "{\"city\":\"Rome\"}" }));
    assert!(calls[1]["id"].as_str().unwrap().starts_with("call_"));
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");
}

#[test]
fn forced_calls_bind_the_output() {
    let server = TestServer::start(Script::say(CALL));
    let named = json!({ "type": "function", "function": { "name": "weather" } });
    for choice in [named, json!("required")] {
        let reply = server.chat(json!({ "tools": tools(), "tool_choice": choice })).json();
        assert_eq!(reply["choices"][0]["message"]["content"], Value::Null);
        assert_eq!(reply["choices"][0]["message"]["tool_calls"][0]["function"]["name"], "weather");
        assert!(server.next_sampling().grammar.is_some());
    }
}

#[test]
fn a_call_that_is_cut_off_stays_text() {
    let server = TestServer::start(Script::say(CALL));
    let reply = server.chat(json!({ "tools": tools(), "tool_choice": "required", "max_tokens": 14 })).json();
    assert_eq!(reply["choices"][0]["message"]["content"], &CALL[..14]);
    assert_eq!(reply["choices"][0]["finish_reason"], "length");
}

#[test]
fn tools_are_shown_to_the_template_unless_turned_off() {
    let server = TestServer::start(Script::Echo);
    for (choice, shown) in [("auto", true), ("none", false)] {
        let reply = server.chat(json!({ "tools": tools(), "tool_choice": choice })).json();
        let text = reply["choices"][0]["message"]["content"].as_str().unwrap();
        assert_eq!(text.contains("tools:1"), shown, "{text}");
    }
}

#[test]
fn rendering_gives_the_prompt_without_running_it() {
    let server = TestServer::start(Script::say("a"));
    let rendered = server.post_ok("/v1/chat/completions/render", &crate::chat_body(json!({})));
    let tokens = rendered["token_ids"].as_array().unwrap();
    assert_eq!(tokens.len(), PROMPT_TOKENS);
    assert!(server.requests.is_empty());
    let tokenized = server.post_ok("/tokenize", &crate::chat_body(json!({ "return_token_strs": true })));
    assert_eq!(tokenized["tokens"], rendered["token_ids"]);
    assert_eq!(tokenized["count"], PROMPT_TOKENS);
    assert_eq!(tokenized["token_strs"][0], "<s>");
    let text = server.post_ok("/detokenize", &json!({ "tokens": tokens }));
    assert_eq!(text["prompt"], "<s>user:hi</s><s>assistant:");
}
