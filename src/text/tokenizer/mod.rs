//! Text to token ids and back.
//!
//! Encoding is done by the `tokenizers` crate, configured from a `tokenizer.json` or from the vocabulary in a GGUF file.
//! Decoding is ours and works on bytes: the bytes of a sequence are the bytes of its tokens in order, and its text is
//! their lossy UTF-8 reading. That is what makes an incremental detokenizer exact (`text/detokenizer.rs`). It equals
//! `tokenizers`' own decoding wherever the tokens spell valid UTF-8.

mod from_gguf;
mod from_json;
mod score_bpe;
mod token_bytes;

#[cfg(test)]
pub(crate) mod samples;
#[cfg(test)]
mod tests;

pub use self::from_gguf::GgufVocabulary;
use self::score_bpe::ScoreBpe;
use self::token_bytes::TokenBytes;
use crate::{Error, Result, invalid, malformed};
use tokenizers::{ModelWrapper, OffsetReferential, OffsetType};

/// End-of-turn tokens by name: a chat model stops at them even when its files name only one end token.
const END_TOKENS: [&str; 8] = [
    "<|im_end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<|end|>",
    "<|return|>",
];

/// Tokens that carry content although some vocabularies mark them as control tokens: whoever reads tool calls and
/// reasoning has to see them.
const VISIBLE_TOKENS: [&str; 5] = ["<tool_call>", "</tool_call>", "<|python_tag|>", "<think>", "</think>"];

/// A vocabulary with its rules for splitting and joining text.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    pieces: TokenBytes,
    special: Vec<bool>,
    special_ids: SpecialIds,
    end_ids: Vec<u32>,
    encoder: Encoder,
    edges: Edges,
    /// SentencePiece vocabularies encode a space before the first word; the decoded text does not show it.
    strip_leading_space: bool,
}

/// Who turns text between special tokens into ids.
enum Encoder {
    /// The `tokenizers` crate, by its merges.
    Library,
    /// Ours, by scores; the crate still finds special tokens, normalises and keeps the vocabulary.
    Scores(ScoreBpe),
}

/// Who adds the tokens around an encoded text.
enum Edges {
    /// The post-processor of a `tokenizer.json`.
    PostProcessor,
    /// These ids, before and after.
    Fixed { before: Option<u32>, after: Option<u32> },
}

/// Ids of the tokens with a role, where the vocabulary names one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SpecialIds {
    /// Beginning of a sequence.
    pub bos: Option<u32>,
    /// End of a sequence.
    pub eos: Option<u32>,
    /// Stands for what the vocabulary cannot spell.
    pub unk: Option<u32>,
    /// Fills batches.
    pub pad: Option<u32>,
}

impl Tokenizer {
    /// The ids of `text`. With `add_special` the tokens that the model expects around a text (usually BOS) are added;
    /// a rendered chat template carries its own. Special tokens written out in `text` are recognised either way.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let by_processor = add_special && matches!(self.edges, Edges::PostProcessor);
        let ids = match &self.encoder {
            Encoder::Library => self.inner.encode_fast(text, by_processor).map(|encoding| encoding.get_ids().to_vec()),
            Encoder::Scores(scores) => self.encode_by_scores(scores, text),
        };
        let mut ids = ids.map_err(|e| invalid!("cannot tokenize: {e}"))?;
        if let Edges::Fixed { before, after } = self.edges
            && add_special
        {
            ids.splice(0..0, before);
            ids.extend(after);
        }
        Ok(ids)
    }

    fn encode_by_scores(&self, scores: &ScoreBpe, text: &str) -> std::result::Result<Vec<u32>, tokenizers::Error> {
        let ModelWrapper::BPE(vocab) = self.inner.get_model() else {
            return Err("the vocabulary is not a BPE model".into());
        };
        let split = self.inner.get_added_vocabulary().extract_and_normalize(self.inner.get_normalizer(), text);
        let mut ids = Vec::with_capacity(text.len() / 3);
        for (part, _, tokens) in split.get_splits(OffsetReferential::Normalized, OffsetType::None) {
            match tokens {
                Some(tokens) => ids.extend(tokens.iter().map(|token| token.id)),
                None => scores.encode(vocab, part, &mut ids),
            }
        }
        Ok(ids)
    }

    /// The text of `ids`, without special tokens if `skip_special`. Bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        for id in ids {
            let piece = self.known_bytes(*id)?;
            if !(skip_special && self.is_special(*id)) {
                bytes.extend_from_slice(piece);
            }
        }
        if self.strip_leading_space && bytes.first() == Some(&b' ') {
            bytes.remove(0);
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The text of one token on its own; U+FFFD where it is part of a character. Empty for ids without a token.
    pub fn token_text(&self, id: u32) -> String {
        String::from_utf8_lossy(self.token_bytes(id)).into_owned()
    }

    /// The bytes that token `id` adds to the output, byte-level and byte-fallback spellings undone. Empty for ids
    /// without a token.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.pieces.get(id).unwrap_or_default()
    }

    fn known_bytes(&self, id: u32) -> Result<&[u8]> {
        self.pieces
            .get(id)
            .ok_or_else(|| invalid!("token id {id} is outside the vocabulary of {} tokens", self.vocab_size()))
    }

    /// Number of ids, holes included: every id is smaller. A model may have more output rows than this.
    pub fn vocab_size(&self) -> usize {
        self.pieces.len()
    }

    /// Whether `id` is a control token, which is no part of the text.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }

    /// The id of the token spelled `text` in the vocabulary file.
    pub fn id_of(&self, text: &str) -> Option<u32> {
        self.inner.token_to_id(text)
    }

    /// Ids with a role.
    pub fn special_ids(&self) -> SpecialIds {
        self.special_ids
    }

    /// Id of the beginning-of-sequence token.
    pub fn bos_id(&self) -> Option<u32> {
        self.special_ids.bos
    }

    /// Id of the end-of-sequence token.
    pub fn eos_id(&self) -> Option<u32> {
        self.special_ids.eos
    }

    /// Ids at which generation stops: the end of sequence and the known end-of-turn tokens, ascending.
    pub fn end_ids(&self) -> &[u32] {
        &self.end_ids
    }

    /// Whether decoded text drops one leading space.
    pub(crate) fn strips_leading_space(&self) -> bool {
        self.strip_leading_space
    }

    /// Checks the ids with a role and collects the ids that end generation.
    fn finish(mut self, eot: Option<u32>) -> Result<Self> {
        let SpecialIds { bos, eos, unk, pad } = self.special_ids;
        for (role, id) in [("BOS", bos), ("EOS", eos), ("unknown", unk), ("padding", pad), ("end-of-turn", eot)] {
            if let Some(id) = id.filter(|id| *id as usize >= self.vocab_size()) {
                let size = self.vocab_size();
                return Err(malformed!("tokenizer: the {role} token has id {id}, the vocabulary has {size} tokens"));
            }
        }
        for id in VISIBLE_TOKENS.iter().filter_map(|name| self.inner.token_to_id(name)) {
            if let Some(special) = self.special.get_mut(id as usize) {
                *special = false;
            }
        }
        let named = END_TOKENS.iter().filter_map(|name| self.id_of(name)).filter(|id| self.is_special(*id));
        let mut end_ids: Vec<u32> = named.chain(eos).chain(eot).collect();
        end_ids.sort_unstable();
        end_ids.dedup();
        self.end_ids = end_ids;
        Ok(self)
    }
}

/// A failure of the `tokenizers` crate while a tokenizer is built.
fn build_error(error: tokenizers::Error) -> Error {
    malformed!("cannot build the tokenizer: {error}")
}
