//! `/openapi.json`: the description of this server, generated from the types it reads and writes.

use axum::http::header;
use axum::response::{IntoResponse, Response};
use utoipa::OpenApi;

use super::openai::{chat, completions, embeddings, models};
use super::{adapters, cubes, health, metrics, tokenize};

#[derive(OpenApi)]
#[openapi(
    info(title = "mneme", description = "OpenAI-compatible inference server"),
    paths(
        chat::create,
        chat::render,
        completions::create,
        completions::render,
        embeddings::create,
        models::list,
        models::retrieve,
        adapters::load,
        adapters::unload,
        cubes::create::create,
        cubes::read::list,
        cubes::read::get,
        cubes::read::lineage,
        cubes::change::change,
        cubes::change::delete,
        cubes::actions::act,
        cubes::transfer::import,
        cubes::events::events,
        tokenize::tokenize,
        tokenize::detokenize,
        health::health,
        health::ping,
        health::version,
        health::load,
        metrics::metrics,
    )
)]
struct ApiDocument;

/// The OpenAPI document.
pub(super) async fn document() -> Response {
    let document = ApiDocument::openapi().to_json().expect("the document is made of JSON values");
    ([(header::CONTENT_TYPE, "application/json")], document).into_response()
}
