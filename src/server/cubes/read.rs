//! `GET /v1/memcubes`, `/v1/memcubes/{name}` and `/v1/memcubes/{name}/lineage`.

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Extension, Path, Query, State};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::object::{CubeAnswer, CubeObject, Work};
use super::{service, snapshot};
use crate::memory::{
    Catalog, CubeAddress, CubeFilter, CubeId, CubeName, Ending, Kind, Lineage, Principal, Relative, State as CubeState,
    Timestamp, Version,
};
use crate::server::AppRef;
use crate::server::error::{ApiError, ErrorBody};

/// Cubes in a list when no `limit` is given.
const DEFAULT_LIMIT: usize = 100;

/// Which cubes are listed.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(in crate::server) struct ListQuery {
    /// Of this namespace.
    namespace: Option<String>,
    /// plaintext, activation or parameter.
    #[param(value_type = Option<String>)]
    kind: Option<Kind>,
    /// generated, activated, archived or frozen.
    #[param(value_type = Option<String>)]
    state: Option<CubeState>,
    /// With this tag.
    tag: Option<String>,
    /// With this in name, tags or text.
    q: Option<String>,
    /// Behind this name: `next_after` of the page before.
    after: Option<String>,
    /// At most this many; 100 when left out.
    limit: Option<usize>,
    /// `payload` shows what the cubes hold.
    include: Option<String>,
}

/// Whether content is shown.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(in crate::server) struct ShowQuery {
    /// `payload` shows what the cube holds.
    include: Option<String>,
    /// Behind `/snapshot`, the id of the one to compare with.
    snapshot: Option<String>,
}

/// Answer of `GET /v1/memcubes`.
#[derive(Serialize, ToSchema)]
pub(in crate::server) struct CubeList {
    object: &'static str,
    /// Who asks: the name by which others share cubes with this key.
    principal: String,
    data: Vec<CubeObject>,
    /// `after` of the next page; null on the last.
    #[schema(value_type = Option<String>)]
    next_after: Option<CubeName>,
    restored_tokens: usize,
    reason: &'static str,
}

/// A living or deleted cube in a lineage.
#[derive(Serialize, ToSchema)]
pub(in crate::server) struct RelativeObject {
    #[schema(value_type = String)]
    id: CubeId,
    #[schema(value_type = String)]
    name: CubeName,
    #[schema(value_type = String)]
    kind: Kind,
    #[schema(value_type = u32)]
    version: Version,
    #[schema(value_type = Vec<String>)]
    parents: Vec<CubeId>,
    #[schema(value_type = String)]
    created_at: Timestamp,
    #[schema(value_type = Option<String>)]
    ended_at: Option<Timestamp>,
    /// deleted or expired.
    #[schema(value_type = Option<String>)]
    ending: Option<Ending>,
}

/// Answer of `GET /v1/memcubes/{name}/lineage`.
#[derive(Serialize, ToSchema)]
pub(in crate::server) struct LineageObject {
    object: &'static str,
    cube: RelativeObject,
    /// What it was made from, nearest first.
    ancestors: Vec<RelativeObject>,
    /// What was made from it, nearest first.
    descendants: Vec<RelativeObject>,
    restored_tokens: usize,
    reason: &'static str,
}

const NOTHING_COMPUTED: &str = "Nothing was to be computed.";

/// Lists the cubes that one may read, in order of name.
#[utoipa::path(
    get,
    path = "/v1/memcubes",
    params(ListQuery),
    responses((status = 200, body = CubeList), (status = "4XX", body = ErrorBody))
)]
pub(in crate::server) async fn list(
    State(app): State<AppRef>,
    Extension(principal): Extension<Principal>,
    query: Result<Query<ListQuery>, QueryRejection>,
) -> Result<Json<CubeList>, ApiError> {
    let query = parsed(query)?;
    let with_payload = shows_payload(query.include.as_deref())?;
    let catalog = service(&app)?.catalog.clone();
    let filter = query.filter()?;
    // A search reads every text there is.
    let (asking, searched) = (principal.clone(), catalog);
    let page = super::blocking(move || Ok(searched.list(&asking, &filter))).await?;
    Ok(Json(CubeList {
        object: "list",
        principal: principal.to_string(),
        data: page.cubes.iter().map(|view| CubeObject::new(view, &principal, with_payload)).collect(),
        next_after: page.next_after,
        restored_tokens: 0,
        reason: NOTHING_COMPUTED,
    }))
}

impl ListQuery {
    fn filter(self) -> Result<CubeFilter, ApiError> {
        let after = self.after.map(|name| name.parse::<CubeName>()).transpose();
        Ok(CubeFilter {
            namespace: self.namespace,
            kind: self.kind,
            state: self.state,
            tag: self.tag,
            query: self.q,
            after: after.map_err(|error| ApiError::from(error).with_param("after"))?,
            limit: self.limit.unwrap_or(DEFAULT_LIMIT),
        })
    }
}

/// What stands behind the `?`.
pub(super) fn parsed<T>(query: Result<Query<T>, QueryRejection>) -> Result<T, ApiError> {
    query.map(|Query(query)| query).map_err(|rejection| ApiError::bad_request(rejection.body_text()))
}

fn shows_payload(include: Option<&str>) -> Result<bool, ApiError> {
    match include {
        None | Some("") => Ok(false),
        Some("payload") => Ok(true),
        Some(_) => Err(ApiError::invalid_field("include", "include can only be \"payload\".")),
    }
}

/// One cube, or one version of it as `name@version`; with `/lineage` behind the name, its relatives; with `/snapshot` behind
/// a name or a namespace, its snapshots or what changed since one.
#[utoipa::path(
    get,
    path = "/v1/memcubes/{name}",
    params(("name" = String, Path, description = "namespace/path, namespace/path@version"), ShowQuery),
    responses((status = 200, body = CubeAnswer), (status = "4XX", body = ErrorBody))
)]
pub(in crate::server) async fn get(
    State(app): State<AppRef>,
    Extension(principal): Extension<Principal>,
    Path(rest): Path<String>,
    query: Result<Query<ShowQuery>, QueryRejection>,
) -> Result<Response, ApiError> {
    let catalog = &service(&app)?.catalog;
    if let Some(name) = rest.strip_suffix("/lineage") {
        return Ok(Json(lineage(catalog, &principal, name)?).into_response());
    }
    let query = parsed(query)?;
    if let Some(scope) = rest.strip_suffix("/snapshot") {
        return snapshot::show(&app, &principal, &scope.parse()?, query.snapshot.as_deref());
    }
    let with_payload = shows_payload(query.include.as_deref())?;
    let view = catalog.get(&principal, &rest.parse::<CubeAddress>()?)?;
    let answer = CubeAnswer::new(&view, &principal, with_payload, Work::none(NOTHING_COMPUTED));
    Ok(Json(answer).into_response())
}

/// What a cube was made from and what was made from it, deleted cubes included.
#[utoipa::path(
    get,
    path = "/v1/memcubes/{name}/lineage",
    params(("name" = String, Path, description = "namespace/path")),
    responses((status = 200, body = LineageObject), (status = "4XX", body = ErrorBody))
)]
pub(in crate::server) fn lineage(
    catalog: &Catalog,
    principal: &Principal,
    name: &str,
) -> Result<LineageObject, ApiError> {
    let Lineage { cube, ancestors, descendants } = catalog.lineage(principal, &name.parse()?)?;
    let objects = |relatives: Vec<Relative>| relatives.into_iter().map(RelativeObject::from).collect();
    Ok(LineageObject {
        object: "memcube.lineage",
        cube: cube.into(),
        ancestors: objects(ancestors),
        descendants: objects(descendants),
        restored_tokens: 0,
        reason: NOTHING_COMPUTED,
    })
}

impl From<Relative> for RelativeObject {
    fn from(relative: Relative) -> Self {
        let Relative { id, name, kind, version, parents, created_at, ended } = relative;
        let (ended_at, ending) = ended.unzip();
        Self { id, name, kind, version, parents, created_at, ended_at, ending }
    }
}
