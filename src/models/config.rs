//! What a checkpoint says about its model, in one form for every family and file format.

use crate::backend::{Activation, DType, KvLayout, KvOrder, RopeConfig};
use crate::{Result, malformed};

/// The families mneme runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// Llama 1 to 3, SmolLM2.
    Llama,
    /// Qwen2 and Qwen2.5: a bias on q, k and v.
    Qwen2,
    /// Qwen3: a norm on each q and k head.
    Qwen3,
    /// Gemma 2: norms around each half layer, every other layer with a sliding window, soft caps on attention scores and
    /// on logits.
    Gemma2,
    /// Gemma 3 text: the same norms and those of Qwen3, most layers with a sliding window.
    Gemma3,
}

impl Architecture {
    /// Every family.
    pub const ALL: [Self; 5] = [Self::Llama, Self::Qwen2, Self::Qwen3, Self::Gemma2, Self::Gemma3];

    /// Whether it is a Gemma, which many conventions are shared by.
    pub(super) fn is_gemma(self) -> bool {
        matches!(self, Self::Gemma2 | Self::Gemma3)
    }

    /// Of so many layers the last sees everything, unless the checkpoint says otherwise.
    pub(super) fn default_window_period(self) -> usize {
        if self == Self::Gemma2 { 2 } else { 6 }
    }
}

/// Shapes and constants of a decoder.
#[derive(Debug, Clone)]
pub struct ModelConfig {
    /// Which family.
    pub architecture: Architecture,
    /// Features of a hidden state.
    pub hidden_size: usize,
    /// Features inside the feed-forward layer.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Numbers in a head.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Whether the embedding serves as output projection too.
    pub tie_word_embeddings: bool,
    /// The longest context the model was trained for.
    pub max_position_embeddings: usize,
    /// Epsilon of all norms.
    pub rms_norm_eps: f32,
    /// Added to stored norm weights.
    pub norm_offset: f32,
    /// Multiplies embeddings.
    pub embedding_scale: f32,
    /// Multiplies attention scores.
    pub attention_scale: f32,
    /// What scaled attention scores stay inside of, by `cap tanh(score / cap)`.
    pub attention_softcap: Option<f32>,
    /// What logits stay inside of, in the same way.
    pub logit_softcap: Option<f32>,
    /// Activation of the feed-forward layer.
    pub activation: Activation,
    /// Angles of layers that see everything.
    pub rope: RopeConfig,
    /// Layers with a sliding window, if the family has them.
    pub sliding: Option<SlidingWindow>,
}

/// Sliding-window layers.
#[derive(Debug, Clone)]
pub struct SlidingWindow {
    /// Positions seen, the token's own included.
    pub window: usize,
    /// Per layer, whether it slides.
    pub layers: Vec<bool>,
    /// Angles of sliding layers.
    pub rope: RopeConfig,
}

impl SlidingWindow {
    /// The pattern "all but every `period`-th layer slide".
    pub fn periodic(num_layers: usize, period: usize) -> Vec<bool> {
        (1..=num_layers).map(|layer| period == 0 || !layer.is_multiple_of(period)).collect()
    }
}

impl ModelConfig {
    /// The layer where keys and values first tell how a token's context changes them: the second one or, where layers
    /// slide, the one behind the first that sees everything, since before it a token has met nothing from afar.
    pub fn probe_layer(&self) -> usize {
        let sees_all = |layer: &usize| self.sliding.as_ref().is_none_or(|sliding| !sliding.layers[*layer]);
        let first = (0..self.num_layers).find(sees_all).unwrap_or(0);
        (first + 1).min(self.num_layers - 1)
    }

    /// The KV cache this model needs.
    ///
    /// # Errors
    /// `Invalid` when there is none of such blocks and type.
    pub fn kv_layout(&self, order: KvOrder, block_size: usize, dtype: DType) -> Result<KvLayout> {
        KvLayout::with_order(order, self.num_layers, self.num_kv_heads, self.head_dim, block_size, dtype)
    }

    /// Numbers in the matrices that a token whose logits are wanted is multiplied by.
    pub fn num_multiplied(&self) -> usize {
        let (q_size, kv_size) = (self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim);
        let attention = self.hidden_size * (q_size + 2 * kv_size) + q_size * self.hidden_size;
        let feed_forward = 3 * self.hidden_size * self.intermediate_size;
        self.num_layers * (attention + feed_forward) + self.vocab_size * self.hidden_size
    }

    /// Refuses shapes that cannot be a model, before anything is computed from them.
    pub fn validate(self) -> Result<Self> {
        const MAX_FEATURES: usize = 1 << 20;
        let sizes = [
            ("hidden_size", self.hidden_size, MAX_FEATURES),
            ("intermediate_size", self.intermediate_size, MAX_FEATURES),
            ("num_hidden_layers", self.num_layers, 4096),
            ("num_attention_heads", self.num_heads, 4096),
            ("num_key_value_heads", self.num_kv_heads, 4096),
            ("head_dim", self.head_dim, 1024),
            ("vocab_size", self.vocab_size, 1 << 24),
            ("max_position_embeddings", self.max_position_embeddings, 1 << 28),
        ];
        for (name, value, most) in sizes {
            if value == 0 || value > most {
                return Err(malformed!("model config: {name} is {value}, wanted 1 to {most}"));
            }
        }
        if !self.num_heads.is_multiple_of(self.num_kv_heads) {
            let (heads, kv_heads) = (self.num_heads, self.num_kv_heads);
            return Err(malformed!("model config: {heads} query heads do not divide among {kv_heads} key/value heads"));
        }
        if !self.head_dim.is_multiple_of(16) {
            return Err(malformed!("model config: head_dim {} is not a multiple of 16", self.head_dim));
        }
        if !(self.rms_norm_eps > 0.0 && self.rms_norm_eps < 1.0 && self.rope.theta > 0.0) {
            return Err(malformed!(
                "model config: rms_norm_eps {} or rope theta {} is out of range",
                self.rms_norm_eps,
                self.rope.theta
            ));
        }
        for cap in [self.attention_softcap, self.logit_softcap].into_iter().flatten() {
            if !(cap > 0.0 && cap.is_finite()) {
                return Err(malformed!("model config: a soft cap of {cap}, wanted a positive number"));
            }
        }
        if let Some(sliding) = &self.sliding
            && (sliding.layers.len() != self.num_layers || sliding.window == 0)
        {
            return Err(malformed!(
                "model config: layer_types or sliding_window does not fit {} layers",
                self.num_layers
            ));
        }
        Ok(self)
    }
}
