//! The model under an adapter: which modules it has, and their shapes. Each layer has the same seven; around them are the
//! embedding and the output projection.

use crate::backend::{LoraSite, Projection};

/// A linear module that an adapter may change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Module {
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
    /// Of which there is one, counted with layer 0.
    Embedding,
    /// As that.
    Head,
}

impl Module {
    /// All of a layer.
    pub const ALL: [Self; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// The module's name, inside its layer where it has one, as Hugging Face models have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q => "self_attn.q_proj",
            Self::K => "self_attn.k_proj",
            Self::V => "self_attn.v_proj",
            Self::O => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
            Self::Embedding => "embed_tokens",
            Self::Head => "lm_head",
        }
    }

    /// The module's whole name, as Hugging Face models have it.
    pub fn full_name(self, layer: usize) -> String {
        match self {
            Self::Embedding => "model.embed_tokens".to_owned(),
            Self::Head => "lm_head".to_owned(),
            _ => format!("model.layers.{layer}.{}", self.name()),
        }
    }

    /// The module of a layer with that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|module| module.name() == name)
    }

    /// The module's name, inside its layer where it has one, in GGUF files.
    pub fn gguf_name(self) -> &'static str {
        match self {
            Self::Q => "attn_q",
            Self::K => "attn_k",
            Self::V => "attn_v",
            Self::O => "attn_output",
            Self::Gate => "ffn_gate",
            Self::Up => "ffn_up",
            Self::Down => "ffn_down",
            Self::Embedding => "token_embd",
            Self::Head => "output",
        }
    }

    /// The module of a layer with that name in GGUF files.
    pub fn from_gguf_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|module| module.gguf_name() == name)
    }
}

/// What GGUF files say of a model, and how their rows differ from the model's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GgufConventions {
    /// `general.architecture`.
    pub architecture: &'static str,
    /// Numbers of query heads and of key heads, where files keep the rows of q and k in the order of ggml's interleaved
    /// RoPE.
    pub interleaved_heads: Option<[usize; 2]>,
}

/// The linear modules of a model. All layers are alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BaseShapes {
    /// Decoder layers.
    pub num_layers: usize,
    /// Features of a hidden state.
    pub hidden_size: usize,
    /// Features inside the feed-forward layer.
    pub intermediate_size: usize,
    /// Numbers in all query heads of a token.
    pub q_size: usize,
    /// Numbers in all key heads of a token.
    pub kv_size: usize,
    /// Tokens there are.
    pub vocab_size: usize,
    /// What GGUF files of the model are like.
    pub gguf: GgufConventions,
}

impl BaseShapes {
    /// Input features of a module.
    pub fn inputs(&self, module: Module) -> usize {
        match module {
            Module::Q | Module::K | Module::V | Module::Gate | Module::Up | Module::Head => self.hidden_size,
            Module::O => self.q_size,
            Module::Down => self.intermediate_size,
            Module::Embedding => self.vocab_size,
        }
    }

    /// Output features of a module.
    pub fn outputs(&self, module: Module) -> usize {
        match module {
            Module::Q => self.q_size,
            Module::K | Module::V => self.kv_size,
            Module::O | Module::Down | Module::Embedding => self.hidden_size,
            Module::Gate | Module::Up => self.intermediate_size,
            Module::Head => self.vocab_size,
        }
    }

    /// Every module there is.
    pub fn places(&self) -> impl Iterator<Item = (usize, Module)> + use<> {
        let in_layers = (0..self.num_layers).flat_map(|layer| Module::ALL.map(|module| (layer, module)));
        in_layers.chain([(0, Module::Embedding), (0, Module::Head)])
    }

    /// The product that computes a layer's module, and the column of its output where the module begins; `None` of the
    /// embedding and the output projection.
    pub(super) fn place(&self, layer: usize, module: Module) -> Option<(LoraSite, usize)> {
        let (projection, first_column) = match module {
            Module::Q => (Projection::Qkv, 0),
            Module::K => (Projection::Qkv, self.q_size),
            Module::V => (Projection::Qkv, self.q_size + self.kv_size),
            Module::O => (Projection::Output, 0),
            Module::Gate => (Projection::GateUp, 0),
            Module::Up => (Projection::GateUp, self.intermediate_size),
            Module::Down => (Projection::Down, 0),
            Module::Embedding | Module::Head => return None,
        };
        Some((LoraSite { layer, projection }, first_column))
    }
}
