//! Reference outputs of Hugging Face transformers: bf16 weights, f32 arithmetic (`tests/data/*.json`).

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::engine::Output;

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

/// How far a log-probability may be off, at worst and on average.
#[derive(Debug, Clone, Copy)]
pub struct Tolerance {
    pub most: f32,
    pub most_mean: f32,
}

/// Logits, log-probabilities of prompts and greedy tokens.
pub fn check(name: &str, records: &[Record], outputs: &[Output], tolerance: Tolerance) {
    let (worst, mean) = worst_and_mean(records, outputs);
    eprintln!("{name}: worst {worst:.6}, mean {mean:.6}");
    assert!(worst < tolerance.most && mean < tolerance.most_mean, "{name}: off by {worst}, {mean} on average");
    for (record, output) in records.iter().zip(outputs) {
        assert_eq!(output.tokens.len(), record.greedy_ids.len());
        let differs = record.greedy_ids.iter().zip(&output.tokens).position(|(wanted, found)| wanted != found);
        if let Some(step) = differs {
            let gap = record.gap[step];
            assert!(gap < 2.0 * tolerance.most, "{name}, {}: differs at step {step}, gap {gap}", record.prompt);
        }
    }
}

/// How far the log-probabilities behind the prompts, and of the prompts' tokens, are from those of the records.
pub fn worst_and_mean(records: &[Record], outputs: &[Output]) -> (f32, f32) {
    assert_eq!(records.len(), outputs.len());
    let mut off = Vec::new();
    for (record, output) in records.iter().zip(outputs) {
        let found = |id: u32| output.logprobs[0].top.iter().find(|top| top.id == id).unwrap().logprob;
        off.extend(record.top.iter().map(|(id, logit)| (logit - record.lse - found(*id)).abs()));
        let prompt = output.prompt_logprobs.iter().skip(1).map(|found| found.as_ref().unwrap().chosen.logprob);
        assert_eq!(prompt.len(), record.prompt_logprobs.len());
        off.extend(prompt.zip(&record.prompt_logprobs).map(|(found, wanted)| (found - wanted).abs()));
    }
    (off.iter().copied().fold(0.0, f32::max), off.iter().sum::<f32>() / off.len() as f32)
}

/// A file or folder of `tests/data`. Cargo says where the package is when it runs tests; whoever carries them elsewhere says
/// it in the same way.
pub fn data(name: &str) -> PathBuf {
    let package = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    Path::new(&package).join("tests/data").join(name)
}
