//! `POST /v1/memcubes/{name}/{action}`: what can be done with a cube besides making, changing and deleting it.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Extension, FromRequest, Path, Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::adapter::{check_files, read_adapter};
use super::content::{Content, ContentRequest, Keeping, TokenizedContent};
use super::object::{CubeAnswer, Work};
use super::service::{CubeService, Verified};
use super::{blocking, service, snapshot};
use crate::kv::BlockHash;
use crate::memory::{Catalog, Cube, CubeAddress, CubeName, CubeView, Payload, Principal};
use crate::server::error::{ApiError, ErrorBody};
use crate::server::json::JsonBody;
use crate::server::{App, AppRef};

/// Actions that have a name and no code yet.
const FUTURE_ACTIONS: [&str; 6] = ["promote", "demote", "distill", "describe", "merge", "fuse"];

/// A change of a cube's header that needs nothing but its name.
type Toggle = fn(&Catalog, &Principal, &CubeName) -> crate::Result<CubeView>;

/// Body of `rename` and `fork`.
#[derive(Debug, Deserialize)]
struct NameRequest {
    name: String,
}

/// Body of `.../append` to a parameter cube.
#[derive(Debug, Deserialize)]
struct AdapterRequest {
    adapter: Option<String>,
}

/// Body of `.../rename` and `.../fork` (`name`), of `.../restore` (`snapshot`) and of `.../append` (one content, or
/// `adapter`); the others have none.
#[derive(ToSchema)]
#[expect(dead_code, reason = "documents the body, which is read part by part")]
pub(in crate::server) struct ActionRequest {
    /// The new name.
    name: Option<String>,
    /// The id of a snapshot.
    snapshot: Option<String>,
    /// The path of an adapter, below a `--lora-root`.
    adapter: Option<String>,
    #[serde(flatten)]
    content: ContentRequest,
}

/// Answer of `.../verify`.
#[derive(Serialize, ToSchema)]
pub(in crate::server) struct VerifiedCube {
    object: &'static str,
    name: String,
    version: u32,
    /// Blocks that are as they should be.
    whole: usize,
    /// Blocks that are not there; the next use computes them.
    missing: usize,
    /// Blocks that were damaged and are dropped; the next use computes them.
    damaged: usize,
    restored_tokens: usize,
    reason: &'static str,
}

/// Does something with a cube: `append`, `fork`, `rename`, `freeze`, `unfreeze`, `pin`, `unpin`, `verify` or `export`,
/// which answers the bytes of a file. `snapshot` and `restore` also take a namespace.
#[utoipa::path(
    post,
    path = "/v1/memcubes/{name}/{action}",
    params(
        ("name" = String, Path, description = "namespace/path; for fork, verify and export also namespace/path@version"),
        ("action" = String, Path, description = "append, fork, rename, freeze, unfreeze, pin, unpin, verify, export, snapshot or restore")
    ),
    request_body = ActionRequest,
    responses(
        (status = 200, body = CubeAnswer),
        (status = 201, body = CubeAnswer, description = "fork"),
        (status = "4XX", body = ErrorBody)
    )
)]
pub(in crate::server) async fn act(
    State(app): State<AppRef>,
    Extension(principal): Extension<Principal>,
    Path(rest): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    let unknown = || ApiError::not_found("Expected an action behind the cube's name: append, fork, rename, ...");
    let (name, action) = rest.rsplit_once('/').ok_or_else(unknown)?;
    match action {
        "append" => {
            let headers = request.headers().clone();
            append(&app, principal, &headers, name.parse()?, JsonBody::from_request(request, &app).await?).await
        }
        "fork" => fork(&app, principal, name.parse()?, new_name(&app, request).await?).await,
        "rename" => rename(&app, principal, name.parse()?, new_name(&app, request).await?).await,
        "freeze" => toggle(&app, principal, name.parse()?, Catalog::freeze).await,
        "unfreeze" => toggle(&app, principal, name.parse()?, Catalog::unfreeze).await,
        "pin" => toggle(&app, principal, name.parse()?, Catalog::pin).await,
        "unpin" => toggle(&app, principal, name.parse()?, Catalog::unpin).await,
        "export" => super::transfer::export(&app, &principal, name.parse()?).await,
        "snapshot" => snapshot::create(&app, principal, name.parse()?).await,
        "restore" => {
            let request = JsonBody::from_request(request, &app).await?.parse()?;
            snapshot::restore(&app, principal, name.parse()?, request).await
        }
        "verify" => verify(&app, &principal, name.parse()?).await,
        future if FUTURE_ACTIONS.contains(&future) => {
            Err(ApiError::not_implemented(format!("Cubes cannot do '{future}' yet.")))
        }
        _ => Err(unknown()),
    }
}

async fn new_name(app: &AppRef, request: Request) -> Result<CubeName, ApiError> {
    let body = JsonBody::from_request(request, app).await?.parse::<NameRequest>()?;
    body.name.parse().map_err(|error| ApiError::from(error).with_param("name"))
}

fn answer(status: StatusCode, view: &CubeView, principal: &Principal, work: Work) -> Response {
    (status, Json(CubeAnswer::new(view, principal, false, work))).into_response()
}

async fn toggle(app: &App, principal: Principal, name: CubeName, change: Toggle) -> Result<Response, ApiError> {
    let (catalog, asking) = (service(app)?.catalog.clone(), principal.clone());
    let view = blocking(move || change(&catalog, &asking, &name)).await?;
    service(app)?.settle(&view);
    Ok(answer(StatusCode::OK, &view, &principal, Work::none("Only the header was changed.")))
}

async fn rename(app: &App, principal: Principal, name: CubeName, target: CubeName) -> Result<Response, ApiError> {
    let (catalog, asking) = (service(app)?.catalog.clone(), principal.clone());
    let view = blocking(move || catalog.rename(&asking, &name, target)).await?;
    Ok(answer(StatusCode::OK, &view, &principal, Work::none("Only the name was changed.")))
}

async fn fork(app: &App, principal: Principal, source: CubeAddress, name: CubeName) -> Result<Response, ApiError> {
    let (catalog, asking) = (service(app)?.catalog.clone(), principal.clone());
    let view = blocking(move || catalog.fork(&asking, &source, name)).await?;
    service(app)?.settle(&view);
    Ok(answer(StatusCode::CREATED, &view, &principal, Work::none("The fork shares the blocks of its source.")))
}

async fn append(
    app: &AppRef,
    principal: Principal,
    headers: &HeaderMap,
    name: CubeName,
    body: JsonBody,
) -> Result<Response, ApiError> {
    let _call = app.begin_call()?;
    let service = service(app)?;
    let address = CubeAddress::from(name.clone());
    let head = service.catalog.get(&principal, &address)?.cube;
    service.catalog.check_append(&principal, &name)?;
    let (payload, work) = match head.payload.as_ref() {
        Payload::Plaintext(twin) => {
            let twin = body.parse::<ContentRequest>()?.check(app)?.behind_plaintext(twin)?;
            (Payload::Plaintext(twin), Work::none("A plaintext cube has no KV."))
        }
        Payload::Activation(activation) => {
            let domain = activation.binding().domain.to_string();
            let (known, shared) = (service.engine.binding()?, head.payload.clone());
            let is_current = known.tokenizer == activation.binding().tokenizer;
            let tokenized = app.prepare(body, move |app, body| behind(app, body, &shared, is_current)).await?;
            let (priority, erase_on_free) = (head.governance.hold(), head.governance.erase_on_free);
            tokenized.materialize(service, Keeping { domain, durable: true, erase_on_free, priority }).await?
        }
        Payload::Parameter(_) => {
            let missing =
                || ApiError::invalid_field("adapter", "This cube is an adapter; its next version is one, too.");
            let path = body.parse::<AdapterRequest>()?.adapter.ok_or_else(missing)?;
            (read_adapter(app, headers, path).await?, Work::none("An adapter has no KV."))
        }
    };
    let (catalog, asking, based_on) = (service.catalog.clone(), principal.clone(), head.version);
    let view = blocking(move || catalog.append(&asking, &name, based_on, payload)).await?;
    service.settle(&view);
    Ok(answer(StatusCode::OK, &view, &principal, work))
}

/// The tokens of a cube with the body's content behind it.
fn behind(app: &App, body: &JsonBody, payload: &Payload, is_current: bool) -> Result<TokenizedContent, ApiError> {
    let content: Content = body.parse::<ContentRequest>()?.check(app)?;
    let activation = payload.activation().expect("the caller has looked");
    if !is_current {
        let message =
            "The cube's tokens are of another vocabulary than this model's; make the cube anew from its text.";
        return Err(ApiError::conflict(message));
    }
    content.tokenize_behind(activation, app)
}

async fn verify(app: &AppRef, principal: &Principal, address: CubeAddress) -> Result<Response, ApiError> {
    let service: &CubeService = service(app)?;
    let cube = service.catalog.get(principal, &address)?.cube;
    if cube.payload.parameter().is_some() {
        return verify_adapter(app, cube).await;
    }
    let blocks: Vec<BlockHash> = cube.payload.blocks().copied().collect();
    let token_ids = cube.payload.activation().map_or(&[][..], |activation| activation.token_ids());
    let Verified { whole, missing, damaged } = service.engine.verify(token_ids, &blocks).await;
    let reason = match (whole, missing + damaged) {
        (0, 0) => "The cube has no blocks.",
        (_, 0) => "All blocks are whole.",
        _ => "Some blocks must be computed again at the next use.",
    };
    Ok(Json(VerifiedCube::new(&cube, Verified { whole, missing, damaged }, reason)).into_response())
}

/// An adapter counts as one block.
async fn verify_adapter(app: &AppRef, cube: Arc<Cube>) -> Result<Response, ApiError> {
    let checking = tokio::task::spawn_blocking({
        let (app, cube) = (AppRef::clone(app), Arc::clone(&cube));
        move || cube.payload.parameter().map(|parameter| check_files(&app, parameter)).transpose()
    });
    let checked = checking.await.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))?;
    let (verified, reason) = match checked.flatten() {
        Some(true) => (Verified { whole: 1, ..Verified::default() }, "The adapter's files hold what they held."),
        Some(false) => (
            Verified { damaged: 1, ..Verified::default() },
            "The adapter's files hold something else by now; put the old ones back or append what is there.",
        ),
        None => (Verified { missing: 1, ..Verified::default() }, "The adapter's files are gone."),
    };
    Ok(Json(VerifiedCube::new(&cube, verified, reason)).into_response())
}

impl VerifiedCube {
    fn new(cube: &Cube, verified: Verified, reason: &'static str) -> Self {
        let Verified { whole, missing, damaged } = verified;
        let (name, version) = (cube.name.to_string(), cube.version.get());
        Self { object: "memcube.verification", name, version, whole, missing, damaged, restored_tokens: 0, reason }
    }
}
