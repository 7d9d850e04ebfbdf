//! `/v1/models`: what is served.

use axum::Json;
use axum::extract::{Path, State};
use serde::Serialize;
use utoipa::ToSchema;

use crate::server::error::{ApiError, ErrorBody};
use crate::server::{App, AppRef};

/// All models.
#[derive(Serialize, ToSchema)]
pub(in crate::server) struct ModelList {
    object: &'static str,
    data: Vec<ModelCard>,
}

/// A model, with vLLM's additions.
#[derive(Serialize, ToSchema)]
pub(in crate::server) struct ModelCard {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: String,
    /// Where the checkpoint came from.
    root: String,
    /// The model this one derives from.
    parent: Option<String>,
    /// Longest prompt plus output, in tokens.
    max_model_len: usize,
}

/// Lists the models.
#[utoipa::path(get, path = "/v1/models", responses((status = 200, body = ModelList)))]
pub(in crate::server) async fn list(State(app): State<AppRef>) -> Json<ModelList> {
    let data = app.model.names.iter().map(|name| card(&app, name)).collect();
    Json(ModelList { object: "list", data })
}

/// Describes one model. Its name may contain slashes.
#[utoipa::path(
    get,
    path = "/v1/models/{id}",
    params(("id" = String, Path)),
    responses((status = 200, body = ModelCard), (status = 404, body = ErrorBody))
)]
pub(in crate::server) async fn retrieve(
    State(app): State<AppRef>,
    Path(id): Path<String>,
) -> Result<Json<ModelCard>, ApiError> {
    app.model.check_name(Some(&id))?;
    Ok(Json(card(&app, &id)))
}

fn card(app: &App, name: &str) -> ModelCard {
    ModelCard {
        id: name.to_owned(),
        object: "model",
        created: app.model.created,
        owned_by: app.config.owned_by.clone(),
        root: app.model.root.clone(),
        parent: None,
        max_model_len: app.model.engine.info().max_model_len,
    }
}
