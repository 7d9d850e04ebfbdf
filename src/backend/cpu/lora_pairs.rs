//! Low-rank updates with dot products of bf16 pairs (AVX-512 BF16).
//!
//! x is rounded to bf16, as it is for the products with the weights; shrunk rows are summed in f32, multiplied by their
//! factor, and rounded. Of each row, a product of `A` is 16 chains in order of groups, added by halves; a product of `B`
//! one chain in order of pairs of ranks, added to the output once. So a row's bits depend on that row alone.

#![allow(unsafe_code)]
// Rows and vectors of a register tile are told apart by constants, so that the arrays become registers.
#![allow(clippy::needless_range_loop)]
// `unroll` leaves branches that are never taken, with indices behind the last.
#![allow(clippy::out_of_bounds_indexing)]

use std::arch::x86_64::*;
use std::array;
use std::ops::Range;

use super::bf16_rounding::{low_lanes, rounded};
use super::disjoint::DisjointSlice;
use super::float_avx512::{bf16_lanes, unroll};
use super::line::Line;
use super::lora_matrix::{CpuLoraPart, GROUP, GroupedMatrix};
use super::lora_panels::{PANEL_COLUMNS, STEP_BYTES};
use super::simd::LANES;

/// Most rows of a tile.
const TILE_ROWS: usize = 4;
/// Ranks of a tile.
const TILE_RANKS: usize = 4;
/// Vectors of a panel.
const VECTORS: usize = PANEL_COLUMNS / LANES;
/// Bytes of `B` that stay in the first-level cache while all rows of a piece pass by.
const BLOCK_BYTES: usize = 16 << 10;
/// How far ahead a tile asks for `B`: panels follow each other.
const PREFETCH_BYTES: usize = 4 << 10;

/// Where number `i` of 32 comes from: a word holds number `i` and number `16 + i`, as a group of `A` does.
const GROUP_ORDER: [u16; GROUP] = {
    let mut order = [0; GROUP];
    let mut at = 0;
    while at < GROUP {
        order[at] = (at / 2 + at % 2 * LANES) as u16;
        at += 1;
    }
    order
};

/// Rounds a row to bf16 and lays it out in groups, a line each, zeros behind the last number.
///
/// # Safety
/// The machine has AVX-512 F, BW and BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) unsafe fn round(x: &[f32], target: &mut [Line]) {
    debug_assert_eq!(x.len().div_ceil(GROUP), target.len());
    // SAFETY: it has 32 numbers of 16 bits.
    let order = unsafe { _mm512_loadu_si512(GROUP_ORDER.as_ptr().cast()) };
    for (x, line) in x.chunks(GROUP).zip(target) {
        let masks = [low_lanes(x.len()), low_lanes(x.len().saturating_sub(LANES))];
        // SAFETY: the masks leave numbers of the row, and a line is 64 aligned bytes.
        unsafe {
            let low = _mm512_maskz_loadu_ps(masks[0], x.as_ptr());
            let high = _mm512_maskz_loadu_ps(masks[1], x.as_ptr().wrapping_add(LANES));
            let words = _mm512_permutexvar_epi16(order, rounded(low, high));
            _mm512_store_si512((&raw mut *line).cast(), words);
        }
    }
}

/// `target[row, rank] = factor of the row * (x[row] . A[rank])` for some ranks of a piece, pairs of ranks in a word.
pub(super) struct Shrink<'a> {
    /// Every row of the step, rounded.
    pub(super) x: &'a [Line],
    pub(super) row_lines: usize,
    pub(super) rows: &'a [i32],
    pub(super) scales: &'a [f32],
    pub(super) part: &'a CpuLoraPart,
    pub(super) a: &'a GroupedMatrix,
    /// Begins with an even one.
    pub(super) ranks: Range<usize>,
    /// `[rows, rank / 2 rounded up]` from `target_at` on.
    pub(super) target: &'a DisjointSlice<'a, f32>,
    pub(super) target_at: usize,
}

impl Shrink<'_> {
    /// # Safety
    /// The machine has AVX-512 F, BW, DQ, VL and BF16; nobody else has the words of these ranks, or writes the adapter's
    /// pages.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub(super) unsafe fn run(&self) {
        for rank in self.ranks.clone().step_by(TILE_RANKS) {
            for at in (0..self.rows.len()).step_by(TILE_ROWS) {
                // SAFETY: the caller's promise.
                unsafe {
                    match self.rows.len() - at {
                        1 => self.tile::<1>(at, rank),
                        2 => self.tile::<2>(at, rank),
                        3 => self.tile::<3>(at, rank),
                        _ => self.tile::<TILE_ROWS>(at, rank),
                    }
                }
            }
        }
    }

    /// `R` rows by four ranks; those behind the last are computed as the last is, and not kept.
    ///
    /// # Safety
    /// As for [`run`](Self::run).
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn tile<const R: usize>(&self, at: usize, rank: usize) {
        let last = self.ranks.end - 1;
        let row_of_a = |rank: usize| self.a.row(rank.min(last)).start();
        let a: [*const u8; TILE_RANKS] = array::from_fn(|q| row_of_a(rank + q));
        // Rows are too short for the hardware's prefetch: the next ones arrive while these are multiplied.
        let next: [*const u8; TILE_RANKS] = array::from_fn(|q| row_of_a(rank + TILE_RANKS + q));
        let x: [&[Line]; R] =
            array::from_fn(|row| &self.x[self.rows[at + row] as usize * self.row_lines..][..self.row_lines]);
        let mut sums = [[_mm512_setzero_ps(); TILE_RANKS]; R];
        for line in 0..self.row_lines {
            let mut groups = [bf16_lanes(_mm512_setzero_si512()); TILE_RANKS];
            // SAFETY: a row of `A` has as many groups as one of x has lines; prefetching never faults.
            unsafe {
                unroll!(Q in TILE_RANKS => {
                    groups[Q] = bf16_lanes(_mm512_loadu_si512(a[Q].add(line * 64).cast()));
                    _mm_prefetch::<_MM_HINT_T0>(next[Q].wrapping_add(line * 64).cast());
                });
                unroll!(ROW in R => {
                    let x = bf16_lanes(_mm512_load_si512(x[ROW].as_ptr().add(line).cast()));
                    unroll!(Q in TILE_RANKS => {
                        sums[ROW][Q] = _mm512_dpbf16_ps(sums[ROW][Q], x, groups[Q]);
                    });
                });
            }
        }
        unroll!(ROW in R => {
            // SAFETY: the caller's promise.
            unsafe { self.keep(at + ROW, rank, sums[ROW]) };
        });
    }

    /// Writes the words of one row.
    ///
    /// # Safety
    /// As for [`run`](Self::run).
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn keep(&self, at: usize, rank: usize, sums: [__m512; TILE_RANKS]) {
        let count = TILE_RANKS.min(self.ranks.end - rank);
        let factor = _mm_set1_ps(self.scales[at] * self.part.scaling);
        let shrunk = _mm_maskz_mul_ps(low_lanes(count) as __mmask8, added(sums), factor);
        // SAFETY: both types are 128 bits without invalid values.
        let words = unsafe { std::mem::transmute::<__m128bh, __m128i>(_mm_cvtneps_pbh(shrunk)) };
        let words = _mm_cvtsi128_si64(words) as u64;
        let start = self.target_at + at * self.part.rank.div_ceil(2) + rank / 2;
        // SAFETY: the caller's promise.
        let target = unsafe { self.target.part(start, count.div_ceil(2)) };
        for (pair, target) in target.iter_mut().enumerate() {
            *target = f32::from_bits((words >> (32 * pair)) as u32);
        }
    }
}

/// The sum of the lanes of each: halves are added until one lane is left.
#[inline]
#[target_feature(enable = "avx512f")]
fn added(sums: [__m512; TILE_RANKS]) -> __m128 {
    let [a, b, c, d] = sums;
    let halves =
        [(a, b), (c, d)].map(|(a, b)| [_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b)]);
    let eights = halves.map(|[low, high]| _mm512_add_ps(low, high));
    let (low, high) =
        (_mm512_shuffle_f32x4::<0x88>(eights[0], eights[1]), _mm512_shuffle_f32x4::<0xdd>(eights[0], eights[1]));
    let fours = _mm512_add_ps(low, high);
    let twos = _mm512_add_ps(fours, _mm512_permute_ps::<0x4e>(fours));
    let ones = _mm512_add_ps(twos, _mm512_permute_ps::<0xb1>(twos));
    let first_of_four = _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
    _mm512_castps512_ps128(_mm512_permutexvar_ps(first_of_four, ones))
}

/// `out[row] += shrunk[row] B^T` for some panels of a piece.
pub(super) struct Expand<'a> {
    /// What [`Shrink`] wrote.
    pub(super) shrunk: &'a [f32],
    pub(super) rows: &'a [i32],
    pub(super) part: &'a CpuLoraPart,
    pub(super) panels: Range<usize>,
    pub(super) out: &'a DisjointSlice<'a, f32>,
    /// Numbers in a row of `out`.
    pub(super) out_row: usize,
}

impl Expand<'_> {
    /// # Safety
    /// The machine has AVX-512 F, BW, DQ, VL and BF16; nobody else has these columns of these rows, or writes the adapter's
    /// pages.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub(super) unsafe fn run(&self) {
        let per_block = (BLOCK_BYTES / self.part.expand.panel_bytes()).max(1);
        for first in self.panels.clone().step_by(per_block) {
            let panels = first..self.panels.end.min(first + per_block);
            for at in (0..self.rows.len()).step_by(TILE_ROWS) {
                // SAFETY: the caller's promise.
                unsafe {
                    match self.rows.len() - at {
                        1 => panels.clone().for_each(|panel| self.tile::<1>(at, panel)),
                        2 => panels.clone().for_each(|panel| self.tile::<2>(at, panel)),
                        3 => panels.clone().for_each(|panel| self.tile::<3>(at, panel)),
                        _ => panels.clone().for_each(|panel| self.tile::<TILE_ROWS>(at, panel)),
                    }
                }
            }
        }
    }

    /// `R` rows by a panel.
    ///
    /// # Safety
    /// As for [`run`](Self::run).
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn tile<const R: usize>(&self, at: usize, panel: usize) {
        let column = panel * PANEL_COLUMNS;
        let num_columns = PANEL_COLUMNS.min(self.part.num_outputs - column);
        let out: [*mut f32; R] = array::from_fn(|row| {
            let start = self.rows[at + row] as usize * self.out_row + self.part.first_column + column;
            // SAFETY: the caller's promise.
            unsafe { self.out.part(start, num_columns) }.as_mut_ptr()
        });
        // The lines of `out` arrive while the sums are made.
        for out in out {
            for vector in 0..VECTORS {
                _mm_prefetch::<_MM_HINT_T0>(out.wrapping_add(vector * LANES).cast());
            }
        }
        // SAFETY: the caller's promise.
        let sums = unsafe { self.sums::<R>(at, panel) };
        unroll!(ROW in R => {
            unroll!(V in VECTORS => {
                let mask = low_lanes(num_columns.saturating_sub(V * LANES));
                let out = out[ROW].wrapping_add(V * LANES);
                // SAFETY: the mask leaves columns of the part.
                unsafe { _mm512_mask_storeu_ps(out, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, out), sums[ROW][V])) };
            });
        });
    }

    /// # Safety
    /// As for [`run`](Self::run).
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn sums<const R: usize>(&self, at: usize, panel: usize) -> [[__m512; VECTORS]; R] {
        let num_pairs = self.part.rank.div_ceil(2);
        let mut y = self.shrunk[at * num_pairs..][..R * num_pairs].as_ptr().cast::<i32>();
        let mut sums = [[_mm512_setzero_ps(); VECTORS]; R];
        for strip in self.part.expand.strips(panel) {
            let mut words = strip.words;
            for _ in 0..strip.num_steps {
                // SAFETY: a step is a vector for each of the panel, and there is a word of `y` for each step of each row;
                // prefetching never faults.
                unsafe {
                    let mut pairs = [bf16_lanes(_mm512_setzero_si512()); VECTORS];
                    unroll!(V in VECTORS => {
                        pairs[V] = bf16_lanes(_mm512_loadu_si512(words.add(V * 64).cast()));
                        _mm_prefetch::<_MM_HINT_T0>(words.wrapping_add(PREFETCH_BYTES + V * 64).cast());
                    });
                    unroll!(ROW in R => {
                        let y = bf16_lanes(_mm512_set1_epi32(*y.add(ROW * num_pairs)));
                        unroll!(V in VECTORS => {
                            sums[ROW][V] = _mm512_dpbf16_ps(sums[ROW][V], y, pairs[V]);
                        });
                    });
                    (y, words) = (y.add(1), words.add(STEP_BYTES));
                }
            }
        }
        sums
    }
}
