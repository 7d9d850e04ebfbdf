//! Rotary position embedding (arXiv 2104.09864): what decides the angles.

/// Rotation of pairs `(i, i + head_dim / 2)` by `position * theta^(-2i / head_dim)`.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Numbers in a head.
    pub head_dim: usize,
    /// The base.
    pub theta: f64,
    /// How a longer context was made to fit.
    pub scaling: RopeScaling,
}

/// Changes to the plain angles, by the names Hugging Face configs use. All of them keep an angle proportional to the
/// position, so that stored keys can be moved (`Backend::rotate_gather`); one that does not, or that scales the rotated
/// numbers, must refuse that.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// None.
    Plain,
    /// Positions are divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Low frequencies are divided by `factor`, high ones kept, those between blended (Llama 3.1).
    Llama3 {
        /// Divisor of low frequencies.
        factor: f64,
        /// Wavelengths above `original_max_position / low_freq_factor` are low frequencies.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position / high_freq_factor` are high frequencies.
        high_freq_factor: f64,
        /// The context the model was first trained with.
        original_max_position: f64,
    },
    /// Each inverse frequency is divided by its own factor (GGUF files carry the result of Llama 3.1's rule so).
    Factors(Vec<f32>),
}
