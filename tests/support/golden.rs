//! Reference outputs of Hugging Face transformers: bf16 weights, f32 arithmetic (`tests/data/*.json`).

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
    let path = format!("{}/tests/data/{model}.json", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&std::fs::read_to_string(&path).expect(&path)).expect(&path)
}
