//! What integration tests share. Each test program uses a part of it.

#![allow(dead_code, unreachable_pub, missing_docs, clippy::unwrap_used)]

pub mod byte_tokenizer;
pub mod composed;
pub mod engine;
pub mod fp8;
pub mod gemma2;
pub mod golden;
pub mod models;
pub mod peft;
pub mod random;
pub mod reference;
pub mod runner;
#[cfg(feature = "cuda")]
pub mod softgpu;
pub mod tiny_adapter;
pub mod tiny_gguf;
pub mod tiny_model;
