//! What integration tests share. Each test program uses a part of it.

#![allow(dead_code, clippy::unwrap_used)]

pub mod engine;
pub mod golden;
