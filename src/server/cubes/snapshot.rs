//! Snapshots over HTTP: `POST .../snapshot`, `GET .../snapshot` (all, or what changed since one), `POST .../restore`,
//! `DELETE .../snapshot`. Before the slash stands a cube's name, or a namespace alone.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};

use super::{blocking, service};
use crate::memory::{
    CubeName, Difference, DifferenceKind, Principal, Restoration, RestoreOutcome, Snapshot, SnapshotId, SnapshotScope,
    Timestamp, Version,
};
use crate::server::App;
use crate::server::error::ApiError;

/// Body of `.../restore`.
#[derive(Debug, Deserialize)]
pub(super) struct RestoreRequest {
    snapshot: String,
}

/// Versions of cubes at a moment.
#[derive(Serialize)]
struct SnapshotObject<'a> {
    object: &'static str,
    id: SnapshotId,
    scope: String,
    created_at: Timestamp,
    cubes: Vec<SnapshotCubeObject<'a>>,
    restored_tokens: usize,
    reason: &'static str,
}

#[derive(Serialize)]
struct SnapshotCubeObject<'a> {
    name: &'a CubeName,
    version: Version,
}

#[derive(Serialize)]
struct SnapshotList<'a> {
    object: &'static str,
    data: Vec<SnapshotObject<'a>>,
    restored_tokens: usize,
    reason: &'static str,
}

#[derive(Serialize)]
struct DifferenceObject {
    name: CubeName,
    then: Option<Version>,
    now: Option<Version>,
    change: DifferenceKind,
}

/// What changed since a snapshot.
#[derive(Serialize)]
struct DifferenceList {
    object: &'static str,
    snapshot: SnapshotId,
    data: Vec<DifferenceObject>,
    restored_tokens: usize,
    reason: &'static str,
}

#[derive(Serialize)]
struct RestorationObject {
    name: CubeName,
    /// The version that the snapshot has.
    restored_version: Version,
    /// The newest one now.
    version: Option<Version>,
    outcome: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<String>,
}

/// What restoring did.
#[derive(Serialize)]
struct RestorationList {
    object: &'static str,
    snapshot: SnapshotId,
    data: Vec<RestorationObject>,
    restored_tokens: usize,
    reason: &'static str,
}

/// A snapshot that is gone.
#[derive(Serialize)]
struct DeletedSnapshot {
    id: SnapshotId,
    deleted: bool,
    restored_tokens: usize,
    reason: &'static str,
}

const NAMED: &str = "Versions were named; nothing was copied.";

impl<'a> From<&'a Snapshot> for SnapshotObject<'a> {
    fn from(snapshot: &'a Snapshot) -> Self {
        let cubes = snapshot.cubes.iter().map(|cube| SnapshotCubeObject { name: &cube.name, version: cube.version });
        Self {
            object: "memcube.snapshot",
            id: snapshot.id,
            scope: snapshot.scope.to_string(),
            created_at: snapshot.created_at,
            cubes: cubes.collect(),
            restored_tokens: 0,
            reason: NAMED,
        }
    }
}

impl From<Difference> for DifferenceObject {
    fn from(difference: Difference) -> Self {
        let Difference { name, then, now, kind } = difference;
        Self { name, then, now, change: kind }
    }
}

impl From<Restoration> for RestorationObject {
    fn from(restoration: Restoration) -> Self {
        let Restoration { cube, version, outcome } = restoration;
        let (outcome, message) = match outcome {
            RestoreOutcome::Restored => ("restored", None),
            RestoreOutcome::Same => ("same", None),
            RestoreOutcome::Gone => ("gone", None),
            RestoreOutcome::Refused(why) => ("refused", Some(why)),
        };
        Self { name: cube.name, restored_version: cube.version, version, outcome, message }
    }
}

/// Makes one.
pub(super) async fn create(app: &App, principal: Principal, scope: SnapshotScope) -> Result<Response, ApiError> {
    let catalog = service(app)?.catalog.clone();
    let snapshot = blocking(move || catalog.snapshot(&principal, scope)).await?;
    Ok((StatusCode::CREATED, Json(SnapshotObject::from(&*snapshot))).into_response())
}

/// All that there are or, with the id of one, what changed since.
pub(super) fn show(
    app: &App,
    principal: &Principal,
    scope: &SnapshotScope,
    id: Option<&str>,
) -> Result<Response, ApiError> {
    let catalog = &service(app)?.catalog;
    let Some(id) = id else {
        let snapshots = catalog.snapshots(principal, scope);
        let data = snapshots.iter().map(|snapshot| SnapshotObject::from(&**snapshot)).collect();
        let list = SnapshotList { object: "list", data, restored_tokens: 0, reason: NAMED };
        return Ok(Json(list).into_response());
    };
    let snapshot = parse_id(id)?;
    let data = catalog.diff(principal, scope, snapshot)?.into_iter().map(DifferenceObject::from).collect();
    let reason = "Versions were compared; nothing was computed.";
    Ok(Json(DifferenceList { object: "memcube.diff", snapshot, data, restored_tokens: 0, reason }).into_response())
}

/// Goes back to one.
pub(super) async fn restore(
    app: &App,
    principal: Principal,
    scope: SnapshotScope,
    request: RestoreRequest,
) -> Result<Response, ApiError> {
    let (catalog, snapshot) = (service(app)?.catalog.clone(), parse_id(&request.snapshot)?);
    let data = blocking(move || catalog.restore(&principal, &scope, snapshot)).await?;
    let data = data.into_iter().map(RestorationObject::from).collect();
    let reason = "New versions share the blocks of old ones; nothing was computed.";
    let object = "memcube.restoration";
    Ok(Json(RestorationList { object, snapshot, data, restored_tokens: 0, reason }).into_response())
}

/// Forgets one.
pub(super) async fn delete(
    app: &App,
    principal: Principal,
    scope: SnapshotScope,
    id: Option<&str>,
) -> Result<Response, ApiError> {
    let missing = || ApiError::invalid_field("snapshot", "Say which snapshot is to be deleted: ?snapshot=ID.");
    let (catalog, id) = (service(app)?.catalog.clone(), parse_id(id.ok_or_else(missing)?)?);
    blocking(move || catalog.delete_snapshot(&principal, &scope, id)).await?;
    let reason = "The snapshot was deleted; the cubes stay as they are.";
    Ok(Json(DeletedSnapshot { id, deleted: true, restored_tokens: 0, reason }).into_response())
}

fn parse_id(text: &str) -> Result<SnapshotId, ApiError> {
    text.parse().map_err(|_| ApiError::invalid_field("snapshot", "snapshot must be the id of a snapshot (a UUIDv7)."))
}
