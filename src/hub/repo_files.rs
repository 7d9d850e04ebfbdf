//! Owns which files of a repository make up a model: configuration, tokenizer, weights or their shards, or one GGUF.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use serde::Deserialize;

use super::reference::is_plain;
use crate::{Error, Result, malformed};

const MAX_INDEX_BYTES: u64 = 64 << 20;
const MAX_SHARDS: usize = 1000;

pub(super) const INDEX: &str = "model.safetensors.index.json";
pub(super) const SINGLE: &str = "model.safetensors";
pub(super) const REQUIRED: &str = "config.json";
/// Fetched before the weights: a snapshot with all weights then has these too, unless the repository lacks them.
pub(super) const OPTIONAL: [&str; 4] =
    ["generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"];

/// Whether a snapshot has its configuration and all its weights.
pub(super) fn is_complete(folder: &Path) -> bool {
    let has = |name: &str| folder.join(name).is_file();
    let has_shards = || shards(&folder.join(INDEX)).is_ok_and(|names| names.iter().all(|name| has(name)));
    has(REQUIRED) && (has(SINGLE) || has_shards())
}

/// The weight files an index names, each once. The index is the repository owner's: its names become paths.
pub(super) fn shards(index: &Path) -> Result<Vec<String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: HashMap<String, String>,
    }
    let size_bytes = std::fs::metadata(index).map_err(|e| Error::io("read", index, e))?.len();
    if size_bytes > MAX_INDEX_BYTES {
        return Err(malformed!("{} has {size_bytes} bytes, more than {MAX_INDEX_BYTES}", index.display()));
    }
    let text = std::fs::read(index).map_err(|e| Error::io("read", index, e))?;
    let parsed: Index =
        serde_json::from_slice(&text).map_err(|e| malformed!("{} is no weight index: {e}", index.display()))?;
    let names: BTreeSet<String> = parsed.weight_map.into_values().collect();
    if names.is_empty() || names.len() > MAX_SHARDS {
        return Err(malformed!("{} names {} weight files", index.display(), names.len()));
    }
    match names.iter().find(|name| !is_plain(name, "") || !name.ends_with(".safetensors")) {
        Some(name) => Err(malformed!("{} names {name:?}, which is no weight file", index.display())),
        None => Ok(names.into_iter().collect()),
    }
}

/// The one GGUF file whose name has `quantization` as a whole word.
pub(super) fn pick_quantization<'n>(
    names: impl Iterator<Item = &'n str>,
    quantization: &str,
) -> std::result::Result<&'n str, String> {
    let wanted = quantization.to_ascii_lowercase();
    let all: Vec<&str> = names.filter(|name| name.to_ascii_lowercase().ends_with(".gguf")).collect();
    let matching: Vec<&str> =
        all.iter().copied().filter(|name| has_word(&name.to_ascii_lowercase(), &wanted)).collect();
    match matching[..] {
        [name] => Ok(name),
        [] => Err(format!("no GGUF file is {quantization}; it has: {}", all.join(", "))),
        _ => Err(format!("several GGUF files are {quantization}; name one of: {}", matching.join(", "))),
    }
}

/// Whether `word` stands in `text` with no letter, digit or underscore beside it: `q4_k` is not in `q4_k_m`.
fn has_word(text: &str, word: &str) -> bool {
    let is_part = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric() || c == '_');
    text.match_indices(word).any(|(start, _)| {
        !is_part(text[..start].chars().next_back()) && !is_part(text[start + word.len()..].chars().next())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantizations_match_whole_words() {
        let names = ["a-Q4_K_M.gguf", "a.Q4_K_S.gguf", "a-q8_0.GGUF", "b/a-IQ4_XS.gguf", "Q4_K_M.txt"];
        let pick = |wanted| pick_quantization(names.into_iter(), wanted);
        assert_eq!(pick("q4_k_m"), Ok("a-Q4_K_M.gguf"));
        assert_eq!(pick("Q8_0"), Ok("a-q8_0.GGUF"));
        assert!(pick("Q4_K").unwrap_err().contains("it has: a-Q4_K_M.gguf, a.Q4_K_S.gguf"));
        assert!(pick("a").unwrap_err().contains("several"));
    }

    #[test]
    fn an_index_may_name_plain_weight_files_only() {
        let folder = tempfile::tempdir().unwrap();
        let index = folder.path().join(INDEX);
        let read = |text: &str| {
            std::fs::write(&index, text).unwrap();
            shards(&index)
        };
        let good = r#"{"weight_map":{"a":"m-2.safetensors","b":"m-1.safetensors","c":"m-2.safetensors"}}"#;
        assert_eq!(read(good).unwrap(), ["m-1.safetensors", "m-2.safetensors"]);
        for name in ["../m.safetensors", "/etc/m.safetensors", "a/m.safetensors", ".m.safetensors", "m.bin", ""] {
            assert!(read(&format!(r#"{{"weight_map":{{"a":"{name}"}}}}"#)).is_err(), "{name}");
        }
        for text in ["", "{", "[]", r#"{"weight_map":{}}"#, r#"{"weight_map":3}"#] {
            assert!(read(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_snapshot_is_complete_with_all_weights() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        assert!(!is_complete(folder.path()));
        write(REQUIRED, "{}");
        write(INDEX, r#"{"weight_map":{"a":"m-1.safetensors","b":"m-2.safetensors"}}"#);
        write("m-1.safetensors", "x");
        assert!(!is_complete(folder.path()));
        write("m-2.safetensors", "x");
        assert!(is_complete(folder.path()));
    }
}
