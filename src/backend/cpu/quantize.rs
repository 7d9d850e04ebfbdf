//! Rows of x as int8 for the integer kernels: blocks of 32 with one f32 scale each.
//!
//! The rounding is exact on every instruction set: to nearest, ties to even. A block with an infinity or a NaN gets a
//! scale that is not finite, so that its products are NaN rather than quietly wrong.

#![allow(unsafe_code)]

use super::disjoint::DisjointSlice;
use super::input_tiles::{Rows, TilePlan, for_each_tile};
use super::{Isa, ThreadPool};

/// Elements of one block.
pub(super) const BLOCK: usize = 32;
/// Words a row takes in the record of one block: 8 of codes, then those below.
pub(super) const RECORD_WORDS: usize = 13;
/// f32: the block's scale.
pub(super) const SCALE: usize = 8;
/// f32: the scale times the sum of the codes.
pub(super) const SCALED_SUM: usize = 9;
/// i32: the sum of the 32 codes, negated; then of the first and the last 16.
pub(super) const NEGATED_SUMS: usize = 10;

/// Adding this to a small number leaves its nearest integer in the low bits of the sum.
const ROUNDER: f32 = 12_582_912.0;
/// Below this the reciprocal of the scale overflows; such blocks count as zeros.
const TINY: f32 = 1e-35;

/// One block of a row.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct QuantBlock {
    pub(super) scale: f32,
    pub(super) codes: [i8; BLOCK],
}

impl QuantBlock {
    /// `codes[i] * scale` is nearest to `values[i]`; the largest magnitude gets 127.
    #[inline(always)]
    pub(super) fn new(values: &[f32; BLOCK]) -> Self {
        // As integers, so that a NaN is larger than anything else.
        let largest = values.iter().fold(0, |largest: u32, value| largest.max(value.to_bits() & 0x7fff_ffff));
        let largest = f32::from_bits(largest);
        if largest < TINY {
            return Self { scale: 0.0, codes: [0; BLOCK] };
        }
        let inverse = if largest.is_finite() { 127.0 / largest } else { 0.0 };
        let rounder = ROUNDER.to_bits() as i32;
        let codes = values.map(|value| ((value * inverse + ROUNDER).to_bits() as i32).wrapping_sub(rounder) as i8);
        Self { scale: largest / 127.0, codes }
    }

    fn sums(&self) -> [i32; 2] {
        [0, 16].map(|first| self.codes[first..first + 16].iter().map(|&code| i32::from(code)).sum())
    }
}

/// Quantises x tile by tile. A tile is `[num_columns / 32][RECORD_WORDS][rows]` words, its codes four `k` a word; tile
/// `t` begins at `plan.start(t) * num_columns / 32 * RECORD_WORDS`.
pub(super) fn quantise_tiles(
    pool: &mut ThreadPool,
    isa: Isa,
    x: Rows,
    num_columns: usize,
    plan: TilePlan,
    target: &mut [u32],
) {
    let row_words = num_columns / BLOCK * RECORD_WORDS;
    let shared = DisjointSlice::new(target);
    for_each_tile(pool, plan, |tile| {
        let (start, rows) = (plan.start(tile), plan.rows(tile));
        // SAFETY: tiles are disjoint ranges of rows.
        let target = unsafe { shared.part(start * row_words, rows * row_words) };
        for row in 0..rows {
            quantise_row(isa, x.row(start + row, num_columns), row, rows, target);
        }
    });
}

fn quantise_row(isa: Isa, x: &[f32], row: usize, rows: usize, target: &mut [u32]) {
    match isa {
        Isa::Portable => quantise_row_body(x, row, rows, target),
        // SAFETY: all others imply AVX2, and `gemm` checked that this machine has it.
        #[cfg(target_arch = "x86_64")]
        _ => unsafe { quantise_row_avx2(x, row, rows, target) },
        #[cfg(not(target_arch = "x86_64"))]
        _ => quantise_row_body(x, row, rows, target),
    }
}

/// The same code, compiled for wider vectors.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn quantise_row_avx2(x: &[f32], row: usize, rows: usize, target: &mut [u32]) {
    quantise_row_body(x, row, rows, target);
}

#[inline(always)]
fn quantise_row_body(x: &[f32], row: usize, rows: usize, target: &mut [u32]) {
    for (values, record) in x.as_chunks::<BLOCK>().0.iter().zip(target.chunks_exact_mut(RECORD_WORDS * rows)) {
        let block = QuantBlock::new(values);
        for (index, &[a, b, c, d]) in block.codes.as_chunks::<4>().0.iter().enumerate() {
            record[index * rows + row] = u32::from_le_bytes([a as u8, b as u8, c as u8, d as u8]);
        }
        let [first, last] = block.sums();
        record[SCALE * rows + row] = block.scale.to_bits();
        record[SCALED_SUM * rows + row] = (block.scale * (first + last) as f32).to_bits();
        for (index, sum) in [first + last, first, last].into_iter().enumerate() {
            record[(NEGATED_SUMS + index) * rows + row] = (-sum) as u32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_the_nearest_and_ties_go_to_even() {
        let mut values = [0.0; BLOCK];
        values[..6].copy_from_slice(&[127.0, -127.0, 0.5, 1.5, -2.5, 63.4]);
        let block = QuantBlock::new(&values);
        assert_eq!(block.scale, 1.0);
        assert_eq!(block.codes[..7], [127, -127, 0, 2, -2, 63, 0]);
    }

    #[test]
    fn what_is_not_finite_stays_visible() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = [1.0; BLOCK];
            values[7] = bad;
            assert!((QuantBlock::new(&values).scale * 0.0).is_nan(), "{bad}");
        }
        assert_eq!(QuantBlock::new(&[f32::MIN_POSITIVE; BLOCK]).scale, 0.0);
    }
}
