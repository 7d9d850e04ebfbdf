//! Which path leads to which handler, and what every request passes through first.

use std::any::Any;

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use tower_http::catch_panic::CatchPanicLayer;

use super::error::ApiError;
use super::openai::{chat, completions, embeddings, models};
use super::{AppRef, adapters, auth, cubes, health, hosts, metrics, openapi, request_id, tokenize};

/// All routes. A request meets the layers from the last one named to the first.
pub(super) fn router(app: AppRef) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/chat/completions/render", post(chat::render))
        .route("/v1/completions", post(completions::create))
        .route("/v1/completions/render", post(completions::render))
        .route("/v1/embeddings", post(embeddings::create))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::retrieve))
        .route("/v1/load_lora_adapter", post(adapters::load))
        .route("/v1/unload_lora_adapter", post(adapters::unload))
        .merge(cubes::routes())
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/health", get(health::health))
        .route("/ping", get(health::ping).post(health::ping))
        .route("/version", get(health::version))
        .route("/load", get(health::load))
        .route("/metrics", get(metrics::metrics))
        .route("/openapi.json", get(openapi::document))
        .fallback(unknown_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(middleware::from_fn_with_state(app.clone(), refuse_while_draining))
        .layer(middleware::from_fn_with_state(app.clone(), auth::require_key))
        .layer(middleware::from_fn_with_state(app.clone(), hosts::require_known_host))
        .layer(CatchPanicLayer::custom(panic_answer))
        .layer(middleware::from_fn(request_id::assign))
        .with_state(app)
}

async fn unknown_route(request: Request) -> ApiError {
    ApiError::not_found(format!("There is no route {}.", request.uri().path()))
}

async fn wrong_method() -> ApiError {
    ApiError::method_not_allowed()
}

/// While calls in progress end, probes and metrics are answered and nothing new is begun.
async fn refuse_while_draining(State(app): State<AppRef>, request: Request, next: Next) -> Response {
    let is_probe = matches!(request.uri().path(), "/health" | "/ping" | "/metrics" | "/load");
    if !is_probe && app.is_draining() {
        return ApiError::unavailable("The server is shutting down.").into_response();
    }
    next.run(request).await
}

/// The panic itself has been reported by the panic hook.
fn panic_answer(_: Box<dyn Any + Send>) -> Response {
    ApiError::internal("The server failed; its log says why.").into_response()
}
