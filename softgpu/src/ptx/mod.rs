//! PTX text to syntax tree.

mod lexer;
pub mod parser;
pub mod syntax;

pub use parser::parse;

use std::fmt;

/// Why a module is refused, with the line of the PTX text.
#[derive(Clone, Debug)]
pub struct PtxError {
    /// 1-based line in the PTX text.
    pub line: u32,
    /// What was found and what is supported.
    pub message: String,
}

impl PtxError {
    pub(crate) fn new(line: u32, message: impl Into<String>) -> Self {
        Self { line, message: message.into() }
    }
}

impl fmt::Display for PtxError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PTX line {}: {}", self.line, self.message)
    }
}

impl std::error::Error for PtxError {}
