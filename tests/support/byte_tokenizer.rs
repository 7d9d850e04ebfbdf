//! A vocabulary of all bytes and two control tokens, as Hugging Face's files have it.

use serde_json::{Map, Value, json};

/// The token of byte `b` is `b`; these follow.
pub const BOS: u32 = 256;
pub const EOS: u32 = 257;

/// `tokenizer.json` and `tokenizer_config.json`.
pub fn files() -> (String, String) {
    let vocab: Map<String, Value> = (0..=255).map(|byte| (spelling(byte).to_string(), json!(byte))).collect();
    let control = |id: u32, content: &str| {
        json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true })
    };
    let file = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [control(BOS, "<s>"), control(EOS, "</s>")],
        "normalizer": null,
        "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false },
        "post_processor": null,
        "decoder": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false },
        "model": { "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                   "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab,
                   "merges": [] },
    });
    let config = json!({ "bos_token": "<s>", "eos_token": "</s>" });
    (file.to_string(), config.to_string())
}

/// GPT-2's printable spelling of a byte.
fn spelling(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    if printable(byte) {
        return char::from(byte);
    }
    let rank = (0..byte).filter(|byte| !printable(*byte)).count() as u32;
    char::from_u32(256 + rank).expect("256 + 68 characters are valid")
}
