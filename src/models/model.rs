//! A loaded decoder: embedding, the family's layers, output projection.

use super::batch::{ForwardBatch, KvCache, ProbeBatch, Workspace};
use super::config::{Architecture, ModelConfig};
use super::gemma::GemmaLayers;
use super::layers::{Attention, Loader, OutputRows, Pass};
use super::llama::LlamaLayers;
use super::merged::Adapted;
use super::weights::Checkpoint;
use crate::Result;
use crate::backend::{AttentionMetadata, Backend, DType, KvLayer, KvLayout, LoraSite, RotatedCopies, Tensor};

/// A model on a device. Written once for every backend.
pub struct Model<B: Backend> {
    config: ModelConfig,
    embedding: B::Matrix,
    layers: Layers<B>,
    /// `None` when the embedding serves as output projection.
    lm_head: Option<B::Matrix>,
}

enum Layers<B: Backend> {
    Llama(LlamaLayers<B>),
    Gemma(GemmaLayers<B>),
}

impl<B: Backend> Layers<B> {
    fn forward(&self, pass: &Pass<'_, B>, num_layers: usize) -> Result<()> {
        match self {
            Self::Llama(layers) => layers.forward(pass, num_layers),
            Self::Gemma(layers) => layers.forward(pass, num_layers),
        }
    }

    fn attention(&self, layer: usize) -> &Attention<B> {
        match self {
            Self::Llama(layers) => layers.attention(layer),
            Self::Gemma(layers) => layers.attention(layer),
        }
    }

    fn rope(&self, layer: usize) -> &B::RopeTable {
        match self {
            Self::Llama(layers) => layers.rope(),
            Self::Gemma(layers) => layers.rope(layer),
        }
    }
}

impl<B: Backend> Model<B> {
    /// Loads a checkpoint. `dtype` is what matrices are kept as; `None` keeps them as stored, quantised ones quantised.
    /// Positions run up to `max_positions`.
    pub fn load(backend: &B, checkpoint: &Checkpoint, dtype: Option<DType>, max_positions: usize) -> Result<Self> {
        let loader = Loader { backend, checkpoint, dtype };
        let config = checkpoint.config().clone();
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let embedding = loader.matrix(&[checkpoint.matrix(checkpoint.embedding_name(), vocab, hidden)?])?;
        let lm_head = match config.tie_word_embeddings {
            true => None,
            false => Some(loader.matrix(&[checkpoint.matrix("lm_head.weight", vocab, hidden)?])?),
        };
        let layers = match config.architecture {
            Architecture::Llama | Architecture::Qwen2 | Architecture::Qwen3 => {
                Layers::Llama(LlamaLayers::load(&loader, max_positions)?)
            }
            Architecture::Gemma2 | Architecture::Gemma3 => Layers::Gemma(GemmaLayers::load(&loader, max_positions)?),
        };
        Ok(Self { config, embedding, layers, lm_head })
    }

    /// Shapes and constants.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The KV cache this model needs, as `backend` keeps it.
    pub fn kv_layout(&self, backend: &B, block_size: usize, dtype: DType) -> Result<KvLayout> {
        self.config.kv_layout(backend.kv_order(), block_size, dtype)
    }

    /// Queues copies of stored tokens to other slots and positions, all layers of them, each turned by its own angles.
    pub fn rotate_gather(
        &self,
        backend: &B,
        stream: &B::Stream,
        kv: &KvCache<B::Buffer>,
        copies: &RotatedCopies<B::Buffer>,
    ) -> Result<()> {
        for layer in 0..self.config.num_layers {
            let kv = KvLayer { blocks: &kv.blocks, layout: &kv.layout, layer };
            backend.rotate_gather(stream, &kv, copies, self.layers.rope(layer))?;
        }
        Ok(())
    }

    /// The weights of one projection.
    pub(super) fn projection(&self, site: LoraSite) -> &B::Matrix {
        match &self.layers {
            Layers::Llama(layers) => layers.projection(site),
            Layers::Gemma(layers) => layers.projection(site),
        }
    }

    /// Queues the layers below that of `batch` for its tokens, and the comparison there. A token's deviation depends on the
    /// tokens before it alone, not on how they were divided among passes.
    pub fn probe(
        &self,
        backend: &B,
        stream: &B::Stream,
        batch: &ProbeBatch<B::Buffer>,
        adapted: Option<&Adapted<'_, B>>,
        kv: &KvCache<B::Buffer>,
        workspace: &Workspace<B::Buffer>,
    ) -> Result<()> {
        let buffers = &workspace.for_tokens(batch.attention.num_tokens);
        let metadata = &batch.attention;
        let pass = Pass { backend, stream, buffers, kv, metadata, landings: &[], adapted, outputs: None };
        self.embed(&pass, &batch.input_ids)?;
        self.layers.forward(&pass, batch.layer)?;
        let metadata = &AttentionMetadata { slot_mapping: batch.no_slots.clone(), ..batch.attention.clone() };
        let pass = Pass { metadata, ..pass };
        let rope = self.layers.rope(batch.layer);
        self.layers.attention(batch.layer).deviate(&pass, rope, &batch.slots, &batch.deviations)
    }

    /// Queues one step, some rows of which may be `adapted`. Afterwards `workspace` has the final hidden states of the
    /// output rows, and the logits of the first `num_logits` of them.
    pub fn forward(
        &self,
        backend: &B,
        stream: &B::Stream,
        batch: &ForwardBatch<'_, B::Buffer, B::Event>,
        adapted: Option<&Adapted<'_, B>>,
        kv: &KvCache<B::Buffer>,
        workspace: &Workspace<B::Buffer>,
    ) -> Result<()> {
        let (num_tokens, num_outputs) = (batch.attention.num_tokens, batch.output_rows.columns());
        let buffers = &workspace.for_tokens(num_tokens);
        let outputs = OutputRows {
            rows: &batch.output_rows,
            layer: self.config.num_layers - 1,
            buffers: &workspace.for_outputs(num_outputs),
        };
        // Adapters name rows of the step.
        let is_cut = num_outputs == 0 || (num_outputs < num_tokens && adapted.is_none());
        let outputs = is_cut.then_some(&outputs);
        let (metadata, landings) = (&batch.attention, batch.landings);
        let pass = Pass { backend, stream, buffers, kv, metadata, landings, adapted, outputs };
        self.embed(&pass, &batch.input_ids)?;
        self.layers.forward(&pass, self.config.num_layers)?;
        if !is_cut {
            backend.gather_rows(stream, &buffers.normed, &batch.output_rows, &workspace.hidden(num_outputs))?;
        }
        if batch.num_logits == 0 {
            return Ok(());
        }
        let lm_head = self.lm_head.as_ref().unwrap_or(&self.embedding);
        let hidden = workspace.hidden(batch.num_logits);
        let logits = workspace.logits(batch.num_logits);
        backend.linear(stream, &hidden, lm_head, None, &logits)?;
        if let Some(head) = adapted.and_then(|adapted| adapted.head.as_ref()) {
            backend.add_lora_head(stream, &hidden, head, &logits)?;
        }
        match self.config.logit_softcap {
            Some(cap) => backend.softcap(stream, &logits, cap),
            None => Ok(()),
        }
    }

    /// The embeddings of a pass's tokens, and what adapters add to some of them. As in PEFT, what scales embeddings scales
    /// updates too.
    fn embed(&self, pass: &Pass<'_, B>, input_ids: &Tensor<B::Buffer>) -> Result<()> {
        let Pass { backend, stream, buffers, adapted, .. } = pass;
        let scale = self.config.embedding_scale;
        backend.embed(stream, &self.embedding, input_ids, scale, &buffers.residual)?;
        let lora = adapted.and_then(|adapted| adapted.lora.as_ref());
        match lora.filter(|lora| lora.groups.iter().any(|group| group.adapter.embedding().is_some())) {
            Some(lora) => backend.add_lora_embedding(stream, input_ids, lora, scale, &buffers.residual),
            None => Ok(()),
        }
    }
}
