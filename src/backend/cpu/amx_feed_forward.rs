//! The gated feed-forward layer on tile registers, for many rows. Gate and up of a block of rows by a few features stay in the
//! cache until the activation has taken them, and what it gives is rounded and laid out for the second product at once,
//! rather than that all of it goes to memory and comes back three times.

#![allow(unsafe_code)]

use std::ops::Range;

use super::activation::{GateKind, Gated};
use super::amx_gemm::{AmxGemm, BLOCK_ROWS, MAX_ROWS, for_each_block, round_row};
use super::disjoint::DisjointSlice;
use super::feed_forward::FeedForwardWeights;
use super::gemm::{GemmScratch, Part, Target, grown};
use super::input_tiles::Rows;
use super::line::{Line, numbers_of};
use super::packed::PANEL_ROWS;
use super::simd::{LANES, dispatch};
use super::{Isa, ThreadPool};

/// Panels of gates of a task, and as many of ups: their weights, x and the sums share the second-level cache.
const GROUP_PANELS: usize = 4;

/// Numbers from one row of sums to the next: a gate and an up for each feature, and no power of two.
const STRIDE: usize = 2 * GROUP_PANELS * PANEL_ROWS + LANES;

/// Lines of sums of a thread.
pub(super) const THREAD_LINES: usize = BLOCK_ROWS * STRIDE / LANES;

/// [`feed_forward`](super::feed_forward()), bit for bit, where tiles multiply all weights, gates and ups are whole panels, and the
/// rows have their sizes.
pub(super) fn amx_feed_forward(
    pool: &mut ThreadPool,
    isa: Isa,
    x: Rows,
    weights: &FeedForwardWeights,
    out: &mut [f32],
    scratch: &mut GemmScratch,
) {
    let FeedForwardWeights { gate_up, kind, down } = *weights;
    let GemmScratch { rounded, sums, activated, .. } = scratch;
    let product = AmxGemm::new(pool, isa, x, gate_up, rounded);
    let num_panels = gate_up.num_rows() / 2 / PANEL_ROWS;
    let lines = grown(activated, x.num_rows * num_panels, Line::ZERO);
    let layer = Layer {
        isa,
        kind,
        num_panels,
        sums: DisjointSlice::new(grown(sums, pool.num_threads() * THREAD_LINES, Line::ZERO)),
        lines: DisjointSlice::new(lines),
        product,
    };
    for_each_block(pool, layer.product.num_blocks(), num_panels, GROUP_PANELS, |block, panels, thread| {
        panels.clone().step_by(GROUP_PANELS).for_each(|first| {
            layer.activate(block, first..panels.end.min(first + GROUP_PANELS), thread);
        });
    });
    let target = Target::new(out.as_mut_ptr(), down.num_rows());
    AmxGemm::of_lines(isa, lines, x.num_rows, down).multiply(pool, &target);
}

/// The first product, as every task sees it.
struct Layer<'a> {
    isa: Isa,
    kind: GateKind,
    /// Of gates, and as many of ups: a panel's features are a step of the second product.
    num_panels: usize,
    /// `[threads][BLOCK_ROWS][STRIDE]` f32.
    sums: DisjointSlice<'a, Line>,
    /// What the second product reads.
    lines: DisjointSlice<'a, Line>,
    product: AmxGemm<'a>,
}

impl Layer<'_> {
    /// A block of rows by some panels of features.
    fn activate(&self, block: usize, panels: Range<usize>, thread: usize) {
        // SAFETY: a thread runs one task at a time.
        let sums = numbers_of(unsafe { self.sums.part(thread * THREAD_LINES, THREAD_LINES) });
        let rows = self.product.rows(block);
        self.multiply(block, panels.clone(), sums);
        let tiles = rows.clone().step_by(MAX_ROWS).map(|row| row..rows.end.min(row + MAX_ROWS));
        for (tile, sums) in tiles.zip(sums.chunks(MAX_ROWS * STRIDE)) {
            let first = tile.start * self.num_panels + panels.start * tile.len();
            // SAFETY: each line belongs to one row and one panel.
            let lines = unsafe { self.lines.part(first, panels.len() * tile.len()) };
            self.activate_tile(sums, tile.len(), panels.len() * PANEL_ROWS, lines);
        }
    }

    /// Gates and ups, side by side.
    fn multiply(&self, block: usize, panels: Range<usize>, sums: &mut [f32]) {
        let gates = sums.as_mut_ptr();
        let targets = [gates, gates.wrapping_add(panels.len() * PANEL_ROWS)].map(|start| Target::new(start, STRIDE));
        let first_row = self.product.rows(block).start;
        let part = |half: usize| {
            let panels = half * self.num_panels + panels.start..half * self.num_panels + panels.end;
            Part { origin: (first_row, panels.start * PANEL_ROWS), panels, target: &targets[half] }
        };
        self.product.run(block, &[part(0), part(1)]);
    }

    /// From sums to what the second product reads.
    fn activate_tile(&self, sums: &[f32], num_rows: usize, num_features: usize, lines: &mut [Line]) {
        let mut activated = [0.0; GROUP_PANELS * PANEL_ROWS];
        let activated = &mut activated[..num_features];
        for (row, sums) in sums.chunks(STRIDE).enumerate().take(num_rows) {
            let (gate, up) = sums[..2 * num_features].split_at(num_features);
            dispatch(self.isa, Gated { gate, up, kind: self.kind, out: &mut *activated });
            // SAFETY: whoever chose tiles knows that the machine has AVX-512 BF16.
            unsafe { round_row(activated, row, num_rows, lines) };
        }
    }
}
