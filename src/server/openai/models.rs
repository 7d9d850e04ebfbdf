//! `/v1/models`: what is served to whoever asks: the model, adapters, and the parameter cubes that one may read.

use axum::extract::{Path, State};
use axum::{Extension, Json};
use serde::Serialize;
use utoipa::ToSchema;

use crate::memory::Principal;
use crate::server::cubes::{AdapterCube, adapter_cube, adapter_cubes};
use crate::server::error::{ApiError, ErrorBody};
use crate::server::{AdapterRegistry, App, AppRef, NamedAdapter};

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
    /// Of an adapter: whether new requests find it merged into a copy of the weights, by itself or in the composition
    /// that carries the traffic.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    merged: Option<bool>,
}

/// Lists the models.
#[utoipa::path(get, path = "/v1/models", responses((status = 200, body = ModelList)))]
pub(in crate::server) async fn list(
    State(app): State<AppRef>,
    Extension(principal): Extension<Principal>,
) -> Json<ModelList> {
    let names = app.model.names.iter().map(|name| card(&app, name));
    let adapters = app.model.adapters.iter().flat_map(AdapterRegistry::list).map(|adapter| adapter_card(&app, adapter));
    let cubes = adapter_cubes(&app, &principal).into_iter().map(|cube| cube_card(&app, cube.name(), &cube));
    Json(ModelList { object: "list", data: names.chain(adapters).chain(cubes).collect() })
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
    Extension(principal): Extension<Principal>,
    Path(id): Path<String>,
) -> Result<Json<ModelCard>, ApiError> {
    if app.model.names.contains(&id) {
        return Ok(Json(card(&app, &id)));
    }
    let adapter = app.model.adapters.as_ref().and_then(|registry| registry.find(&id));
    let found = match adapter {
        Some(adapter) => Some(adapter_card(&app, adapter)),
        None => adapter_cube(&app, &principal, &id).map(|cube| cube_card(&app, &id, &cube)),
    };
    found.map(Json).ok_or_else(|| ApiError::unknown_model(&id))
}

fn adapter_card(app: &App, adapter: NamedAdapter) -> ModelCard {
    ModelCard {
        id: adapter.name,
        created: adapter.created,
        root: adapter.path,
        parent: Some(app.model.name().to_owned()),
        merged: Some(adapter.adapter.is_merged()),
        ..card(app, "")
    }
}

/// A parameter cube under the name that it is asked for by.
fn cube_card(app: &App, id: &str, cube: &AdapterCube) -> ModelCard {
    let known = app.model.adapters.as_ref().and_then(|registry| registry.known(&cube.parameter().digest));
    ModelCard {
        created: cube.created(),
        root: cube.parameter().source.as_str().to_owned(),
        parent: Some(app.model.name().to_owned()),
        merged: Some(known.is_some_and(|adapter| adapter.is_merged())),
        ..card(app, id)
    }
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
        merged: None,
    }
}
