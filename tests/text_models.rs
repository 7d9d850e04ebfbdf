//! The text layer on real vocabularies: ids, templates and structured output against Hugging Face.
//!
//! Expected values in `tests/data` were made with
//! `transformers` (`apply_chat_template`, `encode`, `decode`).

#![allow(clippy::unwrap_used)]

mod support;

use std::path::PathBuf;
use std::sync::Arc;

use mneme::gguf::Gguf;
use mneme::text::{ChatTemplate, Detokenizer, DetokenizerOptions, Grammar, GrammarEngine, Tokenizer, ToolFormat};
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

/// A file of them.
#[derive(Deserialize)]
struct Golden {
    records: Vec<Record>,
}

/// A model under test; `None` when model tests were switched off by hand.
struct Model {
    gguf: Gguf,
    tokenizer: Arc<Tokenizer>,
    records: Vec<Record>,
}

impl Model {
    fn open(short_name: &str, golden: &str) -> Option<Self> {
        let path = support::models::model_path(short_name)?;
        let bytes = std::fs::read(path).expect("the model file can be read");
        let gguf = Gguf::parse(Arc::new(bytes)).expect("the model file parses");
        let vocabulary = gguf.vocabulary().expect("the model has a vocabulary");
        let tokenizer = Arc::new(Tokenizer::from_gguf(vocabulary).expect("the vocabulary is supported"));
        let golden = std::fs::read(PathBuf::from("tests/data").join(golden)).expect("golden data");
        let golden: Golden = serde_json::from_slice(&golden).expect("golden data parses");
        Some(Self { gguf, tokenizer, records: golden.records })
    }

    fn smollm2() -> Option<Self> {
        Self::open("smollm2-135m-instruct", "smollm2-135m.json")
    }

    fn qwen() -> Option<Self> {
        Self::open("qwen2.5-coder-0.5b", "qwen2.5-coder-0.5b.json")
    }

    fn gemma() -> Option<Self> {
        Self::open("gemma-3-270m", "gemma-3-270m.json")
    }
}

fn check_tokens(model: &Model) {
    for record in &model.records {
        let ids = model.tokenizer.encode(&record.rendered, record.kind == "raw").unwrap();
        assert_eq!(ids, record.prompt_ids, "{:?}", record.prompt);
        assert!(model.tokenizer.decode(&ids, false).unwrap().ends_with(&record.rendered), "{:?}", record.prompt);
        assert_eq!(model.tokenizer.decode(&record.greedy_ids, true).unwrap(), record.text, "{:?}", record.prompt);
        assert_eq!(streamed(&model.tokenizer, &record.greedy_ids), record.text, "{:?}", record.prompt);
    }
}

fn streamed(tokenizer: &Arc<Tokenizer>, ids: &[u32]) -> String {
    let options = DetokenizerOptions { skip_special: true, stop: vec!["\u{1}".into()], include_stop: false };
    let mut detokenizer = Detokenizer::new(tokenizer.clone(), options);
    let mut text: String = ids.iter().map(|id| detokenizer.push(*id).text).collect();
    text.push_str(&detokenizer.flush().text);
    text
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

/// Whether the model's own tokens of `text` are all within the grammar's masks, and the text may end.
fn takes(tokenizer: &Tokenizer, engine: &GrammarEngine, grammar: &Grammar, text: &str) -> bool {
    let mut state = engine.compile(grammar).unwrap();
    let ids = tokenizer.encode(text, false).unwrap();
    let accepted = ids.iter().all(|id| state.allowed().unwrap().is_allowed(*id) && state.accept(*id).is_ok());
    accepted && state.may_end().unwrap() && state.allowed().unwrap().is_allowed(tokenizer.eos_id().unwrap())
}

fn check_grammars(model: &Model) {
    let tokenizer = &model.tokenizer;
    let engine = GrammarEngine::new(tokenizer.clone()).unwrap();
    let schema = serde_json::json!({"type": "object", "properties": {"city": {"type": "string"},
        "days": {"type": "array", "items": {"enum": ["Monday", "Tuesday"]}}}, "required": ["city"],
        "additionalProperties": false});
    let json = |text: &str| takes(tokenizer, &engine, &Grammar::JsonSchema(schema.clone()), text);
    assert!(json("{\"city\": \"Z\u{fc}rich \\n \u{6771}\u{4eac}\", \"days\": [\"Monday\", \"Tuesday\"]}"));
    assert!(json("{\"city\":\"K\u{f6}ln \u{1F600}\"}"));
    assert!(!json(r#"{"city": "Rome", "days": ["Friday"]}"#));
    assert!(!json(r#"{"town": "Rome"}"#));
    assert!(takes(tokenizer, &engine, &Grammar::Regex(r"\d{4}-\d\d-\d\d".into()), "2024-02-29"));
    let tool = mneme::text::Tool { name: "get_weather".into(), parameters: Some(schema) };
    let grammar = ToolFormat::Hermes.grammar(&[tool], false).unwrap();
    let call = "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Rome\"}}\n</tool_call>";
    assert!(takes(tokenizer, &engine, &grammar, call));
}

#[test]
fn grammars_follow_real_vocabularies() {
    for model in [Model::smollm2(), Model::qwen(), Model::gemma()].into_iter().flatten() {
        check_grammars(&model);
    }
}
