//! The text layer on real vocabularies: ids, templates and structured output against Hugging Face.
//!
//! The models are read from the folder that `MNEME_TEST_MODELS` names. Expected values in `tests/data` were made with
//! `transformers` (`apply_chat_template`, `encode`, `decode`).

use std::path::PathBuf;
use std::sync::Arc;

use mneme::models::gguf::Gguf;
use mneme::text::{ChatTemplate, Tokenizer};
use serde::Deserialize;

/// One prompt with what `transformers` makes of it.
#[derive(Deserialize)]
struct Record {
    kind: String,
    prompt: String,
    rendered: String,
    prompt_ids: Vec<u32>,
    greedy_ids: Vec<u32>,
    text: String,
}

/// A model under test; `None` when model tests were switched off by hand.
struct Model {
    gguf: Gguf,
    tokenizer: Arc<Tokenizer>,
    records: Vec<Record>,
}

impl Model {
    fn open(file: &str, golden: &str) -> Option<Self> {
        let Ok(folder) = std::env::var("MNEME_TEST_MODELS") else {
            let skip = std::env::var("MNEME_SKIP_MODEL_TESTS").is_ok_and(|value| value == "1");
            assert!(skip, "set MNEME_TEST_MODELS to the folder with {file}, or MNEME_SKIP_MODEL_TESTS=1 to skip");
            println!("skipped: MNEME_SKIP_MODEL_TESTS=1 and no MNEME_TEST_MODELS");
            return None;
        };
        let bytes = std::fs::read(PathBuf::from(folder).join(file)).expect("the model file can be read");
        let gguf = Gguf::parse(Arc::new(bytes)).expect("the model file parses");
        let vocabulary = gguf.vocabulary().expect("the model has a vocabulary");
        let started = std::time::Instant::now();
        let tokenizer = Arc::new(Tokenizer::from_gguf(vocabulary).expect("the vocabulary is supported"));
        println!("{file}: tokenizer built in {:?}", started.elapsed());
        let golden = std::fs::read(PathBuf::from("tests/data").join(golden)).expect("golden data");
        let records = serde_json::from_slice(&golden).expect("golden data parses");
        Some(Self { gguf, tokenizer, records })
    }

    fn smollm2() -> Option<Self> {
        Self::open("smollm2-135m-q4.gguf", "smollm2-135m.tokens.json")
    }

    fn qwen() -> Option<Self> {
        Self::open("qwen2.5-coder-0.5b-q4.gguf", "qwen2.5-coder-0.5b.tokens.json")
    }

    fn gemma() -> Option<Self> {
        Self::open("gemma-3-270m-q4.gguf", "gemma-3-270m.tokens.json")
    }
}

fn check_tokens(model: &Model) {
    for record in &model.records {
        let ids = model.tokenizer.encode(&record.rendered, record.kind == "raw").unwrap();
        assert_eq!(ids, record.prompt_ids, "{:?}", record.prompt);
        assert!(model.tokenizer.decode(&ids, false).unwrap().ends_with(&record.rendered), "{:?}", record.prompt);
        assert_eq!(model.tokenizer.decode(&record.greedy_ids, true).unwrap(), record.text, "{:?}", record.prompt);
    }
}

#[test]
fn smollm2_tokens_equal_hugging_face() {
    let Some(model) = Model::smollm2() else { return };
    check_tokens(&model);
    assert_eq!(model.tokenizer.vocab_size(), 49152);
    assert!(model.tokenizer.end_ids().contains(&2) && model.tokenizer.is_special(2));
}

#[test]
fn qwen_tokens_equal_hugging_face() {
    let Some(model) = Model::qwen() else { return };
    check_tokens(&model);
    assert_eq!(model.tokenizer.end_ids(), [151643, 151645]);
}

#[test]
fn gemma_tokens_equal_hugging_face() {
    let Some(model) = Model::gemma() else { return };
    check_tokens(&model);
    assert!(model.tokenizer.end_ids().contains(&1));
}

/// The chat prompts of a model, rendered by its own template.
fn check_chat(model: &Model) {
    let text_of = |id: Option<u32>| id.map(|id| model.tokenizer.token_text(id));
    let (bos, eos) = (text_of(model.tokenizer.bos_id()), text_of(model.tokenizer.eos_id()));
    let source = model.gguf.chat_template().unwrap();
    let template = ChatTemplate::new(source.as_deref(), bos.as_deref(), eos.as_deref()).unwrap();
    let chats: Vec<_> = model.records.iter().filter(|record| record.kind == "chat").collect();
    assert!(!chats.is_empty());
    for record in chats {
        let messages = serde_json::json!([{"role": "user", "content": record.prompt}]);
        let rendered = template.render(&messages, None, true, &serde_json::Map::new()).unwrap();
        assert_eq!(rendered, record.rendered);
    }
}

#[test]
fn chat_templates_render_as_in_hugging_face() {
    let (Some(smollm2), Some(qwen), Some(gemma)) = (Model::smollm2(), Model::qwen(), Model::gemma()) else { return };
    check_chat(&smollm2);
    check_chat(&qwen);
    assert_eq!(gemma.gguf.chat_template().unwrap(), None, "the base model has no template");
}
