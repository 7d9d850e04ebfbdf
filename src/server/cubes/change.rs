//! `PATCH` and `DELETE /v1/memcubes/{name}`.

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Extension, Path, Query, State};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use utoipa::{IntoParams, ToSchema};

use super::object::{CubeAnswer, Work};
use super::read::parsed;
use super::{blocking, service, snapshot};
use crate::memory::{Acl, CubeChanges, CubeId, CubeName, Labels, Principal, Priority, SemanticType};
use crate::server::AppRef;
use crate::server::error::{ApiError, ErrorBody};
use crate::server::json::JsonBody;

/// What governs and describes a cube. A field that is left out stays; null takes it away.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(in crate::server) struct ChangeRequest {
    /// prompt, fact, preference, domain, skill or session.
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Option<String>)]
    semantic_type: Option<Option<SemanticType>>,
    /// Free words.
    #[schema(value_type = Option<Vec<String>>)]
    tags: Option<Labels>,
    /// `{"visibility": "private" | "shared" | "public", "read": [], "write": [], "share": []}`.
    #[schema(value_type = Option<Object>)]
    acl: Option<Acl>,
    /// Lifetime in seconds, from now.
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Option<u64>)]
    ttl_s: Option<Option<u64>>,
    /// Half-life of its heat in seconds.
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Option<u64>)]
    half_life_s: Option<Option<u64>>,
    /// 0 to 9, or "pinned".
    #[schema(value_type = Option<Value>)]
    priority: Option<Priority>,
    /// Words for what must be handled with care.
    #[schema(value_type = Option<Vec<String>>)]
    sensitivity: Option<Labels>,
    /// Zero its memory when it is freed.
    erase_on_free: Option<bool>,
}

/// Fields that are changed elsewhere or not at all.
#[derive(Debug, Deserialize)]
struct FixedFields {
    name: Option<Value>,
    owner: Option<Value>,
    kind: Option<Value>,
}

/// Answer of `DELETE /v1/memcubes/{name}`.
#[derive(Serialize, ToSchema)]
pub(in crate::server) struct DeletedCube {
    #[schema(value_type = String)]
    id: CubeId,
    #[schema(value_type = String)]
    name: CubeName,
    deleted: bool,
    restored_tokens: usize,
    reason: &'static str,
}

/// Tells null from nothing.
fn given<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Option<Option<T>>, D::Error> {
    Option::deserialize(deserializer).map(Some)
}

impl ChangeRequest {
    pub(super) fn check(self) -> Result<CubeChanges, ApiError> {
        let Self { semantic_type, tags, acl, ttl_s, half_life_s, priority, sensitivity, erase_on_free } = self;
        for (field, value) in [("ttl_s", ttl_s), ("half_life_s", half_life_s)] {
            if value.flatten() == Some(0) {
                return Err(ApiError::invalid_field(field, format!("{field} must be at least 1, got 0.")));
            }
        }
        Ok(CubeChanges { semantic_type, tags, acl, ttl_s, half_life_s, priority, sensitivity, erase_on_free })
    }
}

/// Changes what governs and describes a cube.
#[utoipa::path(
    patch,
    path = "/v1/memcubes/{name}",
    params(("name" = String, Path, description = "namespace/path")),
    request_body = ChangeRequest,
    responses((status = 200, body = CubeAnswer), (status = "4XX", body = ErrorBody))
)]
pub(in crate::server) async fn change(
    State(app): State<AppRef>,
    Extension(principal): Extension<Principal>,
    Path(name): Path<String>,
    body: JsonBody,
) -> Result<Json<CubeAnswer>, ApiError> {
    let service = service(&app)?;
    let (catalog, name) = (service.catalog.clone(), name.parse::<CubeName>()?);
    refuse_fixed(&body.parse::<FixedFields>()?)?;
    let (changes, asking) = (body.parse::<ChangeRequest>()?.check()?, principal.clone());
    let view = blocking(move || catalog.change(&asking, &name, changes)).await?;
    service.settle(&view);
    Ok(Json(CubeAnswer::new(&view, &principal, false, Work::none("Only the header was changed."))))
}

fn refuse_fixed(fields: &FixedFields) -> Result<(), ApiError> {
    let fixed = [
        ("name", &fields.name, "name is changed by POST to .../rename."),
        ("owner", &fields.owner, "owner cannot be changed; fork the cube as its new owner."),
        ("kind", &fields.kind, "kind cannot be changed; make another cube with this one as parent."),
    ];
    match fixed.iter().find(|(_, value, _)| value.is_some()) {
        None => Ok(()),
        Some((field, _, message)) => Err(ApiError::invalid_field(*field, *message)),
    }
}

/// What else can be deleted.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(in crate::server) struct DeleteQuery {
    /// Behind `/snapshot`, the id of the one to delete.
    snapshot: Option<String>,
}

/// Deletes a cube with all its versions. Once answered, it stays deleted. With `/snapshot` behind a name or a namespace one
/// of its snapshots.
#[utoipa::path(
    delete,
    path = "/v1/memcubes/{name}",
    params(("name" = String, Path, description = "namespace/path"), DeleteQuery),
    responses((status = 200, body = DeletedCube), (status = "4XX", body = ErrorBody))
)]
pub(in crate::server) async fn delete(
    State(app): State<AppRef>,
    Extension(principal): Extension<Principal>,
    Path(name): Path<String>,
    query: Result<Query<DeleteQuery>, QueryRejection>,
) -> Result<Response, ApiError> {
    if let Some(scope) = name.strip_suffix("/snapshot") {
        let query = parsed(query)?;
        return snapshot::delete(&app, principal, scope.parse()?, query.snapshot.as_deref()).await;
    }
    let service = service(&app)?;
    let (catalog, name) = (service.catalog.clone(), name.parse::<CubeName>()?);
    let target = name.clone();
    let ended = blocking(move || catalog.delete(&principal, &target)).await?;
    let id = *ended.ids.first().expect("a deletion ends one cube");
    let is_to_erase = !ended.erasures.is_empty();
    let is_over = service.end(ended).await?;
    let reason = match (is_to_erase, is_over) {
        (false, _) => "The cube was deleted.",
        (true, true) => "The cube was deleted, and its KV overwritten.",
        (true, false) => "The cube was deleted; its KV is overwritten as soon as the vault can do that.",
    };
    let deleted = DeletedCube { id, name, deleted: true, restored_tokens: 0, reason };
    Ok(Json(deleted).into_response())
}
