//! The gated feed-forward layer over quantised weights, for many rows. Gates and ups of a block of rows by the features of a
//! panel stay in the cache until the activation has taken them, and what it gives is quantised for the second product at
//! once: the features of a panel are a block of it.

#![allow(unsafe_code)]

use super::activation::{GateKind, Gated};
use super::disjoint::DisjointSlice;
use super::feed_forward::FeedForwardWeights;
use super::gemm::{GemmScratch, Part, Target, grown};
use super::input_tiles::Rows;
use super::line::{Line, numbers_of};
use super::packed::PANEL_ROWS;
use super::quant_gemm::{QuantGemm, words_of};
use super::quantize::{BLOCK, RECORD_WORDS, quantise_blocks};
use super::simd::{LANES, dispatch};
use super::{Isa, ThreadPool};

const _: () = assert!(BLOCK == PANEL_ROWS, "the features of a panel are a block");

/// Most rows of a block: gates, ups and what comes of them stay in the first-level cache, or near it.
const BLOCK_ROWS: usize = 144;

/// Lines of gates, of ups and of what comes of them, of a thread.
pub(super) const THREAD_LINES: usize = 3 * BLOCK_ROWS * PANEL_ROWS / LANES;

/// [`feed_forward`](super::feed_forward()), bit for bit, where all weights are quantised, gates and ups are whole panels, and the
/// rows have their sizes.
pub(super) fn quant_feed_forward(
    pool: &mut ThreadPool,
    isa: Isa,
    x: Rows,
    weights: &FeedForwardWeights,
    out: &mut [f32],
    scratch: &mut GemmScratch,
) {
    let FeedForwardWeights { gate_up, kind, down } = *weights;
    let GemmScratch { quantised, sums, activated_records, .. } = scratch;
    let product = QuantGemm::new(pool, isa, x, gate_up, quantised).in_blocks_of(BLOCK_ROWS);
    let (num_blocks, num_features) = (product.num_blocks(), gate_up.num_rows() / 2);
    let grouping = product.grouping(pool, num_features / PANEL_ROWS, 2);
    let records = grown(activated_records, x.num_rows * words_of(num_features), 0);
    let layer = Layer {
        isa,
        kind,
        num_features,
        sums: DisjointSlice::new(grown(sums, pool.num_threads() * THREAD_LINES, Line::ZERO)),
        records: DisjointSlice::new(records),
        product,
    };
    pool.run(grouping.num_tasks() * num_blocks, |task, thread| {
        let panels = grouping.panels(task % grouping.num_tasks());
        panels.for_each(|panel| layer.activate(task / grouping.num_tasks(), panel, thread));
    });
    let target = Target::new(out.as_mut_ptr(), down.num_rows());
    QuantGemm::of_tiles(isa, records, x.num_rows, down).multiply(pool, &target);
}

/// The first product, as every task sees it.
struct Layer<'a> {
    isa: Isa,
    kind: GateKind,
    num_features: usize,
    /// `[threads][gates | ups | activated][rows of a block][32]` f32.
    sums: DisjointSlice<'a, Line>,
    /// What the second product reads.
    records: DisjointSlice<'a, u32>,
    product: QuantGemm<'a>,
}

impl Layer<'_> {
    /// A block of rows by the features of a panel.
    fn activate(&self, block: usize, panel: usize, thread: usize) {
        let tiles = self.product.tiles(block);
        let rows = self.product.rows(tiles.clone());
        // SAFETY: a thread runs one task at a time.
        let sums = numbers_of(unsafe { self.sums.part(thread * THREAD_LINES, THREAD_LINES) });
        let (gate, rest) = sums.split_at_mut(rows.len() * PANEL_ROWS);
        let (up, rest) = rest.split_at_mut(rows.len() * PANEL_ROWS);
        let activated = &mut rest[..rows.len() * PANEL_ROWS];
        for (half, sums) in [&mut *gate, &mut *up].into_iter().enumerate() {
            let panel = half * self.num_features / PANEL_ROWS + panel;
            let target = Target::new(sums.as_mut_ptr(), PANEL_ROWS);
            let origin = (rows.start, panel * PANEL_ROWS);
            self.product.run(block, &Part { panels: panel..panel + 1, target: &target, origin });
        }
        dispatch(self.isa, Gated { gate, up, kind: self.kind, out: &mut *activated });
        for tile in tiles {
            let rows_of_tile = self.product.rows(tile..tile + 1);
            let (first, num_rows) = (rows_of_tile.start, rows_of_tile.len());
            let start = first * words_of(self.num_features) + panel * RECORD_WORDS * num_rows;
            // SAFETY: each record belongs to one tile and one panel.
            let records = unsafe { self.records.part(start, RECORD_WORDS * num_rows) };
            let numbers = &activated[(first - rows.start) * PANEL_ROWS..][..num_rows * PANEL_ROWS];
            quantise_blocks(self.isa, numbers, records);
        }
    }
}
