//! Log-probabilities of a row of logits: of the token that is there, and of the likeliest ones.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::request::{TokenLogprob, TokenLogprobs};
use crate::backend::RowLogprobs;
use crate::backend::cpu::{Isa, log_sum_exp};

/// Log-probabilities of `token` and of the `num_top` likeliest in an untouched row.
pub(super) fn logprobs_of(logits: &[f32], token: u32, num_top: usize) -> TokenLogprobs {
    let chosen = logits[token as usize];
    let rank = 1 + logits.iter().filter(|&&other| other > chosen).count() as u32;
    let top = best(logits, num_top).into_iter().map(|id| (id, logits[id as usize]));
    assemble(log_sum_exp(Isa::best(), logits), (token, chosen, rank), top)
}

/// The same from what a device says of the row.
pub(super) fn logprobs_from(row: &RowLogprobs, token: u32, num_top: usize) -> TokenLogprobs {
    assemble(row.log_sum_exp(), (token, row.chosen, row.rank), row.top(num_top))
}

/// From the row's normaliser, the token that is there with its logit and rank, and the likeliest with theirs, best first.
fn assemble(
    log_sum_exp: f64,
    (token, logit, rank): (u32, f32, u32),
    likeliest: impl Iterator<Item = (u32, f32)>,
) -> TokenLogprobs {
    let logprob = |logit: f32| (f64::from(logit) - log_sum_exp) as f32;
    let mut top: Vec<TokenLogprob> = Vec::with_capacity(likeliest.size_hint().0);
    let mut last_logit = f32::NAN;
    for ((id, logit), place) in likeliest.zip(1..) {
        let equal = top.last().filter(|_| logit == last_logit);
        let rank = equal.map_or(place, |last| last.rank);
        top.push(TokenLogprob { id, logprob: logprob(logit), rank });
        last_logit = logit;
    }
    TokenLogprobs { chosen: TokenLogprob { id: token, logprob: logprob(logit), rank }, top }
}

/// The `count` largest of a row, best first, the lower index first among equals; NaN comes last.
fn best(logits: &[f32], count: usize) -> Vec<u32> {
    let key = |id: usize| Reverse(u64::from(ordered(logits[id])) << 32 | u64::from(!(id as u32)));
    let id_of = |key: &Reverse<u64>| !(key.0 as u32);
    let count = count.min(logits.len());
    let mut heap: BinaryHeap<Reverse<u64>> = (0..count).map(key).collect();
    let least = |heap: &BinaryHeap<Reverse<u64>>| heap.peek().map_or(f32::INFINITY, |key| logits[id_of(key) as usize]);
    let mut bound = least(&heap);
    for (id, logit) in logits.iter().enumerate().skip(count) {
        // Of equals the first is in the heap already. A NaN at the bound gives way to every number.
        if *logit > bound || (bound.is_nan() && !logit.is_nan()) {
            if let Some(mut worst) = heap.peek_mut() {
                *worst = key(id);
            }
            bound = least(&heap);
        }
    }
    heap.into_sorted_vec().iter().map(id_of).collect()
}

/// Whole numbers in the order of floats; both zeros are one.
fn ordered(value: f32) -> u32 {
    let bits = (value + 0.0).to_bits();
    match (value.is_nan(), bits >> 31) {
        (true, _) => 0,
        (false, 0) => bits | 1 << 31,
        (false, _) => !bits,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logprobs_are_a_log_softmax_with_ranks() {
        let logits = [1.0f32, 3.0, 2.0, 3.0];
        let logprobs = logprobs_of(&logits, 2, 3);
        assert_eq!(logprobs.top.iter().map(|top| (top.id, top.rank)).collect::<Vec<_>>(), [(1, 1), (3, 1), (2, 3)]);
        let total: f32 = logits.iter().map(|logit| logit.exp()).sum();
        assert!((logprobs.chosen.logprob - (2.0f32.exp() / total).ln()).abs() < 1e-6);
        assert_eq!(logprobs.chosen.rank, 3);
    }

    #[test]
    fn the_best_are_those_of_sorting() {
        let row: Vec<f32> = (0..3000).map(|at| (at * 7919 % 613) as f32 / 7.0 - 40.0).collect();
        let mut sorted: Vec<u32> = (0..3000).collect();
        sorted.sort_by(|a, b| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b)));
        for count in [0, 1, 2, 20, 64, 2999, 3000, 4000] {
            assert_eq!(best(&row, count), sorted[..count.min(3000)], "{count}");
        }
        assert_eq!(best(&[f32::NAN, -1.0, f32::NEG_INFINITY, 5.0, f32::NAN], 4), [3, 1, 2, 0]);
        assert_eq!(best(&[f32::NAN, f32::NAN, -1.0], 1), [2]);
        assert_eq!(best(&[-0.0, 0.0, -0.0, 0.0], 3), [0, 1, 2]);
    }
}
