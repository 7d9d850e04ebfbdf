//! Rows of x as int8 for the integer kernels: blocks of 32 with one f32 scale each.
//!
//! The rounding is exact on every instruction set: to nearest, ties to even. A block with an infinity or a NaN gets a
//! scale that is not finite, so that its products are NaN rather than quietly wrong.

#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

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
    /// Of the first and the last 16 codes.
    sums: [i32; 2],
}

impl QuantBlock {
    /// `codes[i] * scale` is nearest to `values[i]`; the largest magnitude gets 127.
    #[inline(always)]
    pub(super) fn new(values: &[f32; BLOCK]) -> Self {
        // As integers, so that a NaN is larger than anything else.
        let largest = values.iter().fold(0, |largest: u32, value| largest.max(value.to_bits() & 0x7fff_ffff));
        let (scale, inverse) = scales(f32::from_bits(largest));
        let rounder = ROUNDER.to_bits() as i32;
        let codes = values.map(|value| ((value * inverse + ROUNDER).to_bits() as i32).wrapping_sub(rounder) as i8);
        let sums = [0, 16].map(|first| codes[first..first + 16].iter().map(|&code| i32::from(code)).sum());
        Self { scale, codes, sums }
    }

    /// The same bits, faster.
    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn new_avx512(values: &[f32; BLOCK]) -> Self {
        // SAFETY: 16 numbers can be read at either place.
        let values = unsafe { [_mm512_loadu_ps(values.as_ptr()), _mm512_loadu_ps(values.as_ptr().add(16))] };
        let magnitudes = values.map(|value| _mm512_castps_si512(_mm512_abs_ps(value)));
        let largest = _mm512_reduce_max_epu32(_mm512_max_epu32(magnitudes[0], magnitudes[1]));
        let (scale, inverse) = scales(f32::from_bits(largest));
        let (inverse, rounder) = (_mm512_set1_ps(inverse), _mm512_set1_ps(ROUNDER));
        let codes = values.map(|value| {
            let shifted = _mm512_add_ps(_mm512_mul_ps(value, inverse), rounder);
            _mm512_cvtepi32_epi8(_mm512_sub_epi32(_mm512_castps_si512(shifted), _mm512_castps_si512(rounder)))
        });
        // Bytes add up eight at a time as unsigned ones, which 128 makes of them.
        let sums = codes.map(|codes| {
            let eights = _mm_sad_epu8(_mm_xor_si128(codes, _mm_set1_epi8(-128)), _mm_setzero_si128());
            _mm_cvtsi128_si32(eights) + _mm_extract_epi32::<2>(eights) - 16 * 128
        });
        let mut block = Self { scale, codes: [0; BLOCK], sums };
        // SAFETY: 16 codes can be written at either place.
        unsafe {
            _mm_storeu_si128(block.codes.as_mut_ptr().cast(), codes[0]);
            _mm_storeu_si128(block.codes.as_mut_ptr().add(16).cast(), codes[1]);
        }
        block
    }
}

/// The scale of a block whose largest magnitude this is, and what its values are multiplied by.
#[inline(always)]
fn scales(largest: f32) -> (f32, f32) {
    if largest < TINY {
        return (0.0, 0.0);
    }
    (largest / 127.0, if largest.is_finite() { 127.0 / largest } else { 0.0 })
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

/// Quantises a block of each row of a tile: `numbers` is `[rows][32]`, `record` what [`quantise_tiles`] makes of them.
pub(super) fn quantise_blocks(isa: Isa, numbers: &[f32], record: &mut [u32]) {
    let rows = numbers.len() / BLOCK;
    for (row, numbers) in numbers.chunks_exact(BLOCK).enumerate() {
        quantise_row(isa, numbers, row, rows, record);
    }
}

fn quantise_row(isa: Isa, x: &[f32], row: usize, rows: usize, target: &mut [u32]) {
    match isa {
        Isa::Portable => write_records(x, row, rows, target, QuantBlock::new),
        // SAFETY: `gemm` checked that this machine has the instruction set.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { quantise_row_avx2(x, row, rows, target) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => unsafe { quantise_row_avx512(x, row, rows, target) },
        #[cfg(not(target_arch = "x86_64"))]
        _ => write_records(x, row, rows, target, QuantBlock::new),
    }
}

/// The same code, compiled for wider vectors.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn quantise_row_avx2(x: &[f32], row: usize, rows: usize, target: &mut [u32]) {
    write_records(x, row, rows, target, QuantBlock::new);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn quantise_row_avx512(x: &[f32], row: usize, rows: usize, target: &mut [u32]) {
    write_records(x, row, rows, target, |values| QuantBlock::new_avx512(values));
}

#[inline(always)]
fn write_records(
    x: &[f32],
    row: usize,
    rows: usize,
    target: &mut [u32],
    quantise: impl Fn(&[f32; BLOCK]) -> QuantBlock,
) {
    for (values, record) in x.as_chunks::<BLOCK>().0.iter().zip(target.chunks_exact_mut(RECORD_WORDS * rows)) {
        let block = quantise(values);
        for (index, &[a, b, c, d]) in block.codes.as_chunks::<4>().0.iter().enumerate() {
            record[index * rows + row] = u32::from_le_bytes([a as u8, b as u8, c as u8, d as u8]);
        }
        let [first, last] = block.sums;
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

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn instruction_sets_quantise_alike() {
        if !Isa::Avx512.is_available() {
            return;
        }
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 8
        };
        for round in 0..2_000 {
            let size = 2f32.powi(round % 250 - 125);
            let mut values: [f32; BLOCK] = std::array::from_fn(|_| (next() as f32 / 8_388_608.0 - 1.0) * size);
            match round % 97 {
                0 => values[next() as usize % BLOCK] = f32::NAN,
                1 => values[next() as usize % BLOCK] = f32::NEG_INFINITY,
                2 => values = [0.0; BLOCK],
                3 => values = std::array::from_fn(|index| index as f32 - 15.5),
                _ => {}
            }
            // SAFETY: the instruction set is there.
            let found = unsafe { QuantBlock::new_avx512(&values) };
            let wanted = QuantBlock::new(&values);
            assert_eq!(found.scale.to_bits(), wanted.scale.to_bits(), "{values:?}");
            assert_eq!((found.codes, found.sums), (wanted.codes, wanted.sums), "{values:?}");
        }
    }
}
