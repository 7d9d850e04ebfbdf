//! Attention of up to 12 query rows of one KV head over a bf16 cache, with dot products of bf16 pairs.
//!
//! The same chunks, masks and folding as in `attention_tile`; queries and weights are rounded to bf16, and a sum takes
//! two dimensions or two positions at a time, in order. Every number of a row is computed from that row alone, so its
//! bits do not depend on the rows beside it nor on where its tile begins: a masked position adds a zero.

#![allow(unsafe_code)]
// Rows and vectors of a register tile are told apart by constants, so that the arrays become registers.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use super::attention_bf16::{cut_tail, round_weights, tail_lines};
use super::attention_fold::RowState;
use super::attention_tile::{CHUNK, Groups, HeadRows, MAX_ROWS_WIDE, Tile, normalise};
use super::bf16_rounding::store_pairs;
use super::line::{Line, numbers_of};
use super::simd::{Kernel, LANES, Simd};
use crate::backend::{DType, KvLayout};

/// Most groups of 16 keys whose scores are computed at once.
const MAX_GROUP_TILE: usize = 4;

/// Numbers from one row of scores to the next: room for groups computed twice to fill a tile, and no power of two.
const SCORE_STRIDE: usize = CHUNK + MAX_GROUP_TILE * LANES;
const SCORE_LINES: usize = MAX_ROWS_WIDE * SCORE_STRIDE / LANES;
/// Words of weights, two to a word, from one row to the next.
const WEIGHT_STRIDE: usize = SCORE_STRIDE / 2;

/// Whether these kernels can read a cache: pairs of numbers share a word.
pub(super) fn can_read(layout: &KvLayout) -> bool {
    layout.dtype() == DType::BF16
}

/// Lines of scratch that a tile takes.
pub(super) fn scratch_lines(head_dim: usize) -> usize {
    let row_lines = MAX_ROWS_WIDE * head_dim / LANES;
    row_lines.div_ceil(2) + SCORE_LINES + SCORE_LINES / 2 + 2 * row_lines + tail_lines(head_dim)
}

/// Places in a thread's scratch.
struct Parts<'a> {
    /// `[head_dim / 2][R]` words of two bf16, scaled.
    queries: &'a mut [Line],
    /// `[R][SCORE_STRIDE]` f32.
    scores: &'a mut [f32],
    /// The same as bf16.
    weights: &'a mut [Line],
    /// `[R][head_dim]` f32: weighted values of a chunk.
    values: &'a mut [f32],
    /// `[R][head_dim]` f32: of all chunks so far.
    folded: &'a mut [f32],
    /// The last values of a sequence with zeros after them.
    tail: &'a mut [Line],
}

impl<'a> Parts<'a> {
    fn new(lines: &'a mut [Line], head_dim: usize) -> Self {
        let row_lines = MAX_ROWS_WIDE * head_dim / LANES;
        let (queries, rest) = lines.split_at_mut(row_lines.div_ceil(2));
        let (scores, rest) = rest.split_at_mut(SCORE_LINES);
        let (weights, rest) = rest.split_at_mut(SCORE_LINES / 2);
        let (values, rest) = rest.split_at_mut(row_lines);
        let (folded, rest) = rest.split_at_mut(row_lines);
        let (scores, values, folded) = (numbers_of(scores), numbers_of(values), numbers_of(folded));
        Self { queries, scores, weights, values, folded, tail: &mut rest[..tail_lines(head_dim)] }
    }
}

/// A tile of `R` rows (those missing are computed and dropped), which keeps `G` groups of scores and `V` vectors of
/// values for each row in registers. To be run with AVX-512 where BF16 is available.
pub(super) struct DotTileKernel<'a, const R: usize, const G: usize, const V: usize>(pub(super) Tile<'a>);

impl<const R: usize, const G: usize, const V: usize> Kernel for DotTileKernel<'_, R, G, V> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Tile { head, chunks, scratch, mut target } = self.0;
        let (layout, num_rows) = (head.cache.layout(), head.rows.len());
        assert!(num_rows <= R && R <= MAX_ROWS_WIDE && G <= MAX_GROUP_TILE && can_read(layout));
        let mut parts = Parts::new(scratch.lines(), layout.head_dim());
        let mut folded = [RowState::EMPTY; R];
        // SAFETY: `attention` takes these kernels only where the instructions are.
        unsafe { round_queries::<R>(&head, parts.queries) };
        let mut upcoming = Groups::locate(&head, chunks.start);
        for chunk in chunks.clone() {
            let mut groups = upcoming;
            upcoming = if chunk + 1 < chunks.end { Groups::locate(&head, chunk + 1) } else { Groups::NONE };
            let mut states = [RowState::EMPTY; R];
            // SAFETY: the parts have room for the rows; the groups lie in blocks of the arena.
            unsafe {
                score::<R, G>(&groups, layout, &mut parts);
                normalise(s, &head, &groups, chunk, parts.scores.as_mut_ptr(), SCORE_STRIDE, &mut states);
                round_weights(num_rows, groups.num_groups, parts.scores, parts.weights, SCORE_STRIDE);
                cut_tail(&head, chunk, &mut groups, parts.tail);
                weigh_values::<R, V>(&groups, &upcoming, layout, &mut parts);
                let (states, index) = (&states[..num_rows], chunk - chunks.start);
                let (values, kept) = (parts.values.as_ptr(), parts.folded.as_mut_ptr());
                target.take_chunk(s, index, states, values, &mut folded, kept, layout.head_dim());
            }
        }
        // SAFETY: the rows were folded into `head_dim` numbers each.
        unsafe { target.finish(s, &head, &folded, parts.folded.as_ptr()) };
    }
}

/// Queries times the scale, as pairs of bf16; missing rows are zero.
///
/// # Safety
/// The machine has AVX-512 BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn round_queries<const R: usize>(head: &HeadRows, target: &mut [Line]) {
    let head_dim = head.cache.layout().head_dim();
    let words = numbers_of(target);
    words[..head_dim / 2 * R].fill(0.0);
    let row_of = |row: usize| head.query(head.rows.start + row).as_ptr();
    // SAFETY: a query has `head_dim` numbers; there are as many words as were just filled.
    unsafe { store_pairs(row_of, head.rows.len(), head_dim, head.batch.scale, words.as_mut_ptr(), R) };
}

/// Scores of all keys of the groups, masked or not. With few rows memory is what attention waits for, and blocks are
/// too small for the processor to guess what comes next: so the values of a group are asked for with its keys.
///
/// # Safety
/// The machine has AVX-512 BF16 and the groups are valid.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn score<const R: usize, const G: usize>(groups: &Groups, layout: &KvLayout, parts: &mut Parts) {
    let (num_pairs, pair_bytes) = (layout.head_dim() / 2, layout.k_pair_bytes());
    for first in (0..groups.num_groups).step_by(G) {
        let mut sums = [[_mm512_setzero_ps(); G]; R];
        let mut queries = parts.queries.as_ptr().cast::<i32>();
        for pair in 0..num_pairs {
            let mut keys = [_mm512_setzero_si512(); G];
            for group in 0..G {
                if R < MAX_ROWS_WIDE {
                    prefetch(groups.values[first + group].wrapping_add(pair * size_of::<Line>()));
                }
                // SAFETY: `first + G` is within the padded keys; a pair of each group's tile is 16 words.
                keys[group] = unsafe { _mm512_loadu_si512(groups.keys[first + group].add(pair * pair_bytes).cast()) };
            }
            for row in 0..R {
                // SAFETY: a word for each row and pair.
                let query = _mm512_set1_epi32(unsafe { *queries.add(row) });
                for group in 0..G {
                    sums[row][group] = dot(sums[row][group], query, keys[group]);
                }
            }
            queries = queries.wrapping_add(R);
        }
        for row in 0..R {
            for group in 0..G {
                let target = parts.scores[row * SCORE_STRIDE + (first + group) * LANES..][..LANES].as_mut_ptr();
                // SAFETY: 16 numbers.
                unsafe { _mm512_storeu_ps(target, sums[row][group]) };
            }
        }
    }
}

/// Sums of values times weights, `[R][head_dim]`; asks for the next chunk's keys on the way.
///
/// # Safety
/// The machine has AVX-512 BF16 and the groups are valid.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn weigh_values<const R: usize, const V: usize>(
    groups: &Groups,
    upcoming: &Groups,
    layout: &KvLayout,
    parts: &mut Parts,
) {
    if R < MAX_ROWS_WIDE {
        prefetch_keys(upcoming, layout);
    }
    let head_dim = layout.head_dim();
    let mut dim = 0;
    // SAFETY: the caller's promise; the vectors from `dim` on are below `head_dim`.
    unsafe {
        while dim + V * LANES <= head_dim {
            weigh_columns::<R, V>(groups, layout, dim, parts);
            dim += V * LANES;
        }
        while dim < head_dim {
            weigh_columns::<R, 1>(groups, layout, dim, parts);
            dim += LANES;
        }
    }
}

/// `V` vectors of dimensions from `dim` on.
///
/// # Safety
/// As [`weigh_values`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn weigh_columns<const R: usize, const V: usize>(
    groups: &Groups,
    layout: &KvLayout,
    dim: usize,
    parts: &mut Parts,
) {
    let (head_dim, pair_bytes) = (layout.head_dim(), layout.v_pair_bytes());
    let mut sums = [[_mm512_setzero_ps(); V]; R];
    let mut weights = parts.weights.as_ptr().cast::<i32>();
    for group in 0..groups.num_groups {
        // SAFETY: a word of a dimension takes 4 bytes.
        let mut words = unsafe { groups.values[group].add(4 * dim) };
        for _ in 0..LANES / 2 {
            let mut values = [_mm512_setzero_si512(); V];
            for vector in 0..V {
                // SAFETY: a group is 8 pairs of tokens, a word for each dimension.
                values[vector] = unsafe { _mm512_loadu_si512(words.add(vector * size_of::<Line>()).cast()) };
            }
            for row in 0..R {
                // SAFETY: a row has a word for each pair of positions of the chunk.
                let weight = _mm512_set1_epi32(unsafe { *weights.add(row * WEIGHT_STRIDE) });
                for vector in 0..V {
                    sums[row][vector] = dot(sums[row][vector], weight, values[vector]);
                }
            }
            words = words.wrapping_add(pair_bytes);
            weights = weights.wrapping_add(1);
        }
    }
    for row in 0..R {
        for vector in 0..V {
            let target = parts.values[row * head_dim + dim + vector * LANES..][..LANES].as_mut_ptr();
            // SAFETY: 16 numbers.
            unsafe { _mm512_storeu_ps(target, sums[row][vector]) };
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn dot(sum: __m512, a: __m512i, b: __m512i) -> __m512 {
    // SAFETY: both types are 512 bits without invalid values.
    unsafe {
        _mm512_dpbf16_ps(sum, std::mem::transmute::<__m512i, __m512bh>(a), std::mem::transmute::<__m512i, __m512bh>(b))
    }
}

#[inline]
fn prefetch(address: *const u8) {
    // SAFETY: every x86-64 has SSE; asking for memory never faults.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) };
}

#[inline]
fn prefetch_keys(upcoming: &Groups, layout: &KvLayout) {
    for keys in &upcoming.keys[..upcoming.num_groups] {
        for pair in 0..layout.head_dim() / 2 {
            prefetch(keys.wrapping_add(pair * layout.k_pair_bytes()));
        }
    }
}
