//! Logits and embeddings against a plain forward pass written from the families' definitions.

use mneme::backend::DType;
use mneme::backend::cpu::Isa;
use mneme::engine::{SamplingParams, TokenLogprobs};

use crate::support::engine::{Output, Setup, TestEngine, collect};
use crate::support::random::Random;
use crate::support::reference::{self, Reference};
use crate::support::tiny_gguf::Storage;
use crate::support::tiny_model::{Family, TinyModel, VOCAB, WINDOW};

/// Longer than the sliding window and than the context that RoPE scaling stretches.
const PROMPT: usize = 100;
const NUM_OUTPUT: usize = 8;

/// How far a log-probability may be off: by f32 arithmetic; by keys and values at the edge between two bf16 numbers (the
/// reference rounds as the cache does); by activations in bf16.
pub(crate) const EXACT: f64 = 2e-4;
const BF16_KV: f64 = 0.01;
pub(crate) const BF16_DOT: f64 = 0.3;
/// For activations in int8: the worst, and the mean of all.
const INT8: f64 = 0.8;
const INT8_MEAN: f64 = 0.08;

/// How far the engine's log-probabilities of all tokens at all positions are from the reference: worst and mean.
fn differences(engine: &TestEngine, model: &TinyModel, prompt: &[u32], rounds_kv: bool) -> (f64, f64) {
    differences_of(&collect(engine.submit(prompt, everything())), model, prompt, rounds_kv)
}

/// A greedy output with the log-probabilities of all tokens at all positions.
pub(crate) fn everything() -> SamplingParams {
    SamplingParams {
        temperature: 0.0,
        max_tokens: NUM_OUTPUT,
        logprobs: Some(VOCAB),
        prompt_logprobs: Some(VOCAB),
        ..Default::default()
    }
}

/// How far such an output is from the reference: worst and mean.
pub(crate) fn differences_of(output: &Output, model: &TinyModel, prompt: &[u32], rounds_kv: bool) -> (f64, f64) {
    assert_eq!((output.tokens.len(), output.prompt_logprobs.len()), (NUM_OUTPUT, prompt.len()));
    assert!(output.prompt_logprobs[0].is_none());
    let all = [prompt, &output.tokens].concat();
    let wanted = reference::forward_with(model, &all, rounds_kv);
    let found = output.prompt_logprobs[1..].iter().map(|found| found.as_ref().unwrap()).chain(&output.logprobs);
    let (mut worst, mut sum, mut num_rows) = (0.0f64, 0.0, 0);
    for (at, found) in found.enumerate() {
        assert_eq!(found.chosen.id, all[at + 1]);
        let row = differences_of_row(found, &reference::log_softmax(&wanted.logits[at]));
        worst = worst.max(row.iter().copied().fold(0.0, f64::max));
        sum += row.iter().sum::<f64>() / row.len() as f64;
        num_rows += 1;
    }
    (worst, sum / f64::from(num_rows))
}

fn differences_of_row(found: &TokenLogprobs, wanted: &[f64]) -> Vec<f64> {
    assert_eq!(found.top.len(), VOCAB);
    let all = found.top.iter().chain([&found.chosen]);
    all.map(|top| (f64::from(top.logprob) - wanted[top.id as usize]).abs()).collect()
}

fn worst_of_embedding(engine: &TestEngine, wanted: &Reference, prompt: &[u32]) -> f64 {
    let found = engine.embed(prompt);
    let mean = |at: usize| wanted.hidden.iter().map(|row| row[at]).sum::<f64>() / prompt.len() as f64;
    found.iter().enumerate().map(|(at, found)| (f64::from(*found) - mean(at)).abs()).fold(0.0, f64::max)
}

fn check_family(family: Family) {
    let model = TinyModel::new(family, 11);
    let written = model.write();
    let prompt = Random::new(3).tokens(PROMPT, VOCAB);
    for isa in Isa::available() {
        let bf16 = if isa >= Isa::Avx512Bf16 { BF16_DOT } else { BF16_KV };
        let kinds =
            [(Some(DType::F32), DType::F32, EXACT), (Some(DType::F32), DType::BF16, bf16), (None, DType::BF16, bf16)];
        for (dtype, kv_dtype, tolerance) in kinds {
            let engine = TestEngine::start_on_cpu(written.path(), Setup { isa, dtype, kv_dtype, ..Setup::default() });
            let rounds_kv = kv_dtype == DType::BF16;
            let (logits, _) = differences(&engine, &model, &prompt, rounds_kv);
            let wanted = reference::forward_with(&model, &prompt, rounds_kv);
            let embedding = worst_of_embedding(&engine, &wanted, &prompt);
            eprintln!("{family:?} {isa} {dtype:?} kv {kv_dtype}: logits {logits:.6}, embedding {embedding:.6}");
            assert!(logits < tolerance, "{family:?} on {isa}, {dtype:?}, kv {kv_dtype}: logits off by {logits}");
            // Hidden states are a tenth of the logits they become, and a mean of a hundred of them.
            assert!(embedding < tolerance / 10.0, "{family:?} on {isa}, {dtype:?}: embedding off by {embedding}");
        }
    }
}

#[test]
fn llama_is_what_it_is_defined_as() {
    check_family(Family::Llama);
}

#[test]
fn llama3_scales_rope_as_defined() {
    check_family(Family::Llama3);
}

#[test]
fn qwen2_is_what_it_is_defined_as() {
    check_family(Family::Qwen2);
}

#[test]
fn qwen3_is_what_it_is_defined_as() {
    check_family(Family::Qwen3);
}

#[test]
fn gemma2_is_what_it_is_defined_as() {
    check_family(Family::Gemma2);
}

#[test]
fn gemma3_is_what_it_is_defined_as() {
    const { assert!(PROMPT > 3 * WINDOW) };
    check_family(Family::Gemma3);
}

/// The comparison would notice: other angles, one changed bias or norm weight, a token beyond the window.
#[test]
fn the_reference_depends_on_all_it_should() {
    let prompt = Random::new(3).tokens(PROMPT, VOCAB);
    let last = |model: &TinyModel, prompt: &[u32]| reference::forward(model, prompt).logits.pop().unwrap();
    let distance = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    let llama3 = TinyModel::new(Family::Llama3, 11);
    let mut plain = llama3.clone();
    plain.family = Family::Llama;
    assert!(distance(&last(&llama3, &prompt), &last(&plain, &prompt)) > BF16_DOT);
    for (family, tensor) in [
        (Family::Qwen2, "model.layers.1.self_attn.v_proj.bias"),
        (Family::Qwen3, "model.layers.1.self_attn.k_norm.weight"),
        (Family::Gemma2, "model.layers.1.post_attention_layernorm.weight"),
        (Family::Gemma3, "model.layers.5.post_feedforward_layernorm.weight"),
    ] {
        let model = TinyModel::new(family, 11);
        let mut changed = model.clone();
        changed.tensors.get_mut(tensor).unwrap().values.iter_mut().for_each(|value| *value += 1.0);
        assert!(distance(&last(&model, &prompt), &last(&changed, &prompt)) > BF16_DOT, "{tensor}");
    }
    let logits = last(&llama3, &prompt);
    let spread = logits.iter().fold(f64::MIN, |a, b| a.max(*b)) - logits.iter().fold(f64::MAX, |a, b| a.min(*b));
    assert!(spread > 4.0, "logits span only {spread}");
}

#[test]
fn shards_are_one_model() {
    let model = TinyModel::new(Family::Qwen3, 5);
    let prompt = Random::new(9).tokens(70, VOCAB);
    let tokens_of = |written: crate::support::tiny_model::Written| {
        TestEngine::start_on_cpu(written.path(), Setup::default()).greedy(&prompt, 30)
    };
    assert_eq!(tokens_of(model.write()), tokens_of(model.write_sharded()));
}

#[test]
fn a_gguf_file_is_the_same_model_as_its_directory() {
    let prompt = Random::new(9).tokens(70, VOCAB);
    let run = |written: crate::support::tiny_model::Written| {
        let engine = TestEngine::start_on_cpu(written.path(), Setup { dtype: Some(DType::BF16), ..Setup::default() });
        engine.greedy(&prompt, 30)
    };
    for family in [Family::Llama, Family::Gemma2] {
        let model = TinyModel::new(family, 5);
        let folder = model.write();
        // GGUF files have none: it is the size of a head there.
        folder.change_config(|config| {
            config.remove("query_pre_attn_scalar");
        });
        let tokens = run(folder);
        assert!(tokens.iter().any(|token| *token != tokens[0]), "{family:?} repeats itself");
        assert_eq!(tokens, run(model.write_gguf(|_| Storage::F32)), "{family:?}");
    }
}

#[test]
fn quantised_weights_are_what_their_blocks_say() {
    let storage_of = |name: &str| match name {
        _ if name.contains("norm") => Storage::F32,
        _ if name.contains("mlp") => Storage::Q4_0,
        _ => Storage::Q8_0,
    };
    let original = TinyModel::new(Family::Llama, 5);
    let written = original.write_gguf(storage_of);
    let model = original.quantised(storage_of);
    let prompt = Random::new(9).tokens(PROMPT, VOCAB);
    for isa in Isa::available() {
        for (dtype, tolerance) in [(Some(DType::F32), EXACT), (None, INT8)] {
            let setup = Setup { isa, dtype, kv_dtype: DType::F32, ..Setup::default() };
            let engine = TestEngine::start_on_cpu(written.path(), setup);
            let (worst, mean) = differences(&engine, &model, &prompt, false);
            eprintln!("gguf {isa} {dtype:?}: worst {worst:.6}, mean {mean:.6}");
            assert!(worst < tolerance && mean < INT8_MEAN, "{isa} {dtype:?}: off by {worst}, {mean} on average");
        }
    }
}
