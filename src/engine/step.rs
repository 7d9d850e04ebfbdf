//! The engine thread: schedule, run, commit, again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, at, bounded, never, select};
use uuid::Uuid;

use super::adapter_store::{AdapterSpace, AdapterStore};
use super::adapters::{AppliedAdapter, CompositionKey, base_shapes, identity_under, in_order};
use super::composition::Composition;
use super::erasure::{Erasure, ErasureQueue};
use super::generation::Generation;
use super::handle::{EngineHandle, EngineInfo, Submission};
use super::logprobs::logprobs_of;
use super::merge::{MergeConfig, Merger, StepWork};
use super::request::{FinishReason, GenerateRequest, OutputEvent, Piece, Reuse, SamplingParams, Task};
use super::residency::Residency;
use super::runner::{ModelRunner, SequenceOutput};
use super::sampling::Sampler;
use super::scheduler::{ScheduledSequence, Scheduler, SchedulerLimits};
use super::sequence::{HashChain, Sequence, SequenceStatus, SharedTail, Work};
use super::tiers::TierConfig;
use crate::backend::{Backend, DType};
use crate::kv::BlockHash;
use crate::models::Model;
use crate::planted::{self, Bug};
use crate::telemetry::EngineMetrics;
use crate::{Error, Result, invalid};

/// What an engine is started with.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// The name under which metrics are labelled.
    pub model_name: String,
    /// Bounds of steps, pool and queue.
    pub limits: SchedulerLimits,
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
        config: EngineConfig,
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
        let (sender, submissions) = bounded(SUBMISSION_QUEUE);
        let (waker, wake) = bounded(1);
        let stopping = Arc::new(AtomicBool::new(false));
        let metrics = Arc::new(EngineMetrics::new(&config.model_name, limits.block_size, limits.num_blocks));
        let info = EngineInfo {
            max_model_len: limits.max_model_len,
            vocab_size: model.config().vocab_size,
            hidden_size: model.config().hidden_size,
            block_size: limits.block_size,
            num_blocks: limits.num_blocks,
            num_multiplied: model.config().num_multiplied(),
        };
        let stopped = Arc::new(AtomicBool::new(false));
        let failure = Arc::new(OnceLock::new());
        // Of this process alone: what is hashed before the model's identity is known is found by nobody later.
        let hash_identity = Uuid::new_v4().as_bytes().to_vec();
        let shapes = base_shapes(model.config());
        let runner = ModelRunner::new(backend, model, config.kv_dtype, limits)?;
        let max_fetch_wait = tiers.max_fetch_wait;
        let pager = runner.start_pager(tiers, limits, &waker)?;
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
            .with_adapters(store);
        let engine = Self {
            scheduler: Scheduler::new(*limits, pager, max_fetch_wait, residency),
            sampler: Sampler::new(runner.model().config().vocab_size, config.eos_token_ids.clone()),
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
        let opened = self.scheduler.absorb_arrivals()?;
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
            count_end(&self.metrics, &sequence, &reason);
            sequence.finish(reason);
        }
        num_failed
    }

    fn accept_submissions(&mut self) {
        while self.scheduler.has_room() {
            match self.submissions.try_recv() {
                Ok(submission) => self.accept(submission),
                Err(_) => break,
            }
        }
    }

    fn accept(&mut self, Submission { mut request, sink }: Submission) {
        if let Err(error) = self.check(&mut request) {
            self.metrics.count_finished("error");
            sink.send(OutputEvent::Finished(FinishReason::Error(error.to_string())));
            return;
        }
        self.num_arrived += 1;
        tracing::debug!(id = %request.id, num_tokens = request.prompt.len(), "request");
        self.metrics.request_prompt_tokens.observe(request.prompt.len() as f64);
        let sequence = self.make_sequence(request, sink);
        self.scheduler.add(Box::new(sequence));
    }

    /// Refuses what cannot run, and brings adapters into their order.
    fn check(&self, request: &mut GenerateRequest) -> Result<()> {
        request.adapters = in_order(std::mem::take(&mut request.adapters))?;
        if !request.adapters.iter().all(|applied| applied.adapter.store() == self.adapter_store) {
            return Err(invalid!("an adapter was loaded for another device; load it through this engine"));
        }
        self.check_room(request)?;
        let (len, most) = (request.prompt.len(), self.config.limits.max_model_len);
        let longest = if matches!(request.task, Task::Generate(_)) { most - 1 } else { most };
        if len == 0 || len > longest {
            return Err(invalid!("the prompt has {len} tokens, wanted 1 to {longest}"));
        }
        if matches!(request.task, Task::Deposit { is_durable: true, .. }) && !self.is_identified {
            return Err(Error::Exhausted("nothing can be kept: the vault is not open yet; try again".into()));
        }
        if request.erase_on_free && !self.scheduler.tiers().can_wipe() {
            return Err(invalid!("nothing can be zeroed by an engine without tiers; start it with one"));
        }
        check_pieces(request, most)?;
        let vocab_size = self.runner.model().config().vocab_size;
        let sources = request.pieces.iter().flat_map(|piece| &piece.source);
        match request.prompt.iter().chain(sources).find(|&&token| token as usize >= vocab_size) {
            Some(token) => Err(invalid!("prompt token {token} is outside the vocabulary of {vocab_size}")),
            None => Ok(()),
        }
    }

    /// Refuses what the pool can never hold together with its adapters.
    fn check_room(&self, request: &GenerateRequest) -> Result<()> {
        let SchedulerLimits { num_blocks, block_size, .. } = self.config.limits;
        let num_pages = num_pages_of(&request.adapters);
        let num_tokens = request.prompt.len() + usize::from(matches!(request.task, Task::Generate(_)));
        if num_pages > 0 && num_tokens.div_ceil(block_size) + num_pages > num_blocks {
            return Err(invalid!(
                "the adapters of this request take {num_pages} KV blocks and its {num_tokens} tokens {}; there are \
                 {num_blocks}; name fewer or smaller adapters, or give more --kv-cache-memory-bytes",
                num_tokens.div_ceil(block_size)
            ));
        }
        Ok(())
    }

    /// Tokens that a sequence under these adapters can come to: all of them have room at once.
    fn max_len_under(&self, adapters: &[AppliedAdapter]) -> usize {
        let SchedulerLimits { num_blocks, block_size, max_model_len, .. } = self.config.limits;
        max_model_len.min(num_blocks.saturating_sub(num_pages_of(adapters)) * block_size)
    }

    fn make_sequence(&self, request: GenerateRequest, sink: super::handle::OutputSink) -> Sequence {
        let limits = &self.config.limits;
        let num_prompt_tokens = request.prompt.len();
        let merged = self.merger.form_of(&request.adapters);
        let identity = identity_under(&self.hash_identity, &request.adapters, merged.is_some());
        let (root, own) = self.chain_of(&request, &identity);
        let shared_tail = shared_tail(&request, limits.block_size);
        let max_len = self.max_len_under(&request.adapters);
        let num_blocks = limits.num_blocks.saturating_sub(num_pages_of(&request.adapters));
        let composition = self.compose(request.pieces, &identity, num_prompt_tokens, num_blocks);
        let (work, room) = match request.task {
            Task::Deposit { is_durable, kept_in } => {
                let kept_under = kept_in.map(|domain| BlockHash::root(&identity, domain.as_bytes()));
                (Work::Deposit { is_durable, kept_under }, 0)
            }
            Task::Embed => (Work::Embed { sum: vec![0.0; self.runner.model().config().hidden_size] }, 0),
            Task::Generate(mut params) => {
                params.max_tokens = params.max_tokens.min(max_len - num_prompt_tokens);
                let room = params.max_tokens;
                let fresh_seed = self.config.seed.wrapping_add(self.num_arrived);
                (Work::Generate(Box::new(Generation::new(*params, &request.prompt, fresh_seed))), room)
            }
        };
        let mut tokens = request.prompt;
        tokens.reserve_exact(room);
        let max_blocks = (num_prompt_tokens + room).div_ceil(limits.block_size);
        let join = composition.as_ref().map_or(usize::MAX, |composition| composition.join());
        let mut sequence = Sequence {
            priority: request.priority,
            number: self.num_arrived,
            status: SequenceStatus::Waiting,
            tokens,
            num_prompt_tokens,
            num_computed_tokens: 0,
            num_cached_tokens: None,
            reuse: Reuse::default(),
            may_fetch: true,
            level: request.level,
            num_shared_blocks: request.shared_prefix.map_or(0, |shared| shared.num_tokens / limits.block_size),
            erase_on_free: request.erase_on_free,
            blocks: Vec::with_capacity(max_blocks),
            shared_tail,
            attached_tail: None,
            chain: HashChain::new(root, own, max_blocks)
                .provisional(!self.is_identified)
                .cut_at(join / limits.block_size),
            composition_key: (!request.adapters.is_empty()).then(|| CompositionKey::of(&request.adapters)),
            merged,
            adapters: request.adapters,
            holds_adapters: false,
            work,
            composition,
            sink,
            arrived_at: Instant::now(),
            scheduled_at: None,
            last_token_at: None,
        };
        sequence.begin_composition();
        sequence
    }

    /// What of a prompt is copied instead of computed, where so many blocks are there for it.
    fn compose(
        &self,
        pieces: Vec<Piece>,
        identity: &[u8],
        num_prompt_tokens: usize,
        num_blocks: usize,
    ) -> Option<Box<Composition>> {
        let block_size = self.config.limits.block_size;
        let chain_of = |domain: &str, max_blocks| {
            let root = BlockHash::root(identity, domain.as_bytes());
            HashChain::new(root, None, max_blocks).provisional(!self.is_identified)
        };
        Composition::new(pieces, num_prompt_tokens, block_size, num_blocks, chain_of)
    }

    /// Where the chain of a request's block hashes begins, and from which block on it leaves the domain of what it shares.
    fn chain_of(&self, request: &GenerateRequest, identity: &[u8]) -> (BlockHash, Option<(usize, String)>) {
        let shared = request.shared_prefix.as_ref().filter(|shared| shared.domain != request.domain);
        let first_domain = shared.map_or(&request.domain, |shared| &shared.domain);
        let round = if planted::is(Bug::SharedPrefixRoundedUp) { usize::div_ceil } else { usize::div_euclid };
        let num_shared = |num_tokens| round(num_tokens, self.config.limits.block_size);
        let own = shared.map(|shared| (num_shared(shared.num_tokens), request.domain.clone()));
        (BlockHash::root(identity, first_domain.as_bytes()), own)
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
        let is_repeated =
            runner.run(scheduler.running(), scheduler.scheduled(), scheduler.residency(), scheduler.landings())?;
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

    /// Takes the results over: computed tokens, sampled tokens, ended sequences.
    fn commit(&mut self) -> Result<()> {
        for at in 0..self.scheduler.scheduled().len() {
            let entry = self.scheduler.scheduled()[at];
            let output = self.runner.outputs()[at];
            self.collect_rows(entry.index, entry.num_tokens, &output);
            self.scheduler.advance(entry.index, entry.num_tokens);
            if let Err(error) = self.commit_sequence(entry.index, &output) {
                self.end(entry.index, FinishReason::Error(error.to_string()));
            }
        }
        self.scheduler.remove_finished();
        Ok(())
    }

    fn commit_sequence(&mut self, index: usize, output: &SequenceOutput) -> Result<()> {
        let sequence = self.scheduler.sequence_mut(index);
        if sequence.num_uncomputed_tokens() > 0 {
            return Ok(());
        }
        match &mut sequence.work {
            Work::Embed { sum } => {
                let num_tokens = sequence.num_prompt_tokens as f32;
                let mean = sum.iter().map(|value| value / num_tokens).collect();
                sequence.sink.send(OutputEvent::Embedding(mean));
                self.end(index, FinishReason::Stop { token: None });
                Ok(())
            }
            Work::Source => {
                self.scheduler.finish_source(index);
                Ok(())
            }
            Work::Deposit { .. } => {
                self.scheduler.begin_deposit(index);
                Ok(())
            }
            Work::Generate(_) => self.commit_token(index, output),
        }
    }

    /// Samples the next token of a sequence whose tokens are all computed.
    fn commit_token(&mut self, index: usize, output: &SequenceOutput) -> Result<()> {
        let sequence = self.scheduler.sequence_mut(index);
        start(sequence);
        let Work::Generate(generation) = &mut sequence.work else { return Ok(()) };
        let logits_row = output.logits_row.ok_or_else(|| Error::Device("a finished sequence has no logits".into()))?;
        if generation.params.max_tokens == 0 {
            self.end(index, FinishReason::Length);
            return Ok(());
        }
        let (token, logprobs) = if output.host_rows.num_rows > 0 {
            let logits = self.runner.host_logits(output.host_rows, output.host_rows.num_rows - 1);
            let sample = self.sampler.sample(generation, &sequence.tokens, sequence.num_prompt_tokens, logits)?;
            (sample.token, sample.logprobs)
        } else {
            (self.runner.token(logits_row), None)
        };
        self.metrics.generation_tokens.inc();
        let number = sequence.num_output_tokens() + 1;
        observe_token(&self.metrics, sequence);
        let Work::Generate(generation) = &mut sequence.work else { return Ok(()) };
        if let Some(reason) = generation.stops_at(token, self.sampler.eos_token_ids(), number) {
            self.end(index, reason);
            return Ok(());
        }
        generation.accept(token)?;
        let complete = generation.is_complete(number);
        sequence.tokens.push(token);
        sequence.sink.send(OutputEvent::Token { id: token, logprobs });
        if let Some(reason) = complete {
            self.end(index, reason);
        }
        Ok(())
    }

    /// Takes prompt logits and hidden states while the step's buffers hold them.
    fn collect_rows(&mut self, index: usize, num_tokens: usize, output: &SequenceOutput) {
        let sequence = self.scheduler.sequence_mut(index);
        let first = sequence.num_computed_tokens;
        match &mut sequence.work {
            Work::Embed { sum } => {
                for row in 0..output.host_rows.num_rows {
                    self.runner.add_host_hidden(output.host_rows, row, sum);
                }
            }
            Work::Generate(generation) if generation.wants_prompt_logits() => {
                let num_top = generation.params.prompt_logprobs.unwrap_or(0);
                if first == 0 {
                    generation.prompt_logprobs.push(None);
                }
                // The logits at one position are about the next token; those at the last are sampled from.
                for row in 0..num_tokens {
                    if let Some(&next) = sequence.tokens[..sequence.num_prompt_tokens].get(first + row + 1) {
                        let logits = self.runner.host_logits(output.host_rows, row);
                        generation.prompt_logprobs.push(Some(logprobs_of(logits, next, num_top)));
                    }
                }
            }
            Work::Generate(_) | Work::Deposit { .. } | Work::Source => {}
        }
    }

    fn end(&mut self, index: usize, reason: FinishReason) {
        let sequence = self.scheduler.sequence_mut(index);
        count_end(&self.metrics, sequence, &reason);
        sequence.finish(reason);
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

/// Blocks that adapters take beside tokens.
fn num_pages_of(adapters: &[AppliedAdapter]) -> usize {
    adapters.iter().map(|applied| applied.adapter.num_pages()).sum()
}

/// What a shared beginning has behind its last full block.
fn shared_tail(request: &GenerateRequest, block_size: usize) -> Option<SharedTail> {
    let num_shared = request.shared_prefix.as_ref()?.num_tokens;
    let (block, num_tokens) = (num_shared / block_size, num_shared % block_size);
    // What is moved into a prompt may lie in the same block.
    let is_plain = request.pieces.is_empty() && num_shared <= request.prompt.len();
    (num_tokens > 0 && is_plain).then_some(SharedTail { block, num_tokens })
}

/// Refuses pieces that are not parts of the prompt, in order.
fn check_pieces(request: &GenerateRequest, max_model_len: usize) -> Result<()> {
    let is_plain = |params: &SamplingParams| params.prompt_logprobs.is_none();
    if !request.pieces.is_empty() && !matches!(&request.task, Task::Generate(params) if is_plain(params)) {
        return Err(invalid!("a composed prompt can be continued; there are no prompt_logprobs or embeddings of it"));
    }
    let mut end = 0;
    for piece in &request.pieces {
        let Piece { start, num_tokens, source_start, .. } = *piece;
        let here = start.checked_add(num_tokens).and_then(|end| request.prompt.get(start..end));
        let there = source_start.checked_add(num_tokens).and_then(|end| piece.source.get(source_start..end));
        if start < end || here.is_none() || here != there || piece.source.len() > max_model_len {
            return Err(invalid!(
                "a piece of {num_tokens} tokens at {start} must follow the piece before it and have the tokens of its \
                 source, which are at most {max_model_len}"
            ));
        }
        end = start + num_tokens;
    }
    Ok(())
}

/// Sends `Started` before the first token.
fn start(sequence: &mut Sequence) {
    let cached_tokens = sequence.num_cached_tokens.unwrap_or(0).min(sequence.num_prompt_tokens);
    let Work::Generate(generation) = &mut sequence.work else { return };
    if !generation.started {
        generation.started = true;
        let prompt_logprobs = std::mem::take(&mut generation.prompt_logprobs);
        let reuse = Reuse { is_merged: sequence.merged.is_some(), ..sequence.reuse };
        sequence.sink.send(OutputEvent::Started { cached_tokens, reuse, prompt_logprobs });
    }
}

fn observe_token(metrics: &EngineMetrics, sequence: &mut Sequence) {
    let now = Instant::now();
    match sequence.last_token_at.replace(now) {
        Some(last) => metrics.inter_token_latency.observe(now.duration_since(last).as_secs_f64()),
        None => {
            let scheduled_at = sequence.scheduled_at.unwrap_or(now);
            metrics.request_queue_time.observe(scheduled_at.duration_since(sequence.arrived_at).as_secs_f64());
            metrics.time_to_first_token.observe(now.duration_since(sequence.arrived_at).as_secs_f64());
            let cached_tokens = sequence.num_cached_tokens.unwrap_or(0) as u64;
            metrics.prefix_cache_queries.inc_by(sequence.num_prompt_tokens as u64);
            metrics.prefix_cache_hits.inc_by(cached_tokens);
            let reuse = &sequence.reuse;
            metrics.count_cached([reuse.device_tokens, reuse.host_tokens, reuse.disk_tokens]);
            metrics.prompt_tokens.inc_by(sequence.num_prompt_tokens as u64);
        }
    }
}

fn count_end(metrics: &EngineMetrics, sequence: &Sequence, reason: &FinishReason) {
    let label = match reason {
        FinishReason::Stop { .. } => "stop",
        FinishReason::Length => "length",
        FinishReason::Abort => "abort",
        FinishReason::Error(_) => "error",
    };
    metrics.count_finished(label);
    metrics.request_generation_tokens.observe(sequence.num_output_tokens() as f64);
    metrics.e2e_request_latency.observe(sequence.arrived_at.elapsed().as_secs_f64());
}
