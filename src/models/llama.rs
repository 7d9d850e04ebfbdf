//! Decoders with a norm before each half layer: Llama (and SmolLM2), Qwen2, Qwen3.

use super::layers::{Attention, FeedForward, Loader, Pass, RmsNorm};
use crate::Result;
use crate::backend::{Backend, LoraSite, Projection};

/// One layer: `x += attention(norm(x)); x += feed_forward(norm(x))`.
struct Layer<B: Backend> {
    input_norm: RmsNorm<B>,
    attention: Attention<B>,
    post_attention_norm: RmsNorm<B>,
    feed_forward: FeedForward<B>,
}

/// All layers, and the norm behind them.
pub(super) struct LlamaLayers<B: Backend> {
    layers: Vec<Layer<B>>,
    final_norm: RmsNorm<B>,
    rope: B::RopeTable,
}

impl<B: Backend> LlamaLayers<B> {
    pub(super) fn load(loader: &Loader<'_, B>, max_positions: usize) -> Result<Self> {
        let config = loader.config();
        let layers = (0..config.num_layers).map(|layer| load_layer(loader, layer)).collect::<Result<_>>()?;
        Ok(Self {
            layers,
            final_norm: loader.norm("model.norm.weight", config.hidden_size)?,
            rope: loader.backend.load_rope(&config.rope, max_positions)?,
        })
    }

    /// The weights of one projection.
    pub(super) fn projection(&self, site: LoraSite) -> &B::Matrix {
        let layer = &self.layers[site.layer];
        match site.projection {
            Projection::Qkv | Projection::Output => layer.attention.projection(site.projection),
            Projection::GateUp | Projection::Down => layer.feed_forward.projection(site.projection),
        }
    }

    /// Angles of every layer.
    pub(super) fn rope(&self) -> &B::RopeTable {
        &self.rope
    }

    /// Attention of one layer.
    pub(super) fn attention(&self, layer: usize) -> &Attention<B> {
        &self.layers[layer].attention
    }

    /// From embeddings in `residual` through the first `num_layers` layers, and through the norm behind them: to what the
    /// next layer reads or, behind the last one, to final hidden states, in `normed`.
    pub(super) fn forward(&self, pass: &Pass<'_, B>, num_layers: usize) -> Result<()> {
        let Pass { backend, stream, buffers, .. } = pass;
        let add_norm = |pass: &Pass<'_, B>, norm: &RmsNorm<B>| {
            let buffers = pass.buffers;
            backend.add_rms_norm(stream, &buffers.residual, &buffers.delta, &norm.get(), &buffers.normed)
        };
        let Some(first) = self.layers.first() else { return Ok(()) };
        backend.rms_norm(stream, &buffers.residual, &first.input_norm.get(), &buffers.normed)?;
        for (index, layer) in self.layers[..num_layers].iter().enumerate() {
            if pass.ends_in(index) {
                return layer.attention.project_heads(pass, &self.rope);
            }
            layer.attention.attend(pass, &self.rope)?;
            let pass = &pass.behind_attention(index)?;
            layer.attention.project_output(pass)?;
            add_norm(pass, &layer.post_attention_norm)?;
            layer.feed_forward.forward(pass)?;
            add_norm(pass, self.layers.get(index + 1).map_or(&self.final_norm, |next| &next.input_norm))?;
        }
        Ok(())
    }
}

fn load_layer<B: Backend>(loader: &Loader<'_, B>, layer: usize) -> Result<Layer<B>> {
    let norm = |part: &str| loader.norm(&format!("model.layers.{layer}.{part}.weight"), loader.config().hidden_size);
    Ok(Layer {
        input_norm: norm("input_layernorm")?,
        attention: Attention::load(loader, layer)?,
        post_attention_norm: norm("post_attention_layernorm")?,
        feed_forward: FeedForward::load(loader, layer)?,
    })
}
