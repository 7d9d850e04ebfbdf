//! The arrays of a step: tokens and where they belong, rows of results, adapters.

use super::ModelRunner;
use super::outputs::{is_embedding, num_logits_of, output_range};
use crate::Result;
use crate::backend::{AttentionMetadata, Backend, DType, DecodeShape, Device, Landing, Tensor};
use crate::engine::adapters::MAX_APPLIED;
use crate::engine::residency::Residency;
use crate::engine::scheduler::ScheduledSequence;
use crate::engine::sequence::Sequence;
use crate::models::ForwardBatch;

/// Rows that adapters are added to, and by how much.
pub(super) type RowsAndScales<B> = (Tensor<<B as Device>::Buffer>, Tensor<<B as Device>::Buffer>);

/// Arrays of a step, with those about its rows of logits.
pub(super) const NUM_INPUTS: usize = 22;
/// Each array begins at a multiple of so many numbers: devices want pointers on 16 bytes.
pub(super) const ALIGNED_NUMBERS: usize = 4;

/// The arrays of a step, written on the host and uploaded in one copy.
pub(super) struct StepInputs<B: Backend> {
    pub(super) host: B::HostBuffer,
    pub(super) device: B::Buffer,
    pub(super) len: usize,
}

impl<B: Backend> StepInputs<B> {
    pub(super) fn new(backend: &B, capacity: usize) -> Result<Self> {
        let bytes = capacity * size_of::<i32>();
        Ok(Self { host: backend.allocate_host(bytes)?, device: backend.allocate(bytes)?, len: 0 })
    }

    /// Reserves the next `rows * columns` numbers, aligned for vectors; the host side is filled by the caller.
    pub(super) fn reserve(&mut self, rows: usize, columns: usize) -> (Tensor<B::Buffer>, std::ops::Range<usize>) {
        let range = self.len..self.len + rows * columns;
        self.len = range.end.next_multiple_of(ALIGNED_NUMBERS);
        let offset_bytes = range.start * size_of::<i32>();
        (Tensor::new(self.device.clone(), offset_bytes, rows, columns, DType::I32), range)
    }

    pub(super) fn numbers(&mut self) -> &mut [i32] {
        bytemuck::cast_slice_mut(self.host.as_mut())
    }
}

impl<B: Backend> ModelRunner<B> {
    /// Flattens the step's tokens.
    pub(super) fn prepare<'a>(
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
    pub(super) fn write_adapters(
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

    /// Which rows of logits are adapted by what; `None` when none is.
    pub(super) fn write_head(
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

    /// The tokens and where they belong, as if in a step of `shape` where that is given.
    pub(super) fn write_tokens(
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
        self.runs.clear();
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
            self.runs.push(entry.num_tokens, context_len);
            max_query_len = max_query_len.max(entry.num_tokens);
            max_context_len = max_context_len.max(context_len);
        }
        let max_context_len = shape.map_or(max_context_len, |shape| shape.max_context_len);
        let metadata = AttentionMetadata {
            num_seqs,
            num_tokens,
            max_query_len,
            max_context_len,
            runs: self.runs.clone(),
            cu_seqlens_q,
            context_lens,
            block_tables,
            positions,
            slot_mapping,
        };
        (metadata, input_ids)
    }
}

/// The same array, of f32.
pub(super) fn floats<B: Clone>(array: Tensor<B>) -> Tensor<B> {
    Tensor::new(array.buffer().clone(), array.offset_bytes(), array.rows(), array.columns(), DType::F32)
}
