//! Products with quantised weights: from tasks to register tiles.

#![allow(unsafe_code)]

use std::ops::Range;

use super::super::DType;
use super::gemm::{BLOCK_BYTES, Family, Grouping, Part, Target, grown, panels_of_segments, segments};
use super::input_tiles::{Rows, TilePlan};
use super::packed::{PANEL_ROWS, PackedMatrix, Segment};
#[cfg(target_arch = "x86_64")]
use super::quant_avx2;
#[cfg(target_arch = "x86_64")]
use super::quant_avx512;
use super::quant_tile::{self, QuantKernel, QuantTile};
use super::quantize::{BLOCK, RECORD_WORDS, quantise_tiles};
use super::{Isa, ThreadPool};

/// A multiply, as every task sees it.
pub(super) struct QuantGemm<'a> {
    isa: Isa,
    weights: &'a PackedMatrix,
    plan: TilePlan,
    /// Tiles of one block of rows.
    blocks: TilePlan,
    tiles: &'a [u32],
    row_words: usize,
}

pub(super) fn quant_gemm(
    pool: &mut ThreadPool,
    isa: Isa,
    x: Rows,
    weights: &PackedMatrix,
    target: &Target,
    scratch: &mut Vec<u32>,
) {
    if segments(weights, isa, Family::Quantised).next().is_some() {
        QuantGemm::new(pool, isa, x, weights, scratch).multiply(pool, target);
    }
}

/// Words of a quantised row of x.
pub(super) fn row_words(weights: &PackedMatrix) -> usize {
    words_of(weights.num_columns())
}

/// Words of a quantised row of so many numbers.
pub(super) fn words_of(num_columns: usize) -> usize {
    num_columns / BLOCK * RECORD_WORDS
}

impl<'a> QuantGemm<'a> {
    /// Quantises x.
    pub(super) fn new(
        pool: &mut ThreadPool,
        isa: Isa,
        x: Rows,
        weights: &'a PackedMatrix,
        scratch: &'a mut Vec<u32>,
    ) -> Self {
        let tiles = grown(scratch, x.num_rows * row_words(weights), 0);
        quantise_tiles(pool, isa, x, weights.num_columns(), tile_plan(isa, x.num_rows), tiles);
        Self::of_tiles(isa, tiles, x.num_rows, weights)
    }

    /// Of x that is quantised.
    pub(super) fn of_tiles(isa: Isa, tiles: &'a [u32], num_rows: usize, weights: &'a PackedMatrix) -> Self {
        let (plan, row_words) = (tile_plan(isa, num_rows), row_words(weights));
        let blocks = TilePlan::new(plan.num_tiles, (BLOCK_BYTES / (row_words * 4 * max_rows(isa))).max(1));
        Self { isa, weights, plan, blocks, tiles, row_words }
    }

    /// The same in blocks of at most `num_rows` rows, which are more than a tile's.
    pub(super) fn in_blocks_of(self, num_rows: usize) -> Self {
        let most = self.blocks.num_rows.div_ceil(self.blocks.num_tiles).min(num_rows / max_rows(self.isa));
        Self { blocks: TilePlan::new(self.plan.num_tiles, most), ..self }
    }

    pub(super) fn num_blocks(&self) -> usize {
        self.blocks.num_tiles
    }

    /// The tiles of a block.
    pub(super) fn tiles(&self, block: usize) -> Range<usize> {
        self.blocks.start(block)..self.blocks.start(block + 1)
    }

    /// The rows of x in some tiles.
    pub(super) fn rows(&self, tiles: Range<usize>) -> Range<usize> {
        self.plan.start(tiles.start)..self.plan.start(tiles.end)
    }

    /// Cuts panels into tasks for each block, a task having `num_products` of each.
    pub(super) fn grouping(&self, pool: &ThreadPool, num_panels: usize, num_products: usize) -> Grouping {
        let segments = segments(self.weights, self.isa, Family::Quantised);
        let panel_bytes = num_products * segments.map(|segment| segment.panel_bytes).max().unwrap_or(1);
        let streams = streams(self.isa, self.plan.num_rows);
        Grouping::new(num_panels, panel_bytes, streams, self.num_blocks(), pool.num_threads())
    }

    /// All rows by all quantised panels.
    pub(super) fn multiply(&self, pool: &mut ThreadPool, target: &Target) {
        let num_panels = segments(self.weights, self.isa, Family::Quantised).map(Segment::num_panels).sum();
        let grouping = self.grouping(pool, num_panels, 1);
        let tasks_per_block = grouping.num_tasks();
        pool.run(tasks_per_block * self.num_blocks(), |task, _| {
            let panels = grouping.panels(task % tasks_per_block);
            self.run(task / tasks_per_block, &Part { panels, target, origin: (0, 0) });
        });
    }

    /// Multiplies one block of rows by some panels.
    pub(super) fn run(&self, block: usize, part: &Part) {
        let streams = streams(self.isa, self.plan.num_rows);
        for (segment, mut panels) in panels_of_segments(self.weights, self.isa, Family::Quantised, part.panels.clone())
        {
            while !panels.is_empty() {
                let count = if panels.len() >= streams { streams } else { 1 };
                for tile in self.tiles(block) {
                    self.run_tile(part, segment, panels.start..panels.start + count, tile);
                }
                panels.start += count;
            }
        }
    }

    fn run_tile(&self, part: &Part, segment: &Segment, panels: Range<usize>, tile: usize) {
        let Part { target, origin, .. } = part;
        let (start, rows) = (self.plan.start(tile), self.plan.rows(tile));
        let column = segment.first_row + panels.start * PANEL_ROWS;
        let x = &self.tiles[start * self.row_words..][..rows * self.row_words];
        let bytes = panels.start * segment.panel_bytes..panels.end * segment.panel_bytes;
        let weights = &self.weights.panels(segment)[bytes];
        let kernel = quant_kernel(self.isa, segment.dtype, rows, panels.len());
        // SAFETY: whoever called checked the sizes of x, out and bias and that the instructions are there; tasks have
        // disjoint outputs.
        unsafe {
            kernel(&QuantTile {
                x: x.as_ptr(),
                weights: weights.as_ptr(),
                panel_bytes: segment.panel_bytes,
                dtype: segment.dtype,
                num_blocks: self.weights.num_columns() / BLOCK,
                out: target.out.add((start - origin.0) * target.stride + column - origin.1),
                out_stride: target.stride,
                num_columns: (segment.num_rows - panels.start * PANEL_ROWS).min(panels.len() * PANEL_ROWS),
                bias: target.bias(column),
            });
        }
    }
}

fn tile_plan(isa: Isa, num_rows: usize) -> TilePlan {
    TilePlan::new(num_rows, max_rows(isa))
}

/// Panels a kernel takes at a time.
fn streams(isa: Isa, num_rows: usize) -> usize {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx if num_rows == 1 => quant_avx512::STREAMS,
        _ => 1,
    }
}

fn max_rows(isa: Isa) -> usize {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => quant_avx512::MAX_ROWS,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => quant_avx2::MAX_ROWS,
        _ => quant_tile::PORTABLE_ROWS,
    }
}

fn quant_kernel(isa: Isa, dtype: DType, num_rows: usize, num_panels: usize) -> QuantKernel {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => quant_avx512::quant_kernel(dtype, num_rows, num_panels),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => quant_avx2::quant_kernel(dtype, num_rows),
        _ => quant_tile::portable_kernel(num_rows),
    }
}
