//! Copies with adapters merged into them on the CPU: what is computed is what adding them computes, but for the rounding
//! of the sum.

use mneme::backend::DType;
use mneme::backend::cpu::Isa;
use mneme::engine::{MergeRule, SamplingParams};
use mneme::telemetry::{MergeRefusal, MergeStage};

use crate::adapted_weights::Case;
use crate::definitions::everything;
use crate::merging::{Served, adapters, check_refused, merging};
use crate::support::engine::{Setup, collect, greedy};
use crate::support::random::Random;
use crate::support::tiny_gguf::Storage;
use crate::support::tiny_model::{Family, TinyModel, VOCAB};

#[test]
fn merged_logits_are_those_of_weights_with_the_updates_added() {
    for family in [Family::Llama, Family::Qwen2, Family::Gemma3] {
        let model = TinyModel::new(family, 11);
        let adapters = adapters(&model).into();
        let case = Case::new(model, adapters, 10.0);
        for isa in Isa::available() {
            let exact = Setup { isa, dtype: Some(DType::F32), kv_dtype: DType::F32, ..Setup::default() };
            for composition in [&[(0, 1.0)][..], &[(0, 0.7), (1, -0.5)]] {
                let served = Served::start(&case.model, MergeRule::Always, merging(exact.clone()));
                served.merge(composition);
                let output = collect(served.submit(&case.prompt, everything(), composition));
                assert!(output.reuse.is_merged);
                case.check(&output, composition, isa);
            }
        }
    }
}

/// In bf16 a merged weight is a rounded sum, so the forms differ by roundings, and by no more.
#[test]
fn forms_differ_by_the_rounding_of_weights() {
    let model = TinyModel::new(Family::Llama, 12);
    let prompt = Random::new(4).tokens(60, VOCAB);
    let setup = Setup { dtype: Some(DType::BF16), ..Setup::default() };
    let (added, merged) = (
        Served::start(&model, MergeRule::Never, merging(setup.clone())),
        Served::start(&model, MergeRule::Always, merging(setup)),
    );
    merged.merge(&[(0, 1.0)]);
    let logits = |served: &Served| {
        let sampling = SamplingParams { logprobs: Some(VOCAB), ..greedy(1) };
        let output = collect(served.submit(&prompt, sampling, &[(0, 1.0)]));
        let mut top = output.logprobs[0].top.clone();
        top.sort_by_key(|top| top.id);
        top.iter().map(|top| top.logprob).collect::<Vec<_>>()
    };
    let worst = logits(&added).iter().zip(logits(&merged)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    // Where pairs of bf16 are multiplied, what is added is rounded once more on its way.
    assert!(worst > 0.0 && worst < 0.2, "the forms differ by {worst}");
    assert_eq!(added.metrics().stage(), MergeStage::None);
}

/// The codes of quantised weights cannot hold the sum.
#[test]
fn adapters_of_quantised_weights_are_added() {
    let model = TinyModel::new(Family::Llama, 1);
    let quantised = model.write_gguf(|name| if name.contains("norm") { Storage::F32 } else { Storage::Q8_0 });
    check_refused(&model, quantised.path(), merging(Setup::default()), MergeRefusal::Unsupported);
}
