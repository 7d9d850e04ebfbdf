//! The HTTP server: OpenAI's endpoints as vLLM serves them, health, metrics.
//!
//! A handler parses, plans, submits and then collects or streams; the engine does the work on its own thread. The
//! server runs on one thread: what would keep it busy for long (tokenizing a large body) goes to another.

mod adapters;
mod auth;
mod config;
mod cubes;
mod error;
mod health;
mod hosts;
mod json;
mod limits;
mod listener;
mod metrics;
mod openai;
mod openapi;
mod request_id;
mod routes;
mod sse;
mod tokenize;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tokio::sync::Notify;

pub use self::adapters::{AdapterRegistry, MergeRules, NamedAdapter};
pub use self::auth::ApiKeys;
pub use self::config::{ServedModel, ServerConfig};
pub use self::cubes::{
    BlockRequest, BlockSource, BoxFuture, CubeEngine, CubeService, Materialized, OpenBlocks, VaultEngine, Verified,
    finish_erasures, hold_all,
};
pub use self::error::{ApiError, ErrorBody, ErrorObject};
use self::hosts::Hosts;
use self::json::JsonBody;
pub use self::limits::{ConnectionLimits, RequestLimits};
pub use self::listener::{ServerThread, serve};

/// What every handler shares.
pub(crate) struct App {
    pub(crate) config: ServerConfig,
    pub(crate) model: ServedModel,
    pub(crate) api_keys: ApiKeys,
    hosts: Hosts,
    calls: Calls,
    engine_ended: AtomicBool,
}

pub(crate) type AppRef = Arc<App>;

/// The calls in progress, counted so that a shutdown can wait for them.
#[derive(Default)]
struct Calls {
    num_running: AtomicUsize,
    ended: Notify,
    draining: AtomicBool,
}

/// Counts as a call in progress while it lives.
pub(crate) struct CallGuard(AppRef);

impl App {
    /// `address` is where the server listens.
    fn new(config: ServerConfig, model: ServedModel, address: SocketAddr) -> AppRef {
        let api_keys = ApiKeys::new(&config.api_keys, config.admin_api_key.as_ref());
        let hosts = Hosts::new(&config, address);
        let (calls, engine_ended) = (Calls::default(), AtomicBool::new(false));
        Arc::new(Self { config, model, api_keys, hosts, calls, engine_ended })
    }

    /// Whether new calls are taken.
    fn is_serving(&self) -> bool {
        !self.is_draining() && !self.engine_ended.load(Ordering::Acquire) && self.model.engine.is_accepting()
    }

    fn is_draining(&self) -> bool {
        self.calls.draining.load(Ordering::Acquire)
    }

    fn num_calls(&self) -> usize {
        self.calls.num_running.load(Ordering::Acquire)
    }

    /// An error that says why no new calls are taken, when none are.
    fn check_serving(&self) -> Result<(), ApiError> {
        match self.model.engine.failure() {
            Some(why) => Err(ApiError::unavailable(format!("The engine has ended: {why}"))),
            None if self.is_serving() => Ok(()),
            None => Err(ApiError::unavailable("The server is shutting down.")),
        }
    }

    /// Starts a call, unless the server is draining.
    fn begin_call(self: &Arc<Self>) -> Result<CallGuard, ApiError> {
        self.check_serving()?;
        self.calls.num_running.fetch_add(1, Ordering::AcqRel);
        Ok(CallGuard(Arc::clone(self)))
    }

    /// Parses and plans a request: here when it is small, on another thread when it would hold up running streams or wait
    /// for files.
    async fn prepare<T: Send + 'static>(
        self: &Arc<Self>,
        body: JsonBody,
        plan: impl FnOnce(&App, &JsonBody) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        if body.len() <= self.config.request_limits.max_inline_bytes && !self.may_wait_for_files() {
            return plan(self, &body);
        }
        let app = Arc::clone(self);
        match tokio::task::spawn_blocking(move || plan(&app, &body)).await {
            Ok(planned) => planned,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }

    /// Whether planning a call may read an adapter's files, because a cube can be one.
    fn may_wait_for_files(&self) -> bool {
        self.model.cubes.as_ref().is_some_and(|cubes| cubes.catalog.has_parameters())
    }

    /// Remembers that the engine's thread went away in the middle of a request.
    fn note_engine_end(&self) {
        self.engine_ended.store(true, Ordering::Release);
    }

    fn start_draining(&self) {
        self.calls.draining.store(true, Ordering::Release);
    }

    async fn idle(&self) {
        while self.num_calls() > 0 {
            self.calls.ended.notified().await;
        }
    }
}

impl Drop for CallGuard {
    fn drop(&mut self) {
        self.0.calls.num_running.fetch_sub(1, Ordering::AcqRel);
        self.0.calls.ended.notify_one();
    }
}
