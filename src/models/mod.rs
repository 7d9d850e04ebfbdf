//! Model families and the checkpoint formats they are read from.

pub mod gguf;
