//! Weights of no checkpoint: numbers drawn by a seed, in the shapes that a `config.json` asks for. A model made of them says
//! nothing and is as fast as one that was trained.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use super::config::{Architecture, ModelConfig};
use super::weights::StoredTensor;
use crate::Result;
use crate::backend::{DType, HostTensor};

/// Part of what a model is called that has such numbers; raised when they change.
const VERSION: u32 = 1;

/// Where the numbers come from.
pub(super) struct DummyWeights {
    config_path: PathBuf,
    config_text: Arc<Vec<u8>>,
    seed: u64,
}

impl DummyWeights {
    /// For the model of that `config.json`.
    pub(super) fn new(config_path: &Path, config_text: String, seed: u64) -> Self {
        Self { config_path: config_path.to_owned(), config_text: Arc::new(config_text.into_bytes()), seed }
    }

    /// The one file that they depend on.
    pub(super) fn config_path(&self) -> &Path {
        &self.config_path
    }

    /// All that they depend on, as if it were a tensor.
    pub(super) fn stored(&self) -> StoredTensor {
        StoredTensor {
            name: "config.json".to_owned(),
            kind: format!("dummy weights v{VERSION}, seed {}", self.seed),
            range: 0..self.config_text.len(),
            source: Arc::clone(&self.config_text) as _,
        }
    }

    /// Whether models of that architecture have a tensor of the name that others lack.
    pub(super) fn has(config: &ModelConfig, name: &str) -> bool {
        name.ends_with("_proj.bias") && config.architecture == Architecture::Qwen2
    }

    /// A tensor in bf16: norms leave a number as it is, all else keeps the size of what is multiplied with it.
    pub(super) fn tensor(&self, config: &ModelConfig, name: &str, rows: usize, columns: usize) -> Result<HostTensor> {
        let len = rows.saturating_mul(columns);
        let mut bytes = vec![0; len.saturating_mul(2)];
        if name.ends_with("norm.weight") {
            let one = half::bf16::from_f32(1.0 - config.norm_offset).to_le_bytes();
            bytes.as_chunks_mut().0.fill(one);
        } else {
            fill(&mut bytes, self.seed_of(name), exponent(columns));
        }
        let range: Range<usize> = 0..bytes.len();
        HostTensor::new(name, Arc::new(bytes), range, DType::BF16, rows, columns)
    }

    fn seed_of(&self, name: &str) -> u64 {
        let mut hasher = blake3::Hasher::new_derive_key("mneme dummy weights v1");
        hasher.update(&self.seed.to_le_bytes()).update(name.as_bytes());
        let [a, b, c, d, e, f, g, h, ..] = *hasher.finalize().as_bytes();
        u64::from_le_bytes([a, b, c, d, e, f, g, h])
    }
}

/// Of bf16 numbers whose squares are one over `columns` on average: those of one binade, of either sign, have 7/3 of the
/// square of its lower end.
fn exponent(columns: usize) -> u16 {
    let lower_end = (3.0 / (7.0 * columns.max(1) as f64)).sqrt();
    (127 + lower_end.log2().round() as i32).clamp(1, 254) as u16
}

/// Writes numbers of 16 bits: signs and mantissas are drawn, the exponent is one. Every thread of the machine draws a part.
fn fill(bytes: &mut [u8], seed: u64, exponent: u16) {
    let num_threads = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let part_bytes = bytes.len().div_ceil(num_threads).next_multiple_of(DRAWN_BYTES).max(MIN_PART_BYTES);
    thread::scope(|scope| {
        for (part, bytes) in bytes.chunks_mut(part_bytes).enumerate() {
            let first_draw = part * part_bytes / DRAWN_BYTES;
            scope.spawn(move || fill_part(bytes, first_draw as u64, seed, exponent));
        }
    });
}

/// Bytes of a draw.
const DRAWN_BYTES: usize = 8;

/// Less is not worth a thread; a multiple of a draw.
const MIN_PART_BYTES: usize = 64 << 10;

/// The same from draw `first_draw` on. SplitMix64 counts, so it may begin anywhere.
fn fill_part(bytes: &mut [u8], first_draw: u64, seed: u64, exponent: u16) {
    const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
    // Four numbers at once: the sign and the seven bits of the mantissa of each.
    const DRAWN: u64 = 0x807f_807f_807f_807f;
    let exponents = u64::from(exponent << 7) * 0x0001_0001_0001_0001;
    let mut state = seed.wrapping_add(STEP.wrapping_mul(first_draw));
    for four in bytes.chunks_mut(DRAWN_BYTES) {
        state = state.wrapping_add(STEP);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let numbers = ((mixed ^ (mixed >> 31)) & DRAWN) | exponents;
        four.copy_from_slice(&numbers.to_le_bytes()[..four.len()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(len: usize, seed: u64, columns: usize) -> Vec<f32> {
        let mut bytes = vec![0; 2 * len];
        fill(&mut bytes, seed, exponent(columns));
        bytes.chunks_exact(2).map(|two| half::bf16::from_le_bytes([two[0], two[1]]).to_f32()).collect()
    }

    #[test]
    fn numbers_keep_the_size_of_what_is_multiplied_with_them() {
        for columns in [8, 576, 4096, 14_336] {
            let numbers = numbers(40_003, 1, columns);
            assert_eq!(numbers.len(), 40_003);
            let mean: f32 = numbers.iter().sum::<f32>() / numbers.len() as f32;
            let square: f32 = numbers.iter().map(|number| number * number).sum::<f32>() / numbers.len() as f32;
            assert!((0.45..2.2).contains(&(square * columns as f32)), "{columns}: {square}");
            assert!(mean.abs() < 0.02 * square.sqrt() * 2.0, "{columns}: {mean}");
        }
    }

    #[test]
    fn a_seed_gives_the_same_numbers_and_another_one_others() {
        assert_eq!(numbers(10, 7, 64), numbers(10, 7, 64));
        assert_eq!(numbers(10, 7, 64)[..8], numbers(8, 7, 64)[..]);
        let (mut alone, mut together) = ([0; 3 * MIN_PART_BYTES + 6], [0; 3 * MIN_PART_BYTES + 6]);
        fill_part(&mut alone, 0, 9, 100);
        fill(&mut together, 9, 100);
        assert!(alone == together, "parts are the whole");
        assert_ne!(numbers(10, 7, 64), numbers(10, 8, 64));
    }
}
