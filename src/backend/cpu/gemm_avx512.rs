//! Register tiles with AVX-512: up to 12 rows of x by 32 outputs, in 24 of the 32 registers.

#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::super::DType;
use super::float_tile::{FloatKernel, FloatTile};

/// Most rows a tile has.
pub(super) const MAX_ROWS: usize = 12;
/// Panels a one-row tile takes at a time: independent sums hide the latency, independent streams feed the memory.
pub(super) const STREAMS: usize = 4;

const BF16: u8 = 0;
const F16: u8 = 1;
const F32: u8 = 2;

/// How far ahead a one-row tile asks for weights: the hardware's own prefetch ends at each 4 KiB.
const PREFETCH_BYTES: usize = 1024;

macro_rules! kernels {
    ($tile:ident, $rows:expr, $panels:expr, [$($format:expr),*]) => {
        match ($rows, $panels) {
            (1, 1) => $tile::<$($format,)* 1, 1>,
            (1, STREAMS) => $tile::<$($format,)* 1, STREAMS>,
            (2, 1) => $tile::<$($format,)* 2, 1>,
            (3, 1) => $tile::<$($format,)* 3, 1>,
            (4, 1) => $tile::<$($format,)* 4, 1>,
            (5, 1) => $tile::<$($format,)* 5, 1>,
            (6, 1) => $tile::<$($format,)* 6, 1>,
            (7, 1) => $tile::<$($format,)* 7, 1>,
            (8, 1) => $tile::<$($format,)* 8, 1>,
            (9, 1) => $tile::<$($format,)* 9, 1>,
            (10, 1) => $tile::<$($format,)* 10, 1>,
            (11, 1) => $tile::<$($format,)* 11, 1>,
            (12, 1) => $tile::<$($format,)* 12, 1>,
            (rows, panels) => unreachable!("no AVX-512 tile of {rows} rows by {panels} panels"),
        }
    };
}

/// The kernel for `num_rows` rows of x and `num_panels` (1, or [`STREAMS`] for one row) panels of `dtype`.
pub(super) fn float_kernel(dtype: DType, num_rows: usize, num_panels: usize) -> FloatKernel {
    match dtype {
        DType::BF16 => kernels!(tile, num_rows, num_panels, [BF16]),
        DType::F16 => kernels!(tile, num_rows, num_panels, [F16]),
        _ => kernels!(tile, num_rows, num_panels, [F32]),
    }
}

/// The same for bf16 weights and bf16 x with dot-product instructions.
pub(super) fn bf16_dot_kernel(num_rows: usize, num_panels: usize) -> FloatKernel {
    kernels!(dot_tile, num_rows, num_panels, [])
}

/// Bytes of 16 rows of a pair of `k`.
const fn half_bytes(format: u8) -> usize {
    if format == F32 { 128 } else { 64 }
}

/// The weights of 16 rows at the even (`ODD` false) or odd `k` of a pair.
///
/// # Safety
/// [`half_bytes`] can be read at `weights`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn decode<const FORMAT: u8, const ODD: bool>(weights: *const u8) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe {
        match FORMAT {
            BF16 => {
                let pairs = _mm512_loadu_si512(weights.cast());
                let wide = if ODD {
                    _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32 as i32))
                } else {
                    _mm512_slli_epi32::<16>(pairs)
                };
                _mm512_castsi512_ps(wide)
            }
            F16 => _mm512_cvtph_ps(_mm256_loadu_si256(weights.add(32 * ODD as usize).cast())),
            _ => _mm512_loadu_ps(weights.add(64 * ODD as usize).cast()),
        }
    }
}

/// # Safety
/// As for [`FloatKernel`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn tile<const FORMAT: u8, const ROWS: usize, const PANELS: usize>(tile: &FloatTile) {
    // SAFETY: x has `num_pairs` pairs of `ROWS` values and each of the panels `num_pairs` pairs of 32; prefetching
    // never faults.
    unsafe {
        let mut sums = load_sums::<ROWS, PANELS>(tile);
        let (mut x, mut weights) = (tile.x, tile.weights);
        for _ in 0..tile.num_pairs {
            if ROWS <= 2 {
                prefetch::<FORMAT, PANELS>(weights, tile.panel_bytes);
            }
            step::<FORMAT, false, ROWS, PANELS>(&mut sums, x, weights, tile.panel_bytes);
            step::<FORMAT, true, ROWS, PANELS>(&mut sums, x.add(ROWS), weights, tile.panel_bytes);
            x = x.add(2 * ROWS);
            weights = weights.add(2 * half_bytes(FORMAT));
        }
        store_sums::<ROWS, PANELS>(tile, &sums);
    }
}

/// Adds the products of one `k`.
///
/// # Safety
/// As for [`FloatKernel`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn step<const FORMAT: u8, const ODD: bool, const ROWS: usize, const PANELS: usize>(
    sums: &mut [[[__m512; 2]; PANELS]; ROWS],
    x: *const f32,
    weights: *const u8,
    panel_bytes: usize,
) {
    let mut decoded = [[_mm512_setzero_ps(); 2]; PANELS];
    for (panel, halves) in decoded.iter_mut().enumerate() {
        for (half, value) in halves.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            *value = unsafe { decode::<FORMAT, ODD>(weights.add(panel * panel_bytes + half * half_bytes(FORMAT))) };
        }
    }
    for (row, sums) in sums.iter_mut().enumerate() {
        // SAFETY: x has `ROWS` values for this `k`.
        let x = _mm512_set1_ps(unsafe { *x.add(row) });
        for (sums, values) in sums.iter_mut().zip(&decoded) {
            sums[0] = _mm512_fmadd_ps(x, values[0], sums[0]);
            sums[1] = _mm512_fmadd_ps(x, values[1], sums[1]);
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn prefetch<const FORMAT: u8, const PANELS: usize>(weights: *const u8, panel_bytes: usize) {
    for panel in 0..PANELS {
        for line in 0..half_bytes(FORMAT) / 32 {
            let ahead = weights.wrapping_add(panel * panel_bytes + PREFETCH_BYTES + line * 64);
            _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
        }
    }
}

/// # Safety
/// As for [`FloatKernel`], x being `[num_pairs][ROWS][2]` bf16.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn dot_tile<const ROWS: usize, const PANELS: usize>(tile: &FloatTile) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = load_sums::<ROWS, PANELS>(tile);
        let (mut x, mut weights) = (tile.x.cast::<i32>(), tile.weights);
        for _ in 0..tile.num_pairs {
            if ROWS <= 2 {
                prefetch::<BF16, PANELS>(weights, tile.panel_bytes);
            }
            let mut pairs = [[_mm512_setzero_si512(); 2]; PANELS];
            for (panel, halves) in pairs.iter_mut().enumerate() {
                halves[0] = _mm512_loadu_si512(weights.add(panel * tile.panel_bytes).cast());
                halves[1] = _mm512_loadu_si512(weights.add(panel * tile.panel_bytes + 64).cast());
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let x = bf16_lanes(_mm512_set1_epi32(*x.add(row)));
                for (sums, pairs) in sums.iter_mut().zip(&pairs) {
                    sums[0] = _mm512_dpbf16_ps(sums[0], x, bf16_lanes(pairs[0]));
                    sums[1] = _mm512_dpbf16_ps(sums[1], x, bf16_lanes(pairs[1]));
                }
            }
            x = x.add(ROWS);
            weights = weights.add(128);
        }
        store_sums::<ROWS, PANELS>(tile, &sums);
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn bf16_lanes(bits: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits without invalid values.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(bits) }
}

/// The lanes of half `half` of panel `panel` that have a column of `out`.
#[inline]
fn lanes(num_columns: usize, panel: usize, half: usize) -> __mmask16 {
    let left = num_columns.saturating_sub(panel * 32 + half * 16);
    if left >= 16 { 0xffff } else { (1u16 << left) - 1 }
}

/// Zeros, or what `out` holds when the tile resumes.
///
/// # Safety
/// As for [`FloatKernel`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn load_sums<const ROWS: usize, const PANELS: usize>(tile: &FloatTile) -> [[[__m512; 2]; PANELS]; ROWS] {
    let mut sums = [[[_mm512_setzero_ps(); 2]; PANELS]; ROWS];
    if tile.resume {
        for (row, sums) in sums.iter_mut().enumerate() {
            for (panel, halves) in sums.iter_mut().enumerate() {
                for (half, sum) in halves.iter_mut().enumerate() {
                    // SAFETY: the mask leaves only columns of `out`.
                    unsafe {
                        let out = tile.out.add(row * tile.out_stride).wrapping_add(panel * 32 + half * 16);
                        *sum = _mm512_maskz_loadu_ps(lanes(tile.num_columns, panel, half), out);
                    }
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
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn store_sums<const ROWS: usize, const PANELS: usize>(tile: &FloatTile, sums: &[[[__m512; 2]; PANELS]; ROWS]) {
    for panel in 0..PANELS {
        for half in 0..2 {
            let (mask, column) = (lanes(tile.num_columns, panel, half), panel * 32 + half * 16);
            for (row, sums) in sums.iter().enumerate() {
                let mut sum = sums[panel][half];
                // SAFETY: the mask leaves only columns of `out` and of the bias.
                unsafe {
                    if !tile.bias.is_null() {
                        sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, tile.bias.wrapping_add(column)));
                    }
                    let out = tile.out.add(row * tile.out_stride).wrapping_add(column);
                    _mm512_mask_storeu_ps(out, mask, sum);
                }
            }
        }
    }
}

/// Widens `num_pairs` pairs of `k` of a bf16 or f16 panel to the layout of an f32 one.
///
/// # Safety
/// The instructions are there, 128 bytes a pair can be read from `source` and 64 numbers a pair written to `target`.
pub(super) unsafe fn expand(dtype: DType, source: *const u8, num_pairs: usize, target: *mut f32) {
    // SAFETY: the caller's promise.
    unsafe {
        match dtype {
            DType::BF16 => expand_halves::<BF16>(source, 2 * num_pairs, target),
            DType::F16 => expand_halves::<F16>(source, 2 * num_pairs, target),
            _ => unreachable!("{dtype} panels are not expanded"),
        }
    }
}

/// # Safety
/// As for [`expand`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn expand_halves<const FORMAT: u8>(source: *const u8, num_halves: usize, target: *mut f32) {
    for half in 0..num_halves {
        // SAFETY: the caller's promise.
        unsafe {
            let source = source.add(half * half_bytes(FORMAT));
            _mm512_storeu_ps(target.add(half * 32), decode::<FORMAT, false>(source));
            _mm512_storeu_ps(target.add(half * 32 + 16), decode::<FORMAT, true>(source));
        }
    }
}
