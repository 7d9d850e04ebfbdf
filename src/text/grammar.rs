//! Structured output.

use crate::Result;

/// A grammar's state after some tokens.
#[derive(Clone)]
pub struct GrammarState {}
/// Mask.
pub struct TokenMask {}
impl TokenMask {
    /// Allowed.
    pub fn is_allowed(&self, _id: u32) -> bool {
        true
    }
}
static MASK: TokenMask = TokenMask {};
impl GrammarState {
    /// Mask.
    pub fn allowed(&mut self) -> Result<&TokenMask> {
        Ok(&MASK)
    }
    /// Accept.
    pub fn accept(&mut self, _token: u32) -> Result<()> {
        Ok(())
    }
    /// Finished.
    pub fn is_finished(&self) -> bool {
        false
    }
}
