//! Drawing a token from each row of logits ([`RowSampling`]); the CUDA kernel does the same, step by step.
//!
//! A cut is found in a histogram of the weights' upper bits, whose order is that of the weights, and exactly among those of
//! one bin: nothing is sorted but these.

#![allow(unsafe_code)]

use super::argmax::largest;
use super::disjoint::DisjointSlice;
use super::exp::exp;
use super::simd::{Kernel, LANES, Simd, dispatch};
use super::{Isa, ThreadPool};
use crate::backend::RowSampling;

/// Weights are counted in this part of the largest, which is 1.
const UNITS: f32 = (1u64 << 40) as f32;

/// Upper bits of a weight that choose its bin. Weights are at most 1, so there are fewer bins than such numbers.
const BIN_SHIFT: u32 = 20;
const NUM_BINS: usize = 2048;

/// What one thread needs to draw.
pub struct SampleScratch {
    weights: Vec<f32>,
    bins: Vec<u64>,
    /// Bits of weights in the bin of a cut.
    equals: Vec<u32>,
}

/// What is kept: weights above `bits`, and of those that equal it the first `ties` in order of id.
#[derive(Debug, Clone, Copy)]
struct Cut {
    bits: u32,
    ties: u64,
}

/// How much the largest weights have to reach to be kept.
#[derive(Debug, Clone, Copy)]
enum Wanted {
    Count(u64),
    Share(f32),
}

/// One token for each row of `logits`, `[rows, features]`, into `out`; `sampling` is told the number of the row. There is
/// scratch for each thread.
pub fn sample(
    pool: &mut ThreadPool,
    isa: Isa,
    scratch: &mut Vec<SampleScratch>,
    logits: &[f32],
    features: usize,
    sampling: &(dyn Fn(usize) -> RowSampling + Sync),
    out: &mut [u32],
) {
    assert!(features > 0 && features <= u32::MAX as usize, "a row of logits has 1 to 2^32 - 1 numbers");
    assert_eq!(logits.len(), out.len() * features, "each row of logits has an answer");
    scratch.resize_with(pool.num_threads().max(scratch.len()), SampleScratch::default);
    scratch.iter_mut().for_each(|scratch| scratch.reserve(features));
    let num_rows = out.len();
    let (scratch, out) = (DisjointSlice::new(scratch), DisjointSlice::new(out));
    pool.run(num_rows, |row, thread| {
        // SAFETY: tasks have different rows, and a thread runs one task at a time.
        let (scratch, out) = unsafe { (&mut scratch.part(thread, 1)[0], &mut out.part(row, 1)[0]) };
        *out = sample_row(isa, &logits[row * features..(row + 1) * features], &sampling(row), scratch);
    });
}

/// The token of one row.
pub fn sample_row(isa: Isa, logits: &[f32], sampling: &RowSampling, scratch: &mut SampleScratch) -> u32 {
    let (index, most) = largest(isa, logits);
    // Without a finite largest number there are no weights.
    if sampling.temperature <= 0.0 || !most.is_finite() {
        return index;
    }
    scratch.reserve(logits.len());
    let SampleScratch { weights, bins, equals } = scratch;
    let weights = &mut weights[..logits.len()];
    dispatch(isa, Weigh { logits, most, temperature: sampling.temperature, weights });
    let mut cut = Cut { bits: 0, ties: 0 };
    if sampling.top_k > 0 && (sampling.top_k as usize) < logits.len() {
        cut = narrow(weights, bins, equals, cut, Wanted::Count(sampling.top_k.into()));
    }
    if sampling.top_p < 1.0 {
        cut = narrow(weights, bins, equals, cut, Wanted::Share(sampling.top_p));
    }
    // The largest weight is 1, so min-p is a weight.
    let least = sampling.min_p.clamp(0.0, 1.0).to_bits();
    if least > cut.bits {
        cut = Cut { bits: least - 1, ties: 0 };
    }
    pick(weights, cut, sampling.draw()).unwrap_or(index)
}

impl Default for SampleScratch {
    fn default() -> Self {
        Self { weights: Vec::new(), bins: vec![0; NUM_BINS], equals: Vec::new() }
    }
}

impl SampleScratch {
    /// Takes the memory for rows of `features` numbers.
    fn reserve(&mut self, features: usize) {
        if self.weights.len() < features {
            self.weights.resize(features, 0.0);
            self.equals.reserve(features);
        }
    }
}

/// `weights = exp((logits - most) / temperature)`, 0 for a NaN.
struct Weigh<'a> {
    logits: &'a [f32],
    most: f32,
    temperature: f32,
    weights: &'a mut [f32],
}

impl Kernel for Weigh<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (most, temperature) = (s.splat(self.most), s.splat(self.temperature));
        // The second operand is what a comparison with NaN gives.
        let weigh = |x| s.max(exp(s, s.div(s.sub(x, most), temperature)), s.zero());
        for (logits, weights) in self.logits.chunks(LANES).zip(self.weights.chunks_mut(LANES)) {
            // SAFETY: both have as many numbers as the smaller of a vector and their length.
            unsafe {
                if logits.len() == LANES {
                    s.store(weights.as_mut_ptr(), weigh(s.load(logits.as_ptr())));
                } else {
                    let x = s.load_first(logits.as_ptr(), logits.len());
                    s.store_first(weights.as_mut_ptr(), weigh(x), logits.len());
                }
            }
        }
    }
}

fn units(bits: u32) -> u64 {
    (f32::from_bits(bits) * UNITS) as u64
}

/// The share `share` of `total`, 40 binary digits of it, rounded up; 1 at least.
fn share_of(total: u64, share: f32) -> u64 {
    let digits = units(share.max(0.0).to_bits());
    let product = u128::from(total) * u128::from(digits);
    (product.div_ceil(1 << 40) as u64).max(1)
}

/// Narrows a cut to the largest weights that reach what is wanted.
fn narrow(weights: &[f32], bins: &mut [u64], equals: &mut Vec<u32>, cut: Cut, wanted: Wanted) -> Cut {
    let value = |bits: u32| if matches!(wanted, Wanted::Count(_)) { 1 } else { units(bits) };
    bins.fill(0);
    for bits in weights.iter().map(|weight| weight.to_bits()).filter(|bits| *bits > cut.bits) {
        bins[(bits >> BIN_SHIFT) as usize] += value(bits);
    }
    bins[(cut.bits >> BIN_SHIFT) as usize] += cut.ties * value(cut.bits);
    let total: u64 = bins.iter().sum();
    let mut rest = match wanted {
        Wanted::Count(count) => count,
        Wanted::Share(share) => share_of(total, share),
    };
    if rest >= total {
        return cut;
    }
    let mut bin = NUM_BINS - 1;
    while bins[bin] < rest {
        rest -= bins[bin];
        bin -= 1;
    }
    let in_bin = |bits: &u32| *bits > cut.bits && (bits >> BIN_SHIFT) as usize == bin;
    equals.clear();
    equals.extend(weights.iter().map(|weight| weight.to_bits()).filter(in_bin));
    equals.sort_unstable_by(|a, b| b.cmp(a));
    for group in equals.chunk_by(|a, b| a == b) {
        let (bits, each) = (group[0], value(group[0]));
        let sum = group.len() as u64 * each;
        if sum >= rest {
            return Cut { bits, ties: rest.div_ceil(each) };
        }
        rest -= sum;
    }
    // What is left comes from the weights at the earlier cut.
    Cut { bits: cut.bits, ties: rest.div_ceil(value(cut.bits).max(1)) }
}

/// The token at `drawn` / 2^53 of the kept weight, in order of id.
fn pick(weights: &[f32], cut: Cut, drawn: u64) -> Option<u32> {
    let total: u64 = kept(weights, cut).sum();
    let position = ((u128::from(total) * u128::from(drawn)) >> 53) as u64;
    let mut before = 0;
    let id = kept(weights, cut).position(|units| {
        before += units;
        position < before
    });
    id.map(|id| id as u32)
}

/// What is kept of each weight, in units.
fn kept(weights: &[f32], cut: Cut) -> impl Iterator<Item = u64> {
    let mut ties = cut.ties;
    weights.iter().map(move |weight| {
        let bits = weight.to_bits();
        let is_tie = bits == cut.bits && ties > 0;
        ties -= u64::from(is_tie);
        if bits > cut.bits || is_tie { units(bits) } else { 0 }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Normal enough, and the same every time.
    fn row(len: usize, seed: u64) -> Vec<f32> {
        let number = |at: usize| {
            let sampling = RowSampling { seed, index: at as u64, ..RowSampling::GREEDY };
            let parts = (0..4).map(|part| (sampling.draw() >> (12 * part)) & 0xfff);
            parts.sum::<u64>() as f32 / 1000.0 - 8.0
        };
        (0..len).map(number).collect()
    }

    /// Tokens that are kept, by sorting.
    fn sorted(logits: &[f32], sampling: &RowSampling) -> Vec<(u32, u64)> {
        let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut scratch = SampleScratch::default();
        scratch.reserve(logits.len());
        let (temperature, weights) = (sampling.temperature, &mut scratch.weights[..]);
        dispatch(Isa::Portable, Weigh { logits, most, temperature, weights });
        let mut all: Vec<(u32, f32)> = (0..).zip(weights.iter().copied()).filter(|(_, weight)| *weight > 0.0).collect();
        all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        if sampling.top_k > 0 {
            all.truncate(sampling.top_k as usize);
        }
        let total: u64 = all.iter().map(|(_, weight)| units(weight.to_bits())).sum();
        let wanted = if sampling.top_p < 1.0 { share_of(total, sampling.top_p) } else { total };
        let (mut sum, mut kept) = (0, vec![]);
        for (id, weight) in all {
            if sum >= wanted || weight < sampling.min_p {
                break;
            }
            sum += units(weight.to_bits());
            kept.push((id, units(weight.to_bits())));
        }
        kept.sort_unstable();
        kept
    }

    #[test]
    fn draws_are_those_of_sorting() {
        let mut scratch = SampleScratch::default();
        for (at, len) in [1, 2, 17, 300, 5000, 49_152].into_iter().enumerate() {
            let mut logits = row(len, at as u64);
            // Equal weights at the cuts.
            logits.iter_mut().for_each(|logit| *logit = (*logit * 20.0).round() / 20.0);
            for (index, temperature) in [1.0, 0.3, 2.5].into_iter().enumerate() {
                for top_k in [0, 1, 7, 40, 100_000] {
                    for (top_p, min_p) in [(1.0, 0.0), (0.9, 0.0), (0.3, 0.0), (1.0, 0.2), (0.95, 0.05), (0.0, 1.0)] {
                        let index = index as u64;
                        let sampling = RowSampling { temperature, top_k, top_p, min_p, seed: 5, index };
                        let kept = sorted(&logits, &sampling);
                        let total: u64 = kept.iter().map(|(_, units)| units).sum();
                        let position = ((u128::from(total) * u128::from(sampling.draw())) >> 53) as u64;
                        let mut sum = 0;
                        let reached = |(_, units): &&(u32, u64)| {
                            sum += units;
                            position < sum
                        };
                        let wanted = kept.iter().find(reached).unwrap().0;
                        for isa in Isa::available() {
                            let found = sample_row(isa, &logits, &sampling, &mut scratch);
                            assert_eq!(found, wanted, "{len} logits, {sampling:?}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn rows_are_drawn_one_by_one() {
        let (rows, features) = (13, 700);
        let logits = row(rows * features, 3);
        let sampling = |row: usize| RowSampling {
            temperature: (row % 3) as f32 * 0.8,
            top_k: row as u32 % 5 * 9,
            index: row as u64,
            ..RowSampling::GREEDY
        };
        let mut one = SampleScratch::default();
        let alone = |(at, row)| sample_row(Isa::best(), row, &sampling(at), &mut one);
        let wanted: Vec<u32> = logits.chunks_exact(features).enumerate().map(alone).collect();
        for threads in [1, 3] {
            let (mut out, mut scratch) = (vec![u32::MAX; rows], vec![]);
            let pool = &mut ThreadPool::new(threads);
            sample(pool, Isa::best(), &mut scratch, &logits, features, &sampling, &mut out);
            assert_eq!(out, wanted);
        }
    }

    #[test]
    fn what_has_no_weight_is_not_drawn() {
        let mut scratch = SampleScratch::default();
        let mut draw = |logits: &[f32], seed| {
            let sampling = RowSampling { temperature: 1.0, seed, ..RowSampling::GREEDY };
            sample_row(Isa::best(), logits, &sampling, &mut scratch)
        };
        for seed in 0..100 {
            assert_eq!(draw(&[f32::NEG_INFINITY, 2.0, f32::NAN], seed), 1);
            assert_eq!(draw(&[f32::NAN, f32::NEG_INFINITY, f32::NEG_INFINITY], seed), 1);
            assert_eq!(draw(&[0.0, f32::INFINITY, 0.0], seed), 1);
        }
    }
}
