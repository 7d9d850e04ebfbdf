//! A tokenizer from the vocabulary section of a GGUF file.
//!
//! GGUF names the splitting rules (`tokenizer.ggml.pre`) instead of storing them; here they are as the models' own
//! `tokenizer.json` files have them. The ids of `smollm`, `qwen2` and a SentencePiece vocabulary are compared with
//! Hugging Face's in `tests/text_models.rs`. SentencePiece files carry scores and no merges; they have an encoder of
//! their own (`score_bpe.rs`).

use tokenizers::decoders::DecoderWrapper;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::{self, NFC, NormalizerWrapper, Prepend, Replace};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior};

use super::score_bpe::ScoreBpe;
use super::token_bytes::{Spelling, TokenBytes};
use super::{Edges, Encoder, SpecialIds, Tokenizer, build_error};
use crate::{Result, malformed, unsupported};

const SPACE_MARK: char = '\u{2581}';

/// Token types as GGUF numbers them.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;

const QWEN2_SPLIT: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// What a GGUF file says about its vocabulary; the fields are the keys `tokenizer.ggml.*`.
#[derive(Debug, Clone, Default)]
pub struct GgufVocabulary {
    /// `gpt2` (byte-level BPE) or `llama` (SentencePiece BPE).
    pub model: String,
    /// Name of the splitting rules of a `gpt2` vocabulary.
    pub pre: Option<String>,
    /// Spelling of each token, by id.
    pub tokens: Vec<String>,
    /// SentencePiece score of each token; empty for `gpt2`.
    pub scores: Vec<f32>,
    /// Type of each token: 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte. May be empty: all normal.
    pub token_types: Vec<i32>,
    /// Merges of a `gpt2` vocabulary, best first, each `left right`.
    pub merges: Vec<String>,
    /// Beginning-of-sequence token.
    pub bos_id: Option<u32>,
    /// End-of-sequence token.
    pub eos_id: Option<u32>,
    /// End-of-turn token, where it is not the end of sequence.
    pub eot_id: Option<u32>,
    /// Token for what cannot be spelled.
    pub unk_id: Option<u32>,
    /// Padding token.
    pub pad_id: Option<u32>,
    /// Whether texts start with BOS; the model's custom when absent.
    pub add_bos: Option<bool>,
    /// Whether texts end with EOS; no when absent.
    pub add_eos: Option<bool>,
    /// Whether a space is put before a text (`llama` only); yes when absent.
    pub add_space_prefix: Option<bool>,
}

impl Tokenizer {
    /// Builds the tokenizer that a GGUF vocabulary describes. Damaged vocabularies are [`crate::Error::Format`],
    /// unknown models and splitting rules [`crate::Error::Unsupported`].
    pub fn from_gguf(vocabulary: GgufVocabulary) -> Result<Self> {
        check_lengths(&vocabulary)?;
        match vocabulary.model.as_str() {
            "gpt2" => byte_level(vocabulary),
            "llama" => sentence_piece(vocabulary),
            other => Err(unsupported!(
                "tokenizer model {other:?} is not supported, known are \"gpt2\" (byte-level BPE) and \"llama\" (SentencePiece BPE)"
            )),
        }
    }
}

fn check_lengths(vocabulary: &GgufVocabulary) -> Result<()> {
    let num_tokens = vocabulary.tokens.len();
    if num_tokens == 0 {
        return Err(malformed!("tokenizer: the vocabulary is empty"));
    }
    for (what, length) in [("scores", vocabulary.scores.len()), ("token types", vocabulary.token_types.len())] {
        if length != 0 && length != num_tokens {
            return Err(malformed!("tokenizer: {num_tokens} tokens but {length} {what}"));
        }
    }
    Ok(())
}

fn byte_level(vocabulary: GgufVocabulary) -> Result<Tokenizer> {
    let rules = SplitRules::named(vocabulary.pre.as_deref().unwrap_or("default"))?;
    let vocab = vocab_of(&vocabulary.tokens)?;
    let merges = parse_merges(&vocabulary.merges, &vocab)?;
    let bpe = BPE::builder().vocab_and_merges(vocab, merges).ignore_merges(rules.ignore_merges);
    let mut inner = tokenizers::Tokenizer::new(bpe.build().map_err(build_error)?);
    inner.with_normalizer(rules.normalizer).map_err(build_error)?;
    inner.with_pre_tokenizer(Some(rules.pre_tokenizer));
    inner.with_decoder(Some(DecoderWrapper::ByteLevel(ByteLevel::default())));
    let edges = edges_of(&vocabulary, rules.add_bos);
    assemble(inner, &vocabulary, Spelling::byte_level(), edges, false)
}

fn sentence_piece(vocabulary: GgufVocabulary) -> Result<Tokenizer> {
    if vocabulary.scores.is_empty() {
        return Err(malformed!("tokenizer: a \"llama\" vocabulary needs tokenizer.ggml.scores, found none"));
    }
    let bpe = BPE::builder().vocab_and_merges(vocab_of(&vocabulary.tokens)?, Merges::new());
    let add_space_prefix = vocabulary.add_space_prefix.unwrap_or(true);
    let mut inner = tokenizers::Tokenizer::new(bpe.build().map_err(build_error)?);
    inner.with_normalizer(Some(space_normalizer(add_space_prefix)?)).map_err(build_error)?;
    let edges = edges_of(&vocabulary, true);
    let spelling = Spelling::SentencePiece { space: SPACE_MARK, byte_fallback: true };
    let encoder = score_bpe(&vocabulary, &inner);
    let tokenizer = assemble(inner, &vocabulary, spelling, edges, add_space_prefix)?;
    Ok(Tokenizer { encoder, ..tokenizer })
}

fn score_bpe(vocabulary: &GgufVocabulary, inner: &tokenizers::Tokenizer) -> Encoder {
    let scores = vocabulary.scores.iter().enumerate();
    let scores = scores.map(|(id, score)| Some(*score).filter(|_| type_of(vocabulary, id) == NORMAL));
    let byte_ids = Box::new(std::array::from_fn(|byte| inner.token_to_id(&format!("<0x{byte:02X}>"))));
    Encoder::Scores(ScoreBpe { scores: scores.collect(), byte_ids, unk: vocabulary.unk_id })
}

fn assemble(
    mut inner: tokenizers::Tokenizer,
    vocabulary: &GgufVocabulary,
    spelling: Spelling,
    edges: Edges,
    strip_leading_space: bool,
) -> Result<Tokenizer> {
    add_tokens(&mut inner, vocabulary)?;
    let special_ids =
        SpecialIds { bos: vocabulary.bos_id, eos: vocabulary.eos_id, unk: vocabulary.unk_id, pad: vocabulary.pad_id };
    let special = (0..vocabulary.tokens.len()).map(|id| matches!(type_of(vocabulary, id), CONTROL | UNKNOWN));
    let special = special.collect();
    let pieces = pieces_of(vocabulary, &spelling)?;
    Tokenizer {
        inner,
        pieces,
        special,
        special_ids,
        end_ids: Vec::new(),
        encoder: Encoder::Library,
        edges,
        strip_leading_space,
    }
    .finish(vocabulary.eot_id)
}

fn type_of(vocabulary: &GgufVocabulary, id: usize) -> i32 {
    vocabulary.token_types.get(id).copied().unwrap_or(NORMAL)
}

fn edges_of(vocabulary: &GgufVocabulary, add_bos_by_default: bool) -> Edges {
    let add_bos = vocabulary.add_bos.unwrap_or(add_bos_by_default);
    let add_eos = vocabulary.add_eos.unwrap_or(false);
    Edges::Fixed { before: vocabulary.bos_id.filter(|_| add_bos), after: vocabulary.eos_id.filter(|_| add_eos) }
}

fn vocab_of(tokens: &[String]) -> Result<Vocab> {
    let mut vocab = Vocab::with_capacity(tokens.len());
    for (id, token) in tokens.iter().enumerate() {
        let id = u32::try_from(id).map_err(|_| malformed!("tokenizer: more than 2^32 tokens"))?;
        vocab.insert(token.clone(), id);
    }
    Ok(vocab)
}

/// Checks every merge before the `tokenizers` crate sees it: that crate trusts their lengths.
fn parse_merges(merges: &[String], vocab: &Vocab) -> Result<Merges> {
    let mut out = Merges::with_capacity(merges.len());
    let mut merged = String::new();
    for merge in merges {
        let (left, right) = merge
            .split_once(' ')
            .ok_or_else(|| malformed!("tokenizer: merge {merge:?} should be two tokens separated by a space"))?;
        merged.clear();
        merged.push_str(left);
        merged.push_str(right);
        if !vocab.contains_key(&merged) {
            return Err(malformed!("tokenizer: merge {merge:?} makes {merged:?}, which is not in the vocabulary"));
        }
        out.push((left.to_owned(), right.to_owned()));
    }
    Ok(out)
}

fn space_normalizer(add_space_prefix: bool) -> Result<NormalizerWrapper> {
    let mark = SPACE_MARK.to_string();
    let replace = Replace::new(" ", mark.clone()).map_err(build_error)?.into();
    if !add_space_prefix {
        return Ok(replace);
    }
    Ok(normalizers::Sequence::new(vec![Prepend::new(mark).into(), replace]).into())
}

fn add_tokens(inner: &mut tokenizers::Tokenizer, vocabulary: &GgufVocabulary) -> Result<()> {
    let of_type = |wanted: i32| {
        let tokens = vocabulary.tokens.iter().enumerate();
        tokens
            .filter(move |(id, _)| type_of(vocabulary, *id) == wanted)
            .map(move |(_, token)| AddedToken::from(token.clone(), wanted == CONTROL).normalized(false))
    };
    let added: Vec<_> = of_type(CONTROL).chain(of_type(USER_DEFINED)).collect();
    inner.add_tokens(added).map_err(build_error)?;
    Ok(())
}

fn pieces_of(vocabulary: &GgufVocabulary, spelling: &Spelling) -> Result<TokenBytes> {
    let mut pieces = TokenBytes::with_capacity(vocabulary.tokens.len());
    let mut buffer = Vec::new();
    for (id, token) in vocabulary.tokens.iter().enumerate() {
        buffer.clear();
        match type_of(vocabulary, id) {
            UNUSED => {}
            CONTROL | USER_DEFINED => buffer.extend_from_slice(token.as_bytes()),
            _ => spelling.undo(token, &mut buffer),
        }
        pieces.push(&buffer)?;
    }
    Ok(pieces)
}

/// How a byte-level vocabulary cuts text into words before merging.
struct SplitRules {
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: PreTokenizerWrapper,
    /// A word that is a token as it stands is not merged up from bytes.
    ignore_merges: bool,
    /// Whether the model's own tokenizer puts BOS first.
    add_bos: bool,
}

impl SplitRules {
    fn named(name: &str) -> Result<Self> {
        let plain = |pre_tokenizer| Self { normalizer: None, pre_tokenizer, ignore_merges: false, add_bos: false };
        Ok(match name {
            "default" | "gpt-2" => plain(bytes(true).into()),
            "smollm" => plain(Sequence::new(vec![Digits::new(true).into(), bytes(true).into()]).into()),
            "qwen2" => Self { normalizer: Some(NFC.into()), ..plain(split_then_bytes(QWEN2_SPLIT)?) },
            "llama-bpe" | "llama3" | "llama-v3" => {
                Self { ignore_merges: true, add_bos: true, ..plain(split_then_bytes(LLAMA3_SPLIT)?) }
            }
            other => {
                return Err(unsupported!(
                    "tokenizer.ggml.pre {other:?} is not supported, known are default, gpt-2, smollm, qwen2 and llama-bpe; \
                     load the model from a directory with a tokenizer.json instead"
                ));
            }
        })
    }
}

fn bytes(use_regex: bool) -> ByteLevel {
    ByteLevel::new(false, true, use_regex)
}

fn split_then_bytes(pattern: &str) -> Result<PreTokenizerWrapper> {
    let pattern = SplitPattern::Regex(pattern.to_owned());
    let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(build_error)?;
    Ok(Sequence::new(vec![split.into(), bytes(false).into()]).into())
}
