//! Integer register tiles with AVX-512 VNNI: up to 6 rows of x by the 32 outputs of a panel.
//!
//! The instruction multiplies unsigned by signed bytes, so weights are unsigned codes and what a code of 0 stands for
//! (a power of two) times the sum of x's codes is where the integer sum starts.

#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::super::DType;
use super::quant_tile::{QuantKernel, QuantTile};
use super::quantize::{NEGATED_SUMS, RECORD_WORDS, SCALE, SCALED_SUM};

/// Most rows a tile has.
pub(super) const MAX_ROWS: usize = 6;

/// How far ahead weights are asked for.
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

/// The kernel for `num_rows` rows and one panel of `dtype`.
pub(super) fn quant_kernel(dtype: DType, num_rows: usize) -> QuantKernel {
    match dtype {
        DType::Q4_0 => kernel_of::<Q4_0>(num_rows),
        DType::Q4_1 => kernel_of::<Q4_1>(num_rows),
        DType::Q5_0 => kernel_of::<Q5_0>(num_rows),
        DType::Q5_1 => kernel_of::<Q5_1>(num_rows),
        DType::Q8_0 => kernel_of::<Q8_0>(num_rows),
        DType::Q4K => kernel_of::<Q4K>(num_rows),
        DType::Q5K => kernel_of::<Q5K>(num_rows),
        DType::Q6K => kernel_of::<Q6K>(num_rows),
        DType::F32 | DType::F16 | DType::BF16 | DType::I32 => unreachable!("{dtype} is not quantised"),
    }
}

fn kernel_of<F: Format>(num_rows: usize) -> QuantKernel {
    match num_rows {
        1 => tile::<F, 1>,
        2 => tile::<F, 2>,
        3 => tile::<F, 3>,
        4 => tile::<F, 4>,
        5 => tile::<F, 5>,
        6 => tile::<F, 6>,
        _ => unreachable!("no AVX-512 tile of {num_rows} quantised rows"),
    }
}

/// Repeats the body for `$row` in `[0, $count)` with constant indices: only then do the sums live in registers.
macro_rules! unroll {
    ($row:ident in $count:expr => $body:block) => {
        unroll!(@ $row $count, $body, 0 1 2 3 4 5)
    };
    (@ $row:ident $count:expr, $body:block, $($value:literal)*) => {
        $(if $value < $count {
            const $row: usize = $value;
            $body
        })*
    };
}

/// Sums of products of 32 (or, of Q6_K, 16) codes, and what they add to the outputs.
macro_rules! add_part {
    ($F:ident, $ROWS:ident, $sums:ident, $x:ident, $codes:ident, $scales:expr, $first:expr, $last:expr, $negated:expr) => {
        let mut integers = [[_mm512_setzero_si512(); 2]; $ROWS];
        if $F::BIAS_SHIFT > 0 {
            unroll!(ROW in $ROWS => {
                let negated = _mm512_set1_epi32(*$x.add(($negated) * $ROWS + ROW) as i32);
                let start = _mm512_sll_epi32(negated, _mm_cvtsi32_si128($F::BIAS_SHIFT as i32));
                integers[ROW] = [start, start];
            });
        }
        if $F::NIBBLES {
            let low = _mm512_set1_epi8(15);
            for vector in 0..4 {
                let pairs = [
                    _mm512_loadu_si512($codes.add(vector * 64).cast()),
                    _mm512_loadu_si512($codes.add(256 + vector * 64).cast()),
                ];
                let values = [_mm512_and_si512(pairs[0], low), _mm512_and_si512(pairs[1], low)];
                unroll!(ROW in $ROWS => {
                    let x = _mm512_set1_epi32(*$x.add(vector * $ROWS + ROW) as i32);
                    integers[ROW][0] = _mm512_dpbusd_epi32(integers[ROW][0], values[0], x);
                    integers[ROW][1] = _mm512_dpbusd_epi32(integers[ROW][1], values[1], x);
                });
                let values = [
                    _mm512_and_si512(_mm512_srli_epi16::<4>(pairs[0]), low),
                    _mm512_and_si512(_mm512_srli_epi16::<4>(pairs[1]), low),
                ];
                unroll!(ROW in $ROWS => {
                    let x = _mm512_set1_epi32(*$x.add((vector + 4) * $ROWS + ROW) as i32);
                    integers[ROW][0] = _mm512_dpbusd_epi32(integers[ROW][0], values[0], x);
                    integers[ROW][1] = _mm512_dpbusd_epi32(integers[ROW][1], values[1], x);
                });
            }
        } else {
            for vector in $first..$last {
                let values = [
                    _mm512_loadu_si512($codes.add(vector * 64).cast()),
                    _mm512_loadu_si512($codes.add(512 + vector * 64).cast()),
                ];
                unroll!(ROW in $ROWS => {
                    let x = _mm512_set1_epi32(*$x.add(vector * $ROWS + ROW) as i32);
                    integers[ROW][0] = _mm512_dpbusd_epi32(integers[ROW][0], values[0], x);
                    integers[ROW][1] = _mm512_dpbusd_epi32(integers[ROW][1], values[1], x);
                });
            }
        }
        let scales: [__m512; 2] = $scales;
        unroll!(ROW in $ROWS => {
            let x_scale = _mm512_castsi512_ps(_mm512_set1_epi32(*$x.add(SCALE * $ROWS + ROW) as i32));
            let low = _mm512_cvtepi32_ps(integers[ROW][0]);
            let high = _mm512_cvtepi32_ps(integers[ROW][1]);
            $sums[ROW][0] = _mm512_fmadd_ps(low, _mm512_mul_ps(scales[0], x_scale), $sums[ROW][0]);
            $sums[ROW][1] = _mm512_fmadd_ps(high, _mm512_mul_ps(scales[1], x_scale), $sums[ROW][1]);
        });
    };
}

/// # Safety
/// As for [`QuantKernel`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn tile<F: Format, const ROWS: usize>(tile: &QuantTile) {
    let subs_per_block = if F::IS_K_QUANT { 8 } else { 1 };
    let code_bytes = if F::NIBBLES { 512 } else { 1024 };
    // SAFETY: x has `num_blocks` records of `ROWS` rows, the panel its blocks, as `packed.rs` lays them out, and the
    // masks leave only columns of `out` and the bias; prefetching never faults.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
        let (mut x, mut at) = (tile.x, tile.weights);
        for _ in 0..tile.num_blocks / subs_per_block {
            let scales = [widen_f16(at), widen_f16(at.add(32))];
            let mut offsets = [_mm512_setzero_ps(); 2];
            if F::HAS_MINIMUM {
                offsets = [widen_f16(at.add(64)), widen_f16(at.add(96))];
            }
            at = at.add(if F::HAS_MINIMUM { 128 } else { 64 });
            for _ in 0..subs_per_block {
                prefetch(at, code_bytes);
                let header = at;
                let codes = if F::IS_K_QUANT { at.add(64) } else { at };
                if F::HAS_HALVES {
                    add_part!(F, ROWS, sums, x, codes, signed_scales(header, scales), 0, 4, NEGATED_SUMS + 1);
                    add_part!(F, ROWS, sums, x, codes, signed_scales(header.add(32), scales), 4, 8, NEGATED_SUMS + 2);
                } else {
                    let scales = || if F::IS_K_QUANT { unsigned_scales(header, scales) } else { scales };
                    add_part!(F, ROWS, sums, x, codes, scales(), 0, 8, NEGATED_SUMS);
                }
                if F::HAS_MINIMUM {
                    let minima = if F::IS_K_QUANT {
                        let minima = unsigned_scales(header.add(32), offsets);
                        let sign = _mm512_set1_ps(-0.0);
                        [_mm512_xor_ps(minima[0], sign), _mm512_xor_ps(minima[1], sign)]
                    } else {
                        offsets
                    };
                    unroll!(ROW in ROWS => {
                        let sum = _mm512_castsi512_ps(_mm512_set1_epi32(*x.add(SCALED_SUM * ROWS + ROW) as i32));
                        sums[ROW][0] = _mm512_fmadd_ps(minima[0], sum, sums[ROW][0]);
                        sums[ROW][1] = _mm512_fmadd_ps(minima[1], sum, sums[ROW][1]);
                    });
                }
                x = x.add(RECORD_WORDS * ROWS);
                at = codes.add(code_bytes);
            }
        }
        let masks = [0, 16].map(|first| column_mask(tile.num_columns, first));
        if !tile.bias.is_null() {
            let low = _mm512_maskz_loadu_ps(masks[0], tile.bias);
            let high = _mm512_maskz_loadu_ps(masks[1], tile.bias.wrapping_add(16));
            unroll!(ROW in ROWS => {
                sums[ROW][0] = _mm512_add_ps(sums[ROW][0], low);
                sums[ROW][1] = _mm512_add_ps(sums[ROW][1], high);
            });
        }
        unroll!(ROW in ROWS => {
            let out = tile.out.add(ROW * tile.out_stride);
            _mm512_mask_storeu_ps(out, masks[0], sums[ROW][0]);
            _mm512_mask_storeu_ps(out.wrapping_add(16), masks[1], sums[ROW][1]);
        });
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
