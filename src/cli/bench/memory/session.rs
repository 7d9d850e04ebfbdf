//! One engine of the measurement, which is asked one thing at a time.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use mneme::engine::{
    Deposited, FinishReason, GenerateRequest, OutputEvent, OutputStream, Reuse, SamplingParams, SharedPrefix, Task,
};
use tokio::runtime::Runtime;

use super::cell::Answer;
use crate::cli::engine_args::EngineArgs;
use crate::cli::launch::{Launched, launch};
use crate::cli::tiers::TierArgs;

/// The vault opens beside the first requests, once the weights' digest is known.
const VAULT_WAIT: Duration = Duration::from_secs(120);
const BETWEEN_TRIES: Duration = Duration::from_millis(20);
const BETWEEN_LOOKS: Duration = Duration::from_millis(3);

/// Copies down of the blocks of one answer take no longer than this.
const SETTLE_WAIT: Duration = Duration::from_secs(120);

/// A running engine, which has nothing to do between two calls.
pub(super) struct Session {
    pub(super) launched: Launched,
    runtime: Runtime,
}

/// What is asked: a prompt, and whose blocks it may find.
#[derive(Debug, Clone)]
pub(super) struct Prompt {
    pub(super) tokens: Vec<u32>,
    /// Where its own blocks are found.
    pub(super) domain: String,
    /// Its first tokens, in another domain.
    pub(super) shared: Option<SharedPrefix>,
}

impl Session {
    /// Loads the model and starts an engine with `num_blocks` KV blocks, below it the tiers that are given.
    pub(super) fn start(args: &EngineArgs, num_blocks: usize, tiers: Option<&TierArgs>) -> anyhow::Result<Self> {
        let launched = launch(&args.with_kv_blocks(num_blocks), tiers)?;
        let runtime = tokio::runtime::Builder::new_current_thread().build().context("cannot start a runtime")?;
        let session = Self { launched, runtime };
        if tiers.is_some() {
            session.wait_for_vault()?;
        }
        Ok(session)
    }

    /// Lets the engine finish what it has.
    pub(super) fn shut_down(self) -> anyhow::Result<()> {
        self.launched.shut_down()
    }

    /// The greedy token behind a prompt.
    pub(super) fn ask(&self, prompt: Prompt) -> anyhow::Result<Answer> {
        let sampling =
            SamplingParams { temperature: 0.0, ignore_eos: true, max_tokens: 1, ..SamplingParams::default() };
        let started_at = Instant::now();
        let mut stream = self.submit(prompt, Task::Generate(Box::new(sampling)))?;
        let answer = self.runtime.block_on(async move {
            let mut reuse = Reuse::default();
            while let Some(event) = stream.next().await {
                match event {
                    OutputEvent::Started { reuse: found, .. } => reuse = found,
                    OutputEvent::Token { id, .. } => {
                        return Ok(Answer { ttft: started_at.elapsed(), token: id, reuse });
                    }
                    OutputEvent::Finished(reason) => anyhow::bail!("no token came: {reason:?}"),
                    OutputEvent::Embedding(_) | OutputEvent::Deposited(_) => {}
                }
            }
            anyhow::bail!("the engine stopped before the first token")
        })?;
        self.settle()?;
        Ok(answer)
    }

    /// Has the KV of `tokens` kept on disk, durably.
    pub(super) fn deposit(&self, tokens: Vec<u32>, domain: &str) -> anyhow::Result<Deposited> {
        let prompt = Prompt { tokens, domain: domain.to_owned(), shared: None };
        let mut stream = self.submit(prompt, Task::Deposit { is_durable: true, kept_in: None })?;
        let deposited = self.runtime.block_on(async move {
            while let Some(event) = stream.next().await {
                match event {
                    OutputEvent::Deposited(deposited) => return Ok(*deposited),
                    OutputEvent::Finished(FinishReason::Error(message)) => anyhow::bail!("{message}"),
                    _ => {}
                }
            }
            anyhow::bail!("the engine stopped before the blocks were on disk")
        })?;
        self.settle()?;
        Ok(deposited)
    }

    /// Returns when nothing is on its way down any more: a block under way is in use. It has to be seen twice, since a
    /// sequence's blocks are free for a moment before their copies begin.
    fn settle(&self) -> anyhow::Result<()> {
        let started_at = Instant::now();
        let mut num_quiet = 0;
        while num_quiet < 2 {
            anyhow::ensure!(started_at.elapsed() < SETTLE_WAIT, "blocks were still being copied after {SETTLE_WAIT:?}");
            thread::sleep(BETWEEN_LOOKS);
            let is_quiet = self.launched.handle.metrics().kv_cache_usage_perc.get() == 0.0;
            num_quiet = if is_quiet { num_quiet + 1 } else { 0 };
        }
        Ok(())
    }

    fn submit(&self, prompt: Prompt, task: Task) -> anyhow::Result<OutputStream> {
        let Prompt { tokens, domain, shared } = prompt;
        let request = GenerateRequest {
            id: "bench".into(),
            prompt: tokens,
            task,
            priority: 0,
            domain,
            shared_prefix: shared,
            adapters: vec![],
            pieces: vec![],
            level: Default::default(),
            erase_on_free: false,
        };
        Ok(self.launched.handle.submit(request)?)
    }

    /// Returns when the vault takes and gives blocks: a block that is to be durable is refused before.
    fn wait_for_vault(&self) -> anyhow::Result<()> {
        let started_at = Instant::now();
        loop {
            match self.deposit(vec![0], "bench") {
                Ok(_) => return Ok(()),
                Err(error) if started_at.elapsed() > VAULT_WAIT => return Err(error),
                Err(_) => thread::sleep(BETWEEN_TRIES),
            }
        }
    }
}
