//! A copy of packed weights with low-rank updates added: `W + sum of factor * B A`.
//!
//! A task takes one panel and some of its columns. Sums are kept in f32: of each number a product of `B` and `A` is one
//! chain in order of rank, the updates are added to the weight one after the other, and the sum is rounded once. So the
//! bits depend neither on how the work was cut nor on the instruction set. Rows without an update keep their numbers.

#![allow(unsafe_code)]

use std::ops::Range;

use super::disjoint::DisjointSlice;
use super::lora::in_tasks;
use super::lora_matrix::{CpuLora, CpuLoraPart, GROUP, ShrinkMatrix};
use super::packed::{HALF_ROWS, PANEL_ROWS, PackedMatrix, Segment, read_plain, write_plain};
use super::simd::{Kernel, LANES, Simd, dispatch};
use super::{Isa, ThreadPool, pool};
use crate::backend::{DType, ScaledUpdate};
use crate::{Result, invalid, unsupported};

/// Columns of a tile: sums that stay in the first-level cache.
const TILE: usize = GROUP;
/// Columns of a task, a multiple of [`TILE`].
const TASK_COLUMNS: usize = 8 * TILE;
/// Numbers below which it is not worth waking other threads.
const MIN_PARALLEL_NUMBERS: usize = 16 * 1024;

/// Sums of a tile, `[column][row]`.
type Sums = [[f32; PANEL_ROWS]; TILE];

/// An error unless sums can be rounded to the type of the weights.
pub(super) fn check(weight: &PackedMatrix) -> Result<()> {
    match weight.segments().iter().find(|segment| segment.dtype.is_quantised()) {
        Some(segment) => Err(unsupported!(
            "adapters cannot be merged into quantised weights ({}); they are applied beside them",
            segment.dtype
        )),
        None => Ok(()),
    }
}

/// Writes the panels of `target`, a copy of `weight`, that begin in `rows`.
pub(super) fn merge_rows(
    pool: &mut ThreadPool,
    isa: Isa,
    weight: &PackedMatrix,
    updates: &[ScaledUpdate<'_, CpuLora>],
    rows: Range<usize>,
    target: &mut PackedMatrix,
) -> Result<()> {
    check(weight)?;
    check_parts(weight, updates)?;
    if (target.num_rows(), target.num_columns(), target.num_bytes())
        != (weight.num_rows(), weight.num_columns(), weight.num_bytes())
    {
        return Err(invalid!("a copy of weights has their shape and their types"));
    }
    for segment in weight.segments() {
        let panels = panels_that_begin_in(segment, &rows);
        if !panels.is_empty() {
            merge_panels(pool, isa, weight, updates, segment, panels, target);
        }
    }
    Ok(())
}

fn check_parts(weight: &PackedMatrix, updates: &[ScaledUpdate<'_, CpuLora>]) -> Result<()> {
    let mut parts = updates.iter().flat_map(|scaled| &scaled.update.parts);
    let fits = |part: &CpuLoraPart| {
        part.num_inputs == weight.num_columns() && part.first_column + part.num_outputs <= weight.num_rows()
    };
    match parts.find(|part| !fits(part)) {
        Some(part) => Err(invalid!(
            "an update of [{}, {}] at row {} does not fit weights of [{}, {}]",
            part.num_outputs,
            part.num_inputs,
            part.first_column,
            weight.num_rows(),
            weight.num_columns()
        )),
        None => Ok(()),
    }
}

fn panels_that_begin_in(segment: &Segment, rows: &Range<usize>) -> Range<usize> {
    let first_from = |row: usize| row.saturating_sub(segment.first_row).div_ceil(PANEL_ROWS).min(segment.num_panels());
    first_from(rows.start)..first_from(rows.end)
}

fn merge_panels(
    pool: &mut ThreadPool,
    isa: Isa,
    weight: &PackedMatrix,
    updates: &[ScaledUpdate<'_, CpuLora>],
    segment: &Segment,
    panels: Range<usize>,
    target: &mut PackedMatrix,
) {
    let column_bytes = segment.dtype.block_bytes() * PANEL_ROWS;
    let columns = segment.panel_bytes / column_bytes;
    let chunks = columns.div_ceil(TASK_COLUMNS);
    let num_chunks = panels.len() * chunks;
    let chunks_per_task = num_chunks.div_ceil(pool::MAX_TASKS);
    let is_small = panels.len() * PANEL_ROWS * columns < MIN_PARALLEL_NUMBERS;
    let source = weight.panels(segment);
    let shared = DisjointSlice::new(target.panels_mut(segment));
    in_tasks(pool, num_chunks.div_ceil(chunks_per_task), is_small, |task| {
        for chunk in task * chunks_per_task..num_chunks.min((task + 1) * chunks_per_task) {
            let (panel, first) = (panels.start + chunk / chunks, chunk % chunks * TASK_COLUMNS);
            let last = columns.min(first + TASK_COLUMNS);
            let (start, len) = (panel * segment.panel_bytes + first * column_bytes, (last - first) * column_bytes);
            let first_row = segment.first_row + panel * PANEL_ROWS;
            let num_rows = PANEL_ROWS.min(segment.num_rows - panel * PANEL_ROWS);
            // SAFETY: chunks are different columns of different panels.
            let target = unsafe { shared.part(start, len) };
            let source = &source[start..start + len];
            let rows = first_row..first_row + num_rows;
            dispatch(isa, MergeChunk { updates, dtype: segment.dtype, rows, columns: first..last, source, target });
        }
    });
}

/// Some columns of a panel.
struct MergeChunk<'a> {
    updates: &'a [ScaledUpdate<'a, CpuLora>],
    dtype: DType,
    /// Rows of the matrix that the panel has.
    rows: Range<usize>,
    /// The first is a multiple of [`TILE`].
    columns: Range<usize>,
    source: &'a [u8],
    target: &'a mut [u8],
}

/// An update as a panel sees it.
struct PanelUpdate<'a> {
    part: &'a CpuLoraPart,
    factor: f32,
    /// `[rank][32 rows]` of `B`; zeros for rows that are not updated.
    b: Vec<f32>,
}

impl Kernel for MergeChunk<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let updates: Vec<PanelUpdate<'_>> = self.panel_updates();
        let max_rank = updates.iter().map(|update| update.part.rank).max().unwrap_or(0);
        let mut a = vec![0.0; max_rank * TILE];
        let mut sums: Sums = [[0.0; PANEL_ROWS]; TILE];
        let tile_bytes = TILE * PANEL_ROWS * self.dtype.block_bytes();
        let tiles = self.source.chunks(tile_bytes).zip(self.target.chunks_mut(tile_bytes));
        for (column, (source, target)) in self.columns.clone().step_by(TILE).zip(tiles) {
            let num_columns = TILE.min(self.columns.end - column);
            for (k, sums) in sums[..num_columns].iter_mut().enumerate() {
                for (row, sum) in sums.iter_mut().enumerate() {
                    *sum = read_plain(self.dtype, source, row, k);
                }
            }
            for update in &updates {
                lay_out(s, update.part, column, &mut a);
                add(s, update, &a, &mut sums);
            }
            for (k, sums) in sums[..num_columns].iter().enumerate() {
                for (row, sum) in sums.iter().enumerate() {
                    write_plain(self.dtype, target, row, k, *sum);
                }
            }
        }
    }
}

impl<'a> MergeChunk<'a> {
    fn panel_updates(&self) -> Vec<PanelUpdate<'a>> {
        let parts = self.updates.iter().flat_map(|scaled| scaled.update.parts.iter().map(|part| (part, scaled.scale)));
        parts.filter_map(|(part, scale)| self.panel_update(part, scale)).collect()
    }

    /// `None` when no row of the panel is updated.
    fn panel_update(&self, part: &'a CpuLoraPart, scale: f32) -> Option<PanelUpdate<'a>> {
        let first = self.rows.start.max(part.first_column);
        let end = self.rows.end.min(part.first_column + part.num_outputs);
        if first >= end {
            return None;
        }
        let mut b = vec![0.0; part.rank * PANEL_ROWS];
        for (rank, b) in b.chunks_exact_mut(PANEL_ROWS).enumerate() {
            for row in first..end {
                // SAFETY: who merges keeps the adapters' pages.
                b[row - self.rows.start] = unsafe { part.expand.number(rank, row - part.first_column) };
            }
        }
        Some(PanelUpdate { part, factor: scale * part.scaling, b })
    }
}

/// Puts columns `[column, column + 32)` of `A` into `a`, `[rank][32]`.
#[inline(always)]
fn lay_out<S: Simd>(s: S, part: &CpuLoraPart, column: usize, a: &mut [f32]) {
    let ShrinkMatrix::Multiplied(shrink) = &part.shrink else { unreachable!("embeddings are not merged into") };
    for (rank, a) in a.chunks_exact_mut(TILE).take(part.rank).enumerate() {
        let row = shrink.row(rank);
        // SAFETY: columns of a panel are filled up to no more than those of `A` are; `a` has 32 numbers; who merges keeps
        // the adapters' pages.
        unsafe {
            let [low, high] = match shrink.is_bf16() {
                true => row.group::<S, true>(s, column),
                false => row.group::<S, false>(s, column),
            };
            s.store(a.as_mut_ptr(), low);
            s.store(a.as_mut_ptr().add(LANES), high);
        }
    }
}

#[inline(always)]
fn add<S: Simd>(s: S, update: &PanelUpdate<'_>, a: &[f32], sums: &mut Sums) {
    let width = if S::IS_WIDE { 8 } else { 2 };
    for first in (0..TILE).step_by(width) {
        match S::IS_WIDE {
            true => add_columns::<S, 8>(s, update, a, first, sums),
            false => add_columns::<S, 2>(s, update, a, first, sums),
        }
    }
}

/// `N` columns by 32 rows.
#[inline(always)]
fn add_columns<S: Simd, const N: usize>(s: S, update: &PanelUpdate<'_>, a: &[f32], first: usize, sums: &mut Sums) {
    let mut products = [[s.zero(); 2]; N];
    for (a, b) in a.chunks_exact(TILE).zip(update.b.chunks_exact(PANEL_ROWS)) {
        // SAFETY: `b` has 32 numbers.
        let b = unsafe { [s.load(b.as_ptr()), s.load(b.as_ptr().add(HALF_ROWS))] };
        for (products, a) in products.iter_mut().zip(&a[first..first + N]) {
            let a = s.splat(*a);
            for (product, b) in products.iter_mut().zip(b) {
                *product = s.mul_add(a, b, *product);
            }
        }
    }
    let factor = s.splat(update.factor);
    for (products, sums) in products.into_iter().zip(&mut sums[first..first + N]) {
        for (product, sums) in products.into_iter().zip(sums.chunks_exact_mut(HALF_ROWS)) {
            // SAFETY: half a panel's rows are 16 numbers.
            unsafe {
                let old = s.load(sums.as_ptr());
                s.store(sums.as_mut_ptr(), s.mul_add(factor, product, old));
            }
        }
    }
}

#[cfg(test)]
#[path = "lora_merge_tests.rs"]
mod tests;
