//! Structured output.

/// A grammar's state after some tokens.
#[derive(Clone)]
pub struct GrammarState {}
