//! The results of a step: tokens, and the rows of logits and hidden states that the host asked for.

use half::{bf16, f16};

use super::ModelRunner;
use crate::Result;
use crate::backend::{Backend, DType, RowLogprobs, Tensor};
use crate::engine::logprobs::logprobs_from;
use crate::engine::request::TokenLogprobs;
use crate::engine::scheduler::ScheduledSequence;
use crate::engine::sequence::{Sequence, Work};

/// Where the results of one scheduled sequence are.
#[derive(Debug, Clone, Copy, Default)]
pub(in super::super) struct SequenceOutput {
    /// Row of logits behind its last token, when all its tokens are computed.
    pub(in super::super) logits_row: Option<usize>,
    /// Number of the device's answer about that row, where logprobs were asked for.
    pub(in super::super) logprobs: Option<usize>,
    /// The first of its rows on the host and their number.
    pub(in super::super) host_rows: HostRows,
}

/// Rows that were brought to the host for one sequence.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in super::super) struct HostRows {
    /// Byte offset of the first.
    start: usize,
    pub(in super::super) num_rows: usize,
}

impl<B: Backend> ModelRunner<B> {
    pub(in super::super) fn outputs(&self) -> &[SequenceOutput] {
        &self.outputs
    }

    /// The token that the device has chosen from a row of logits.
    pub(in super::super) fn token(&self, logits_row: usize) -> u32 {
        bytemuck::cast_slice::<u8, u32>(self.host_tokens.as_ref())[logits_row]
    }

    /// The logprobs of `token` and the `num_top` likeliest that an answer of the device's means.
    pub(in super::super) fn logprobs(&self, answer: usize, token: u32, num_top: usize) -> TokenLogprobs {
        let (answers, _) = bytemuck::cast_slice::<u8, u32>(self.host_logprobs.as_ref()).as_chunks();
        let num_top = num_top.min(self.model.config().vocab_size);
        logprobs_from(&RowLogprobs::from_words(&answers[answer]), token, num_top)
    }

    /// Row `row` of the logits that were brought to the host for a sequence.
    pub(in super::super) fn host_logits(&mut self, rows: HostRows, row: usize) -> &mut [f32] {
        let columns = self.model.config().vocab_size;
        let start = rows.start / 4 + row * columns;
        &mut bytemuck::cast_slice_mut(self.host_rows.as_mut())[start..start + columns]
    }

    /// Adds row `row` of the hidden states that were brought to the host for a sequence to `sum`.
    pub(in super::super) fn add_host_hidden(&self, rows: HostRows, row: usize, sum: &mut [f32]) {
        let dtype = self.backend.activation_dtype();
        let row_bytes = sum.len() * dtype.block_bytes();
        let bytes = &self.host_rows.as_ref()[rows.start + row * row_bytes..][..row_bytes];
        match dtype {
            DType::BF16 => add(sum, bytemuck::cast_slice::<u8, bf16>(bytes)),
            DType::F16 => add(sum, bytemuck::cast_slice::<u8, f16>(bytes)),
            _ => add(sum, bytemuck::cast_slice::<u8, f32>(bytes)),
        }
    }

    /// Which logits row each sequence samples from.
    pub(super) fn assign_outputs(&mut self, running: &[Box<Sequence>], scheduled: &[ScheduledSequence]) {
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

    /// Where the tokens chosen from so many rows of logits are.
    pub(super) fn tokens_of(&self, num_rows: usize) -> Tensor<B::Buffer> {
        Tensor::new(self.tokens.buffer().clone(), 0, 1, num_rows, DType::I32)
    }

    /// Queues what the host needs: the token chosen from every row of logits, and the rows of sequences it has to look into.
    pub(super) fn fetch(
        &mut self,
        running: &[Box<Sequence>],
        scheduled: &[ScheduledSequence],
        num_logits: usize,
    ) -> Result<()> {
        self.num_row_bytes = 0;
        if num_logits > 0 {
            let tokens = self.tokens_of(num_logits);
            self.backend.download(&self.stream, &tokens, &mut self.host_tokens, 0)?;
        }
        let can_edit = self.backend.edits_logits();
        let (mut logits_row, mut hidden_row) = (0, num_logits);
        for (at, entry) in scheduled.iter().enumerate() {
            let sequence = &running[entry.index];
            let num_rows = output_range(sequence, entry.num_tokens).len();
            if is_embedding(sequence) {
                let hidden = self.workspace.hidden(hidden_row + num_rows);
                self.fetch_rows(at, &hidden, hidden_row, num_rows)?;
                hidden_row += num_rows;
            } else {
                if needs_logits_on_host(sequence, can_edit) {
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

fn add<T: Copy + Into<f32>>(sum: &mut [f32], row: &[T]) {
    sum.iter_mut().zip(row).for_each(|(sum, value)| *sum += (*value).into());
}

pub(super) fn is_embedding(sequence: &Sequence) -> bool {
    matches!(sequence.work, Work::Embed { .. })
}

fn needs_logits_on_host(sequence: &Sequence, can_edit: bool) -> bool {
    match &sequence.work {
        Work::Generate(generation) => generation.on_device(sequence.num_output_tokens(), can_edit).is_none(),
        Work::Embed { .. } | Work::Deposit { .. } | Work::Source => false,
    }
}

/// Rows of logits of a sequence of which so many tokens are scheduled.
pub(super) fn num_logits_of(sequence: &Sequence, num_tokens: usize) -> usize {
    if is_embedding(sequence) { 0 } else { output_range(sequence, num_tokens).len() }
}

/// Which of its scheduled tokens a sequence wants results for.
pub(super) fn output_range(sequence: &Sequence, num_tokens: usize) -> std::ops::Range<usize> {
    let completes = num_tokens == sequence.num_uncomputed_tokens();
    match &sequence.work {
        Work::Embed { .. } => 0..num_tokens,
        Work::Generate(generation) if generation.wants_prompt_logits() => 0..num_tokens,
        Work::Generate(_) if completes => num_tokens - 1..num_tokens,
        Work::Generate(_) | Work::Deposit { .. } | Work::Source => 0..0,
    }
}
