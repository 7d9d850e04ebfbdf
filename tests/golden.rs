//! Real models against Hugging Face transformers: greedy tokens, logits, prompt log-probabilities.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod support;

use mneme::backend::DType;
use mneme::engine::SamplingParams;
use support::engine::{TestEngine, collect, limits};
use support::golden;

/// How far bf16 arithmetic may move a logit; a reference margin below it decides nothing.
const NOISE: f32 = 0.25;

fn check(model: &str, short_name: &str) {
    let Some(path) = support::models::model_path(short_name) else { return };
    let golden = golden::load(model);
    let engine = TestEngine::start_cpu(&path, Some(DType::BF16), limits());
    let (mut num_same, mut worst) = (0, 0.0f32);
    for record in &golden.records {
        let sampling = SamplingParams {
            temperature: 0.0,
            max_tokens: record.greedy_ids.len(),
            logprobs: Some(32),
            prompt_logprobs: Some(0),
            ..Default::default()
        };
        let output = collect(engine.submit(&record.prompt_ids, sampling));
        for ((id, logit), ours) in record.top.iter().zip(&output.logprobs[0].top).take(5) {
            let reference = logit - record.lse;
            let ours = output.logprobs[0].top.iter().find(|top| top.id == *id).map_or(ours.logprob, |top| top.logprob);
            worst = worst.max((reference - ours).abs());
        }
        for (reference, ours) in record.prompt_logprobs.iter().zip(&output.prompt_logprobs[1..]) {
            let ours = ours.as_ref().unwrap().chosen.logprob;
            assert!((reference - ours).abs() < NOISE * 2.0, "{}: {reference} {ours}", record.prompt);
        }
        match record.greedy_ids.iter().zip(&output.tokens).position(|(a, b)| a != b) {
            None => num_same += 1,
            Some(step) => {
                let gap = record.gap[step];
                assert!(gap <= NOISE, "{}: differs at step {step}, gap {gap}", record.prompt);
            }
        }
    }
    println!("{model}: {num_same} of {} the same, worst logit difference {worst}", golden.records.len());
    assert!(worst < NOISE);
}

#[test]
fn smollm2_matches_transformers() {
    check("smollm2-135m", "smollm2-135m-instruct");
}

#[test]
fn gemma3_matches_transformers() {
    check("gemma-3-270m", "gemma-3-270m");
}

#[test]
fn qwen2_matches_transformers() {
    check("qwen2.5-coder-0.5b", "qwen2.5-coder-0.5b");
}
