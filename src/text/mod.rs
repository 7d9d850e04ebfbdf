//! Text on its way into and out of a model: templates, tokens, structured output, tool calls.

pub mod grammar;
pub mod tokenizer;

pub use tokenizer::{GgufVocabulary, Tokenizer};
