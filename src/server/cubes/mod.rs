//! `/v1/memcubes`: MemCubes over HTTP.
//!
//! A cube's name contains slashes, so a POST's last segment is what to do and everything before it is the name; a GET
//! ends with `/lineage` or with the name. Names that end with such a word cannot be made. Changes of the catalog wait for
//! the disk and run on another thread.

pub(super) mod actions;
pub(super) mod change;
pub(super) mod create;
pub(super) mod events;
pub(super) mod read;
pub(super) mod transfer;

mod adapter;
mod content;
mod engine;
mod erase;
mod holds;
mod object;
mod prefill;
mod save;
mod service;
mod snapshot;
mod sweep;

use axum::Router;
use axum::routing::{get, post};

use super::error::ApiError;
use super::{App, AppRef};
use crate::memory::{CubeName, Principal};

pub(super) use self::adapter::{AdapterCube, adapter_cube, adapter_cubes, adapter_of, find_adapter};
pub use self::engine::{OpenBlocks, VaultEngine};
pub use self::erase::finish_erasures;
pub use self::holds::hold_all;
pub(super) use self::holds::level_of;
pub(super) use self::prefill::{PREFILL_INTERVAL, prefill};
pub(super) use self::save::{CubeToSave, check_save, save};
pub use self::service::{BlockRequest, BlockSource, BoxFuture, CubeEngine, CubeService, Materialized, Verified};
pub(super) use self::sweep::sweep;

/// The domain of a server without keys.
const PUBLIC_DOMAIN: &str = "public";

/// The routes.
pub(super) fn routes() -> Router<AppRef> {
    Router::new()
        .route("/v1/memcubes", post(create::create).get(read::list))
        .route("/v1/memcubes/events", get(events::events))
        .route("/v1/memcubes/import", post(transfer::import))
        .route("/v1/memcubes/{*rest}", get(read::get).patch(change::change).delete(change::delete).post(actions::act))
}

/// What the server has for cubes; without a catalog there are none.
pub(super) fn service(app: &App) -> Result<&CubeService, ApiError> {
    let message = "This server keeps no memory cubes; start it without --no-vault.";
    app.model.cubes.as_ref().ok_or_else(|| ApiError::not_implemented(message))
}

/// Runs a change of the catalog where it may wait for the disk.
async fn blocking<T: Send + 'static>(
    change: impl FnOnce() -> crate::Result<T> + Send + 'static,
) -> Result<T, ApiError> {
    match tokio::task::spawn_blocking(change).await {
        Ok(result) => Ok(result?),
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// The cache domain of a cube's blocks. Without keys everybody is one, and so is the domain.
fn domain_of(app: &App, name: &CubeName) -> String {
    if app.api_keys.is_open() { PUBLIC_DOMAIN.to_owned() } else { name.namespace().to_owned() }
}

/// The cache domain of a request. No namespace has a slash in it, so no salt and no key leads into a cube's domain.
pub(super) fn request_domain(app: &App, principal: &Principal, salt: Option<&str>) -> String {
    match (app.api_keys.is_open(), salt) {
        (true, None) => PUBLIC_DOMAIN.to_owned(),
        (true, Some(salt)) => format!("salt/{salt}"),
        (false, None) => format!("key/{principal}"),
        (false, Some(salt)) => format!("key/{principal}/{salt}"),
    }
}
