//! `GET /v1/memcubes/events`: what happened, one JSON object a line.

use axum::extract::rejection::QueryRejection;
use axum::extract::{Extension, Query, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::IntoParams;

use super::read::parsed;
use super::service;
use crate::memory::{Event, EventKind, Principal};
use crate::server::AppRef;
use crate::server::error::{ApiError, ErrorBody};

/// Events in an answer when no `limit` is given.
const DEFAULT_LIMIT: usize = 1000;

/// Which events are told.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(in crate::server) struct EventsQuery {
    /// Behind this number: `next_since` of the answer before.
    since: Option<u64>,
    /// Of this cube.
    cube: Option<String>,
    /// Of this kind.
    #[serde(rename = "type")]
    #[param(value_type = Option<String>)]
    kind: Option<EventKind>,
    /// Look at no more than this many.
    limit: Option<usize>,
}

#[derive(Serialize)]
struct EventObject<'a> {
    seq: u64,
    at: String,
    #[serde(rename = "type")]
    kind: EventKind,
    cube: &'a str,
    id: String,
    version: u32,
    principal: Option<&'a str>,
}

/// The last line: where to go on, and whether something was missed.
#[derive(Serialize)]
struct EventsEnd {
    #[serde(rename = "type")]
    kind: &'static str,
    next_since: u64,
    has_gap: bool,
}

/// Events of the cubes that one may read, oldest first, as JSON lines. The last line has `next_since`; it has `has_gap`
/// when events were dropped before they were asked for.
#[utoipa::path(
    get,
    path = "/v1/memcubes/events",
    params(EventsQuery),
    responses((status = 200, body = String, content_type = "application/x-ndjson"), (status = "4XX", body = ErrorBody))
)]
pub(in crate::server) async fn events(
    State(app): State<AppRef>,
    Extension(principal): Extension<Principal>,
    query: Result<Query<EventsQuery>, QueryRejection>,
) -> Result<Response, ApiError> {
    let query = parsed(query)?;
    let limit = query.limit.unwrap_or(DEFAULT_LIMIT);
    let page = service(&app)?.catalog.events(&principal, query.since.unwrap_or(0), limit);
    let mut lines = String::new();
    for event in page.events.iter().filter(|event| query.accepts(event)) {
        add_line(&mut lines, &EventObject::new(event));
    }
    add_line(&mut lines, &EventsEnd { kind: "end", next_since: page.next_since, has_gap: page.has_gap });
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], lines).into_response())
}

impl EventsQuery {
    fn accepts(&self, event: &Event) -> bool {
        self.cube.as_ref().is_none_or(|cube| event.name().as_str() == cube)
            && self.kind.is_none_or(|kind| event.kind == kind)
    }
}

impl<'a> EventObject<'a> {
    fn new(event: &'a Event) -> Self {
        Self {
            seq: event.seq,
            at: event.at.to_string(),
            kind: event.kind,
            cube: event.name().as_str(),
            id: event.id().to_string(),
            version: event.version().get(),
            principal: event.principal.as_ref().map(Principal::as_str),
        }
    }
}

fn add_line(lines: &mut String, object: &impl Serialize) {
    lines.push_str(&serde_json::to_string(object).expect("events have text keys only"));
    lines.push('\n');
}
