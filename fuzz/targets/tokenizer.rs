//! A `tokenizer.json`: read and used for a text, or refused.

#![no_main]

mod panics;

use libfuzzer_sys::fuzz_target;
use mneme::text::Tokenizer;

fuzz_target!(init: panics::let_the_code_catch(), |json: &[u8]| {
    let Ok(tokenizer) = Tokenizer::from_json(json, Some(br#"{"bos_token": "a"}"#)) else { return };
    for add_special in [false, true] {
        let Ok(ids) = tokenizer.encode("ab \u{e9}\u{2581}a 12\n", add_special) else { continue };
        let _ = tokenizer.decode(&ids, false);
    }
});
