//! `/metrics`: the engine's figures in the Prometheus text format.

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};

use super::AppRef;
use super::error::ApiError;

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// All counters, gauges and histograms.
#[utoipa::path(get, path = "/metrics", responses((status = 200, content_type = "text/plain", body = String)))]
pub(super) async fn metrics(State(app): State<AppRef>) -> Response {
    if !app.config.metrics {
        return ApiError::not_found("Metrics are turned off.").into_response();
    }
    ([(header::CONTENT_TYPE, OPEN_METRICS)], app.model.engine.metrics().encode()).into_response()
}
