//! What chats and completions share besides sampling: how many answers, in which order, and in what form they return.

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use serde::Deserialize;
use utoipa::ToSchema;

use super::adapters::{AdapterFields, LoraScale, MergedAdapters, adapters_of, check_all};
use super::memory::{CallMemory, MemoryAnswer, MemoryRequest, split_model};
use super::prompt::Truncation;
use super::save::{SavePlan, SavedCube};
use super::unix_time;
use super::usage::UsageCounter;
use crate::engine::AppliedAdapter;
use crate::engine::request::{BACKGROUND, SharedPrefix};
use crate::kv::Level;
use crate::memory::Principal;
use crate::server::App;
use crate::server::cubes::{level_of, request_domain};
use crate::server::error::ApiError;
use crate::server::request_id::RequestId;

/// The fields of a call that are not about its prompt and not about choosing tokens.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(super) struct CallRequest {
    /// A model of `/v1/models`, or `model+adapter:scale+...`; the one there is when left out.
    model: Option<String>,
    /// Choices per prompt.
    #[schema(minimum = 1, maximum = 128)]
    n: Option<usize>,
    /// Send the answer piece by piece as server-sent events.
    stream: Option<bool>,
    /// Only with `stream`.
    stream_options: Option<StreamOptions>,
    /// Lower runs first.
    priority: Option<i32>,
    /// Adapters by number and scale, as llama.cpp takes them; added to those that `model` names.
    #[schema(inline)]
    lora: Option<Vec<LoraScale>>,
    /// An adapter's name, as SGLang takes it.
    lora_path: Option<String>,
    /// Names and scales of adapters, as LoRAX takes them.
    #[schema(inline)]
    merged_adapters: Option<MergedAdapters>,
    /// Cubes that stand before the prompt.
    #[schema(inline)]
    memory: Option<MemoryRequest>,
    /// Only calls with the same salt share cached prompt blocks.
    #[schema(min_length = 1)]
    cache_salt: Option<String>,
    /// Becomes part of the answer's id.
    #[schema(min_length = 1, max_length = 128, pattern = "^[!-~]+$")]
    request_id: Option<String>,
    /// Also return the ids of prompt and output tokens.
    return_token_ids: Option<bool>,
    /// Keep only this many tokens at the end of the prompt; -1 keeps as many as the context holds.
    truncate_prompt_tokens: Option<i64>,
}

/// What a stream carries besides text.
#[derive(Debug, Clone, Copy, Default, Deserialize, ToSchema)]
pub(super) struct StreamOptions {
    /// Send a last chunk with the token counts.
    include_usage: Option<bool>,
    /// Send the token counts with every chunk.
    continuous_usage_stats: Option<bool>,
}

/// A checked [`CallRequest`].
pub(super) struct Call {
    pub(super) head: AnswerHead,
    pub(super) n: usize,
    pub(super) stream: bool,
    pub(super) usage: UsageChunks,
    pub(super) priority: i32,
    /// The cache domain of what is its own.
    pub(super) domain: String,
    pub(super) memory: Option<CallMemory>,
    /// What is kept of prompt and answer.
    pub(super) save: Option<SavePlan>,
    pub(super) adapters: Vec<AppliedAdapter>,
    /// Whether the call named some of them in `memory`.
    tells_adapters: bool,
    pub(super) return_token_ids: bool,
    pub(super) truncation: Option<Truncation>,
}

/// Who calls.
#[derive(Debug, Clone)]
pub(in crate::server) struct Caller {
    pub(super) request_id: RequestId,
    pub(super) principal: Principal,
}

impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = ApiError;

    /// Both were attached before any handler runs.
    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let (request_id, principal) = (parts.extensions.get::<RequestId>(), parts.extensions.get::<Principal>());
        match (request_id.cloned(), principal.cloned()) {
            (Some(request_id), Some(principal)) => Ok(Self { request_id, principal }),
            _ => Err(ApiError::internal("The server failed; its log says why.")),
        }
    }
}

impl Call {
    /// The beginning of a prompt that others share, when its first `num_cube_tokens` tokens are a cube's.
    pub(super) fn shared_prefix(&self, num_cube_tokens: usize) -> Option<SharedPrefix> {
        self.memory.as_ref().and_then(|memory| memory.shared_prefix(num_cube_tokens))
    }

    /// Whether it names a cube that leaves nothing behind in memory.
    pub(super) fn is_erased(&self) -> bool {
        self.memory.iter().flat_map(CallMemory::cubes).any(|cube| cube.governance.erase_on_free)
    }

    /// How hard the blocks of its cubes are held on to: as those of the one that is held on to hardest.
    pub(super) fn level(&self) -> Level {
        let levels = self.memory.iter().flat_map(CallMemory::cubes).map(|cube| level_of(cube.governance.hold()));
        levels.max().unwrap_or_default()
    }

    /// `memory` of the answer, when the call said anything about it.
    pub(super) fn memory_answer(&self, usage: &UsageCounter, saved: Option<SavedCube>) -> Option<MemoryAnswer> {
        let is_wanted = self.memory.is_some() || saved.is_some() || self.tells_adapters;
        is_wanted.then(|| MemoryAnswer::new(self.memory.as_ref(), &self.adapters, usage, saved))
    }
}

/// Where a stream carries token counts.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct UsageChunks {
    pub(super) at_end: bool,
    pub(super) in_every_chunk: bool,
}

/// What every answer and every chunk begins with.
pub(super) struct AnswerHead {
    pub(super) id: String,
    pub(super) created: u64,
    pub(super) model: String,
}

impl CallRequest {
    /// Checks the fields; `id_prefix` and the request's id make the answer's id.
    pub(super) fn check(mut self, app: &App, id_prefix: &str, caller: &Caller) -> Result<Call, ApiError> {
        let (name, cubes) = split_model(self.model.as_deref().unwrap_or_default());
        let fields = AdapterFields {
            lora: self.lora.unwrap_or_default(),
            lora_path: self.lora_path,
            merged: self.merged_adapters,
            referenced: self.memory.as_mut().map(MemoryRequest::take_adapters).unwrap_or_default(),
        };
        let mut tells_adapters = !fields.referenced.is_empty();
        let mut adapters = adapters_of(app, &caller.principal, name, fields)?;
        let forbids_merge = self.memory.as_ref().is_some_and(MemoryRequest::forbids_merge);
        let salt = check_salt(self.cache_salt)?;
        let domain = request_domain(app, &caller.principal, salt.as_deref());
        let save = self.memory.as_mut().and_then(MemoryRequest::take_save);
        let (memory, in_cubes) = CallMemory::resolve(self.memory, cubes, app, &caller.principal, &domain)?;
        tells_adapters |= !in_cubes.is_empty();
        adapters.extend(in_cubes);
        check_all(&adapters)?;
        if forbids_merge {
            adapters.iter_mut().for_each(AppliedAdapter::forbid_merge);
        }
        let sources = memory.iter().flat_map(CallMemory::cubes);
        let save = save.map(|save| save.check(app, &caller.principal, sources)).transpose()?;
        let stream = self.stream.unwrap_or(false);
        if self.stream_options.is_some() && !stream {
            let message = "stream_options can only be given together with stream=true.";
            return Err(ApiError::invalid_field("stream_options", message));
        }
        let options = self.stream_options.unwrap_or_default();
        let include_usage = options.include_usage.unwrap_or(false);
        let request_id = request_id(self.request_id, &caller.request_id)?;
        let truncation = Truncation::new(self.truncate_prompt_tokens, app.model.engine.info().max_model_len)?;
        if truncation.is_some() && memory.is_some() {
            let message = "truncate_prompt_tokens would cut off the cubes, which stand first.";
            return Err(ApiError::invalid_field("truncate_prompt_tokens", message));
        }
        Ok(Call {
            head: AnswerHead {
                id: format!("{id_prefix}-{}", request_id.0),
                created: unix_time(),
                model: self.model.unwrap_or_else(|| app.model.name().to_owned()),
            },
            n: check_n(self.n, app.config.request_limits.max_n)?,
            stream,
            usage: UsageChunks {
                at_end: include_usage,
                in_every_chunk: include_usage && options.continuous_usage_stats.unwrap_or(false),
            },
            priority: self.priority.unwrap_or(0).min(BACKGROUND - 1),
            domain,
            memory,
            save,
            adapters,
            tells_adapters,
            return_token_ids: self.return_token_ids.unwrap_or(false),
            truncation,
        })
    }
}

fn check_n(n: Option<usize>, max: usize) -> Result<usize, ApiError> {
    match n.unwrap_or(1) {
        n if (1..=max).contains(&n) => Ok(n),
        n => Err(ApiError::invalid_field("n", format!("n must be between 1 and {max}, got {n}."))),
    }
}

fn check_salt(salt: Option<String>) -> Result<Option<String>, ApiError> {
    match salt {
        Some(salt) if salt.is_empty() => Err(ApiError::invalid_field("cache_salt", "cache_salt must not be empty.")),
        salt => Ok(salt),
    }
}

fn request_id(from_body: Option<String>, from_header: &RequestId) -> Result<RequestId, ApiError> {
    let Some(text) = from_body else { return Ok(from_header.clone()) };
    RequestId::from_client(&text).ok_or_else(|| {
        ApiError::invalid_field("request_id", "request_id must be 1 to 128 visible ASCII characters without spaces.")
    })
}
