//! Turns scheduled sequences into one forward pass and brings back what the host needs of it.

mod compose;
mod decode;

use std::sync::Arc;

use crossbeam::channel::Sender;
use half::{bf16, f16};

use self::compose::CompositionBuffers;
use super::adapter_io::AdapterIo;
use super::adapter_store::AdapterStore;
use super::adapters::{AppliedAdapter, MAX_APPLIED};
use super::lora_groups::LoraGroups;
use super::residency::Residency;
use super::scheduler::{ScheduledSequence, SchedulerLimits};
use super::sequence::{Sequence, Work};
use super::tiers::TierConfig;
use crate::Result;
use crate::backend::{
    AttentionMetadata, Backend, DType, DecodeShape, Device, Landing, LoraBatch, LoraLoader, RowSampling, SamplingBatch,
    StepBounds, StreamKind, Tensor,
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
    lora: LoraGroups<LoraOf<B>>,
    /// The model's projections with adapters merged into them, while there are such.
    merged: Option<MergedCopy<B>>,
    composition: CompositionBuffers<B>,
    /// The token chosen from each row of logits, i32.
    tokens: Tensor<B::Buffer>,
    host_tokens: B::HostBuffer,
    /// Rows of logits (f32) or hidden states (activations) that the host asked for.
    host_rows: B::HostBuffer,
    /// Bytes of `host_rows` in use.
    num_row_bytes: usize,
    /// What block tables and contexts of a step hold at the most.
    max_blocks: usize,
    max_model_len: usize,
    outputs: Vec<SequenceOutput>,
}

/// What a backend makes of an adapter's update.
type LoraOf<B> = <<B as Backend>::LoraLoader as LoraLoader>::Lora;

/// Where the results of one scheduled sequence are.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct SequenceOutput {
    /// Row of logits behind its last token, when all its tokens are computed.
    pub(super) logits_row: Option<usize>,
    /// The first of its rows on the host and their number.
    pub(super) host_rows: HostRows,
}

/// Rows that were brought to the host for one sequence.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct HostRows {
    /// Byte offset of the first.
    start: usize,
    pub(super) num_rows: usize,
}

/// Rows that adapters are added to, and by how much.
type RowsAndScales<B> = (Tensor<<B as Device>::Buffer>, Tensor<<B as Device>::Buffer>);

/// Arrays of a step.
const NUM_INPUTS: usize = 18;
/// Each array begins at a multiple of so many numbers: devices want pointers on 16 bytes.
const ALIGNED_NUMBERS: usize = 4;

/// The arrays of a step, written on the host and uploaded in one copy.
struct StepInputs<B: Backend> {
    host: B::HostBuffer,
    device: B::Buffer,
    len: usize,
}

impl<B: Backend> StepInputs<B> {
    fn new(backend: &B, capacity: usize) -> Result<Self> {
        let bytes = capacity * size_of::<i32>();
        Ok(Self { host: backend.allocate_host(bytes)?, device: backend.allocate(bytes)?, len: 0 })
    }

    /// Reserves the next `rows * columns` numbers, aligned for vectors; the host side is filled by the caller.
    fn reserve(&mut self, rows: usize, columns: usize) -> (Tensor<B::Buffer>, std::ops::Range<usize>) {
        let range = self.len..self.len + rows * columns;
        self.len = range.end.next_multiple_of(ALIGNED_NUMBERS);
        let offset_bytes = range.start * size_of::<i32>();
        (Tensor::new(self.device.clone(), offset_bytes, rows, columns, DType::I32), range)
    }

    fn numbers(&mut self) -> &mut [i32] {
        bytemuck::cast_slice_mut(self.host.as_mut())
    }
}

impl<B: Backend> ModelRunner<B> {
    pub(super) fn new(backend: B, model: Model<B>, kv_dtype: DType, limits: &SchedulerLimits) -> Result<Self> {
        let layout = model.kv_layout(&backend, limits.block_size, kv_dtype)?;
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
            + NUM_INPUTS * (ALIGNED_NUMBERS - 1);
        let config = model.config();
        // A step can bring logits of some sequences and hidden states of others to the host.
        let row_bytes = (max_logits * config.vocab_size + limits.max_num_batched_tokens * config.hidden_size) * 4;
        Ok(Self {
            kv: KvCache::new(&backend, layout, limits.num_blocks)?,
            inputs: StepInputs::new(&backend, capacity)?,
            composition: CompositionBuffers::new(&backend, limits)?,
            tokens: Tensor::new(backend.allocate(max_logits * 4)?, 0, 1, max_logits, DType::I32),
            host_tokens: backend.allocate_host(max_logits * 4)?,
            host_rows: backend.allocate_host(row_bytes)?,
            lora: LoraGroups::new(limits.max_num_seqs * MAX_APPLIED),
            merged: None,
            num_row_bytes: 0,
            max_blocks,
            max_model_len: limits.max_model_len,
            outputs: Vec::with_capacity(limits.max_num_seqs),
            backend,
            model,
            workspace,
            stream,
        })
    }

    /// Starts the tiers below the blocks of this runner.
    pub(super) fn start_pager(&self, tiers: TierConfig, limits: &SchedulerLimits, waker: &Sender<()>) -> Result<Pager> {
        let block_bytes = self.kv.layout.block_bytes();
        let config = PagingConfig {
            block_bytes,
            block_size: limits.block_size,
            layout: Some(self.kv.layout),
            num_host_blocks: tiers.host_bytes / block_bytes,
            num_threads: tiers.num_io_threads,
            open: tiers.open_vault,
        };
        Pager::start(&self.backend, &self.kv.blocks, limits.num_blocks, config, waker)
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

    pub(super) fn outputs(&self) -> &[SequenceOutput] {
        &self.outputs
    }

    /// The token that the device has chosen from a row of logits.
    pub(super) fn token(&self, logits_row: usize) -> u32 {
        bytemuck::cast_slice::<u8, u32>(self.host_tokens.as_ref())[logits_row]
    }

    /// Row `row` of the logits that were brought to the host for a sequence.
    pub(super) fn host_logits(&mut self, rows: HostRows, row: usize) -> &mut [f32] {
        let columns = self.model.config().vocab_size;
        let start = rows.start / 4 + row * columns;
        &mut bytemuck::cast_slice_mut(self.host_rows.as_mut())[start..start + columns]
    }

    /// Adds row `row` of the hidden states that were brought to the host for a sequence to `sum`.
    pub(super) fn add_host_hidden(&self, rows: HostRows, row: usize, sum: &mut [f32]) {
        let dtype = self.backend.activation_dtype();
        let row_bytes = sum.len() * dtype.block_bytes();
        let bytes = &self.host_rows.as_ref()[rows.start + row * row_bytes..][..row_bytes];
        match dtype {
            DType::BF16 => add(sum, bytemuck::cast_slice::<u8, bf16>(bytes)),
            DType::F16 => add(sum, bytemuck::cast_slice::<u8, f16>(bytes)),
            _ => add(sum, bytemuck::cast_slice::<u8, f32>(bytes)),
        }
    }

    /// Computes the scheduled tokens, if there are any, and waits for the results. Some of their sequences' blocks may still
    /// be on their way up. Whether the device repeated a step that it had kept.
    pub(super) fn run<'a>(
        &mut self,
        running: &[Box<Sequence>],
        scheduled: &[ScheduledSequence],
        residency: &Residency,
        landings: impl Iterator<Item = &'a DeviceLanding>,
    ) -> Result<bool> {
        if scheduled.is_empty() {
            return Ok(false);
        }
        self.gather(running, scheduled)?;
        let landings: Vec<&Landing<B::Event>> = landings.map(known_landing).collect();
        let shape = if landings.is_empty() { self.repeated_shape(running, scheduled) } else { None };
        let batch = self.prepare(running, scheduled, shape, &landings);
        let adapted = self.write_adapters(running, scheduled, residency);
        let sampling = self.write_sampling(running, scheduled, batch.num_logits);
        let head = self.write_head(running, scheduled, batch.num_logits);
        let uploaded = 0..self.inputs.len * size_of::<i32>();
        self.backend.upload(&self.stream, &self.inputs.host, &self.inputs.device, uploaded)?;
        let groups = self.lora.groups();
        let lora = adapted.map(|(rows, scales)| LoraBatch { rows, scales, groups });
        let merged = merged_rows(self.merged.as_ref(), running, scheduled);
        let head = head.map(|(rows, scales)| LoraBatch { rows, scales, groups: self.lora.head_groups() });
        let adapted = (lora.is_some() || merged.is_some()).then(|| Adapted { lora, head, merged });
        // What is drawn changes from step to step, so it is never a part of what is repeated.
        let takes_likeliest = shape.is_some() || sampling.is_none();
        let compute = &mut || self.compute(&batch, adapted.as_ref(), takes_likeliest);
        let is_repeated = match shape {
            Some(shape) => self.backend.repeat_step(&self.stream, shape, compute)?,
            None => compute().map(|()| false)?,
        };
        drop(adapted);
        self.lora.clear();
        self.fetch(running, scheduled, &batch, sampling.as_ref())?;
        let done = self.backend.record(&self.stream)?;
        match landings.is_empty() {
            true => self.backend.synchronize(&done)?,
            false => self.backend.synchronize_landed(&done)?,
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

    /// Where the tokens chosen from so many rows of logits are.
    fn tokens_of(&self, num_rows: usize) -> Tensor<B::Buffer> {
        Tensor::new(self.tokens.buffer().clone(), 0, 1, num_rows, DType::I32)
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

    /// Flattens the step's tokens.
    fn prepare<'a>(
        &mut self,
        running: &[Box<Sequence>],
        scheduled: &[ScheduledSequence],
        shape: Option<DecodeShape>,
        landings: &'a [&'a Landing<B::Event>],
    ) -> ForwardBatch<'a, B::Buffer, B::Event> {
        self.inputs.len = 0;
        self.assign_outputs(running, scheduled);
        let attention = self.write_tokens(running, scheduled, shape);
        let (num_logits, num_outputs) = self.count_outputs(running, scheduled);
        let (output_rows, range) = self.inputs.reserve(1, num_outputs);
        let mut rows = range.start;
        // Rows with logits first: prompt logits and samples in batch order, then rows for embeddings.
        for wants_logits in [true, false] {
            let mut token_row = 0;
            for entry in scheduled {
                let sequence = &running[entry.index];
                let wanted = output_range(sequence, entry.num_tokens);
                if is_embedding(sequence) != wants_logits {
                    for row in wanted {
                        self.inputs.numbers()[rows] = (token_row + row) as i32;
                        rows += 1;
                    }
                }
                token_row += entry.num_tokens;
            }
        }
        let (attention, input_ids) = attention;
        ForwardBatch { input_ids, attention, output_rows, num_logits, landings }
    }

    /// Which rows are adapted by what; `None` when none is.
    fn write_adapters(
        &mut self,
        running: &[Box<Sequence>],
        scheduled: &[ScheduledSequence],
        residency: &Residency,
    ) -> Option<RowsAndScales<B>> {
        let num_entries = self.lora.collect(running, scheduled, residency);
        if num_entries == 0 {
            return None;
        }
        let (rows, rows_at) = self.inputs.reserve(1, num_entries);
        let (scales, scales_at) = self.inputs.reserve(1, num_entries);
        let numbers = bytemuck::cast_slice_mut::<u8, i32>(self.inputs.host.as_mut());
        self.lora.fill(running, scheduled, |at, row, scale| {
            numbers[rows_at.start + at] = row;
            numbers[scales_at.start + at] = scale as i32;
        });
        Some((rows, floats(scales)))
    }

    /// How the device draws from each row of logits; `None` when each has its likeliest token, or one that the host chooses.
    fn write_sampling(
        &mut self,
        running: &[Box<Sequence>],
        scheduled: &[ScheduledSequence],
        num_rows: usize,
    ) -> Option<SamplingBatch<B::Buffer>> {
        let drawn = |(output, entry): (&SequenceOutput, &ScheduledSequence)| {
            let sampling = sampling_of(&running[entry.index])?;
            Some((output.logits_row?, sampling)).filter(|(_, sampling)| sampling.temperature > 0.0)
        };
        let inputs = &mut self.inputs;
        self.outputs.iter().zip(scheduled).find_map(drawn)?;
        let mut reserve = |rows, columns| inputs.reserve(rows, columns);
        let [temperatures, top_ks, top_ps, min_ps] = [(); 4].map(|()| reserve(1, num_rows));
        let [seeds, indices] = [(); 2].map(|()| reserve(num_rows, 2));
        let numbers = inputs.numbers();
        let mut write = |row: usize, sampling: &RowSampling| {
            numbers[temperatures.1.start + row] = sampling.temperature.to_bits() as i32;
            numbers[top_ks.1.start + row] = sampling.top_k.min(i32::MAX as u32) as i32;
            numbers[top_ps.1.start + row] = sampling.top_p.to_bits() as i32;
            numbers[min_ps.1.start + row] = sampling.min_p.to_bits() as i32;
            for (array, value) in [(&seeds, sampling.seed), (&indices, sampling.index)] {
                numbers[array.1.start + 2 * row] = value as i32;
                numbers[array.1.start + 2 * row + 1] = (value >> 32) as i32;
            }
        };
        (0..num_rows).for_each(|row| write(row, &RowSampling::GREEDY));
        self.outputs.iter().zip(scheduled).filter_map(drawn).for_each(|(row, sampling)| write(row, &sampling));
        Some(SamplingBatch {
            temperatures: floats(temperatures.0),
            top_ks: top_ks.0,
            top_ps: floats(top_ps.0),
            min_ps: floats(min_ps.0),
            seeds: seeds.0,
            indices: indices.0,
        })
    }

    /// Which rows of logits are adapted by what; `None` when none is.
    fn write_head(
        &mut self,
        running: &[Box<Sequence>],
        scheduled: &[ScheduledSequence],
        num_logits: usize,
    ) -> Option<RowsAndScales<B>> {
        if num_logits == 0 || !self.lora.has_head() {
            return None;
        }
        // As many as there can be: a row has each of its adapters once.
        let (rows, rows_at) = self.inputs.reserve(1, num_logits * MAX_APPLIED);
        let (scales, scales_at) = self.inputs.reserve(1, num_logits * MAX_APPLIED);
        let numbers = bytemuck::cast_slice_mut::<u8, i32>(self.inputs.host.as_mut());
        let logits_of = |entry: &ScheduledSequence| num_logits_of(&running[entry.index], entry.num_tokens);
        let num_entries = self.lora.fill_head(running, scheduled, logits_of, |at, row, scale| {
            numbers[rows_at.start + at] = row;
            numbers[scales_at.start + at] = scale as i32;
        });
        let part = |tensor: Tensor<B::Buffer>, dtype| {
            Tensor::new(tensor.buffer().clone(), tensor.offset_bytes(), 1, num_entries, dtype)
        };
        (num_entries > 0).then(|| (part(rows, DType::I32), part(scales, DType::F32)))
    }

    fn count_outputs(&self, running: &[Box<Sequence>], scheduled: &[ScheduledSequence]) -> (usize, usize) {
        scheduled.iter().fold((0, 0), |(num_logits, num_outputs), entry| {
            let sequence = &running[entry.index];
            let count = output_range(sequence, entry.num_tokens).len();
            (num_logits + num_logits_of(sequence, entry.num_tokens), num_outputs + count)
        })
    }

    /// Which logits row each sequence samples from.
    fn assign_outputs(&mut self, running: &[Box<Sequence>], scheduled: &[ScheduledSequence]) {
        self.outputs.clear();
        let mut logits_row = 0;
        for entry in scheduled {
            let sequence = &running[entry.index];
            let mut output = SequenceOutput::default();
            if matches!(sequence.work, Work::Generate(_)) {
                logits_row += output_range(sequence, entry.num_tokens).len();
                if entry.num_tokens == sequence.num_uncomputed_tokens() {
                    output.logits_row = Some(logits_row - 1);
                }
            }
            self.outputs.push(output);
        }
    }

    /// The tokens and where they belong, as if in a step of `shape` where that is given.
    fn write_tokens(
        &mut self,
        running: &[Box<Sequence>],
        scheduled: &[ScheduledSequence],
        shape: Option<DecodeShape>,
    ) -> (AttentionMetadata<B::Buffer>, Tensor<B::Buffer>) {
        let num_seqs = scheduled.len();
        let num_tokens = scheduled.iter().map(|entry| entry.num_tokens).sum();
        let most_blocks = scheduled.iter().map(|entry| running[entry.index].blocks.len()).max().unwrap_or(0);
        let max_blocks = shape.map_or(most_blocks, |shape| shape.max_blocks);
        let (input_ids, ids_at) = self.inputs.reserve(1, num_tokens);
        let (positions, positions_at) = self.inputs.reserve(1, num_tokens);
        let (slot_mapping, slots_at) = self.inputs.reserve(1, num_tokens);
        let (cu_seqlens_q, starts_at) = self.inputs.reserve(1, num_seqs + 1);
        let (context_lens, lens_at) = self.inputs.reserve(1, num_seqs);
        let (block_tables, tables_at) = self.inputs.reserve(num_seqs, max_blocks);
        let block_size = self.kv.layout.block_size();
        let numbers = self.inputs.numbers();
        let mut token_row = 0;
        let (mut max_query_len, mut max_context_len) = (0, 0);
        numbers[starts_at.start] = 0;
        for (at, entry) in scheduled.iter().enumerate() {
            let sequence = &running[entry.index];
            let context_len = sequence.end_of_next(entry.num_tokens);
            for position in sequence.next_positions().take(entry.num_tokens) {
                let block = sequence.blocks[position / block_size];
                numbers[ids_at.start + token_row] = sequence.tokens[position] as i32;
                numbers[positions_at.start + token_row] = position as i32;
                numbers[slots_at.start + token_row] = (block.index() * block_size + position % block_size) as i32;
                token_row += 1;
            }
            numbers[starts_at.start + at + 1] = token_row as i32;
            numbers[lens_at.start + at] = context_len as i32;
            for (column, block) in sequence.blocks.iter().enumerate() {
                numbers[tables_at.start + at * max_blocks + column] = block.0 as i32;
            }
            max_query_len = max_query_len.max(entry.num_tokens);
            max_context_len = max_context_len.max(context_len);
        }
        let max_context_len = shape.map_or(max_context_len, |shape| shape.max_context_len);
        let metadata = AttentionMetadata {
            num_seqs,
            num_tokens,
            max_query_len,
            max_context_len,
            cu_seqlens_q,
            context_lens,
            block_tables,
            positions,
            slot_mapping,
        };
        (metadata, input_ids)
    }

    /// Queues what the host needs: the token chosen from every row of logits, and the rows of sequences it has to look into.
    fn fetch(
        &mut self,
        running: &[Box<Sequence>],
        scheduled: &[ScheduledSequence],
        batch: &ForwardBatch<'_, B::Buffer, B::Event>,
        sampling: Option<&SamplingBatch<B::Buffer>>,
    ) -> Result<()> {
        self.num_row_bytes = 0;
        if batch.num_logits > 0 {
            let tokens = self.tokens_of(batch.num_logits);
            if let Some(sampling) = sampling {
                let logits = self.workspace.logits(batch.num_logits);
                self.backend.sample(&self.stream, &logits, sampling, &tokens)?;
            }
            self.backend.download(&self.stream, &tokens, &mut self.host_tokens, 0)?;
        }
        let (mut logits_row, mut hidden_row) = (0, batch.num_logits);
        for (at, entry) in scheduled.iter().enumerate() {
            let sequence = &running[entry.index];
            let num_rows = output_range(sequence, entry.num_tokens).len();
            if is_embedding(sequence) {
                let hidden = self.workspace.hidden(hidden_row + num_rows);
                self.fetch_rows(at, &hidden, hidden_row, num_rows)?;
                hidden_row += num_rows;
            } else {
                if needs_logits_on_host(sequence) {
                    let logits = self.workspace.logits(logits_row + num_rows);
                    self.fetch_rows(at, &logits, logits_row, num_rows)?;
                }
                logits_row += num_rows;
            }
        }
        Ok(())
    }

    fn fetch_rows(&mut self, output: usize, rows: &Tensor<B::Buffer>, first: usize, num_rows: usize) -> Result<()> {
        self.outputs[output].host_rows = HostRows { start: self.num_row_bytes, num_rows };
        for row in first..first + num_rows {
            let row = rows.row(row);
            self.backend.download(&self.stream, &row, &mut self.host_rows, self.num_row_bytes)?;
            self.num_row_bytes += row.num_bytes();
        }
        Ok(())
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

fn add<T: Copy + Into<f32>>(sum: &mut [f32], row: &[T]) {
    sum.iter_mut().zip(row).for_each(|(sum, value)| *sum += (*value).into());
}

fn is_embedding(sequence: &Sequence) -> bool {
    matches!(sequence.work, Work::Embed { .. })
}

/// The same array, of f32.
fn floats<B: Clone>(array: Tensor<B>) -> Tensor<B> {
    Tensor::new(array.buffer().clone(), array.offset_bytes(), array.rows(), array.columns(), DType::F32)
}

/// How the device chooses the next token of a sequence, if it does.
fn sampling_of(sequence: &Sequence) -> Option<RowSampling> {
    match &sequence.work {
        Work::Generate(generation) => generation.on_device(sequence.num_output_tokens()),
        Work::Embed { .. } | Work::Deposit { .. } | Work::Source => None,
    }
}

fn needs_logits_on_host(sequence: &Sequence) -> bool {
    match &sequence.work {
        Work::Generate(generation) => generation.on_device(sequence.num_output_tokens()).is_none(),
        Work::Embed { .. } | Work::Deposit { .. } | Work::Source => false,
    }
}

/// Rows of logits of a sequence of which so many tokens are scheduled.
fn num_logits_of(sequence: &Sequence, num_tokens: usize) -> usize {
    if is_embedding(sequence) { 0 } else { output_range(sequence, num_tokens).len() }
}

/// Which of its scheduled tokens a sequence wants results for.
fn output_range(sequence: &Sequence, num_tokens: usize) -> std::ops::Range<usize> {
    let completes = num_tokens == sequence.num_uncomputed_tokens();
    match &sequence.work {
        Work::Embed { .. } => 0..num_tokens,
        Work::Generate(generation) if generation.wants_prompt_logits() => 0..num_tokens,
        Work::Generate(_) if completes => num_tokens - 1..num_tokens,
        Work::Generate(_) | Work::Deposit { .. } | Work::Source => 0..0,
    }
}
