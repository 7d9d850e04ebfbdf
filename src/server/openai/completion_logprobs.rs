//! `logprobs` of a completion's choice: parallel lists, in OpenAI's older form.

use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::logprobs::finite;
use crate::engine::request::{TokenLogprob, TokenLogprobs};
use crate::text::Tokenizer;

/// Log-probabilities of a text's tokens; the lists have one entry per token.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(super) struct CompletionLogprobs {
    /// Where each token begins, in characters of the choice's text.
    text_offset: Vec<usize>,
    /// Null for the first token of an echoed prompt.
    token_logprobs: Vec<Option<f32>>,
    tokens: Vec<String>,
    /// Token text to log-probability, the chosen token included.
    #[schema(value_type = Vec<Option<std::collections::BTreeMap<String, f32>>>)]
    top_logprobs: Vec<Option<Map<String, Value>>>,
}

impl CompletionLogprobs {
    /// Adds a token whose text begins at `offset`; returns where the next one begins. Tokens without `logprobs` (the
    /// first of a prompt) get nulls.
    pub(super) fn push(
        &mut self,
        tokenizer: &Tokenizer,
        id: u32,
        logprobs: Option<&TokenLogprobs>,
        offset: usize,
    ) -> usize {
        let text = tokenizer.token_text(id);
        let next = offset + text.chars().count();
        self.text_offset.push(offset);
        self.token_logprobs.push(logprobs.map(|logprobs| finite(logprobs.chosen.logprob)));
        self.top_logprobs.push(logprobs.map(|logprobs| top_map(tokenizer, logprobs)));
        self.tokens.push(text);
        next
    }

    /// Adds an echoed prompt; returns where the first generated token begins.
    pub(super) fn push_prompt(
        &mut self,
        tokenizer: &Tokenizer,
        prompt: &[u32],
        logprobs: &[Option<TokenLogprobs>],
    ) -> usize {
        let logprobs = logprobs.iter().map(Option::as_ref).chain(std::iter::repeat(None));
        prompt.iter().zip(logprobs).fold(0, |offset, (id, logprobs)| self.push(tokenizer, *id, logprobs, offset))
    }
}

fn top_map(tokenizer: &Tokenizer, logprobs: &TokenLogprobs) -> Map<String, Value> {
    let entry = |entry: &TokenLogprob| (tokenizer.token_text(entry.id), Value::from(finite(entry.logprob)));
    logprobs.top.iter().chain([&logprobs.chosen]).map(entry).collect()
}
