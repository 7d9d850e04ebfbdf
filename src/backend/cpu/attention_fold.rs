//! From the results of chunks to those of rows: chunks are folded in order, and the sum of weights is divided out at the
//! end. How a chunk's result comes about is in `attention_tile` and `attention_amx`.

#![allow(unsafe_code)]
#![allow(clippy::too_many_arguments)]

use super::attention_tile::{HeadRows, TileScratch};
use super::disjoint::DisjointSlice;
use super::exp::exp;
use super::line::Line;
use super::simd::{Kernel, LANES, Simd};

/// Maximum of the scores of a row and sum of its weights.
#[derive(Clone, Copy)]
pub(super) struct RowState {
    pub(super) max: f32,
    pub(super) sum: f32,
    pub(super) is_empty: bool,
}

impl RowState {
    pub(super) const EMPTY: RowState = RowState { max: f32::NEG_INFINITY, sum: 0.0, is_empty: true };
}

/// Numbers of a chunk's partial result for one row: weighted values, maximum, sum, and padding to whole lines.
pub(super) fn partial_stride(head_dim: usize) -> usize {
    head_dim + LANES
}

/// Where the results of a tile go.
pub(super) enum TileTarget<'a> {
    /// All chunks were seen: the rows of the output.
    Output(&'a DisjointSlice<'a, f32>),
    /// Partial results `[chunks][rows][partial_stride]` of the tile's chunks.
    Partials(&'a mut [Line]),
}

impl TileTarget<'_> {
    /// Takes the weighted values of a chunk, the `index`-th of the tile, and the states of its rows: folds them into
    /// those of the chunks before, or writes them out.
    ///
    /// # Safety
    /// `values` and `folded` are `[rows][head_dim]` and do not overlap.
    #[inline(always)]
    pub(super) unsafe fn take_chunk<S: Simd>(
        &mut self,
        s: S,
        index: usize,
        states: &[RowState],
        values: *const f32,
        folded_states: &mut [RowState],
        folded: *mut f32,
        head_dim: usize,
    ) {
        for (row, state) in states.iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe {
                let values = values.add(row * head_dim);
                match self {
                    TileTarget::Output(_) => {
                        fold(s, &mut folded_states[row], folded.add(row * head_dim), *state, values, head_dim);
                    }
                    TileTarget::Partials(partials) => {
                        write_partial(partials, index * states.len() + row, head_dim, *state, values);
                    }
                }
            }
        }
    }

    /// Writes the rows of the output, unless others have the other chunks.
    ///
    /// # Safety
    /// `folded` is `[rows][head_dim]`.
    #[inline(always)]
    pub(super) unsafe fn finish<S: Simd>(&self, s: S, head: &HeadRows, states: &[RowState], folded: *const f32) {
        let TileTarget::Output(out) = self else { return };
        let head_dim = head.cache.layout().head_dim();
        for (row, state) in states.iter().enumerate().take(head.rows.len()) {
            let start = head.sequence.output_start(head.batch, head.kv_head, head.rows.start + row, head_dim);
            // SAFETY: each row of each head belongs to one tile; the caller's promise.
            unsafe { finish(s, *state, folded.add(row * head_dim), out.part(start, head_dim)) };
        }
    }
}

/// Adds the next chunk's result of a row to that of the chunks before (Milakov and Gimelshein, arXiv 1805.02867).
///
/// # Safety
/// `folded` and `values` are `head_dim` numbers each and do not overlap.
#[inline(always)]
unsafe fn fold<S: Simd>(
    s: S,
    state: &mut RowState,
    folded: *mut f32,
    next: RowState,
    values: *const f32,
    head_dim: usize,
) {
    if next.is_empty {
        return;
    }
    if state.is_empty {
        *state = next;
        // SAFETY: the caller's promise.
        return unsafe { std::ptr::copy_nonoverlapping(values, folded, head_dim) };
    }
    let max = if next.max > state.max { next.max } else { state.max };
    let kept = exp(s, s.splat(state.max - max));
    let added = exp(s, s.splat(next.max - max));
    let sum = s.mul_add(s.splat(state.sum), kept, s.mul(s.splat(next.sum), added));
    for dim in (0..head_dim).step_by(LANES) {
        // SAFETY: the caller's promise; `head_dim` is a multiple of 16.
        unsafe {
            let new = s.mul(s.load(values.add(dim)), added);
            s.store(folded.add(dim), s.mul_add(s.load(folded.add(dim)), kept, new));
        }
    }
    *state = RowState { max, sum: s.to_array(sum)[0], is_empty: false };
}

/// Weighted values over the sum of the weights.
///
/// # Safety
/// `folded` holds as many numbers as `out`, a multiple of 16.
#[inline(always)]
unsafe fn finish<S: Simd>(s: S, state: RowState, folded: *const f32, out: &mut [f32]) {
    let inverse = s.splat(1.0 / state.sum);
    for dim in (0..out.len()).step_by(LANES) {
        // A masked position may turn -0 into 0, so no -0 is let out.
        // SAFETY: the caller's promise.
        unsafe { s.store(out.as_mut_ptr().add(dim), s.mul_add(s.load(folded.add(dim)), inverse, s.zero())) };
    }
}

#[inline(always)]
fn write_partial(partials: &mut [Line], index: usize, head_dim: usize, state: RowState, values: *const f32) {
    let stride = partial_stride(head_dim) / LANES;
    let target = &mut partials[index * stride..(index + 1) * stride];
    target[stride - 1].0[0] = state.max;
    target[stride - 1].0[1] = state.sum;
    target[stride - 1].0[2] = if state.is_empty { 1.0 } else { 0.0 };
    // SAFETY: the caller's values are `head_dim` numbers; the lines before the last hold as many.
    unsafe { std::ptr::copy_nonoverlapping(values, target.as_mut_ptr().cast::<f32>(), head_dim) };
}

/// Folds the partial results `[chunks][rows][partial_stride]` of the rows of one head and writes the output.
pub(super) struct MergeKernel<'a> {
    pub(super) partials: &'a [Line],
    pub(super) num_rows: usize,
    pub(super) head_dim: usize,
    pub(super) scratch: &'a mut TileScratch,
    /// Where a row of the output begins.
    pub(super) output_start: &'a dyn Fn(usize) -> usize,
    pub(super) out: &'a DisjointSlice<'a, f32>,
}

impl Kernel for MergeKernel<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let stride = partial_stride(self.head_dim) / LANES;
        let folded = self.scratch.folded(self.head_dim);
        for row in 0..self.num_rows {
            let mut state = RowState::EMPTY;
            for partial in self.partials.chunks_exact(stride).skip(row).step_by(self.num_rows) {
                let [max, sum, is_empty, ..] = partial[stride - 1].0;
                let next = RowState { max, sum, is_empty: is_empty != 0.0 };
                // SAFETY: the scratch has room for a row; a partial begins with `head_dim` numbers.
                unsafe { fold(s, &mut state, folded, next, partial.as_ptr().cast(), self.head_dim) };
            }
            // SAFETY: each row of each head belongs to one merge.
            let out = unsafe { self.out.part((self.output_start)(row), self.head_dim) };
            // SAFETY: the row was folded into `head_dim` numbers.
            unsafe { finish(s, state, folded, out) };
        }
    }
}
