//! Structured output: what `response_format` and vLLM's `structured_outputs` ask for.

use serde::Deserialize;
use serde_json::Value;
use utoipa::ToSchema;

use crate::server::config::ServedModel;
use crate::server::error::ApiError;
use crate::server::limits::{RequestLimits, check_len};
use crate::text::{Grammar, GrammarState};

/// The form the output must have.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(super) struct FormatRequest {
    /// OpenAI's way to say it.
    response_format: Option<ResponseFormat>,
    /// vLLM's way to say it.
    structured_outputs: Option<StructuredOutputs>,
}

/// A grammar and the request field it came from.
#[derive(Debug)]
pub(super) struct Constraint {
    pub(super) field: &'static str,
    pub(super) grammar: Grammar,
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
enum ResponseFormat {
    /// Anything.
    Text,
    /// Any JSON object.
    JsonObject,
    /// JSON that a schema describes.
    JsonSchema {
        /// The schema with its name.
        json_schema: NamedSchema,
    },
}

#[derive(Debug, Deserialize, ToSchema)]
struct NamedSchema {
    /// For the model's information; not used.
    #[expect(dead_code, reason = "required by OpenAI, so its absence is an error")]
    name: String,
    /// JSON Schema; any object when left out.
    #[schema(value_type = Option<Object>)]
    schema: Option<Value>,
}

/// Exactly one of these.
#[derive(Debug, Deserialize, ToSchema)]
struct StructuredOutputs {
    /// JSON Schema, as an object or as text.
    #[schema(value_type = Option<Object>)]
    json: Option<Value>,
    /// Regular expression the whole output matches.
    regex: Option<String>,
    /// One of these texts.
    choice: Option<Vec<String>>,
    /// Context-free grammar in Lark's notation.
    grammar: Option<String>,
    /// Any JSON object.
    json_object: Option<bool>,
}

impl FormatRequest {
    /// The constraint, if there is one.
    pub(super) fn constraint(self, limits: &RequestLimits) -> Result<Option<Constraint>, ApiError> {
        let from_format = self.response_format.and_then(ResponseFormat::into_grammar);
        let from_outputs = self.structured_outputs.map(|outputs| outputs.into_grammar(limits)).transpose()?;
        match (from_format, from_outputs) {
            (Some(_), Some(_)) => {
                let message = "response_format and structured_outputs cannot both be given.";
                Err(ApiError::invalid_field("structured_outputs", message))
            }
            (Some(grammar), None) => Ok(Some(Constraint { field: "response_format", grammar })),
            (None, grammar) => Ok(grammar.map(|grammar| Constraint { field: "structured_outputs", grammar })),
        }
    }
}

impl ResponseFormat {
    fn into_grammar(self) -> Option<Grammar> {
        match self {
            Self::Text => None,
            Self::JsonObject => Some(Grammar::JsonObject),
            Self::JsonSchema { json_schema } => {
                Some(json_schema.schema.map_or(Grammar::JsonObject, Grammar::JsonSchema))
            }
        }
    }
}

impl StructuredOutputs {
    fn into_grammar(self, limits: &RequestLimits) -> Result<Grammar, ApiError> {
        let invalid = |message: &str| ApiError::invalid_field("structured_outputs", message);
        let choice = self.choice.map(|choice| check_choice(choice, limits)).transpose()?;
        let json = self.json.map(parse_schema).transpose()?;
        let json_object = self.json_object.unwrap_or(false);
        let given = [
            json.map(Grammar::JsonSchema),
            self.regex.map(Grammar::Regex),
            choice.map(Grammar::Choice),
            self.grammar.map(Grammar::Lark),
            json_object.then_some(Grammar::JsonObject),
        ];
        let mut given = given.into_iter().flatten();
        match (given.next(), given.next()) {
            (Some(grammar), None) => Ok(grammar),
            _ => Err(invalid("structured_outputs takes exactly one of json, regex, choice, grammar and json_object.")),
        }
    }
}

fn check_choice(choice: Vec<String>, limits: &RequestLimits) -> Result<Vec<String>, ApiError> {
    check_len("structured_outputs.choice", choice.len(), limits.max_list_entries)?;
    if choice.is_empty() || choice.iter().any(String::is_empty) {
        let message = "structured_outputs.choice must be a list of texts that are not empty.";
        return Err(ApiError::invalid_field("structured_outputs.choice", message));
    }
    Ok(choice)
}

fn parse_schema(schema: Value) -> Result<Value, ApiError> {
    let Value::String(text) = schema else { return Ok(schema) };
    serde_json::from_str(&text).map_err(|error| {
        ApiError::invalid_field("structured_outputs.json", format!("structured_outputs.json is not JSON: {error}."))
    })
}

impl Constraint {
    /// Compiles the grammar for the model's vocabulary.
    pub(super) fn compile(&self, model: &ServedModel) -> Result<GrammarState, ApiError> {
        model.grammar.compile(&self.grammar).map_err(|error| ApiError::from(error).with_param(self.field))
    }
}
