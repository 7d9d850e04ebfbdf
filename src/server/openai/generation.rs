//! A call as the engine sees it: one request per choice, and the merged events of all of them.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures_core::Stream;
use futures_util::stream::SelectAll;
use serde::Serialize;
use utoipa::ToSchema;

use super::call::Call;
use super::choice::{Choice, ChoiceEvent, ChoiceStream};
use super::prompt::{Prompts, check_prompt_len};
use super::save::{Save, SavePlan};
use crate::engine::request::{GenerateRequest, Piece, SamplingParams, Task};
use crate::server::error::ApiError;
use crate::server::{App, AppRef, CallGuard};
use crate::text::DetokenizerOptions;

/// What to run. Choice `index` belongs to prompt `index / n`.
pub(super) struct Generation {
    /// Checked against the model's vocabulary and context.
    pub(super) prompts: Vec<Vec<u32>>,
    /// The tokens at the beginning of every prompt that are a cube's.
    num_cube_tokens: usize,
    /// Parts of every prompt whose KV is moved there.
    pieces: Vec<Piece>,
    /// Choices per prompt.
    pub(super) n: usize,
    /// The same for all, but for the seed.
    pub(super) sampling: SamplingParams,
    /// How tokens become text.
    pub(super) text: DetokenizerOptions,
}

impl Generation {
    /// Cuts the prompts as asked and refuses what the engine cannot hold.
    pub(super) fn new(
        field: &str,
        Prompts { mut prompts, num_cube_tokens, pieces }: Prompts,
        call: &Call,
        sampling: SamplingParams,
        text: DetokenizerOptions,
        app: &App,
    ) -> Result<Self, ApiError> {
        let limits = &app.config.request_limits;
        if prompts.is_empty() {
            return Err(ApiError::invalid_field(field, format!("{field} must not be empty.")));
        }
        if prompts.len() * call.n > limits.max_sequences {
            let message = format!("n times the number of prompts must be at most {}.", limits.max_sequences);
            return Err(ApiError::invalid_field("n", message));
        }
        if !pieces.is_empty() && sampling.prompt_logprobs.is_some() {
            let message = "Log-probabilities of a prompt need all of it computed; use memory.compose=\"text\".";
            return Err(ApiError::invalid_field("prompt_logprobs", message));
        }
        let max_model_len = app.model.engine.info().max_model_len;
        check_min_tokens(&sampling, max_model_len)?;
        for prompt in &mut prompts {
            if let Some(truncation) = call.truncation {
                truncation.apply(prompt);
            }
            check_prompt_len(field, prompt, max_model_len)?;
        }
        let generation = Self { prompts, num_cube_tokens, pieces, n: call.n, sampling, text };
        SavePlan::check(&generation, call)?;
        Ok(generation)
    }

    /// Whether the KV of its prompts is not that of computing them.
    pub(super) fn is_composed(&self) -> bool {
        !self.pieces.is_empty()
    }

    pub(super) fn num_cube_tokens(&self) -> usize {
        self.num_cube_tokens
    }

    pub(super) fn num_choices(&self) -> usize {
        self.prompts.len() * self.n
    }

    pub(super) fn num_prompt_tokens(&self) -> usize {
        self.prompts.iter().map(Vec::len).sum()
    }

    /// The prompt of a choice.
    pub(super) fn prompt_of(&self, index: usize) -> &[u32] {
        &self.prompts[index / self.n]
    }

    /// Queues every choice. If one is refused, those before it are cancelled.
    pub(super) fn submit(&self, app: &AppRef, call: &Call) -> Result<Outputs, ApiError> {
        let guard = app.begin_call()?;
        let mut streams = SelectAll::new();
        for index in 0..self.num_choices() {
            let stream = app.model.engine.submit(self.request(index, call))?;
            streams.push(Choice::new(index, app, self, stream).into_stream());
        }
        Ok(Outputs { streams, save: Save::of(app, self, call), guard: Some(guard) })
    }

    /// The prompts in the form of the render endpoints.
    pub(super) fn into_rendered(self, call: &Call) -> Vec<RenderedPrompt> {
        let render = |token_ids| RenderedPrompt { request_id: call.head.id.clone(), token_ids };
        self.prompts.into_iter().map(render).collect()
    }

    fn request(&self, index: usize, call: &Call) -> GenerateRequest {
        let mut sampling = self.sampling.clone();
        sampling.max_tokens = sampling.max_tokens.max(1);
        sampling.seed = sampling.seed.map(|seed| seed.wrapping_add((index % self.n) as u64));
        GenerateRequest {
            id: format!("{}-{index}", call.head.id),
            prompt: self.prompt_of(index).to_vec(),
            task: Task::Generate(Box::new(sampling)),
            priority: call.priority,
            domain: call.domain.clone(),
            shared_prefix: call.shared_prefix(self.num_cube_tokens),
            adapters: call.adapters.clone(),
            pieces: self.pieces.clone(),
            level: call.level(),
            erase_on_free: call.is_erased(),
        }
    }
}

fn check_min_tokens(sampling: &SamplingParams, max_model_len: usize) -> Result<(), ApiError> {
    let max = sampling.max_tokens.min(max_model_len);
    if sampling.min_tokens <= max {
        return Ok(());
    }
    let message =
        format!("min_tokens must be at most {max}, the most tokens there can be, got {}.", sampling.min_tokens);
    Err(ApiError::invalid_field("min_tokens", message))
}

/// A prompt exactly as the engine would get it.
#[derive(Serialize, ToSchema)]
pub(in crate::server) struct RenderedPrompt {
    request_id: String,
    token_ids: Vec<u32>,
}

/// The events of all choices as they come, and behind them what became of `memory.save`. Dropping it cancels what still
/// runs.
pub(super) struct Outputs {
    streams: SelectAll<ChoiceStream>,
    save: Option<Save>,
    guard: Option<CallGuard>,
}

impl Stream for Outputs {
    type Item = (usize, ChoiceEvent);

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Self { streams, save, guard } = self.get_mut();
        if let Some((index, event)) = ready!(Pin::new(streams).poll_next(context)) {
            save.take_if(|save| !save.absorb(&event));
            return Poll::Ready(Some((index, event)));
        }
        let Some(running) = save else { return Poll::Ready(None) };
        let saved = ready!(running.poll(guard, context));
        *save = None;
        Poll::Ready(Some((0, ChoiceEvent::Saved(Box::new(saved)))))
    }
}
