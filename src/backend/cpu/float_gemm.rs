//! Products with plain weights: from tasks to register tiles.

#![allow(unsafe_code)]

use std::ops::Range;

use super::super::DType;
#[cfg(target_arch = "x86_64")]
use super::float_avx2;
#[cfg(target_arch = "x86_64")]
use super::float_avx512;
use super::float_tile::{self, FloatKernel, FloatTile};
use super::gemm::{BLOCK_BYTES, Grouping, Target, grown, panels_of_segments, segments};
use super::input_tiles::{Disjoint, Rows, TilePlan, pack_bf16_tiles, pack_tiles};
use super::packed::{PANEL_ROWS, PackedMatrix, Segment};
use super::{Isa, ThreadPool};

/// Most `k` of one block: bounds the expanded panel.
const BLOCK_COLUMNS: usize = 1024;
/// From this many tiles on a panel is expanded to f32 before it is used.
const EXPAND_TILES: usize = 3;

/// x in tiles, and an expanded panel for each thread.
#[derive(Default)]
pub(super) struct Scratch {
    tiles: Vec<f32>,
    bf16_tiles: Vec<f32>,
    expanded: Vec<Line>,
}

/// One cache line.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(#[allow(dead_code)] [f32; 16]);

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
    expanded: Disjoint<Line>,
    /// Pairs of `k`, and how many of them one step over `k` takes.
    num_pairs: usize,
    block_pairs: usize,
}

pub(super) fn float_gemm(
    pool: &mut ThreadPool,
    isa: Isa,
    x: Rows,
    num_rows: usize,
    weights: &PackedMatrix,
    target: &Target,
    scratch: &mut Scratch,
) {
    let num_panels: usize = segments(weights, false).map(Segment::num_panels).sum();
    if num_panels == 0 {
        return;
    }
    let num_columns = weights.num_columns();
    let (num_pairs, plan) = (num_columns.div_ceil(2), TilePlan::new(num_rows, max_rows(isa)));
    let block_pairs = num_pairs.div_ceil(num_pairs.div_ceil(BLOCK_COLUMNS / 2));
    let blocks = TilePlan::new(plan.num_tiles, (BLOCK_BYTES / (block_pairs * 8 * max_rows(isa))).max(1));
    scratch.prepare(pool, isa, x, weights, plan, block_pairs);
    let in_place = num_rows == 1 && num_columns.is_multiple_of(2);
    let work = FloatGemm {
        isa,
        weights,
        target,
        plan,
        blocks,
        tiles: if in_place { x.row(0, num_columns) } else { &scratch.tiles },
        bf16_tiles: &scratch.bf16_tiles,
        expanded: Disjoint::new(&mut scratch.expanded),
        num_pairs,
        block_pairs,
    };
    let panel_bytes = segments(weights, false).map(|segment| segment.panel_bytes).max().unwrap_or(1);
    let streams = streams(isa, num_rows);
    let grouping = Grouping::new(num_panels, panel_bytes, streams, blocks.num_tiles, pool.num_threads());
    let tasks_per_block = grouping.num_tasks();
    pool.run(tasks_per_block * blocks.num_tiles, |task, thread| {
        work.run(task / tasks_per_block, grouping.panels(task % tasks_per_block), thread);
    });
}

impl Scratch {
    /// Lays out x and makes room for one expanded panel per thread.
    fn prepare(
        &mut self,
        pool: &mut ThreadPool,
        isa: Isa,
        x: Rows,
        weights: &PackedMatrix,
        plan: TilePlan,
        block_pairs: usize,
    ) {
        let num_columns = weights.num_columns();
        let plain = || segments(weights, false);
        if plain().any(|segment| !uses_bf16_dot(isa, segment.dtype))
            && (plan.num_rows > 1 || !num_columns.is_multiple_of(2))
        {
            let tiles = grown(&mut self.tiles, plan.num_rows * num_columns.next_multiple_of(2), 0.0);
            pack_tiles(pool, x, num_columns, plan, tiles);
        }
        if plain().any(|segment| uses_bf16_dot(isa, segment.dtype)) {
            let tiles = grown(&mut self.bf16_tiles, plan.num_rows * num_columns.div_ceil(2), 0.0);
            pack_bf16_tiles(pool, x, num_columns, plan, tiles);
        }
        if plan.num_tiles >= EXPAND_TILES {
            grown(&mut self.expanded, pool.num_threads() * block_pairs * 4, Line([0.0; 16]));
        }
    }
}

impl FloatGemm<'_> {
    /// Multiplies one block of rows by some panels, counted over the plain segments.
    fn run(&self, block: usize, panels: Range<usize>, thread: usize) {
        let tiles = self.blocks.start(block)..self.blocks.start(block + 1);
        for (segment, panels) in panels_of_segments(self.weights, false, panels) {
            self.run_segment(segment, panels, tiles.clone(), thread);
        }
    }

    fn run_segment(&self, segment: &Segment, mut panels: Range<usize>, tiles: Range<usize>, thread: usize) {
        let streams = streams(self.isa, self.plan.num_rows);
        while !panels.is_empty() {
            let count = if panels.len() >= streams { streams } else { 1 };
            for first_pair in (0..self.num_pairs).step_by(self.block_pairs) {
                let pairs = first_pair..self.num_pairs.min(first_pair + self.block_pairs);
                let strip = self.strip(segment, panels.start, count, pairs, thread);
                tiles.clone().for_each(|tile| self.run_tile(segment, &strip, tile));
            }
            panels.start += count;
        }
    }

    /// Points at some pairs of `k` of `count` panels, expanded when that pays.
    fn strip(&self, segment: &Segment, panel: usize, count: usize, pairs: Range<usize>, thread: usize) -> Strip {
        let pair_bytes = 2 * segment.dtype.block_bytes() * PANEL_ROWS;
        let bytes = &self.weights.panels(segment)[panel * segment.panel_bytes..][pairs.start * pair_bytes..];
        let mut strip = Strip { dtype: segment.dtype, panel, count, weights: bytes.as_ptr(), pairs };
        let expands = matches!(segment.dtype, DType::BF16 | DType::F16) && !uses_bf16_dot(self.isa, segment.dtype);
        if expands && self.plan.num_tiles >= EXPAND_TILES {
            let num_lines = self.block_pairs * 4;
            // SAFETY: a thread number is held by one task at a time, and this is the only use of the thread's part.
            let target = unsafe { self.expanded.part(thread * num_lines, num_lines) };
            expand(self.isa, segment.dtype, bytes, strip.pairs.len(), target);
            (strip.dtype, strip.weights) = (DType::F32, target.as_ptr().cast());
        }
        strip
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
        let kernel = float_kernel(self.isa, strip.dtype, rows, strip.count);
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
    dtype: DType,
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
        Isa::Avx512 | Isa::Avx512Bf16 => float_avx512::MAX_ROWS,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => float_avx2::MAX_ROWS,
        _ => float_tile::PORTABLE_ROWS,
    }
}

/// Panels a kernel takes at a time.
fn streams(isa: Isa, num_rows: usize) -> usize {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 if num_rows == 1 => float_avx512::STREAMS,
        _ => 1,
    }
}

fn float_kernel(isa: Isa, dtype: DType, num_rows: usize, num_panels: usize) -> FloatKernel {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Bf16 if dtype == DType::BF16 => float_avx512::bf16_dot_kernel(num_rows, num_panels),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 => float_avx512::float_kernel(dtype, num_rows, num_panels),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => float_avx2::float_kernel(dtype, num_rows),
        _ => float_tile::portable_kernel(dtype, num_rows),
    }
}

/// Widens `num_pairs` pairs of `k` of a bf16 or f16 panel to f32 panel layout.
fn expand(isa: Isa, dtype: DType, weights: &[u8], num_pairs: usize, target: &mut [Line]) {
    assert!(target.len() >= num_pairs * 4 && weights.len() >= num_pairs * 2 * dtype.block_bytes() * PANEL_ROWS);
    let (source, target) = (weights.as_ptr(), target.as_mut_ptr().cast::<f32>());
    // SAFETY: the sizes were just checked, and `gemm` checked the instruction set.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Avx512Bf16 => float_avx512::expand(dtype, source, num_pairs, target),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => float_avx2::expand(dtype, source, num_pairs, target),
            _ => float_tile::expand(dtype, source, num_pairs, target),
        }
    }
}
