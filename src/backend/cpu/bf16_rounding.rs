//! Rounding f32 to bf16 with AVX-512 BF16: lines of 32, and rows laid side by side as kernels of dot products read them.
//!
//! To the nearest, ties to even; numbers too small for a normal bf16 become zero, as the products would take them anyway.

#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::line::Line;
use super::simd::LANES;

/// Columns that become one vector of pairs.
const STEP_COLUMNS: usize = 2 * LANES;

/// 32 numbers as bf16.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) fn store_rounded(low: __m512, high: __m512, target: &mut Line) {
    // SAFETY: a line is 64 aligned bytes.
    unsafe { _mm512_store_si512((&raw mut *target).cast(), rounded(low, high)) }
}

/// The numbers of both, those of `low` first.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) fn rounded(low: __m512, high: __m512) -> __m512i {
    // SAFETY: both types are 512 bits without invalid values.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low)) }
}

/// Rounds `num_rows` (16 at most) rows of `num_columns` numbers, times `scale`, and writes pairs of columns side by side:
/// `[num_columns / 2, rounded up][stride]` words of which the first `num_rows` are written, the even column in the low
/// half, zero for a column beyond the last.
///
/// # Safety
/// The machine has AVX-512 F, BW, DQ, VL and BF16. `row_of(row)` points at `num_columns` numbers; the words can be written
/// at `target`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) unsafe fn store_pairs(
    row_of: impl Fn(usize) -> *const f32,
    num_rows: usize,
    num_columns: usize,
    scale: f32,
    target: *mut f32,
    stride: usize,
) {
    debug_assert!(num_rows <= LANES);
    let (scale, row_mask) = (_mm512_set1_ps(scale), low_lanes(num_rows));
    for column in (0..num_columns).step_by(STEP_COLUMNS) {
        let left = num_columns - column;
        let masks = [low_lanes(left), low_lanes(left.saturating_sub(LANES))];
        let mut words = [_mm512_setzero_si512(); LANES];
        for (row, words) in words.iter_mut().enumerate().take(num_rows) {
            let numbers = row_of(row).wrapping_add(column);
            // SAFETY: the masks leave columns of the row.
            let low = unsafe { _mm512_maskz_loadu_ps(masks[0], numbers) };
            // SAFETY: as above.
            let high = unsafe { _mm512_maskz_loadu_ps(masks[1], numbers.wrapping_add(LANES)) };
            *words = rounded(_mm512_mul_ps(low, scale), _mm512_mul_ps(high, scale));
        }
        let num_pairs = left.div_ceil(2).min(LANES);
        let target = target.wrapping_add(column / 2 * stride);
        if num_rows == 1 && stride == 1 {
            // SAFETY: a row alone is written as it is.
            unsafe { _mm512_mask_storeu_epi32(target.cast(), low_lanes(num_pairs), words[0]) };
            continue;
        }
        for (pair, words) in transposed(words).into_iter().enumerate().take(num_pairs) {
            // SAFETY: the mask leaves the rows that are there.
            unsafe { _mm512_mask_storeu_epi32(target.wrapping_add(pair * stride).cast(), row_mask, words) };
        }
    }
}

/// The first `count` lanes of 16.
#[inline(always)]
pub(super) fn low_lanes(count: usize) -> __mmask16 {
    if count >= LANES { 0xffff } else { (1u16 << count) - 1 }
}

/// Word `j` of row `i` becomes word `i` of row `j`.
#[inline]
#[target_feature(enable = "avx512f")]
fn transposed(rows: [__m512i; LANES]) -> [__m512i; LANES] {
    let mut pairs = rows;
    for i in 0..8 {
        pairs[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        pairs[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    // Quarter `q` of `fours[4 i + j]` holds word `4 q + j` of rows `4 i..4 i + 4`.
    let mut fours = pairs;
    for i in 0..4 {
        for j in 0..2 {
            fours[4 * i + 2 * j] = _mm512_unpacklo_epi64(pairs[4 * i + j], pairs[4 * i + j + 2]);
            fours[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(pairs[4 * i + j], pairs[4 * i + j + 2]);
        }
    }
    let mut columns = fours;
    for j in 0..4 {
        let even = [
            _mm512_shuffle_i32x4::<0x88>(fours[j], fours[4 + j]),
            _mm512_shuffle_i32x4::<0x88>(fours[8 + j], fours[12 + j]),
        ];
        let odd = [
            _mm512_shuffle_i32x4::<0xdd>(fours[j], fours[4 + j]),
            _mm512_shuffle_i32x4::<0xdd>(fours[8 + j], fours[12 + j]),
        ];
        columns[j] = _mm512_shuffle_i32x4::<0x88>(even[0], even[1]);
        columns[8 + j] = _mm512_shuffle_i32x4::<0xdd>(even[0], even[1]);
        columns[4 + j] = _mm512_shuffle_i32x4::<0x88>(odd[0], odd[1]);
        columns[12 + j] = _mm512_shuffle_i32x4::<0xdd>(odd[0], odd[1]);
    }
    columns
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::super::Isa;
    use super::*;

    #[test]
    fn pairs_of_all_rows_lie_side_by_side() {
        if !Isa::Avx512Bf16.is_available() {
            return;
        }
        for (num_rows, stride) in [(1, 1), (1, 3), (2, 2), (7, 12), (12, 12), (16, 16)] {
            for num_columns in [1, 2, 31, 32, 33, 64, 80, 97] {
                let number = |row: usize, column: usize| (row * 131 + column * 7) as f32 * 0.37 - 20.0;
                let rows: Vec<Vec<f32>> =
                    (0..num_rows).map(|row| (0..num_columns).map(|column| number(row, column)).collect()).collect();
                let num_pairs = num_columns.div_ceil(2);
                let mut words = vec![f32::from_bits(7); num_pairs * stride];
                // SAFETY: the instructions are there and the sizes are as said.
                unsafe {
                    let row_of = |row: usize| rows[row].as_ptr();
                    store_pairs(row_of, num_rows, num_columns, 0.5, words.as_mut_ptr(), stride);
                }
                let wanted = |row: usize, column: usize| match rows[row].get(column) {
                    Some(number) => u32::from(bf16::from_f32(number * 0.5).to_bits()),
                    None => 0,
                };
                for (at, word) in words.iter().enumerate() {
                    let (pair, row) = (at / stride, at % stride);
                    let expected =
                        if row < num_rows { wanted(row, 2 * pair + 1) << 16 | wanted(row, 2 * pair) } else { 7 };
                    assert_eq!(word.to_bits(), expected, "{num_rows} x {num_columns}, pair {pair} of row {row}");
                }
            }
        }
    }
}
