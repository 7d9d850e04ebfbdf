//! The whole engine over tiny models of every family: what is computed, and that nothing but the request decides it.

#![allow(missing_docs, unreachable_pub, clippy::unwrap_used)]

mod definitions;
mod invariance;
mod lifecycle;
mod parameters;
#[path = "../support/mod.rs"]
mod support;
