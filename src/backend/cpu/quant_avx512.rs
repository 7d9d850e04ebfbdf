//! Integer register tiles with AVX-512 VNNI: up to 6 rows of x by the 32 outputs of a panel, or one row by 4 panels.
//!
//! The instruction multiplies unsigned by signed bytes, so weights are unsigned codes and what a code of 0 stands for
//! (a power of two) times the sum of x's codes is where the integer sum starts.

#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::super::DType;
use super::float_avx512::unroll;
use super::quant_tile::{QuantKernel, QuantTile};
use super::quantize::{NEGATED_SUMS, RECORD_WORDS, SCALE, SCALED_SUM};

/// Most rows a tile has.
pub(super) const MAX_ROWS: usize = 6;
/// Panels a one-row tile takes at a time. So many streams keep the hardware's own prefetch busy: asking for lines as well
/// costs a tenth.
pub(super) const STREAMS: usize = 4;

/// How far ahead weights are asked for where there is one stream.
const PREFETCH_BYTES: usize = 1536;

/// How a format lies in a panel; constants in types, so that each kernel has only its own code.
trait Format {
    /// Two weights a byte.
    const NIBBLES: bool = false;
    /// Q4_1, Q5_1, Q4_K, Q5_K.
    const HAS_MINIMUM: bool = false;
    /// Blocks of 256 with sub-scales.
    const IS_K_QUANT: bool = false;
    /// Scales are shared by 16.
    const HAS_HALVES: bool = false;
    /// Log2 of what is to be subtracted from a code; 0 for nothing.
    const BIAS_SHIFT: u32 = 0;
}

struct Q4_0;
struct Q4_1;
struct Q5_0;
struct Q5_1;
struct Q8_0;
struct Q4K;
struct Q5K;
struct Q6K;

impl Format for Q4_0 {
    const NIBBLES: bool = true;
    const BIAS_SHIFT: u32 = 3;
}
impl Format for Q4_1 {
    const NIBBLES: bool = true;
    const HAS_MINIMUM: bool = true;
}
impl Format for Q5_0 {
    const BIAS_SHIFT: u32 = 4;
}
impl Format for Q5_1 {
    const HAS_MINIMUM: bool = true;
}
impl Format for Q8_0 {
    const BIAS_SHIFT: u32 = 7;
}
impl Format for Q4K {
    const NIBBLES: bool = true;
    const HAS_MINIMUM: bool = true;
    const IS_K_QUANT: bool = true;
}
impl Format for Q5K {
    const HAS_MINIMUM: bool = true;
    const IS_K_QUANT: bool = true;
}
impl Format for Q6K {
    const IS_K_QUANT: bool = true;
    const HAS_HALVES: bool = true;
    const BIAS_SHIFT: u32 = 5;
}

/// The kernel for `num_rows` rows and `num_panels` (1, or [`STREAMS`] for one row) panels of `dtype`.
pub(super) fn quant_kernel(dtype: DType, num_rows: usize, num_panels: usize) -> QuantKernel {
    let kernel = match dtype {
        DType::Q4_0 => kernel_of::<Q4_0>,
        DType::Q4_1 => kernel_of::<Q4_1>,
        DType::Q5_0 => kernel_of::<Q5_0>,
        DType::Q5_1 => kernel_of::<Q5_1>,
        DType::Q8_0 => kernel_of::<Q8_0>,
        DType::Q4K => kernel_of::<Q4K>,
        DType::Q5K => kernel_of::<Q5K>,
        DType::Q6K => kernel_of::<Q6K>,
        DType::F32 | DType::F16 | DType::BF16 | DType::I32 | DType::F8E4M3 => {
            unreachable!("{dtype} is not quantised")
        }
    };
    kernel(num_rows, num_panels)
}

fn kernel_of<F: Format>(num_rows: usize, num_panels: usize) -> QuantKernel {
    match (num_rows, num_panels) {
        (1, STREAMS) => tile::<F, 1, STREAMS>,
        (1, 1) => tile::<F, 1, 1>,
        (2, 1) => tile::<F, 2, 1>,
        (3, 1) => tile::<F, 3, 1>,
        (4, 1) => tile::<F, 4, 1>,
        (5, 1) => tile::<F, 5, 1>,
        (6, 1) => tile::<F, 6, 1>,
        (rows, panels) => unreachable!("no AVX-512 tile of {rows} quantised rows by {panels} panels"),
    }
}

/// Sums of products of 32 (or, of Q6_K, 16) codes of every panel, and what they add to the outputs. `$codes` and `$scales`
/// take a panel.
macro_rules! add_part {
    ($F:ident, $ROWS:ident, $PANELS:ident, $sums:ident, $x:ident, $codes:expr, $scales:expr, $vectors:expr, $negated:expr) => {
        let mut integers = [[[_mm512_setzero_si512(); 2]; $PANELS]; $ROWS];
        if $F::BIAS_SHIFT > 0 {
            unroll!(ROW in $ROWS => {
                let negated = _mm512_set1_epi32(*$x.add(($negated) * $ROWS + ROW) as i32);
                let start = _mm512_sll_epi32(negated, _mm_cvtsi32_si128($F::BIAS_SHIFT as i32));
                integers[ROW] = [[start; 2]; $PANELS];
            });
        }
        if $F::NIBBLES {
            let low = _mm512_set1_epi8(15);
            for vector in 0..4 {
                unroll!(PANEL in $PANELS => {
                    let codes = $codes(PANEL).add(vector * 64);
                    let pairs = [_mm512_loadu_si512(codes.cast()), _mm512_loadu_si512(codes.add(256).cast())];
                    let values = [_mm512_and_si512(pairs[0], low), _mm512_and_si512(pairs[1], low)];
                    add_products!($ROWS, integers, PANEL, $x, vector, values);
                    let values = [
                        _mm512_and_si512(_mm512_srli_epi16::<4>(pairs[0]), low),
                        _mm512_and_si512(_mm512_srli_epi16::<4>(pairs[1]), low),
                    ];
                    add_products!($ROWS, integers, PANEL, $x, vector + 4, values);
                });
            }
        } else {
            for vector in $vectors {
                unroll!(PANEL in $PANELS => {
                    let codes = $codes(PANEL).add(vector * 64);
                    let values = [_mm512_loadu_si512(codes.cast()), _mm512_loadu_si512(codes.add(512).cast())];
                    add_products!($ROWS, integers, PANEL, $x, vector, values);
                });
            }
        }
        unroll!(PANEL in $PANELS => {
            let scales: [__m512; 2] = $scales(PANEL);
            unroll!(ROW in $ROWS => {
                let x_scale = _mm512_castsi512_ps(_mm512_set1_epi32(*$x.add(SCALE * $ROWS + ROW) as i32));
                let low = _mm512_cvtepi32_ps(integers[ROW][PANEL][0]);
                let high = _mm512_cvtepi32_ps(integers[ROW][PANEL][1]);
                $sums[ROW][PANEL][0] = _mm512_fmadd_ps(low, _mm512_mul_ps(scales[0], x_scale), $sums[ROW][PANEL][0]);
                $sums[ROW][PANEL][1] = _mm512_fmadd_ps(high, _mm512_mul_ps(scales[1], x_scale), $sums[ROW][PANEL][1]);
            });
        });
    };
}

/// Products of the codes of 4 elements, for 32 outputs, with every row's.
macro_rules! add_products {
    ($ROWS:ident, $integers:ident, $panel:ident, $x:ident, $vector:expr, $values:ident) => {
        unroll!(ROW in $ROWS => {
            let x = _mm512_set1_epi32(*$x.add(($vector) * $ROWS + ROW) as i32);
            $integers[ROW][$panel][0] = _mm512_dpbusd_epi32($integers[ROW][$panel][0], $values[0], x);
            $integers[ROW][$panel][1] = _mm512_dpbusd_epi32($integers[ROW][$panel][1], $values[1], x);
        });
    };
}

/// # Safety
/// As for [`QuantKernel`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn tile<F: Format, const ROWS: usize, const PANELS: usize>(tile: &QuantTile) {
    let subs_per_block = if F::IS_K_QUANT { 8 } else { 1 };
    let code_bytes = if F::NIBBLES { 512 } else { 1024 };
    // SAFETY: x has `num_blocks` records of `ROWS` rows, each panel its blocks, as `packed.rs` lays them out, and the
    // masks leave only columns of `out` and the bias; prefetching never faults.
    unsafe {
        let mut sums = [[[_mm512_setzero_ps(); 2]; PANELS]; ROWS];
        let (mut x, mut at) = (tile.x, tile.weights);
        for _ in 0..tile.num_blocks / subs_per_block {
            let start = at;
            let block_scales = |panel: usize| {
                let scales = start.add(panel * tile.panel_bytes);
                [widen_f16(scales), widen_f16(scales.add(32))]
            };
            let block_offsets = |panel: usize| {
                let offsets = start.add(panel * tile.panel_bytes + 64);
                [widen_f16(offsets), widen_f16(offsets.add(32))]
            };
            at = at.add(if F::HAS_MINIMUM { 128 } else { 64 });
            for _ in 0..subs_per_block {
                if PANELS == 1 {
                    prefetch(at, code_bytes);
                }
                let first = at;
                let header = |panel: usize| first.add(panel * tile.panel_bytes);
                let codes = |panel: usize| header(panel).add(if F::IS_K_QUANT { 64 } else { 0 });
                if F::HAS_HALVES {
                    let scales = |panel| signed_scales(header(panel), block_scales(panel));
                    add_part!(F, ROWS, PANELS, sums, x, codes, scales, 0..4, NEGATED_SUMS + 1);
                    let scales = |panel| signed_scales(header(panel).add(32), block_scales(panel));
                    add_part!(F, ROWS, PANELS, sums, x, codes, scales, 4..8, NEGATED_SUMS + 2);
                } else {
                    let scales = |panel| match F::IS_K_QUANT {
                        true => unsigned_scales(header(panel), block_scales(panel)),
                        false => block_scales(panel),
                    };
                    add_part!(F, ROWS, PANELS, sums, x, codes, scales, 0..8, NEGATED_SUMS);
                }
                if F::HAS_MINIMUM {
                    unroll!(PANEL in PANELS => {
                        let mut minima = block_offsets(PANEL);
                        if F::IS_K_QUANT {
                            let sign = _mm512_set1_ps(-0.0);
                            minima = unsigned_scales(header(PANEL).add(32), minima);
                            minima = [_mm512_xor_ps(minima[0], sign), _mm512_xor_ps(minima[1], sign)];
                        }
                        unroll!(ROW in ROWS => {
                            let sum = _mm512_castsi512_ps(_mm512_set1_epi32(*x.add(SCALED_SUM * ROWS + ROW) as i32));
                            sums[ROW][PANEL][0] = _mm512_fmadd_ps(minima[0], sum, sums[ROW][PANEL][0]);
                            sums[ROW][PANEL][1] = _mm512_fmadd_ps(minima[1], sum, sums[ROW][PANEL][1]);
                        });
                    });
                }
                x = x.add(RECORD_WORDS * ROWS);
                at = codes(0).add(code_bytes);
            }
        }
        unroll!(PANEL in PANELS => {
            unroll!(ROW in ROWS => {
                store(tile, ROW, PANEL * 32, sums[ROW][PANEL]);
            });
        });
    }
}

/// Adds the bias, if there is one, and writes a row's sums of the panel that starts at `column`.
///
/// # Safety
/// As for [`QuantKernel`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn store(tile: &QuantTile, row: usize, column: usize, sums: [__m512; 2]) {
    for (first, mut sum) in [column, column + 16].into_iter().zip(sums) {
        let mask = column_mask(tile.num_columns, first);
        // SAFETY: the mask leaves only columns of `out` and of the bias.
        unsafe {
            if !tile.bias.is_null() {
                sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, tile.bias.wrapping_add(first)));
            }
            _mm512_mask_storeu_ps(tile.out.add(row * tile.out_stride).wrapping_add(first), mask, sum);
        }
    }
}

fn column_mask(num_columns: usize, first: usize) -> __mmask16 {
    let left = num_columns.saturating_sub(first);
    if left >= 16 { 0xffff } else { (1u16 << left) - 1 }
}

/// # Safety
/// 32 bytes can be read.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn widen_f16(source: *const u8) -> __m512 {
    // SAFETY: the caller's promise.
    _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(source.cast()) })
}

/// 32 unsigned bytes times the blocks' scales.
///
/// # Safety
/// 32 bytes can be read.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn unsigned_scales(source: *const u8, scales: [__m512; 2]) -> [__m512; 2] {
    // SAFETY: the caller's promise.
    let bytes = unsafe { [_mm_loadu_si128(source.cast()), _mm_loadu_si128(source.add(16).cast())] };
    [
        _mm512_mul_ps(scales[0], _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes[0]))),
        _mm512_mul_ps(scales[1], _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes[1]))),
    ]
}

/// 32 signed bytes times the blocks' scales.
///
/// # Safety
/// 32 bytes can be read.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn signed_scales(source: *const u8, scales: [__m512; 2]) -> [__m512; 2] {
    // SAFETY: the caller's promise.
    let bytes = unsafe { [_mm_loadu_si128(source.cast()), _mm_loadu_si128(source.add(16).cast())] };
    [
        _mm512_mul_ps(scales[0], _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes[0]))),
        _mm512_mul_ps(scales[1], _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes[1]))),
    ]
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn prefetch(weights: *const u8, num_bytes: usize) {
    for line in 0..num_bytes / 64 + 1 {
        _mm_prefetch::<_MM_HINT_T0>(weights.wrapping_add(PREFETCH_BYTES + line * 64).cast());
    }
}
