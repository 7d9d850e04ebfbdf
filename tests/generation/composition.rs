//! What composing cached texts takes of a model: recomputing tokens anywhere in a sequence, and moving stored ones. Run on
//! every device.

use mneme::backend::DType;
use mneme::backend::cpu::Isa;

use crate::support::engine::Setup;
use crate::support::random::Random;
use crate::support::runner::{NUM_TOKENS, Runner};
use crate::support::tiny_model::{Family, VOCAB};
use crate::{FAMILIES, GEMMA, TestBackend, backend, kinds};

/// On the device that these tests are about.
pub(crate) fn runner_on(family: Family, isa: Isa, kv_dtype: DType) -> Runner<TestBackend> {
    Runner::new(backend(&Setup { isa, kv_dtype, ..Setup::default() }), family, kv_dtype)
}

/// The same with the best instruction set and a cache of bf16.
pub(crate) fn runner(family: Family) -> Runner<TestBackend> {
    runner_on(family, Isa::best(), DType::BF16)
}

/// A probe tells how far what is stored in its layer is from what computing everything would store, however it is cut; the
/// layers below have that afterwards, the others what they had.
#[test]
fn a_probe_compares_with_computing_everything() {
    for &family in FAMILIES {
        for (isa, _, kv_dtype) in kinds().into_iter().filter(|(isa, ..)| *isa == Isa::best()) {
            let runner = runner_on(family, isa, kv_dtype);
            let layer = runner.probe_layer();
            // Behind the first layer that sees everything.
            assert_eq!(layer, family.window_period().unwrap_or(1));
            let all: Vec<usize> = (0..NUM_TOKENS).collect();
            let [tokens, others] = [7, 8].map(|seed| Random::new(seed).tokens(NUM_TOKENS, VOCAB));
            runner.forward(&tokens, &all);
            let wanted = runner.cache();
            let probe = |step: usize| -> (Vec<f32>, Vec<u8>) {
                runner.forward(&others, &all);
                let steps = (0..NUM_TOKENS).step_by(step);
                let found = steps.flat_map(|first| runner.probe(&tokens, first..NUM_TOKENS.min(first + step)));
                (found.collect(), runner.cache())
            };
            runner.forward(&others, &all);
            let before = runner.cache();
            let (deviations, after) = probe(NUM_TOKENS);
            for (at, found) in deviations.iter().enumerate() {
                for below in 0..runner.num_layers() {
                    let fresh = if below < layer { &wanted } else { &before };
                    assert_eq!(runner.stored_in(&after, below, at), runner.stored_in(fresh, below, at), "{family:?}");
                }
                let [stored, fresh] = [&before, &wanted].map(|cache| runner.stored_in(cache, layer, at));
                let sum: f64 = stored.iter().zip(fresh).map(|(stored, fresh)| (stored - fresh).powi(2)).sum();
                assert!((f64::from(*found) - sum).abs() <= 1e-5 * sum, "{family:?} {at}: {found}, wanted {sum}");
                assert!(sum > 0.0);
            }
            assert!(probe(7) == (deviations, after), "{family:?} {kv_dtype}: in steps");
        }
    }
}

/// Every third token is forgotten and recomputed in one step: the cache and the logits of those tokens are what they
/// were, bit for bit.
#[test]
fn tokens_anywhere_in_a_sequence_are_recomputed() {
    for family in [Family::Llama3, Family::Qwen3, GEMMA] {
        for (isa, _, kv_dtype) in kinds() {
            let runner = runner_on(family, isa, kv_dtype);
            let tokens = Random::new(4).tokens(NUM_TOKENS, VOCAB);
            let whole = runner.forward(&tokens, &(0..NUM_TOKENS).collect::<Vec<_>>());
            let cache = runner.cache();
            let some: Vec<usize> = (0..NUM_TOKENS).filter(|position| position % 3 == 1 && *position < 90).collect();
            let others = Random::new(5).tokens(NUM_TOKENS, VOCAB);
            runner.forward(&others, &some);
            assert!(runner.cache() != cache, "{family:?}: other tokens are in the cache now");
            let found = runner.forward(&tokens, &some);
            assert!(runner.cache() == cache, "{family:?} {isa}: recomputed keys and values");
            for (position, found) in some.iter().zip(&found) {
                assert!(*found == whole[*position], "{family:?} {isa}: logits of token {position}");
            }
        }
    }
}

/// All layers are moved, each by the angles of its own base and scaling.
#[test]
fn every_layer_is_moved_by_its_own_angles() {
    for family in [Family::Llama, Family::Llama3, GEMMA] {
        let [found, wanted] = [(); 2].map(|()| runner(family));
        let tokens = Random::new(6).tokens(NUM_TOKENS, VOCAB);
        let [before, _] = [&found, &wanted].map(|runner| {
            runner.forward(&tokens, &(0..NUM_TOKENS).collect::<Vec<_>>());
            runner.cache()
        });
        // To blocks behind the text, which take up seven, at other offsets.
        let sources: Vec<i32> = (0..NUM_TOKENS as i32).collect();
        let targets: Vec<i32> = sources.iter().map(|at| 7 * 16 + 5 + at).collect();
        let deltas = vec![301; NUM_TOKENS];
        found.try_copy(&sources, &targets, &deltas).unwrap();
        wanted.copy_by_layers(&sources, &targets, &deltas);
        assert!(found.cache() == wanted.cache(), "{family:?}");
        let text = 7 * found.block_bytes();
        assert!(found.cache()[..text] == before[..text], "{family:?}: the stored tokens are as they were");
        assert!(found.cache()[text..] != before[text..], "{family:?}: something was moved");
    }
}
