//! How a token is drawn from a row of logits: what every device's [`sample`](super::Backend::sample) does, and what it is
//! told for each row.
//!
//! Weights are `exp((logit - largest) / temperature)`. Of these the `top_k` largest are kept, of what is left the largest
//! that together reach a share `top_p` (arXiv 1904.09751) and none below `min_p` (the largest is 1); one draw picks among
//! them in order of id. Weights are summed as whole numbers of 2^-40, so that no order of summing matters, and those below
//! count as none. A draw depends on the seed and the number of the token alone, so an output can be reproduced whatever
//! else is in the batch and however often it was preempted.

use super::{DType, Tensor};
use crate::Result;

/// How one row is drawn from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RowSampling {
    /// Divides logits; 0 takes the likeliest.
    pub temperature: f32,
    /// Keeps so many; 0 all.
    pub top_k: u32,
    /// Keeps the likeliest that reach this share; 1 all.
    pub top_p: f32,
    /// Keeps those that are at least this part as likely as the likeliest; 0 all.
    pub min_p: f32,
    /// With the index it decides the draw.
    pub seed: u64,
    /// Number of the token in its output.
    pub index: u64,
}

impl RowSampling {
    /// The likeliest token.
    pub const GREEDY: Self = Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 0, index: 0 };

    /// A number in `[0, 2^53)`: two steps of SplitMix64 (Steele, Lea, Flood 2014), a bijection without visible structure.
    pub(crate) fn draw(&self) -> u64 {
        scramble(scramble(self.seed) ^ self.index) >> 11
    }
}

fn scramble(state: u64) -> u64 {
    let z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// How all rows of a step are drawn from, as arrays on the device.
#[derive(Debug, Clone)]
pub struct SamplingBatch<B> {
    /// `[1, R]` f32.
    pub temperatures: Tensor<B>,
    /// `[1, R]` i32.
    pub top_ks: Tensor<B>,
    /// `[1, R]` f32.
    pub top_ps: Tensor<B>,
    /// `[1, R]` f32.
    pub min_ps: Tensor<B>,
    /// `[R, 2]` i32: 64 bits each, the low half first.
    pub seeds: Tensor<B>,
    /// As the seeds.
    pub indices: Tensor<B>,
    /// What must not be drawn; for a device that [edits logits](super::Backend::edits_logits).
    pub masks: Option<TokenMasks<B>>,
}

/// Which tokens may be drawn from some rows: a logit of another counts as minus infinity.
#[derive(Debug, Clone)]
pub struct TokenMasks<B> {
    /// `[1, R]` i32: a row's mask; negative where all its tokens may be drawn.
    pub mask_of: Tensor<B>,
    /// `[M, ceil(vocab / 32)]` i32: a bit for every token, the lowest first.
    pub words: Tensor<B>,
}

impl<B: Clone> SamplingBatch<B> {
    /// An error unless there is one of each for every row, and a bit for each of `vocab` tokens.
    pub(super) fn check(&self, num_rows: usize, vocab: usize) -> Result<()> {
        if let Some(masks) = &self.masks {
            masks.mask_of.expect("masks of rows", 1, num_rows, DType::I32)?;
            masks.words.expect("masks", masks.words.rows(), vocab.div_ceil(32), DType::I32)?;
        }
        self.temperatures.expect("temperatures", 1, num_rows, DType::F32)?;
        self.top_ks.expect("top_k", 1, num_rows, DType::I32)?;
        self.top_ps.expect("top_p", 1, num_rows, DType::F32)?;
        self.min_ps.expect("min_p", 1, num_rows, DType::F32)?;
        self.seeds.expect("seeds", num_rows, 2, DType::I32)?;
        self.indices.expect("indices of tokens", num_rows, 2, DType::I32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_draw_depends_on_seed_and_index_alone() {
        let draw = |seed, index| RowSampling { seed, index, ..RowSampling::GREEDY }.draw();
        let draws: Vec<f64> = (0..1000).map(|index| draw(7, index) as f64 / (1u64 << 53) as f64).collect();
        assert!(draws.iter().all(|draw| (0.0..1.0).contains(draw)));
        assert!((draws.iter().sum::<f64>() / 1000.0 - 0.5).abs() < 0.05);
        assert_eq!(draw(7, 3), draw(7, 3));
        assert_ne!(draw(8, 3), draw(7, 3));
    }
}
