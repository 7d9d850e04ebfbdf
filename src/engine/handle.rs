//! How other threads reach the engine: a bounded queue in, one bounded stream per request out.
//!
//! The engine thread never waits for a reader: a stream has room for every token its request can produce. Dropping a
//! stream cancels its request; the engine sees the flag at its next step.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use crossbeam::channel::{Receiver, Sender, TrySendError};

use super::adapters::{AdapterLoader, LoadedAdapter};
use super::erasure::ErasureQueue;
use super::output::output_channel;
pub use super::output::{OutputSink, OutputStream};
use super::request::{GenerateRequest, Task};
use crate::kv::BlockHash;
use crate::telemetry::{Degradations, EngineMetrics};
use crate::{Result as CrateResult, unsupported};

/// A cheap, cloneable way to the engine thread.
#[derive(Clone)]
pub struct EngineHandle {
    submissions: Sender<Submission>,
    /// Wakes an idle engine so that it sees `stopping`.
    waker: Sender<()>,
    info: Arc<EngineInfo>,
    metrics: Arc<EngineMetrics>,
    stopping: Arc<AtomicBool>,
    /// What the engine ended with, when that was an error.
    failure: Arc<OnceLock<String>>,
    /// What it goes on without.
    degradations: Degradations,
    leftovers: Option<Leftovers>,
    erasures: Option<ErasureQueue>,
    adapters: Option<Arc<dyn AdapterLoader>>,
}

/// What is submitted while the engine ends and that nobody would answer: a channel keeps its messages as long as it has
/// a sender.
#[derive(Clone)]
struct Leftovers {
    queue: Receiver<Submission>,
    stopped: Arc<AtomicBool>,
}

/// What callers must know about the engine to make requests it can serve.
#[derive(Debug, Clone)]
pub struct EngineInfo {
    /// Longest prompt plus output, in tokens.
    pub max_model_len: usize,
    /// Tokens that can be sampled: rows of the output projection.
    pub vocab_size: usize,
    /// Features of a hidden state, the length of an embedding.
    pub hidden_size: usize,
    /// Tokens per KV block.
    pub block_size: usize,
    /// KV blocks in the device pool.
    pub num_blocks: usize,
    /// Numbers in the matrices that a token is multiplied by.
    pub num_multiplied: usize,
}

/// A request on its way to the engine.
pub struct Submission {
    /// What to run.
    pub request: GenerateRequest,
    /// Where its events go.
    pub sink: OutputSink,
}

/// Why a request was not taken.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SubmitError {
    /// The waiting queue is full; try again later.
    #[error("the engine's queue is full; try again later")]
    QueueFull,
    /// The engine is draining or has stopped.
    #[error("the engine is shutting down")]
    ShuttingDown,
}

impl EngineHandle {
    /// Ties a handle to the engine that reads the other end of `submissions`.
    pub fn new(
        submissions: Sender<Submission>,
        waker: Sender<()>,
        info: EngineInfo,
        metrics: Arc<EngineMetrics>,
        stopping: Arc<AtomicBool>,
    ) -> Self {
        Self {
            submissions,
            waker,
            info: Arc::new(info),
            metrics,
            stopping,
            failure: Arc::default(),
            degradations: Degradations::default(),
            leftovers: None,
            erasures: None,
            adapters: None,
        }
    }

    /// Has blocks erased through `erasures`.
    pub(super) fn with_erasures(mut self, erasures: ErasureQueue) -> Self {
        self.erasures = Some(erasures);
        self
    }

    /// Says through the handle what the engine writes to `failure` when it ends with an error.
    pub(super) fn with_failure(mut self, failure: Arc<OnceLock<String>>) -> Self {
        self.failure = failure;
        self
    }

    /// Says through the handle what the engine and its device go on without.
    pub fn with_degradations(mut self, degradations: Degradations) -> Self {
        self.degradations = degradations;
        self
    }

    /// Drops what is still in `queue`, the engine's end of the submissions, when `stopped` says that the engine has
    /// looked into it for the last time.
    pub(super) fn with_leftovers(mut self, queue: Receiver<Submission>, stopped: Arc<AtomicBool>) -> Self {
        self.leftovers = Some(Leftovers { queue, stopped });
        self
    }

    /// Loads adapters through `loader`.
    pub fn with_adapters(mut self, loader: Arc<dyn AdapterLoader>) -> Self {
        self.adapters = Some(loader);
        self
    }

    /// Reads an adapter's folder or GGUF file and brings it onto the engine's device. Takes as long as reading does, on the calling
    /// thread; the engine goes on meanwhile.
    ///
    /// # Errors
    /// Those of [`Adapter::read`](crate::adapters::Adapter::read), and `Unsupported` where the device cannot apply any.
    pub fn load_adapter(&self, path: &Path) -> CrateResult<LoadedAdapter> {
        match &self.adapters {
            Some(loader) => loader.load(path),
            None => Err(unsupported!("this engine takes no adapters")),
        }
    }

    /// Has nobody find blocks on the device or on the host any more, and zeroes them as soon as nobody uses them. Returns when
    /// that is begun: none of them is on its way to disk then, where the caller may erase them next. Waits for the engine's
    /// thread.
    pub fn erase(&self, blocks: Vec<BlockHash>) {
        if let Some(erasures) = &self.erasures {
            erasures.erase(blocks);
        }
    }

    /// Queues a request. Its events arrive on the stream; dropping the stream cancels it.
    pub fn submit(&self, request: GenerateRequest) -> Result<OutputStream, SubmitError> {
        if self.stopping.load(Ordering::Acquire) {
            return Err(SubmitError::ShuttingDown);
        }
        let (sink, stream) = output_channel(self.max_output_tokens(&request));
        self.submissions.try_send(Submission { request, sink }).map_err(|error| match error {
            TrySendError::Full(_) => SubmitError::QueueFull,
            TrySendError::Disconnected(_) => SubmitError::ShuttingDown,
        })?;
        match &self.leftovers {
            // Either the engine's last look found the submission, or it is found here.
            Some(Leftovers { queue, stopped }) if stopped.load(Ordering::SeqCst) => {
                queue.try_iter().for_each(drop);
                Err(SubmitError::ShuttingDown)
            }
            _ => Ok(stream),
        }
    }

    /// Whether new requests are taken: nobody asked the engine to stop.
    pub fn is_accepting(&self) -> bool {
        !self.stopping.load(Ordering::Acquire)
    }

    /// Why the engine ended, when it did so with an error.
    pub fn failure(&self) -> Option<&str> {
        self.failure.get().map(String::as_str)
    }

    /// What the engine and its device go on without.
    pub fn degradations(&self) -> &Degradations {
        &self.degradations
    }

    /// The engine's fixed properties.
    pub fn info(&self) -> &EngineInfo {
        &self.info
    }

    /// Counters and histograms the engine keeps.
    pub fn metrics(&self) -> &EngineMetrics {
        &self.metrics
    }

    /// Refuses new requests from now on; the engine finishes what it has and its thread ends.
    pub fn drain(&self) {
        self.stopping.store(true, Ordering::Release);
        // A full channel means that a wake-up is already under way.
        let _ = self.waker.try_send(());
    }

    /// Whether the engine is draining or has stopped.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    fn max_output_tokens(&self, request: &GenerateRequest) -> usize {
        let room = self.info.max_model_len.saturating_sub(request.prompt.len());
        match &request.task {
            Task::Generate(sampling) => sampling.max_tokens.min(room),
            Task::Embed | Task::Deposit { .. } => 0,
        }
    }
}
