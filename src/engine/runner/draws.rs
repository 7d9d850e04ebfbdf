//! How the device chooses tokens from rows of logits: how each is drawn, what may not be drawn, what is added to logits
//! before, and what is asked about them. Written while the device computes these.

use super::inputs::{StepInputs, floats};
use super::{ModelRunner, SequenceOutput};
use crate::Result;
use crate::backend::{Backend, LogitEdits, RowEdit, RowLogprobs, RowSampling, SamplingBatch, Tensor, TokenMasks};
use crate::engine::generation::{Generation, MAX_ROW_EDITS};
use crate::engine::scheduler::{ScheduledSequence, SchedulerLimits};
use crate::engine::sequence::{Sequence, Work};

/// Arrays of a step that are about its rows of logits.
pub(super) struct Draws<B> {
    /// `None` where each row has its likeliest token.
    sampling: Option<SamplingBatch<B>>,
    edits: Option<LogitEdits<B>>,
    /// What logprobs are asked for, `[L, 2]`.
    asked: Option<Tensor<B>>,
}

/// A row of logits that the device chooses from.
struct ChosenRow<'a> {
    row: usize,
    generation: &'a Generation,
    /// What the sequence has said.
    output: &'a [u32],
    sampling: RowSampling,
}

impl ChosenRow<'_> {
    fn is_constrained(&self) -> bool {
        self.generation.is_constrained(self.output)
    }

    fn is_edited(&self) -> bool {
        self.generation.num_edits() > 0
    }

    /// How many of the likeliest tokens are to be named with its logprobs, where these are wanted.
    fn num_top(&self) -> Option<usize> {
        self.generation.params.logprobs
    }

    /// Whether its token need not be the likeliest of the row as the model gave it.
    fn is_drawn(&self) -> bool {
        self.sampling.temperature > 0.0 || self.is_edited() || self.is_constrained()
    }
}

/// The row that the device chooses a sequence's token from, if it does, given whether it edits logits.
fn chosen_row<'a>(output: &SequenceOutput, sequence: &'a Sequence, can_edit: bool) -> Option<ChosenRow<'a>> {
    let Work::Generate(generation) = &sequence.work else { return None };
    let sampling = generation.on_device(sequence.num_output_tokens(), can_edit)?;
    let said = &sequence.tokens[sequence.num_prompt_tokens..];
    Some(ChosenRow { row: output.logits_row?, generation, output: said, sampling })
}

/// Those of a step.
fn chosen_rows<'a>(
    outputs: &'a [SequenceOutput],
    running: &'a [Box<Sequence>],
    scheduled: &'a [ScheduledSequence],
    can_edit: bool,
) -> impl Iterator<Item = ChosenRow<'a>> + Clone {
    outputs.iter().zip(scheduled).filter_map(move |(output, entry)| chosen_row(output, &running[entry.index], can_edit))
}

/// Numbers that such arrays have at the most, but those of [`write_sampling`].
pub(super) fn capacity<B: Backend>(backend: &B, limits: &SchedulerLimits, vocab_size: usize) -> usize {
    let of_edit = RowEdit::NUM_WORDS + MAX_ROW_EDITS * RowEdit::ENTRY_WORDS;
    let of_sequence = vocab_size.div_ceil(32) + of_edit + RowLogprobs::ASKED_WORDS;
    let of_rows = limits.max_num_seqs + limits.max_prompt_logits;
    if backend.edits_logits() { limits.max_num_seqs * of_sequence + of_rows } else { 0 }
}

impl<B: Backend> ModelRunner<B> {
    /// Whether some row's token need not be its likeliest.
    pub(super) fn draws(&self, running: &[Box<Sequence>], scheduled: &[ScheduledSequence]) -> bool {
        let can_edit = self.backend.edits_logits();
        chosen_rows(&self.outputs, running, scheduled, can_edit).any(|chosen| chosen.is_drawn())
    }

    /// Writes and uploads how tokens are chosen from `num_rows` rows of logits, behind the arrays of the step; and notes for
    /// which sequences logprobs are asked.
    pub(super) fn write_draws(
        &mut self,
        running: &[Box<Sequence>],
        scheduled: &[ScheduledSequence],
        num_rows: usize,
    ) -> Result<Draws<B::Buffer>> {
        self.number_asked(running, scheduled);
        let vocab_size = self.model.config().vocab_size;
        let Self { backend, stream, inputs, outputs, .. } = self;
        let chosen = chosen_rows(outputs, running, scheduled, backend.edits_logits());
        let start = inputs.len;
        let sampling = chosen.clone().any(|chosen| chosen.is_drawn()).then(|| {
            let masks = write_masks(inputs, &chosen, num_rows, vocab_size);
            SamplingBatch { masks, ..write_sampling(inputs, chosen.clone(), num_rows) }
        });
        let edits = write_edits(inputs, &chosen, vocab_size);
        let asked = write_asked(inputs, &chosen);
        if inputs.len > start {
            let uploaded = start * size_of::<i32>()..inputs.len * size_of::<i32>();
            backend.upload(stream, &inputs.host, &inputs.device, uploaded)?;
        }
        Ok(Draws { sampling, edits, asked })
    }

    /// Which answer is about which sequence.
    fn number_asked(&mut self, running: &[Box<Sequence>], scheduled: &[ScheduledSequence]) {
        let can_edit = self.backend.edits_logits();
        let mut num_asked = 0;
        for (output, entry) in self.outputs.iter_mut().zip(scheduled) {
            let chosen = chosen_row(output, &running[entry.index], can_edit);
            output.logprobs = chosen.and_then(|chosen| chosen.num_top()).map(|_| num_asked);
            num_asked += usize::from(output.logprobs.is_some());
        }
    }

    /// Queues what chooses a token from each of `num_rows` rows of logits, and what is asked about these rows.
    pub(super) fn draw(&mut self, draws: &Draws<B::Buffer>, num_rows: usize) -> Result<()> {
        let Self { backend, stream, .. } = &*self;
        let (logits, tokens) = (self.workspace.logits(num_rows), self.tokens_of(num_rows));
        if let Some(edits) = &draws.edits {
            backend.edit_logits(stream, &logits, edits)?;
        }
        if let Some(sampling) = &draws.sampling {
            backend.sample(stream, &logits, sampling, &tokens)?;
        }
        let Some(asked) = &draws.asked else { return Ok(()) };
        if let Some(edits) = &draws.edits {
            backend.restore_logits(stream, &logits, edits)?;
        }
        let answers = self.logprobs.first_rows(asked.rows());
        backend.logprobs(stream, &logits, &tokens, asked, &answers)?;
        self.backend.download(&self.stream, &answers, &mut self.host_logprobs, 0)
    }
}

/// How each row is drawn from; from one that nobody draws from the likeliest is taken.
fn write_sampling<'a, B: Backend>(
    inputs: &mut StepInputs<B>,
    chosen: impl Iterator<Item = ChosenRow<'a>>,
    num_rows: usize,
) -> SamplingBatch<B::Buffer> {
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
    chosen.for_each(|chosen| write(chosen.row, &chosen.sampling));
    SamplingBatch {
        temperatures: floats(temperatures.0),
        top_ks: top_ks.0,
        top_ps: floats(top_ps.0),
        min_ps: floats(min_ps.0),
        seeds: seeds.0,
        indices: indices.0,
        masks: None,
    }
}

/// What may be drawn from the rows that have constraints.
fn write_masks<'a, B: Backend>(
    inputs: &mut StepInputs<B>,
    chosen: &(impl Iterator<Item = ChosenRow<'a>> + Clone),
    num_rows: usize,
    vocab_size: usize,
) -> Option<TokenMasks<B::Buffer>> {
    let constrained = chosen.clone().filter(ChosenRow::is_constrained);
    let (num_masks, num_words) = (constrained.clone().count(), vocab_size.div_ceil(32));
    if num_masks == 0 {
        return None;
    }
    let (mask_of, of_at) = inputs.reserve(1, num_rows);
    let (words, words_at) = inputs.reserve(num_masks, num_words);
    let numbers = inputs.numbers();
    numbers[of_at.clone()].fill(-1);
    for (mask, chosen) in constrained.enumerate() {
        numbers[of_at.start + chosen.row] = mask as i32;
        let words = &mut numbers[words_at.clone()][mask * num_words..][..num_words];
        chosen.generation.write_mask(chosen.output, bytemuck::cast_slice_mut(words));
    }
    Some(TokenMasks { mask_of, words })
}

/// What is added to the rows that have biases or penalties.
fn write_edits<'a, B: Backend>(
    inputs: &mut StepInputs<B>,
    chosen: &(impl Iterator<Item = ChosenRow<'a>> + Clone),
    vocab_size: usize,
) -> Option<LogitEdits<B::Buffer>> {
    let edited = chosen.clone().filter(ChosenRow::is_edited);
    let num_rows = edited.clone().count();
    if num_rows == 0 {
        return None;
    }
    let most_entries = edited.clone().map(|chosen| chosen.generation.num_edits()).sum();
    let (rows, rows_at) = inputs.reserve(num_rows, RowEdit::NUM_WORDS);
    let (entries, entries_at) = inputs.reserve(most_entries, RowEdit::ENTRY_WORDS);
    let (before, numbers) = inputs.numbers().split_at_mut(entries_at.start);
    let mut first_entry = 0;
    for (words, chosen) in before[rows_at].chunks_exact_mut(RowEdit::NUM_WORDS).zip(edited) {
        let free = &mut numbers[first_entry * RowEdit::ENTRY_WORDS..];
        let edit = write_edit(&chosen, vocab_size, first_entry, free);
        words.copy_from_slice(&edit.words());
        first_entry += edit.num_biases + edit.num_counts;
    }
    Some(LogitEdits { rows, entries })
}

/// One row's part, whose entries begin where `free` does.
fn write_edit(chosen: &ChosenRow<'_>, vocab_size: usize, first_entry: usize, free: &mut [i32]) -> RowEdit {
    let Generation { params, counts, .. } = chosen.generation;
    let exists = |entry: &(u32, u32)| (entry.0 as usize) < vocab_size;
    let biases = params.logit_bias.iter().map(|&(id, bias)| (id, bias.to_bits()));
    let num_biases = write_entries(biases.filter(exists), free);
    let counts = counts.iter().map(|(&id, count)| (id, count.in_output));
    let num_counts = write_entries(counts.filter(exists), &mut free[num_biases * RowEdit::ENTRY_WORDS..]);
    RowEdit {
        row: chosen.row,
        first_entry,
        num_biases,
        num_counts,
        repetition_penalty: params.repetition_penalty,
        frequency_penalty: params.frequency_penalty,
        presence_penalty: params.presence_penalty,
    }
}

/// The rows whose logprobs are asked for, in the order of sequences.
fn write_asked<'a, B: Backend>(
    inputs: &mut StepInputs<B>,
    chosen: &(impl Iterator<Item = ChosenRow<'a>> + Clone),
) -> Option<Tensor<B::Buffer>> {
    let asked = chosen.clone().filter_map(|chosen| Some([chosen.row as i32, chosen.num_top()? as i32]));
    let num_asked = asked.clone().count();
    if num_asked == 0 {
        return None;
    }
    let (questions, range) = inputs.reserve(num_asked, RowLogprobs::ASKED_WORDS);
    let words = inputs.numbers()[range].chunks_exact_mut(RowLogprobs::ASKED_WORDS);
    words.zip(asked).for_each(|(words, question)| words.copy_from_slice(&question));
    Some(questions)
}

/// Writes entries to the beginning of `free`, and says how many there are.
fn write_entries(entries: impl Iterator<Item = (u32, u32)>, free: &mut [i32]) -> usize {
    let places = free.chunks_exact_mut(RowEdit::ENTRY_WORDS);
    let write = |(place, (id, value)): (&mut [i32], (u32, u32))| place.copy_from_slice(&[id as i32, value as i32]);
    places.zip(entries).map(write).count()
}
