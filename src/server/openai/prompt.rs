//! Prompts and inputs in their four spellings, and the checks every token list passes before it reaches the engine.

use serde::Deserialize;
use utoipa::ToSchema;

use super::link::LinkedContent;
use super::memory::CallMemory;
use crate::engine::request::Piece;
use crate::memory::{Twin, completion_cube_tokens};
use crate::server::App;
use crate::server::error::ApiError;
use crate::server::limits::check_len;

/// `prompt` of a completion, `input` of an embedding.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(
    untagged,
    expecting = "invalid type, expected a string, a list of strings, a list of token ids or a list of lists of token ids"
)]
pub(super) enum PromptInput {
    /// Text.
    Text(String),
    /// Token ids. Before texts: an empty list is an empty prompt.
    Tokens(Vec<u32>),
    /// Several texts.
    Texts(Vec<String>),
    /// Several token lists.
    TokenLists(Vec<Vec<u32>>),
}

/// Prompts as token ids, and how many of their first tokens are a cube's.
pub(super) struct Prompts {
    pub(super) prompts: Vec<Vec<u32>>,
    pub(super) num_cube_tokens: usize,
    /// Parts of every prompt whose KV is moved there.
    pub(super) pieces: Vec<Piece>,
}

impl Prompts {
    /// Prompts behind the tokens of cubes.
    pub(super) fn behind(cube: &[u32], prompts: Vec<Vec<u32>>) -> Self {
        let prompts = prompts.into_iter().map(|prompt| [cube, &prompt].concat()).collect();
        Self { prompts, num_cube_tokens: cube.len(), pieces: vec![] }
    }

    /// Prompts without cubes.
    pub(super) fn alone(prompts: Vec<Vec<u32>>) -> Self {
        Self { prompts, num_cube_tokens: 0, pieces: vec![] }
    }
}

impl PromptInput {
    /// Prompts behind the cubes of a call. Texts are tokenized on their own.
    pub(super) fn tokenize_behind(
        self,
        field: &str,
        app: &App,
        memory: Option<&CallMemory>,
        add_special_tokens: bool,
    ) -> Result<Prompts, ApiError> {
        let Some(memory) = memory else {
            return Ok(Prompts::alone(self.tokenize(field, app, add_special_tokens)?));
        };
        let of_messages = || {
            let message = "A cube of messages stands before a chat, not before a plain completion.";
            ApiError::invalid_field("memory", message)
        };
        if let Some(contents) = memory.linked() {
            let head = match contents {
                _ if contents.iter().any(|content| matches!(content, LinkedContent::Messages(_))) => {
                    return Err(of_messages());
                }
                [LinkedContent::Text(_), ..] => completion_cube_tokens(&app.model.tokenizer, "")?,
                _ => Vec::new(),
            };
            return memory.link(&app.model.tokenizer, head, self.tokenize(field, app, false)?);
        }
        let cube = match (memory.twin(), memory.token_ids()) {
            (Some(Twin::Text(text)), _) => completion_cube_tokens(&app.model.tokenizer, text)?,
            (None, Some(ids)) => ids.to_vec(),
            _ => return Err(of_messages()),
        };
        Ok(Prompts::behind(&cube, self.tokenize(field, app, false)?))
    }

    /// Token lists, not yet checked against the model's context.
    pub(super) fn tokenize(self, field: &str, app: &App, add_special_tokens: bool) -> Result<Vec<Vec<u32>>, ApiError> {
        let model = &app.model;
        check_len(field, self.len(), app.config.request_limits.max_prompts)?;
        let encode = |text: String| model.tokenizer.encode(&text, add_special_tokens).map_err(ApiError::from);
        let prompts = match self {
            Self::Text(text) => vec![encode(text)?],
            Self::Texts(texts) => texts.into_iter().map(encode).collect::<Result<_, _>>()?,
            Self::Tokens(tokens) => vec![tokens],
            Self::TokenLists(lists) => lists,
        };
        let vocab_size = model.engine.info().vocab_size.min(model.tokenizer.vocab_size());
        prompts.iter().try_for_each(|prompt| check_token_ids(field, prompt, vocab_size))?;
        Ok(prompts)
    }

    /// How many prompts these are.
    fn len(&self) -> usize {
        match self {
            Self::Text(_) | Self::Tokens(_) => 1,
            Self::Texts(texts) => texts.len(),
            Self::TokenLists(lists) => lists.len(),
        }
    }
}

/// Refuses ids the model does not know.
pub(in crate::server) fn check_token_ids(field: &str, ids: &[u32], vocab_size: usize) -> Result<(), ApiError> {
    match ids.iter().find(|id| **id as usize >= vocab_size) {
        None => Ok(()),
        Some(id) => Err(ApiError::invalid_field(
            field,
            format!("{field}: token id {id} is outside the vocabulary; ids are 0 to {}.", vocab_size.saturating_sub(1)),
        )),
    }
}

/// `truncate_prompt_tokens`: keeps the end of a prompt. -1 means as much as the context holds.
#[derive(Debug, Clone, Copy)]
pub(super) struct Truncation {
    keep_last: usize,
}

impl Truncation {
    pub(super) fn new(requested: Option<i64>, max_model_len: usize) -> Result<Option<Self>, ApiError> {
        let max = max_model_len - 1;
        match requested {
            None => Ok(None),
            Some(-1) => Ok(Some(Self { keep_last: max })),
            Some(num) => match usize::try_from(num) {
                Ok(keep_last) if (1..=max).contains(&keep_last) => Ok(Some(Self { keep_last })),
                _ => Err(ApiError::invalid_field(
                    "truncate_prompt_tokens",
                    format!("truncate_prompt_tokens must be -1 or between 1 and {max}, got {num}."),
                )),
            },
        }
    }

    pub(super) fn apply(self, prompt: &mut Vec<u32>) {
        let excess = prompt.len().saturating_sub(self.keep_last);
        prompt.drain(..excess);
    }
}

/// Refuses a prompt that leaves no room for a token, or has none itself.
pub(super) fn check_prompt_len(field: &str, prompt: &[u32], max_model_len: usize) -> Result<(), ApiError> {
    if prompt.is_empty() {
        return Err(ApiError::invalid_field(field, format!("{field} must have at least one token.")));
    }
    if prompt.len() < max_model_len {
        return Ok(());
    }
    let message = format!(
        "This model's maximum context length is {max_model_len} tokens. However, your {field} resulted in {} tokens. \
         Please reduce the length of the {field}.",
        prompt.len()
    );
    Err(ApiError::invalid_field(field, message).with_code("context_length_exceeded"))
}
