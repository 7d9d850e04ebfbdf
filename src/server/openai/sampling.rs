//! The request fields that say how tokens are chosen, checked and turned into [`SamplingParams`].
//!
//! Ranges are OpenAI's where it has the field, vLLM's otherwise. What a request leaves out comes from the model's own
//! `generation_config.json`.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use serde::Deserialize;
use utoipa::ToSchema;

use super::prompt::check_token_ids;
use crate::engine::request::SamplingParams;
use crate::server::config::ServedModel;
use crate::server::error::ApiError;
use crate::server::limits::{RequestLimits, check_len};

/// How tokens are chosen; the same for chats and completions.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(super) struct SamplingRequest {
    /// 0 is greedy.
    #[schema(minimum = 0, maximum = 2)]
    temperature: Option<f32>,
    /// Keep the likeliest tokens that together reach this probability.
    #[schema(minimum = 0, maximum = 1)]
    top_p: Option<f32>,
    /// Keep this many of the likeliest tokens; 0 or -1 keeps all.
    #[schema(minimum = -1)]
    top_k: Option<i64>,
    /// Drop tokens less likely than this times the likeliest.
    #[schema(minimum = 0, maximum = 1)]
    min_p: Option<f32>,
    /// Locally typical sampling.
    #[schema(exclusive_minimum = 0, maximum = 1)]
    typical_p: Option<f32>,
    /// Above 1 discourages tokens seen in prompt or output.
    #[schema(exclusive_minimum = 0)]
    repetition_penalty: Option<f32>,
    /// Subtracted per occurrence in the output.
    #[schema(minimum = -2, maximum = 2)]
    frequency_penalty: Option<f32>,
    /// Subtracted once for tokens in the output.
    #[schema(minimum = -2, maximum = 2)]
    presence_penalty: Option<f32>,
    /// Token id to what is added to its logit, -100 to 100.
    logit_bias: Option<BTreeMap<String, f32>>,
    /// Makes the output reproducible.
    seed: Option<i64>,
    /// Token ids that end the output.
    stop_token_ids: Option<Vec<u32>>,
    /// No end before this many tokens.
    min_tokens: Option<usize>,
    /// Go on after the end-of-sequence token.
    ignore_eos: Option<bool>,
    /// Log-probabilities of the prompt's tokens, with this many alternatives.
    #[schema(minimum = 0, maximum = 20)]
    prompt_logprobs: Option<i64>,
    /// Only these tokens may be chosen.
    #[schema(min_items = 1)]
    allowed_token_ids: Option<Vec<u32>>,
    /// Words that must not appear.
    bad_words: Option<Vec<String>>,
}

impl SamplingRequest {
    /// The parameters without those that depend on the endpoint: `max_tokens`, `logprobs` and the grammar.
    pub(super) fn into_params(self, model: &ServedModel, limits: &RequestLimits) -> Result<SamplingParams, ApiError> {
        let defaults = model.default_sampling.clone();
        let vocab_size = model.engine.info().vocab_size;
        let stop_token_ids = self.stop_token_ids.unwrap_or_default();
        check_len("stop_token_ids", stop_token_ids.len(), limits.max_list_entries)?;
        check_token_ids("stop_token_ids", &stop_token_ids, vocab_size)?;
        if let Some(allowed) = &self.allowed_token_ids {
            check_allowed(allowed, vocab_size)?;
        }
        Ok(SamplingParams {
            temperature: within("temperature", self.temperature, 0.0..=2.0)?.unwrap_or(defaults.temperature),
            // OpenAI allows 0, which leaves the likeliest token.
            top_p: within("top_p", self.top_p, 0.0..=1.0)?.map_or(defaults.top_p, |p| p.max(f32::MIN_POSITIVE)),
            top_k: self.top_k.map(top_k).transpose()?.unwrap_or(defaults.top_k),
            min_p: within("min_p", self.min_p, 0.0..=1.0)?.unwrap_or(defaults.min_p),
            typical_p: within("typical_p", self.typical_p, f32::MIN_POSITIVE..=1.0)?.unwrap_or(defaults.typical_p),
            repetition_penalty: within("repetition_penalty", self.repetition_penalty, f32::MIN_POSITIVE..=100.0)?
                .unwrap_or(defaults.repetition_penalty),
            frequency_penalty: within("frequency_penalty", self.frequency_penalty, -2.0..=2.0)?
                .unwrap_or(defaults.frequency_penalty),
            presence_penalty: within("presence_penalty", self.presence_penalty, -2.0..=2.0)?
                .unwrap_or(defaults.presence_penalty),
            logit_bias: logit_bias(self.logit_bias, vocab_size, limits)?,
            seed: self.seed.map(i64::cast_unsigned).or(defaults.seed),
            stop_token_ids: defaults.stop_token_ids.into_iter().chain(stop_token_ids).collect(),
            min_tokens: self.min_tokens.unwrap_or(defaults.min_tokens),
            ignore_eos: self.ignore_eos.unwrap_or(defaults.ignore_eos),
            max_tokens: defaults.max_tokens,
            logprobs: None,
            prompt_logprobs: num_logprobs("prompt_logprobs", self.prompt_logprobs, limits)?,
            allowed_token_ids: self.allowed_token_ids,
            bad_words: bad_words(self.bad_words.unwrap_or_default(), model, limits)?,
            grammar: None,
        })
    }
}

fn within(field: &str, value: Option<f32>, range: RangeInclusive<f32>) -> Result<Option<f32>, ApiError> {
    match value {
        Some(value) if !range.contains(&value) => {
            Err(ApiError::invalid_field(field, out_of_range(field, value, &range)))
        }
        value => Ok(value),
    }
}

fn out_of_range(field: &str, value: f32, range: &RangeInclusive<f32>) -> String {
    let end = range.end();
    if *range.start() == f32::MIN_POSITIVE {
        return format!("{field} must be above 0 and at most {end}, got {value}.");
    }
    format!("{field} must be between {} and {end}, got {value}.", range.start())
}

fn top_k(value: i64) -> Result<usize, ApiError> {
    if value == -1 {
        return Ok(0);
    }
    usize::try_from(value).map_err(|_| {
        ApiError::invalid_field("top_k", format!("top_k must be -1 or 0 (all) or at least 1, got {value}."))
    })
}

/// A number of alternatives per token.
pub(super) fn num_logprobs(field: &str, value: Option<i64>, limits: &RequestLimits) -> Result<Option<usize>, ApiError> {
    let max = limits.max_logprobs;
    let check = |value: i64| {
        usize::try_from(value)
            .ok()
            .filter(|num| *num <= max)
            .ok_or_else(|| ApiError::invalid_field(field, format!("{field} must be between 0 and {max}, got {value}.")))
    };
    value.map(check).transpose()
}

fn logit_bias(
    bias: Option<BTreeMap<String, f32>>,
    vocab_size: usize,
    limits: &RequestLimits,
) -> Result<Vec<(u32, f32)>, ApiError> {
    let bias = bias.unwrap_or_default();
    check_len("logit_bias", bias.len(), limits.max_list_entries)?;
    bias.into_iter().map(|(token, bias)| bias_entry(&token, bias, vocab_size)).collect()
}

fn bias_entry(token: &str, bias: f32, vocab_size: usize) -> Result<(u32, f32), ApiError> {
    let id = token.parse().ok().filter(|id| (*id as usize) < vocab_size).ok_or_else(|| {
        let message = format!("logit_bias: {token:?} is not a token id below {vocab_size}.");
        ApiError::invalid_field("logit_bias", message)
    })?;
    within("logit_bias", Some(bias), -100.0..=100.0)?;
    Ok((id, bias))
}

fn check_allowed(allowed: &[u32], vocab_size: usize) -> Result<(), ApiError> {
    if allowed.is_empty() {
        return Err(ApiError::invalid_field("allowed_token_ids", "allowed_token_ids must not be empty."));
    }
    check_len("allowed_token_ids", allowed.len(), vocab_size)?;
    check_token_ids("allowed_token_ids", allowed, vocab_size)
}

/// Each word as it is spelled at the start of a text and after a space.
fn bad_words(words: Vec<String>, model: &ServedModel, limits: &RequestLimits) -> Result<Vec<Vec<u32>>, ApiError> {
    check_len("bad_words", words.len(), limits.max_list_entries)?;
    let mut runs: Vec<Vec<u32>> = Vec::with_capacity(2 * words.len());
    for word in &words {
        if word.trim().is_empty() || word.chars().count() > limits.max_stop_chars {
            let max = limits.max_stop_chars;
            let message = format!("bad_words must be texts of 1 to {max} characters that are not only spaces.");
            return Err(ApiError::invalid_field("bad_words", message));
        }
        let word = word.trim_start();
        for spelling in [word.to_owned(), format!(" {word}")] {
            let run = model.tokenizer.encode(&spelling, false)?;
            if !run.is_empty() && !runs.contains(&run) {
                runs.push(run);
            }
        }
    }
    Ok(runs)
}
