//! Products with plain weights: from tasks to register tiles.

#![allow(unsafe_code)]

use std::ops::Range;

use super::super::DType;
#[cfg(target_arch = "x86_64")]
use super::float_avx2;
#[cfg(target_arch = "x86_64")]
use super::float_avx512;
use super::float_tile::{self, FloatKernel, FloatTile};
use super::gemm::{BLOCK_BYTES, Family, Grouping, Target, grown, panels_of_segments, segments};
#[cfg(target_arch = "x86_64")]
use super::input_tiles::pack_bf16_tiles;
use super::input_tiles::{Rows, TilePlan, pack_tiles};
use super::packed::{PANEL_ROWS, PackedMatrix, Segment};
use super::{Isa, ThreadPool};

/// Most `k` of one block: bounds the part of a panel that is used again for every tile.
const BLOCK_COLUMNS: usize = 1024;
/// x in tiles.
#[derive(Default)]
pub(super) struct Scratch {
    tiles: Vec<f32>,
    bf16_tiles: Vec<f32>,
}

/// A floating-point multiply, as every task sees it.
struct FloatGemm<'a> {
    isa: Isa,
    weights: &'a PackedMatrix,
    target: &'a Target,
    plan: TilePlan,
    /// Tiles of one block of rows.
    blocks: TilePlan,
    tiles: &'a [f32],
    bf16_tiles: &'a [f32],
    /// Pairs of `k`, and how many of them one step over `k` takes.
    num_pairs: usize,
    block_pairs: usize,
}

pub(super) fn float_gemm(
    pool: &mut ThreadPool,
    isa: Isa,
    x: Rows,
    weights: &PackedMatrix,
    target: &Target,
    scratch: &mut Scratch,
) {
    let num_panels: usize = segments(weights, isa, Family::Plain).map(Segment::num_panels).sum();
    if num_panels == 0 {
        return;
    }
    let num_columns = weights.num_columns();
    let (num_pairs, plan) = (num_columns.div_ceil(2), TilePlan::new(x.num_rows, max_rows(isa)));
    let block_pairs = num_pairs.div_ceil(num_pairs.div_ceil(BLOCK_COLUMNS / 2));
    let blocks = TilePlan::new(plan.num_tiles, (BLOCK_BYTES / (block_pairs * 8 * max_rows(isa))).max(1));
    scratch.prepare(pool, isa, x, weights, plan);
    let in_place = x.num_rows == 1 && num_columns.is_multiple_of(2);
    let work = FloatGemm {
        isa,
        weights,
        target,
        plan,
        blocks,
        tiles: if in_place { x.row(0, num_columns) } else { &scratch.tiles },
        bf16_tiles: &scratch.bf16_tiles,
        num_pairs,
        block_pairs,
    };
    let panel_bytes = segments(weights, isa, Family::Plain).map(|segment| segment.panel_bytes).max().unwrap_or(1);
    let streams = streams(isa, x.num_rows);
    let grouping = Grouping::new(num_panels, panel_bytes, streams, blocks.num_tiles, pool.num_threads());
    let tasks_per_block = grouping.num_tasks();
    pool.run(tasks_per_block * blocks.num_tiles, |task, _| {
        work.run(task / tasks_per_block, grouping.panels(task % tasks_per_block));
    });
}

/// Numbers of the widest row of x in each layout.
#[derive(Default)]
pub(super) struct RowLens {
    plain: usize,
    bf16: usize,
}

impl RowLens {
    fn plain(weights: &PackedMatrix) -> usize {
        weights.num_columns().next_multiple_of(2)
    }

    /// Pairs of bf16 take the place of a number.
    fn bf16(weights: &PackedMatrix) -> usize {
        weights.num_columns().div_ceil(2)
    }

    /// Widens them to what products with `weights` lay out.
    pub(super) fn note(&mut self, isa: Isa, weights: &PackedMatrix) {
        for segment in segments(weights, isa, Family::Plain) {
            if uses_bf16_dot(isa, segment.dtype) {
                self.bf16 = self.bf16.max(Self::bf16(weights));
            } else {
                self.plain = self.plain.max(Self::plain(weights));
            }
        }
    }
}

impl Scratch {
    pub(super) fn reserve(&mut self, row_lens: &RowLens, max_rows: usize) {
        self.tiles.reserve_exact(max_rows * row_lens.plain);
        self.bf16_tiles.reserve_exact(max_rows * row_lens.bf16);
    }

    /// Lays out x as the kernels for these weights read it.
    fn prepare(&mut self, pool: &mut ThreadPool, isa: Isa, x: Rows, weights: &PackedMatrix, plan: TilePlan) {
        let num_columns = weights.num_columns();
        let plain = || segments(weights, isa, Family::Plain);
        if plain().any(|segment| !uses_bf16_dot(isa, segment.dtype))
            && (plan.num_rows > 1 || !num_columns.is_multiple_of(2))
        {
            let tiles = grown(&mut self.tiles, plan.num_rows * RowLens::plain(weights), 0.0);
            pack_tiles(pool, x, num_columns, plan, tiles);
        }
        #[cfg(target_arch = "x86_64")]
        if plain().any(|segment| uses_bf16_dot(isa, segment.dtype)) {
            let tiles = grown(&mut self.bf16_tiles, plan.num_rows * RowLens::bf16(weights), 0.0);
            // SAFETY: `gemm` checked that the instruction set is available.
            unsafe { pack_bf16_tiles(pool, x, num_columns, plan, tiles) };
        }
    }
}

impl FloatGemm<'_> {
    /// Multiplies one block of rows by some panels, counted over the plain segments.
    fn run(&self, block: usize, panels: Range<usize>) {
        let tiles = self.blocks.start(block)..self.blocks.start(block + 1);
        for (segment, panels) in panels_of_segments(self.weights, self.isa, Family::Plain, panels) {
            self.run_segment(segment, panels, tiles.clone());
        }
    }

    fn run_segment(&self, segment: &Segment, mut panels: Range<usize>, tiles: Range<usize>) {
        let streams = streams(self.isa, self.plan.num_rows);
        while !panels.is_empty() {
            let count = if panels.len() >= streams { streams } else { 1 };
            for first_pair in (0..self.num_pairs).step_by(self.block_pairs) {
                let pairs = first_pair..self.num_pairs.min(first_pair + self.block_pairs);
                let strip = self.strip(segment, panels.start, count, pairs);
                tiles.clone().for_each(|tile| self.run_tile(segment, &strip, tile));
            }
            panels.start += count;
        }
    }

    /// Points at some pairs of `k` of `count` panels.
    fn strip(&self, segment: &Segment, panel: usize, count: usize, pairs: Range<usize>) -> Strip {
        let pair_bytes = 2 * segment.dtype.block_bytes() * PANEL_ROWS;
        let bytes = &self.weights.panels(segment)[panel * segment.panel_bytes..][..count * segment.panel_bytes];
        Strip { panel, count, weights: bytes[pairs.start * pair_bytes..].as_ptr(), pairs }
    }

    fn run_tile(&self, segment: &Segment, strip: &Strip, tile: usize) {
        let (start, rows) = (self.plan.start(tile), self.plan.rows(tile));
        let column = segment.first_row + strip.panel * PANEL_ROWS;
        let dot = uses_bf16_dot(self.isa, segment.dtype);
        let (tiles, per_pair) = if dot { (self.bf16_tiles, 1) } else { (self.tiles, 2) };
        let x = &tiles[(start * self.num_pairs + strip.pairs.start * rows) * per_pair..];
        debug_assert!(x.len() >= strip.pairs.len() * rows * per_pair);
        let is_last = strip.pairs.end == self.num_pairs;
        let bias = if is_last { self.target.bias(column) } else { std::ptr::null() };
        let kernel = float_kernel(self.isa, segment.dtype, rows, strip.count);
        // SAFETY: `gemm` checked the sizes of x, out and bias and that the instructions are there; tasks have
        // disjoint outputs.
        unsafe {
            kernel(&FloatTile {
                x: x.as_ptr(),
                weights: strip.weights,
                panel_bytes: segment.panel_bytes,
                num_pairs: strip.pairs.len(),
                out: self.target.out.add(start * self.target.stride + column),
                out_stride: self.target.stride,
                num_columns: (segment.num_rows - strip.panel * PANEL_ROWS).min(strip.count * PANEL_ROWS),
                bias,
                resume: strip.pairs.start > 0,
            });
        }
    }
}

/// A range of `k` of one or more panels, as a kernel will read it.
struct Strip {
    panel: usize,
    count: usize,
    weights: *const u8,
    pairs: Range<usize>,
}

/// Whether weights of `dtype` are multiplied by dot products of bf16 pairs, x being rounded to bf16.
fn uses_bf16_dot(isa: Isa, dtype: DType) -> bool {
    isa == Isa::Avx512Bf16 && dtype == DType::BF16
}

fn max_rows(isa: Isa) -> usize {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => float_avx512::MAX_ROWS,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => float_avx2::MAX_ROWS,
        _ => float_tile::PORTABLE_ROWS,
    }
}

/// Panels a kernel takes at a time.
fn streams(isa: Isa, num_rows: usize) -> usize {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx if num_rows == 1 => float_avx512::STREAMS,
        _ => 1,
    }
}

fn float_kernel(isa: Isa, dtype: DType, num_rows: usize, num_panels: usize) -> FloatKernel {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Bf16 if dtype == DType::BF16 => float_avx512::bf16_dot_kernel(num_rows, num_panels),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => float_avx512::float_kernel(dtype, num_rows, num_panels),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => float_avx2::float_kernel(dtype, num_rows),
        _ => float_tile::portable_kernel(dtype, num_rows),
    }
}
