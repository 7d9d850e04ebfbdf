//! Splits generated text into content and tool calls, for streamed and whole answers alike.

use super::choice::FinishKind;
use super::tools::ToolCall;
use crate::text::tool_calls::{ToolCallParser, ToolEvent, ToolFormat};

/// What a piece of text adds to a message.
#[derive(Debug, Default)]
pub(super) struct MessageDelta {
    pub(super) content: String,
    pub(super) tool_calls: Vec<ToolCall>,
}

impl MessageDelta {
    pub(super) fn append(&mut self, mut other: Self) {
        self.content.push_str(&other.content);
        self.tool_calls.append(&mut other.tool_calls);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.content.is_empty() && self.tool_calls.is_empty()
    }
}

impl From<Vec<ToolEvent>> for MessageDelta {
    fn from(events: Vec<ToolEvent>) -> Self {
        let mut delta = Self::default();
        for event in events {
            match event {
                ToolEvent::Content(text) => delta.content.push_str(&text),
                ToolEvent::Call(call) => delta.tool_calls.push(call.into()),
            }
        }
        delta
    }
}

/// The reader of one choice.
pub(super) struct ToolReader {
    parser: Option<ToolCallParser>,
}

impl ToolReader {
    /// Without a format all text is content.
    pub(super) fn new(format: Option<ToolFormat>) -> Self {
        Self { parser: format.map(ToolCallParser::new) }
    }

    /// Adds text; returns what is certain of it.
    pub(super) fn push(&mut self, text: String) -> MessageDelta {
        match &mut self.parser {
            Some(parser) => parser.push(&text).into(),
            None => MessageDelta { content: text, tool_calls: Vec::new() },
        }
    }

    /// Ends the text; returns what was held back.
    pub(super) fn flush(&mut self) -> MessageDelta {
        self.parser.as_mut().map(|parser| parser.flush().into()).unwrap_or_default()
    }

    /// Calls found so far.
    pub(super) fn num_calls(&self) -> usize {
        self.parser.as_ref().map_or(0, ToolCallParser::num_calls)
    }

    /// How the choice ended: a message with calls ends for them.
    pub(super) fn finish_kind(&self, reason: FinishKind) -> FinishKind {
        match reason {
            FinishKind::Stop if self.num_calls() > 0 => FinishKind::ToolCalls,
            reason => reason,
        }
    }
}
