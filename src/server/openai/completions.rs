//! `/v1/completions`: text or tokens in, their continuation out.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::SYSTEM_FINGERPRINT;
use super::call::{Call, CallRequest, Caller};
use super::choice::{FinishKind, FinishedChoice, StopReason, collect};
use super::completion_logprobs::CompletionLogprobs;
use super::completion_stream::CompletionStream;
use super::generation::{Generation, RenderedPrompt};
use super::logprobs::{PromptLogprobs, prompt_logprobs};
use super::memory::MemoryAnswer;
use super::prompt::PromptInput;
use super::sampling::{SamplingRequest, num_logprobs};
use super::stop::StopRequest;
use super::structured::FormatRequest;
use super::usage::{Usage, UsageCounter};
use crate::server::config::ServedModel;
use crate::server::error::{ApiError, ErrorBody};
use crate::server::json::JsonBody;
use crate::server::{App, AppRef, sse};

/// OpenAI's default, which vLLM keeps.
const DEFAULT_MAX_TOKENS: usize = 16;

/// The fields only completions have.
#[derive(Debug, Deserialize, ToSchema)]
struct PromptRequest {
    /// What to continue.
    prompt: PromptInput,
    /// At most this many tokens; clamped to what the context leaves. 0 only reads the prompt.
    max_tokens: Option<usize>,
    /// Log-probabilities of the chosen token and of this many others.
    #[schema(minimum = 0, maximum = 20)]
    logprobs: Option<i64>,
    /// Begin the text with the prompt.
    echo: Option<bool>,
    /// Not supported.
    suffix: Option<String>,
    /// Add the tokens that texts begin with (BOS); on unless turned off.
    add_special_tokens: Option<bool>,
}

/// Body of `POST /v1/completions`; fields not listed are ignored.
#[derive(ToSchema)]
#[expect(dead_code, reason = "documents the body, which is read part by part")]
pub(in crate::server) struct CompletionRequest {
    #[schema(inline)]
    #[serde(flatten)]
    prompt: PromptRequest,
    #[serde(flatten)]
    call: CallRequest,
    #[serde(flatten)]
    sampling: SamplingRequest,
    #[serde(flatten)]
    stop: StopRequest,
    #[serde(flatten)]
    format: FormatRequest,
}

/// Answer of `POST /v1/completions`.
#[derive(Serialize, ToSchema)]
pub(in crate::server) struct CompletionResponse<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'static str,
    choices: Vec<CompletionChoice>,
    usage: Usage,
    #[serde(skip_serializing_if = "Option::is_none")]
    memory: Option<MemoryAnswer>,
}

/// One continuation.
#[derive(Serialize, ToSchema)]
struct CompletionChoice {
    index: usize,
    text: String,
    logprobs: Option<CompletionLogprobs>,
    finish_reason: FinishKind,
    stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Option<Object>>>)]
    prompt_logprobs: Option<PromptLogprobs>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
}

/// A checked call.
pub(super) struct CompletionPlan {
    pub(super) call: Call,
    pub(super) generation: Generation,
    pub(super) show: CompletionShow,
}

/// What the answer shows besides generated text.
#[derive(Debug, Clone, Copy)]
pub(super) struct CompletionShow {
    pub(super) echo: bool,
    pub(super) logprobs: bool,
    pub(super) prompt_logprobs: bool,
}

/// Continues prompts.
#[utoipa::path(
    post,
    path = "/v1/completions",
    request_body = CompletionRequest,
    responses((status = 200, body = CompletionResponse), (status = "4XX", body = ErrorBody))
)]
pub(in crate::server) async fn create(
    State(app): State<AppRef>,
    caller: Caller,
    body: JsonBody,
) -> Result<Response, ApiError> {
    let plan = app.prepare(body, move |app, body| plan(app, body, &caller)).await?;
    let outputs = plan.generation.submit(&app, &plan.call)?;
    if plan.call.stream {
        let writer = CompletionStream::new(&app, plan);
        return Ok(sse::response(outputs, writer, app.config.keep_alive_interval));
    }
    let choices = collect(outputs, plan.generation.num_choices()).await?;
    plan.respond(&app.model, choices)
}

/// The prompts as token ids, without running the model.
#[utoipa::path(
    post,
    path = "/v1/completions/render",
    request_body = CompletionRequest,
    responses((status = 200, body = Vec<RenderedPrompt>), (status = "4XX", body = ErrorBody))
)]
pub(in crate::server) async fn render(
    State(app): State<AppRef>,
    caller: Caller,
    body: JsonBody,
) -> Result<Json<Vec<RenderedPrompt>>, ApiError> {
    let plan = app.prepare(body, move |app, body| plan(app, body, &caller)).await?;
    Ok(Json(plan.generation.into_rendered(&plan.call)))
}

fn plan(app: &App, body: &JsonBody, caller: &Caller) -> Result<CompletionPlan, ApiError> {
    let limits = &app.config.request_limits;
    let call = body.parse::<CallRequest>()?.check(app, "cmpl", caller)?;
    let request = body.parse::<PromptRequest>()?;
    if request.suffix.as_ref().is_some_and(|suffix| !suffix.is_empty()) {
        return Err(ApiError::invalid_field("suffix", "suffix is not supported: the model continues text only."));
    }
    let mut sampling = body.parse::<SamplingRequest>()?.into_params(&app.model, limits)?;
    let text = body.parse::<StopRequest>()?.into_options(limits)?;
    let constraint = body.parse::<FormatRequest>()?.constraint(limits)?;
    let show = CompletionShow {
        echo: request.echo.unwrap_or(false),
        logprobs: request.logprobs.is_some(),
        prompt_logprobs: sampling.prompt_logprobs.is_some(),
    };
    if show.prompt_logprobs && call.stream {
        let message = "prompt_logprobs are not available when stream=true.";
        return Err(ApiError::invalid_field("prompt_logprobs", message));
    }
    sampling.max_tokens = request.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS);
    sampling.logprobs = num_logprobs("logprobs", request.logprobs, limits)?;
    if show.echo {
        sampling.prompt_logprobs = sampling.prompt_logprobs.max(sampling.logprobs);
    }
    sampling.grammar = constraint.map(|constraint| constraint.compile(&app.model)).transpose()?;
    let add_special_tokens = request.add_special_tokens.unwrap_or(true);
    let prompts = request.prompt.tokenize_behind("prompt", app, call.memory.as_ref(), add_special_tokens)?;
    let generation = Generation::new("prompt", prompts, &call, sampling, text, app)?;
    Ok(CompletionPlan { call, generation, show })
}

impl CompletionPlan {
    fn respond(&self, model: &ServedModel, mut choices: Vec<FinishedChoice>) -> Result<Response, ApiError> {
        let saved = choices.first_mut().and_then(|choice| choice.saved.take()).map(|saved| *saved);
        let mut usage = UsageCounter::new(&self.generation);
        for (index, choice) in choices.iter().enumerate() {
            usage.add_started(index, choice.cached_tokens, &choice.reuse);
            usage.add_tokens(choice.token_ids.len());
        }
        let choices = choices.into_iter().enumerate().map(|(index, choice)| self.choice(model, index, choice));
        let choices = choices.collect::<Result<_, _>>()?;
        let head = &self.call.head;
        let response = CompletionResponse {
            id: &head.id,
            object: "text_completion",
            created: head.created,
            model: &head.model,
            system_fingerprint: SYSTEM_FINGERPRINT,
            choices,
            usage: usage.usage(),
            memory: self.call.memory_answer(&usage, saved),
        };
        Ok(Json(response).into_response())
    }

    fn choice(&self, model: &ServedModel, index: usize, choice: FinishedChoice) -> Result<CompletionChoice, ApiError> {
        let prompt = self.generation.prompt_of(index);
        let logprobs = self.show.logprobs.then(|| self.logprobs(model, prompt, &choice));
        let ids = self.call.return_token_ids;
        Ok(CompletionChoice {
            index,
            logprobs,
            text: if self.show.echo { self.echo_text(model, index)? + &choice.text } else { choice.text },
            finish_reason: choice.finish.reason,
            stop_reason: choice.finish.stop_reason,
            prompt_logprobs: self
                .show
                .prompt_logprobs
                .then(|| prompt_logprobs(&model.tokenizer, &choice.prompt_logprobs)),
            prompt_token_ids: ids.then(|| prompt.to_vec()),
            token_ids: ids.then_some(choice.token_ids),
        })
    }

    fn logprobs(&self, model: &ServedModel, prompt: &[u32], choice: &FinishedChoice) -> CompletionLogprobs {
        let mut lists = CompletionLogprobs::default();
        let mut offset = 0;
        if self.show.echo {
            offset = lists.push_prompt(&model.tokenizer, prompt, &choice.prompt_logprobs);
        }
        for (id, logprobs) in choice.token_ids.iter().zip(&choice.logprobs) {
            offset = lists.push(&model.tokenizer, *id, Some(logprobs), offset);
        }
        lists
    }

    /// The prompt as text, as a choice's text begins with it.
    pub(super) fn echo_text(&self, model: &ServedModel, index: usize) -> Result<String, ApiError> {
        Ok(model.tokenizer.decode(self.generation.prompt_of(index), self.generation.text.skip_special)?)
    }
}
