//! Reference outputs of Hugging Face transformers: bf16 weights, f32 arithmetic (`tests/data/*.json`).

use std::path::{Path, PathBuf};

use serde::Deserialize;

#[derive(Deserialize)]
pub struct Golden {
    pub probe_ids: Vec<u32>,
    pub records: Vec<Record>,
}

#[derive(Deserialize)]
pub struct Record {
    pub kind: String,
    pub prompt: String,
    pub rendered: String,
    pub prompt_ids: Vec<u32>,
    pub greedy_ids: Vec<u32>,
    /// Per step, how far the best logit was ahead of the second.
    pub gap: Vec<f32>,
    /// The 32 best tokens behind the prompt, with their logits.
    pub top: Vec<(u32, f32)>,
    /// Log-sum-exp of the logits behind the prompt.
    pub lse: f32,
    /// Log-probability of each prompt token after the first.
    pub prompt_logprobs: Vec<f32>,
    pub text: String,
}

/// The golden data of `model`.
pub fn load(model: &str) -> Golden {
    let path = data(&format!("{model}.json"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A file or folder of `tests/data`. Cargo says where the package is when it runs tests; whoever carries them elsewhere says
/// it in the same way.
pub fn data(name: &str) -> PathBuf {
    let package = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    Path::new(&package).join("tests/data").join(name)
}
