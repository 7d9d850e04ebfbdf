//! The work of one integer register tile, and its kernel in plain Rust.
//!
//! Per 32 elements (16 for Q6_K) the products of codes are summed as integers, exactly; then, in the order of `k`,
//! `sum += integers * (weight scale * x scale)`, fused, and for formats with minima `sum += minimum * (x scale * sum of
//! x codes)`, fused. So an output has the same bits in whatever tile its row falls.

#![allow(unsafe_code)]

use super::super::DType;
use super::dequantize::code_bias;
use super::float_tile::multiply_add;
use super::packed::for_each_sub_block;
use super::quantize::{RECORD_WORDS, SCALE, SCALED_SUM};

/// What a kernel works on. The number of rows is part of the kernel's type.
pub(super) struct QuantTile {
    /// `[num_blocks][RECORD_WORDS][rows]`, see `quantize.rs`.
    pub(super) x: *const u32,
    /// One panel, or several in a row.
    pub(super) weights: *const u8,
    pub(super) panel_bytes: usize,
    pub(super) dtype: DType,
    /// Blocks of 32 elements.
    pub(super) num_blocks: usize,
    /// The output of the tile's first row and the first panel's first column.
    pub(super) out: *mut f32,
    pub(super) out_stride: usize,
    /// Columns of `out` to write; less than the panels' width at the end of a segment.
    pub(super) num_columns: usize,
    /// Added at the end; null for none.
    pub(super) bias: *const f32,
}

/// A kernel for a fixed number of rows and panels.
///
/// # Safety
/// The machine has the kernel's instructions, and every pointer of the tile is good for the sizes beside it.
pub(super) type QuantKernel = unsafe fn(&QuantTile);

/// Most rows a portable tile has.
pub(super) const PORTABLE_ROWS: usize = 4;

/// The kernel for `num_rows` rows and one panel of any quantised type.
pub(super) fn portable_kernel(num_rows: usize) -> QuantKernel {
    match num_rows {
        1 => tile::<1>,
        2 => tile::<2>,
        3 => tile::<3>,
        4 => tile::<4>,
        _ => unreachable!("no portable tile of {num_rows} rows"),
    }
}

/// # Safety
/// As for [`QuantKernel`].
unsafe fn tile<const ROWS: usize>(tile: &QuantTile) {
    // SAFETY: the caller's promise.
    let (weights, x) = unsafe {
        let weights = std::slice::from_raw_parts(tile.weights, tile.panel_bytes);
        (weights, std::slice::from_raw_parts(tile.x, tile.num_blocks * RECORD_WORDS * ROWS))
    };
    let part_len = if tile.dtype == DType::Q6K { 16 } else { 32 };
    for column in 0..tile.num_columns {
        let mut sums = [0.0f32; ROWS];
        for_each_sub_block(tile.dtype, weights, column, |index, codes, terms| {
            let record = &x[index * RECORD_WORDS * ROWS..][..RECORD_WORDS * ROWS];
            let codes = codes.map(|code| i32::from(code) - code_bias(tile.dtype));
            for (row, sum) in sums.iter_mut().enumerate() {
                let at = |field: usize| record[field * ROWS + row];
                for (part, codes) in codes.chunks_exact(part_len).enumerate() {
                    let words = (0..part_len / 4).map(|word| at(part * 4 + word));
                    let integers: i32 =
                        words.zip(codes.as_chunks::<4>().0).map(|(word, codes)| dot(word, *codes)).sum();
                    let scale = terms[part].scale * f32::from_bits(at(SCALE));
                    *sum = multiply_add(integers as f32, scale, *sum);
                }
                if let Some(minimum) = terms[0].minimum {
                    *sum = multiply_add(minimum, f32::from_bits(at(SCALED_SUM)), *sum);
                }
            }
        });
        for (row, sum) in sums.into_iter().enumerate() {
            // SAFETY: `out` and a bias have `num_columns` columns.
            unsafe {
                let sum = if tile.bias.is_null() { sum } else { sum + *tile.bias.add(column) };
                *tile.out.add(row * tile.out_stride + column) = sum;
            }
        }
    }
}

/// Four codes of x in a word, times four of the weights.
fn dot(word: u32, codes: [i32; 4]) -> i32 {
    word.to_le_bytes().into_iter().zip(codes).map(|(x, code)| i32::from(x as i8) * code).sum()
}
