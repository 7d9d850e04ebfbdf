//! An engine on a thread, and plain calls to it.

use std::path::Path;
use std::thread::JoinHandle;
use std::time::Duration;

use mneme::backend::cpu::{CpuBackend, Isa};
use mneme::backend::{Backend, DType};
use mneme::engine::{
    Deposited, Engine, EngineConfig, EngineHandle, FinishReason, GenerateRequest, MergeConfig, OutputEvent,
    OutputStream, Reuse, SamplingParams, SchedulerLimits, Task, TierConfig, TokenLogprobs,
};
use mneme::models::{Checkpoint, Model};
use mneme::telemetry::MergeStage;

/// What a test engine is started with.
#[derive(Debug, Clone)]
pub struct Setup {
    pub limits: SchedulerLimits,
    /// What matrices are kept as; `None` keeps them as stored.
    pub dtype: Option<DType>,
    pub kv_dtype: DType,
    /// Whether to use the output projection as embedding too.
    pub tied: bool,
    pub eos_token_ids: Vec<u32>,
    pub isa: Isa,
    pub num_threads: usize,
    /// Bytes of the host tier.
    pub host_bytes: usize,
    pub merge: MergeConfig,
    /// Host memory for adapters.
    pub adapter_host_bytes: usize,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            limits: limits(),
            dtype: None,
            kv_dtype: DType::BF16,
            tied: false,
            eos_token_ids: vec![],
            isa: Isa::best(),
            num_threads: 2,
            host_bytes: 0,
            merge: MergeConfig::default(),
            adapter_host_bytes: 1 << 30,
        }
    }
}

/// Limits for small tests.
pub fn limits() -> SchedulerLimits {
    SchedulerLimits {
        max_num_seqs: 16,
        max_num_batched_tokens: 512,
        max_num_waiting: 64,
        max_prompt_logits: 64,
        max_model_len: 1024,
        block_size: 16,
        num_blocks: 256,
        prefix_caching: true,
    }
}

/// A running engine; drains when dropped.
pub struct TestEngine {
    pub handle: EngineHandle,
    thread: Option<JoinHandle<()>>,
}

/// How long a test waits for blocks from below: it wants them, however busy the machine is.
pub const PATIENCE: Duration = Duration::from_secs(600);

/// What came back for one request.
#[derive(Debug, Clone, Default)]
pub struct Output {
    pub tokens: Vec<u32>,
    pub logprobs: Vec<TokenLogprobs>,
    pub prompt_logprobs: Vec<Option<TokenLogprobs>>,
    pub cached_tokens: usize,
    pub reuse: Reuse,
    pub embedding: Vec<f32>,
    pub deposited: Option<Deposited>,
    pub reason: Option<FinishReason>,
}

impl TestEngine {
    /// Waits until merging has come to a stage.
    pub fn wait_for_merge(&self, stage: MergeStage) {
        while self.handle.metrics().merges.stage() != stage {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Loads a checkpoint onto `backend`; the setup's instruction set and threads were the caller's to use.
    pub fn start<B: Backend>(backend: B, path: &Path, setup: Setup) -> Self {
        let tiers = TierConfig {
            host_bytes: setup.host_bytes,
            num_io_threads: 2,
            fetch_wait: Some(PATIENCE),
            ..TierConfig::default()
        };
        Self::start_with_tiers(backend, path, setup, tiers)
    }

    /// The same with tiers below the device.
    pub fn start_with_tiers<B: Backend>(backend: B, path: &Path, setup: Setup, tiers: TierConfig) -> Self {
        Self::try_start(backend, path, setup, tiers, || {}).unwrap()
    }

    /// The same where it may fail; `before` is called when the model is loaded.
    pub fn try_start<B: Backend>(
        backend: B,
        path: &Path,
        setup: Setup,
        tiers: TierConfig,
        before: impl FnOnce(),
    ) -> mneme::Result<Self> {
        let Setup { limits, dtype, kv_dtype, tied, eos_token_ids, merge, adapter_host_bytes, .. } = setup;
        let mut checkpoint = Checkpoint::open(path).unwrap();
        if tied {
            checkpoint.tie_embedding_to_output();
        }
        let model = Model::load(&backend, &checkpoint, dtype, limits.max_model_len).unwrap();
        let config = EngineConfig {
            model_name: "test".into(),
            limits,
            min_kv_tokens: limits.max_model_len,
            kv_dtype,
            eos_token_ids,
            seed: 1,
            merge,
            adapter_host_bytes,
        };
        before();
        let (engine, handle) = Engine::with_tiers(backend, model, config, tiers)?;
        let thread = std::thread::Builder::new().name("engine".into()).spawn(move || engine.run().unwrap()).unwrap();
        Ok(Self { handle, thread: Some(thread) })
    }

    /// The same on the CPU backend.
    pub fn start_on_cpu(path: &Path, setup: Setup) -> Self {
        Self::start(CpuBackend::new(setup.isa, setup.num_threads).unwrap(), path, setup)
    }

    /// The same on the software GPU, which computes in the type of the KV cache.
    #[cfg(feature = "cuda")]
    pub fn start_on_softgpu(path: &Path, setup: Setup) -> Self {
        Self::start(super::softgpu::backend(setup.kv_dtype), path, setup)
    }

    /// The same with the best instruction set.
    pub fn start_cpu(path: &Path, dtype: Option<DType>, limits: SchedulerLimits) -> Self {
        Self::start_on_cpu(path, Setup { limits, dtype, ..Setup::default() })
    }

    /// Drains the engine and waits for its thread; the metrics stand still afterwards.
    pub fn stop(mut self) -> EngineHandle {
        self.handle.drain();
        self.thread.take().unwrap().join().unwrap();
        self.handle.clone()
    }

    /// Lets go of the engine without waiting for what it does: its thread ends when nobody can ask it for anything.
    pub fn leave(mut self) -> JoinHandle<()> {
        let thread = self.thread.take().unwrap();
        let (sender, _) = crossbeam::channel::bounded(1);
        let (waker, _) = crossbeam::channel::bounded(1);
        let (info, stopping) = (self.handle.info().clone(), Default::default());
        let metrics = std::sync::Arc::new(mneme::telemetry::EngineMetrics::new("gone", 16, 1));
        // Every clone of the handle keeps the engine waiting; the drop that follows has another one's.
        self.handle = EngineHandle::new(sender, waker, info, metrics, stopping);
        thread
    }

    pub fn embed(&self, prompt: &[u32]) -> Vec<f32> {
        collect(self.handle.submit(request(prompt, Task::Embed)).unwrap()).embedding
    }

    pub fn submit(&self, prompt: &[u32], sampling: SamplingParams) -> OutputStream {
        self.handle.submit(request(prompt, Task::Generate(Box::new(sampling)))).unwrap()
    }

    /// Greedy continuation.
    pub fn greedy(&self, prompt: &[u32], max_tokens: usize) -> Vec<u32> {
        collect(self.submit(prompt, greedy(max_tokens))).tokens
    }
}

impl Drop for TestEngine {
    fn drop(&mut self) {
        self.handle.drain();
        if let Some(thread) = self.thread.take() {
            let result = thread.join();
            if !std::thread::panicking() {
                result.unwrap();
            }
        }
    }
}

/// The sum of a histogram or the value of a counter, by its exposition name without the `vllm:` prefix.
pub fn metric(handle: &EngineHandle, name: &str) -> f64 {
    let text = handle.metrics().encode();
    let wanted = format!("vllm:{name}");
    let line = text.lines().find(|line| line.split(['{', ' ']).next() == Some(&wanted));
    let line = line.unwrap_or_else(|| panic!("no metric {name} in {text}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

pub fn request(prompt: &[u32], task: Task) -> GenerateRequest {
    GenerateRequest {
        id: "test".into(),
        prompt: prompt.to_vec(),
        task,
        priority: 0,
        domain: String::new(),
        shared_prefix: None,
        adapters: Vec::new(),
        pieces: vec![],
        level: Default::default(),
        erase_on_free: false,
    }
}

pub fn greedy(max_tokens: usize) -> SamplingParams {
    SamplingParams { temperature: 0.0, max_tokens, ..Default::default() }
}

impl Output {
    /// Takes an event over.
    pub fn absorb(&mut self, event: OutputEvent) {
        assert!(self.reason.is_none(), "an event behind the last one: {event:?}");
        match event {
            OutputEvent::Started { cached_tokens, reuse, prompt_logprobs } => {
                self.cached_tokens = cached_tokens;
                self.reuse = reuse;
                self.prompt_logprobs = prompt_logprobs;
            }
            OutputEvent::Token { id, logprobs } => {
                self.tokens.push(id);
                self.logprobs.extend(logprobs.map(|boxed| *boxed));
            }
            OutputEvent::Embedding(embedding) => self.embedding = embedding,
            OutputEvent::Deposited(deposited) => self.deposited = Some(*deposited),
            OutputEvent::Finished(reason) => self.reason = Some(reason),
        }
    }

    /// Waits for the rest.
    pub fn finish(mut self, mut stream: OutputStream) -> Self {
        while let Some(event) = stream.blocking_next() {
            self.absorb(event);
        }
        self
    }
}

/// Waits for the end of a request.
pub fn collect(stream: OutputStream) -> Output {
    Output::default().finish(stream)
}
