//! Products with quantised weights: from tasks to register tiles.

#![allow(unsafe_code)]

use std::ops::Range;

use super::super::DType;
use super::gemm::{BLOCK_BYTES, Family, Grouping, Target, grown, panels_of_segments, segments};
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
struct QuantGemm<'a> {
    isa: Isa,
    weights: &'a PackedMatrix,
    target: &'a Target,
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
    let num_panels: usize = segments(weights, isa, Family::Quantised).map(Segment::num_panels).sum();
    let Some(panel_bytes) = segments(weights, isa, Family::Quantised).map(|segment| segment.panel_bytes).max() else {
        return;
    };
    let row_words = row_words(weights);
    let plan = TilePlan::new(x.num_rows, max_rows(isa));
    let tiles = grown(scratch, x.num_rows * row_words, 0);
    quantise_tiles(pool, isa, x, weights.num_columns(), plan, tiles);
    let blocks = TilePlan::new(plan.num_tiles, (BLOCK_BYTES / (row_words * 4 * max_rows(isa))).max(1));
    let work = QuantGemm { isa, weights, target, plan, blocks, tiles, row_words };
    let streams = streams(isa, x.num_rows);
    let grouping = Grouping::new(num_panels, panel_bytes, streams, blocks.num_tiles, pool.num_threads());
    let tasks_per_block = grouping.num_tasks();
    pool.run(tasks_per_block * blocks.num_tiles, |task, _| {
        work.run(task / tasks_per_block, grouping.panels(task % tasks_per_block));
    });
}

/// Words of a quantised row of x.
pub(super) fn row_words(weights: &PackedMatrix) -> usize {
    weights.num_columns() / BLOCK * RECORD_WORDS
}

impl QuantGemm<'_> {
    /// Multiplies one block of rows by some panels, counted over the quantised segments.
    fn run(&self, block: usize, panels: Range<usize>) {
        let streams = streams(self.isa, self.plan.num_rows);
        for (segment, mut panels) in panels_of_segments(self.weights, self.isa, Family::Quantised, panels) {
            while !panels.is_empty() {
                let count = if panels.len() >= streams { streams } else { 1 };
                for tile in self.blocks.start(block)..self.blocks.start(block + 1) {
                    self.run_tile(segment, panels.start..panels.start + count, tile);
                }
                panels.start += count;
            }
        }
    }

    fn run_tile(&self, segment: &Segment, panels: Range<usize>, tile: usize) {
        let (start, rows) = (self.plan.start(tile), self.plan.rows(tile));
        let column = segment.first_row + panels.start * PANEL_ROWS;
        let x = &self.tiles[start * self.row_words..][..rows * self.row_words];
        let bytes = panels.start * segment.panel_bytes..panels.end * segment.panel_bytes;
        let weights = &self.weights.panels(segment)[bytes];
        let kernel = quant_kernel(self.isa, segment.dtype, rows, panels.len());
        // SAFETY: `gemm` checked the sizes of x, out and bias and that the instructions are there; tasks have
        // disjoint outputs.
        unsafe {
            kernel(&QuantTile {
                x: x.as_ptr(),
                weights: weights.as_ptr(),
                panel_bytes: segment.panel_bytes,
                dtype: segment.dtype,
                num_blocks: self.weights.num_columns() / BLOCK,
                out: self.target.out.add(start * self.target.stride + column),
                out_stride: self.target.stride,
                num_columns: (segment.num_rows - panels.start * PANEL_ROWS).min(panels.len() * PANEL_ROWS),
                bias: self.target.bias(column),
            });
        }
    }
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
