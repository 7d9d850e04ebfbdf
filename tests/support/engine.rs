//! An engine on a thread, and plain calls to it.

use std::path::Path;
use std::thread::JoinHandle;

use mneme::backend::cpu::{CpuBackend, Isa};
use mneme::backend::{Backend, DType};
use mneme::engine::{
    Engine, EngineConfig, EngineHandle, FinishReason, GenerateRequest, OutputEvent, OutputStream, SamplingParams,
    SchedulerLimits, Task, TokenLogprobs,
};
use mneme::models::{Checkpoint, Model};

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

/// What came back for one request.
#[derive(Debug, Clone, Default)]
pub struct Output {
    pub tokens: Vec<u32>,
    pub logprobs: Vec<TokenLogprobs>,
    pub prompt_logprobs: Vec<Option<TokenLogprobs>>,
    pub cached_tokens: usize,
    pub embedding: Vec<f32>,
    pub reason: Option<FinishReason>,
}

impl TestEngine {
    /// Loads a checkpoint onto `backend`.
    pub fn start<B: Backend>(backend: B, path: &Path, dtype: Option<DType>, limits: SchedulerLimits) -> Self {
        let checkpoint = Checkpoint::open(path).unwrap();
        let model = Model::load(&backend, &checkpoint, dtype, limits.max_model_len).unwrap();
        let config =
            EngineConfig { model_name: "test".into(), limits, kv_dtype: DType::BF16, eos_token_ids: vec![], seed: 1 };
        let (engine, handle) = Engine::new(backend, model, config).unwrap();
        let thread = std::thread::spawn(move || engine.run().unwrap());
        Self { handle, thread: Some(thread) }
    }

    /// The same on the CPU backend with the best instruction set.
    pub fn start_cpu(path: &Path, dtype: Option<DType>, limits: SchedulerLimits) -> Self {
        Self::start(CpuBackend::new(Isa::best(), 2).unwrap(), path, dtype, limits)
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

pub fn request(prompt: &[u32], task: Task) -> GenerateRequest {
    GenerateRequest { id: "test".into(), prompt: prompt.to_vec(), task, priority: 0, cache_salt: None }
}

pub fn greedy(max_tokens: usize) -> SamplingParams {
    SamplingParams { temperature: 0.0, max_tokens, ..Default::default() }
}

/// Waits for the end of a request.
pub fn collect(mut stream: OutputStream) -> Output {
    let mut output = Output::default();
    while let Some(event) = stream.blocking_next() {
        match event {
            OutputEvent::Started { cached_tokens, prompt_logprobs } => {
                output.cached_tokens = cached_tokens;
                output.prompt_logprobs = prompt_logprobs;
            }
            OutputEvent::Token { id, logprobs } => {
                output.tokens.push(id);
                output.logprobs.extend(logprobs.map(|boxed| *boxed));
            }
            OutputEvent::Embedding(embedding) => output.embedding = embedding,
            OutputEvent::Finished(reason) => output.reason = Some(reason),
        }
    }
    output
}
