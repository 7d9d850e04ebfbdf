//! Liveness, version and load, as probes and gateways ask for them.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Serialize;
use utoipa::ToSchema;

use super::AppRef;
use super::error::ApiError;

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

/// 200 with an empty body while requests are served; 503 with the reason when the engine has ended or the server is
/// draining.
#[utoipa::path(get, path = "/health", responses((status = 200), (status = 503)))]
pub(super) async fn health(State(app): State<AppRef>) -> Result<StatusCode, ApiError> {
    app.check_serving().map(|()| StatusCode::OK)
}

/// The same as `/health`, for hosts that probe this path.
#[utoipa::path(get, path = "/ping", responses((status = 200), (status = 503)))]
pub(super) async fn ping(app: State<AppRef>) -> Result<StatusCode, ApiError> {
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
