//! What log-probabilities of a row of logits follow from: what [`logprobs`](super::Backend::logprobs) answers.

/// Likeliest tokens that a device names of a row, at the most.
pub const MAX_TOP_LOGPROBS: usize = 20;

/// The answer about one row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RowLogprobs {
    /// Sum of `exp(logit - most)`, in the order of [`log_sum_exp`](super::cpu::log_sum_exp).
    total: f64,
    /// The largest logit; minus infinity where there is no number.
    most: f32,
    /// The logit of the token that was drawn.
    pub chosen: f32,
    /// One more than there are larger logits.
    pub rank: u32,
    /// The likeliest tokens, best first, the lower id first among equals.
    ids: [u32; MAX_TOP_LOGPROBS],
    logits: [f32; MAX_TOP_LOGPROBS],
}

impl RowLogprobs {
    /// Numbers of an answer on the device: the sum's two halves, the low one first, the other numbers and one that is not
    /// used, ids, logits.
    pub const NUM_WORDS: usize = 6 + 2 * MAX_TOP_LOGPROBS;
    /// Numbers of a question there: a row, and how many of its likeliest tokens are wanted.
    pub const ASKED_WORDS: usize = 2;

    /// As kernels write it.
    pub fn from_words(words: &[u32; Self::NUM_WORDS]) -> Self {
        let (ids, logits) = words[6..].split_at(MAX_TOP_LOGPROBS);
        Self {
            total: f64::from_bits(u64::from(words[0]) | u64::from(words[1]) << 32),
            most: f32::from_bits(words[2]),
            chosen: f32::from_bits(words[3]),
            rank: words[4],
            ids: std::array::from_fn(|at| ids[at]),
            logits: std::array::from_fn(|at| f32::from_bits(logits[at])),
        }
    }

    /// The normaliser of the row, with the bits that [`log_sum_exp`](super::cpu::log_sum_exp) has.
    pub fn log_sum_exp(&self) -> f64 {
        let most = f64::from(self.most);
        if self.most.is_finite() { most + self.total.ln() } else { most }
    }

    /// The `count` likeliest tokens with their logits; not more than were asked for and the row has.
    pub fn top(&self, count: usize) -> impl Iterator<Item = (u32, f32)> + '_ {
        self.ids.iter().copied().zip(self.logits.iter().copied()).take(count)
    }
}
