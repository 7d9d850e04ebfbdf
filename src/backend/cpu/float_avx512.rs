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

/// How far ahead a tile asks for weights: the hardware's own prefetch ends at each 4 KiB.
const PREFETCH_BYTES: usize = 1024;

/// Repeats the body for `$index` in `[0, $count)`, at most 12 times, each with a constant index: only then do the
/// accumulators live in registers.
macro_rules! unroll {
    ($index:ident in $count:expr => $body:block) => {
        unroll!(@ $index $count, $body, 0 1 2 3 4 5 6 7 8 9 10 11)
    };
    (@ $index:ident $count:expr, $body:block, $($value:literal)*) => {
        $(if $value < $count {
            const $index: usize = $value;
            $body
        })*
    };
}
pub(super) use unroll;

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

/// The sums a tile starts from: zeros, or what `out` holds when it resumes.
macro_rules! start_sums {
    ($sums:ident, $tile:ident, $rows:ident, $panels:ident) => {
        if $tile.resume {
            unroll!(PANEL in $panels => {
                let masks = lanes($tile.num_columns, PANEL);
                unroll!(ROW in $rows => {
                    let out = $tile.out.add(ROW * $tile.out_stride).wrapping_add(PANEL * 32);
                    $sums[ROW][PANEL][0] = _mm512_maskz_loadu_ps(masks[0], out);
                    $sums[ROW][PANEL][1] = _mm512_maskz_loadu_ps(masks[1], out.wrapping_add(16));
                });
            });
        }
    };
}

/// Adds the bias, if there is one, and writes the sums.
macro_rules! store_sums {
    ($sums:ident, $tile:ident, $rows:ident, $panels:ident) => {
        unroll!(PANEL in $panels => {
            let masks = lanes($tile.num_columns, PANEL);
            if !$tile.bias.is_null() {
                let bias = $tile.bias.wrapping_add(PANEL * 32);
                let low = _mm512_maskz_loadu_ps(masks[0], bias);
                let high = _mm512_maskz_loadu_ps(masks[1], bias.wrapping_add(16));
                unroll!(ROW in $rows => {
                    $sums[ROW][PANEL][0] = _mm512_add_ps($sums[ROW][PANEL][0], low);
                    $sums[ROW][PANEL][1] = _mm512_add_ps($sums[ROW][PANEL][1], high);
                });
            }
            unroll!(ROW in $rows => {
                let out = $tile.out.add(ROW * $tile.out_stride).wrapping_add(PANEL * 32);
                _mm512_mask_storeu_ps(out, masks[0], $sums[ROW][PANEL][0]);
                _mm512_mask_storeu_ps(out.wrapping_add(16), masks[1], $sums[ROW][PANEL][1]);
            });
        });
    };
}

/// # Safety
/// As for [`FloatKernel`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn tile<const FORMAT: u8, const ROWS: usize, const PANELS: usize>(tile: &FloatTile) {
    // SAFETY: x has `num_pairs` pairs of `ROWS` values, each of the panels `num_pairs` pairs of 32, and the masks
    // leave only columns of `out` and the bias; prefetching never faults.
    unsafe {
        // The lines of `out` arrive while the sums are made.
        unroll!(ROW in ROWS => {
            let out = tile.out.wrapping_add(ROW * tile.out_stride);
            _mm_prefetch::<_MM_HINT_T0>(out.cast());
            _mm_prefetch::<_MM_HINT_T0>(out.wrapping_add(16).cast());
        });
        let mut sums = [[[_mm512_setzero_ps(); 2]; PANELS]; ROWS];
        start_sums!(sums, tile, ROWS, PANELS);
        let (mut x, mut weights) = (tile.x, tile.weights);
        for _ in 0..tile.num_pairs {
            prefetch::<FORMAT, PANELS>(weights, tile.panel_bytes);
            if ROWS >= 4 {
                _mm_prefetch::<_MM_HINT_T0>(x.wrapping_add(128).cast());
                _mm_prefetch::<_MM_HINT_T0>(x.wrapping_add(144).cast());
            }
            let mut values = [[_mm512_setzero_ps(); 2]; PANELS];
            unroll!(PANEL in PANELS => {
                let weights = weights.add(PANEL * tile.panel_bytes);
                values[PANEL] = [decode::<FORMAT, false>(weights), decode::<FORMAT, false>(weights.add(half_bytes(FORMAT)))];
            });
            unroll!(ROW in ROWS => {
                let x = _mm512_set1_ps(*x.add(ROW));
                unroll!(PANEL in PANELS => {
                    sums[ROW][PANEL][0] = _mm512_fmadd_ps(x, values[PANEL][0], sums[ROW][PANEL][0]);
                    sums[ROW][PANEL][1] = _mm512_fmadd_ps(x, values[PANEL][1], sums[ROW][PANEL][1]);
                });
            });
            unroll!(PANEL in PANELS => {
                let weights = weights.add(PANEL * tile.panel_bytes);
                values[PANEL] = [decode::<FORMAT, true>(weights), decode::<FORMAT, true>(weights.add(half_bytes(FORMAT)))];
            });
            unroll!(ROW in ROWS => {
                let x = _mm512_set1_ps(*x.add(ROWS + ROW));
                unroll!(PANEL in PANELS => {
                    sums[ROW][PANEL][0] = _mm512_fmadd_ps(x, values[PANEL][0], sums[ROW][PANEL][0]);
                    sums[ROW][PANEL][1] = _mm512_fmadd_ps(x, values[PANEL][1], sums[ROW][PANEL][1]);
                });
            });
            x = x.add(2 * ROWS);
            weights = weights.add(2 * half_bytes(FORMAT));
        }
        store_sums!(sums, tile, ROWS, PANELS);
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
    // SAFETY: as in `tile`.
    unsafe {
        let mut sums = [[[_mm512_setzero_ps(); 2]; PANELS]; ROWS];
        start_sums!(sums, tile, ROWS, PANELS);
        let (mut x, mut weights) = (tile.x.cast::<i32>(), tile.weights);
        for _ in 0..tile.num_pairs {
            prefetch::<BF16, PANELS>(weights, tile.panel_bytes);
            let mut pairs = [[bf16_lanes(_mm512_setzero_si512()); 2]; PANELS];
            unroll!(PANEL in PANELS => {
                let weights = weights.add(PANEL * tile.panel_bytes);
                pairs[PANEL][0] = bf16_lanes(_mm512_loadu_si512(weights.cast()));
                pairs[PANEL][1] = bf16_lanes(_mm512_loadu_si512(weights.add(64).cast()));
            });
            unroll!(ROW in ROWS => {
                let x = bf16_lanes(_mm512_set1_epi32(*x.add(ROW)));
                unroll!(PANEL in PANELS => {
                    sums[ROW][PANEL][0] = _mm512_dpbf16_ps(sums[ROW][PANEL][0], x, pairs[PANEL][0]);
                    sums[ROW][PANEL][1] = _mm512_dpbf16_ps(sums[ROW][PANEL][1], x, pairs[PANEL][1]);
                });
            });
            x = x.add(ROWS);
            weights = weights.add(128);
        }
        store_sums!(sums, tile, ROWS, PANELS);
    }
}

/// Words as pairs of bf16.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn bf16_lanes(bits: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits without invalid values.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(bits) }
}

/// The lanes of the halves of panel `panel` that have a column of `out`.
#[inline]
fn lanes(num_columns: usize, panel: usize) -> [__mmask16; 2] {
    [0, 16].map(|first| {
        let left = num_columns.saturating_sub(panel * 32 + first);
        if left >= 16 { 0xffff } else { (1u16 << left) - 1 }
    })
}
