//! OpenAI's endpoints, with vLLM's additions: JSON in, engine requests, JSON out.

pub(super) mod chat;
pub(super) mod completions;
pub(super) mod embeddings;
pub(super) mod models;

mod adapters;
mod call;
mod chat_stream;
mod choice;
mod completion_logprobs;
mod completion_stream;
mod generation;
mod link;
mod logprobs;
mod memory;
mod messages;
mod prompt;
mod sampling;
mod save;
mod stop;
mod structured;
mod tool_reader;
mod tools;
mod usage;

pub(super) use self::messages::ChatPromptRequest;
pub(super) use self::prompt::check_token_ids;

/// Identifies the build in answers, as OpenAI's `system_fingerprint` does.
const SYSTEM_FINGERPRINT: &str = concat!("mneme-", env!("CARGO_PKG_VERSION"));

/// Seconds since 1970.
fn unix_time() -> u64 {
    let now = std::time::SystemTime::now();
    now.duration_since(std::time::UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs())
}
