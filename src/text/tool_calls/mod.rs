//! Tool calls as models write them: telling them from content while text streams in, and forcing them.
//!
//! Which format a model writes is read off its chat template. Turning calls into API objects (ids, deltas) is left to the
//! server, token masks to `text/grammar.rs`.

mod json_scanner;
mod parser;

pub use parser::{ToolCall, ToolCallParser, ToolEvent};
use serde_json::Value;

use super::Grammar;
use super::grammar::{lark_string, with_json_options};
use crate::{Result, invalid};

const MAX_TOOLS: usize = 128;
const MAX_NAME_BYTES: usize = 64;
/// Most calls that a grammar lets a model make in one answer.
const MAX_PARALLEL_CALLS: usize = 16;

/// How a model writes tool calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToolFormat {
    /// `<tool_call>\n{"name": .., "arguments": {..}}\n</tool_call>`, any number, after content (Hermes 2 Pro, Qwen 2.5).
    Hermes,
    /// The whole answer is `{"name": .., "parameters": {..}}`, possibly after `<|python_tag|>` (Llama 3.1 and later).
    Llama3,
}

/// A function the model may call.
#[derive(Debug, Clone, PartialEq)]
pub struct Tool {
    /// Its name: letters, digits, `_`, `-` and `.`.
    pub name: String,
    /// JSON schema of its arguments; `None` means no arguments.
    pub parameters: Option<Value>,
}

impl ToolFormat {
    /// The format that a chat template teaches, `None` when it teaches none that is known.
    pub fn detect(template: &str) -> Option<Self> {
        if template.contains("<tool_call>") {
            Some(ToolFormat::Hermes)
        } else if template.contains("<|python_tag|>") || template.contains("Environment: ipython") {
            Some(ToolFormat::Llama3)
        } else {
            None
        }
    }

    /// A grammar that makes the model call one of `tools`, its arguments following the tool's schema. With `parallel`
    /// it may call several times (Hermes only; the Llama format has one call an answer). For a named tool pass just it.
    pub fn grammar(self, tools: &[Tool], parallel: bool) -> Result<Grammar> {
        check_tools(tools)?;
        let calls: Vec<_> = (0..tools.len()).map(|index| format!("call_{index}")).collect();
        let repeat =
            if parallel { format!("(\"\\n\" wrapped){{0,{}}}", MAX_PARALLEL_CALLS - 1) } else { String::new() };
        let mut lark = match self {
            ToolFormat::Hermes => {
                format!("start: wrapped {repeat}\nwrapped: \"<tool_call>\\n\" call \"\\n</tool_call>\"\n")
            }
            ToolFormat::Llama3 => "start: call\n".to_owned(),
        };
        lark.push_str(&format!("call: {}\n", calls.join(" | ")));
        for (index, tool) in tools.iter().enumerate() {
            let head = lark_string(&format!("{{\"name\": \"{}\", \"{}\": ", tool.name, self.arguments_key()));
            let schema = with_json_options(tool.schema());
            lark.push_str(&format!(
                "call_{index}: {head} arguments_{index} \"}}\"\narguments_{index}: %json {schema}\n"
            ));
        }
        Ok(Grammar::Lark(lark))
    }

    fn arguments_key(self) -> &'static str {
        match self {
            ToolFormat::Hermes => "arguments",
            ToolFormat::Llama3 => "parameters",
        }
    }
}

impl Tool {
    fn schema(&self) -> Value {
        let nothing = || serde_json::json!({"type": "object", "properties": {}, "additionalProperties": false});
        self.parameters.clone().unwrap_or_else(nothing)
    }
}

fn check_tools(tools: &[Tool]) -> Result<()> {
    if tools.is_empty() || tools.len() > MAX_TOOLS {
        return Err(invalid!("tools: {} given, wanted 1 to {MAX_TOOLS}", tools.len()));
    }
    for tool in tools {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
        if tool.name.is_empty() || tool.name.len() > MAX_NAME_BYTES || !tool.name.bytes().all(allowed) {
            return Err(invalid!(
                "tools: the name {:?} should be 1 to {MAX_NAME_BYTES} letters, digits, '_', '-' or '.'",
                tool.name
            ));
        }
        if !tool.schema().is_object() {
            return Err(invalid!("tools: the parameters of {:?} should be a JSON schema object", tool.name));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
