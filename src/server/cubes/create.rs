//! `POST /v1/memcubes`: a new cube.

use axum::Json;
use axum::extract::{Extension, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use utoipa::ToSchema;

use super::adapter::read_adapter;
use super::change::ChangeRequest;
use super::content::{Content, ContentRequest, Keeping, TokenizedContent};
use super::object::{CubeAnswer, Work};
use super::{blocking, domain_of, service};
use crate::memory::{CubeChanges, CubeId, CubeName, Durability, Kind, NewCube, Origin, Payload, Principal};
use crate::server::error::{ApiError, ErrorBody};
use crate::server::json::JsonBody;
use crate::server::{App, AppRef};

/// Where a cube comes from and how it is kept.
#[derive(Debug, Deserialize, ToSchema)]
struct NewCubeRequest {
    /// `namespace/path`.
    name: String,
    /// `activation` (text with its KV, the default), `plaintext` (text alone) or `parameter` (an adapter).
    #[schema(value_type = Option<String>)]
    kind: Option<Kind>,
    /// Of a parameter cube: a folder as PEFT writes it or a GGUF file, below a `--lora-root`.
    adapter: Option<String>,
    /// Answer only when the cube would survive a crash; on unless turned off.
    durable: Option<bool>,
    /// Ids of the cubes it was made from.
    #[schema(value_type = Option<Vec<String>>)]
    parents: Option<Vec<CubeId>>,
    /// `user_input` (the default), `inference`, `retrieval`, `finetuning` or `import`.
    #[schema(value_type = Option<String>)]
    origin: Option<Origin>,
}

/// Body of `POST /v1/memcubes`; fields not listed are ignored.
#[derive(ToSchema)]
#[expect(dead_code, reason = "documents the body, which is read part by part")]
pub(in crate::server) struct CreateCubeRequest {
    #[schema(inline)]
    #[serde(flatten)]
    cube: NewCubeRequest,
    #[serde(flatten)]
    content: ContentRequest,
    #[serde(flatten)]
    changes: ChangeRequest,
}

/// A checked request.
struct Plan {
    name: CubeName,
    content: Planned,
    durability: Durability,
    parents: Vec<CubeId>,
    origin: Origin,
    changes: CubeChanges,
}

enum Planned {
    Plaintext(Payload),
    Activation(TokenizedContent),
    /// Where it lies.
    Adapter(String),
}

/// Makes a cube. The answer comes when its KV is computed and, unless `durable` is false, on disk.
#[utoipa::path(
    post,
    path = "/v1/memcubes",
    request_body = CreateCubeRequest,
    responses((status = 201, body = CubeAnswer), (status = "4XX", body = ErrorBody))
)]
pub(in crate::server) async fn create(
    State(app): State<AppRef>,
    Extension(principal): Extension<Principal>,
    headers: HeaderMap,
    body: JsonBody,
) -> Result<Response, ApiError> {
    let _call = app.begin_call()?;
    let asking = principal.clone();
    let plan = app.prepare(body, move |app, body| plan(app, body, &asking)).await?;
    let service = service(&app)?;
    let (payload, work) = match plan.content {
        Planned::Plaintext(payload) => (payload, Work::none("A plaintext cube has no KV.")),
        Planned::Adapter(path) => (read_adapter(&app, &headers, path).await?, Work::none("An adapter has no KV.")),
        Planned::Activation(content) => {
            let durable = plan.durability == Durability::Synced;
            let keeping = Keeping {
                domain: domain_of(&app, &plan.name),
                durable,
                erase_on_free: plan.changes.erase_on_free.unwrap_or(false),
                priority: plan.changes.priority.unwrap_or_default(),
            };
            content.materialize(service, keeping).await?
        }
    };
    let Plan { name, parents, origin, changes, durability, .. } = plan;
    let new = NewCube { name, payload, parents, origin, changes };
    let (catalog, owner) = (service.catalog.clone(), principal.clone());
    let view = blocking(move || catalog.create(&owner, new, durability)).await?;
    service.settle(&view);
    Ok((StatusCode::CREATED, Json(CubeAnswer::new(&view, &principal, false, work))).into_response())
}

fn plan(app: &App, body: &JsonBody, principal: &Principal) -> Result<Plan, ApiError> {
    let request = body.parse::<NewCubeRequest>()?;
    let name: CubeName = request.name.parse().map_err(|error| ApiError::from(error).with_param("name"))?;
    let changes = body.parse::<ChangeRequest>()?.check()?;
    // Before anything is computed for a name that will be refused.
    service(app)?.catalog.check_name(principal, &name)?;
    let content = planned(app, body, request.kind, request.adapter)?;
    let durability = if request.durable.unwrap_or(true) { Durability::Synced } else { Durability::Unsynced };
    let (parents, origin) = (request.parents.unwrap_or_default(), request.origin.unwrap_or_default());
    Ok(Plan { name, content, durability, parents, origin, changes })
}

fn planned(app: &App, body: &JsonBody, kind: Option<Kind>, adapter: Option<String>) -> Result<Planned, ApiError> {
    match (kind, adapter) {
        (Some(Kind::Parameter), Some(path)) => Ok(Planned::Adapter(path)),
        (Some(Kind::Parameter), None) => {
            Err(ApiError::invalid_field("adapter", "A parameter cube needs adapter, the path of one."))
        }
        (_, Some(_)) => Err(ApiError::invalid_field("adapter", "Only a cube of kind=\"parameter\" takes an adapter.")),
        (kind, None) => {
            let content: Content = body.parse::<ContentRequest>()?.check(app)?;
            match kind {
                Some(Kind::Plaintext) => Ok(Planned::Plaintext(content.into_plaintext()?)),
                _ => Ok(Planned::Activation(content.tokenize(app)?)),
            }
        }
    }
}
