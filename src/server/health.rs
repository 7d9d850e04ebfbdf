//! Liveness, version and load, as probes and gateways ask for them.

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;

use super::AppRef;
use super::error::{ApiError, ErrorBody};

/// The version of this server.
#[derive(Serialize, ToSchema)]
pub(super) struct Version {
    version: &'static str,
}

/// How busy the server is.
#[derive(Serialize, ToSchema)]
pub(super) struct ServerLoad {
    /// Calls in progress.
    server_load: usize,
}

/// How well requests are served.
#[derive(Serialize, ToSchema)]
pub(super) struct Health {
    /// `ok`, or `degraded` where the server goes on with less than it was asked for.
    status: &'static str,
    /// What there is less of: a name, a colon and what is to be known.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    degraded: Vec<String>,
}

/// 200 while requests are served, also where the server goes on with less than it was asked for, which the body names; 503
/// with the reason when the engine has ended or the server is draining.
#[utoipa::path(get, path = "/health", responses((status = 200, body = Health), (status = 503, body = ErrorBody)))]
pub(super) async fn health(State(app): State<AppRef>) -> Result<Json<Health>, ApiError> {
    app.check_serving()?;
    let degraded = app.model.engine.degradations().lines();
    Ok(Json(Health { status: if degraded.is_empty() { "ok" } else { "degraded" }, degraded }))
}

/// The same as `/health`, for hosts that probe this path.
#[utoipa::path(get, path = "/ping", responses((status = 200, body = Health), (status = 503, body = ErrorBody)))]
pub(super) async fn ping(app: State<AppRef>) -> Result<Json<Health>, ApiError> {
    health(app).await
}

/// The server's version.
#[utoipa::path(get, path = "/version", responses((status = 200, body = Version)))]
pub(super) async fn version() -> Json<Version> {
    Json(Version { version: env!("CARGO_PKG_VERSION") })
}

/// The number of calls in progress.
#[utoipa::path(get, path = "/load", responses((status = 200, body = ServerLoad)))]
pub(super) async fn load(State(app): State<AppRef>) -> Json<ServerLoad> {
    Json(ServerLoad { server_load: app.num_calls() })
}
