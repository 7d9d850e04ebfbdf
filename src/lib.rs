//! mneme: a single-binary LLM inference runtime whose memory is a managed, paged resource.
//!
//! The modules are layers; each imports only those below it (ARCHITECTURE.md, `tests/architecture.rs`).

pub mod adapters;
pub mod backend;
pub mod engine;
pub mod error;
pub mod gguf;
pub mod hub;
pub mod kv;
pub mod memory;
pub mod models;
pub mod paging;
pub mod planted;
pub mod server;
pub mod telemetry;
pub mod text;

pub use error::{Error, Result};
