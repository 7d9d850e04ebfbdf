//! Tools: which the model may call, whether it must, and the schema that makes it do so.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use crate::server::error::ApiError;
use crate::server::limits::{RequestLimits, check_len};
use crate::text::grammar::Grammar;

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
pub(super) enum ToolChoice {
    /// Plain text only.
    None,
    /// Text or calls, in the model's own notation.
    Auto,
    /// At least one call; the output is a JSON array of them.
    Required,
    /// This function; the output is its arguments.
    Named(String),
}

/// Checked tools.
#[derive(Debug)]
pub(super) struct Tools {
    /// As the client sent them, for the template.
    pub(super) definitions: Option<Value>,
    pub(super) choice: ToolChoice,
    /// What forces the calls.
    pub(super) grammar: Option<Grammar>,
}

/// A call, or the next part of one, in an answer.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(super) struct ToolCallDelta {
    pub(super) index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) id: Option<String>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub(super) kind: Option<&'static str>,
    pub(super) function: FunctionDelta,
}

/// A function's name, in the first part only, and a piece of its arguments.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(super) struct FunctionDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) name: Option<String>,
    /// JSON, as text.
    pub(super) arguments: String,
}

impl ToolsRequest {
    pub(super) fn check(self, limits: &RequestLimits) -> Result<Tools, ApiError> {
        let values = self.tools.unwrap_or_default();
        check_len("tools", values.len(), limits.max_tools)?;
        let functions = read_functions(&values)?;
        let choice = check_choice(self.tool_choice, &functions)?;
        let grammar = match &choice {
            ToolChoice::None | ToolChoice::Auto => None,
            ToolChoice::Required => {
                Some(Grammar::JsonSchema(calls_schema(functions, self.parallel_tool_calls.unwrap_or(true))?))
            }
            ToolChoice::Named(name) => {
                let function = functions.into_iter().find(|function| function.name == *name);
                Some(Grammar::JsonSchema(function.map_or_else(any_object, Function::into_schema)))
            }
        };
        let shown = choice != ToolChoice::None && !values.is_empty();
        Ok(Tools { definitions: shown.then_some(Value::Array(values)), choice, grammar })
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

impl Function {
    /// The schema of its arguments.
    fn into_schema(self) -> Value {
        self.parameters.map_or_else(any_object, Value::Object)
    }
}

fn any_object() -> Value {
    json!({ "type": "object" })
}

/// The schema of an array of calls. Definitions inside the functions' schemas move to its root, where references look
/// for them.
fn calls_schema(functions: Vec<Function>, parallel: bool) -> Result<Value, ApiError> {
    let mut definitions = Map::new();
    let mut calls = Vec::with_capacity(functions.len());
    for function in functions {
        let name = function.name.clone();
        let mut parameters = function.into_schema();
        hoist_definitions(&mut parameters, &mut definitions)?;
        calls.push(json!({
            "type": "object",
            "properties": { "name": { "enum": [name] }, "parameters": parameters },
            "required": ["name", "parameters"],
            "additionalProperties": false,
        }));
    }
    let mut schema = json!({ "type": "array", "minItems": 1, "items": { "anyOf": calls } });
    let root = schema.as_object_mut().expect("the schema is an object");
    if !parallel {
        root.insert("maxItems".into(), 1.into());
    }
    root.extend(definitions);
    Ok(schema)
}

fn hoist_definitions(schema: &mut Value, root: &mut Map<String, Value>) -> Result<(), ApiError> {
    let Some(schema) = schema.as_object_mut() else { return Ok(()) };
    for section in ["$defs", "definitions"] {
        let Some(Value::Object(found)) = schema.shift_remove(section) else { continue };
        let known = root.entry(section).or_insert_with(|| json!({}));
        for (name, definition) in found {
            if known.get(&name).is_some_and(|other| *other != definition) {
                let message = format!("two functions define {section}/{name} differently; rename one.");
                return Err(ApiError::invalid_field("tools", message));
            }
            known[name] = definition;
        }
    }
    Ok(())
}
