//! Golden data on the software GPU: a tiny model with adapters against PEFT, the tokens of SmolLM2-135M against the CPU
//! backend, and its adapters against PEFT where they are there.

use std::io::Write;

use mneme::backend::DType;
use mneme::engine::{AppliedAdapter, GenerateRequest, MergeRule, OutputStream, SamplingParams, Task};

use crate::families::tolerances;
use crate::support::engine::{Setup, TestEngine, collect, greedy, limits, request};
use crate::support::golden::{self, Tolerance};
use crate::support::{gemma2, models, peft};

/// How far bf16 arithmetic may move a logit; a margin below it decides nothing.
const NOISE: f32 = 0.25;

/// Few: a token of this model takes the software GPU seconds.
const NUM_OUTPUT: usize = 4;

#[test]
fn smollm2_generates_the_tokens_of_the_cpu() {
    let Some(path) = models::model_path("smollm2-135m-instruct") else { return };
    let records = golden::load("smollm2-135m").records;
    let record = records.iter().min_by_key(|record| record.prompt_ids.len()).unwrap();
    let setup = Setup { dtype: Some(DType::BF16), tied: true, ..Setup::default() };
    let wanted = {
        let cpu = TestEngine::start_on_cpu(&path, setup.clone());
        collect(cpu.submit(&record.prompt_ids, SamplingParams { logprobs: Some(2), ..greedy(NUM_OUTPUT) }))
    };
    let gpu = TestEngine::start_on_softgpu(&path, Setup { limits: limits(), ..setup });
    let found = collect(gpu.submit(&record.prompt_ids, greedy(NUM_OUTPUT))).tokens;
    let text = format!("SmolLM2: {} prompt tokens, CPU {:?}, GPU {found:?}\n", record.prompt_ids.len(), wanted.tokens);
    std::io::stderr().write_all(text.as_bytes()).unwrap();
    assert_eq!(found.len(), NUM_OUTPUT);
    if let Some(step) = found.iter().zip(&wanted.tokens).position(|(a, b)| a != b) {
        let [best, second] = [0, 1].map(|rank| wanted.logprobs[step].top[rank].logprob);
        assert!(best - second <= NOISE, "differs at step {step}, where the CPU's margin is {}", best - second);
    }
}

/// Golden data by name, with the adapters of [`ADAPTERS`] it was made with, by number.
const COMPOSITIONS: [(&str, &[(usize, f32)]); 5] = [
    ("smollm2-135m", &[]),
    ("smollm2-135m+rand-r8", &[(0, 1.0)]),
    ("smollm2-135m+pirate", &[(1, 1.0)]),
    ("smollm2-135m+rand-r16", &[(2, 1.0)]),
    ("smollm2-135m+composed", &[(0, 0.7), (1, 0.5), (2, -0.4)]),
];

const ADAPTERS: [&str; 3] = ["rand-r8", "pirate", "rand-r16"];

/// The shortest prompt under each composition, all in the same steps.
#[test]
fn smollm2_with_adapters_matches_peft() {
    let Some(path) = models::model_path("smollm2-135m-instruct") else { return };
    let Some(folders) = ADAPTERS.map(models::adapter_path).into_iter().collect::<Option<Vec<_>>>() else { return };
    let setup = Setup { dtype: Some(DType::BF16), tied: true, limits: limits(), ..Setup::default() };
    let gpu = TestEngine::start_on_softgpu(&path, setup);
    let load = |folder| gpu.handle.load_adapter(folder).unwrap().with_merge_rule(MergeRule::Never);
    let loaded: Vec<_> = folders.iter().map(|folder| load(folder)).collect();
    let submitted = COMPOSITIONS.map(|(name, parts)| {
        let records = golden::load(name).records;
        let record = records.into_iter().min_by_key(|record| record.prompt_ids.len()).unwrap();
        let applied = |&(at, scale): &(usize, f32)| AppliedAdapter { adapter: loaded[at].clone(), scale };
        let task = Task::Generate(Box::new(SamplingParams { logprobs: Some(64), ..greedy(NUM_OUTPUT) }));
        let adapters = parts.iter().map(applied).collect();
        let stream: OutputStream =
            gpu.handle.submit(GenerateRequest { adapters, ..request(&record.prompt_ids, task) }).unwrap();
        (name, record, stream)
    });
    for (name, record, stream) in submitted {
        let output = collect(stream);
        let mut worst = 0.0f32;
        for (id, logit) in &record.top {
            let found = output.logprobs[0].top.iter().find(|top| top.id == *id);
            let found = found.unwrap_or_else(|| panic!("{name}: token {id} is not among the best 64"));
            worst = worst.max((logit - record.lse - found.logprob).abs());
        }
        let text = format!("{name}: {} prompt tokens, off by {worst} at worst\n", record.prompt_ids.len());
        std::io::stderr().write_all(text.as_bytes()).unwrap();
        assert!(worst < 2.0 * NOISE, "{name}: a log-probability is off by {worst}");
        if let Some(step) = record.greedy_ids.iter().zip(&output.tokens).position(|(a, b)| a != b) {
            let gap = record.gap[step];
            assert!(gap <= 2.0 * NOISE, "{name}: differs at step {step}, where the margin is {gap}");
        }
    }
}

/// Each adapter, both composed, all beside each other, added and merged.
#[test]
fn a_tiny_model_with_adapters_matches_peft() {
    // Two layers of random weights pass on each rounding of an activation as it is.
    for (dtype, most) in [(DType::BF16, 0.8), (DType::F16, 0.1)] {
        let tolerance = Tolerance { most, most_mean: most / 10.0 };
        let setup = Setup { kv_dtype: dtype, ..Setup::default() };
        peft::check_added(TestEngine::start_on_softgpu(&peft::model(), setup.clone()), tolerance);
        peft::check_merged(|| TestEngine::start_on_softgpu(&peft::model(), peft::merging(setup.clone())), tolerance);
    }
}

/// There are no kernels for it: said when the adapter is loaded, not when it is used.
#[test]
fn an_adapter_of_the_vocabulary_is_refused_by_the_name_of_its_module() {
    let engine = TestEngine::start_on_softgpu(&peft::model(), Setup::default());
    let refused = engine.handle.load_adapter(&peft::around()).err().unwrap().to_string();
    assert!(refused.contains("embed_tokens") && refused.contains("--device cpu"), "{refused}");
}

/// A tiny Gemma 2, with caps that most attention scores and logits are beyond, and with those of the published models.
#[test]
fn a_tiny_gemma2_matches_transformers() {
    for dtype in [DType::BF16, DType::F16] {
        let (most, most_mean) = tolerances(dtype);
        let tolerance = Tolerance { most: most as f32, most_mean: most_mean as f32 };
        let setup = Setup { kv_dtype: dtype, ..Setup::default() };
        gemma2::check(|path| TestEngine::start_on_softgpu(path, setup.clone()), tolerance);
    }
}
