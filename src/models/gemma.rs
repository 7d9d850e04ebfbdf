//! Gemma 2 and 3: a norm before and after each half layer, and two kinds of attention layers, which have their own angles
//! in Gemma 3.

use super::layers::{Attention, FeedForward, Loader, Pass, RmsNorm};
use crate::backend::{Backend, LoraSite, Projection};
use crate::{Result, malformed};

/// One layer: `x += post(attention(pre(x))); x += post(feed_forward(pre(x)))`.
struct Layer<B: Backend> {
    input_norm: RmsNorm<B>,
    attention: Attention<B>,
    post_attention_norm: RmsNorm<B>,
    pre_feedforward_norm: RmsNorm<B>,
    feed_forward: FeedForward<B>,
    post_feedforward_norm: RmsNorm<B>,
    slides: bool,
}

/// All layers, and the norm behind them.
pub(super) struct GemmaLayers<B: Backend> {
    layers: Vec<Layer<B>>,
    final_norm: RmsNorm<B>,
    rope: B::RopeTable,
    sliding_rope: B::RopeTable,
}

impl<B: Backend> GemmaLayers<B> {
    pub(super) fn load(loader: &Loader<'_, B>, max_positions: usize) -> Result<Self> {
        let config = loader.config();
        let sliding = config.sliding.as_ref().ok_or_else(|| malformed!("a Gemma model needs a sliding window"))?;
        let layers = sliding.layers.iter().enumerate().map(|(layer, &slides)| load_layer(loader, layer, slides));
        Ok(Self {
            layers: layers.collect::<Result<_>>()?,
            final_norm: loader.norm("model.norm.weight", config.hidden_size)?,
            rope: loader.backend.load_rope(&config.rope, max_positions)?,
            sliding_rope: loader.backend.load_rope(&sliding.rope, max_positions)?,
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

    /// Angles of one layer.
    pub(super) fn rope(&self, layer: usize) -> &B::RopeTable {
        if self.layers[layer].slides { &self.sliding_rope } else { &self.rope }
    }

    /// Attention of one layer.
    pub(super) fn attention(&self, layer: usize) -> &Attention<B> {
        &self.layers[layer].attention
    }

    /// From embeddings in `residual` through the first `num_layers` layers, and through the norm behind them: to what the
    /// next layer reads or, behind the last one, to final hidden states, in `normed`.
    pub(super) fn forward(&self, pass: &Pass<'_, B>, num_layers: usize) -> Result<()> {
        let Pass { backend, stream, buffers, .. } = pass;
        // The norm behind a half layer, then the sum, then the norm before the next half.
        let join = |pass: &Pass<'_, B>, post: &RmsNorm<B>, next: &RmsNorm<B>| {
            let buffers = pass.buffers;
            backend.rms_norm(stream, &buffers.delta, &post.get(), &buffers.post_normed)?;
            backend.add_rms_norm(stream, &buffers.residual, &buffers.post_normed, &next.get(), &buffers.normed)
        };
        let Some(first) = self.layers.first() else { return Ok(()) };
        backend.rms_norm(stream, &buffers.residual, &first.input_norm.get(), &buffers.normed)?;
        for (index, layer) in self.layers[..num_layers].iter().enumerate() {
            if pass.ends_in(index) {
                return layer.attention.project_heads(pass, self.rope(index));
            }
            layer.attention.attend(pass, self.rope(index))?;
            let pass = &pass.behind_attention(index)?;
            layer.attention.project_output(pass)?;
            join(pass, &layer.post_attention_norm, &layer.pre_feedforward_norm)?;
            layer.feed_forward.forward(pass)?;
            let next = self.layers.get(index + 1).map_or(&self.final_norm, |next| &next.input_norm);
            join(pass, &layer.post_feedforward_norm, next)?;
        }
        Ok(())
    }
}

fn load_layer<B: Backend>(loader: &Loader<'_, B>, layer: usize, slides: bool) -> Result<Layer<B>> {
    let norm = |part: &str| loader.norm(&format!("model.layers.{layer}.{part}.weight"), loader.config().hidden_size);
    Ok(Layer {
        input_norm: norm("input_layernorm")?,
        attention: Attention::load(loader, layer)?,
        post_attention_norm: norm("post_attention_layernorm")?,
        pre_feedforward_norm: norm("pre_feedforward_layernorm")?,
        feed_forward: FeedForward::load(loader, layer)?,
        post_feedforward_norm: norm("post_feedforward_layernorm")?,
        slides,
    })
}
