//! What is done to rows of logits: the cap, the likeliest token, drawing, edits and log-probabilities.

use mneme::Result;
use mneme::backend::{Backend, DType, LogitEdits, MAX_TOP_LOGPROBS, RowEdit, RowLogprobs, SamplingBatch, Tensor};

use super::bench::{Bench, Sink, Work};
use super::measure::Effort;
use crate::cli::bench::random::Random;

/// Gemma 2's.
const LOGIT_CAP: f32 = 30.0;

/// Tokens of a row that have occurred.
const NUM_COUNTS: usize = 256;

/// Bits of numbers that lie as a model's logits do, nearly normal with a deviation of 3: how long draws take depends on how
/// many tokens are about as likely.
fn random_logits(len: usize) -> Vec<i32> {
    let mut random = Random::new(1, 0);
    let mut draw = || (0..4).map(|_| random.uniform() - 0.5).sum::<f64>() * 3.0 * 3f64.sqrt();
    (0..len).map(|_| (draw() as f32).to_bits() as i32).collect()
}

impl<B: Backend> Bench<B> {
    /// Rows that a step samples from.
    pub(super) fn logits(&self, effort: &Effort, sink: Sink<'_>) -> Result<()> {
        let (num_rows, vocab_size) = (self.batch_size, self.dimensions.vocab_size);
        let logits = self.words(&random_logits(num_rows * vocab_size), num_rows, vocab_size, DType::F32)?;
        let ids = self.indices(&vec![0; num_rows])?;
        let work = |name, bytes: usize| Work { name, shape: format!("[{num_rows}, {vocab_size}]"), bytes, flops: 0 };
        let launch = |_| self.backend.softcap(&self.stream, &logits, LOGIT_CAP);
        self.measure(effort, work("softcap", 2 * logits.num_bytes()), &launch, sink)?;
        let launch = |_| self.backend.argmax(&self.stream, &logits, &ids);
        self.measure(effort, work("argmax", logits.num_bytes()), &launch, sink)?;
        let sampling = self.sampling(num_rows)?;
        let launch = |_| self.backend.sample(&self.stream, &logits, &sampling, &ids);
        self.measure(effort, work("sample", logits.num_bytes()), &launch, sink)?;
        match self.backend.edits_logits() {
            true => self.edits(&logits, &ids, effort, sink),
            false => Ok(()),
        }
    }

    /// Every row by temperature and nucleus.
    fn sampling(&self, num_rows: usize) -> Result<SamplingBatch<B::Buffer>> {
        let floats = |value: f32| self.words(&vec![value.to_bits() as i32; num_rows], 1, num_rows, DType::F32);
        Ok(SamplingBatch {
            temperatures: floats(0.8)?,
            top_ks: self.indices(&vec![0; num_rows])?,
            top_ps: floats(0.95)?,
            min_ps: floats(0.0)?,
            seeds: self.words(&vec![7; 2 * num_rows], num_rows, 2, DType::I32)?,
            indices: self.words(&vec![1; 2 * num_rows], num_rows, 2, DType::I32)?,
            masks: None,
        })
    }

    fn edits(
        &self,
        logits: &Tensor<B::Buffer>,
        ids: &Tensor<B::Buffer>,
        effort: &Effort,
        sink: Sink<'_>,
    ) -> Result<()> {
        let num_rows = logits.rows();
        let num_counts = NUM_COUNTS.min(logits.columns());
        let edit = |row: usize| RowEdit {
            row,
            first_entry: row * num_counts,
            num_biases: 0,
            num_counts,
            repetition_penalty: 1.1,
            frequency_penalty: 0.1,
            presence_penalty: 0.1,
        };
        let rows: Vec<i32> = (0..num_rows).flat_map(|row| edit(row).words()).collect();
        let entries: Vec<i32> = (0..num_rows * num_counts).flat_map(|at| [(at % num_counts) as i32, 1]).collect();
        let edits = LogitEdits {
            rows: self.words(&rows, num_rows, RowEdit::NUM_WORDS, DType::I32)?,
            entries: self.words(&entries, num_rows * num_counts, RowEdit::ENTRY_WORDS, DType::I32)?,
        };
        let shape = format!("{num_rows} rows, {num_counts} tokens");
        // A logit is read, kept in its entry's place and written.
        let work = |name| Work { name, shape: shape.clone(), bytes: 2 * edits.entries.num_bytes(), flops: 0 };
        let launch = |_| self.backend.edit_logits(&self.stream, logits, &edits);
        self.measure(effort, work("edit_logits"), &launch, sink)?;
        let launch = |_| self.backend.restore_logits(&self.stream, logits, &edits);
        self.measure(effort, work("restore_logits"), &launch, sink)?;

        let asked: Vec<i32> = (0..num_rows).flat_map(|row| [row as i32, MAX_TOP_LOGPROBS as i32]).collect();
        let asked = self.words(&asked, num_rows, RowLogprobs::ASKED_WORDS, DType::I32)?;
        let out = self.tensor(num_rows, RowLogprobs::NUM_WORDS, DType::I32)?;
        let work = Work {
            name: "logprobs",
            shape: format!("{num_rows} rows, {MAX_TOP_LOGPROBS} likeliest"),
            bytes: logits.num_bytes(),
            flops: 0,
        };
        self.measure(effort, work, &|_| self.backend.logprobs(&self.stream, logits, ids, &asked, &out), sink)
    }
}
