//! Measured requests to an engine in this process.

use anyhow::Context;
use mneme::engine::{
    AppliedAdapter, FinishReason, GenerateRequest, OutputEvent, OutputStream, SamplingParams, SubmitError, Task,
};
use tokio::runtime::Runtime;

use super::prompts::PromptShape;
use super::timing::{Stopwatch, Timing};
use crate::cli::engine_args::EngineArgs;
use crate::cli::launch::{Launched, launch};

/// Requests of one shape to one engine.
pub(super) struct InProcess {
    pub(super) launched: Launched,
    pub(super) runtime: Runtime,
    /// Tokens prompts are drawn from: all that are no control tokens.
    ids: Vec<u32>,
    shape: PromptShape,
    output_len: usize,
}

/// A request on its way.
pub(super) struct InFlight {
    stream: OutputStream,
    watch: Stopwatch,
    num_input_tokens: usize,
}

impl InProcess {
    /// Starts the engine and checks that it can hold such requests.
    pub(super) fn start(args: &EngineArgs, input_len: usize, output_len: usize) -> anyhow::Result<Self> {
        let launched = launch(args, None)?;
        let info = launched.handle.info();
        let (total, most) = (input_len.saturating_add(output_len), info.max_model_len);
        anyhow::ensure!(
            total <= most,
            "--input-len and --output-len add up to {total} tokens, more than the {most} of the model and its KV memory"
        );
        let ids = ordinary_token_ids(&launched)?;
        let shape = PromptShape { prefix_len: 0, input_len, seed: args.seed };
        let runtime = tokio::runtime::Builder::new_current_thread().build().context("cannot start a runtime")?;
        Ok(Self { launched, runtime, ids, shape, output_len })
    }

    /// Queues request number `index`; every number has its own prompt, so that none is found in the prefix cache.
    pub(super) fn submit(&self, index: usize) -> Result<InFlight, SubmitError> {
        self.submit_with(index, Vec::new())
    }

    /// The same under adapters.
    pub(super) fn submit_with(&self, index: usize, adapters: Vec<AppliedAdapter>) -> Result<InFlight, SubmitError> {
        let prompt = self.shape.token_ids(&self.ids, index);
        let sampling = SamplingParams {
            temperature: 0.0,
            ignore_eos: true,
            max_tokens: self.output_len,
            ..SamplingParams::default()
        };
        let num_input_tokens = prompt.len();
        let request = GenerateRequest {
            id: format!("bench-{index}"),
            prompt,
            task: Task::Generate(Box::new(sampling)),
            priority: 0,
            domain: String::new(),
            shared_prefix: None,
            adapters,
            pieces: vec![],
            level: Default::default(),
            erase_on_free: false,
        };
        let watch = Stopwatch::start();
        Ok(InFlight { stream: self.launched.handle.submit(request)?, watch, num_input_tokens })
    }
}

/// The tokens of a model that are no control tokens; never none.
pub(super) fn ordinary_token_ids(launched: &Launched) -> anyhow::Result<Vec<u32>> {
    let tokenizer = &launched.assets.tokenizer;
    let num_ids = tokenizer.vocab_size().min(launched.handle.info().vocab_size) as u32;
    let ids: Vec<u32> = (0..num_ids).filter(|id| !tokenizer.is_special(*id)).collect();
    anyhow::ensure!(!ids.is_empty(), "the vocabulary has nothing but control tokens");
    Ok(ids)
}

impl InFlight {
    /// Reads it to its end.
    pub(super) async fn finish(mut self) -> anyhow::Result<Timing> {
        while let Some(event) = self.stream.next().await {
            match event {
                OutputEvent::Token { .. } => self.watch.token_arrived(),
                OutputEvent::Finished(FinishReason::Error(message)) => anyhow::bail!("{message}"),
                OutputEvent::Finished(FinishReason::Abort) => break,
                OutputEvent::Finished(FinishReason::Length | FinishReason::Stop { .. }) => {
                    let num_tokens = self.watch.num_arrivals();
                    return self.watch.finish(self.num_input_tokens, num_tokens).context("the engine made no token");
                }
                OutputEvent::Started { .. } | OutputEvent::Embedding(_) | OutputEvent::Deposited(_) => {}
            }
        }
        anyhow::bail!("the engine stopped before the request was done")
    }
}
