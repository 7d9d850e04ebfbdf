//! Low-rank updates in f32, for every instruction set and every type of adapter.
//!
//! Of each row, a product of `A` is one chain in order of 32-number groups, a product of `B` one chain in order of rank.

#![allow(unsafe_code)]

use std::ops::Range;

use super::disjoint::DisjointSlice;
use super::lora_matrix::{CpuLoraPart, GROUP, GroupedMatrix, GroupedRow};
use super::lora_panels::{PANEL_COLUMNS, STEP_BYTES};
use super::simd::{Kernel, LANES, Simd};

/// Ranks whose sums are kept in registers together.
const TILE_RANKS: usize = 4;

/// How far ahead a tile asks for `B`.
const PREFETCH_BYTES: usize = 2048;

/// Vectors of a panel.
const PANEL_VECTORS: usize = PANEL_COLUMNS / LANES;

/// `target[row, rank] = x[row] . A[rank]` for some ranks of a piece.
pub(super) struct Shrink<'a, 'x> {
    pub(super) work_x: &'x [f32],
    pub(super) rows: &'a [i32],
    pub(super) part: &'a CpuLoraPart,
    pub(super) a: &'a GroupedMatrix,
    pub(super) ranks: Range<usize>,
    pub(super) target: &'a DisjointSlice<'a, f32>,
    pub(super) target_at: usize,
}

impl Kernel for Shrink<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.a.is_bf16() {
            true => self.run_as::<S, true>(s),
            false => self.run_as::<S, false>(s),
        }
    }
}

impl Shrink<'_, '_> {
    #[inline(always)]
    fn run_as<S: Simd, const BF16: bool>(&self, s: S) {
        let mut rank = self.ranks.start;
        while rank < self.ranks.end {
            let count = TILE_RANKS.min(self.ranks.end - rank);
            // Rows are too short for the hardware's prefetch: the next ones arrive while these are multiplied.
            for next in rank + count..(rank + count + TILE_RANKS).min(self.ranks.end) {
                self.a.row(next).prefetch::<BF16>(0, self.part.num_inputs.div_ceil(GROUP));
            }
            let mut at = 0;
            while at < self.rows.len() {
                if S::IS_WIDE && count == TILE_RANKS && at + 4 <= self.rows.len() {
                    self.tile::<S, BF16, 4, TILE_RANKS>(s, at, rank);
                    at += 4;
                } else {
                    match count {
                        TILE_RANKS => self.tile::<S, BF16, 1, TILE_RANKS>(s, at, rank),
                        _ => (rank..rank + count).for_each(|rank| self.tile::<S, BF16, 1, 1>(s, at, rank)),
                    }
                    at += 1;
                }
            }
            rank += count;
        }
    }

    /// `R` rows by `Q` ranks.
    #[inline(always)]
    fn tile<S: Simd, const BF16: bool, const R: usize, const Q: usize>(&self, s: S, at: usize, rank: usize) {
        let len = self.part.num_inputs;
        let x: [&[f32]; R] = std::array::from_fn(|row| &self.work_x[self.rows[at + row] as usize * len..][..len]);
        let ranks: [GroupedRow; Q] = std::array::from_fn(|q| self.a.row(rank + q));
        let mut sums = [[s.zero(); Q]; R];
        for column in (0..len).step_by(GROUP) {
            // SAFETY: the stride of `A` is at least `len`, and who schedules keeps an adapter's pages while it is used.
            let a: [[S::F32; 2]; Q] = std::array::from_fn(|q| unsafe { ranks[q].group::<S, BF16>(s, column) });
            for (x, sums) in x.iter().zip(&mut sums) {
                // SAFETY: `x` is `len` numbers long, and `column` lies among them.
                let halves = unsafe { load_group(s, x.as_ptr().add(column), len - column) };
                for (a, sum) in a.iter().zip(sums) {
                    *sum = s.mul_add(halves[0], a[0], *sum);
                    *sum = s.mul_add(halves[1], a[1], *sum);
                }
            }
        }
        for (row, sums) in sums.into_iter().enumerate() {
            let start = self.target_at + (at + row) * self.part.rank + rank;
            // SAFETY: tasks have different ranks or pieces.
            let target = unsafe { self.target.part(start, Q) };
            for (target, sum) in target.iter_mut().zip(sums) {
                *target = s.reduce_add(sum);
            }
        }
    }
}

/// Numbers `[0, 32)` at `source`, zeros behind the first `count`.
///
/// # Safety
/// `count` numbers, or 32 if that is less, can be read there.
#[inline(always)]
unsafe fn load_group<S: Simd>(s: S, source: *const f32, count: usize) -> [S::F32; 2] {
    // SAFETY: the caller's promise; a second half that has no number is not looked at.
    unsafe {
        match count {
            GROUP.. => [s.load(source), s.load(source.add(LANES))],
            LANES.. => [s.load(source), s.load_first(source.add(LANES), count - LANES)],
            _ => [s.load_first(source, count), s.zero()],
        }
    }
}

/// `out[row] += scale * shrunk[row] B^T` for some panels of a piece.
pub(super) struct Expand<'a> {
    /// `[rows, rank]`.
    pub(super) shrunk: &'a [f32],
    pub(super) rows: &'a [i32],
    pub(super) scales: &'a [f32],
    pub(super) part: &'a CpuLoraPart,
    /// Of the part's own.
    pub(super) panels: Range<usize>,
    pub(super) out: &'a DisjointSlice<'a, f32>,
    /// Numbers in a row of `out`.
    pub(super) out_row: usize,
}

impl Kernel for Expand<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.part.expand.is_bf16() {
            true => self.run_as::<S, true>(s),
            false => self.run_as::<S, false>(s),
        }
    }
}

impl Expand<'_> {
    #[inline(always)]
    fn run_as<S: Simd, const BF16: bool>(&self, s: S) {
        for panel in self.panels.clone() {
            let mut at = 0;
            while at < self.rows.len() {
                if S::IS_WIDE && at + 4 <= self.rows.len() {
                    self.tile::<S, BF16, 4>(s, at, panel);
                    at += 4;
                } else {
                    self.tile::<S, BF16, 1>(s, at, panel);
                    at += 1;
                }
            }
        }
    }

    /// `R` rows by a panel.
    #[inline(always)]
    fn tile<S: Simd, const BF16: bool, const R: usize>(&self, s: S, at: usize, panel: usize) {
        let rank = self.part.rank;
        let y: [&[f32]; R] = std::array::from_fn(|row| &self.shrunk[(at + row) * rank..][..rank]);
        let mut sums = [[s.zero(); PANEL_VECTORS]; R];
        let mut step = 0;
        for strip in self.part.expand.strips(panel) {
            for words in (0..strip.num_steps).map(|step| strip.words.wrapping_add(step * STEP_BYTES)) {
                prefetch(s, words);
                // SAFETY: a step holds four vectors of words, and who schedules keeps an adapter's pages.
                unsafe {
                    if BF16 {
                        let low = std::array::from_fn(|vector| s.load_bf16_low(words.add(vector * 64)));
                        add_rank(s, &y, 2 * step, low, &mut sums);
                        // Behind an odd rank a zero fills up the pair.
                        if 2 * step + 1 < rank {
                            let high = std::array::from_fn(|vector| s.load_bf16_high(words.add(vector * 64)));
                            add_rank(s, &y, 2 * step + 1, high, &mut sums);
                        }
                    } else {
                        let b = std::array::from_fn(|vector| s.load(words.add(vector * 64).cast()));
                        add_rank(s, &y, step, b, &mut sums);
                    }
                }
                step += 1;
            }
        }
        for (row, sums) in sums.into_iter().enumerate() {
            self.add(s, at + row, panel * PANEL_COLUMNS, sums);
        }
    }

    /// Adds the sums of one row, as many as the part has columns.
    #[inline(always)]
    fn add<S: Simd>(&self, s: S, at: usize, column: usize, sums: [S::F32; PANEL_VECTORS]) {
        let factor = s.splat(self.scales[at] * self.part.scaling);
        let count = PANEL_COLUMNS.min(self.part.num_outputs - column);
        let start = self.rows[at] as usize * self.out_row + self.part.first_column + column;
        // SAFETY: tasks have different columns of a part, and parts have different columns.
        let out = unsafe { self.out.part(start, count) };
        for (out, sum) in out.chunks_mut(LANES).zip(sums) {
            // SAFETY: the chunk holds as many numbers as are read and written.
            unsafe {
                let old = s.load_first(out.as_ptr(), out.len());
                s.store_first(out.as_mut_ptr(), s.mul_add(factor, sum, old), out.len());
            }
        }
    }
}

/// Asks for what a tile reads soon: panels follow each other.
#[inline(always)]
fn prefetch<S: Simd>(s: S, words: *const u8) {
    for line in 0..STEP_BYTES / 64 {
        s.prefetch(words.wrapping_add(PREFETCH_BYTES + line * 64));
    }
}

/// Adds one rank's products.
#[inline(always)]
fn add_rank<S: Simd, const R: usize>(
    s: S,
    y: &[&[f32]; R],
    rank: usize,
    b: [S::F32; PANEL_VECTORS],
    sums: &mut [[S::F32; PANEL_VECTORS]; R],
) {
    for (y, sums) in y.iter().zip(sums) {
        let y = s.splat(y[rank]);
        for (sum, b) in sums.iter_mut().zip(b) {
            *sum = s.mul_add(y, b, *sum);
        }
    }
}
