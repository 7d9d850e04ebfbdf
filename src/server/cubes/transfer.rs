//! `POST /v1/memcubes/{name}/export` and `/v1/memcubes/import`: cubes as files, streamed, never whole in memory.

use std::io::{self, Read, Write};

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::rejection::QueryRejection;
use axum::extract::{Extension, Query, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use serde::Deserialize;
use tokio::sync::mpsc::{Receiver, Sender, channel};
use utoipa::IntoParams;

use super::content::{Keeping, Target, TokenizedContent};
use super::object::{CubeAnswer, Work};
use super::read::parsed;
use super::service::CubeService;
use super::{PUBLIC_DOMAIN, blocking, domain_of, service};
use crate::memory::{
    Binding, Catalog, CubeAddress, CubeName, Durability, Incoming, NewCube, Origin, Outgoing, Payload, PortableCube,
    Principal, Priority,
};
use crate::paging::PinnedBlocks;
use crate::server::error::{ApiError, ErrorBody};
use crate::server::{App, AppRef};

/// Pieces of a file under way between the network and the disk.
const MAX_PIECES: usize = 4;

/// How a file becomes a cube.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(in crate::server) struct ImportQuery {
    /// What the cube will be called; what it was called when left out.
    name: Option<String>,
    /// Compute the KV anew when it is another model's, from the file's tokens or text.
    rebuild: Option<bool>,
}

/// What a file came to.
enum Arrived {
    /// Its blocks are stored, or it has none.
    Whole(PortableCube, Payload, Option<PinnedBlocks>),
    /// Its blocks are of no use here: to be computed again.
    Foreign(PortableCube, Vec<u32>),
}

/// The file of a cube.
pub(super) async fn export(app: &App, principal: &Principal, address: CubeAddress) -> Result<Response, ApiError> {
    let service = service(app)?;
    let cube = service.catalog.get(principal, &address)?.cube;
    let store = if cube.payload.activation().is_some() { Some(service.engine.store()?) } else { None };
    let outgoing = blocking(move || Outgoing::new(&cube, store)).await?;
    let num_bytes = outgoing.num_bytes()?;
    let (sender, receiver) = channel(MAX_PIECES);
    tokio::task::spawn_blocking(move || {
        let mut pieces = PieceWriter(sender);
        if let Err(error) = outgoing.write(&mut pieces) {
            tracing::warn!(%error, "a cube's file ends early");
            // The connection breaks, so that nobody takes it for whole.
            let _ = pieces.0.blocking_send(Err(io::Error::other("the cube could not be read")));
        }
    });
    let stream = futures_util::stream::unfold(receiver, async |mut receiver: Receiver<io::Result<Bytes>>| {
        Some((receiver.recv().await?, receiver))
    });
    let headers = [
        (header::CONTENT_TYPE, "application/octet-stream".to_owned()),
        (header::CONTENT_LENGTH, num_bytes.to_string()),
    ];
    Ok((headers, Body::from_stream(stream)).into_response())
}

/// Makes a cube of a file that `.../export` wrote.
#[utoipa::path(
    post,
    path = "/v1/memcubes/import",
    params(ImportQuery),
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses((status = 201, body = CubeAnswer), (status = "4XX", body = ErrorBody))
)]
pub(in crate::server) async fn import(
    State(app): State<AppRef>,
    Extension(principal): Extension<Principal>,
    query: Result<Query<ImportQuery>, QueryRejection>,
    request: Request,
) -> Result<Response, ApiError> {
    let _call = app.begin_call()?;
    let ImportQuery { name, rebuild } = parsed(query)?;
    let name: Option<CubeName> =
        name.map(|name| name.parse().map_err(|error| ApiError::from(error).with_param("name"))).transpose()?;
    let service = service(&app)?;
    let max_bytes = app.config.request_limits.max_import_bytes;
    let (sender, receiver) = channel(MAX_PIECES);
    let arrival = Arrival {
        reader: PieceReader { receiver, piece: Bytes::new() },
        name,
        may_rebuild: rebuild.unwrap_or(false),
        is_open: app.api_keys.is_open(),
        service: service.clone(),
        principal: principal.clone(),
    };
    let reading = tokio::task::spawn_blocking(move || arrival.read());
    let (fed, read) = tokio::join!(feed(request.into_body(), sender, max_bytes, &app), reading);
    let read = read.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()));
    // What is wrong with the body explains what is wrong with the file.
    fed?;
    let (name, arrived) = read?;
    let (cube, payload, work) = match arrived {
        Arrived::Whole(cube, payload, pins) => {
            // Before the hold of the thread that stored them ends.
            pins.iter().for_each(|pins| service.engine.hold(pins.hashes()));
            let restored_tokens = payload.activation().map_or(0, |activation| activation.token_ids().len());
            (cube, payload, Work::restored(restored_tokens))
        }
        Arrived::Foreign(cube, token_ids) => {
            let content = rebuilt(&app, &cube, token_ids)?;
            let (erase_on_free, domain) = (cube.erase_on_free, domain_of(&app, &name));
            let keeping = Keeping { domain, durable: true, erase_on_free, priority: Priority::default() };
            let (payload, work) = content.materialize(service, keeping).await?;
            (cube, payload, work)
        }
    };
    let new = NewCube { name, payload, parents: Vec::new(), origin: Origin::Import, changes: cube.changes() };
    let (catalog, owner) = (service.catalog.clone(), principal.clone());
    let view = blocking(move || catalog.create(&owner, new, Durability::Synced)).await?;
    service.settle(&view);
    Ok((StatusCode::CREATED, Json(CubeAnswer::new(&view, &principal, false, work))).into_response())
}

/// The content of a file whose blocks are another model's.
fn rebuilt(app: &App, cube: &PortableCube, token_ids: Vec<u32>) -> Result<TokenizedContent, ApiError> {
    let (known, old) = (service(app)?.engine.binding()?, cube.binding.as_ref());
    let is_same = old.is_some_and(|old| is_same_text(old, &known));
    match &cube.twin {
        twin if is_same => TokenizedContent::of_tokens(twin.clone(), token_ids, old.and_then(|old| old.template), app),
        Some(twin) => {
            let target = if old.is_some_and(|old| old.template.is_some()) { Target::Chat } else { Target::Completion };
            super::content::Content::Written(twin.clone(), target).tokenize(app)
        }
        None => Err(other_model(cube, &known)),
    }
}

/// Whether the tokens of the other model are those of this one.
fn is_same_text(old: &Binding, known: &Binding) -> bool {
    old.tokenizer == known.tokenizer && old.template.is_none_or(|template| known.template == Some(template))
}

fn other_model(cube: &PortableCube, known: &Binding) -> ApiError {
    let Some(old) = &cube.binding else { return ApiError::internal("The server failed; its log says why.") };
    let what = match old.weights == known.weights {
        true => "was computed by other kernels, in other types or under another template".to_owned(),
        false => format!("was computed by another model ({} {}, weights {})", old.architecture, old.dtype, old.weights),
    };
    let help = match (&cube.twin, is_same_text(old, known)) {
        (None, false) => "The file has no text to compute it anew from; load that model.",
        _ => "Send the file again with rebuild=true to have it computed for this model.",
    };
    ApiError::conflict(format!("The KV of cube `{}` {what}. {help}", cube.name)).with_code("other_model")
}

/// A file as it is read, on a thread that may wait for the disk.
struct Arrival {
    reader: PieceReader,
    name: Option<CubeName>,
    may_rebuild: bool,
    is_open: bool,
    service: CubeService,
    principal: Principal,
}

impl Arrival {
    fn read(self) -> Result<(CubeName, Arrived), ApiError> {
        let Self { reader, name, may_rebuild, is_open, service, principal } = self;
        let incoming = Incoming::open(reader).map_err(bad_file)?;
        let name = name.unwrap_or_else(|| incoming.cube.name.clone());
        // Before anything is stored for a name that will be refused.
        check_name(&service.catalog, &principal, &name)?;
        let cube = incoming.cube.clone();
        if cube.binding.is_none() {
            return Ok((name, Arrived::Whole(cube, incoming.into_plaintext().map_err(bad_file)?, None)));
        }
        let (known, store) = (service.engine.binding()?, service.engine.store()?);
        let is_ours = cube.binding.as_ref().is_some_and(|binding| binding.identity == known.identity);
        if !is_ours || incoming.format() != Some(store.format()) {
            let can_rebuild = cube.twin.is_some() || cube.binding.as_ref().is_some_and(|old| is_same_text(old, &known));
            return match may_rebuild && can_rebuild {
                true => Ok((name, Arrived::Foreign(cube, incoming.token_ids().unwrap_or_default().to_vec()))),
                false => Err(other_model(&cube, &known)),
            };
        }
        let namespace = if is_open { PUBLIC_DOMAIN } else { name.namespace() };
        let (payload, pins) = incoming.store(&store, namespace).map_err(bad_file)?;
        Ok((name, Arrived::Whole(cube, payload, Some(pins))))
    }
}

fn check_name(catalog: &Catalog, principal: &Principal, name: &CubeName) -> Result<(), ApiError> {
    catalog.check_name(principal, name).map_err(|error| ApiError::from(error).with_param("name"))
}

/// A file that is not what it should be is the client's.
fn bad_file(error: crate::Error) -> ApiError {
    match error {
        crate::Error::Format(why) | crate::Error::Unsupported(why) => {
            ApiError::bad_request(format!("The file cannot be imported: {why}."))
        }
        other => other.into(),
    }
}

/// Hands the body over piece by piece; when nobody wants it any more it is read to its end, so that the client gets to
/// read the answer.
async fn feed(body: Body, sender: Sender<io::Result<Bytes>>, max_bytes: u64, app: &App) -> Result<(), ApiError> {
    let mut body = body.into_data_stream();
    let mut num_bytes = 0;
    loop {
        let next = tokio::time::timeout(app.config.connection_limits.body_timeout, body.next()).await;
        let piece = match next {
            Err(_) => return Err(ApiError::bad_request("The body did not arrive in time.")),
            Ok(None) => return Ok(()),
            Ok(Some(Err(_))) => return Err(ApiError::bad_request("The body could not be read.")),
            Ok(Some(Ok(piece))) => piece,
        };
        num_bytes += piece.len() as u64;
        if num_bytes > max_bytes {
            return Err(ApiError::body_too_large(usize::try_from(max_bytes).unwrap_or(usize::MAX)));
        }
        let _ = sender.send(Ok(piece)).await;
    }
}

/// What is written goes to the network.
struct PieceWriter(Sender<io::Result<Bytes>>);

impl Write for PieceWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let sent = self.0.blocking_send(Ok(Bytes::copy_from_slice(bytes)));
        sent.map_err(|_| io::Error::new(io::ErrorKind::BrokenPipe, "the client has gone"))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What comes from the network is read.
struct PieceReader {
    receiver: Receiver<io::Result<Bytes>>,
    piece: Bytes,
}

impl Read for PieceReader {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            match self.receiver.blocking_recv() {
                Some(piece) => self.piece = piece?,
                None => return Ok(0),
            }
        }
        let taken = self.piece.split_to(self.piece.len().min(bytes.len()));
        bytes[..taken.len()].copy_from_slice(&taken);
        Ok(taken.len())
    }
}
