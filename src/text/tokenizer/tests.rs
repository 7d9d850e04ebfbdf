//! Tokenizers: bytes, decoding against the `tokenizers` crate, damaged vocabularies.

use proptest::prelude::*;
use tokenizers::models::bpe::{BPE, Merges, Vocab};

use super::*;
use samples::{byte_id, byte_level, byte_level_vocabulary, sentence_piece, sentence_piece_vocabulary};

fn refusal(vocabulary: GgufVocabulary) -> String {
    Tokenizer::from_gguf(vocabulary).err().expect("the vocabulary is refused").to_string()
}

#[test]
fn every_byte_has_its_token() {
    let tokenizer = byte_level();
    for byte in 0..=255 {
        assert_eq!(tokenizer.token_bytes(byte_id(&tokenizer, byte)), [byte]);
    }
    assert_eq!(tokenizer.token_bytes(tokenizer.id_of("\u{120}ab").unwrap()), b" ab");
    assert_eq!(tokenizer.token_bytes(tokenizer.id_of("<tool \u{e9}>").unwrap()), "<tool \u{e9}>".as_bytes());
}

#[test]
fn sentence_piece_spellings_are_undone() {
    let tokenizer = sentence_piece(true);
    let bytes = |text: &str| tokenizer.token_bytes(tokenizer.id_of(text).unwrap());
    assert_eq!(bytes("<0x0A>"), b"\n");
    assert_eq!(bytes("\u{2581}ab"), b" ab");
    assert_eq!(bytes("<s>"), b"<s>");
    assert_eq!(tokenizer.token_text(tokenizer.id_of("<0xFF>").unwrap()), "\u{FFFD}");
}

#[test]
fn merges_and_specials_are_applied() {
    let tokenizer = byte_level();
    let id = |text: &str| tokenizer.id_of(text).unwrap();
    let ids = tokenizer.encode("<|im_start|>aba true<|im_end|>", false).unwrap();
    assert_eq!(ids[..2], [id("<|im_start|>"), id("aba")]);
    assert_eq!(ids[ids.len() - 2..], [id("true"), id("<|im_end|>")]);
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "aba true");
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), "<|im_start|>aba true<|im_end|>");
    assert_eq!(tokenizer.end_ids(), [id("<|im_end|>")]);
}

#[test]
fn special_tokens_are_added_only_on_request() {
    let mut vocabulary = byte_level_vocabulary();
    (vocabulary.add_bos, vocabulary.add_eos) = (Some(true), Some(true));
    let tokenizer = Tokenizer::from_gguf(vocabulary).unwrap();
    let (bos, eos) = (tokenizer.bos_id().unwrap(), tokenizer.eos_id().unwrap());
    let a = tokenizer.id_of("a").unwrap();
    assert_eq!(tokenizer.encode("a", true).unwrap(), [bos, a, eos]);
    assert_eq!(tokenizer.encode("a", false).unwrap(), [a]);
    assert_eq!(byte_level().encode("a", true).unwrap(), [a]);
}

#[test]
fn tool_call_tokens_are_text_even_when_marked_as_control() {
    let mut vocabulary = byte_level_vocabulary();
    vocabulary.tokens.extend(["<tool_call>".into(), "<|other|>".into(), "[PAD]".into()]);
    vocabulary.token_types.extend([3, 3, 5]);
    let tokenizer = Tokenizer::from_gguf(vocabulary).unwrap();
    let ids = tokenizer.encode("<tool_call>a<|other|>", false).unwrap();
    assert_eq!(ids.len(), 3);
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "<tool_call>a");
    assert_eq!(tokenizer.token_bytes(tokenizer.id_of("[PAD]").unwrap()), b"", "unused rows have no text");
}

#[test]
fn sentence_piece_prefers_higher_scores_and_falls_back_to_bytes() {
    let tokenizer = sentence_piece(true);
    let id = |text: &str| tokenizer.id_of(text).unwrap();
    assert_eq!(tokenizer.encode("ab", true).unwrap(), [id("<s>"), id("\u{2581}ab")]);
    assert_eq!(tokenizer.encode("b\n", false).unwrap(), [id("\u{2581}"), id("b"), id("<0x0A>")]);
    let plain = sentence_piece(false);
    assert_eq!(plain.encode("aab", false).unwrap(), [id("a"), id("ab")], "\"ab\" scores higher than \"aa\"");
}

#[test]
fn unknown_rules_are_named() {
    let vocabulary = GgufVocabulary { pre: Some("klingon".into()), ..byte_level_vocabulary() };
    assert!(refusal(vocabulary).contains("\"klingon\""));
    let vocabulary = GgufVocabulary { model: "bert".into(), ..byte_level_vocabulary() };
    assert!(refusal(vocabulary).contains("\"bert\""));
}

#[test]
fn damaged_vocabularies_are_refused() {
    let sound = byte_level_vocabulary;
    let long = format!("{} {}", "a".repeat(400), "b".repeat(400));
    assert!(refusal(GgufVocabulary { merges: vec![long], ..sound() }).contains("not in the vocabulary"));
    assert!(refusal(GgufVocabulary { merges: vec!["ab".into()], ..sound() }).contains("separated by a space"));
    assert!(refusal(GgufVocabulary { token_types: vec![1], ..sound() }).contains("1 token types"));
    assert!(refusal(GgufVocabulary { eos_id: Some(1 << 20), ..sound() }).contains("EOS"));
    assert!(refusal(GgufVocabulary { tokens: vec![], ..sound() }).contains("empty"));
    assert!(refusal(GgufVocabulary { scores: vec![], ..sentence_piece_vocabulary(true) }).contains("scores"));
    let half = GgufVocabulary { tokens: vec!["ab".into()], token_types: vec![], merges: vec!["a b".into()], ..sound() };
    assert!(Tokenizer::from_gguf(half).is_err(), "the parts of a merge must be tokens too");
}

#[test]
fn every_known_rule_set_builds() {
    for pre in ["default", "gpt-2", "smollm", "qwen2", "llama-bpe", "llama3", "llama-v3"] {
        let vocabulary = GgufVocabulary { pre: Some(pre.into()), ..byte_level_vocabulary() };
        let tokenizer = Tokenizer::from_gguf(vocabulary).unwrap();
        let text = "it's 1234\n\n  ab\u{e9} \u{6771}";
        let ids = tokenizer.encode(text, false).unwrap();
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), text, "{pre}");
    }
}

#[test]
fn a_json_file_gives_the_same_tokenizer() {
    for gguf in [byte_level(), sentence_piece(false)] {
        let mut inner = gguf.inner.clone();
        if gguf.inner.get_decoder().is_none() {
            inner.with_decoder(Some(reference_decoder(false)));
            inner.with_model(reference_encoder(&sentence_piece_vocabulary(false)));
        }
        let config = r#"{"bos_token": {"content": "<s>"}, "eos_token": "<|im_end|>", "unk_token": null}"#;
        let config = config.replace("<s>", if gguf.id_of("<s>").is_some() { "<s>" } else { "<|bos|>" });
        let config = config.replace("<|im_end|>", if gguf.id_of("</s>").is_some() { "</s>" } else { "<|im_end|>" });
        let json = inner.to_string(false).unwrap();
        let tokenizer = Tokenizer::from_json(json.as_bytes(), Some(config.as_bytes())).unwrap();
        assert_eq!((tokenizer.bos_id(), tokenizer.eos_id()), (gguf.bos_id(), gguf.eos_id()));
        assert_eq!(tokenizer.vocab_size(), gguf.vocab_size());
        for id in 0..gguf.vocab_size() as u32 {
            assert_eq!(tokenizer.token_bytes(id), gguf.token_bytes(id), "token {id}");
        }
        let text = "ab a\u{e9}\n<s>";
        assert_eq!(tokenizer.encode(text, false).unwrap(), gguf.encode(text, false).unwrap());
    }
}

#[test]
fn damaged_json_is_refused() {
    assert!(Tokenizer::from_json(b"{", None).is_err());
    let json = byte_level().inner.to_string(false).unwrap();
    let words = json.replace("\"type\":\"ByteLevel\",\"add_prefix_space\":true", "\"type\":\"Fuse\",\"x\":true");
    assert_ne!(words, json);
    let error = Tokenizer::from_json(words.as_bytes(), None).err().unwrap();
    assert!(matches!(error, Error::Unsupported(_)), "{error}");
    let config = br#"{"eos_token": "nowhere"}"#;
    let error = Tokenizer::from_json(json.as_bytes(), Some(config)).err().unwrap();
    assert!(error.to_string().contains("nowhere"));
}

#[test]
fn merges_that_contradict_the_vocabulary_are_refused() {
    let long = "b".repeat(50);
    let json = serde_json::json!({"version": "1.0", "added_tokens": [], "model": {"type": "BPE",
        "vocab": {"a": 0, "ab": 1}, "merges": [["a", long]]}});
    assert!(Tokenizer::from_json(json.to_string().as_bytes(), None).is_err());
    let prefix = serde_json::json!({"version": "1.0", "added_tokens": [], "model": {"type": "BPE",
        "continuing_subword_prefix": "####", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}});
    let error = Tokenizer::from_json(prefix.to_string().as_bytes(), None).err().unwrap();
    assert!(error.to_string().contains("merges contradict"), "{error}");
}

#[test]
fn huge_ids_do_not_cost_memory() {
    let json = serde_json::json!({"version": "1.0", "added_tokens": [], "decoder": {"type": "ByteLevel",
        "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": {"a": 4294967295u32}, "merges": []}});
    let error = Tokenizer::from_json(json.to_string().as_bytes(), None).err().unwrap();
    assert!(error.to_string().contains("token ids"), "{error}");
}

/// The decoder Hugging Face gives SentencePiece models.
fn reference_decoder(strip: bool) -> tokenizers::DecoderWrapper {
    let mut steps = vec![
        serde_json::json!({"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "}),
        serde_json::json!({"type": "ByteFallback"}),
        serde_json::json!({"type": "Fuse"}),
    ];
    if strip {
        steps.push(serde_json::json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    serde_json::from_value(serde_json::json!({"type": "Sequence", "decoders": steps})).unwrap()
}

/// Every way to split a token into two others is a merge; the better the score, the earlier. Ties go by the ids of the
/// parts, as in Hugging Face's converter.
fn merges_from_scores(vocabulary: &GgufVocabulary, vocab: &Vocab) -> Merges {
    let mut ranked = Vec::new();
    for (id, token) in vocabulary.tokens.iter().enumerate() {
        if vocabulary.token_types[id] != 1 {
            continue;
        }
        for (cut, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(cut);
            if let (Some(left_id), Some(right_id)) = (vocab.get(left), vocab.get(right)) {
                ranked.push((vocabulary.scores[id], *left_id, *right_id));
            }
        }
    }
    ranked.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    let text = |id: u32| vocabulary.tokens[id as usize].clone();
    ranked.into_iter().map(|(_, left, right)| (text(left), text(right))).collect()
}

/// The library's own encoder for a SentencePiece vocabulary.
fn reference_encoder(vocabulary: &GgufVocabulary) -> BPE {
    let vocab: Vocab = vocabulary.tokens.iter().cloned().zip(0..).collect();
    let merges = merges_from_scores(vocabulary, &vocab);
    let builder = BPE::builder().vocab_and_merges(vocab, merges).fuse_unk(true).byte_fallback(true);
    builder.unk_token("<unk>".into()).build().unwrap()
}

proptest! {
    #[test]
    fn scores_encode_like_merges(
        words in prop::collection::btree_set("[abc]{2,5}", 1..25),
        scores in prop::collection::vec(-9i8..0, 25),
        with_bytes in any::<bool>(),
        text in "[abc\u{6771}]{0,30}",
    ) {
        let mut vocabulary = sentence_piece_vocabulary(false);
        let letters = ["c"].map(String::from);
        let known: Vec<String> = letters.into_iter().chain(words).filter(|w| !vocabulary.tokens.contains(w)).collect();
        for (word, score) in known.iter().zip(&scores) {
            vocabulary.tokens.push(word.clone());
            vocabulary.token_types.push(1);
            vocabulary.scores.push(f32::from(*score)); // ties are likely
        }
        if !with_bytes {
            vocabulary.tokens[3 + 0xE6] = "no byte".into();
        }
        let reference = reference_encoder(&vocabulary);
        let wanted: Vec<u32> = tokenizers::Model::tokenize(&reference, &text).unwrap().iter().map(|t| t.id).collect();
        let tokenizer = Tokenizer::from_gguf(vocabulary).unwrap();
        prop_assert_eq!(tokenizer.encode(&text, false).unwrap(), wanted);
    }

    #[test]
    fn decoding_equals_the_reference(text in "[ab\u{e9}\u{6771} \n]{0,20}", which in 0..3usize) {
        let tokenizer = match which {
            0 => byte_level(),
            1 => sentence_piece(true),
            _ => sentence_piece(false),
        };
        let mut reference = tokenizer.inner.clone();
        if which > 0 {
            reference.with_decoder(Some(reference_decoder(which == 1)));
        }
        let ids = tokenizer.encode(&text, true).unwrap();
        prop_assert_eq!(tokenizer.decode(&ids, true).unwrap(), reference.decode(&ids, true).unwrap());
        prop_assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
    }

    #[test]
    fn random_byte_level_ids_decode_like_the_reference(
        picks in prop::collection::vec(any::<prop::sample::Index>(), 0..30),
    ) {
        let tokenizer = byte_level();
        let last = tokenizer.vocab_size() - 1; // the user-defined token spells text that the reference misreads
        let ids: Vec<u32> = picks.iter().map(|pick| pick.index(last) as u32).collect();
        for skip_special in [false, true] {
            let wanted = tokenizer.inner.decode(&ids, skip_special).unwrap();
            prop_assert_eq!(tokenizer.decode(&ids, skip_special).unwrap(), wanted);
        }
    }
}
