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
use super::gemm::{Family, Grouping, Target, grown, panels_of_segments, segments};
use super::input_tiles::Rows;
use super::line::{Line, numbers_of};
use super::packed::{PANEL_ROWS, PackedMatrix, Segment};
use super::simd::LANES;
use super::{Isa, ThreadPool, pool};

/// Most rows of x in a tile product.
const MAX_ROWS: usize = 2 * TILE_ROWS;
/// Most steps of `k` of one block, so that x of a tile stays in the cache while it meets several panels.
const BLOCK_STEPS: usize = 48;
/// With more rows than this a task is a block of rows by a group of panels; both stay in the second-level cache.
const MANY_ROWS: usize = 2 * MAX_ROWS;
const BLOCK_ROWS: usize = 4 * MAX_ROWS;
const GROUP_PANELS: usize = 8;

/// A multiply, as every task sees it.
struct AmxGemm<'a> {
    isa: Isa,
    weights: &'a PackedMatrix,
    target: &'a Target,
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
    let num_panels: usize = segments(weights, isa, Family::Tiles).map(Segment::num_panels).sum();
    let Some(panel_bytes) = segments(weights, isa, Family::Tiles).map(|segment| segment.panel_bytes).max() else {
        return;
    };
    let num_steps = weights.num_columns().div_ceil(STEP_COLUMNS);
    let lines = grown(scratch, x.num_rows * row_lines(weights, x.num_rows), Line::ZERO);
    lay_out(pool, x, weights.num_columns(), num_steps, lines);
    let block_rows = if x.num_rows > MANY_ROWS { BLOCK_ROWS } else { x.num_rows };
    let work = AmxGemm { isa, weights, target, lines, num_rows: x.num_rows, num_steps, block_rows };
    let num_blocks = x.num_rows.div_ceil(block_rows);
    if x.num_rows > MANY_ROWS {
        let groups_per_task = (num_blocks * num_panels.div_ceil(GROUP_PANELS)).div_ceil(pool::MAX_TASKS);
        let group = GROUP_PANELS * groups_per_task;
        pool.run(num_panels.div_ceil(group) * num_blocks, |task, _| {
            let first = task / num_blocks * group;
            work.run(task % num_blocks, first..num_panels.min(first + group));
        });
        return;
    }
    let grouping = Grouping::new(num_panels, panel_bytes, streams(x.num_rows), 1, pool.num_threads());
    pool.run(grouping.num_tasks(), |task, _| work.run(0, grouping.panels(task)));
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

impl AmxGemm<'_> {
    /// Multiplies one block of rows by some panels, counted over the bf16 segments.
    fn run(&self, block: usize, panels: Range<usize>) {
        // SAFETY: `gemm` checked that the instructions are there.
        let mut registers = unsafe { TileRegisters::new() };
        let rows = block * self.block_rows..self.num_rows.min((block + 1) * self.block_rows);
        for (segment, panels) in panels_of_segments(self.weights, self.isa, Family::Tiles, panels) {
            let block_steps = self.num_steps.div_ceil(self.num_steps.div_ceil(BLOCK_STEPS));
            for first_step in (0..self.num_steps).step_by(block_steps) {
                let steps = first_step..self.num_steps.min(first_step + block_steps);
                for row in rows.clone().step_by(MAX_ROWS) {
                    let rows = row..rows.end.min(row + MAX_ROWS);
                    self.run_tiles(segment, panels.clone(), rows, steps.clone(), &mut registers);
                }
            }
        }
    }

    /// A tile of rows by all of some panels.
    fn run_tiles(
        &self,
        segment: &Segment,
        mut panels: Range<usize>,
        rows: Range<usize>,
        steps: Range<usize>,
        registers: &mut TileRegisters,
    ) {
        while !panels.is_empty() {
            let count = if panels.len() >= streams(self.num_rows) { streams(self.num_rows) } else { 1 };
            let strip = panels.start..panels.start + count;
            self.run_tile(segment, strip, rows.clone(), steps.clone(), registers);
            panels.start += count;
        }
    }

    fn run_tile(
        &self,
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
        // SAFETY: `gemm` checked the size of `out`, and tasks have disjoint columns or rows of it.
        let out = unsafe { self.target.out.add(rows.start * self.target.stride + column) };
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
                strip.multiply(out, self.target.stride * 4, registers);
            } else {
                strip.multiply_partly(out, self.target.stride * 4, num_columns, registers);
            }
        }
        if steps.end == self.num_steps {
            // SAFETY: `out` has these rows and columns.
            unsafe { self.target.add_bias(column, out, rows.len(), num_columns) };
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
            // SAFETY: `gemm` checked that the instructions are there.
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

/// # Safety
/// The machine has AVX-512 BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn round_row(x: &[f32], row: usize, num_rows: usize, lines: &mut [Line]) {
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
