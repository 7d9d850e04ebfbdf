//! Log-probabilities as chats report them, and those of the prompt, which chats and completions report alike.

use std::collections::BTreeMap;

use serde::Serialize;
use utoipa::ToSchema;

use crate::engine::request::{TokenLogprob, TokenLogprobs};
use crate::text::Tokenizer;

/// JSON has no infinity; vLLM sends this for impossible tokens.
const MIN_LOGPROB: f32 = -9999.0;

/// `logprobs` of a chat's choice.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ChatLogprobs {
    /// One entry per token.
    pub(super) content: Vec<ChatTokenLogprob>,
    /// Always null.
    pub(super) refusal: Option<Vec<ChatTokenLogprob>>,
}

/// The chosen token and its likeliest alternatives.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ChatTokenLogprob {
    #[serde(flatten)]
    chosen: SpelledLogprob,
    top_logprobs: Vec<SpelledLogprob>,
}

/// A token's log-probability and spelling.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct SpelledLogprob {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

/// `prompt_logprobs`: per prompt token a map from token id, with nothing for the first.
pub(super) type PromptLogprobs = Vec<Option<BTreeMap<u32, PromptLogprob>>>;

/// A token's log-probability at a place in the prompt.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct PromptLogprob {
    logprob: f32,
    rank: u32,
    decoded_token: String,
}

impl ChatLogprobs {
    pub(super) fn new(tokenizer: &Tokenizer, tokens: &[TokenLogprobs]) -> Self {
        let content = tokens.iter().map(|token| ChatTokenLogprob::new(tokenizer, token)).collect();
        Self { content, refusal: None }
    }
}

impl ChatTokenLogprob {
    fn new(tokenizer: &Tokenizer, token: &TokenLogprobs) -> Self {
        let spell = |entry: &TokenLogprob| SpelledLogprob {
            token: tokenizer.token_text(entry.id),
            logprob: finite(entry.logprob),
            bytes: tokenizer.token_bytes(entry.id).to_vec(),
        };
        Self { chosen: spell(&token.chosen), top_logprobs: token.top.iter().map(spell).collect() }
    }
}

/// Keeps a log-probability expressible in JSON.
pub(super) fn finite(logprob: f32) -> f32 {
    logprob.max(MIN_LOGPROB)
}

/// The prompt's tokens with their alternatives; `None` unless asked for.
pub(super) fn prompt_logprobs(tokenizer: &Tokenizer, tokens: &[Option<TokenLogprobs>]) -> PromptLogprobs {
    let entry = |entry: &TokenLogprob| {
        let decoded_token = tokenizer.token_text(entry.id);
        (entry.id, PromptLogprob { logprob: finite(entry.logprob), rank: entry.rank, decoded_token })
    };
    let position = |token: &TokenLogprobs| token.top.iter().chain([&token.chosen]).map(entry).collect();
    tokens.iter().map(|token| token.as_ref().map(position)).collect()
}
