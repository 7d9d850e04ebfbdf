//! What a version of a cube holds: text; of an activation cube the tokens, the model that they were run through and the
//! names of the KV blocks; of a parameter cube which adapter (`parameter.rs`). The blocks themselves are the vault's
//! segments'.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::digest::Digest;
use super::label::Label;
use super::parameter::Parameter;
use crate::kv::BlockHash;
use crate::{Error, Result, invalid};

/// What one kind of cube can do that another cannot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Text or messages.
    Plaintext,
    /// KV blocks, usually with the text they were computed from.
    Activation,
    /// Weights of an adapter.
    Parameter,
}

/// What a version holds. Never changed once it is there: another content is another version.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Payload {
    /// Text alone.
    Plaintext(Twin),
    /// Tokens and their blocks.
    Activation(Box<Activation>),
    /// An adapter.
    Parameter(Box<Parameter>),
}

/// What people wrote, from which blocks can be computed again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Twin {
    /// A text.
    Text(String),
    /// A conversation, as chat requests spell it.
    Messages(Vec<Map<String, Value>>),
}

/// Where the tokens of a cube begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// The beginning of a prompt, from position 0.
    Prefix,
    /// A text alone, from position 1: behind a BOS whose KV is not stored.
    Link,
}

/// What the blocks are valid for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Binding {
    /// Digest of all weights.
    pub weights: Digest,
    /// The family, as the checkpoint names it.
    pub architecture: Label,
    /// What keys and values are stored in.
    pub dtype: Label,
    /// Digest of the vocabulary.
    pub tokenizer: Digest,
    /// Digest of the chat template, when it took part.
    pub template: Option<Digest>,
    /// Digest of all that the root of the block chain is made of.
    pub identity: Digest,
    /// Which form the tokens have.
    pub form: Form,
    /// The cache domain of the blocks.
    pub domain: Label,
}

/// Tokens that were run through a model, and where the result is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "ActivationParts", into = "ActivationParts")]
pub struct Activation {
    twin: Option<Twin>,
    binding: Binding,
    token_ids: Vec<u32>,
    blocks: Vec<BlockHash>,
    tail: Option<BlockHash>,
    num_bytes: u64,
}

/// What an [`Activation`] is made of, and how it is written.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ActivationParts {
    twin: Option<Twin>,
    binding: Binding,
    token_ids: Vec<u32>,
    blocks: Vec<Digest>,
    tail: Option<Digest>,
    num_bytes: u64,
}

/// The KV of a cube's tokens, by the names of its blocks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Blocks {
    /// The full blocks, in order of position.
    pub full: Vec<BlockHash>,
    /// The partial block behind them, when it is stored.
    pub tail: Option<BlockHash>,
    /// Bytes of all of them.
    pub num_bytes: u64,
}

impl Kind {
    /// As requests and files spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plaintext => "plaintext",
            Self::Activation => "activation",
            Self::Parameter => "parameter",
        }
    }
}

impl Form {
    /// Position of the first token.
    pub fn position_base(self) -> u32 {
        match self {
            Self::Prefix => 0,
            Self::Link => 1,
        }
    }
}

impl Twin {
    /// Whether `needle`, in lower case, stands in it.
    pub(super) fn mentions(&self, needle: &str) -> bool {
        let has = |text: &str| text.to_lowercase().contains(needle);
        match self {
            Self::Text(text) => has(text),
            Self::Messages(messages) => messages.iter().filter_map(|message| message.get("content")).any(|content| {
                let parts = content.as_array().into_iter().flatten().filter_map(|part| part["text"].as_str());
                content.as_str().into_iter().chain(parts).any(has)
            }),
        }
    }

    /// Bytes it takes in a manifest, about.
    pub fn num_bytes(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            // Counted without building the text; a writer that counts cannot fail.
            Self::Messages(messages) => {
                let mut counter = ByteCounter(0);
                serde_json::to_writer(&mut counter, messages).map_or(usize::MAX, |()| counter.0)
            }
        }
    }
}

struct ByteCounter(usize);

impl std::io::Write for ByteCounter {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0 += bytes.len();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Twin {
    /// The text, when it is one.
    pub fn text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            Self::Messages(_) => None,
        }
    }

    /// The messages, when it is a conversation.
    pub fn messages(&self) -> Option<&[Map<String, Value>]> {
        match self {
            Self::Text(_) => None,
            Self::Messages(messages) => Some(messages),
        }
    }
}

impl Payload {
    /// Which kind this is.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Plaintext(_) => Kind::Plaintext,
            Self::Activation(_) => Kind::Activation,
            Self::Parameter(_) => Kind::Parameter,
        }
    }

    /// The text, if there is one.
    pub fn twin(&self) -> Option<&Twin> {
        match self {
            Self::Plaintext(twin) => Some(twin),
            Self::Activation(activation) => activation.twin.as_ref(),
            Self::Parameter(_) => None,
        }
    }

    /// The tokens and blocks, if there are any.
    pub fn activation(&self) -> Option<&Activation> {
        match self {
            Self::Activation(activation) => Some(activation),
            Self::Plaintext(_) | Self::Parameter(_) => None,
        }
    }

    /// The adapter, if it is one.
    pub fn parameter(&self) -> Option<&Parameter> {
        match self {
            Self::Parameter(parameter) => Some(parameter),
            Self::Plaintext(_) | Self::Activation(_) => None,
        }
    }

    /// Every block it names.
    pub fn blocks(&self) -> impl Iterator<Item = &BlockHash> {
        self.activation().into_iter().flat_map(|activation| activation.blocks.iter().chain(&activation.tail))
    }

    /// Bytes it takes in memory and in a manifest, about.
    pub fn num_index_bytes(&self) -> usize {
        let twin = self.twin().map_or(0, Twin::num_bytes);
        let tokens = self.activation().map_or(0, |activation| activation.token_ids.len() * 4);
        let parameter = self.parameter().map_or(0, Parameter::num_index_bytes);
        twin + tokens + parameter + self.blocks().count() * 32
    }
}

impl Activation {
    /// Tokens that were run through the model of `binding`. Refused without tokens, and with more blocks than tokens.
    pub fn new(twin: Option<Twin>, binding: Binding, token_ids: Vec<u32>, blocks: Blocks) -> Result<Self> {
        let num_blocks = blocks.full.len() + usize::from(blocks.tail.is_some());
        if token_ids.is_empty() {
            return Err(invalid!("an activation cube needs at least one token"));
        }
        if num_blocks > token_ids.len() {
            return Err(invalid!("an activation cube of {} tokens cannot have {num_blocks} blocks", token_ids.len()));
        }
        let Blocks { full, tail, num_bytes } = blocks;
        Ok(Self { twin, binding, token_ids, blocks: full, tail, num_bytes })
    }

    /// The text it was computed from.
    pub fn twin(&self) -> Option<&Twin> {
        self.twin.as_ref()
    }

    /// What the blocks are valid for.
    pub fn binding(&self) -> &Binding {
        &self.binding
    }

    /// The tokens, in order of position.
    pub fn token_ids(&self) -> &[u32] {
        &self.token_ids
    }

    /// The full blocks, in order of position.
    pub fn full_blocks(&self) -> &[BlockHash] {
        &self.blocks
    }

    /// The partial block behind the full ones, when it is stored.
    pub fn tail(&self) -> Option<&BlockHash> {
        self.tail.as_ref()
    }

    /// Bytes of all blocks.
    pub fn num_bytes(&self) -> u64 {
        self.num_bytes
    }
}

impl TryFrom<ActivationParts> for Activation {
    type Error = Error;

    fn try_from(parts: ActivationParts) -> Result<Self> {
        let ActivationParts { twin, binding, token_ids, blocks, tail, num_bytes } = parts;
        let full = blocks.into_iter().map(BlockHash::from).collect();
        Self::new(twin, binding, token_ids, Blocks { full, tail: tail.map(BlockHash::from), num_bytes })
    }
}

impl From<Activation> for ActivationParts {
    fn from(activation: Activation) -> Self {
        let Activation { twin, binding, token_ids, blocks, tail, num_bytes } = activation;
        let blocks = blocks.into_iter().map(Digest::from).collect();
        Self { twin, binding, token_ids, blocks, tail: tail.map(Digest::from), num_bytes }
    }
}
