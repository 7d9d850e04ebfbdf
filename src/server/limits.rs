//! The bounds of one request and of one connection. Every list a client can send has one.

use std::time::Duration;

use super::error::ApiError;

/// What one request may contain.
#[derive(Debug, Clone)]
pub struct RequestLimits {
    /// Bytes of a body.
    pub max_body_bytes: usize,
    /// Bytes of a cube's file.
    pub max_import_bytes: u64,
    /// Bodies longer than this are parsed and tokenized on another thread, so that running streams do not wait for them.
    pub max_inline_bytes: usize,
    /// Completions per prompt.
    pub max_n: usize,
    /// Prompts or inputs per call.
    pub max_prompts: usize,
    /// Sequences per call: prompts times `n`.
    pub max_sequences: usize,
    /// Stop strings.
    pub max_stop: usize,
    /// Characters of a stop string or a bad word.
    pub max_stop_chars: usize,
    /// Entries of `logit_bias`, `stop_token_ids` and `bad_words`.
    pub max_list_entries: usize,
    /// Alternatives reported per token.
    pub max_logprobs: usize,
    /// Messages in a chat.
    pub max_messages: usize,
    /// Tools in a chat.
    pub max_tools: usize,
}

impl Default for RequestLimits {
    fn default() -> Self {
        Self {
            max_body_bytes: 8 << 20,
            max_import_bytes: 4 << 30,
            max_inline_bytes: 32 << 10,
            max_n: 128,
            max_prompts: 256,
            max_sequences: 256,
            max_stop: 16,
            max_stop_chars: 1000,
            max_list_entries: 1024,
            max_logprobs: 20,
            max_messages: 4096,
            max_tools: 128,
        }
    }
}

/// What one client may hold.
#[derive(Debug, Clone)]
pub struct ConnectionLimits {
    /// Connections open at once; further ones wait in the listener's backlog.
    pub max_connections: usize,
    /// Header lines of a request.
    pub max_headers: usize,
    /// Bytes of a request line with its headers.
    pub max_header_bytes: usize,
    /// Time for a request's headers to arrive.
    pub header_timeout: Duration,
    /// Time for a request's body to arrive.
    pub body_timeout: Duration,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        Self {
            max_connections: 4096,
            max_headers: 100,
            max_header_bytes: 64 << 10,
            header_timeout: Duration::from_secs(30),
            body_timeout: Duration::from_secs(60),
        }
    }
}

/// Refuses a list that is longer than its limit.
pub(super) fn check_len(field: &str, len: usize, max: usize) -> Result<(), ApiError> {
    if len <= max {
        return Ok(());
    }
    Err(ApiError::invalid_field(field, format!("{field} has {len} entries; at most {max} are allowed.")))
}
