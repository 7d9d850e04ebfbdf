//! Adapters on the CPU: what is computed with them is what weights with their updates added would compute.

use mneme::backend::DType;
use mneme::backend::cpu::Isa;

use crate::adapters::{COMPOSITIONS, adapters, compose, load, submit};
use crate::definitions::{BF16_DOT, EXACT, differences_of, everything};
use crate::support::engine::{Output, Setup, TestEngine, collect};
use crate::support::random::Random;
use crate::support::tiny_adapter::{EMBEDDING, HEAD, TinyAdapter};
use crate::support::tiny_model::{Family, TinyModel, VOCAB};

/// A model, adapters for it, and a prompt.
pub(crate) struct Case {
    pub(crate) model: TinyModel,
    pub(crate) adapters: Vec<TinyAdapter>,
    pub(crate) prompt: Vec<u32>,
    /// How many times further off the model without adapters has to be: less where few modules have updates.
    pub(crate) least_difference: f64,
}

impl Case {
    pub(crate) fn new(model: TinyModel, adapters: Vec<TinyAdapter>, least_difference: f64) -> Self {
        Self { model, adapters, prompt: Random::new(3).tokens(60, VOCAB), least_difference }
    }

    /// Compares what an engine said to the prompt under a composition with the reference.
    pub(crate) fn check(&self, output: &Output, composition: &[(usize, f32)], isa: Isa) {
        let family = self.model.family;
        let mut merged = self.model.clone();
        for (at, scale) in composition {
            self.adapters[*at].merge_into(&mut merged, f64::from(*scale));
        }
        let (worst, _) = differences_of(output, &merged, &self.prompt, false);
        let tolerance = if isa >= Isa::Avx512Bf16 { BF16_DOT } else { 4.0 * EXACT };
        assert!(worst < tolerance, "{family:?} on {isa}, {composition:?}: off by {worst}");
        if !composition.is_empty() {
            let (without, _) = differences_of(output, &self.model, &self.prompt, false);
            let least = self.least_difference * worst.max(EXACT);
            assert!(without > least, "{family:?}, {composition:?}: only {without} without");
        }
    }

    /// Adds the updates on every instruction set.
    fn check_added(&self) {
        let written = self.model.write();
        for isa in Isa::available() {
            let setup = Setup { isa, dtype: Some(DType::F32), kv_dtype: DType::F32, ..Setup::default() };
            let engine = TestEngine::start_on_cpu(written.path(), setup);
            let loaded: Vec<_> = self.adapters.iter().map(|adapter| load(&engine, adapter)).collect();
            for composition in COMPOSITIONS {
                let adapters = compose(&loaded, composition);
                self.check(&collect(submit(&engine, &self.prompt, everything(), adapters)), composition, isa);
            }
        }
    }
}

#[test]
fn adapted_logits_are_those_of_weights_with_the_updates_added() {
    for family in [Family::Llama, Family::Qwen2, Family::Gemma3] {
        let model = TinyModel::new(family, 11);
        let adapters = adapters(&model).into();
        Case::new(model, adapters, 10.0).check_added();
    }
}

/// An update of the embedding is one of what goes in, and of the output projection one of what comes out, tied or not.
#[test]
fn updates_of_embedding_and_output_projection_are_added_where_they_belong() {
    for family in [Family::Llama, Family::Llama3, Family::Gemma2, Family::Gemma3] {
        let model = TinyModel::new(family, 31);
        let hidden = model.tensor("model.embed_tokens.weight").columns;
        let (embedding, head) = ((EMBEDDING.to_owned(), hidden, VOCAB), (HEAD.to_owned(), VOCAB, hidden));
        let q_proj = model.tensor("model.layers.0.self_attn.q_proj.weight");
        let q_proj = ("model.layers.0.self_attn.q_proj".to_owned(), q_proj.rows, q_proj.columns);
        let adapters = vec![
            TinyAdapter::new(std::slice::from_ref(&embedding), 8, 4),
            TinyAdapter::new(std::slice::from_ref(&head), 5, 5),
            TinyAdapter::new(&[embedding, head, q_proj], 16, 6),
        ];
        Case::new(model, adapters, 4.0).check_added();
    }
}
