//! Text: tokens, templates, grammars. Knows no model and no request.

pub mod grammar;
