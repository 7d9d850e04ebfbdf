//! What one forward pass runs on: the tokens of a step and the buffers between its layers.

use crate::backend::{AttentionMetadata, Backend, DType, KvLayout, Landing, Tensor};
use crate::{Result, invalid};

use super::config::ModelConfig;

/// The tokens of a step, flattened over its sequences. All arrays are i32 on the device.
#[derive(Debug, Clone)]
pub struct ForwardBatch<'a, B, E> {
    /// `[1, T]`: token ids.
    pub input_ids: Tensor<B>,
    /// Where the tokens belong.
    pub attention: AttentionMetadata<B>,
    /// `[1, R]`: the token rows whose final hidden state is wanted; those that want logits come first.
    pub output_rows: Tensor<B>,
    /// How many of them want logits.
    pub num_logits: usize,
    /// Blocks of their contexts that are still on their way up: each layer waits for its own part of them, on the device.
    pub landings: &'a [&'a Landing<E>],
}

/// Tokens that go through the lowest layers alone, to see how far the KV that is stored at their places is from theirs.
#[derive(Debug, Clone)]
pub struct ProbeBatch<B> {
    /// `[1, T]`: token ids.
    pub input_ids: Tensor<B>,
    /// Where the tokens belong. What layers below `layer` compute is stored.
    pub attention: AttentionMetadata<B>,
    /// Where keys and values are compared; nothing of this layer and of those above it is stored.
    pub layer: usize,
    /// `[1, T]`: slot of the stored token that each is compared with; negative where there is none.
    pub slots: Tensor<B>,
    /// `[1, T]`: all negative, for the layer that stores nothing.
    pub no_slots: Tensor<B>,
    /// `[1, T]` f32, written: see [`Backend::kv_deviation`].
    pub deviations: Tensor<B>,
}

/// The most a step can hold; buffers are allocated for it.
#[derive(Debug, Clone, Copy)]
pub struct StepLimits {
    /// Tokens.
    pub max_tokens: usize,
    /// Rows of logits.
    pub max_logits: usize,
}

/// Buffers between layers, allocated once.
pub struct Workspace<B> {
    /// `[T, hidden]` f32: the residual stream.
    pub(super) residual: Tensor<B>,
    /// `[T, hidden]`: normalised input of a half layer.
    pub(super) normed: Tensor<B>,
    /// `[T, hidden]`: output of a half layer.
    pub(super) delta: Tensor<B>,
    /// `[T, hidden]`: the same after the norm that some families put behind a half layer.
    pub(super) post_normed: Tensor<B>,
    /// `[T, (num_heads + 2 num_kv_heads) head_dim]`.
    pub(super) qkv: Tensor<B>,
    /// `[T, num_heads head_dim]`.
    pub(super) attended: Tensor<B>,
    /// `[T, 2 intermediate]`.
    pub(super) gate_up: Tensor<B>,
    /// `[T, intermediate]`.
    pub(super) activated: Tensor<B>,
    /// `[R, hidden]` f32: the residual stream of the rows that are wanted of the last layer.
    output_residual: Tensor<B>,
    /// `[R, num_heads head_dim]`: the same of `attended`.
    output_attended: Tensor<B>,
    hidden: Tensor<B>,
    logits: Tensor<B>,
}

impl<B: Clone> Workspace<B> {
    /// Allocates for steps within `limits`.
    pub fn new<D: Backend<Buffer = B>>(backend: &D, config: &ModelConfig, limits: StepLimits) -> Result<Self> {
        let allocate = |rows: usize, columns: usize, dtype: DType| -> Result<Tensor<B>> {
            let buffer = backend.allocate(rows * columns * dtype.block_bytes())?;
            Ok(Tensor::new(buffer, 0, rows, columns, dtype))
        };
        Self::of(config, limits, backend.activation_dtype(), allocate)
    }

    /// Tensors of `allocate(rows, columns, dtype)`.
    fn of(
        config: &ModelConfig,
        limits: StepLimits,
        dtype: DType,
        mut allocate: impl FnMut(usize, usize, DType) -> Result<Tensor<B>>,
    ) -> Result<Self> {
        let tokens = limits.max_tokens;
        let q_size = config.num_heads * config.head_dim;
        let kv_size = config.num_kv_heads * config.head_dim;
        Ok(Self {
            residual: allocate(tokens, config.hidden_size, DType::F32)?,
            normed: allocate(tokens, config.hidden_size, dtype)?,
            delta: allocate(tokens, config.hidden_size, dtype)?,
            post_normed: allocate(tokens, config.hidden_size, dtype)?,
            qkv: allocate(tokens, q_size + 2 * kv_size, dtype)?,
            attended: allocate(tokens, q_size, dtype)?,
            gate_up: allocate(tokens, 2 * config.intermediate_size, dtype)?,
            activated: allocate(tokens, config.intermediate_size, dtype)?,
            output_residual: allocate(tokens, config.hidden_size, DType::F32)?,
            output_attended: allocate(tokens, q_size, dtype)?,
            hidden: allocate(tokens, config.hidden_size, dtype)?,
            logits: allocate(limits.max_logits, config.vocab_size, DType::F32)?,
        })
    }

    /// `[R, hidden]`: final hidden states of the batch's output rows, after the last norm.
    pub fn hidden(&self, num_rows: usize) -> Tensor<B> {
        self.hidden.first_rows(num_rows)
    }

    /// `[num_logits, vocab]` f32.
    pub fn logits(&self, num_rows: usize) -> Tensor<B> {
        self.logits.first_rows(num_rows)
    }

    /// The same buffers, cut to the tokens of one step.
    pub(super) fn for_tokens(&self, num_tokens: usize) -> Self {
        Self {
            residual: self.residual.first_rows(num_tokens),
            normed: self.normed.first_rows(num_tokens),
            delta: self.delta.first_rows(num_tokens),
            post_normed: self.post_normed.first_rows(num_tokens),
            qkv: self.qkv.first_rows(num_tokens),
            attended: self.attended.first_rows(num_tokens),
            gate_up: self.gate_up.first_rows(num_tokens),
            activated: self.activated.first_rows(num_tokens),
            output_residual: self.output_residual.clone(),
            output_attended: self.output_attended.clone(),
            hidden: self.hidden.clone(),
            logits: self.logits.clone(),
        }
    }

    /// What rows that are wanted of the last layer go on in, once the attention of all tokens is done. They end up in
    /// [`hidden`](Self::hidden).
    pub(super) fn for_outputs(&self, num_rows: usize) -> Self {
        Self {
            residual: self.output_residual.first_rows(num_rows),
            attended: self.output_attended.first_rows(num_rows),
            normed: self.hidden.first_rows(num_rows),
            ..self.for_tokens(num_rows)
        }
    }
}

impl Workspace<()> {
    /// Bytes of the buffers for steps within `limits`, activations in `dtype`.
    pub fn num_bytes(config: &ModelConfig, limits: StepLimits, dtype: DType) -> usize {
        let mut num_bytes = 0;
        let counted = Self::of(config, limits, dtype, |rows, columns, dtype| {
            let tensor = Tensor::new((), 0, rows, columns, dtype);
            num_bytes += tensor.num_bytes();
            Ok(tensor)
        });
        counted.map_or(usize::MAX, |_| num_bytes)
    }
}

/// The device's KV blocks.
pub struct KvCache<B> {
    /// All blocks, one after the other.
    pub blocks: B,
    /// Where numbers lie in a block.
    pub layout: KvLayout,
    /// How many there are.
    pub num_blocks: usize,
}

impl<B: Clone> KvCache<B> {
    /// The most tokens that blocks may hold: steps number their places by i32.
    pub const MAX_TOKENS: usize = i32::MAX as usize;

    /// Allocates `num_blocks` blocks of `layout`.
    ///
    /// # Errors
    /// They would hold more than [`Self::MAX_TOKENS`]; the backend's own.
    pub fn new<D: Backend<Buffer = B>>(backend: &D, layout: KvLayout, num_blocks: usize) -> Result<Self> {
        let num_tokens = num_blocks.saturating_mul(layout.block_size());
        if num_tokens > Self::MAX_TOKENS {
            return Err(invalid!(
                "{num_blocks} KV blocks hold {num_tokens} tokens, a step takes {} at most; give a smaller --kv-cache-memory-bytes",
                Self::MAX_TOKENS
            ));
        }
        let blocks = backend.allocate(layout.block_bytes() * num_blocks)?;
        Ok(Self { blocks, layout, num_blocks })
    }
}
