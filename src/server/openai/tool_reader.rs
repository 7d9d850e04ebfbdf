//! Reads tool calls out of generated text, piece by piece, for streamed and whole answers alike.

use serde::Deserialize;
use serde_json::value::RawValue;
use uuid::Uuid;

use super::choice::FinishKind;
use super::tools::{FunctionDelta, ToolCallDelta, ToolChoice};
use crate::server::config::ServedModel;

/// What a piece of text adds to a message.
#[derive(Debug, Default)]
pub(super) struct MessageDelta {
    pub(super) content: String,
    pub(super) tool_calls: Vec<ToolCallDelta>,
}

impl MessageDelta {
    pub(super) fn append(&mut self, mut other: Self) {
        self.content.push_str(&other.content);
        self.tool_calls.append(&mut other.tool_calls);
    }

    fn content(text: &str) -> Self {
        Self { content: text.to_owned(), tool_calls: Vec::new() }
    }
}

/// The reader of one choice.
pub(super) struct ToolReader {
    notation: Notation,
    num_calls: usize,
}

/// How calls are written in the text.
enum Notation {
    /// There are none.
    Text,
    /// All text is the arguments of this function.
    Arguments { name: String },
    /// All text is a JSON array of calls, kept until it is complete.
    Array(String),
}

/// A call in the array that `tool_choice: required` forces.
#[derive(Deserialize)]
struct ForcedCall<'a> {
    name: String,
    #[serde(borrow)]
    parameters: &'a RawValue,
}

impl ToolReader {
    pub(super) fn new(choice: &ToolChoice, _model: &ServedModel) -> Self {
        let notation = match choice {
            ToolChoice::None | ToolChoice::Auto => Notation::Text,
            ToolChoice::Required => Notation::Array(String::new()),
            ToolChoice::Named(name) => Notation::Arguments { name: name.clone() },
        };
        Self { notation, num_calls: 0 }
    }

    /// Adds text; returns what is certain of it.
    pub(super) fn push(&mut self, text: &str) -> MessageDelta {
        match &mut self.notation {
            Notation::Text => MessageDelta::content(text),
            Notation::Arguments { .. } if text.is_empty() => MessageDelta::default(),
            Notation::Arguments { name } => {
                let first = self.num_calls == 0;
                let call = match first {
                    true => new_call(0, name.clone(), text.to_owned()),
                    false => more_arguments(0, text.to_owned()),
                };
                self.num_calls = 1;
                MessageDelta { content: String::new(), tool_calls: vec![call] }
            }
            Notation::Array(held) => {
                held.push_str(text);
                MessageDelta::default()
            }
        }
    }

    /// Ends the text; returns what was held back.
    pub(super) fn finish(&mut self) -> MessageDelta {
        match &mut self.notation {
            Notation::Text | Notation::Arguments { .. } => MessageDelta::default(),
            Notation::Array(held) => {
                let text = std::mem::take(held);
                let Some(tool_calls) = read_array(&text) else {
                    // Cut off by max_tokens or a stop string: show what there is.
                    return MessageDelta::content(&text);
                };
                self.num_calls = tool_calls.len();
                MessageDelta { content: String::new(), tool_calls }
            }
        }
    }

    /// How the choice ended: a message with calls ends for them.
    pub(super) fn finish_kind(&self, reason: FinishKind) -> FinishKind {
        match reason {
            FinishKind::Stop if self.num_calls > 0 => FinishKind::ToolCalls,
            reason => reason,
        }
    }
}

fn read_array(text: &str) -> Option<Vec<ToolCallDelta>> {
    let calls: Vec<ForcedCall> = serde_json::from_str(text).ok()?;
    let delta = |(index, call): (usize, ForcedCall)| new_call(index, call.name, call.parameters.get().to_owned());
    Some(calls.into_iter().enumerate().map(delta).collect())
}

fn new_call(index: usize, name: String, arguments: String) -> ToolCallDelta {
    ToolCallDelta {
        index,
        id: Some(format!("call_{}", Uuid::new_v4().simple())),
        kind: Some("function"),
        function: FunctionDelta { name: Some(name), arguments },
    }
}

fn more_arguments(index: usize, arguments: String) -> ToolCallDelta {
    ToolCallDelta { index, id: None, kind: None, function: FunctionDelta { name: None, arguments } }
}
