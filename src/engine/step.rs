//! The engine thread: schedule, run, commit, again.

mod accept;
mod commit;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, at, bounded, never, select};
use uuid::Uuid;

use super::adapter_store::{AdapterSpace, AdapterStore};
use super::adapters::base_shapes;
use super::erasure::{Erasure, ErasureQueue};
use super::handle::{EngineHandle, EngineInfo, Submission};
use super::merge::{MergeConfig, Merger, StepWork};
use super::request::{FinishReason, OutputEvent};
use super::residency::Residency;
use super::runner::ModelRunner;
use super::sampling::Sampler;
use super::scheduler::{ScheduledSequence, Scheduler, SchedulerLimits};
use super::tiers::TierConfig;
use crate::backend::{Backend, DType};
use crate::models::Model;
use crate::planted::{self, Bug};
use crate::telemetry::EngineMetrics;
use crate::{Result, invalid};

/// What an engine is started with.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// The name under which metrics are labelled.
    pub model_name: String,
    /// Bounds of steps, pool and queue.
    pub limits: SchedulerLimits,
    /// Tokens that there is to be room for at the least, where the device gives fewer KV blocks than `limits` say; sequences
    /// are no longer then.
    pub min_kv_tokens: usize,
    /// Element type of the KV cache: bf16 or f32.
    pub kv_dtype: DType,
    /// Tokens that end an output.
    pub eos_token_ids: Vec<u32>,
    /// Seeds requests that bring none.
    pub seed: u64,
    /// When adapters are merged.
    pub merge: MergeConfig,
    /// Host memory for adapters that are ready for the device.
    pub adapter_host_bytes: usize,
}

/// Submissions that are under way to the engine thread, beside those that wait in it: more than one call can make, so
/// that an idle engine never refuses one.
const SUBMISSION_QUEUE: usize = 512;

/// The only owner of scheduler, pools and block tables. Runs on one thread; takes no lock, reads no file.
pub struct Engine<B: Backend> {
    config: EngineConfig,
    scheduler: Scheduler,
    runner: ModelRunner<B>,
    merger: Merger,
    sampler: Sampler,
    submissions: Receiver<Submission>,
    erasures: Receiver<Erasure>,
    wake: Receiver<()>,
    stopping: Arc<AtomicBool>,
    /// Nobody will look into `submissions` again.
    stopped: Arc<AtomicBool>,
    /// For the handle: the error that it ended with.
    failure: Arc<OnceLock<String>>,
    metrics: Arc<EngineMetrics>,
    /// Root of block hashes: of this process alone until the model is known.
    hash_identity: Vec<u8>,
    /// Whether that is the model's, for good.
    is_identified: bool,
    /// Where adapters must come from.
    adapter_store: Uuid,
    num_arrived: u64,
    num_preemptions: u64,
}

impl<B: Backend> Engine<B> {
    /// An engine without tiers below the device.
    pub fn new(backend: B, model: Model<B>, config: EngineConfig) -> Result<(Self, EngineHandle)> {
        Self::with_tiers(backend, model, config, TierConfig::default())
    }

    /// Allocates everything the step loop uses. `run` it on a thread of its own.
    pub fn with_tiers(
        backend: B,
        model: Model<B>,
        mut config: EngineConfig,
        tiers: TierConfig,
    ) -> Result<(Self, EngineHandle)> {
        let limits = &config.limits;
        if limits.max_model_len > limits.num_blocks * limits.block_size {
            return Err(invalid!(
                "{} KV blocks hold {} tokens, fewer than the model length of {}; give more KV memory or a smaller \
                 --max-model-len",
                limits.num_blocks,
                limits.num_blocks * limits.block_size,
                limits.max_model_len
            ));
        }
        let degradations = backend.degradations().clone();
        let runner = ModelRunner::new(backend, model, &config)?;
        config.limits = *runner.limits();
        let (limits, sizes) = (&config.limits, runner.model().config());
        let (sender, submissions) = bounded(SUBMISSION_QUEUE);
        let (waker, wake) = bounded(1);
        let stopping = Arc::new(AtomicBool::new(false));
        let metrics = Arc::new(EngineMetrics::new(&config.model_name, limits.block_size, limits.num_blocks));
        let info = EngineInfo {
            max_model_len: limits.max_model_len,
            vocab_size: sizes.vocab_size,
            hidden_size: sizes.hidden_size,
            block_size: limits.block_size,
            num_blocks: limits.num_blocks,
            num_multiplied: sizes.num_multiplied(),
        };
        let stopped = Arc::new(AtomicBool::new(false));
        let failure = Arc::new(OnceLock::new());
        // Of this process alone: what is hashed before the model's identity is known is found by nobody later.
        let hash_identity = Uuid::new_v4().as_bytes().to_vec();
        let shapes = base_shapes(sizes);
        let fetch_wait = tiers.fetch_wait;
        let pager = runner.start_pager(tiers, &waker)?;
        let (page_bytes, num_pages, host_bytes) = (runner.block_bytes(), limits.num_blocks, config.adapter_host_bytes);
        let space = AdapterSpace { shapes, page_bytes, num_pages, host_bytes };
        let store = Arc::new(AdapterStore::new(runner.create_lora_loader()?, space, Arc::clone(&metrics)));
        let adapter_io = runner.start_adapter_io(Arc::clone(&store), &waker)?;
        let residency = Residency::new(adapter_io, page_bytes, Arc::clone(&metrics));
        let adapter_store = store.id();
        let (erasure_queue, erasures) = ErasureQueue::new(waker.clone(), Arc::clone(&stopped));
        let handle = EngineHandle::new(sender, waker, info, Arc::clone(&metrics), Arc::clone(&stopping))
            .with_leftovers(submissions.clone(), Arc::clone(&stopped))
            .with_erasures(erasure_queue)
            .with_failure(Arc::clone(&failure))
            .with_degradations(degradations)
            .with_adapters(store);
        let engine = Self {
            scheduler: Scheduler::new(*limits, pager, fetch_wait, residency),
            sampler: Sampler::new(runner.model().config().vocab_size),
            runner,
            merger: Merger::new(config.merge),
            submissions,
            erasures,
            wake,
            stopping,
            stopped,
            failure,
            metrics,
            hash_identity,
            is_identified: false,
            adapter_store,
            num_arrived: 0,
            num_preemptions: 0,
            config,
        };
        Ok((engine, handle))
    }

    /// Serves until the handle drains it and nothing is left to do. An error ends all requests.
    pub fn run(mut self) -> Result<()> {
        let result = self.serve();
        let reason = match &result {
            Ok(()) => FinishReason::Abort,
            Err(error) => {
                tracing::error!(%error, "the engine has ended");
                self.failure.get_or_init(|| error.to_string());
                FinishReason::Error(error.to_string())
            }
        };
        self.stopping.store(true, Ordering::SeqCst);
        self.stopped.store(true, Ordering::SeqCst);
        self.abort_all(&reason);
        if self.runner.is_stalled() {
            // Nobody can tell when its copies end; the process ends with it.
            std::mem::forget(self);
        }
        result
    }

    fn serve(&mut self) -> Result<()> {
        loop {
            self.absorb_arrivals()?;
            self.accept_submissions();
            if self.scheduler.has_queued() && self.step()? {
                continue;
            }
            self.scheduler.pump_copies();
            let is_stopping = self.stopping.load(Ordering::Acquire);
            if is_stopping {
                self.scheduler.release_merging();
            }
            self.record_usage();
            let is_settled = self.scheduler.is_settled();
            if !is_stopping && self.merge_while_idle()? {
                continue;
            }
            if (is_settled && is_stopping) || !self.wait() {
                return Ok(());
            }
        }
    }

    /// Goes on with a merge while no step can run; whether there is more to do.
    fn merge_while_idle(&mut self) -> Result<bool> {
        self.check_merge_sources();
        let has_more = self.merger.use_idle_time(&mut self.runner, &self.metrics)?;
        self.scheduler.hold_for_merge(self.merger.sources());
        Ok(has_more)
    }

    /// Gives a merge up whose adapters had to go.
    fn check_merge_sources(&mut self) {
        if !self.merger.sources().is_empty() && !self.scheduler.holds_for_merge() {
            self.merger.lose_sources(&self.metrics);
        }
    }

    /// The one place where the engine blocks: nothing is runnable. Requests, completions of copies, a drain and the next
    /// deadline end it. `false` when no handle is left.
    fn wait(&mut self) -> bool {
        let timer = self.scheduler.tiers().next_deadline().map_or_else(never, at);
        select! {
            recv(self.submissions) -> submission => match submission {
                Ok(submission) => self.accept(submission),
                Err(_) => return false,
            },
            recv(self.wake) -> _ => {}
            recv(timer) -> _ => {}
        }
        true
    }

    /// Takes note of copies that have ended, and of what is to be erased. Once the model's identity is known, what comes is hashed under it.
    fn absorb_arrivals(&mut self) -> Result<()> {
        let num_failed = self.fail_without_adapters();
        self.erasures.try_iter().for_each(|erasure| self.scheduler.tiers_mut().start_erasure(erasure));
        // What the device failed with says more than that a copy did.
        let opened = self.scheduler.absorb_arrivals().or_else(|error| self.runner.check_device().and(Err(error)))?;
        if self.scheduler.tiers_mut().pager_mut().take_failures() || num_failed > 0 {
            self.runner.check_device()?;
        }
        if let Some(identity) = opened {
            tracing::debug!("the vault is open");
            self.is_identified = true;
            if !planted::is(Bug::IdentityNotTaken) {
                self.hash_identity = identity;
            }
        }
        Ok(())
    }

    /// Ends sequences whose adapters could not be loaded; how many these are.
    fn fail_without_adapters(&mut self) -> usize {
        let failed = self.scheduler.absorb_adapters();
        let num_failed = failed.len();
        for (mut sequence, why) in failed {
            let reason = FinishReason::Error(why);
            commit::count_end(&self.metrics, &sequence, &reason);
            sequence.finish(reason);
        }
        num_failed
    }

    /// One step: schedule, run, commit. `false` when nothing can run before a copy has ended.
    fn step(&mut self) -> Result<bool> {
        for _ in 0..self.scheduler.drop_cancelled() {
            self.metrics.count_finished("abort");
        }
        self.scheduler.schedule();
        if self.scheduler.scheduled().is_empty() && self.scheduler.probing().is_empty() {
            let num_under_way = self.scheduler.num_under_way() + self.scheduler.residency().num_loading();
            let is_waiting = !self.scheduler.has_queued() || num_under_way > 0;
            assert!(is_waiting, "sequences wait and nothing is under way");
            return Ok(false);
        }
        self.probe()?;
        let started_at = Instant::now();
        let Self { scheduler, runner, .. } = self;
        let waits = scheduler.landings().next().is_some();
        let queued =
            runner.queue(scheduler.running(), scheduler.scheduled(), scheduler.residency(), scheduler.landings())?;
        // While the device computes.
        scheduler.compute_masks();
        let is_repeated = runner.finish(queued, scheduler.running(), scheduler.scheduled())?;
        let took = started_at.elapsed();
        self.follow_with_merge(took)?;
        self.commit()?;
        self.record_step(took, waits);
        self.metrics.repeated_steps.inc_by(u64::from(is_repeated));
        if cfg!(debug_assertions) {
            self.scheduler.check_integrity();
        }
        Ok(true)
    }

    /// Spends a little of the time that a step took on a merge.
    fn follow_with_merge(&mut self, took: Duration) -> Result<()> {
        self.check_merge_sources();
        let Self { scheduler, merger, runner, metrics, .. } = self;
        let (running, scheduled, residency) = (scheduler.running(), scheduler.scheduled(), scheduler.residency());
        merger.follow_step(runner, &StepWork { running, scheduled, took, residency }, metrics)?;
        scheduler.hold_for_merge(merger.sources());
        Ok(())
    }

    /// Has composed prompts learn which of their tokens to compute.
    fn probe(&mut self) -> Result<()> {
        self.runner.probe(self.scheduler.running(), self.scheduler.probing(), self.scheduler.residency())?;
        let mut row = 0;
        for at in 0..self.scheduler.probing().len() {
            let ScheduledSequence { index, num_tokens } = self.scheduler.probing()[at];
            self.scheduler.take_deviations(index, &self.runner.deviations()[row..row + num_tokens]);
            if !planted::is(Bug::DeviationsOfAnother) {
                row += num_tokens;
            }
        }
        Ok(())
    }

    fn abort_all(&mut self, reason: &FinishReason) {
        for mut sequence in self.scheduler.drain() {
            sequence.finish(reason.clone());
        }
        while let Ok(Submission { sink, .. }) = self.submissions.try_recv() {
            sink.send(OutputEvent::Finished(reason.clone()));
        }
    }

    fn record_usage(&self) {
        let pool = self.scheduler.pool();
        self.metrics.kv_cache_usage_perc.set(1.0 - pool.num_free() as f64 / pool.num_blocks() as f64);
    }

    /// Takes note of a step; how long one took that waited for blocks says nothing about computing.
    fn record_step(&mut self, took: Duration, waited: bool) {
        let num_tokens_of = |entries: &[ScheduledSequence]| entries.iter().map(|entry| entry.num_tokens).sum::<usize>();
        let num_tokens = num_tokens_of(self.scheduler.scheduled());
        let num_probed_tokens = num_tokens_of(self.scheduler.probing());
        if !waited {
            self.scheduler.tiers_mut().pager_mut().observe_step(num_tokens, took);
        }
        self.record_usage();
        let metrics = &self.metrics;
        metrics.count_step(num_tokens + num_probed_tokens);
        metrics.num_requests_running.set(self.scheduler.num_running() as i64);
        metrics.num_requests_waiting.set(self.scheduler.num_waiting() as i64);
        let num_preemptions = self.scheduler.num_preemptions();
        metrics.num_preemptions.inc_by(num_preemptions - self.num_preemptions);
        self.num_preemptions = num_preemptions;
    }
}

impl<B: Backend> Drop for Engine<B> {
    /// Also when the engine thread panics: no stream stays open.
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.stopped.store(true, Ordering::SeqCst);
        self.submissions.try_iter().for_each(drop);
    }
}
