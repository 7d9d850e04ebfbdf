//! The tiny Gemma 2 against what transformers computes with it (`tests/data/gemma2`).

use std::path::Path;

use mneme::engine::SamplingParams;

use super::engine::{Output, TestEngine, collect, greedy};
use super::golden::{self, Tolerance};
use super::tiny_model::{Family, GEMMA2_CAPS, TinyModel, VOCAB};

/// Names of the records, and what attention scores and logits are capped at: those of the published models are the second.
const CAPS: [(&str, [f64; 2]); 2] = [("narrow", GEMMA2_CAPS), ("wide", [50.0, 30.0])];

/// All records on engines that `start` makes of the models' folders.
pub fn check(start: impl Fn(&Path) -> TestEngine, tolerance: Tolerance) {
    for (name, caps) in CAPS {
        let written = TinyModel::new(Family::Gemma2, 11).write();
        written.change_config(|config| {
            let names = ["attn_logit_softcapping", "final_logit_softcapping"];
            config.extend(names.into_iter().zip(caps).map(|(name, cap)| (name.to_owned(), cap.into())));
        });
        let engine = start(written.path());
        let records = golden::load(&format!("gemma2/{name}")).records;
        let everything = |num_output: usize| SamplingParams {
            logprobs: Some(VOCAB),
            prompt_logprobs: Some(0),
            ..greedy(num_output)
        };
        let submitted: Vec<_> = records
            .iter()
            .map(|record| engine.submit(&record.prompt_ids, everything(record.greedy_ids.len())))
            .collect();
        let outputs: Vec<Output> = submitted.into_iter().map(collect).collect();
        golden::check(name, &records, &outputs, tolerance);
    }
}
