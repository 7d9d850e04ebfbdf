//! A chat template and the messages it is given, divided by a NUL: compiled and rendered within bounds, or refused.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mneme::text::ChatTemplate;
use serde_json::{Map, Value, json};

fuzz_target!(|input: &str| {
    let (source, messages) = input.split_once('\0').unwrap_or((input, ""));
    let Ok(template) = ChatTemplate::new(Some(source), Some("<s>"), Some("</s>")) else { return };
    let messages = serde_json::from_str(messages).unwrap_or_else(|_| json!([{ "role": "user", "content": "hi" }]));
    let tools: Value = json!([{ "type": "function", "function": { "name": "f", "parameters": {} } }]);
    for tools in [None, Some(&tools)] {
        let _ = template.render(&messages, tools, true, &Map::new());
    }
});
