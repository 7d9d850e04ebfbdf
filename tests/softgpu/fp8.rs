//! A KV cache of fp8: how far it moves log-probabilities from those with one of bf16, and that nothing else decides them.

use std::io::Write;

use mneme::backend::DType;
use mneme::backend::cpu::Isa;
use mneme::engine::SamplingParams;

use crate::command::{driver_folder, mneme};
use crate::families::{differences, tolerances};
use crate::serving::{self, Served};
use crate::support::engine::{Output, Setup, TestEngine, collect, greedy};
use crate::support::random::Random;
use crate::support::tiny_model::{Family, TinyModel, VOCAB};
use crate::support::{golden, models, softgpu};
use crate::{blend, graphs, invariance, landing};

const FP8: DType = DType::F8E4M3;

/// Tokens of the prompt that log-probabilities are compared behind.
const PROMPT: usize = 100;

/// What an engine says of every position of a prompt.
fn score(engine: &TestEngine, prompt: &[u32], num_best: usize) -> Output {
    collect(engine.submit(prompt, SamplingParams { prompt_logprobs: Some(num_best), ..greedy(1) }))
}

/// At how many positions both have the same best token, and of how many.
fn agreement(found: &Output, wanted: &Output) -> (usize, usize) {
    let best =
        |output: &Output| -> Vec<u32> { output.prompt_logprobs.iter().flatten().map(|row| row.top[0].id).collect() };
    let (found, wanted) = (best(found), best(wanted));
    (found.iter().zip(&wanted).filter(|(a, b)| a == b).count(), wanted.len())
}

/// Keys and values lose all but four bits; log-probabilities of a tiny model spread over a few units. The worst is that of
/// one position of Qwen2, where attention goes from one token to another; arithmetic without rounding but that of keys and
/// values moves it by as much.
#[test]
fn fp8_keeps_log_probabilities_close() {
    let moved = Family::ALL.map(|family| {
        let model = TinyModel::new(family, 11).write();
        let prompt = Random::new(3).tokens(PROMPT, VOCAB);
        let [wanted, found] = [DType::BF16, FP8].map(|kv_dtype| {
            let engine = TestEngine::start_on_softgpu(model.path(), Setup { kv_dtype, ..Setup::default() });
            score(&engine, &prompt, VOCAB)
        });
        let (worst, mean) = differences(&found, &wanted);
        let (same, all) = agreement(&found, &wanted);
        eprintln!("{family:?}: worst {worst:.4}, mean {mean:.5}, the same best token at {same} of {all} positions");
        (family, worst, mean)
    });
    let (most, most_mean) = tolerances(FP8);
    for (family, worst, mean) in moved {
        assert!(worst < most && mean < most_mean, "{family:?}: off by {worst}, {mean} on average");
        assert!(mean > 0.0, "{family:?}: to the bit, as if the cache were of bf16");
    }
}

/// A real model over texts that it has not written, for some minutes:
/// `cargo test --test softgpu -- --ignored --nocapture fp8::smollm2`.
#[test]
#[ignore = "takes the software GPU minutes; README.md has what it prints"]
fn smollm2_over_fp8_says_almost_the_same() {
    let Some(path) = models::model_path("smollm2-135m-instruct") else { return };
    let mut texts = golden::load("smollm2-135m").records;
    texts.retain(|record| record.kind == "raw");
    let scores = [DType::BF16, FP8].map(|kv_dtype| {
        let setup = Setup { dtype: Some(DType::BF16), tied: true, kv_dtype, ..Setup::default() };
        let engine = TestEngine::start_on_softgpu(&path, setup);
        texts.iter().map(|text| score(&engine, &text.prompt_ids, 1)).collect::<Vec<_>>()
    });
    let chosen = |outputs: &[Output]| -> Vec<f64> {
        let rows = outputs.iter().flat_map(|output| output.prompt_logprobs.iter().flatten());
        rows.map(|row| f64::from(row.chosen.logprob)).collect()
    };
    let mean = |numbers: &[f64]| numbers.iter().sum::<f64>() / numbers.len() as f64;
    let [wanted, found] = scores.each_ref().map(|outputs| chosen(outputs));
    let off: Vec<f64> = wanted.iter().zip(&found).map(|(a, b)| (a - b).abs()).collect();
    let worst = off.iter().copied().fold(0.0, f64::max);
    let same: usize = scores[1].iter().zip(&scores[0]).map(|(found, wanted)| agreement(found, wanted).0).sum();
    let text = format!(
        "SmolLM2-135M, {} tokens: log-probability {:.4} on average over bf16, {:.4} over fp8; a token's moves by {:.4} on \
         average, {worst:.4} at worst; the same best token at {same} positions\n",
        off.len(),
        mean(&wanted),
        mean(&found),
        mean(&off),
    );
    std::io::stderr().write_all(text.as_bytes()).unwrap();
    assert!((mean(&wanted) - mean(&found)).abs() < 0.04 && mean(&off) < 0.1, "{text}");
}

#[test]
fn output_over_fp8_depends_on_the_request_alone() {
    invariance::check(Family::Llama, Isa::best(), None, FP8);
}

#[test]
fn decode_over_fp8_is_replayed() {
    graphs::check(Family::Llama, FP8);
}

#[test]
fn blocks_of_fp8_come_up_from_every_tier() {
    landing::check(Family::Gemma3, FP8);
}

#[test]
fn prompts_are_composed_over_fp8() {
    blend::check_choice(Family::ShortGemma3, FP8, 4, 10);
}

const CUBE: &str = r#"{"name": "ana/door", "target": "completion",
    "text": "The door of the office has the code 4471, and the one of the cellar has none."}"#;
const COMPLETION: &str = r#"{"model": "tiny", "prompt": " Which?", "max_tokens": 4, "temperature": 0,
    "structured_outputs": {"regex": "[a-z]{4}"}, "memory": {"cubes": ["ana/door"]}}"#;

/// Tokens of an answer whose keys and values were read from the vault.
fn num_stored_tokens(answer: &str) -> usize {
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let number = answer.split("\"storage_cached_tokens\":").nth(1).unwrap_or_else(|| panic!("{answer}"));
    number.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap()
}

/// A cube whose blocks are of bf16 is computed anew where the cache is of fp8.
#[test]
fn blocks_of_another_type_are_not_taken_from_the_vault() {
    softgpu::end_without_kernels();
    if softgpu::is_replaced() {
        return;
    }
    let (model, vault) = (serving::model(), tempfile::tempdir().unwrap());
    let vault = vault.path().to_str().unwrap();
    let start = |kv_dtype: &str| {
        let arguments = ["--vault", vault, "--kv-cache-dtype", kv_dtype, "--kv-cache-memory-bytes", "4M"];
        let mut served = Served::start_with_vault(&model, &arguments, &[]);
        let address = served.address();
        (served, address)
    };
    let (served, address) = start("bf16");
    let made = serving::ask(&address, "POST /v1/memcubes", CUBE);
    assert!(made.starts_with("HTTP/1.1 201"), "{made}");
    drop(served);
    let ask_anew = |kv_dtype: &str| {
        let (_served, address) = start(kv_dtype);
        num_stored_tokens(&serving::ask(&address, "POST /v1/completions", COMPLETION))
    };
    assert!(ask_anew("bf16") > 0, "a restart finds nothing");
    assert_eq!(ask_anew("fp8"), 0);
}

/// There are no kernels for it on the CPU, and on a GPU none beside f16: said before weights are read.
#[test]
fn types_of_the_cache_without_kernels_are_refused() {
    softgpu::end_without_kernels();
    if softgpu::is_replaced() {
        return;
    }
    let (model, driver) = (serving::model(), driver_folder());
    let path = model.path().to_str().unwrap();
    for (device, dtype, kv_dtype, wanted) in [
        ("cpu", "auto", "fp8", "the CPU keeps the KV cache as bf16 or f32, not fp8"),
        ("softgpu", "f16", "fp8", "an fp8 KV cache goes with activations of bf16, not f16"),
        ("softgpu", "auto", "f32", "a GPU keeps the KV cache as bf16, f16 or fp8, not f32"),
        ("softgpu", "auto", "f16", "is kept as bf16 or fp8, not f16"),
        ("softgpu", "f16", "bf16", "is kept as f16, not bf16"),
    ] {
        let arguments = ["bench", "latency", path, "--kv-cache-dtype", kv_dtype, "--device", device, "--dtype", dtype];
        let output = mneme(&arguments, driver.path());
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(wanted), "{said}");
    }
}
