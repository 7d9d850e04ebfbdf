//! Accepts connections, bounds them, and ends in order: probes learn of it, running calls finish, connections close.

use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore};

use super::config::{ServedModel, ServerConfig};
use super::limits::ConnectionLimits;
use super::{App, AppRef, cubes, routes};
use crate::{Error, Result};

/// How long connections may take to close once their last call has ended.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Pause after a failed accept (out of file descriptors), so that the loop does not spin.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// Serves until `shutdown` completes and the calls in progress have ended, or `drain_timeout` has passed.
pub async fn serve(
    config: ServerConfig,
    model: ServedModel,
    listener: TcpListener,
    shutdown: impl Future<Output = ()>,
) -> Result<()> {
    let drain_timeout = config.drain_timeout;
    let address =
        listener.local_addr().map_err(|source| Error::Io { context: "cannot tell where it listens".into(), source })?;
    let app = App::new(config, model, address);
    let connections = Connections::new(&app);
    tokio::select! {
        () = connections.accept_from(&listener) => {}
        () = cubes::sweep(Arc::clone(&app)) => {}
        () = cubes::prefill(Arc::clone(&app)) => {}
        () = shutdown => {}
    }
    app.start_draining();
    tokio::select! {
        () = connections.accept_from(&listener) => {}
        ended = tokio::time::timeout(drain_timeout, app.idle()) => {
            if ended.is_err() {
                tracing::warn!(num_calls = app.num_calls(), "shutdown does not wait any longer for running calls");
            }
        }
    }
    drop(listener);
    connections.close().await;
    Ok(())
}

/// The open connections.
struct Connections {
    router: axum::Router,
    protocol: http1::Builder,
    graceful: GracefulShutdown,
    slots: Arc<Semaphore>,
}

impl Connections {
    fn new(app: &AppRef) -> Self {
        let limits = &app.config.connection_limits;
        Self {
            router: routes::router(app.clone()),
            protocol: protocol(limits),
            graceful: GracefulShutdown::new(),
            slots: Arc::new(Semaphore::new(limits.max_connections)),
        }
    }

    /// Takes connections for ever; each runs as its own task.
    async fn accept_from(&self, listener: &TcpListener) {
        loop {
            let slot = Arc::clone(&self.slots).acquire_owned().await.expect("the semaphore is never closed");
            let Some(stream) = accept(listener).await else { continue };
            let service = TowerToHyperService::new(self.router.clone());
            let connection = self.graceful.watch(self.protocol.serve_connection(TokioIo::new(stream), service));
            tokio::spawn(async move {
                if let Err(error) = connection.await {
                    tracing::debug!(%error, "connection ended");
                }
                drop(slot);
            });
        }
    }

    /// Lets every connection finish its answer and close.
    async fn close(self) {
        if tokio::time::timeout(CLOSE_TIMEOUT, self.graceful.shutdown()).await.is_err() {
            tracing::debug!("some connections were cut");
        }
    }
}

fn protocol(limits: &ConnectionLimits) -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout)
        .max_headers(limits.max_headers)
        .max_header_size(limits.max_header_bytes);
    builder
}

/// The next connection, set to send small writes at once: a token must not wait for the next one.
async fn accept(listener: &TcpListener) -> Option<TcpStream> {
    match listener.accept().await {
        Ok((stream, _)) => {
            if let Err(error) = stream.set_nodelay(true) {
                tracing::debug!(%error, "cannot set TCP_NODELAY");
            }
            Some(stream)
        }
        Err(error) => {
            tracing::warn!(%error, "cannot accept a connection");
            tokio::time::sleep(ACCEPT_RETRY).await;
            None
        }
    }
}

/// A server on a thread of its own.
pub struct ServerThread {
    address: SocketAddr,
    shutdown: Arc<Notify>,
    thread: JoinHandle<Result<()>>,
}

impl ServerThread {
    /// Binds `config.host:config.port` and starts to serve.
    pub fn start(config: ServerConfig, model: ServedModel) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|source| Error::Io { context: "cannot start the server's event loop".into(), source })?;
        let (listener, address) = runtime.block_on(bind(&config))?;
        let shutdown = Arc::new(Notify::new());
        let asked = Arc::clone(&shutdown);
        let serve = move || runtime.block_on(serve(config, model, listener, async move { asked.notified().await }));
        let thread = std::thread::Builder::new()
            .name("server".into())
            .spawn(serve)
            .map_err(|source| Error::Io { context: "cannot start the server's thread".into(), source })?;
        Ok(Self { address, shutdown, thread })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Asks it to drain and end; returns at once.
    pub fn shutdown(&self) {
        self.shutdown.notify_one();
    }

    /// Waits for its end.
    pub fn join(self) -> Result<()> {
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

async fn bind(config: &ServerConfig) -> Result<(TcpListener, SocketAddr)> {
    let context = || format!("cannot listen on {}:{}", config.host, config.port);
    let failed = |source| Error::Io { context: context(), source };
    let listener = TcpListener::bind((config.host.as_str(), config.port)).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    Ok((listener, address))
}
