//! The sampling side of a sequence: its parameters, its grammar, what it has said so far, and when it ends.

use std::collections::HashMap;

use super::request::{FinishReason, SamplingParams, TokenLogprobs};
use crate::backend::{MAX_TOP_LOGPROBS, RowSampling};
use crate::text::grammar::GrammarState;
use crate::{Error, Result};

/// Logits of a row that a device is told to change, at the most: a row with more is brought to the host, whatever else is in
/// the batch.
pub(super) const MAX_ROW_EDITS: usize = 4096;

/// How often a token of prompt or output occurs in the output.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct TokenCount {
    pub(super) in_output: u32,
}

/// Sampling state of one sequence.
pub(super) struct Generation {
    pub(super) params: SamplingParams,
    /// Resolved: the request's, or a fresh one.
    pub(super) seed: u64,
    /// Kept only when a penalty needs it.
    pub(super) counts: HashMap<u32, TokenCount>,
    pub(super) grammar: Option<GrammarState>,
    /// Why the grammar could not say what comes next.
    pub(super) mask_error: Option<Error>,
    /// Tokens that end the output, where they may not come at first.
    pub(super) early_ends: Vec<u32>,
    /// One entry per prompt token computed, when asked for.
    pub(super) prompt_logprobs: Vec<Option<TokenLogprobs>>,
    /// Whether `Started` was sent.
    pub(super) started: bool,
}

impl Generation {
    /// State before the first token; `eos_token_ids` are the model's.
    pub(super) fn new(mut params: SamplingParams, prompt: &[u32], eos_token_ids: &[u32], fresh_seed: u64) -> Self {
        let mut counts = HashMap::new();
        if has_penalties(&params) {
            for &token in prompt {
                counts.insert(token, TokenCount::default());
            }
        }
        let seed = params.seed.unwrap_or(fresh_seed);
        let grammar = params.grammar.take();
        let early_ends = match params.min_tokens {
            0 => Vec::new(),
            _ => params.stop_token_ids.iter().chain(eos_token_ids).copied().collect(),
        };
        sum_biases(&mut params.logit_bias);
        Self {
            params,
            seed,
            counts,
            grammar,
            mask_error: None,
            early_ends,
            prompt_logprobs: Vec::new(),
            started: false,
        }
    }

    /// Whether prompt positions need logits.
    pub(super) fn wants_prompt_logits(&self) -> bool {
        self.params.prompt_logprobs.is_some() && !self.started
    }

    /// Whether the device chooses the token behind `num_output_tokens` others, and how, given whether it edits logits. The
    /// rest is the host's: typical sampling, more edits or logprobs than a device takes, a grammar without a mask, and what
    /// is behind a prompt of which logprobs are wanted.
    pub(super) fn on_device(&self, num_output_tokens: usize, can_edit: bool) -> Option<RowSampling> {
        let params = &self.params;
        let is_told = params.logprobs.is_none_or(|num_top| can_edit && num_top <= MAX_TOP_LOGPROBS);
        let is_known = is_told && (params.temperature <= 0.0 || params.typical_p >= 1.0);
        let can_change = can_edit && self.num_edits() <= MAX_ROW_EDITS;
        let is_plain = match &self.grammar {
            Some(grammar) => can_change && grammar.mask().is_some(),
            None => can_change || self.takes_logits_as_they_are(num_output_tokens),
        };
        (!self.wants_prompt_logits() && is_known && is_plain).then(|| self.row_sampling(num_output_tokens))
    }

    /// Logits that biases and penalties change.
    pub(super) fn num_edits(&self) -> usize {
        self.params.logit_bias.len() + self.counts.len()
    }

    /// How the token behind `num_output_tokens` others is drawn.
    pub(super) fn row_sampling(&self, num_output_tokens: usize) -> RowSampling {
        let SamplingParams { temperature, top_k, top_p, min_p, .. } = self.params;
        let top_k = u32::try_from(top_k).unwrap_or(0);
        RowSampling { temperature, top_k, top_p, min_p, seed: self.seed, index: num_output_tokens as u64 }
    }

    fn takes_logits_as_they_are(&self, num_output_tokens: usize) -> bool {
        let params = &self.params;
        params.logit_bias.is_empty()
            && params.allowed_token_ids.is_none()
            && params.bad_words.is_empty()
            && num_output_tokens >= params.min_tokens
            && !has_penalties(params)
    }

    /// Takes note of a sampled token.
    pub(super) fn accept(&mut self, token: u32) -> Result<()> {
        if has_penalties(&self.params) {
            self.counts.entry(token).or_default().in_output += 1;
        }
        match &mut self.grammar {
            Some(grammar) => grammar.accept(token),
            None => Ok(()),
        }
    }

    /// Whether `token`, just sampled as output number `num_output_tokens` (1 for the first), ends the output before it
    /// becomes part of it.
    pub(super) fn stops_at(&self, token: u32, eos_token_ids: &[u32], num_output_tokens: usize) -> Option<FinishReason> {
        if num_output_tokens <= self.params.min_tokens {
            return None;
        }
        if self.params.stop_token_ids.contains(&token) {
            return Some(FinishReason::Stop { token: Some(token) });
        }
        (!self.params.ignore_eos && eos_token_ids.contains(&token)).then_some(FinishReason::Stop { token: None })
    }

    /// Whether the output is complete after `num_output_tokens`.
    pub(super) fn is_complete(&self, num_output_tokens: usize) -> Option<FinishReason> {
        if self.grammar.as_ref().is_some_and(GrammarState::is_finished) {
            return Some(FinishReason::Stop { token: None });
        }
        (num_output_tokens >= self.params.max_tokens).then_some(FinishReason::Length)
    }
}

/// Leaves one bias for each token.
fn sum_biases(biases: &mut Vec<(u32, f32)>) {
    biases.sort_by_key(|bias| bias.0);
    biases.dedup_by(|next, sum| {
        if next.0 == sum.0 {
            sum.1 += next.1;
        }
        next.0 == sum.0
    });
}

fn has_penalties(params: &SamplingParams) -> bool {
    params.repetition_penalty != 1.0 || params.frequency_penalty != 0.0 || params.presence_penalty != 0.0
}
