//! Weights of no checkpoint: numbers drawn by a seed, in the shapes that a `config.json` asks for. A model made of them says
//! nothing and is as fast as one that was trained.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

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
        let mut bytes = Vec::with_capacity(len.saturating_mul(2));
        if name.ends_with("norm.weight") {
            let one = half::bf16::from_f32(1.0 - config.norm_offset).to_le_bytes();
            bytes.extend(std::iter::repeat_n(one, len).flatten());
        } else {
            fill(&mut bytes, len, self.seed_of(name), exponent(columns));
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

/// Appends `len` numbers: signs and mantissas are drawn (SplitMix64), the exponent is one.
fn fill(bytes: &mut Vec<u8>, len: usize, seed: u64, exponent: u16) {
    let mut state = seed;
    let mut draw = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    };
    // Four numbers at once: the sign and the seven bits of the mantissa of each.
    const DRAWN: u64 = 0x807f_807f_807f_807f;
    let exponents = u64::from(exponent << 7) * 0x0001_0001_0001_0001;
    for _ in 0..len / 4 {
        bytes.extend_from_slice(&((draw() & DRAWN) | exponents).to_le_bytes());
    }
    let rest = ((draw() & DRAWN) | exponents).to_le_bytes();
    bytes.extend_from_slice(&rest[..len % 4 * 2]);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(len: usize, seed: u64, columns: usize) -> Vec<f32> {
        let mut bytes = Vec::new();
        fill(&mut bytes, len, seed, exponent(columns));
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
        assert_ne!(numbers(10, 7, 64), numbers(10, 8, 64));
    }
}
