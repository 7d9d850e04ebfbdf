//! The two halves of a decoder layer, as every family has them.

use half::{bf16, f16};

use super::batch::{KvCache, Workspace};
use super::config::{Architecture, ModelConfig};
use super::merged::{Adapted, MergedRows};
use super::weights::Checkpoint;
use crate::Result;
use crate::backend::{
    Activation, AttentionMetadata, AttentionShape, Backend, DType, GatedFeedForward, HeadTransform, HostTensor,
    KvLayer, Landing, LoraSite, Norm, Projection, Tensor,
};
use crate::planted::{self, Bug};

/// Where a pass runs and what it runs on.
pub(super) struct Pass<'a, B: Backend> {
    pub(super) backend: &'a B,
    pub(super) stream: &'a B::Stream,
    pub(super) buffers: &'a Workspace<B::Buffer>,
    pub(super) kv: &'a KvCache<B::Buffer>,
    pub(super) metadata: &'a AttentionMetadata<B::Buffer>,
    /// Blocks that are still on their way up.
    pub(super) landings: &'a [&'a Landing<B::Event>],
    pub(super) adapted: Option<&'a Adapted<'a, B>>,
    /// The rows that are wanted of the last layer; `None` for all.
    pub(super) outputs: Option<&'a OutputRows<'a, B>>,
}

/// The rows of a step whose final hidden states are wanted: behind the attention of the last layer the others have left
/// all they are needed for, their keys and values.
pub(super) struct OutputRows<'a, B: Backend> {
    /// `[1, R]` i32.
    pub(super) rows: &'a Tensor<B::Buffer>,
    /// The last layer.
    pub(super) layer: usize,
    /// What they go on in, `R` rows each.
    pub(super) buffers: &'a Workspace<B::Buffer>,
}

impl<'a, B: Backend> Pass<'a, B> {
    /// Whether nothing is wanted of this layer but keys and values.
    pub(super) fn ends_in(&self, layer: usize) -> bool {
        self.outputs.is_some_and(|outputs| outputs.layer == layer && outputs.rows.columns() == 0)
    }

    /// What goes on behind the attention of this layer.
    pub(super) fn behind_attention(&self, layer: usize) -> Result<Pass<'a, B>> {
        let Pass { backend, stream, buffers, outputs, .. } = *self;
        let Some(OutputRows { rows, buffers: kept, .. }) = outputs.filter(|outputs| outputs.layer == layer) else {
            return Ok(Pass { ..*self });
        };
        backend.gather_rows(stream, &buffers.residual, rows, &kept.residual)?;
        backend.gather_rows(stream, &buffers.attended, rows, &kept.attended)?;
        Ok(Pass { buffers: kept, outputs: None, ..*self })
    }

    /// Has the KV of a layer touched only when what is on its way up for this layer is there. The host waits for nothing.
    fn await_landings(&self, layer: usize) -> Result<()> {
        if planted::is(Bug::LayerNotAwaited) && layer == 1 {
            return Ok(());
        }
        let mut events = self.landings.iter().filter_map(|landing| landing.event_before(layer));
        events.try_for_each(|event| self.backend.wait(self.stream, event))
    }

    /// `out = x W^T + bias`, and what adapters add to some of the rows.
    fn project(
        &self,
        site: LoraSite,
        x: &Tensor<B::Buffer>,
        linear: Linear<'_, B>,
        out: &Tensor<B::Buffer>,
    ) -> Result<()> {
        let Some(Adapted { lora, merged, .. }) = self.adapted else {
            return self.backend.linear(self.stream, x, linear.weight, linear.bias, out);
        };
        self.multiply(site, x, &linear, merged.as_ref(), out)?;
        match lora {
            Some(lora) => self.backend.add_lora(self.stream, x, lora, site, out),
            None => Ok(()),
        }
    }

    /// The product, of rows behind the others with the merged copy where there is one. A row's bits do not depend on the
    /// other rows, so nobody notices where the step is divided.
    fn multiply(
        &self,
        site: LoraSite,
        x: &Tensor<B::Buffer>,
        linear: &Linear<'_, B>,
        merged: Option<&MergedRows<'_, B>>,
        out: &Tensor<B::Buffer>,
    ) -> Result<()> {
        let Pass { backend, stream, .. } = self;
        let copy = merged.and_then(|merged| Some((merged.copy.get(site)?, merged.first_row)));
        let Some((copy, first_row)) = copy else {
            return backend.linear(stream, x, linear.weight, linear.bias, out);
        };
        let first_row = if planted::is(Bug::BystandersUseCopy) { 0 } else { first_row };
        if first_row > 0 {
            let (x, out) = (x.first_rows(first_row), out.first_rows(first_row));
            backend.linear(stream, &x, linear.weight, linear.bias, &out)?;
        }
        backend.linear(stream, &x.rows_from(first_row), copy, linear.bias, &out.rows_from(first_row))
    }
}

/// A projection's weights.
struct Linear<'a, B: Backend> {
    weight: &'a B::Matrix,
    bias: Option<&'a Tensor<B::Buffer>>,
}

/// Where weights come from and how they are kept.
pub(super) struct Loader<'a, B: Backend> {
    pub(super) backend: &'a B,
    pub(super) checkpoint: &'a Checkpoint,
    /// What matrices are kept as; `None` keeps them as stored.
    pub(super) dtype: Option<DType>,
}

impl<B: Backend> Loader<'_, B> {
    pub(super) fn config(&self) -> &ModelConfig {
        self.checkpoint.config()
    }

    pub(super) fn matrix(&self, parts: &[HostTensor]) -> Result<B::Matrix> {
        self.backend.load_matrix(parts, self.dtype)
    }

    /// `value` as a checkpoint in the wanted type would hold it.
    pub(super) fn round(&self, value: f32) -> f32 {
        match self.dtype {
            Some(DType::BF16) => bf16::from_f32(value).to_f32(),
            Some(DType::F16) => f16::from_f32(value).to_f32(),
            _ => value,
        }
    }

    pub(super) fn norm(&self, name: &str, len: usize) -> Result<RmsNorm<B>> {
        let tensor = self.checkpoint.vector(name, len)?;
        // Rounding is to what a checkpoint of that type would hold, and there Gemma's norms lack their constant.
        let stored = self.checkpoint.stored_norm_offset();
        let added = self.config().norm_offset;
        let weight = self.backend.load_vector(&[tensor], &|value| self.round(value - stored) + added)?;
        Ok(RmsNorm { weight, epsilon: self.config().rms_norm_eps })
    }
}

/// Weights of a norm.
pub(super) struct RmsNorm<B: Backend> {
    weight: Tensor<B::Buffer>,
    epsilon: f32,
}

impl<B: Backend> RmsNorm<B> {
    pub(super) fn get(&self) -> Norm<'_, B::Buffer> {
        Norm { weight: &self.weight, epsilon: self.epsilon }
    }
}

/// Self-attention: projections, rotation, KV store, attention over blocks.
pub(super) struct Attention<B: Backend> {
    qkv_proj: B::Matrix,
    qkv_bias: Option<Tensor<B::Buffer>>,
    o_proj: B::Matrix,
    q_norm: Option<RmsNorm<B>>,
    k_norm: Option<RmsNorm<B>>,
    shape: AttentionShape,
    layer: usize,
}

impl<B: Backend> Attention<B> {
    pub(super) fn load(loader: &Loader<'_, B>, layer: usize) -> Result<Self> {
        let config = loader.config();
        let (hidden, head_dim) = (config.hidden_size, config.head_dim);
        let (q_size, kv_size) = (config.num_heads * head_dim, config.num_kv_heads * head_dim);
        let name = |part: &str| format!("model.layers.{layer}.self_attn.{part}");
        let checkpoint = loader.checkpoint;
        let has_head_norms = matches!(config.architecture, Architecture::Qwen3 | Architecture::Gemma3);
        let head_norm = |part: &str| has_head_norms.then(|| loader.norm(&name(part), head_dim)).transpose();
        Ok(Self {
            qkv_proj: loader.matrix(&[
                checkpoint.matrix(&name("q_proj.weight"), q_size, hidden)?,
                checkpoint.matrix(&name("k_proj.weight"), kv_size, hidden)?,
                checkpoint.matrix(&name("v_proj.weight"), kv_size, hidden)?,
            ])?,
            qkv_bias: Self::load_bias(loader, layer, q_size, kv_size)?,
            o_proj: loader.matrix(&[checkpoint.matrix(&name("o_proj.weight"), hidden, q_size)?])?,
            q_norm: head_norm("q_norm.weight")?,
            k_norm: head_norm("k_norm.weight")?,
            shape: AttentionShape {
                num_heads: config.num_heads,
                num_kv_heads: config.num_kv_heads,
                head_dim,
                scale: config.attention_scale,
                softcap: config.attention_softcap,
                window: config.sliding.as_ref().filter(|sliding| sliding.layers[layer]).map(|found| found.window),
            },
            layer,
        })
    }

    fn load_bias(
        loader: &Loader<'_, B>,
        layer: usize,
        q_size: usize,
        kv_size: usize,
    ) -> Result<Option<Tensor<B::Buffer>>> {
        let name = |part: &str| format!("model.layers.{layer}.self_attn.{part}.bias");
        let checkpoint = loader.checkpoint;
        if !checkpoint.has_tensor(&name("q_proj"))? {
            return Ok(None);
        }
        let parts = [
            checkpoint.vector(&name("q_proj"), q_size)?,
            checkpoint.vector(&name("k_proj"), kv_size)?,
            checkpoint.vector(&name("v_proj"), kv_size)?,
        ];
        loader.backend.load_vector(&parts, &|value| loader.round(value)).map(Some)
    }

    /// Weights of the one that is asked for, of the two it has.
    pub(super) fn projection(&self, projection: Projection) -> &B::Matrix {
        if projection == Projection::Output { &self.o_proj } else { &self.qkv_proj }
    }

    /// From `normed` to `attended`.
    pub(super) fn attend(&self, pass: &Pass<'_, B>, rope: &B::RopeTable) -> Result<()> {
        let Pass { backend, stream, buffers, metadata, .. } = pass;
        self.project_heads(pass, rope)?;
        backend.attention(stream, &buffers.qkv, &self.shape, &self.kv(pass), metadata, &buffers.attended)
    }

    /// From `attended` to `delta`.
    pub(super) fn project_output(&self, pass: &Pass<'_, B>) -> Result<()> {
        let output = Linear { weight: &self.o_proj, bias: None };
        pass.project(self.site(Projection::Output), &pass.buffers.attended, output, &pass.buffers.delta)
    }

    /// How far the keys and values of `normed` are from those in `slots`, in a pass that stores nothing.
    pub(super) fn deviate(
        &self,
        pass: &Pass<'_, B>,
        rope: &B::RopeTable,
        slots: &Tensor<B::Buffer>,
        out: &Tensor<B::Buffer>,
    ) -> Result<()> {
        self.project_heads(pass, rope)?;
        let Pass { backend, stream, buffers, .. } = pass;
        backend.kv_deviation(stream, &buffers.qkv, &self.shape, &self.kv(pass), slots, out)
    }

    /// From `normed` to `qkv`; keys and values are stored.
    pub(super) fn project_heads(&self, pass: &Pass<'_, B>, rope: &B::RopeTable) -> Result<()> {
        let Pass { backend, stream, buffers, metadata, .. } = pass;
        let heads = HeadTransform {
            shape: self.shape,
            q_norm: self.q_norm.as_ref().map(RmsNorm::get),
            k_norm: self.k_norm.as_ref().map(RmsNorm::get),
            rope,
        };
        let qkv = Linear { weight: &self.qkv_proj, bias: self.qkv_bias.as_ref() };
        pass.project(self.site(Projection::Qkv), &buffers.normed, qkv, &buffers.qkv)?;
        // Of a partial block that comes up, the tokens behind it are written here.
        pass.await_landings(self.layer)?;
        backend.rope_and_store_kv(stream, &buffers.qkv, &heads, &self.kv(pass), metadata)
    }

    fn kv<'a>(&self, pass: &Pass<'a, B>) -> KvLayer<'a, B::Buffer> {
        KvLayer { blocks: &pass.kv.blocks, layout: &pass.kv.layout, layer: self.layer }
    }

    fn site(&self, projection: Projection) -> LoraSite {
        LoraSite { layer: self.layer, projection }
    }
}

/// The gated feed-forward layer.
pub(super) struct FeedForward<B: Backend> {
    gate_up_proj: B::Matrix,
    down_proj: B::Matrix,
    activation: Activation,
    layer: usize,
}

impl<B: Backend> FeedForward<B> {
    pub(super) fn load(loader: &Loader<'_, B>, layer: usize) -> Result<Self> {
        let config = loader.config();
        let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
        let name = |part: &str| format!("model.layers.{layer}.mlp.{part}.weight");
        let checkpoint = loader.checkpoint;
        Ok(Self {
            gate_up_proj: loader.matrix(&[
                checkpoint.matrix(&name("gate_proj"), intermediate, hidden)?,
                checkpoint.matrix(&name("up_proj"), intermediate, hidden)?,
            ])?,
            down_proj: loader.matrix(&[checkpoint.matrix(&name("down_proj"), hidden, intermediate)?])?,
            activation: config.activation,
            layer,
        })
    }

    /// Weights of the one that is asked for, of the two it has.
    pub(super) fn projection(&self, projection: Projection) -> &B::Matrix {
        if projection == Projection::Down { &self.down_proj } else { &self.gate_up_proj }
    }

    /// From `normed` to `delta`.
    pub(super) fn forward(&self, pass: &Pass<'_, B>) -> Result<()> {
        let Pass { backend, stream, buffers, .. } = pass;
        let site = |projection| LoraSite { layer: self.layer, projection };
        let (sums, activated) = (&buffers.gate_up, &buffers.activated);
        if pass.adapted.is_none() {
            let (gate_up, activation, down) = (&self.gate_up_proj, self.activation, &self.down_proj);
            let layer = GatedFeedForward { gate_up, activation, down, sums, activated };
            return backend.feed_forward(stream, &buffers.normed, &layer, &buffers.delta);
        }
        let gate_up = Linear { weight: &self.gate_up_proj, bias: None };
        pass.project(site(Projection::GateUp), &buffers.normed, gate_up, sums)?;
        backend.gated_activation(stream, sums, self.activation, activated)?;
        let down = Linear { weight: &self.down_proj, bias: None };
        pass.project(site(Projection::Down), activated, down, &buffers.delta)
    }
}
