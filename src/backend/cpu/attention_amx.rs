//! Attention of up to 32 query rows of one KV head over a bf16 cache, with tile registers.
//!
//! The same chunks, masks and folding as in `attention_tile`; queries and weights are rounded to bf16 and sums are made
//! by tile products. Every number of a row is computed from that row alone in a fixed order, so its bits depend neither
//! on the rows beside it nor on where its tile begins: a masked position adds a zero.

#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::amx::{GatheredProduct, STEP_COLUMNS, TILE_ROWS, TileProduct, TileRegisters};
use super::attention_bf16::{cut_tail, round_weights, tail_lines};
use super::attention_fold::RowState;
use super::attention_tile::{CHUNK, Groups, HeadRows, Tile, normalise};
use super::bf16_rounding::store_rounded;
use super::line::{Line, numbers_of};
use super::simd::{Kernel, LANES, Simd};
use crate::backend::{DType, KvLayout};

/// Most rows of a tile.
pub(super) const MAX_ROWS: usize = 2 * TILE_ROWS;

/// Numbers from one row of scores to the next: room for an even number of groups, and no power of two.
const SCORE_STRIDE: usize = CHUNK + 2 * LANES;
const SCORE_LINES: usize = MAX_ROWS * SCORE_STRIDE / LANES;

/// Whether these kernels can read a cache: a step is 32 dimensions, and pairs of numbers share a word.
pub(super) fn can_read(layout: &KvLayout) -> bool {
    layout.dtype() == DType::BF16 && layout.head_dim().is_multiple_of(STEP_COLUMNS)
}

/// Lines of scratch that a tile takes.
pub(super) fn scratch_lines(head_dim: usize) -> usize {
    let row_lines = MAX_ROWS * head_dim / LANES;
    row_lines / 2 + SCORE_LINES + SCORE_LINES / 2 + 2 * row_lines + tail_lines(head_dim)
}

/// Places in a thread's scratch.
struct Parts<'a> {
    /// `[head_dim / 32][rows][32]` bf16, scaled.
    queries: &'a mut [Line],
    /// `[rows][SCORE_STRIDE]` f32.
    scores: &'a mut [f32],
    /// The same as bf16.
    weights: &'a mut [Line],
    /// `[rows][head_dim]` f32: weighted values of a chunk.
    values: &'a mut [f32],
    /// `[rows][head_dim]` f32: of all chunks so far.
    folded: &'a mut [f32],
    /// The last values of a sequence with zeros after them: `[8][head_dim][2]` bf16.
    tail: &'a mut [Line],
}

impl<'a> Parts<'a> {
    fn new(lines: &'a mut [Line], head_dim: usize) -> Self {
        let row_lines = MAX_ROWS * head_dim / LANES;
        let (queries, rest) = lines.split_at_mut(row_lines / 2);
        let (scores, rest) = rest.split_at_mut(SCORE_LINES);
        let (weights, rest) = rest.split_at_mut(SCORE_LINES / 2);
        let (values, rest) = rest.split_at_mut(row_lines);
        let (folded, rest) = rest.split_at_mut(row_lines);
        let (scores, values, folded) = (numbers_of(scores), numbers_of(values), numbers_of(folded));
        Self { queries, scores, weights, values, folded, tail: &mut rest[..tail_lines(head_dim)] }
    }
}

/// A tile of rows, to be run with AVX-512 where tile registers are available.
pub(super) struct AmxTileKernel<'a>(pub(super) Tile<'a>);

impl Kernel for AmxTileKernel<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Tile { head, chunks, scratch, mut target } = self.0;
        let (layout, num_rows) = (head.cache.layout(), head.rows.len());
        assert!(num_rows <= MAX_ROWS && can_read(layout));
        let mut parts = Parts::new(scratch.lines(), layout.head_dim());
        let mut folded = [RowState::EMPTY; MAX_ROWS];
        // SAFETY: `attention` takes these kernels only where the instructions are.
        let mut registers = unsafe { TileRegisters::new() };
        // SAFETY: as above.
        unsafe { round_queries(&head, parts.queries) };
        let mut upcoming = Groups::locate(&head, chunks.start);
        for chunk in chunks.clone() {
            let mut groups = upcoming;
            upcoming = if chunk + 1 < chunks.end { Groups::locate(&head, chunk + 1) } else { Groups::NONE };
            let mut states = [RowState::EMPTY; MAX_ROWS];
            // SAFETY: the parts have room for the rows; the groups lie in blocks of the arena.
            unsafe {
                score(s, &groups, num_rows, layout, &mut parts, &mut registers);
                normalise(s, &head, &groups, chunk, parts.scores.as_mut_ptr(), SCORE_STRIDE, &mut states);
                round_weights(num_rows, groups.num_groups, parts.scores, parts.weights, SCORE_STRIDE);
                cut_tail(&head, chunk, &mut groups, parts.tail);
                weigh_values(s, &groups, &upcoming, num_rows, layout, &mut parts, &mut registers);
                let (states, index) = (&states[..num_rows], chunk - chunks.start);
                let (values, kept) = (parts.values.as_ptr(), parts.folded.as_mut_ptr());
                target.take_chunk(s, index, states, values, &mut folded, kept, layout.head_dim());
            }
        }
        // SAFETY: the rows were folded into `head_dim` numbers each.
        unsafe { target.finish(s, &head, &folded, parts.folded.as_ptr()) };
    }
}

/// Queries times the scale, as bf16.
///
/// # Safety
/// The machine has AVX-512 BF16.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn round_queries(head: &HeadRows, target: &mut [Line]) {
    let num_rows = head.rows.len();
    let scale = _mm512_set1_ps(head.batch.scale);
    for (row, query) in head.rows.clone().enumerate() {
        for (step, numbers) in head.query(query).chunks_exact(STEP_COLUMNS).enumerate() {
            // SAFETY: 32 numbers.
            let low = unsafe { _mm512_loadu_ps(numbers.as_ptr()) };
            // SAFETY: as above.
            let high = unsafe { _mm512_loadu_ps(numbers.as_ptr().add(LANES)) };
            store_rounded(_mm512_mul_ps(low, scale), _mm512_mul_ps(high, scale), &mut target[step * num_rows + row]);
        }
    }
}

/// Scores of all keys of the groups, masked or not. With few rows memory is what attention waits for, and blocks are
/// too small for the processor to guess what comes next: so the values of a group are asked for with its keys.
///
/// # Safety
/// The groups are valid.
#[inline(always)]
unsafe fn score<S: Simd>(
    s: S,
    groups: &Groups,
    num_rows: usize,
    layout: &KvLayout,
    parts: &mut Parts,
    registers: &mut TileRegisters,
) {
    let pair_bytes = layout.k_pair_bytes();
    for first in (0..groups.num_groups).step_by(2) {
        for group in first..(first + 2).min(groups.num_groups) {
            prefetch_tile(s, groups.values[group], 8, layout.v_pair_bytes());
        }
        let product = TileProduct {
            a: parts.queries.as_ptr().cast(),
            num_rows,
            a_stride: size_of::<Line>(),
            a_step: num_rows * size_of::<Line>(),
            b: [groups.keys[first], groups.keys[first + 1]],
            b_stride: pair_bytes,
            b_step: STEP_COLUMNS / 2 * pair_bytes,
            num_steps: layout.head_dim() / STEP_COLUMNS,
            c: parts.scores[first * LANES..].as_mut_ptr(),
            c_stride: SCORE_STRIDE * size_of::<f32>(),
            resume: false,
        };
        // SAFETY: the last group is repeated when their number is odd, and there is room for its scores.
        unsafe { product.run(registers) };
    }
}

/// Asks for `num_rows` rows of `row_bytes` used bytes each.
#[inline(always)]
fn prefetch_tile<S: Simd>(s: S, start: *const u8, num_rows: usize, row_bytes: usize) {
    for line in 0..num_rows * row_bytes / size_of::<Line>() {
        s.prefetch(start.wrapping_add(line * size_of::<Line>()));
    }
}

/// Sums of values times weights; asks for the next chunk's keys on the way.
///
/// # Safety
/// The groups are valid.
#[inline(always)]
unsafe fn weigh_values<S: Simd>(
    s: S,
    groups: &Groups,
    upcoming: &Groups,
    num_rows: usize,
    layout: &KvLayout,
    parts: &mut Parts,
    registers: &mut TileRegisters,
) {
    let head_dim = layout.head_dim();
    for group in 0..upcoming.num_groups {
        prefetch_tile(s, upcoming.keys[group], head_dim / 2, layout.k_pair_bytes().min(size_of::<Line>()));
    }
    for dim in (0..head_dim).step_by(STEP_COLUMNS) {
        let product = GatheredProduct {
            a: parts.weights.as_ptr().cast(),
            num_rows,
            a_stride: SCORE_STRIDE * 2,
            pieces: &groups.values[..groups.num_groups],
            column_bytes: dim * 4,
            b_stride: layout.v_pair_bytes(),
            c: parts.values[dim..].as_mut_ptr(),
            c_stride: head_dim * size_of::<f32>(),
        };
        // SAFETY: a piece is a group's 8 pairs of tokens, a word for each dimension.
        unsafe { product.run(registers) };
    }
}
