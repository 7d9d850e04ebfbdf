//! A GGUF file: its header, every tensor in it, the model, vocabulary and template that it claims to hold.

#![no_main]

mod panics;

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use mneme::models::ModelConfig;
use mneme::gguf::Gguf;
use mneme::text::{ChatTemplate, Tokenizer};

fuzz_target!(init: panics::let_the_code_catch(), |bytes: &[u8]| {
    let Ok(gguf) = Gguf::parse(Arc::new(bytes.to_vec())) else { return };
    for key in gguf.keys() {
        let _ = (gguf.find_u32(key), gguf.find_f32(key), gguf.find_bool(key), gguf.find_str(key));
        let _ = (gguf.find_u64_array(key), gguf.find_i32_array(key), gguf.find_str_array(key));
    }
    for (name, _) in gguf.tensors() {
        let Ok(tensor) = gguf.tensor(name) else { continue };
        assert!(tensor.bytes().len() <= bytes.len());
    }
    let _ = ModelConfig::from_gguf(&gguf);
    if let Ok(Some(template)) = gguf.chat_template() {
        let _ = ChatTemplate::new(Some(&template), None, None);
    }
    let Ok(Ok(tokenizer)) = gguf.vocabulary().map(Tokenizer::from_gguf) else { return };
    let Ok(ids) = tokenizer.encode("One \u{e9} 12<s>", true) else { return };
    tokenizer.decode(&ids, false).expect("ids of the vocabulary have texts");
});
