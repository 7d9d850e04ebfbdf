//! Register tiles with AVX2 and FMA: up to 6 rows of x by 16 outputs, half a panel after the other.

#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::super::DType;
use super::float_tile::{FloatKernel, FloatTile};

/// Most rows a tile has.
pub(super) const MAX_ROWS: usize = 6;

const BF16: u8 = 0;
const F16: u8 = 1;
const F32: u8 = 2;

macro_rules! kernels {
    ($rows:expr, $format:expr) => {
        match $rows {
            1 => tile::<$format, 1>,
            2 => tile::<$format, 2>,
            3 => tile::<$format, 3>,
            4 => tile::<$format, 4>,
            5 => tile::<$format, 5>,
            6 => tile::<$format, 6>,
            rows => unreachable!("no AVX2 tile of {rows} rows"),
        }
    };
}

/// The kernel for `num_rows` rows of x and one panel of `dtype`.
pub(super) fn float_kernel(dtype: DType, num_rows: usize) -> FloatKernel {
    match dtype {
        DType::BF16 => kernels!(num_rows, BF16),
        DType::F16 => kernels!(num_rows, F16),
        _ => kernels!(num_rows, F32),
    }
}

/// Bytes of 16 rows of a pair of `k`.
const fn half_bytes(format: u8) -> usize {
    if format == F32 { 128 } else { 64 }
}

/// The weights of rows `[8 * quarter, 8 * quarter + 8)` of a half at the even or odd `k` of a pair.
///
/// # Safety
/// [`half_bytes`] can be read at `weights`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn decode<const FORMAT: u8, const ODD: bool>(weights: *const u8, quarter: usize) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe {
        match FORMAT {
            BF16 => {
                let pairs = _mm256_loadu_si256(weights.add(32 * quarter).cast());
                let wide = if ODD {
                    _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff_0000_u32 as i32))
                } else {
                    _mm256_slli_epi32::<16>(pairs)
                };
                _mm256_castsi256_ps(wide)
            }
            F16 => _mm256_cvtph_ps(_mm_loadu_si128(weights.add(32 * ODD as usize + 16 * quarter).cast())),
            _ => _mm256_loadu_ps(weights.add(64 * ODD as usize + 32 * quarter).cast()),
        }
    }
}

/// # Safety
/// As for [`FloatKernel`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile<const FORMAT: u8, const ROWS: usize>(tile: &FloatTile) {
    for half in 0..2 {
        if tile.num_columns > half * 16 {
            // SAFETY: the caller's promise.
            unsafe { half_tile::<FORMAT, ROWS>(tile, half) };
        }
    }
}

/// # Safety
/// As for [`FloatKernel`]; `out` has columns in this half.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn half_tile<const FORMAT: u8, const ROWS: usize>(tile: &FloatTile, half: usize) {
    // SAFETY: x has `num_pairs` pairs of `ROWS` values, the panel `num_pairs` pairs of two halves.
    unsafe {
        let mut sums = load_sums::<ROWS>(tile, half);
        let (mut x, mut weights) = (tile.x, tile.weights.add(half * half_bytes(FORMAT)));
        for _ in 0..tile.num_pairs {
            step::<FORMAT, false, ROWS>(&mut sums, x, weights);
            step::<FORMAT, true, ROWS>(&mut sums, x.add(ROWS), weights);
            if ROWS == 1 {
                _mm_prefetch::<_MM_HINT_T0>(weights.wrapping_add(1024).cast());
            }
            x = x.add(2 * ROWS);
            weights = weights.add(2 * half_bytes(FORMAT));
        }
        store_sums::<ROWS>(tile, half, &sums);
    }
}

/// Adds the products of one `k`.
///
/// # Safety
/// As for [`FloatKernel`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn step<const FORMAT: u8, const ODD: bool, const ROWS: usize>(
    sums: &mut [[__m256; 2]; ROWS],
    x: *const f32,
    weights: *const u8,
) {
    // SAFETY: the caller's promise.
    let values = unsafe { [decode::<FORMAT, ODD>(weights, 0), decode::<FORMAT, ODD>(weights, 1)] };
    for (row, sums) in sums.iter_mut().enumerate() {
        // SAFETY: x has `ROWS` values for this `k`.
        let x = _mm256_set1_ps(unsafe { *x.add(row) });
        sums[0] = _mm256_fmadd_ps(x, values[0], sums[0]);
        sums[1] = _mm256_fmadd_ps(x, values[1], sums[1]);
    }
}

/// All bits set in the lanes of eight columns from `first` on that `out` has.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn lanes(num_columns: usize, first: usize) -> __m256i {
    let left = num_columns.saturating_sub(first).min(8) as i32;
    _mm256_cmpgt_epi32(_mm256_set1_epi32(left), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))
}

/// Zeros, or what `out` holds when the tile resumes.
///
/// # Safety
/// As for [`FloatKernel`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load_sums<const ROWS: usize>(tile: &FloatTile, half: usize) -> [[__m256; 2]; ROWS] {
    let mut sums = [[_mm256_setzero_ps(); 2]; ROWS];
    if tile.resume {
        for (row, sums) in sums.iter_mut().enumerate() {
            for (quarter, sum) in sums.iter_mut().enumerate() {
                let column = half * 16 + quarter * 8;
                // SAFETY: the mask leaves only columns of `out`.
                unsafe {
                    let out = tile.out.add(row * tile.out_stride).wrapping_add(column);
                    *sum = _mm256_maskload_ps(out, lanes(tile.num_columns, column));
                }
            }
        }
    }
    sums
}

/// Adds the bias, if there is one, and writes the sums.
///
/// # Safety
/// As for [`FloatKernel`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn store_sums<const ROWS: usize>(tile: &FloatTile, half: usize, sums: &[[__m256; 2]; ROWS]) {
    for quarter in 0..2 {
        let column = half * 16 + quarter * 8;
        let mask = lanes(tile.num_columns, column);
        for (row, sums) in sums.iter().enumerate() {
            let mut sum = sums[quarter];
            // SAFETY: the mask leaves only columns of `out` and of the bias.
            unsafe {
                if !tile.bias.is_null() {
                    sum = _mm256_add_ps(sum, _mm256_maskload_ps(tile.bias.wrapping_add(column), mask));
                }
                let out = tile.out.add(row * tile.out_stride).wrapping_add(column);
                _mm256_maskstore_ps(out, mask, sum);
            }
        }
    }
}
