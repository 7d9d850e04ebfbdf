//! Text on its way into and out of a model: templates, tokens, structured output, tool calls.

pub mod chat_template;
pub mod detokenizer;
pub mod tokenizer;

pub use chat_template::ChatTemplate;
pub use detokenizer::{Detokenizer, DetokenizerOptions, Piece};
pub use tokenizer::{GgufVocabulary, Tokenizer};
