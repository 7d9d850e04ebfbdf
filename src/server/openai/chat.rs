//! `/v1/chat/completions`: a conversation in, the assistant's next message out.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::SYSTEM_FINGERPRINT;
use super::call::{Call, CallRequest, Caller};
use super::chat_stream::ChatStream;
use super::choice::{FinishKind, FinishedChoice, StopReason, collect};
use super::generation::{Generation, RenderedPrompt};
use super::logprobs::{ChatLogprobs, PromptLogprobs, prompt_logprobs};
use super::memory::MemoryAnswer;
use super::messages::ChatPromptRequest;
use super::sampling::{SamplingRequest, num_logprobs};
use super::stop::StopRequest;
use super::structured::FormatRequest;
use super::tool_reader::{MessageDelta, ToolReader};
use super::tools::{ToolCall, ToolsRequest};
use super::usage::{Usage, UsageCounter};
use crate::server::config::ServedModel;
use crate::server::error::{ApiError, ErrorBody};
use crate::server::json::JsonBody;
use crate::server::limits::RequestLimits;
use crate::server::{App, AppRef, sse};
use crate::text::tool_calls::ToolFormat;

/// The fields only chats have, besides messages and tools.
#[derive(Debug, Deserialize, ToSchema)]
struct ChatOutputRequest {
    /// At most this many tokens; clamped to what the context leaves.
    max_completion_tokens: Option<usize>,
    /// The older name of `max_completion_tokens`.
    max_tokens: Option<usize>,
    /// Report the log-probability of every token.
    logprobs: Option<bool>,
    /// And of this many others; only with `logprobs`.
    #[schema(minimum = 0, maximum = 20)]
    top_logprobs: Option<i64>,
}

/// Body of `POST /v1/chat/completions`; fields not listed are ignored.
#[derive(ToSchema)]
#[expect(dead_code, reason = "documents the body, which is read part by part")]
pub(in crate::server) struct ChatRequest {
    #[serde(flatten)]
    prompt: ChatPromptRequest,
    #[serde(flatten)]
    output: ChatOutputRequest,
    #[serde(flatten)]
    call: CallRequest,
    #[serde(flatten)]
    sampling: SamplingRequest,
    #[serde(flatten)]
    stop: StopRequest,
    #[serde(flatten)]
    format: FormatRequest,
    #[serde(flatten)]
    tools: ToolsRequest,
}

/// Answer of `POST /v1/chat/completions`.
#[derive(Serialize, ToSchema)]
pub(in crate::server) struct ChatResponse<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'static str,
    choices: Vec<ChatChoice>,
    usage: Usage,
    #[serde(skip_serializing_if = "Option::is_none")]
    memory: Option<MemoryAnswer>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Option<Object>>>)]
    prompt_logprobs: Option<PromptLogprobs>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [u32]>,
}

/// One answer.
#[derive(Serialize, ToSchema)]
struct ChatChoice {
    index: usize,
    message: AssistantMessage,
    logprobs: Option<ChatLogprobs>,
    finish_reason: FinishKind,
    stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
}

/// The assistant's message.
#[derive(Serialize, ToSchema)]
struct AssistantMessage {
    role: &'static str,
    content: Option<String>,
    /// Always null.
    refusal: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<ToolCall>,
}

/// A checked call.
pub(super) struct ChatPlan {
    pub(super) call: Call,
    pub(super) generation: Generation,
    pub(super) tool_format: Option<ToolFormat>,
    pub(super) logprobs: bool,
    prompt_logprobs: bool,
}

/// Answers a conversation.
#[utoipa::path(
    post,
    path = "/v1/chat/completions",
    request_body = ChatRequest,
    responses((status = 200, body = ChatResponse), (status = "4XX", body = ErrorBody))
)]
pub(in crate::server) async fn create(
    State(app): State<AppRef>,
    caller: Caller,
    body: JsonBody,
) -> Result<Response, ApiError> {
    let plan = app.prepare(body, move |app, body| plan(app, body, &caller)).await?;
    let outputs = plan.generation.submit(&app, &plan.call)?;
    if plan.call.stream {
        let writer = ChatStream::new(&app, plan);
        return Ok(sse::response(outputs, writer, app.config.keep_alive_interval));
    }
    let choices = collect(outputs, plan.generation.num_choices()).await?;
    Ok(plan.respond(&app.model, choices))
}

/// The prompt as token ids, without running the model.
#[utoipa::path(
    post,
    path = "/v1/chat/completions/render",
    request_body = ChatRequest,
    responses((status = 200, body = RenderedPrompt), (status = "4XX", body = ErrorBody))
)]
pub(in crate::server) async fn render(
    State(app): State<AppRef>,
    caller: Caller,
    body: JsonBody,
) -> Result<Json<RenderedPrompt>, ApiError> {
    let plan = app.prepare(body, move |app, body| plan(app, body, &caller)).await?;
    let prompt = plan.generation.into_rendered(&plan.call).into_iter().next().expect("a chat has one prompt");
    Ok(Json(prompt))
}

fn plan(app: &App, body: &JsonBody, caller: &Caller) -> Result<ChatPlan, ApiError> {
    let limits = &app.config.request_limits;
    let call = body.parse::<CallRequest>()?.check(app, "chatcmpl", caller)?;
    let prompt = body.parse::<ChatPromptRequest>()?.check(app)?;
    let output = body.parse::<ChatOutputRequest>()?;
    let mut sampling = body.parse::<SamplingRequest>()?.into_params(&app.model, limits)?;
    let text = body.parse::<StopRequest>()?.into_options(limits)?;
    let tools = body.parse::<ToolsRequest>()?.check(app.model.tool_format(), limits)?;
    let format = body.parse::<FormatRequest>()?.constraint(limits)?;
    let prompt_logprobs = sampling.prompt_logprobs.is_some();
    if prompt_logprobs && call.stream {
        let message = "prompt_logprobs are not available when stream=true.";
        return Err(ApiError::invalid_field("prompt_logprobs", message));
    }
    sampling.logprobs = output.num_logprobs(limits)?;
    sampling.max_tokens = output.max_tokens()?.unwrap_or(sampling.max_tokens);
    let constraint = tools.constraint.or(format);
    sampling.grammar = constraint.map(|constraint| constraint.compile(&app.model)).transpose()?;
    let prompt = prompt.tokenize_behind(app, call.memory.as_ref(), tools.definitions.as_ref())?;
    let logprobs = sampling.logprobs.is_some();
    let generation = Generation::new("messages", prompt, &call, sampling, text, app)?;
    Ok(ChatPlan { call, generation, tool_format: tools.format, logprobs, prompt_logprobs })
}

impl ChatOutputRequest {
    fn max_tokens(&self) -> Result<Option<usize>, ApiError> {
        for (field, value) in [("max_completion_tokens", self.max_completion_tokens), ("max_tokens", self.max_tokens)] {
            match value {
                Some(0) => return Err(ApiError::invalid_field(field, format!("{field} must be at least 1, got 0."))),
                Some(value) => return Ok(Some(value)),
                None => {}
            }
        }
        Ok(None)
    }

    fn num_logprobs(&self, limits: &RequestLimits) -> Result<Option<usize>, ApiError> {
        let wanted = self.logprobs.unwrap_or(false);
        let top = num_logprobs("top_logprobs", self.top_logprobs, limits)?;
        if !wanted && top.is_some_and(|num| num > 0) {
            return Err(ApiError::invalid_field("top_logprobs", "top_logprobs needs logprobs=true."));
        }
        Ok(wanted.then(|| top.unwrap_or(0)))
    }
}

impl ChatPlan {
    fn respond(&self, model: &ServedModel, mut choices: Vec<FinishedChoice>) -> Response {
        let saved = choices.first_mut().and_then(|choice| choice.saved.take()).map(|saved| *saved);
        let mut usage = UsageCounter::new(&self.generation);
        for (index, choice) in choices.iter().enumerate() {
            usage.add_started(index, choice.cached_tokens, &choice.reuse);
            usage.add_tokens(choice.token_ids.len());
        }
        let head = &self.call.head;
        let prompt_logprobs = choices
            .first()
            .filter(|_| self.prompt_logprobs)
            .map(|choice| prompt_logprobs(&model.tokenizer, &choice.prompt_logprobs));
        let response = ChatResponse {
            id: &head.id,
            object: "chat.completion",
            created: head.created,
            model: &head.model,
            system_fingerprint: SYSTEM_FINGERPRINT,
            choices: choices.into_iter().enumerate().map(|(index, choice)| self.choice(model, index, choice)).collect(),
            usage: usage.usage(),
            memory: self.call.memory_answer(&usage, saved),
            prompt_logprobs,
            prompt_token_ids: self.call.return_token_ids.then(|| self.generation.prompt_of(0)),
        };
        Json(response).into_response()
    }

    fn choice(&self, model: &ServedModel, index: usize, choice: FinishedChoice) -> ChatChoice {
        let mut reader = ToolReader::new(self.tool_format);
        let mut delta = reader.push(choice.text);
        delta.append(reader.flush());
        let finish_reason = reader.finish_kind(choice.finish.reason);
        ChatChoice {
            index,
            message: AssistantMessage::new(delta),
            logprobs: self.logprobs.then(|| ChatLogprobs::new(&model.tokenizer, &choice.logprobs)),
            finish_reason,
            stop_reason: choice.finish.stop_reason,
            token_ids: self.call.return_token_ids.then_some(choice.token_ids),
        }
    }
}

impl AssistantMessage {
    fn new(delta: MessageDelta) -> Self {
        let MessageDelta { content, tool_calls } = delta;
        let content = (tool_calls.is_empty() || !content.is_empty()).then_some(content);
        Self { role: "assistant", content, refusal: None, tool_calls }
    }
}
