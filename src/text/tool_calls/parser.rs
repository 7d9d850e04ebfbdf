//! Separates content from tool calls in text that arrives piece by piece.
//!
//! Content is handed out as soon as it cannot be the beginning of a call. A call is handed out when its JSON is complete.
//! Whatever looks like a call but is none (broken JSON, no name, too large, cut off) comes out as content, unchanged:
//! no text is lost.

use serde_json::Value;

use super::ToolFormat;
use super::json_scanner::JsonScanner;

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";
const PYTHON_TAG: &str = "<|python_tag|>";

const MAX_CALLS: usize = 128;
const MAX_CALL_BYTES: usize = 1 << 20;

/// A call that the model made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolCall {
    /// Name of the function.
    pub name: String,
    /// The arguments as JSON text.
    pub arguments: String,
}

/// What became certain about the text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToolEvent {
    /// Text for the reader; never empty.
    Content(String),
    /// A complete call.
    Call(ToolCall),
}

#[derive(Debug, Clone)]
enum State {
    /// Nothing but white space was seen: a bare `{` begins a call, in the Llama format.
    Start,
    Content,
    /// Inside a call: `lead` is the text before its JSON, needed if it turns out to be content.
    Call {
        lead: String,
        scanner: JsonScanner,
    },
    /// A call's JSON is complete; its closing tag or separator may follow.
    AfterCall,
}

/// The parser of one answer.
#[derive(Debug, Clone)]
pub struct ToolCallParser {
    format: ToolFormat,
    state: State,
    /// Text of which nothing is certain yet.
    buffer: String,
    num_calls: usize,
}

impl ToolCallParser {
    /// A parser at the start of an answer.
    pub fn new(format: ToolFormat) -> Self {
        Self { format, state: State::Start, buffer: String::new(), num_calls: 0 }
    }

    /// Number of calls found so far.
    pub fn num_calls(&self) -> usize {
        self.num_calls
    }

    /// Adds `text` and returns what is certain now. Neighbouring content is one event.
    pub fn push(&mut self, text: &str) -> Vec<ToolEvent> {
        self.buffer.push_str(text);
        let mut events = Vec::new();
        while self.step(&mut events) {}
        events
    }

    /// Ends the answer: what is left is content.
    pub fn flush(&mut self) -> Vec<ToolEvent> {
        let mut events = Vec::new();
        let rest = std::mem::take(&mut self.buffer);
        match std::mem::replace(&mut self.state, State::Content) {
            State::Call { lead, .. } => emit(&mut events, &(lead + &rest)),
            State::AfterCall if rest.trim().is_empty() => {}
            State::Start | State::Content if self.num_calls > 0 && rest.trim().is_empty() => {}
            _ => emit(&mut events, &rest),
        }
        events
    }

    /// Makes one step; false when more text is needed.
    fn step(&mut self, events: &mut Vec<ToolEvent>) -> bool {
        match &mut self.state {
            State::Start => self.begin(),
            State::Content => self.read_content(events),
            State::Call { .. } => self.read_call(events),
            State::AfterCall => self.leave_call(),
        }
    }

    fn begin(&mut self) -> bool {
        let body = self.buffer.trim_start();
        if body.is_empty() {
            return false;
        }
        if self.format == ToolFormat::Llama3 && body.starts_with('{') {
            self.open_call(self.buffer.len() - body.len());
        } else {
            self.state = State::Content;
        }
        true
    }

    fn tag(&self) -> &'static str {
        match self.format {
            ToolFormat::Hermes => OPEN,
            ToolFormat::Llama3 => PYTHON_TAG,
        }
    }

    fn read_content(&mut self, events: &mut Vec<ToolEvent>) -> bool {
        let tag = self.tag();
        if let Some(start) = self.buffer.find(tag).filter(|_| self.num_calls < MAX_CALLS) {
            let content = self.buffer[..start].trim_end().len();
            emit(events, &self.buffer[..content]);
            self.buffer.drain(..content);
            self.open_call(start - content + tag.len());
            return true;
        }
        let certain = self.buffer[..self.buffer.len() - partial_tag(&self.buffer, tag)].trim_end().len();
        emit(events, &self.buffer[..certain]);
        self.buffer.drain(..certain);
        false
    }

    /// Enters a call whose JSON follows the first `lead_bytes` of the buffer.
    fn open_call(&mut self, lead_bytes: usize) {
        let lead = self.buffer.drain(..lead_bytes).collect();
        self.state = State::Call { lead, scanner: JsonScanner::default() };
    }

    fn read_call(&mut self, events: &mut Vec<ToolEvent>) -> bool {
        let State::Call { lead, scanner } = &mut self.state else { return false };
        if scanner.is_fresh() {
            let space = self.buffer.len() - self.buffer.trim_start().len();
            lead.extend(self.buffer.drain(..space));
        }
        if self.buffer.is_empty() {
            return false;
        }
        if !self.buffer.starts_with('{') || self.buffer.len() > MAX_CALL_BYTES {
            return self.reject(events, 0);
        }
        let Some(end) = scanner.object_end(&self.buffer) else { return false };
        match parse_call(&self.buffer[..end]) {
            Some(call) => {
                self.buffer.drain(..end);
                self.num_calls += 1;
                self.state = State::AfterCall;
                events.push(ToolEvent::Call(call));
                true
            }
            None => self.reject(events, end),
        }
    }

    /// What was taken for a call is content after all, up to `end` of the buffer.
    fn reject(&mut self, events: &mut Vec<ToolEvent>, end: usize) -> bool {
        if let State::Call { lead, .. } = std::mem::replace(&mut self.state, State::Content) {
            emit(events, &lead);
        }
        emit(events, &self.buffer[..end]);
        self.buffer.drain(..end);
        true
    }

    fn leave_call(&mut self) -> bool {
        let body = self.buffer.trim_start();
        let space = self.buffer.len() - body.len();
        match self.format {
            ToolFormat::Hermes if body.len() < CLOSE.len() && CLOSE.starts_with(body) => return false,
            ToolFormat::Hermes => {
                let closed = body.starts_with(CLOSE);
                self.buffer.drain(..if closed { space + CLOSE.len() } else { 0 });
                self.state = State::Content;
            }
            ToolFormat::Llama3 => {
                let body = body.trim_start_matches(';').trim_start();
                if body.is_empty() {
                    return false;
                }
                if body.starts_with('{') && self.num_calls < MAX_CALLS {
                    self.open_call(self.buffer.len() - body.len());
                } else {
                    self.state = State::Content;
                }
            }
        }
        true
    }
}

/// Length of the longest end of `text` that begins `tag`.
fn partial_tag(text: &str, tag: &str) -> usize {
    let longest = tag.len().min(text.len() + 1) - 1;
    (1..=longest).rev().find(|length| text.as_bytes().ends_with(&tag.as_bytes()[..*length])).unwrap_or(0)
}

fn emit(events: &mut Vec<ToolEvent>, text: &str) {
    if text.is_empty() {
        return;
    }
    match events.last_mut() {
        Some(ToolEvent::Content(content)) => content.push_str(text),
        _ => events.push(ToolEvent::Content(text.to_owned())),
    }
}

/// A call from its JSON; both names that models use for the arguments are taken.
fn parse_call(json: &str) -> Option<ToolCall> {
    let value: Value = serde_json::from_str(json).ok()?;
    let name = value.get("name")?.as_str().filter(|name| !name.is_empty())?.to_owned();
    let arguments = match value.get("arguments").or_else(|| value.get("parameters")) {
        None | Some(Value::Null) => "{}".to_owned(),
        Some(Value::String(text)) => text.clone(),
        Some(arguments @ Value::Object(_)) => arguments.to_string(),
        Some(_) => return None,
    };
    Some(ToolCall { name, arguments })
}
