//! What is added to rows of logits before tokens are drawn from them: what
//! [`edit_logits`](super::Backend::edit_logits) is told.
//!
//! The arithmetic is f32, operation by operation: first biases, then for a token that has occurred the repetition penalty
//! (it divides positive and multiplies other logits), and for one that occurs in the output
//! `logit - (frequency_penalty * count + presence_penalty)`.

use super::{DType, Tensor};
use crate::Result;

/// What is done to one row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RowEdit {
    /// Which row.
    pub row: usize,
    /// Its first entry: biases, then counts.
    pub first_entry: usize,
    /// Entries that are biases, of different tokens.
    pub num_biases: usize,
    /// Entries that are counts, of different tokens.
    pub num_counts: usize,
    /// For every token with a count.
    pub repetition_penalty: f32,
    /// Times the count.
    pub frequency_penalty: f32,
    /// For every token with a count above 0.
    pub presence_penalty: f32,
}

impl RowEdit {
    /// Numbers of an edit on the device.
    pub const NUM_WORDS: usize = 7;
    /// Numbers of an entry there: a token, and the bits of its bias or its count.
    pub const ENTRY_WORDS: usize = 2;

    /// As kernels read it.
    pub fn words(&self) -> [i32; Self::NUM_WORDS] {
        let whole = [self.row, self.first_entry, self.num_biases, self.num_counts].map(|number| number as i32);
        let penalties = [self.repetition_penalty, self.frequency_penalty, self.presence_penalty];
        let [row, first_entry, num_biases, num_counts] = whole;
        let [repetition, frequency, presence] = penalties.map(|penalty| penalty.to_bits() as i32);
        [row, first_entry, num_biases, num_counts, repetition, frequency, presence]
    }
}

/// The edits of a step, as arrays on the device.
#[derive(Debug, Clone)]
pub struct LogitEdits<B> {
    /// `[E, 7]` i32: [`RowEdit::words`] of different rows.
    pub rows: Tensor<B>,
    /// `[N, 2]` i32: a token below the vocabulary, and the bits of its bias, f32, or how often it occurs in the output.
    pub entries: Tensor<B>,
}

impl<B: Clone> LogitEdits<B> {
    /// An error unless the arrays have such numbers.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub(super) fn check(&self) -> Result<()> {
        self.rows.expect("edited rows", self.rows.rows(), RowEdit::NUM_WORDS, DType::I32)?;
        self.entries.expect("entries of edits", self.entries.rows(), RowEdit::ENTRY_WORDS, DType::I32)
    }
}
