//! The commands of the `mneme` program: arguments in, text out.

pub(crate) mod models;
pub(crate) mod pull;
