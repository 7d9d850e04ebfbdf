//! Composed prompts in which the tokens that deviate most are computed: which these are, and what follows from it. That
//! nothing but the request decides it `link.rs` tests for all composed prompts. Run on every device.

use mneme::backend::DType;
use mneme::backend::cpu::Isa;
use mneme::engine::{Piece, SchedulerLimits};

use crate::composition::runner_on;
use crate::support::composed::{bits, blended, composed, run};
use crate::support::engine::{Output, Setup, limits};
use crate::support::random::Random;
use crate::support::runner::{BLOCK_SIZE, Runner};
use crate::support::tiny_model::{Family, TinyModel, WINDOW};
use crate::{FAMILIES, TestBackend, start};

const SEED: u64 = 21;

#[test]
fn a_prompt_with_all_tokens_chosen_is_an_ordinary_one() {
    for &family in FAMILIES {
        let model = TinyModel::new(family, SEED).write();
        let engine = start(model.path(), Setup::default());
        let (prompt, pieces) = composed(&mut Random::new(1), &[20, 2 * WINDOW], 0);
        let all = run(&engine, &prompt, &blended(&pieces, 2 * WINDOW), 12);
        assert_eq!((all.reuse.linked_tokens, all.reuse.chosen_tokens), (0, 0));
        assert_eq!(bits(&all), bits(&run(&engine, &prompt, &[], 12)), "{family:?}");
    }
}

/// What is chosen is not moved, and a piece of which everything is chosen is an ordinary part of the prompt.
#[test]
fn the_more_are_chosen_the_fewer_are_moved() {
    let model = TinyModel::new(Family::Llama3, SEED).write();
    let engine = start(model.path(), Setup::default());
    let (prompt, pieces) = composed(&mut Random::new(3), &[31, 47], 2);
    let count = |output: &Output| (output.reuse.linked_tokens, output.reuse.chosen_tokens);
    let linked = run(&engine, &prompt, &pieces, 8);
    assert_eq!(count(&linked), (29 + 45, 0));
    for (chosen, wanted) in [(1, (72, 2)), (28, (18, 56)), (29, (16, 29)), (44, (1, 44)), (45, (0, 0))] {
        let found = run(&engine, &prompt, &blended(&pieces, chosen), 8);
        assert_eq!(count(&found), wanted, "{chosen}");
        if chosen < 29 {
            // What is moved was found where the first call left it; in front of it there is no full block.
            assert_eq!(found.cached_tokens, wanted.0, "{chosen}");
        }
        assert_eq!(found.cached_tokens, found.reuse.device_tokens, "{chosen}");
        assert_ne!(bits(&found), bits(&linked), "{chosen}");
    }
}

/// What is stored of a prompt that somebody composes by hand.
struct ByHand {
    runner: Runner<TestBackend>,
    moved: Vec<Vec<usize>>,
}

impl ByHand {
    /// Computes each source alone, and moves what is kept of it with the device's own rotation.
    fn new(runner: Runner<TestBackend>, pieces: &[Piece]) -> Self {
        // Behind the prompt, which is not computed yet, so that computing the next source overwrites nothing.
        let aside = 8 * BLOCK_SIZE;
        let mut moved = vec![];
        for piece in pieces {
            let num_stored = piece.source.len() / BLOCK_SIZE * BLOCK_SIZE;
            runner.forward(&piece.source, &(0..num_stored).collect::<Vec<_>>());
            let stored: Vec<usize> = (1 + piece.num_recomputed..num_stored).collect();
            let targets: Vec<usize> = stored.iter().map(|at| at - 1 + piece.start).collect();
            runner.copy(&stored, &targets.iter().map(|at| at + aside).collect::<Vec<_>>(), piece.start as i32 - 1);
            moved.push(targets);
        }
        let all = moved.concat();
        runner.copy(&all.iter().map(|at| at + aside).collect::<Vec<_>>(), &all, 0);
        Self { runner, moved }
    }

    /// The places of each piece, those first where `whole`, which has computed everything, has most different keys and
    /// values in the layer that is asked.
    fn by_deviation(&self, whole: &Runner<TestBackend>) -> Vec<Vec<usize>> {
        let layer = whole.probe_layer();
        let deviation = |at: usize| -> f64 {
            let [stored, fresh] = [&self.runner, whole].map(|runner| runner.stored(layer, at));
            stored.iter().zip(fresh).map(|(stored, fresh)| (stored - fresh).powi(2)).sum()
        };
        let sorted = |places: &Vec<usize>| {
            let mut deviations: Vec<(f64, usize)> = places.iter().map(|at| (deviation(*at), *at)).collect();
            deviations.sort_by(|a, b| b.0.total_cmp(&a.0));
            deviations.into_iter().map(|(_, at)| at).collect()
        };
        self.moved.iter().map(sorted).collect()
    }

    /// Logarithms of the probabilities behind the prompt when all but `kept` is computed.
    fn finish(&self, prompt: &[u32], kept: &[usize]) -> Vec<f64> {
        let last = self.moved.concat().into_iter().max().unwrap();
        // The layers below have what computing everything gives.
        self.runner.probe(prompt, 0..last + 1);
        let computed: Vec<usize> = (0..prompt.len()).filter(|at| !kept.contains(at)).collect();
        let logits = self.runner.forward(prompt, &computed).pop().unwrap();
        let numbers = logits.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()));
        let logits: Vec<f64> = numbers.map(f64::from).collect();
        let sum = logits.iter().map(|logit| logit.exp()).sum::<f64>().ln();
        logits.into_iter().map(|logit| logit - sum).collect()
    }
}

/// What is chosen with a KV cache of `kv_dtype`, and that something else comes out when others are.
pub(crate) fn check_choice(family: Family, kv_dtype: DType, num_recomputed: usize, num_chosen: usize) {
    let runner = || runner_on(family, Isa::best(), kv_dtype);
    let (prompt, pieces) = composed(&mut Random::new(2), &[WINDOW - 5, WINDOW + 7], num_recomputed);
    let whole = runner();
    whole.forward(&prompt, &(0..prompt.len()).collect::<Vec<_>>());
    let by_hand = ByHand::new(runner(), &pieces);
    let order = by_hand.by_deviation(&whole);
    let kept: Vec<usize> = order.iter().flat_map(|places| &places[num_chosen..]).copied().collect();
    let wanted = by_hand.finish(&prompt, &kept);
    let model = TinyModel::new(family, SEED).write();
    let limits = SchedulerLimits { max_num_batched_tokens: 11, ..limits() };
    let engine = start(model.path(), Setup { limits, kv_dtype, ..Setup::default() });
    let found = run(&engine, &prompt, &blended(&pieces, num_chosen), 1);
    assert_eq!(found.reuse.chosen_tokens, 2 * num_chosen);
    let off = |wanted: &[f64]| -> f64 {
        let tops = found.logprobs[0].top.iter();
        tops.map(|top| (f64::from(top.logprob) - wanted[top.id as usize]).abs()).fold(0.0, f64::max)
    };
    let what = format!("{family:?} over {kv_dtype}, {num_recomputed} recomputed, {num_chosen} chosen");
    assert!(off(&wanted) < 1e-4, "{what}: off by {}", off(&wanted));
    let other: Vec<usize> = order.iter().flat_map(|places| &places[..places.len() - num_chosen]).copied().collect();
    let other = ByHand::new(runner(), &pieces).finish(&prompt, &other);
    assert!(off(&other) > 1e-4, "{what}: the choice does not matter");
}

/// The chosen tokens are those whose keys and values differ most from those of the whole prompt.
#[test]
fn the_chosen_tokens_are_those_of_a_slow_search() {
    for &family in FAMILIES {
        for (num_recomputed, num_chosen) in [(0, 3), (4, 10)] {
            check_choice(family, DType::BF16, num_recomputed, num_chosen);
        }
    }
}
