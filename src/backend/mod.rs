//! The seam between the engine and a device: everything a device does for a model.
//!
//! Models are written once over [`Backend`]. Its implementations are the CPU ([`cpu`]), CUDA (`cuda`) and a test double
//! ([`sim`]) that checks block bookkeeping instead of computing. ARCHITECTURE.md shows the CUDA call behind each method.

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod decode_shape;
mod device;
mod dtype;
mod gpu;
mod host_tensor;
mod landing;
mod layout;
mod logit_edits;
mod lora;
mod lora_pages;
mod rope;
mod row_logprobs;
mod sampling;
mod sequence_runs;
pub mod sim;
mod transfer;

pub use cpu::dequantize::dequantize_row;
pub use decode_shape::DecodeShape;
pub use device::{BufferCopy, Device, StreamKind, Tensor};
pub use dtype::DType;
pub use gpu::{GpuInfo, cublaslt_version, find_gpus, flash_attention_version, kernel_source};
pub use host_tensor::{HostTensor, RowOrder, SharedBytes};
pub use landing::{Landing, LandingBlock};
pub use layout::{KvLayout, KvOrder};
pub use logit_edits::{LogitEdits, RowEdit};
pub use lora::{LoraAdapter, LoraBatch, LoraGroup, LoraLoader, LoraPart, LoraSite, Projection, ScaledUpdate};
pub use lora_pages::{LoraPages, PageImage, PagedImage, RowRun};
pub use rope::{RopeConfig, RopeScaling};
pub use row_logprobs::{MAX_TOP_LOGPROBS, RowLogprobs};
pub use sampling::{RowSampling, SamplingBatch, TokenMasks};
pub use sequence_runs::{SequenceRun, SequenceRuns};
pub use transfer::Transfer;

use std::ops::Range;

use crate::{Error, Result, invalid, unsupported};

/// Raised whenever a kernel's results change in any bit, so that KV blocks from before are not taken for what they would
/// be now.
pub const NUMERICS_VERSION: u32 = 4;

/// A device that can run the layers of a transformer. All methods queue work on `stream` and may return before it is
/// done. Shapes are checked before anything is queued; `T` is the number of tokens of the step. Kernels are
/// queued on one stream: between those of a call stands memory that all calls share.
pub trait Backend: Device {
    /// The weights of a linear projection, in the device's own order.
    type Matrix: Send + Sync + 'static;
    /// Rotary angles for every position.
    type RopeTable: Send + Sync + 'static;
    /// Arranges adapters for the device.
    type LoraLoader: LoraLoader<Buffer = Self::Buffer>;

    /// A short name for logs and block identity, such as `cpu-avx512`.
    fn name(&self) -> String;

    /// Element type of activations. The residual stream and logits are f32 everywhere.
    fn activation_dtype(&self) -> DType;

    /// How the kernels keep the numbers of a KV block.
    fn kv_order(&self) -> KvOrder;

    /// Element type of the KV cache unless another one is asked for.
    fn kv_dtype(&self) -> DType;

    /// Says before anything is loaded whether kernels can use a KV cache of `layout`, one in the device's order.
    ///
    /// # Errors
    /// `Unsupported` for a type or a head size that there are no kernels for.
    fn check_kv_layout(&self, _layout: &KvLayout) -> Result<()> {
        Ok(())
    }

    /// Stacks `parts` along their rows into one matrix `[N, K]`. `dtype` is what the numbers are kept as; `None` keeps
    /// them as stored, quantised formats quantised.
    fn load_matrix(&self, parts: &[HostTensor], dtype: Option<DType>) -> Result<Self::Matrix>;

    /// `parts` one after the other as a vector `[1, N]` of f32, each number passed through `convert` on its way.
    fn load_vector(&self, parts: &[HostTensor], convert: &dyn Fn(f32) -> f32) -> Result<Tensor<Self::Buffer>>;

    /// Angles for positions `[0, max_positions)`.
    fn load_rope(&self, config: &RopeConfig, max_positions: usize) -> Result<Self::RopeTable>;

    /// What arranges adapters for the device, on other threads than the one that computes.
    fn create_lora_loader(&self) -> Result<Self::LoraLoader>;

    /// Takes the memory that steps within `bounds` need beside the buffers they are given, so that none is taken later.
    /// Called once the matrices are loaded; a device that took it when it was opened has nothing to do.
    fn reserve(&self, _bounds: &StepBounds<'_>) -> Result<()> {
        Ok(())
    }

    /// The shape, `exact` or larger, that a decode step is given to be like others before it; `None` where every step is
    /// queued anew.
    fn repeated_shape(&self, _exact: DecodeShape) -> Option<DecodeShape> {
        None
    }

    /// Queues on `stream` what `queue` queues there, a step of such a shape, and says whether that was done without calling
    /// it: a device may keep what a step was and queue that again. Between calls with the same shape only what buffers hold
    /// may differ: not which buffers, where in them, and which kernels. `queue` waits for nothing, takes and gives back no
    /// memory, and queues nothing on another stream.
    fn repeat_step(
        &self,
        _stream: &Self::Stream,
        _shape: DecodeShape,
        queue: &mut dyn FnMut() -> Result<()>,
    ) -> Result<bool> {
        queue().map(|()| false)
    }

    /// `out[t] = scale * table[ids[t]]`; `ids` is `[1, T]` i32, `out` `[T, K]` f32.
    fn embed(
        &self,
        stream: &Self::Stream,
        table: &Self::Matrix,
        ids: &Tensor<Self::Buffer>,
        scale: f32,
        out: &Tensor<Self::Buffer>,
    ) -> Result<()>;

    /// `out = x W^T + bias`; `x` `[T, K]` activations, `out` `[T, N]` activations or f32. A row's result does not depend
    /// on the other rows, unless the device was opened with products that say so, and names them in [`name`](Self::name).
    fn linear(
        &self,
        stream: &Self::Stream,
        x: &Tensor<Self::Buffer>,
        weight: &Self::Matrix,
        bias: Option<&Tensor<Self::Buffer>>,
        out: &Tensor<Self::Buffer>,
    ) -> Result<()>;

    /// Adds low-rank updates to rows of a projection: `out[r] += scale * scaling * (x[r] A^T) B^T` for every group with
    /// an update for `site` and each of its rows `r`, group by group. `x` and `out` are what the projection was given.
    /// A row's result does not depend on the other rows, and rows in no group keep their bits.
    fn add_lora(
        &self,
        stream: &Self::Stream,
        x: &Tensor<Self::Buffer>,
        batch: &LoraBatch<'_, Self>,
        site: LoraSite,
        out: &Tensor<Self::Buffer>,
    ) -> Result<()>
    where
        Self: Sized;

    /// Adds low-rank updates to embeddings: `out[r] += factor * scale * scaling * B A[:, ids[r]]` for the rows of every
    /// group with an update of the embedding. `ids` is `[1, T]` i32, `out` `[T, H]` f32.
    ///
    /// # Errors
    /// `Unsupported` where the loader takes no such updates.
    fn add_lora_embedding(
        &self,
        _stream: &Self::Stream,
        _ids: &Tensor<Self::Buffer>,
        _batch: &LoraBatch<'_, Self>,
        _factor: f32,
        _out: &Tensor<Self::Buffer>,
    ) -> Result<()>
    where
        Self: Sized,
    {
        Err(lora::no_kernels("embed_tokens"))
    }

    /// As [`add_lora`](Self::add_lora), of the output projection: `x` are final hidden states, `out` logits, and the
    /// batch's rows are theirs.
    ///
    /// # Errors
    /// `Unsupported` where the loader takes no such updates.
    fn add_lora_head(
        &self,
        _stream: &Self::Stream,
        _x: &Tensor<Self::Buffer>,
        _batch: &LoraBatch<'_, Self>,
        _out: &Tensor<Self::Buffer>,
    ) -> Result<()>
    where
        Self: Sized,
    {
        Err(lora::no_kernels("lm_head"))
    }

    /// Bytes of a copy of `weight` that adapters can be merged into.
    ///
    /// # Errors
    /// `Unsupported` where there can be none: quantised weights have no numbers that a sum could be rounded to.
    fn merged_bytes(&self, weight: &Self::Matrix) -> Result<usize>;

    /// Memory for such a copy. Each of its rows is to be written by [`merge_rows`](Self::merge_rows) before it is used.
    fn allocate_merged(&self, weight: &Self::Matrix) -> Result<Self::Matrix>;

    /// Writes rows `rows` of `target`, an [`allocate_merged`](Self::allocate_merged) of `weight`:
    /// `W + sum of scale * scaling * B A` over `updates`, in f32, the updates one after the other, rounded once to the
    /// type of the weights. The bits do not depend on how the rows are cut into calls, which come in ascending order.
    fn merge_rows(
        &self,
        stream: &Self::Stream,
        weight: &Self::Matrix,
        updates: &[ScaledUpdate<'_, <Self::LoraLoader as LoraLoader>::Lora>],
        rows: Range<usize>,
        target: &mut Self::Matrix,
    ) -> Result<()>;

    /// Root-mean-square norm (arXiv 1910.07467) of each row of activations or f32; `out`, activations, is another buffer
    /// than `x`.
    fn rms_norm(
        &self,
        stream: &Self::Stream,
        x: &Tensor<Self::Buffer>,
        norm: &Norm<'_, Self::Buffer>,
        out: &Tensor<Self::Buffer>,
    ) -> Result<()>;

    /// `residual += delta`, then `out = norm(residual)`; the residual is f32, the others activations.
    fn add_rms_norm(
        &self,
        stream: &Self::Stream,
        residual: &Tensor<Self::Buffer>,
        delta: &Tensor<Self::Buffer>,
        norm: &Norm<'_, Self::Buffer>,
        out: &Tensor<Self::Buffer>,
    ) -> Result<()>;

    /// Normalises (when asked) and rotates the q and k heads of `qkv` `[T, (num_heads + 2 num_kv_heads) head_dim]`, and
    /// stores k and v in the KV cache.
    fn rope_and_store_kv(
        &self,
        stream: &Self::Stream,
        qkv: &Tensor<Self::Buffer>,
        heads: &HeadTransform<'_, Self>,
        kv: &KvLayer<'_, Self::Buffer>,
        metadata: &AttentionMetadata<Self::Buffer>,
    ) -> Result<()>
    where
        Self: Sized;

    /// Causal attention of the q heads of `qkv` over the KV cache; `out` is `[T, num_heads head_dim]`. The query at
    /// position `p` sees the keys of `[0, p]`, cut by the window. A row's result does not depend on how its sequence is
    /// chunked, which other queries it has in the step, or what else is in the batch, unless the device was opened with
    /// attention that says so, and names it in [`name`](Self::name).
    fn attention(
        &self,
        stream: &Self::Stream,
        qkv: &Tensor<Self::Buffer>,
        shape: &AttentionShape,
        kv: &KvLayer<'_, Self::Buffer>,
        metadata: &AttentionMetadata<Self::Buffer>,
        out: &Tensor<Self::Buffer>,
    ) -> Result<()>;

    /// Copies tokens of one layer of the KV cache to other slots and positions. V is copied; every K head is rotated by
    /// the token's delta: in f32, from what is stored, and rounded once. A delta of 0 copies the bits. Reading originals
    /// and rounding once keeps the error of a token that is moved often as small as that of one that is moved once.
    fn rotate_gather(
        &self,
        stream: &Self::Stream,
        kv: &KvLayer<'_, Self::Buffer>,
        copies: &RotatedCopies<Self::Buffer>,
        rope: &Self::RopeTable,
    ) -> Result<()>;

    /// How far freshly computed tokens are from stored ones: `out[t]`, of `[1, T]` f32, is the sum over KV heads of the
    /// squared differences between the k and v of row `t` of `qkv`, as [`rope_and_store_kv`](Self::rope_and_store_kv)
    /// leaves it but rounded to the type of the cache, and those in slot `slots[t]`; `slots` is `[1, T]` i32. A negative
    /// slot stores nothing, so its deviation is infinite. What `rope_and_store_kv` has just stored deviates by 0: to
    /// compare with older keys, it is given negative slots first.
    fn kv_deviation(
        &self,
        stream: &Self::Stream,
        qkv: &Tensor<Self::Buffer>,
        shape: &AttentionShape,
        kv: &KvLayer<'_, Self::Buffer>,
        slots: &Tensor<Self::Buffer>,
        out: &Tensor<Self::Buffer>,
    ) -> Result<()>;

    /// `out = activation(gate) * up`, where a row of `gate_up` is `[gate | up]`; `out` has half as many columns.
    fn gated_activation(
        &self,
        stream: &Self::Stream,
        gate_up: &Tensor<Self::Buffer>,
        activation: Activation,
        out: &Tensor<Self::Buffer>,
    ) -> Result<()>;

    /// The gated feed-forward layer, `out = (activation(x G^T) * x U^T) D^T` (arXiv 2002.05202): two products with the
    /// activation between them, and their bits.
    fn feed_forward(
        &self,
        stream: &Self::Stream,
        x: &Tensor<Self::Buffer>,
        layer: &GatedFeedForward<'_, Self>,
        out: &Tensor<Self::Buffer>,
    ) -> Result<()> {
        self.linear(stream, x, layer.gate_up, None, layer.sums)?;
        self.gated_activation(stream, layer.sums, layer.activation, layer.activated)?;
        self.linear(stream, layer.activated, layer.down, None, out)
    }

    /// `x = cap tanh(x / cap)`, f32, in place; `cap` is positive.
    fn softcap(&self, stream: &Self::Stream, x: &Tensor<Self::Buffer>, cap: f32) -> Result<()>;

    /// `out[i] = x[indices[i]]`; `indices` is `[1, R]` i32.
    fn gather_rows(
        &self,
        stream: &Self::Stream,
        x: &Tensor<Self::Buffer>,
        indices: &Tensor<Self::Buffer>,
        out: &Tensor<Self::Buffer>,
    ) -> Result<()>;

    /// The index of the largest number of each row of f32, the lowest of equals; `out` is `[1, rows]` i32.
    fn argmax(&self, stream: &Self::Stream, x: &Tensor<Self::Buffer>, out: &Tensor<Self::Buffer>) -> Result<()>;

    /// A token drawn from each row of logits, as [`RowSampling`] says; `logits` is `[R, vocab]` f32, `out` `[1, R]` i32. A
    /// row's token does not depend on the other rows.
    fn sample(
        &self,
        stream: &Self::Stream,
        logits: &Tensor<Self::Buffer>,
        sampling: &SamplingBatch<Self::Buffer>,
        out: &Tensor<Self::Buffer>,
    ) -> Result<()>;

    /// Whether the methods below are there, and `sample` takes masks: a row that somebody changes or asks about then stays
    /// on the device. Elsewhere such rows are brought to the host, which does the same with the same bits.
    fn edits_logits(&self) -> bool {
        false
    }

    /// Changes rows of `logits`, `[R, vocab]` f32, as [`RowEdit`] says.
    fn edit_logits(
        &self,
        _stream: &Self::Stream,
        _logits: &Tensor<Self::Buffer>,
        _edits: &LogitEdits<Self::Buffer>,
    ) -> Result<()> {
        Err(keeps_logits("edit_logits"))
    }

    /// Puts back what [`edit_logits`](Self::edit_logits) has just replaced, given the same arrays.
    fn restore_logits(
        &self,
        _stream: &Self::Stream,
        _logits: &Tensor<Self::Buffer>,
        _edits: &LogitEdits<Self::Buffer>,
    ) -> Result<()> {
        Err(keeps_logits("restore_logits"))
    }

    /// What [`RowLogprobs`] says of rows of `logits` and the `tokens`, `[1, R]` i32, drawn from them; `asked` is `[L, 2]`
    /// i32, a row and how many of its likeliest tokens are wanted, `out` `[L, 46]` i32.
    fn logprobs(
        &self,
        _stream: &Self::Stream,
        _logits: &Tensor<Self::Buffer>,
        _tokens: &Tensor<Self::Buffer>,
        _asked: &Tensor<Self::Buffer>,
        _out: &Tensor<Self::Buffer>,
    ) -> Result<()> {
        Err(keeps_logits("logprobs"))
    }
}

/// What a device says that leaves rows of logits to the host.
fn keeps_logits(method: &str) -> Error {
    unsupported!("{method} is not there; ask edits_logits, and bring the rows to the host")
}

/// Weights of a gated feed-forward layer, and room for what is between its products.
pub struct GatedFeedForward<'a, B: Backend + ?Sized> {
    /// The rows of G, with those of U, as many, behind them.
    pub gate_up: &'a B::Matrix,
    /// What gates go through.
    pub activation: Activation,
    /// D.
    pub down: &'a B::Matrix,
    /// `[T, gate | up]`; holds anything afterwards.
    pub sums: &'a Tensor<B::Buffer>,
    /// `[T, features]`; holds anything afterwards.
    pub activated: &'a Tensor<B::Buffer>,
}

/// The function before the product in a gated feed-forward layer (arXiv 2002.05202).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x sigmoid(x)`.
    Silu,
    /// GELU by its tanh approximation.
    GeluTanh,
}

/// Weights `[1, N]` and epsilon of a norm.
#[derive(Debug, Clone, Copy)]
pub struct Norm<'a, B> {
    /// Multiplies the normalised row.
    pub weight: &'a Tensor<B>,
    /// Added to the mean square.
    pub epsilon: f32,
}

/// The most that one step holds.
#[derive(Debug, Clone, Copy)]
pub struct StepBounds<'a> {
    /// Tokens, `T`; also rows of logits.
    pub max_tokens: usize,
    /// Sequences, `S`.
    pub max_sequences: usize,
    /// Tokens of a sequence in the cache.
    pub max_context_len: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Where numbers lie in a KV block.
    pub layout: &'a KvLayout,
}

/// How the q, k and v of one token divide into heads.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Numbers in a head.
    pub head_dim: usize,
    /// Multiplies scores.
    pub scale: f32,
    /// A positive number that scaled scores stay inside of: `cap tanh(score / cap)` takes the place of a score before masks
    /// and softmax.
    pub softcap: Option<f32>,
    /// Only the last so many positions are seen, the token's own included.
    pub window: Option<usize>,
}

impl AttentionShape {
    /// An error unless `qkv` has such heads for `num_tokens` tokens in `dtype`, and the KV cache keeps such heads.
    fn check<B: Clone>(&self, qkv: &Tensor<B>, layout: &KvLayout, num_tokens: usize, dtype: DType) -> Result<()> {
        let (kept_heads, kept_dim) = (layout.num_kv_heads(), layout.head_dim());
        if (self.num_kv_heads, self.head_dim) != (kept_heads, kept_dim) {
            return Err(invalid!("the KV cache has {kept_heads} heads of {kept_dim}, the layer wants {self:?}"));
        }
        if self.num_heads == 0 || !self.num_heads.is_multiple_of(self.num_kv_heads) {
            return Err(invalid!("every KV head serves as many q heads as any other, which cannot be with {self:?}"));
        }
        self.softcap.map_or(Ok(()), check_softcap)?;
        let columns = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim;
        qkv.expect("qkv", num_tokens, columns, dtype)
    }
}

/// An error unless numbers can stay inside of `cap`.
fn check_softcap(cap: f32) -> Result<()> {
    match cap > 0.0 && cap.is_finite() {
        true => Ok(()),
        false => Err(invalid!("a soft cap of {cap}; it is a positive number")),
    }
}

/// What happens to q and k heads before they meet.
pub struct HeadTransform<'a, B: Backend> {
    /// How a row divides.
    pub shape: AttentionShape,
    /// Norm of each q head.
    pub q_norm: Option<Norm<'a, B::Buffer>>,
    /// Norm of each k head.
    pub k_norm: Option<Norm<'a, B::Buffer>>,
    /// Rotary angles.
    pub rope: &'a B::RopeTable,
}

/// One layer of the KV cache.
#[derive(Debug, Clone, Copy)]
pub struct KvLayer<'a, B> {
    /// All blocks, one after the other.
    pub blocks: &'a B,
    /// Where numbers lie in a block.
    pub layout: &'a KvLayout,
    /// Which layer.
    pub layer: usize,
}

/// Where the tokens of a step belong. All arrays are i32 on the device.
#[derive(Debug, Clone)]
pub struct AttentionMetadata<B> {
    /// Number of sequences, `S`.
    pub num_seqs: usize,
    /// Number of tokens, `T`.
    pub num_tokens: usize,
    /// The longest run of new tokens of one sequence.
    pub max_query_len: usize,
    /// The longest context, new tokens included.
    pub max_context_len: usize,
    /// The sequences in runs of those that have cached context, and of those that have none.
    pub runs: SequenceRuns,
    /// `[1, S + 1]`: sequence `s` has the token rows `[cu_seqlens_q[s], cu_seqlens_q[s + 1])`.
    pub cu_seqlens_q: Tensor<B>,
    /// `[1, S]`: one past the position of the sequence's last new token. From the first position that the first new
    /// token sees up to there, the cache is filled after this step's store.
    pub context_lens: Tensor<B>,
    /// `[S, max_blocks]`: block ids in order of position; entries past the context are ignored.
    pub block_tables: Tensor<B>,
    /// `[1, T]`: position of each token in its sequence, ascending within it. There may be gaps: tokens between are in
    /// the cache already.
    pub positions: Tensor<B>,
    /// `[1, T]`: `block * block_size + offset` of each token.
    pub slot_mapping: Tensor<B>,
}

impl<B: Clone> AttentionMetadata<B> {
    /// An error unless the arrays are as long as the counts say.
    fn check(&self) -> Result<()> {
        let Self { num_seqs, num_tokens, ref block_tables, .. } = *self;
        self.cu_seqlens_q.expect("cu_seqlens_q", 1, num_seqs + 1, DType::I32)?;
        self.context_lens.expect("context_lens", 1, num_seqs, DType::I32)?;
        block_tables.expect("block_tables", num_seqs, block_tables.columns(), DType::I32)?;
        self.positions.expect("positions", 1, num_tokens, DType::I32)?;
        self.slot_mapping.expect("slot_mapping", 1, num_tokens, DType::I32)?;
        match (self.runs.num_seqs(), self.runs.num_tokens()) == (num_seqs, num_tokens) {
            true => Ok(()),
            false => Err(invalid!("{:?} are not the runs of {num_seqs} sequences with {num_tokens} tokens", self.runs)),
        }
    }
}

/// Tokens to be copied within the KV cache, each to another slot and position. All arrays are `[1, N]` i32 on the device.
///
/// No block has both a source and a target, and no two targets are the same: targets lie in new blocks of one owner.
#[derive(Debug, Clone)]
pub struct RotatedCopies<B> {
    /// `block * block_size + offset` of the stored token.
    pub source_slots: Tensor<B>,
    /// Where the copy goes.
    pub target_slots: Tensor<B>,
    /// Position of the copy minus that of the stored token; may be negative. Its absolute value lies inside the table of
    /// rotary angles.
    pub position_deltas: Tensor<B>,
}

impl<B: Clone> RotatedCopies<B> {
    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.source_slots.columns()
    }

    /// Whether there is nothing to copy.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// An error unless the arrays are equally long.
    fn check(&self) -> Result<()> {
        self.source_slots.expect("source_slots", 1, self.len(), DType::I32)?;
        self.target_slots.expect("target_slots", 1, self.len(), DType::I32)?;
        self.position_deltas.expect("position_deltas", 1, self.len(), DType::I32)
    }
}
