//! Angles of rotary position embeddings (Su et al., arXiv 2104.09864), as Hugging Face computes them.

use crate::{Result, invalid};

/// How a checkpoint stretches its rotary embeddings beyond the length it was trained on (`rope_scaling`).
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All positions are divided by `factor`.
    Linear {
        /// At least 1, usually.
        factor: f32,
    },
    /// Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between blended.
    Llama3 {
        /// By how much the context grows.
        factor: f32,
        /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are long.
        low_freq_factor: f32,
        /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are short.
        high_freq_factor: f32,
        /// Context length of the training before the stretching.
        original_max_position_embeddings: usize,
    },
}

/// Cosines and sines of every position and pair of dimensions.
#[derive(Debug, Clone)]
pub struct RopeTable {
    half: usize,
    max_len: usize,
    /// `[max_len][cosines | sines][half]`.
    angles: Vec<f32>,
}

impl RopeTable {
    /// The table for positions `[0, max_len)` of heads of `head_dim` numbers.
    pub fn new(head_dim: usize, max_len: usize, theta: f32, scaling: RopeScaling) -> Result<Self> {
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            return Err(invalid!("rotary embeddings need an even head size, not {head_dim}"));
        }
        if !(theta.is_finite() && theta > 0.0) {
            return Err(invalid!("rope_theta must be positive, not {theta}"));
        }
        if max_len.checked_mul(head_dim).is_none_or(|len| len > isize::MAX as usize / 4) {
            return Err(invalid!("rotary embeddings for {max_len} positions do not fit into memory"));
        }
        let half = head_dim / 2;
        let frequencies = scaling.frequencies(head_dim, theta)?;
        let mut angles = Vec::with_capacity(max_len * head_dim);
        for position in 0..max_len {
            // The product is rounded to f32 before the cosine: checkpoints were trained with that angle.
            let angle = |frequency: &f32| f64::from(position as f32 * frequency);
            angles.extend(frequencies.iter().map(|frequency| angle(frequency).cos() as f32));
            angles.extend(frequencies.iter().map(|frequency| angle(frequency).sin() as f32));
        }
        Ok(Self { half, max_len, angles })
    }

    /// Positions it covers.
    pub fn max_len(&self) -> usize {
        self.max_len
    }

    /// Numbers of a head.
    pub fn head_dim(&self) -> usize {
        2 * self.half
    }

    /// Cosines and sines, `head_dim / 2` each, of a position below `max_len`.
    pub fn row(&self, position: usize) -> (&[f32], &[f32]) {
        self.angles[position * 2 * self.half..(position + 1) * 2 * self.half].split_at(self.half)
    }
}

impl RopeScaling {
    fn frequencies(self, head_dim: usize, theta: f32) -> Result<Vec<f32>> {
        self.check()?;
        let plain = (0..head_dim / 2).map(|pair| {
            let exponent = (2 * pair) as f32 / head_dim as f32;
            1.0 / f64::from(theta).powf(f64::from(exponent)) as f32
        });
        Ok(plain.map(|frequency| self.scale(frequency)).collect())
    }

    fn check(self) -> Result<()> {
        let positive = |factor: f32| factor.is_finite() && factor > 0.0;
        let is_valid = match self {
            RopeScaling::None => true,
            RopeScaling::Linear { factor } => positive(factor),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings: original,
            } => positive(factor) && positive(low_freq_factor) && high_freq_factor > low_freq_factor && original > 0,
        };
        if is_valid { Ok(()) } else { Err(invalid!("rope_scaling must have positive, increasing factors: {self:?}")) }
    }

    fn scale(self, frequency: f32) -> f32 {
        match self {
            RopeScaling::None => frequency,
            RopeScaling::Linear { factor } => frequency / factor,
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let original = original_max_position_embeddings as f32;
                let wavelength = std::f32::consts::TAU / frequency;
                if wavelength < original / high_freq_factor {
                    frequency
                } else if wavelength > original / low_freq_factor {
                    frequency / factor
                } else {
                    let share = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    (1.0 - share) * frequency / factor + share * frequency
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_angles() {
        let table = RopeTable::new(64, 300, 10_000.0, RopeScaling::None).unwrap();
        for position in [0usize, 1, 17, 299] {
            let (cos, sin) = table.row(position);
            for pair in 0..32 {
                let angle = position as f64 / 10_000f64.powf(pair as f64 / 32.0);
                assert!((f64::from(cos[pair]) - angle.cos()).abs() < 3e-5);
                assert!((f64::from(sin[pair]) - angle.sin()).abs() < 3e-5);
            }
        }
        assert_eq!((table.head_dim(), table.max_len()), (64, 300));
    }

    #[test]
    fn linear_scaling_divides_positions() {
        let plain = RopeTable::new(32, 64, 10_000.0, RopeScaling::None).unwrap();
        let linear = RopeTable::new(32, 64, 10_000.0, RopeScaling::Linear { factor: 8.0 }).unwrap();
        assert_eq!(plain.row(3), linear.row(24));
    }

    #[test]
    fn llama3_scaling_keeps_short_and_stretches_long_wavelengths() {
        let scaling = RopeScaling::Llama3 {
            factor: 32.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        };
        let plain = RopeScaling::None.frequencies(64, 500_000.0).unwrap();
        let scaled = scaling.frequencies(64, 500_000.0).unwrap();
        assert_eq!(plain[..8], scaled[..8]);
        for pair in 0..32 {
            let wavelength = std::f64::consts::TAU / f64::from(plain[pair]);
            let share = ((8192.0 / wavelength - 1.0) / 3.0).clamp(0.0, 1.0);
            let wanted = f64::from(plain[pair]) * ((1.0 - share) / 32.0 + share);
            assert!((f64::from(scaled[pair]) / wanted - 1.0).abs() < 1e-5, "{pair}");
        }
        assert!((scaled[31] - plain[31] / 32.0).abs() < 1e-12);
    }

    #[test]
    fn bad_parameters_are_refused() {
        assert!(RopeTable::new(63, 8, 1e4, RopeScaling::None).is_err());
        assert!(RopeTable::new(64, 8, 0.0, RopeScaling::None).is_err());
        assert!(RopeTable::new(64, usize::MAX / 32, 1e4, RopeScaling::None).is_err());
        assert!(RopeTable::new(64, 8, 1e4, RopeScaling::Linear { factor: 0.0 }).is_err());
    }
}
