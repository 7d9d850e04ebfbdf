//! Models in every quantised format: what they generate with weights that stay quantised is, to the last bit of every
//! log-probability, what they generate with the same weights unpacked.

use mneme::backend::DType;
use mneme::engine::SamplingParams;

use crate::support::engine::{Output, Setup, TestEngine, collect, greedy};
use crate::support::random::Random;
use crate::support::tiny_gguf::Storage;
use crate::support::tiny_model::{Family, TinyModel, VOCAB, Written};

/// More than a tile of decode has, and more than one of prefill.
const PROMPT: usize = 70;

fn run(written: &Written, dtype: Option<DType>, kv_dtype: DType) -> Output {
    let engine = TestEngine::start_on_softgpu(written.path(), Setup { dtype, kv_dtype, ..Setup::default() });
    let sampling = SamplingParams { logprobs: Some(VOCAB), prompt_logprobs: Some(VOCAB), ..greedy(4) };
    collect(engine.submit(&Random::new(7).tokens(PROMPT, VOCAB), sampling))
}

fn check(model: &TinyModel, storage_of: impl Fn(&str) -> Storage, kv_dtype: DType) {
    let written = model.write_gguf(|name| if name.contains("norm") { Storage::F32 } else { storage_of(name) });
    let (found, wanted) = (run(&written, None, kv_dtype), run(&written, Some(kv_dtype), kv_dtype));
    assert_eq!((found.tokens.len(), found.prompt_logprobs.len()), (4, PROMPT));
    assert_eq!(found.tokens, wanted.tokens);
    let numbers = |output: &Output| format!("{:?} {:?}", output.prompt_logprobs, output.logprobs);
    assert!(numbers(&found) == numbers(&wanted), "the same tokens, but other numbers");
}

#[test]
fn blocks_of_32_generate_as_their_numbers() {
    let model = TinyModel::new(Family::Llama, 41);
    for storage in [Storage::Q4_0, Storage::Q4_1, Storage::Q5_0, Storage::Q5_1, Storage::Q8_0] {
        check(&model, |_| storage, DType::BF16);
    }
    check(&model, |_| Storage::Q4_1, DType::F16);
}

#[test]
fn blocks_of_256_generate_as_their_numbers() {
    let model = TinyModel::wide(42);
    for storage in [Storage::Q4K, Storage::Q5K, Storage::Q6K] {
        check(&model, |_| storage, DType::BF16);
    }
}

/// As files called Q4_K_M are: the parts of one stacked matrix have different formats.
#[test]
fn mixed_formats_generate_as_their_numbers() {
    let storage_of = |name: &str| match name {
        _ if name.contains("v_proj") || name.contains("down_proj") || name.contains("embed") => Storage::Q6K,
        _ if name.contains("o_proj") => Storage::Q5K,
        _ => Storage::Q4K,
    };
    check(&TinyModel::wide(43), storage_of, DType::F16);
}
