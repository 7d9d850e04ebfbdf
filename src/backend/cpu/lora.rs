//! Low-rank updates of a projection's output, for all adapters of a step at once.
//!
//! Two passes. Shrink: `y = x A^T` for every row of every group, a task per group, few ranks and up to 64 rows. Expand:
//! `out += scale y B^T`, a task per stripe of columns, which walks the groups in their order, so that no two threads
//! write one number and a row's sums do not depend on how the work was cut. Where no two groups have a row in common, and
//! there are enough of them, one task does both for a group, and threads meet once. Of each row, a product of `A` is one chain in
//! order of 32-number groups, a product of `B` one chain in order of rank; ranks are never filled up.

#![allow(unsafe_code)]

use std::ops::Range;

use super::disjoint::DisjointSlice;
use super::lora_matrix::{CpuLora, CpuLoraPart, GROUP, GroupedRow};
use super::simd::{Kernel, LANES, Simd, dispatch};
use super::{Isa, ThreadPool};

/// Rows that are shrunk together.
const PIECE_ROWS: usize = 64;
/// Ranks that a task of the first pass takes.
const TASK_RANKS: usize = 8;
/// Ranks whose sums are kept in registers together.
const TILE_RANKS: usize = 4;
/// Columns whose sums are kept in registers together; tasks of the second pass take whole multiples.
const TILE_COLUMNS: usize = 2 * GROUP;
/// The most pieces between two expansions; keeps the tasks of a pass countable.
const MAX_PIECES: usize = 256;
/// The most shrunk numbers between two expansions: every piece of the largest rank fits.
const MAX_SHRUNK: usize = 256 * 1024;
/// Work below this many multiplications is not worth waking other threads.
const MIN_PARALLEL_PRODUCTS: usize = 64 * 1024;

/// What stands between the passes; taken once and kept.
#[derive(Default)]
pub struct LoraScratch {
    shrunk: Vec<f32>,
    pieces: Vec<Piece>,
    /// By row of the step, the group that has it.
    owners: Vec<usize>,
}

/// Some rows of a group, under one part of its adapter.
struct Piece {
    group: usize,
    part: usize,
    /// Entries of the batch.
    entries: Range<usize>,
    /// Where its shrunk rows begin.
    shrunk_at: usize,
    /// The first of its tasks in the first pass.
    first_task: usize,
    /// Which columns of the output it adds to.
    columns: Range<usize>,
}

/// One adapter and the entries of its rows.
pub struct LoraRows<'a> {
    /// The adapter's update of this projection.
    pub update: &'a CpuLora,
    /// Which entries of `rows` and `scales`.
    pub entries: Range<usize>,
}

/// What is added to the output of one projection.
pub struct LoraWork<'a, G> {
    /// `[T, num_inputs]`.
    pub x: &'a [f32],
    /// Numbers in a row of `x`.
    pub num_inputs: usize,
    /// Rows of the step.
    pub rows: &'a [i32],
    /// What multiplies their updates.
    pub scales: &'a [f32],
    /// The groups, by number; `None` for those without an update here.
    pub group: G,
    /// How many there are.
    pub num_groups: usize,
}

impl LoraScratch {
    /// Takes the memory for steps of up to `max_rows` rows.
    pub(super) fn reserve(&mut self, max_rows: usize) {
        self.owners.reserve_exact(max_rows.saturating_sub(self.owners.len()));
        self.shrunk.resize(MAX_SHRUNK, 0.0);
        self.pieces.reserve_exact(MAX_PIECES.saturating_sub(self.pieces.capacity()));
    }
}

/// `out[row] += scale * scaling * (x[row] A^T) B^T` for every group's entries; `out` has rows of `num_outputs`.
pub fn add_lora<'a, G: Fn(usize) -> Option<LoraRows<'a>> + Sync>(
    pool: &mut ThreadPool,
    isa: Isa,
    scratch: &mut LoraScratch,
    work: &LoraWork<'_, G>,
    out: &mut [f32],
    num_outputs: usize,
) {
    scratch.reserve(work.x.len() / work.num_inputs);
    let mut run = Run { pool, isa, scratch, work, out, num_outputs, num_tasks: 0, num_shrunk: 0, num_products: 0 };
    for group in 0..work.num_groups {
        let Some(LoraRows { update, entries }) = (work.group)(group) else { continue };
        for (index, part) in update.parts.iter().enumerate() {
            assert_eq!(part.num_inputs, work.num_inputs, "an adapter takes what its projection takes");
            assert!(part.first_column + part.num_outputs <= num_outputs, "an adapter gives what its projection gives");
            for start in entries.clone().step_by(PIECE_ROWS) {
                run.push(group, index, part, start..entries.end.min(start + PIECE_ROWS));
            }
        }
    }
    run.flush();
}

struct Run<'a, 'w, G> {
    pool: &'a mut ThreadPool,
    isa: Isa,
    scratch: &'a mut LoraScratch,
    work: &'a LoraWork<'w, G>,
    out: &'a mut [f32],
    num_outputs: usize,
    num_tasks: usize,
    num_shrunk: usize,
    num_products: usize,
}

impl<'u, G: Fn(usize) -> Option<LoraRows<'u>> + Sync> Run<'_, '_, G> {
    fn push(&mut self, group: usize, part: usize, found: &CpuLoraPart, entries: Range<usize>) {
        let num_shrunk = entries.len() * found.rank;
        if self.scratch.pieces.len() == MAX_PIECES || self.num_shrunk + num_shrunk > MAX_SHRUNK {
            self.flush();
        }
        let (shrunk_at, first_task) = (self.num_shrunk, self.num_tasks);
        self.num_shrunk += num_shrunk;
        self.num_tasks += found.rank.div_ceil(TASK_RANKS);
        self.num_products += num_shrunk * (found.num_inputs + found.num_outputs);
        let columns = found.first_column..found.first_column + found.num_outputs;
        // A stripe of the second pass is the same columns of every part that writes there.
        let agrees =
            |other: &Range<usize>| *other == columns || other.end <= columns.start || columns.end <= other.start;
        let pieces = &mut self.scratch.pieces;
        assert!(
            pieces.iter().all(|other| agrees(&other.columns)),
            "adapters divide a projection into the same modules"
        );
        pieces.push(Piece { group, part, entries, shrunk_at, first_task, columns });
    }

    /// Runs both passes over the pieces so far.
    fn flush(&mut self) {
        match self.scratch.pieces.len() >= 2 * self.pool.num_threads() && self.rows_are_disjoint() {
            true => self.run_by_piece(),
            false => self.run_by_pass(),
        }
        self.scratch.pieces.clear();
        (self.num_tasks, self.num_shrunk, self.num_products) = (0, 0, 0);
    }

    /// Whether no row stands in two groups.
    fn rows_are_disjoint(&mut self) -> bool {
        let LoraScratch { pieces, owners, .. } = &mut *self.scratch;
        owners.clear();
        owners.resize(self.work.x.len() / self.work.num_inputs, usize::MAX);
        pieces.iter().all(|piece| {
            self.work.rows[piece.entries.clone()].iter().all(|row| {
                let owner = &mut owners[*row as usize];
                let is_free = *owner == usize::MAX || *owner == piece.group;
                *owner = piece.group;
                is_free
            })
        })
    }

    /// Both passes of a piece in one task: it has its columns of its rows to itself.
    fn run_by_piece(&mut self) {
        let LoraScratch { shrunk, pieces, .. } = &mut *self.scratch;
        let passes = Passes::new(self.work, self.isa, &mut shrunk[..self.num_shrunk], self.out, self.num_outputs);
        in_tasks(self.pool, pieces.len(), self.num_products < MIN_PARALLEL_PRODUCTS, |task| {
            let piece = &pieces[task];
            let Some(part) = passes.part_of(piece) else { return };
            passes.shrink(piece, part, 0..part.rank);
            passes.expand(piece, part, 0..part.num_outputs);
        });
    }

    /// All groups through one pass, then through the other.
    fn run_by_pass(&mut self) {
        let LoraScratch { shrunk, pieces, .. } = &mut *self.scratch;
        let is_small = self.num_products < MIN_PARALLEL_PRODUCTS;
        let passes = Passes::new(self.work, self.isa, &mut shrunk[..self.num_shrunk], self.out, self.num_outputs);
        in_tasks(self.pool, self.num_tasks, is_small, |task| {
            let piece = &pieces[pieces.partition_point(|piece| piece.first_task <= task) - 1];
            let Some(part) = passes.part_of(piece) else { return };
            let first = (task - piece.first_task) * TASK_RANKS;
            passes.shrink(piece, part, first..part.rank.min(first + TASK_RANKS));
        });
        let widths = pieces.iter().filter_map(|piece| passes.part_of(piece)).map(|part| part.num_outputs);
        let tiles = widths.max().unwrap_or(0).div_ceil(TILE_COLUMNS);
        let tiles_per_task = tiles.div_ceil(4 * self.pool.num_threads()).max(1);
        in_tasks(self.pool, tiles.div_ceil(tiles_per_task), is_small, |task| {
            let columns = task * tiles_per_task * TILE_COLUMNS..(task + 1) * tiles_per_task * TILE_COLUMNS;
            for piece in pieces.iter() {
                let Some(part) = passes.part_of(piece) else { continue };
                passes.expand(piece, part, columns.start..columns.end.min(part.num_outputs));
            }
        });
    }
}

/// What tasks of either pass work on.
struct Passes<'a, 'w, G> {
    work: &'a LoraWork<'w, G>,
    isa: Isa,
    shrunk: DisjointSlice<'a, f32>,
    out: DisjointSlice<'a, f32>,
    num_outputs: usize,
}

impl<'a, 'u, 'w, G: Fn(usize) -> Option<LoraRows<'u>> + Sync> Passes<'a, 'w, G> {
    fn new(work: &'a LoraWork<'w, G>, isa: Isa, shrunk: &'a mut [f32], out: &'a mut [f32], num_outputs: usize) -> Self {
        Self { work, isa, shrunk: DisjointSlice::new(shrunk), out: DisjointSlice::new(out), num_outputs }
    }

    fn part_of(&self, piece: &Piece) -> Option<&'u CpuLoraPart> {
        (self.work.group)(piece.group).map(|found| &found.update.parts[piece.part])
    }

    /// Some ranks of a piece, which no other task has.
    fn shrink(&self, piece: &Piece, part: &CpuLoraPart, ranks: Range<usize>) {
        let (work_x, rows) = (self.work.x, &self.work.rows[piece.entries.clone()]);
        let (target, target_at) = (&self.shrunk, piece.shrunk_at);
        dispatch(self.isa, Shrink { work_x, rows, part, ranks, target, target_at });
    }

    /// Some columns of a piece's part, in rows where no other task has them; all its ranks are shrunk.
    fn expand(&self, piece: &Piece, part: &CpuLoraPart, columns: Range<usize>) {
        // SAFETY: whoever shrank the piece is done, and nobody writes there now.
        let shrunk = unsafe { self.shrunk.read(piece.shrunk_at, piece.entries.len() * part.rank) };
        let (rows, scales) = (&self.work.rows[piece.entries.clone()], &self.work.scales[piece.entries.clone()]);
        dispatch(self.isa, Expand { shrunk, rows, scales, part, columns, out: &self.out, out_row: self.num_outputs });
    }
}

pub(super) fn in_tasks(pool: &mut ThreadPool, num_tasks: usize, is_small: bool, task: impl Fn(usize) + Sync) {
    match is_small {
        true => (0..num_tasks).for_each(task),
        false => pool.run(num_tasks, |index, _| task(index)),
    }
}

/// `target[row, rank] = x[row] . A[rank]` for some ranks of a piece.
struct Shrink<'a, 'x> {
    work_x: &'x [f32],
    rows: &'a [i32],
    part: &'a CpuLoraPart,
    ranks: Range<usize>,
    target: &'a DisjointSlice<'a, f32>,
    target_at: usize,
}

impl Kernel for Shrink<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.part.shrink.is_bf16() {
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
                self.part.shrink.row(next).prefetch::<BF16>(0, self.part.num_inputs.div_ceil(GROUP));
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
        let ranks: [GroupedRow; Q] = std::array::from_fn(|q| self.part.shrink.row(rank + q));
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

/// `out[row] += scale * shrunk[row] B^T` for some columns of a piece.
struct Expand<'a> {
    /// `[rows, rank]`.
    shrunk: &'a [f32],
    rows: &'a [i32],
    scales: &'a [f32],
    part: &'a CpuLoraPart,
    /// Of the part's own; the first is a multiple of [`TILE_COLUMNS`].
    columns: Range<usize>,
    out: &'a DisjointSlice<'a, f32>,
    /// Numbers in a row of `out`.
    out_row: usize,
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
        for column in self.columns.clone().step_by(TILE_COLUMNS) {
            // Every tile reads a little of every row.
            (0..self.part.rank).for_each(|step| self.part.expand.row(step).prefetch::<BF16>(column + TILE_COLUMNS, 2));
            let mut at = 0;
            while at < self.rows.len() {
                if S::IS_WIDE && at + 4 <= self.rows.len() {
                    self.tile::<S, BF16, 4>(s, at, column);
                    at += 4;
                } else {
                    self.tile::<S, BF16, 1>(s, at, column);
                    at += 1;
                }
            }
        }
    }

    /// `R` rows by 64 columns.
    #[inline(always)]
    fn tile<S: Simd, const BF16: bool, const R: usize>(&self, s: S, at: usize, column: usize) {
        let rank = self.part.rank;
        let y: [&[f32]; R] = std::array::from_fn(|row| &self.shrunk[(at + row) * rank..][..rank]);
        let mut sums = [[s.zero(); 4]; R];
        for step in 0..rank {
            let row = self.part.expand.row(step);
            // SAFETY: rows of `B^T` are filled up to whole tiles, and pages are kept as above.
            let (low, high) = unsafe { (row.group::<S, BF16>(s, column), row.group::<S, BF16>(s, column + GROUP)) };
            for (y, sums) in y.iter().zip(&mut sums) {
                let y = s.splat(y[step]);
                for (sum, b) in sums.iter_mut().zip([low[0], low[1], high[0], high[1]]) {
                    *sum = s.mul_add(y, b, *sum);
                }
            }
        }
        for (row, sums) in sums.into_iter().enumerate() {
            self.add(s, at + row, column, sums);
        }
    }

    /// Adds the sums of one row, as many as the part has columns.
    #[inline(always)]
    fn add<S: Simd>(&self, s: S, at: usize, column: usize, sums: [S::F32; 4]) {
        let factor = s.splat(self.scales[at] * self.part.scaling);
        let count = TILE_COLUMNS.min(self.columns.end - column);
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

#[cfg(test)]
#[path = "lora_tests.rs"]
mod tests;
