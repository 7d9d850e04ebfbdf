//! Tools: which the model may call, whether it must, and the schema that makes it do so.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;
use uuid::Uuid;

use super::structured::Constraint;
use crate::server::error::ApiError;
use crate::server::limits::{RequestLimits, check_len};
use crate::text::tool_calls::{self, ToolFormat};

const MAX_NAME_CHARS: usize = 64;

/// The tools of a chat.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(super) struct ToolsRequest {
    /// Functions the model may call.
    #[schema(value_type = Option<Vec<Tool>>)]
    tools: Option<Vec<Value>>,
    /// `none`, `auto`, `required` or one function. `auto` when there are tools.
    tool_choice: Option<ToolChoiceRequest>,
    /// Whether several calls may come in one answer.
    parallel_tool_calls: Option<bool>,
}

/// A function the model may call.
#[derive(Debug, Deserialize, ToSchema)]
struct Tool {
    #[serde(rename = "type")]
    kind: ToolKind,
    function: Function,
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum ToolKind {
    Function,
}

/// A function's name and parameters.
#[derive(Debug, Deserialize, ToSchema)]
struct Function {
    name: String,
    /// JSON Schema of an object.
    #[schema(value_type = Option<Object>)]
    parameters: Option<Map<String, Value>>,
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "invalid value, expected \"none\", \"auto\", \"required\" or a function to call")]
enum ToolChoiceRequest {
    Mode(ToolChoiceMode),
    Named(NamedToolChoice),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum ToolChoiceMode {
    None,
    Auto,
    Required,
}

#[derive(Debug, Deserialize, ToSchema)]
struct NamedToolChoice {
    #[serde(rename = "type")]
    #[expect(dead_code, reason = "only its value is checked")]
    kind: ToolKind,
    function: FunctionName,
}

#[derive(Debug, Deserialize, ToSchema)]
struct FunctionName {
    name: String,
}

/// What the model may or must do with its tools.
#[derive(Debug, Clone, PartialEq, Eq)]
enum ToolChoice {
    /// Plain text only.
    None,
    /// Text or calls.
    Auto,
    /// At least one call.
    Required,
    /// A call of this function.
    Named(String),
}

/// Checked tools.
#[derive(Debug, Default)]
pub(super) struct Tools {
    /// As the client sent them, for the template.
    pub(super) definitions: Option<Value>,
    /// How to read calls out of the text; `None` when the text has none.
    pub(super) format: Option<ToolFormat>,
    /// What forces the calls.
    pub(super) constraint: Option<Constraint>,
}

/// A complete call.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ToolCall {
    id: String,
    #[serde(rename = "type")]
    kind: &'static str,
    function: FunctionCall,
}

/// A function's name and its arguments.
#[derive(Debug, Serialize, ToSchema)]
struct FunctionCall {
    name: String,
    /// JSON, as text.
    arguments: String,
}

impl From<tool_calls::ToolCall> for ToolCall {
    fn from(call: tool_calls::ToolCall) -> Self {
        let function = FunctionCall { name: call.name, arguments: call.arguments };
        Self { id: format!("call_{}", Uuid::new_v4().simple()), kind: "function", function }
    }
}

impl ToolsRequest {
    /// `taught` is the format the model knows, if it knows one.
    pub(super) fn check(self, taught: Option<ToolFormat>, limits: &RequestLimits) -> Result<Tools, ApiError> {
        let values = self.tools.unwrap_or_default();
        check_len("tools", values.len(), limits.max_tools)?;
        let functions = read_functions(&values)?;
        let choice = check_choice(self.tool_choice, &functions)?;
        if choice == ToolChoice::None {
            return Ok(Tools::default());
        }
        // Auto reads what the model was taught to write; a forced call can take any form.
        let format = if choice == ToolChoice::Auto { taught } else { Some(taught.unwrap_or(ToolFormat::Hermes)) };
        let callable = match choice {
            ToolChoice::None | ToolChoice::Auto => Vec::new(),
            ToolChoice::Required => functions,
            ToolChoice::Named(ref name) => functions.into_iter().filter(|function| function.name == *name).collect(),
        };
        let parallel = choice == ToolChoice::Required && self.parallel_tool_calls.unwrap_or(true);
        let callable: Vec<_> = callable.into_iter().map(Function::into_tool).collect();
        let constraint = match format {
            Some(format) if !callable.is_empty() => Some(force_call(format, &callable, parallel)?),
            _ => None,
        };
        Ok(Tools { definitions: Some(Value::Array(values)), format, constraint })
    }
}

fn force_call(format: ToolFormat, callable: &[tool_calls::Tool], parallel: bool) -> Result<Constraint, ApiError> {
    let grammar = format.grammar(callable, parallel).map_err(|error| ApiError::from(error).with_param("tools"))?;
    Ok(Constraint { field: "tools", grammar })
}

impl Function {
    fn into_tool(self) -> tool_calls::Tool {
        tool_calls::Tool { name: self.name, parameters: self.parameters.map(Value::Object) }
    }
}

fn read_functions(values: &[Value]) -> Result<Vec<Function>, ApiError> {
    let mut names = HashSet::new();
    let mut functions = Vec::with_capacity(values.len());
    for (index, value) in values.iter().enumerate() {
        let field = format!("tools[{index}]");
        let tool = Tool::deserialize(value)
            .map_err(|error| ApiError::invalid_field(&field, format!("{field} is not a function tool: {error}.")))?;
        let Tool { kind: ToolKind::Function, function } = tool;
        if !is_function_name(&function.name) || !names.insert(function.name.clone()) {
            let message = format!(
                "{field}: a function's name has 1 to {MAX_NAME_CHARS} letters, digits, '_', '-' or '.', and is given once."
            );
            return Err(ApiError::invalid_field(format!("{field}.function.name"), message));
        }
        functions.push(function);
    }
    Ok(functions)
}

fn is_function_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.');
    (1..=MAX_NAME_CHARS).contains(&name.len()) && name.bytes().all(allowed)
}

fn check_choice(choice: Option<ToolChoiceRequest>, functions: &[Function]) -> Result<ToolChoice, ApiError> {
    let invalid = |message: String| Err(ApiError::invalid_field("tool_choice", message));
    match choice {
        None | Some(ToolChoiceRequest::Mode(ToolChoiceMode::Auto)) if functions.is_empty() => Ok(ToolChoice::None),
        None | Some(ToolChoiceRequest::Mode(ToolChoiceMode::Auto)) => Ok(ToolChoice::Auto),
        Some(ToolChoiceRequest::Mode(ToolChoiceMode::None)) => Ok(ToolChoice::None),
        Some(ToolChoiceRequest::Mode(ToolChoiceMode::Required)) if functions.is_empty() => {
            invalid("tool_choice 'required' needs tools.".into())
        }
        Some(ToolChoiceRequest::Mode(ToolChoiceMode::Required)) => Ok(ToolChoice::Required),
        Some(ToolChoiceRequest::Named(NamedToolChoice { function: FunctionName { name }, .. })) => {
            match functions.iter().any(|function| function.name == name) {
                true => Ok(ToolChoice::Named(name)),
                false => invalid(format!("tool_choice names the function {name:?}, which is not among the tools.")),
            }
        }
    }
}
