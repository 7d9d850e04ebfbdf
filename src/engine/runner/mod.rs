//! Turns scheduled sequences into one forward pass and brings back what the host needs of it.

mod compose;
mod decode;
mod draws;
mod inputs;
mod kv_pool;
mod outputs;

use std::sync::Arc;

use crossbeam::channel::Sender;

use self::compose::CompositionBuffers;
use self::inputs::{ALIGNED_NUMBERS, NUM_INPUTS, StepInputs};
pub(super) use self::outputs::SequenceOutput;
use super::adapter_io::AdapterIo;
use super::adapter_store::AdapterStore;
use super::adapters::{AppliedAdapter, MAX_APPLIED};
use super::lora_groups::LoraGroups;
use super::residency::Residency;
use super::scheduler::{ScheduledSequence, SchedulerLimits};
use super::sequence::Sequence;
use super::step::EngineConfig;
use super::tiers::TierConfig;
use crate::Result;
use crate::backend::{
    Backend, DType, DecodeShape, Landing, LoraBatch, LoraLoader, RowLogprobs, SequenceRuns, StepBounds, StreamKind,
    Tensor,
};
use crate::models::{Adapted, ForwardBatch, KvCache, MergedCopy, MergedRows, Model, StepLimits, Workspace};
use crate::paging::{DeviceLanding, Pager, PagingConfig};

/// Runs the model. Owns the KV blocks, the buffers of a step and the stream they are used on.
pub(super) struct ModelRunner<B: Backend> {
    backend: B,
    model: Model<B>,
    kv: KvCache<B::Buffer>,
    workspace: Workspace<B::Buffer>,
    stream: B::Stream,
    inputs: StepInputs<B>,
    /// Of the step, or the last one.
    runs: SequenceRuns,
    lora: LoraGroups<LoraOf<B>>,
    /// The model's projections with adapters merged into them, while there are such.
    merged: Option<MergedCopy<B>>,
    /// How many there have been: the number of the last.
    num_copies: u64,
    composition: CompositionBuffers<B>,
    /// The token chosen from each row of logits, i32.
    tokens: Tensor<B::Buffer>,
    host_tokens: B::HostBuffer,
    /// What is said of rows of logits, `[L, 46]` i32.
    logprobs: Tensor<B::Buffer>,
    host_logprobs: B::HostBuffer,
    /// Rows of logits (f32) or hidden states (activations) that the host asked for.
    host_rows: B::HostBuffer,
    /// Bytes of `host_rows` in use.
    num_row_bytes: usize,
    /// What block tables and contexts of a step hold at the most.
    max_blocks: usize,
    limits: SchedulerLimits,
    outputs: Vec<SequenceOutput>,
}

/// A step whose layers are queued.
pub(super) struct QueuedStep {
    num_logits: usize,
    /// Whether the device repeated what it had kept.
    is_repeated: bool,
    /// Whether blocks were on their way up.
    has_landings: bool,
}

/// What a backend makes of an adapter's update.
type LoraOf<B> = <<B as Backend>::LoraLoader as LoraLoader>::Lora;

impl<B: Backend> ModelRunner<B> {
    /// Allocates everything; of KV blocks, perhaps fewer than was asked for.
    pub(super) fn new(backend: B, model: Model<B>, config: &EngineConfig) -> Result<Self> {
        let EngineConfig { limits, min_kv_tokens, .. } = config;
        let layout = model.kv_layout(&backend, limits.block_size, config.kv_dtype)?;
        backend.check_kv_layout(&layout)?;
        let max_logits = limits.max_num_seqs + limits.max_prompt_logits;
        let step = StepLimits { max_tokens: limits.max_num_batched_tokens, max_logits };
        let workspace = Workspace::new(&backend, model.config(), step)?;
        backend.reserve(&StepBounds {
            max_tokens: limits.max_num_batched_tokens.max(max_logits),
            max_sequences: limits.max_num_seqs,
            max_context_len: limits.max_model_len,
            num_heads: model.config().num_heads,
            layout: &layout,
        })?;
        let stream = backend.create_stream(StreamKind::Compute)?;
        let max_blocks = limits.max_model_len.div_ceil(limits.block_size);
        // Five numbers of every token in a pass that compares, four and rows of results in an ordinary one, each with what it
        // is drawn by.
        let capacity = (5 + 2 * MAX_APPLIED) * limits.max_num_batched_tokens
            + 3 * limits.max_num_seqs
            + (9 + 2 * MAX_APPLIED) * max_logits
            + 1
            + limits.max_num_seqs * max_blocks
            + draws::capacity(&backend, limits, model.config().vocab_size)
            + NUM_INPUTS * (ALIGNED_NUMBERS - 1);
        let num_asked = if backend.edits_logits() { limits.max_num_seqs } else { 0 };
        let answer_bytes = num_asked * RowLogprobs::NUM_WORDS * size_of::<u32>();
        let sizes = model.config();
        // A step can bring logits of some sequences and hidden states of others to the host.
        let row_bytes = (max_logits * sizes.vocab_size + limits.max_num_batched_tokens * sizes.hidden_size) * 4;
        let inputs = StepInputs::new(&backend, capacity)?;
        let composition = CompositionBuffers::new(&backend, limits)?;
        let tokens = Tensor::new(backend.allocate(max_logits * 4)?, 0, 1, max_logits, DType::I32);
        let logprobs = Tensor::new(backend.allocate(answer_bytes)?, 0, num_asked, RowLogprobs::NUM_WORDS, DType::I32);
        // Last: it takes what is left, where that is less than it was to have.
        let (kv, limits) = kv_pool::allocate(&backend, layout, limits, *min_kv_tokens)?;
        Ok(Self {
            kv,
            inputs,
            runs: SequenceRuns::with_capacity(limits.max_num_seqs),
            composition,
            tokens,
            host_tokens: backend.allocate_host(max_logits * 4)?,
            logprobs,
            host_logprobs: backend.allocate_host(answer_bytes)?,
            host_rows: backend.allocate_host(row_bytes)?,
            lora: LoraGroups::new(limits.max_num_seqs * MAX_APPLIED),
            merged: None,
            num_copies: 0,
            num_row_bytes: 0,
            max_blocks,
            limits,
            outputs: Vec::with_capacity(limits.max_num_seqs),
            backend,
            model,
            workspace,
            stream,
        })
    }

    /// Starts the tiers below the blocks of this runner.
    pub(super) fn start_pager(&self, tiers: TierConfig, waker: &Sender<()>) -> Result<Pager> {
        let block_bytes = self.kv.layout.block_bytes();
        let config = PagingConfig {
            block_bytes,
            block_size: self.limits.block_size,
            layout: Some(self.kv.layout),
            num_host_blocks: tiers.host_bytes / block_bytes,
            host_slab_bytes: tiers.host_slab_bytes,
            num_threads: tiers.num_io_threads,
            open: tiers.open_vault,
        };
        Pager::start(&self.backend, &self.kv.blocks, self.kv.num_blocks, config, waker)
    }

    /// The bounds that it was made for.
    pub(super) fn limits(&self) -> &SchedulerLimits {
        &self.limits
    }

    pub(super) fn model(&self) -> &Model<B> {
        &self.model
    }

    /// Bytes of a block of the KV arena.
    pub(super) fn block_bytes(&self) -> usize {
        self.kv.layout.block_bytes()
    }

    /// An error when the device has failed.
    pub(super) fn check_device(&self) -> Result<()> {
        self.backend.check()
    }

    /// Whether giving back the device's memory may have no end.
    pub(super) fn is_stalled(&self) -> bool {
        self.backend.is_stalled()
    }

    /// What arranges adapters for this runner.
    pub(super) fn create_lora_loader(&self) -> Result<B::LoraLoader> {
        self.backend.create_lora_loader()
    }

    /// Starts the thread that brings adapters from `store` into the arena of this runner's blocks.
    pub(super) fn start_adapter_io(
        &self,
        store: Arc<AdapterStore<B::LoraLoader>>,
        waker: &Sender<()>,
    ) -> Result<AdapterIo> {
        AdapterIo::start(&self.backend, &self.kv.blocks, store, waker)
    }

    /// Queues the computation of the scheduled tokens, if there are any. Some of their sequences' blocks may still be on
    /// their way up.
    pub(super) fn queue<'a>(
        &mut self,
        running: &[Box<Sequence>],
        scheduled: &[ScheduledSequence],
        residency: &Residency,
        landings: impl Iterator<Item = &'a DeviceLanding>,
    ) -> Result<Option<QueuedStep>> {
        if scheduled.is_empty() {
            return Ok(None);
        }
        self.gather(running, scheduled)?;
        let landings: Vec<&Landing<B::Event>> = landings.map(known_landing).collect();
        let shape = if landings.is_empty() { self.repeated_shape(running, scheduled) } else { None };
        let batch = self.prepare(running, scheduled, shape, &landings);
        let adapted = self.write_adapters(running, scheduled, residency);
        let shape = shape.map(|shape| DecodeShape { adapters: self.lora.number(), ..shape });
        let head = self.write_head(running, scheduled, batch.num_logits);
        let uploaded = 0..self.inputs.len * size_of::<i32>();
        self.backend.upload(&self.stream, &self.inputs.host, &self.inputs.device, uploaded)?;
        let groups = self.lora.groups();
        let lora = adapted.map(|(rows, scales)| LoraBatch { rows, scales, groups });
        let merged = merged_rows(self.merged.as_ref(), running, scheduled);
        let copy = merged.as_ref().map(|rows| (self.num_copies, rows.first_row));
        let shape = shape.map(|shape| DecodeShape { merged: copy, ..shape });
        let head = head.map(|(rows, scales)| LoraBatch { rows, scales, groups: self.lora.head_groups() });
        let adapted = (lora.is_some() || merged.is_some()).then(|| Adapted { lora, head, merged });
        // What is drawn changes from step to step, so it is never a part of what is repeated.
        let takes_likeliest = shape.is_some() || !self.draws(running, scheduled);
        let compute = &mut || self.compute(&batch, adapted.as_ref(), takes_likeliest);
        let is_repeated = match shape {
            Some(shape) => self.backend.repeat_step(&self.stream, shape, compute)?,
            None => compute().map(|()| false)?,
        };
        drop(adapted);
        self.lora.clear();
        Ok(Some(QueuedStep { num_logits: batch.num_logits, is_repeated, has_landings: !landings.is_empty() }))
    }

    /// Has tokens chosen from what was queued, and waits for the results. Grammars have said what may come next. Whether the
    /// device repeated a step that it had kept.
    pub(super) fn finish(
        &mut self,
        step: Option<QueuedStep>,
        running: &[Box<Sequence>],
        scheduled: &[ScheduledSequence],
    ) -> Result<bool> {
        let Some(QueuedStep { num_logits, is_repeated, has_landings }) = step else { return Ok(false) };
        let draws = self.write_draws(running, scheduled, num_logits)?;
        self.draw(&draws, num_logits)?;
        self.fetch(running, scheduled, num_logits)?;
        let done = self.backend.record(&self.stream)?;
        match has_landings {
            false => self.backend.synchronize(&done)?,
            true => self.backend.synchronize_landed(&done)?,
        }
        Ok(is_repeated)
    }

    /// Queues the layers, and the likeliest token of each row of logits.
    fn compute(
        &self,
        batch: &ForwardBatch<'_, B::Buffer, B::Event>,
        adapted: Option<&Adapted<'_, B>>,
        takes_likeliest: bool,
    ) -> Result<()> {
        self.model.forward(&self.backend, &self.stream, batch, adapted, &self.kv, &self.workspace)?;
        match batch.num_logits {
            rows if rows > 0 && takes_likeliest => {
                self.backend.argmax(&self.stream, &self.workspace.logits(rows), &self.tokens_of(rows))
            }
            _ => Ok(()),
        }
    }

    /// Plans a copy of the projections with these adapters merged into them, and says how many bytes it takes.
    ///
    /// # Errors
    /// `Unsupported` where there can be none.
    pub(super) fn plan_merge(&mut self, adapters: &[AppliedAdapter], residency: &Residency) -> Result<usize> {
        assert!(self.merged.is_none(), "there is one copy at a time");
        let on_device = |applied: &AppliedAdapter| {
            let adapter = residency.on_device(applied.adapter.digest());
            (adapter, applied.scale)
        };
        let copy = MergedCopy::plan(&self.backend, &self.model, adapters.iter().map(on_device).collect())?;
        self.num_copies += 1;
        Ok(self.merged.insert(copy).num_bytes())
    }

    /// Writes about so many numbers of the copy. How many they were, and whether it is whole.
    pub(super) fn write_merged(&mut self, max_numbers: usize) -> Result<(usize, bool)> {
        let Some(copy) = &mut self.merged else { return Ok((0, true)) };
        let num_numbers = copy.write(&self.backend, &self.stream, &self.model, max_numbers)?;
        let done = self.backend.record(&self.stream)?;
        self.backend.synchronize(&done)?;
        Ok((num_numbers, copy.is_whole()))
    }

    /// Gives back the copy's memory, a projection at a time; `false` when nothing was left.
    pub(super) fn free_merged(&mut self) -> bool {
        let has_freed = self.merged.as_mut().is_some_and(MergedCopy::free_one);
        if !has_freed {
            self.merged = None;
        }
        has_freed
    }
}

fn known_landing<E: 'static>(landing: &DeviceLanding) -> &Landing<E> {
    landing.downcast_ref().expect("the pager was started with the runner's device")
}

/// The rows of a step that use the copy, which are its last ones.
fn merged_rows<'a, B: Backend>(
    copy: Option<&'a MergedCopy<B>>,
    running: &[Box<Sequence>],
    scheduled: &[ScheduledSequence],
) -> Option<MergedRows<'a, B>> {
    let is_added = |entry: &&ScheduledSequence| !running[entry.index].is_merged();
    let num_added = scheduled.iter().take_while(is_added).count();
    if num_added == scheduled.len() {
        return None;
    }
    let first_row = scheduled[..num_added].iter().map(|entry| entry.num_tokens).sum();
    Some(MergedRows { copy: copy.expect("a sequence keeps the copy it uses"), first_row })
}
