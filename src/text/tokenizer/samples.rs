//! Small vocabularies for tests of the text layer.

use std::sync::Arc;

use super::{GgufVocabulary, Tokenizer};

/// The printable spelling of `byte` in byte-level vocabularies, written from its definition rather than taken from the
/// code under test.
pub(crate) fn spelling(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    if printable(byte) {
        return char::from(byte);
    }
    let rank = (0..byte).filter(|byte| !printable(*byte)).count() as u32;
    char::from_u32(256 + rank).expect("256 + 68 characters are valid")
}

/// Id of the token that is `byte` alone.
pub(crate) fn byte_id(tokenizer: &Tokenizer, byte: u8) -> u32 {
    tokenizer.id_of(&spelling(byte).to_string()).expect("every byte has a token")
}

/// Contents of a byte-level vocabulary: all bytes, a few merges, three control tokens, one user-defined token.
pub(crate) fn byte_level_vocabulary() -> GgufVocabulary {
    let merges = ["a b", "ab a", "\u{120} a", "t r", "tr u", "tru e", "{ \"", "b b", "\u{120} ab"];
    let mut tokens: Vec<String> = (0..=255).map(|byte| spelling(byte).to_string()).collect();
    tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
    let num_plain = tokens.len();
    tokens.extend(["<|bos|>", "<|im_start|>", "<|im_end|>", "<tool \u{e9}>"].map(String::from));
    let mut token_types = vec![1; num_plain];
    token_types.extend([3, 3, 3, 4]);
    GgufVocabulary {
        model: "gpt2".into(),
        pre: Some("gpt-2".into()),
        merges: merges.map(String::from).to_vec(),
        bos_id: Some(num_plain as u32),
        eos_id: Some(num_plain as u32 + 2),
        tokens,
        token_types,
        ..Default::default()
    }
}

/// A tokenizer of [`byte_level_vocabulary`].
pub(crate) fn byte_level() -> Arc<Tokenizer> {
    Arc::new(Tokenizer::from_gguf(byte_level_vocabulary()).expect("the sample vocabulary is sound"))
}

/// Contents of a SentencePiece vocabulary: control tokens, all bytes, a few words.
pub(crate) fn sentence_piece_vocabulary(add_space_prefix: bool) -> GgufVocabulary {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
    let mut token_types = vec![2, 3, 3];
    tokens.extend((0..=255u8).map(|byte| format!("<0x{byte:02X}>")));
    token_types.extend([6; 256]);
    let words = ["\u{2581}", "a", "b", "\u{e9}", "\u{2581}a", "ab", "\u{2581}ab", "aa", "\u{2581}\u{2581}"];
    tokens.extend(words.map(String::from));
    token_types.extend([1; 9]);
    let scores = (0..tokens.len()).map(|id| -(id as f32)).collect();
    GgufVocabulary {
        model: "llama".into(),
        tokens,
        token_types,
        scores,
        bos_id: Some(1),
        eos_id: Some(2),
        unk_id: Some(0),
        add_space_prefix: Some(add_space_prefix),
        ..Default::default()
    }
}

/// A tokenizer of [`sentence_piece_vocabulary`].
pub(crate) fn sentence_piece(add_space_prefix: bool) -> Arc<Tokenizer> {
    let vocabulary = sentence_piece_vocabulary(add_space_prefix);
    Arc::new(Tokenizer::from_gguf(vocabulary).expect("the sample vocabulary is sound"))
}
