//! `usage`: tokens read and written.

use serde::Serialize;
use utoipa::ToSchema;

use super::generation::Generation;
use crate::engine::request::Reuse;

/// Tokens of a call.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
pub(super) struct Usage {
    /// Of all prompts, each counted once.
    prompt_tokens: usize,
    /// Of all choices.
    completion_tokens: usize,
    /// The sum of both.
    total_tokens: usize,
    /// Where the prompt's KV came from.
    prompt_tokens_details: PromptTokensDetails,
}

/// Details of the prompt's tokens.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
pub(super) struct PromptTokensDetails {
    /// Those whose KV was not computed for this call.
    cached_tokens: usize,
    /// Of these, found on the device.
    device_cached_tokens: usize,
    /// Brought up from the host's memory.
    host_cached_tokens: usize,
    /// Brought up from the vault.
    storage_cached_tokens: usize,
}

/// Counts the tokens of a call while its choices run.
pub(super) struct UsageCounter {
    n: usize,
    prompt_tokens: usize,
    completion_tokens: usize,
    cached_tokens: usize,
    reuse: Reuse,
}

impl UsageCounter {
    pub(super) fn new(generation: &Generation) -> Self {
        let prompt_tokens = generation.num_prompt_tokens();
        Self { n: generation.n, prompt_tokens, completion_tokens: 0, cached_tokens: 0, reuse: Reuse::default() }
    }

    /// Counts a choice's prompt. The choices of one prompt share its blocks, so only the first one's hits say what the
    /// cache held before this call.
    pub(super) fn add_started(&mut self, index: usize, cached_tokens: usize, reuse: &Reuse) {
        if index.is_multiple_of(self.n) {
            self.cached_tokens += cached_tokens;
            self.reuse.add(reuse);
        }
    }

    /// Where the KV of the prompts came from.
    pub(super) fn reuse(&self) -> &Reuse {
        &self.reuse
    }

    /// Prompt tokens that were computed.
    pub(super) fn num_recomputed_tokens(&self) -> usize {
        self.prompt_tokens - self.cached_tokens.min(self.prompt_tokens)
    }

    pub(super) fn add_tokens(&mut self, num_tokens: usize) {
        self.completion_tokens += num_tokens;
    }

    pub(super) fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.prompt_tokens,
            completion_tokens: self.completion_tokens,
            total_tokens: self.prompt_tokens + self.completion_tokens,
            prompt_tokens_details: PromptTokensDetails {
                cached_tokens: self.cached_tokens,
                device_cached_tokens: self.reuse.device_tokens,
                host_cached_tokens: self.reuse.host_tokens,
                storage_cached_tokens: self.reuse.disk_tokens,
            },
        }
    }
}
