//! Angles of rotary position embeddings (Su et al., arXiv 2104.09864), as Hugging Face computes them.

use crate::backend::{RopeConfig, RopeScaling};
use crate::{Result, invalid};

/// Cosines and sines of every position and pair of dimensions.
#[derive(Debug, Clone)]
pub struct RopeTable {
    half: usize,
    max_len: usize,
    /// `[max_len][cosines | sines][half]`.
    angles: Vec<f32>,
}

impl RopeTable {
    /// The table for positions `[0, max_len)`.
    pub fn new(config: &RopeConfig, max_len: usize) -> Result<Self> {
        let RopeConfig { head_dim, theta, ref scaling } = *config;
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
        let frequencies = frequencies(head_dim, theta, scaling)?;
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

/// Angle per position of each pair, `[head_dim / 2]`.
fn frequencies(head_dim: usize, theta: f64, scaling: &RopeScaling) -> Result<Vec<f32>> {
    check(head_dim, scaling)?;
    let plain = (0..head_dim / 2).map(|pair| {
        let exponent = (2 * pair) as f32 / head_dim as f32;
        1.0 / theta.powf(f64::from(exponent)) as f32
    });
    Ok(plain.enumerate().map(|(pair, frequency)| scale(scaling, pair, frequency)).collect())
}

fn check(head_dim: usize, scaling: &RopeScaling) -> Result<()> {
    let positive = |factor: f64| factor.is_finite() && factor > 0.0;
    let is_valid = match *scaling {
        RopeScaling::Plain => true,
        RopeScaling::Linear { factor } => positive(factor),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
            positive(factor)
                && positive(low_freq_factor)
                && high_freq_factor > low_freq_factor
                && positive(original_max_position)
        }
        RopeScaling::Factors(ref factors) => {
            factors.len() == head_dim / 2 && factors.iter().all(|&factor| positive(f64::from(factor)))
        }
    };
    if is_valid { Ok(()) } else { Err(invalid!("RoPE scaling must have positive, increasing factors: {scaling:?}")) }
}

fn scale(scaling: &RopeScaling, pair: usize, frequency: f32) -> f32 {
    match *scaling {
        RopeScaling::Plain => frequency,
        RopeScaling::Linear { factor } => frequency / factor as f32,
        RopeScaling::Factors(ref factors) => frequency / factors[pair],
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
            let (factor, low, high) = (factor as f32, low_freq_factor as f32, high_freq_factor as f32);
            let original = original_max_position as f32;
            let wavelength = std::f32::consts::TAU / frequency;
            if wavelength < original / high {
                frequency
            } else if wavelength > original / low {
                frequency / factor
            } else {
                let share = (original / wavelength - low) / (high - low);
                (1.0 - share) * frequency / factor + share * frequency
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(head_dim: usize, max_len: usize, theta: f64, scaling: RopeScaling) -> Result<RopeTable> {
        RopeTable::new(&RopeConfig { head_dim, theta, scaling }, max_len)
    }

    #[test]
    fn plain_angles() {
        let table = table(64, 300, 10_000.0, RopeScaling::Plain).unwrap();
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
        let plain = table(32, 64, 10_000.0, RopeScaling::Plain).unwrap();
        let linear = table(32, 64, 10_000.0, RopeScaling::Linear { factor: 8.0 }).unwrap();
        assert_eq!(plain.row(3), linear.row(24));
    }

    #[test]
    fn llama3_scaling_keeps_short_and_stretches_long_wavelengths() {
        let scaling = RopeScaling::Llama3 {
            factor: 32.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position: 8192.0,
        };
        let plain = frequencies(64, 500_000.0, &RopeScaling::Plain).unwrap();
        let scaled = frequencies(64, 500_000.0, &scaling).unwrap();
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
        assert!(table(63, 8, 1e4, RopeScaling::Plain).is_err());
        assert!(table(64, 8, 0.0, RopeScaling::Plain).is_err());
        assert!(table(64, usize::MAX / 32, 1e4, RopeScaling::Plain).is_err());
        assert!(table(64, 8, 1e4, RopeScaling::Linear { factor: 0.0 }).is_err());
        assert!(table(64, 8, 1e4, RopeScaling::Factors(vec![1.0; 31])).is_err());
    }
}
