//! Integer register tiles with AVX2: up to 4 rows of x by 8 outputs, a quarter of a panel after the other.
//!
//! `maddubs` multiplies unsigned by signed bytes and adds pairs in 16 bits. Codes below 64 times 127 fit. Q8_0's do not,
//! so there the signs move over to x: magnitudes up to 128 times 127, twice, fit again.

#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::super::DType;
use super::dequantize::code_bias;
use super::quant_tile::{QuantKernel, QuantTile};
use super::quantize::{NEGATED_SUMS, RECORD_WORDS, SCALE, SCALED_SUM};

/// Most rows a tile has.
pub(super) const MAX_ROWS: usize = 4;

/// How a format lies in a panel.
#[derive(Clone, Copy)]
struct Layout {
    nibbles: bool,
    has_minimum: bool,
    is_k_quant: bool,
    bias: i32,
}

const fn layout(format: u8) -> Layout {
    let dtype = FORMATS[format as usize];
    Layout {
        nibbles: matches!(dtype, DType::Q4_0 | DType::Q4_1 | DType::Q4K),
        has_minimum: matches!(dtype, DType::Q4_1 | DType::Q5_1 | DType::Q4K | DType::Q5K),
        is_k_quant: dtype.block_elements() == 256,
        bias: if matches!(dtype, DType::Q8_0) { 0 } else { code_bias(dtype) },
    }
}

const FORMATS: [DType; 8] =
    [DType::Q4_0, DType::Q4_1, DType::Q5_0, DType::Q5_1, DType::Q8_0, DType::Q4K, DType::Q5K, DType::Q6K];
const Q8_0: u8 = 4;
const Q6K: u8 = 7;

/// The kernel for `num_rows` rows and one panel of `dtype`.
pub(super) fn quant_kernel(dtype: DType, num_rows: usize) -> QuantKernel {
    match dtype {
        DType::Q4_0 => kernel_of::<0>(num_rows),
        DType::Q4_1 => kernel_of::<1>(num_rows),
        DType::Q5_0 => kernel_of::<2>(num_rows),
        DType::Q5_1 => kernel_of::<3>(num_rows),
        DType::Q8_0 => kernel_of::<Q8_0>(num_rows),
        DType::Q4K => kernel_of::<5>(num_rows),
        DType::Q5K => kernel_of::<6>(num_rows),
        DType::Q6K => kernel_of::<Q6K>(num_rows),
        DType::F32 | DType::F16 | DType::BF16 | DType::I32 | DType::F8E4M3 => {
            unreachable!("{dtype} is not quantised")
        }
    }
}

fn kernel_of<const FORMAT: u8>(num_rows: usize) -> QuantKernel {
    match num_rows {
        1 => tile::<FORMAT, 1>,
        2 => tile::<FORMAT, 2>,
        3 => tile::<FORMAT, 3>,
        4 => tile::<FORMAT, 4>,
        _ => unreachable!("no AVX2 tile of {num_rows} quantised rows"),
    }
}

/// # Safety
/// As for [`QuantKernel`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile<const FORMAT: u8, const ROWS: usize>(tile: &QuantTile) {
    for quarter in 0..tile.num_columns.div_ceil(8) {
        // SAFETY: the caller's promise.
        unsafe { quarter_tile::<FORMAT, ROWS>(tile, quarter) };
    }
}

/// # Safety
/// As for [`QuantKernel`]; `out` has columns in this quarter.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn quarter_tile<const FORMAT: u8, const ROWS: usize>(tile: &QuantTile, quarter: usize) {
    let layout = const { layout(FORMAT) };
    let (subs_per_block, code_bytes) = (if layout.is_k_quant { 8 } else { 1 }, if layout.nibbles { 512 } else { 1024 });
    let codes_at = quarter / 2 * code_bytes / 2 + quarter % 2 * 32;
    // SAFETY: x has `num_blocks` records of `ROWS` rows, and the panel its blocks, as `packed.rs` lays them out.
    unsafe {
        let mut sums = [_mm256_setzero_ps(); ROWS];
        let (mut x, mut at) = (tile.x, tile.weights);
        for _ in 0..tile.num_blocks / subs_per_block {
            let block_scale = widen_f16(at.add(quarter * 16));
            let offset = if layout.has_minimum { widen_f16(at.add(64 + quarter * 16)) } else { _mm256_setzero_ps() };
            at = at.add(if layout.has_minimum { 128 } else { 64 });
            for _ in 0..subs_per_block {
                let header = at.add(quarter * 8);
                let codes = at.add(if layout.is_k_quant { 64 } else { 0 });
                let source = codes.add(codes_at);
                if FORMAT == Q6K {
                    for part in 0..2 {
                        let scale = _mm256_mul_ps(block_scale, widen_i8(header.add(32 * part)));
                        let negated = NEGATED_SUMS + 1 + part;
                        add_part::<FORMAT, ROWS>(&mut sums, x, source, scale, part * 4..part * 4 + 4, negated);
                    }
                } else {
                    let scale =
                        if layout.is_k_quant { _mm256_mul_ps(block_scale, widen_u8(header)) } else { block_scale };
                    add_part::<FORMAT, ROWS>(&mut sums, x, source, scale, 0..8, NEGATED_SUMS);
                }
                if layout.has_minimum {
                    let mut minimum = offset;
                    if layout.is_k_quant {
                        let product = _mm256_mul_ps(offset, widen_u8(header.add(32)));
                        minimum = _mm256_xor_ps(product, _mm256_set1_ps(-0.0));
                    }
                    for (row, sum) in sums.iter_mut().enumerate() {
                        let x_sum = _mm256_set1_ps(f32::from_bits(*x.add(SCALED_SUM * ROWS + row)));
                        *sum = _mm256_fmadd_ps(minimum, x_sum, *sum);
                    }
                }
                x = x.add(RECORD_WORDS * ROWS);
                at = codes.add(code_bytes);
            }
        }
        store::<ROWS>(tile, quarter, sums);
    }
}

/// Adds what some vectors of codes contribute: those of 32, or of Q6_K 16, elements.
///
/// # Safety
/// As for [`QuantKernel`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn add_part<const FORMAT: u8, const ROWS: usize>(
    sums: &mut [__m256; ROWS],
    x: *const u32,
    codes: *const u8,
    scale: __m256,
    vectors: std::ops::Range<usize>,
    negated: usize,
) {
    let layout = const { layout(FORMAT) };
    let ones = _mm256_set1_epi16(1);
    let mut integers = [_mm256_setzero_si256(); ROWS];
    // SAFETY: the caller's promise.
    unsafe {
        if layout.bias > 0 {
            for (row, integers) in integers.iter_mut().enumerate() {
                *integers = _mm256_set1_epi32(*x.add(negated * ROWS + row) as i32 * layout.bias);
            }
        }
        for vector in vectors {
            let mut values =
                _mm256_loadu_si256(codes.add(if layout.nibbles { vector % 4 } else { vector } * 64).cast());
            if layout.nibbles {
                let shifted = if vector >= 4 { _mm256_srli_epi16::<4>(values) } else { values };
                values = _mm256_and_si256(shifted, _mm256_set1_epi8(15));
            }
            for (row, integers) in integers.iter_mut().enumerate() {
                let x = _mm256_set1_epi32(*x.add(vector * ROWS + row) as i32);
                let pairs = if FORMAT == Q8_0 {
                    let signed = _mm256_xor_si256(values, _mm256_set1_epi8(-128));
                    _mm256_maddubs_epi16(_mm256_abs_epi8(signed), _mm256_sign_epi8(x, signed))
                } else {
                    _mm256_maddubs_epi16(values, x)
                };
                *integers = _mm256_add_epi32(*integers, _mm256_madd_epi16(pairs, ones));
            }
        }
        for (row, (sum, integers)) in sums.iter_mut().zip(integers).enumerate() {
            let x_scale = _mm256_set1_ps(f32::from_bits(*x.add(SCALE * ROWS + row)));
            *sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(integers), _mm256_mul_ps(scale, x_scale), *sum);
        }
    }
}

/// # Safety
/// 16 bytes can be read.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn widen_f16(source: *const u8) -> __m256 {
    // SAFETY: the caller's promise.
    _mm256_cvtph_ps(unsafe { _mm_loadu_si128(source.cast()) })
}

/// # Safety
/// 8 bytes can be read.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn widen_u8(source: *const u8) -> __m256 {
    // SAFETY: the caller's promise.
    _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(unsafe { _mm_loadl_epi64(source.cast()) }))
}

/// # Safety
/// 8 bytes can be read.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn widen_i8(source: *const u8) -> __m256 {
    // SAFETY: the caller's promise.
    _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(unsafe { _mm_loadl_epi64(source.cast()) }))
}

/// Adds the bias, if there is one, and writes the sums.
///
/// # Safety
/// As for [`QuantKernel`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn store<const ROWS: usize>(tile: &QuantTile, quarter: usize, sums: [__m256; ROWS]) {
    let left = tile.num_columns.saturating_sub(quarter * 8).min(8) as i32;
    let mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(left), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    for (row, mut sum) in sums.into_iter().enumerate() {
        // SAFETY: the mask leaves only columns of `out` and of the bias.
        unsafe {
            if !tile.bias.is_null() {
                sum = _mm256_add_ps(sum, _mm256_maskload_ps(tile.bias.wrapping_add(quarter * 8), mask));
            }
            _mm256_maskstore_ps(tile.out.add(row * tile.out_stride).wrapping_add(quarter * 8), mask, sum);
        }
    }
}
