//! A tokenizer from a Hugging Face `tokenizer.json`, with the roles from the `tokenizer_config.json` beside it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use serde_json::Value;

use super::token_bytes::{Spelling, TokenBytes};
use super::{Edges, Encoder, SpecialIds, Tokenizer, build_error};
use crate::{Error, Result, malformed, unsupported};

/// More ids than any vocabulary has; a file that claims more would only cost memory.
const MAX_VOCAB: usize = 1 << 22;

impl Tokenizer {
    /// Reads `tokenizer.json` at `path`, and BOS, EOS and the like from `tokenizer_config.json` in the same folder when
    /// that exists.
    pub fn from_json_file(path: &Path) -> Result<Self> {
        let json = std::fs::read(path).map_err(|source| Error::io("read", path, source))?;
        let config_path = path.with_file_name("tokenizer_config.json");
        let config = match std::fs::read(&config_path) {
            Ok(config) => Some(config),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => return Err(Error::io("read", &config_path, error)),
        };
        Self::from_json(&json, config.as_deref())
    }

    /// As [`Tokenizer::from_json_file`], from the contents of the two files.
    pub fn from_json(json: &[u8], config: Option<&[u8]>) -> Result<Self> {
        let mut inner = read_inner(json)?;
        inner.with_truncation(None).map_err(build_error)?;
        inner.with_padding(None);
        let (spelling, strip_leading_space) = spelling_of(&inner)?;
        let (pieces, special) = tables_of(&inner, &spelling)?;
        let special_ids = special_ids_of(&inner, config)?;
        let edges = Edges::PostProcessor;
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
        .finish(None)
    }
}

/// The `tokenizers` crate indexes by unchecked lengths while it builds a model; a damaged file must not end the process.
fn read_inner(json: &[u8]) -> Result<tokenizers::Tokenizer> {
    match catch_unwind(AssertUnwindSafe(|| tokenizers::Tokenizer::from_bytes(json))) {
        Ok(read) => read.map_err(|e| malformed!("cannot read tokenizer.json: {e}")),
        Err(_) => Err(malformed!("cannot read tokenizer.json: its merges contradict its vocabulary")),
    }
}

/// How the file's decoder spells bytes, and whether it drops one leading space.
fn spelling_of(inner: &tokenizers::Tokenizer) -> Result<(Spelling, bool)> {
    let decoder = serde_json::to_value(inner.get_decoder()).map_err(|e| malformed!("tokenizer.json: decoder: {e}"))?;
    let steps = match decoder["decoders"].as_array() {
        Some(steps) => steps.clone(),
        None => vec![decoder.clone()],
    };
    let (mut byte_level, mut space, mut byte_fallback, mut strip) = (false, None, false, false);
    for step in &steps {
        match step["type"].as_str().unwrap_or("none") {
            "ByteLevel" => byte_level = true,
            "Metaspace" => {
                space = step["replacement"].as_str().and_then(|text| text.chars().next());
                strip = step["prepend_scheme"] != "never";
            }
            "Replace" if step["content"] == " " => space = step["pattern"]["String"].as_str().and_then(single_char),
            "ByteFallback" => byte_fallback = true,
            "Fuse" => {}
            "Strip" if step["content"] == " " && step["start"] == 1 && step["stop"] == 0 => strip = true,
            _ => return Err(unknown_decoder(step)),
        }
    }
    match (byte_level, space) {
        (true, None) => Ok((Spelling::byte_level(), strip)),
        (false, Some(space)) => Ok((Spelling::SentencePiece { space, byte_fallback }, strip)),
        _ => Err(unknown_decoder(&decoder)),
    }
}

fn single_char(text: &str) -> Option<char> {
    let mut chars = text.chars();
    chars.next().filter(|_| chars.next().is_none())
}

fn unknown_decoder(decoder: &Value) -> Error {
    unsupported!("tokenizer.json: decoder {decoder} is not supported, wanted byte-level or SentencePiece (Metaspace)")
}

fn tables_of(inner: &tokenizers::Tokenizer, spelling: &Spelling) -> Result<(TokenBytes, Vec<bool>)> {
    let vocab = inner.get_vocab(true);
    let size = vocab.values().max().map_or(0, |id| *id as usize + 1);
    if size == 0 || size > MAX_VOCAB {
        return Err(malformed!("tokenizer.json: {size} token ids, wanted 1 to {MAX_VOCAB}"));
    }
    let mut tokens: Vec<&str> = vec![""; size];
    for (token, id) in &vocab {
        tokens[*id as usize] = token;
    }
    let added = inner.get_added_tokens_decoder();
    let mut pieces = TokenBytes::with_capacity(size);
    let mut special = vec![false; size];
    let mut buffer = Vec::new();
    for (id, token) in (0u32..).zip(&tokens) {
        buffer.clear();
        match added.get(&id) {
            Some(token) => {
                special[id as usize] = token.special;
                buffer.extend_from_slice(token.content.as_bytes());
            }
            None => spelling.undo(token, &mut buffer),
        }
        pieces.push(&buffer)?;
    }
    Ok((pieces, special))
}

fn special_ids_of(inner: &tokenizers::Tokenizer, config: Option<&[u8]>) -> Result<SpecialIds> {
    let Some(config) = config else { return Ok(SpecialIds::default()) };
    let config: Value =
        serde_json::from_slice(config).map_err(|e| malformed!("cannot read tokenizer_config.json: {e}"))?;
    let role = |key: &str| -> Result<Option<u32>> {
        let value = &config[key];
        let Some(text) = value.as_str().or_else(|| value["content"].as_str()) else { return Ok(None) };
        let id = inner.token_to_id(text);
        id.map(Some).ok_or_else(|| malformed!("tokenizer_config.json: {key} {text:?} is not in the vocabulary"))
    };
    Ok(SpecialIds {
        bos: role("bos_token")?,
        eos: role("eos_token")?,
        unk: role("unk_token")?,
        pad: role("pad_token")?,
    })
}
