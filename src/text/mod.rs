//! Text on its way into and out of a model: templates, tokens, structured output, tool calls.

pub mod chat_template;
pub mod detokenizer;
pub mod grammar;
pub mod tokenizer;
pub mod tool_calls;

pub use chat_template::{ChatTemplate, template_in_folder};
pub use detokenizer::{Detokenizer, DetokenizerOptions, Piece};
pub use grammar::{Grammar, GrammarEngine, GrammarState, TokenMask};
pub use tokenizer::{GgufVocabulary, Tokenizer};
pub use tool_calls::{Tool, ToolCall, ToolCallParser, ToolEvent, ToolFormat};
