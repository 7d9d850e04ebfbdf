//! Products with bf16 weights on tile registers: from tasks to tiles.
//!
//! x is rounded to bf16 and laid out step by step. As in every multiply here an output is one chain of additions in the
//! order of `k`.

#![allow(unsafe_code)]

use std::arch::x86_64::*;
use std::ops::Range;

use half::bf16;

use super::amx::{PANEL_STRIDE, PanelPairProduct, STEP_BYTES, STEP_COLUMNS, TILE_ROWS, TileProduct, TileRegisters};
use super::amx_vector::{RowProduct, STREAMS};
use super::bf16_rounding::store_rounded;
use super::disjoint::DisjointSlice;
use super::gemm::{Family, Grouping, Part, Target, grown, panels_of_segments, segments};
use super::input_tiles::Rows;
use super::line::{Line, numbers_of};
use super::packed::{PANEL_ROWS, PackedMatrix, Segment};
use super::simd::LANES;
use super::{Isa, ThreadPool, pool};

/// Most rows of x in a tile product.
pub(super) const MAX_ROWS: usize = 2 * TILE_ROWS;
/// Most steps of `k` of one block, so that x of a tile stays in the cache while it meets several panels.
const BLOCK_STEPS: usize = 48;
/// With more rows than this a task is a block of rows by a group of panels; both stay in the second-level cache.
const MANY_ROWS: usize = 2 * MAX_ROWS;
pub(super) const BLOCK_ROWS: usize = 4 * MAX_ROWS;
const GROUP_PANELS: usize = 8;

/// A multiply, as every task sees it.
pub(super) struct AmxGemm<'a> {
    isa: Isa,
    weights: &'a PackedMatrix,
    /// x, tile by tile: `[num_steps][rows of the tile]`, a line for 32 bf16.
    lines: &'a [Line],
    num_rows: usize,
    num_steps: usize,
    /// Rows of a block.
    block_rows: usize,
}

pub(super) fn amx_gemm(
    pool: &mut ThreadPool,
    isa: Isa,
    x: Rows,
    weights: &PackedMatrix,
    target: &Target,
    scratch: &mut Vec<Line>,
) {
    if segments(weights, isa, Family::Tiles).next().is_some() {
        AmxGemm::new(pool, isa, x, weights, scratch).multiply(pool, target);
    }
}

/// Runs `task(block, panels, thread)` for all blocks of rows and groups of panels. Tasks that follow each other have the same
/// panels.
pub(super) fn for_each_block(
    pool: &mut ThreadPool,
    num_blocks: usize,
    num_panels: usize,
    group_panels: usize,
    task: impl Fn(usize, Range<usize>, usize) + Sync,
) {
    let groups_per_task = (num_blocks * num_panels.div_ceil(group_panels)).div_ceil(pool::MAX_TASKS);
    let group = group_panels * groups_per_task.max(1);
    pool.run(num_panels.div_ceil(group) * num_blocks, |index, thread| {
        let first = index / num_blocks * group;
        task(index % num_blocks, first..num_panels.min(first + group), thread);
    });
}

/// Panels a product takes at a time.
fn streams(num_rows: usize) -> usize {
    match num_rows {
        1 => STREAMS,
        ..=TILE_ROWS => 2,
        _ => 1,
    }
}

/// Lines of a row of x among `num_rows`.
pub(super) fn row_lines(weights: &PackedMatrix, num_rows: usize) -> usize {
    weights.num_columns().div_ceil(STEP_COLUMNS) * lines_per_step(num_rows)
}

/// Lines of a row for a step: 32 numbers as bf16, or as f32.
fn lines_per_step(num_rows: usize) -> usize {
    if num_rows == 1 { 2 } else { 1 }
}

impl<'a> AmxGemm<'a> {
    /// Lays x out. The machine has the instructions of [`Isa::Amx`].
    pub(super) fn new(
        pool: &mut ThreadPool,
        isa: Isa,
        x: Rows,
        weights: &'a PackedMatrix,
        scratch: &'a mut Vec<Line>,
    ) -> Self {
        let lines = grown(scratch, x.num_rows * row_lines(weights, x.num_rows), Line::ZERO);
        let num_steps = weights.num_columns().div_ceil(STEP_COLUMNS);
        lay_out(pool, x, weights.num_columns(), num_steps, lines);
        Self::of_lines(isa, lines, x.num_rows, weights)
    }

    /// Of x that is laid out.
    pub(super) fn of_lines(isa: Isa, lines: &'a [Line], num_rows: usize, weights: &'a PackedMatrix) -> Self {
        let num_steps = weights.num_columns().div_ceil(STEP_COLUMNS);
        let block_rows = if num_rows > MANY_ROWS { BLOCK_ROWS } else { num_rows };
        Self { isa, weights, lines, num_rows, num_steps, block_rows }
    }

    /// All rows by all panels of tiles.
    pub(super) fn multiply(&self, pool: &mut ThreadPool, target: &Target) {
        let segments = || segments(self.weights, self.isa, Family::Tiles);
        let num_panels = segments().map(Segment::num_panels).sum();
        let run = |block: usize, panels: Range<usize>| self.run(block, &[Part { panels, target, origin: (0, 0) }]);
        if self.num_rows > MANY_ROWS {
            return for_each_block(pool, self.num_blocks(), num_panels, GROUP_PANELS, |block, panels, _| {
                run(block, panels);
            });
        }
        let panel_bytes = segments().map(|segment| segment.panel_bytes).max().unwrap_or(1);
        let grouping = Grouping::new(num_panels, panel_bytes, streams(self.num_rows), 1, pool.num_threads());
        pool.run(grouping.num_tasks(), |task, _| run(0, grouping.panels(task)));
    }

    pub(super) fn num_blocks(&self) -> usize {
        self.num_rows.div_ceil(self.block_rows)
    }

    /// The rows of x in a block.
    pub(super) fn rows(&self, block: usize) -> Range<usize> {
        block * self.block_rows..self.num_rows.min((block + 1) * self.block_rows)
    }

    /// Multiplies one block of rows by some panels.
    pub(super) fn run(&self, block: usize, parts: &[Part]) {
        // SAFETY: whoever chose tiles checked that the instructions are there.
        let mut registers = unsafe { TileRegisters::new() };
        let rows = self.rows(block);
        let block_steps = self.num_steps.div_ceil(self.num_steps.div_ceil(BLOCK_STEPS));
        for first_step in (0..self.num_steps).step_by(block_steps) {
            let steps = first_step..self.num_steps.min(first_step + block_steps);
            for row in rows.clone().step_by(MAX_ROWS) {
                let rows = row..rows.end.min(row + MAX_ROWS);
                parts.iter().for_each(|part| self.run_tiles(part, rows.clone(), steps.clone(), &mut registers));
            }
        }
    }

    /// A tile of rows by all of some panels.
    fn run_tiles(&self, part: &Part, rows: Range<usize>, steps: Range<usize>, registers: &mut TileRegisters) {
        for (segment, mut panels) in panels_of_segments(self.weights, self.isa, Family::Tiles, part.panels.clone()) {
            while !panels.is_empty() {
                let count = if panels.len() >= streams(self.num_rows) { streams(self.num_rows) } else { 1 };
                let strip = panels.start..panels.start + count;
                self.run_tile(part, segment, strip, rows.clone(), steps.clone(), registers);
                panels.start += count;
            }
        }
    }

    fn run_tile(
        &self,
        part: &Part,
        segment: &Segment,
        panels: Range<usize>,
        rows: Range<usize>,
        steps: Range<usize>,
        registers: &mut TileRegisters,
    ) {
        let column = segment.first_row + panels.start * PANEL_ROWS;
        let num_columns = (segment.num_rows - panels.start * PANEL_ROWS).min(panels.len() * PANEL_ROWS);
        let bytes = &self.weights.panels(segment)[panels.start * segment.panel_bytes..];
        let lines = rows.len() * lines_per_step(self.num_rows);
        let x = &self.lines[rows.start * self.num_steps + steps.start * lines..][..steps.len() * lines];
        let Part { target, origin, .. } = part;
        // SAFETY: whoever made the target checked its size, and tasks have disjoint columns or rows of it.
        let out = unsafe { target.out.add((rows.start - origin.0) * target.stride + column - origin.1) };
        let strip = Strip {
            x: x.as_ptr().cast(),
            num_rows: rows.len(),
            is_alone: self.num_rows == 1,
            weights: bytes[steps.start * STEP_BYTES..].as_ptr(),
            num_panels: panels.len(),
            panel_bytes: segment.panel_bytes,
            num_steps: steps.len(),
            resume: steps.start > 0,
        };
        // SAFETY: x and the panels have the strip's sizes, `out` as many rows and `num_columns` columns.
        unsafe {
            if num_columns == panels.len() * PANEL_ROWS {
                strip.multiply(out, target.stride * 4, registers);
            } else {
                strip.multiply_partly(out, target.stride * 4, num_columns, registers);
            }
        }
        if steps.end == self.num_steps {
            // SAFETY: `out` has these rows and columns.
            unsafe { target.add_bias(column, out, rows.len(), num_columns) };
        }
    }
}

/// Rows of x by as many panels as a kernel takes, over some steps of `k`.
struct Strip {
    /// `[num_steps][num_rows][32]` bf16; of a row that is alone such numbers as f32.
    x: *const u8,
    num_rows: usize,
    /// Whether x has no other rows.
    is_alone: bool,
    weights: *const u8,
    num_panels: usize,
    panel_bytes: usize,
    num_steps: usize,
    /// Whether the output holds the sums over the `k` before.
    resume: bool,
}

impl Strip {
    /// # Safety
    /// x, the panels and `out`, `[num_rows][32 num_panels]` with `out_bytes` from row to row, have these sizes.
    unsafe fn multiply(&self, out: *mut f32, out_bytes: usize, registers: &mut TileRegisters) {
        let Strip { x, num_rows, is_alone, weights, num_panels, panel_bytes, num_steps, resume } = *self;
        // SAFETY: the caller's promise.
        unsafe {
            if is_alone {
                RowProduct { x: x.cast(), weights, num_panels, panel_bytes, num_steps, out, resume }.run();
            } else if num_panels == 2 {
                let panels = [weights, weights.add(panel_bytes)];
                PanelPairProduct { x, num_rows, panels, num_steps, out, out_bytes, resume }.run(registers);
            } else {
                let product = TileProduct {
                    a: x,
                    num_rows,
                    a_stride: STEP_COLUMNS * 2,
                    a_step: num_rows * STEP_COLUMNS * 2,
                    b: [weights, weights.add(PANEL_STRIDE / 2)],
                    b_stride: PANEL_STRIDE,
                    b_step: STEP_BYTES,
                    num_steps,
                    c: out,
                    c_stride: out_bytes,
                    resume,
                };
                product.run(registers);
            }
        }
    }

    /// The same where only `num_columns` columns have a place in `out`.
    ///
    /// # Safety
    /// As for [`Strip::multiply`], but for the columns of `out`.
    unsafe fn multiply_partly(
        &self,
        out: *mut f32,
        out_bytes: usize,
        num_columns: usize,
        registers: &mut TileRegisters,
    ) {
        let width = self.num_panels * PANEL_ROWS;
        let mut staging = [Line::ZERO; MAX_ROWS * PANEL_ROWS / LANES];
        let staged = numbers_of(&mut staging).as_mut_ptr();
        // SAFETY: the staging has room for the rows; `out` has `num_columns` columns.
        unsafe {
            for row in (0..self.num_rows).filter(|_| self.resume) {
                std::ptr::copy_nonoverlapping(out.byte_add(row * out_bytes), staged.add(row * width), num_columns);
            }
            self.multiply(staged, width * 4, registers);
            for row in 0..self.num_rows {
                std::ptr::copy_nonoverlapping(staged.add(row * width), out.byte_add(row * out_bytes), num_columns);
            }
        }
    }
}

/// Rounds x to bf16, to the nearest and ties to even, and lays it out as the products read it.
fn lay_out(pool: &mut ThreadPool, x: Rows, num_columns: usize, num_steps: usize, lines: &mut [Line]) {
    if x.num_rows == 1 {
        return round_one_row(x.row(0, num_columns), numbers_of(lines));
    }
    let shared = DisjointSlice::new(lines);
    let num_tiles = x.num_rows.div_ceil(MAX_ROWS);
    let round_tile = |tile: usize| {
        let rows = tile * MAX_ROWS..x.num_rows.min((tile + 1) * MAX_ROWS);
        // SAFETY: tiles are disjoint ranges of rows.
        let lines = unsafe { shared.part(rows.start * num_steps, rows.len() * num_steps) };
        for row in rows.clone() {
            // SAFETY: whoever chose tiles checked that the instructions are there.
            unsafe { round_row(x.row(row, num_columns), row - rows.start, rows.len(), lines) };
        }
    };
    if num_tiles == 1 {
        return round_tile(0);
    }
    let tiles_per_task = num_tiles.div_ceil(pool::MAX_TASKS);
    pool.run(num_tiles.div_ceil(tiles_per_task), |task, _| {
        (task * tiles_per_task..num_tiles.min((task + 1) * tiles_per_task)).for_each(round_tile);
    });
}

/// The same numbers as f32, zeros after the last column.
fn round_one_row(x: &[f32], numbers: &mut [f32]) {
    let (target, rest) = numbers.split_at_mut(x.len());
    target.iter_mut().zip(x).for_each(|(target, value)| *target = bf16::from_f32(*value).to_f32());
    rest.fill(0.0);
}

/// A row of a tile of `num_rows`: `[steps][num_rows]`.
///
/// # Safety
/// The machine has AVX-512 BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) unsafe fn round_row(x: &[f32], row: usize, num_rows: usize, lines: &mut [Line]) {
    for (values, line) in x.chunks(STEP_COLUMNS).zip(lines.iter_mut().skip(row).step_by(num_rows)) {
        let (low, high) = values.split_at(values.len().min(16));
        let mask = |len: usize| ((1u32 << len) - 1) as __mmask16;
        // SAFETY: only as many numbers are read as are there.
        unsafe {
            let low = _mm512_maskz_loadu_ps(mask(low.len()), low.as_ptr());
            let high = _mm512_maskz_loadu_ps(mask(high.len()), high.as_ptr());
            store_rounded(low, high, line);
        }
    }
}
