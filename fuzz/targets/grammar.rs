//! A grammar of a request: a JSON schema, a regular expression or a Lark grammar, followed for some tokens.

#![no_main]
#![allow(dead_code)]

#[path = "../../tests/http_api/fake_engine.rs"]
mod fake_engine;
mod panics;

use std::sync::{Arc, OnceLock};

use libfuzzer_sys::fuzz_target;
use mneme::text::{Grammar, GrammarEngine};

const MAX_TOKENS: usize = 64;

fn engine() -> &'static GrammarEngine {
    static ENGINE: OnceLock<GrammarEngine> = OnceLock::new();
    ENGINE.get_or_init(|| {
        GrammarEngine::new(Arc::new(fake_engine::tokenizer())).expect("the vocabulary has an end token")
    })
}

fuzz_target!(init: panics::let_the_code_catch(), |input: (u8, &str)| {
    let (choice, text) = input;
    let grammar = match (choice % 3, serde_json::from_str(text)) {
        (0, _) => Grammar::Regex(text.into()),
        (1, _) => Grammar::Lark(text.into()),
        (_, Ok(schema)) => Grammar::JsonSchema(schema),
        (_, Err(_)) => return,
    };
    let Ok(mut state) = engine().compile(&grammar) else { return };
    for _ in 0..MAX_TOKENS {
        let Ok(mask) = state.allowed() else { return };
        let allowed: Vec<u32> = mask.iter().collect();
        assert!(!allowed.is_empty(), "some token may always come next");
        let next = allowed[usize::from(choice) % allowed.len()];
        if next == fake_engine::EOS || state.accept(next).is_err() {
            return;
        }
    }
});
