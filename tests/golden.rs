//! Real models against Hugging Face transformers: greedy tokens, logits, prompt log-probabilities.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod support;

use std::path::PathBuf;

use mneme::backend::DType;
use mneme::backend::cpu::Isa;
use mneme::engine::{AppliedAdapter, GenerateRequest, MergeConfig, MergeRule, OutputStream, SamplingParams, Task};
use mneme::telemetry::MergeStage;
use support::engine::{Setup, TestEngine, collect, greedy, request};
use support::golden::{self, Tolerance};
use support::{gemma2, peft};

/// How far bf16 arithmetic may move a logit; a reference margin below it decides nothing.
const NOISE: f32 = 0.25;

/// Names the outputs of a model whose weights are the sums, rounded: merged adapters must have these exactly.
const MERGED: &str = "-merged";

/// Adapters with their scales, and whether their sum is merged into the weights.
#[derive(Clone, Copy)]
struct Composition<'a> {
    parts: &'a [(PathBuf, f32)],
    is_merged: bool,
}

/// Loads a composition, if there is one. Returns when it is merged, if it is to be.
fn load(engine: &TestEngine, composition: Option<Composition<'_>>) -> Vec<AppliedAdapter> {
    let Some(Composition { parts, is_merged }) = composition else { return vec![] };
    let rule = if is_merged { MergeRule::Always } else { MergeRule::Never };
    let load = |(folder, scale): &(PathBuf, f32)| AppliedAdapter {
        adapter: engine.handle.load_adapter(folder).unwrap().with_merge_rule(rule),
        scale: *scale,
    };
    let adapters: Vec<_> = parts.iter().map(load).collect();
    if is_merged {
        drop(collect(submit(engine, &[1, 2, 3], greedy(1), &adapters)));
        engine.wait_for_merge(MergeStage::Merged);
    }
    adapters
}

fn merge_config() -> MergeConfig {
    MergeConfig { is_enabled: true, ..MergeConfig::default() }
}

fn submit(engine: &TestEngine, prompt: &[u32], sampling: SamplingParams, adapters: &[AppliedAdapter]) -> OutputStream {
    let task = Task::Generate(Box::new(sampling));
    engine.handle.submit(GenerateRequest { adapters: adapters.to_vec(), ..request(prompt, task) }).unwrap()
}

/// bf16 weights (the output projection as embedding too) and f32 everything else, as the reference: every log-probability
/// must agree. Where the device rounds activations to bf16 itself, or merged weights are, that noise is allowed for; the
/// two are not allowed for at once, so merged weights are multiplied by f32.
fn logits_agree(short_name: &str, golden_name: &str, composition: Option<Composition<'_>>) {
    let Some(path) = support::models::model_path(short_name) else { return };
    let golden = golden::load(golden_name);
    let merge = merge_config();
    let is_merged = composition.is_some_and(|composition| composition.is_merged);
    let isa = if is_merged { Isa::best().min(Isa::Avx512) } else { Isa::best() };
    let setup = Setup { isa, dtype: Some(DType::BF16), kv_dtype: DType::F32, tied: true, merge, ..Setup::default() };
    let is_rounded = is_merged && !golden_name.ends_with(MERGED);
    let tolerance = if isa >= Isa::Avx512Bf16 || is_rounded { NOISE } else { 5e-3 };
    let engine = TestEngine::start_on_cpu(&path, setup);
    let adapters = load(&engine, composition);
    let mut worst = 0.0f32;
    for record in &golden.records {
        let sampling = SamplingParams { logprobs: Some(64), prompt_logprobs: Some(0), ..greedy(1) };
        let output = collect(submit(&engine, &record.prompt_ids, sampling, &adapters));
        assert_eq!(output.reuse.is_merged, is_merged);
        for (id, logit) in &record.top {
            let found = output.logprobs[0].top.iter().find(|top| top.id == *id);
            let ours = found.unwrap_or_else(|| panic!("{}: token {id} is not among the best 64", record.prompt));
            worst = worst.max((logit - record.lse - ours.logprob).abs());
        }
        for (reference, ours) in record.prompt_logprobs.iter().zip(&output.prompt_logprobs[1..]) {
            worst = worst.max((reference - ours.as_ref().unwrap().chosen.logprob).abs());
        }
    }
    println!("{golden_name}: worst difference of a log-probability {worst}");
    assert!(worst < tolerance, "{golden_name}: a log-probability is off by {worst}");
}

/// As it is served: with the KV cache in bf16, the same greedy tokens up to a step that the noise may decide.
fn greedy_tokens_agree(short_name: &str, golden_name: &str, composition: Option<Composition<'_>>) {
    let Some(path) = support::models::model_path(short_name) else { return };
    let golden = golden::load(golden_name);
    let setup = Setup { dtype: Some(DType::BF16), tied: true, merge: merge_config(), ..Setup::default() };
    let engine = TestEngine::start_on_cpu(&path, setup);
    let adapters = load(&engine, composition);
    let streams: Vec<_> = golden
        .records
        .iter()
        .map(|record| submit(&engine, &record.prompt_ids, greedy(record.greedy_ids.len()), &adapters))
        .collect();
    let mut num_same = 0;
    for (record, stream) in golden.records.iter().zip(streams) {
        let tokens = collect(stream).tokens;
        match record.greedy_ids.iter().zip(&tokens).position(|(a, b)| a != b) {
            None => num_same += 1,
            Some(step) => {
                let gap = record.gap[step];
                assert!(gap <= NOISE, "{}: differs at step {step}, gap {gap}", record.prompt);
            }
        }
        assert_eq!(tokens.len(), record.greedy_ids.len());
    }
    println!("{golden_name}: {num_same} of {} outputs the same to the end", golden.records.len());
    assert!(num_same * 2 > golden.records.len());
}

#[test]
fn smollm2_matches_transformers() {
    logits_agree("smollm2-135m-instruct", "smollm2-135m", None);
    greedy_tokens_agree("smollm2-135m-instruct", "smollm2-135m", None);
}

#[test]
fn gemma3_matches_transformers() {
    logits_agree("gemma-3-270m", "gemma-3-270m", None);
    greedy_tokens_agree("gemma-3-270m", "gemma-3-270m", None);
}

#[test]
fn qwen2_matches_transformers() {
    logits_agree("qwen2.5-coder-0.5b", "qwen2.5-coder-0.5b", None);
    greedy_tokens_agree("qwen2.5-coder-0.5b", "qwen2.5-coder-0.5b", None);
}

/// Agreement of an added or a merged composition.
fn composition_agrees(golden_name: &str, composition: Composition<'_>) {
    logits_agree("smollm2-135m-instruct", golden_name, Some(composition));
    greedy_tokens_agree("smollm2-135m-instruct", golden_name, Some(composition));
}

/// PEFT's outputs for adapters trained on, or drawn for, SmolLM2, added and merged.
#[test]
fn adapters_match_peft() {
    for name in ["pirate", "rand-r8", "rand-r16"] {
        let Some(folder) = support::models::adapter_path(name) else { continue };
        for is_merged in [false, true] {
            let parts = &[(folder.clone(), 1.0)];
            composition_agrees(&format!("smollm2-135m+{name}"), Composition { parts, is_merged });
        }
    }
}

/// PEFT's outputs for the same adapters put together by `add_weighted_adapter`, as `cat`: of two ranks, one subtracted.
/// Merged they are compared with weights that were summed and rounded outside: that rounding alone moves a
/// log-probability of these prompts by 0.55.
#[test]
fn compositions_match_peft() {
    let parts = [("rand-r8", 0.7), ("pirate", 0.5), ("rand-r16", -0.4)];
    let found = parts.map(|(name, scale)| support::models::adapter_path(name).map(|folder| (folder, scale)));
    let Some(parts) = &found.into_iter().collect::<Option<Vec<_>>>() else { return };
    composition_agrees("smollm2-135m+composed", Composition { parts, is_merged: false });
    composition_agrees("smollm2-135m+composed-merged", Composition { parts, is_merged: true });
}

/// PEFT's outputs for a tiny model, in f32: each adapter, both composed, all beside each other, added and merged.
#[test]
fn a_tiny_model_with_adapters_matches_peft() {
    let isa = Isa::best().min(Isa::Avx512);
    let setup = Setup { isa, dtype: Some(DType::F32), kv_dtype: DType::F32, ..Setup::default() };
    let tolerance = Tolerance { most: 5e-4, most_mean: 1e-4 };
    peft::check_added(TestEngine::start_on_cpu(&peft::model(), setup.clone()), tolerance);
    peft::check_merged(|| TestEngine::start_on_cpu(&peft::model(), peft::merging(setup.clone())), tolerance);
}

/// The same with updates of the embedding and of the output projection that is tied to it.
#[test]
fn updates_of_the_vocabulary_match_peft() {
    let isa = Isa::best().min(Isa::Avx512);
    let setup = Setup { isa, dtype: Some(DType::F32), kv_dtype: DType::F32, ..Setup::default() };
    let tolerance = Tolerance { most: 5e-4, most_mean: 1e-4 };
    peft::check_vocabulary(TestEngine::start_on_cpu(&peft::model(), setup), tolerance);
}

/// A tiny Gemma 2 in f32, most of whose attention scores and logits are beyond their caps, and with the published caps.
#[test]
fn a_tiny_gemma2_matches_transformers() {
    for isa in Isa::available().filter(|isa| *isa < Isa::Avx512Bf16) {
        let setup = Setup { isa, dtype: Some(DType::F32), kv_dtype: DType::F32, ..Setup::default() };
        let tolerance = Tolerance { most: 1e-4, most_mean: 2e-5 };
        gemma2::check(|path| TestEngine::start_on_cpu(path, setup.clone()), tolerance);
    }
}
