//! OpenAI messages in the form that templates expect.
//!
//! Clients send content as text or as a list of parts, and tool call arguments as a string of JSON; most templates want
//! plain text and an object.

use serde_json::{Map, Value};

use crate::{Result, invalid};

/// Whether some loop of the template runs over a message's content.
pub(super) fn reads_content_parts(source: &str) -> bool {
    source.split("{%").skip(1).any(|tag| {
        let tag = tag.split("%}").next().unwrap_or_default();
        let body = tag.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        let Some(loop_head) = body.strip_prefix("for ") else { return false };
        let Some((_, iterated)) = loop_head.split_once(" in ") else { return false };
        let subject = iterated.split(['|', ' ']).next().unwrap_or_default();
        subject == "content" || [".content", "['content']", "[\"content\"]"].iter().any(|end| subject.ends_with(end))
    })
}

/// Checks `messages` and brings them into the templates' form. Text parts are joined with newlines unless `keep_parts`.
pub(super) fn normalise(messages: &Value, keep_parts: bool) -> Result<Value> {
    let Some(messages) = messages.as_array() else {
        return Err(invalid!("messages should be an array"));
    };
    let normalised = messages.iter().enumerate().map(|(index, message)| {
        let message = message.as_object().ok_or_else(|| invalid!("messages[{index}] should be an object"))?;
        normalise_message(message, index, keep_parts)
    });
    Ok(Value::Array(normalised.collect::<Result<_>>()?))
}

fn normalise_message(message: &Map<String, Value>, index: usize, keep_parts: bool) -> Result<Value> {
    let mut message = message.clone();
    if let Some(Value::Array(parts)) = message.get("content")
        && !keep_parts
    {
        let text = join_parts(parts, index)?;
        message.insert("content".into(), text.into());
    }
    if let Some(Value::Array(calls)) = message.get_mut("tool_calls") {
        for (call_index, call) in calls.iter_mut().enumerate() {
            parse_arguments(call, index, call_index)?;
        }
    }
    Ok(Value::Object(message))
}

fn join_parts(parts: &[Value], index: usize) -> Result<String> {
    let texts = parts.iter().enumerate().map(|(part_index, part)| match part["type"].as_str() {
        Some(kind @ ("text" | "refusal")) => part[kind]
            .as_str()
            .ok_or_else(|| invalid!("messages[{index}].content[{part_index}].{kind} should be a string")),
        Some(kind) => {
            Err(invalid!("messages[{index}].content[{part_index}] has type {kind:?}; this model only reads text"))
        }
        None => part
            .as_str()
            .ok_or_else(|| invalid!("messages[{index}].content[{part_index}] should be an object with a type")),
    });
    Ok(texts.collect::<Result<Vec<_>>>()?.join("\n"))
}

fn parse_arguments(call: &mut Value, index: usize, call_index: usize) -> Result<()> {
    let Some(arguments) = call.get_mut("function").and_then(|function| function.get_mut("arguments")) else {
        return Ok(());
    };
    let Value::String(text) = arguments else { return Ok(()) };
    let text = if text.trim().is_empty() { "{}" } else { text.as_str() };
    *arguments = serde_json::from_str(text)
        .map_err(|e| invalid!("messages[{index}].tool_calls[{call_index}].function.arguments is not JSON: {e}"))?;
    Ok(())
}
