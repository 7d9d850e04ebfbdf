//! `/tokenize` and `/detokenize`: what a prompt is to the model, without running it.

use axum::extract::State;
use axum::{Extension, Json};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::cubes::find_adapter;
use super::error::{ApiError, ErrorBody};
use super::json::JsonBody;
use super::openai::{ChatPromptRequest, check_token_ids};
use super::{App, AppRef};
use crate::memory::Principal;

/// Body of `POST /tokenize`: `prompt`, or `messages` with the fields that a chat has for them.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct TokenizeRequest {
    model: Option<String>,
    /// A text. With `messages` instead, the chat is rendered first.
    prompt: Option<String>,
    /// Add the tokens that texts begin with; on for a prompt, off for messages.
    add_special_tokens: Option<bool>,
    /// Also return the tokens' texts.
    return_token_strs: Option<bool>,
    /// Tools for the chat template.
    #[schema(value_type = Option<Vec<Object>>)]
    tools: Option<Vec<Value>>,
}

/// Answer of `POST /tokenize`.
#[derive(Serialize, ToSchema)]
pub(super) struct TokenizeResponse {
    count: usize,
    max_model_len: usize,
    tokens: Vec<u32>,
    token_strs: Option<Vec<String>>,
}

/// Body of `POST /detokenize`.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct DetokenizeRequest {
    model: Option<String>,
    tokens: Vec<u32>,
}

/// Answer of `POST /detokenize`.
#[derive(Serialize, ToSchema)]
pub(super) struct DetokenizeResponse {
    prompt: String,
}

/// The tokens of a text or a chat.
#[utoipa::path(
    post,
    path = "/tokenize",
    request_body = TokenizeRequest,
    responses((status = 200, body = TokenizeResponse), (status = "4XX", body = ErrorBody))
)]
pub(super) async fn tokenize(
    State(app): State<AppRef>,
    Extension(principal): Extension<Principal>,
    body: JsonBody,
) -> Result<Json<TokenizeResponse>, ApiError> {
    Ok(Json(app.prepare(body, move |app, body| tokens_of(app, &principal, body)).await?))
}

fn tokens_of(app: &App, principal: &Principal, body: &JsonBody) -> Result<TokenizeResponse, ApiError> {
    let request = body.parse::<TokenizeRequest>()?;
    check_model(app, principal, request.model.as_deref())?;
    let tokenizer = &app.model.tokenizer;
    let tokens = match request.prompt {
        Some(prompt) => tokenizer.encode(&prompt, request.add_special_tokens.unwrap_or(true))?,
        None => {
            let tools = request.tools.map(Value::Array);
            body.parse::<ChatPromptRequest>()?.check(app)?.tokenize(app, tools.as_ref())?
        }
    };
    let show = request.return_token_strs.unwrap_or(false);
    Ok(TokenizeResponse {
        count: tokens.len(),
        max_model_len: app.model.engine.info().max_model_len,
        token_strs: show.then(|| tokens.iter().map(|id| tokenizer.token_text(*id)).collect()),
        tokens,
    })
}

/// The text of tokens.
#[utoipa::path(
    post,
    path = "/detokenize",
    request_body = DetokenizeRequest,
    responses((status = 200, body = DetokenizeResponse), (status = "4XX", body = ErrorBody))
)]
pub(super) async fn detokenize(
    State(app): State<AppRef>,
    Extension(principal): Extension<Principal>,
    body: JsonBody,
) -> Result<Json<DetokenizeResponse>, ApiError> {
    Ok(Json(app.prepare(body, move |app, body| text_of(app, &principal, body)).await?))
}

fn text_of(app: &App, principal: &Principal, body: &JsonBody) -> Result<DetokenizeResponse, ApiError> {
    let request = body.parse::<DetokenizeRequest>()?;
    check_model(app, principal, request.model.as_deref())?;
    check_token_ids("tokens", &request.tokens, app.model.tokenizer.vocab_size())?;
    Ok(DetokenizeResponse { prompt: app.model.tokenizer.decode(&request.tokens, false)? })
}

/// Refuses a model that is not served.
fn check_model(app: &App, principal: &Principal, requested: Option<&str>) -> Result<(), ApiError> {
    app.model.adapters_of(requested, &|name| find_adapter(app, principal, name)).map(drop)
}
