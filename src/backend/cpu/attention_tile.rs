//! Attention of a few query rows of one KV head, a chunk of keys after another.
//!
//! Rows are `(query token, head of the group)`, so a key or value that was read serves all of them. Every number of a
//! row is computed by the same operations in the same order however many rows share a tile: scores sum over the head's
//! dimensions in order, weighted values over positions in order, chunks begin at multiples of [`CHUNK`] and are folded
//! in order, and a masked position adds a zero.

#![allow(unsafe_code)]
// Rows and vectors of a register tile are told apart by constants, so that the arrays become registers.
#![allow(clippy::needless_range_loop, clippy::too_many_arguments)]

use std::marker::PhantomData;
use std::ops::Range;

use super::KvArena;
use super::attention::{AttentionBatch, SequenceRows};
use super::attention_fold::{RowState, TileTarget};
use super::exp::exp;
use super::line::Line;
use super::simd::{Kernel, LANES, Simd};
use super::softcap::capped;
use crate::backend::KvLayout;

/// Positions whose weights are normalised together. Changing it changes results.
pub(super) const CHUNK: usize = 256;

/// Most rows of a tile where 32 registers hold a vector each, and elsewhere.
pub(super) const MAX_ROWS_WIDE: usize = 12;
pub(super) const MAX_ROWS: usize = 6;

/// Most groups of 16 keys whose scores are computed at once.
const MAX_GROUP_TILE: usize = 8;
const MAX_GROUPS: usize = CHUNK / LANES;

/// Scores of a row, with room for groups computed twice to fill a tile. Not a power of two, or rows share cache sets.
const SCORE_STRIDE: usize = CHUNK + MAX_GROUP_TILE * LANES;

const LINE_BYTES: usize = 64;

/// What one thread needs for a tile.
#[derive(Default)]
pub(super) struct TileScratch {
    lines: Vec<Line>,
}

impl TileScratch {
    /// Makes room for the tiles of this file; `lines` are what other kernels need.
    pub(super) fn reserve(&mut self, head_dim: usize, lines: usize) {
        let lines = lines.max(MAX_ROWS_WIDE * (3 * head_dim + SCORE_STRIDE) / LANES);
        if self.lines.len() < lines {
            self.lines.resize(lines, Line::ZERO);
        }
    }

    pub(super) fn lines(&mut self) -> &mut [Line] {
        &mut self.lines
    }

    /// Room for the folded values of a tile's rows.
    pub(super) fn folded(&mut self, head_dim: usize) -> *mut f32 {
        self.parts(head_dim).folded
    }

    fn parts(&mut self, head_dim: usize) -> TileParts {
        let rows = MAX_ROWS_WIDE * head_dim;
        assert!(self.lines.len() * LANES >= 3 * rows + MAX_ROWS_WIDE * SCORE_STRIDE, "the scratch was reserved");
        let start = self.lines.as_mut_ptr().cast::<f32>();
        // SAFETY: the four parts lie one after another in the lines.
        unsafe {
            TileParts { q: start, values: start.add(rows), folded: start.add(2 * rows), scores: start.add(3 * rows) }
        }
    }
}

/// Places in a thread's scratch; each has room for the largest tile.
struct TileParts {
    /// `[head_dim][R]`, scaled.
    q: *mut f32,
    /// `[R][head_dim]`: weighted values of a chunk.
    values: *mut f32,
    /// `[R][head_dim]`: of all chunks so far.
    folded: *mut f32,
    /// `[R][SCORE_STRIDE]`: scores, then weights.
    scores: *mut f32,
}

/// Rows of one KV head of one sequence.
pub(super) struct HeadRows<'a> {
    pub(super) batch: &'a AttentionBatch<'a>,
    pub(super) cache: &'a KvArena<'a>,
    pub(super) sequence: SequenceRows<'a>,
    pub(super) kv_head: usize,
    pub(super) rows: Range<usize>,
}

/// Some rows and the chunks of keys they look at.
pub(super) struct Tile<'a> {
    pub(super) head: HeadRows<'a>,
    pub(super) chunks: Range<usize>,
    pub(super) scratch: &'a mut TileScratch,
    pub(super) target: TileTarget<'a>,
}

/// How the cache keeps a number.
pub(super) trait KvElement {
    /// Member `MEMBER` of 16 pairs. For types that keep the members apart, `member_bytes` lies between them.
    ///
    /// # Safety
    /// 64 bytes (of the member) can be read.
    unsafe fn load<S: Simd, const MEMBER: usize>(s: S, pair: *const u8, member_bytes: usize) -> S::F32;
}

/// Pairs share a word.
pub(super) struct Bf16;

impl KvElement for Bf16 {
    #[inline(always)]
    unsafe fn load<S: Simd, const MEMBER: usize>(s: S, pair: *const u8, _: usize) -> S::F32 {
        // SAFETY: the caller's promise.
        unsafe { if MEMBER == 0 { s.load_bf16_low(pair) } else { s.load_bf16_high(pair) } }
    }
}

/// Members lie in rows of their own.
pub(super) struct F32;

impl KvElement for F32 {
    #[inline(always)]
    unsafe fn load<S: Simd, const MEMBER: usize>(s: S, pair: *const u8, member_bytes: usize) -> S::F32 {
        // SAFETY: the caller's promise.
        unsafe { s.load(pair.add(MEMBER * member_bytes).cast()) }
    }
}

/// A tile of `R` rows (those missing are computed and dropped). In registers it keeps `GW` groups of scores and `VW`
/// vectors of values for each row where registers are many, `GN` and `VN` elsewhere.
pub(super) struct TileKernel<'a, E, const R: usize, const GW: usize, const VW: usize, const GN: usize, const VN: usize>
{
    tile: Tile<'a>,
    element: PhantomData<E>,
}

impl<'a, E, const R: usize, const GW: usize, const VW: usize, const GN: usize, const VN: usize>
    TileKernel<'a, E, R, GW, VW, GN, VN>
{
    pub(super) fn new(tile: Tile<'a>) -> Self {
        Self { tile, element: PhantomData }
    }
}

impl<E: KvElement, const R: usize, const GW: usize, const VW: usize, const GN: usize, const VN: usize> Kernel
    for TileKernel<'_, E, R, GW, VW, GN, VN>
{
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if S::IS_WIDE { attend::<S, E, R, GW, VW>(s, self.tile) } else { attend::<S, E, R, GN, VN>(s, self.tile) }
    }
}

#[inline(always)]
fn attend<S: Simd, E: KvElement, const R: usize, const G: usize, const V: usize>(s: S, tile: Tile) {
    let Tile { head, chunks, scratch, mut target } = tile;
    let layout = head.cache.layout();
    let head_dim = layout.head_dim();
    let num_rows = head.rows.len();
    assert!(num_rows <= R && R <= MAX_ROWS_WIDE && G <= MAX_GROUP_TILE);
    let parts = scratch.parts(head_dim);
    pack_queries::<R>(&head, parts.q);
    let mut folded = [RowState::EMPTY; R];
    let mut upcoming = Groups::locate(&head, chunks.start);
    for chunk in chunks.clone() {
        let groups = upcoming;
        upcoming = if chunk + 1 < chunks.end { Groups::locate(&head, chunk + 1) } else { Groups::NONE };
        let keys = head.keys_of(chunk);
        let mut states = [RowState::EMPTY; R];
        // SAFETY: the parts have room for `R` rows; the groups lie in blocks of the arena.
        unsafe {
            score::<S, E, R, G>(s, &groups, layout, parts.q, parts.scores);
            normalise(s, &head, &groups, chunk, parts.scores, SCORE_STRIDE, &mut states);
            weigh_values::<S, E, R, V>(s, &groups, &upcoming, layout, &keys, parts.scores, parts.values);
        }
        // SAFETY: both hold `R` rows of `head_dim` numbers, and are different parts of the scratch.
        unsafe {
            let states = &states[..num_rows];
            target.take_chunk(s, chunk - chunks.start, states, parts.values, &mut folded, parts.folded, head_dim);
        }
    }
    // SAFETY: as above.
    unsafe { target.finish(s, &head, &folded, parts.folded) };
}

impl HeadRows<'_> {
    /// The query of a row.
    #[inline(always)]
    pub(super) fn query(&self, row: usize) -> &[f32] {
        let layout = self.cache.layout();
        let start = self.sequence.query_start(self.batch, layout, self.kv_head, row);
        &self.batch.qkv[start..start + layout.head_dim()]
    }

    /// Positions of `chunk` that some row sees.
    pub(super) fn keys_of(&self, chunk: usize) -> Range<usize> {
        let first = self.sequence.key_range(self.batch, self.rows.start);
        let last = self.sequence.key_range(self.batch, self.rows.end - 1);
        first.start.max(chunk * CHUNK)..last.end.min((chunk + 1) * CHUNK)
    }
}

/// Queries of the tile as `[head_dim][R]`, times the scale; missing rows are zero.
#[inline(always)]
fn pack_queries<const R: usize>(head: &HeadRows, target: *mut f32) {
    let head_dim = head.cache.layout().head_dim();
    for row in 0..R {
        let query = head.rows.start + row;
        if query < head.rows.end {
            for (dim, x) in head.query(query).iter().enumerate() {
                // SAFETY: the target holds `R` times `head_dim` numbers.
                unsafe { *target.add(dim * R + row) = x * head.batch.scale };
            }
        } else {
            // SAFETY: as above.
            (0..head_dim).for_each(|dim| unsafe { *target.add(dim * R + row) = 0.0 });
        }
    }
}

/// Where the keys and values of a chunk lie, by groups of 16 positions.
pub(super) struct Groups {
    pub(super) num_groups: usize,
    /// Position of the first key of the first group.
    pub(super) first_position: usize,
    /// The last one is repeated to fill a tile of groups, here and below.
    pub(super) keys: [*const u8; MAX_GROUPS + MAX_GROUP_TILE],
    pub(super) values: [*const u8; MAX_GROUPS + MAX_GROUP_TILE],
}

impl Groups {
    /// Those of no chunk: nothing lies there.
    pub(super) const NONE: Groups = Groups {
        num_groups: 0,
        first_position: 0,
        keys: [std::ptr::null(); MAX_GROUPS + MAX_GROUP_TILE],
        values: [std::ptr::null(); MAX_GROUPS + MAX_GROUP_TILE],
    };

    #[inline(always)]
    pub(super) fn locate(head: &HeadRows, chunk: usize) -> Self {
        let layout = head.cache.layout();
        let positions = head.keys_of(chunk);
        let first_group = positions.start / LANES;
        let num_groups = positions.end.div_ceil(LANES) - first_group;
        let k_tile = layout.k_tile_offset(head.batch.layer, head.kv_head);
        let v_tile = layout.v_tile_offset(head.batch.layer, head.kv_head);
        let mut groups = Groups { num_groups, first_position: first_group * LANES, ..Groups::NONE };
        for group in 0..num_groups {
            let position = groups.first_position + group * LANES;
            let token = position % layout.block_size();
            let block: *const u8 = head.cache.block(head.sequence.block(position / layout.block_size()));
            // SAFETY: a group of positions of a block; its numbers lie in the tiles of the block.
            unsafe {
                groups.keys[group] = block.add(k_tile + layout.k_offset(token, 0));
                groups.values[group] = block.add(v_tile + layout.v_offset(token, 0));
            }
        }
        let last = (groups.keys[num_groups - 1], groups.values[num_groups - 1]);
        groups.keys[num_groups..].fill(last.0);
        groups.values[num_groups..].fill(last.1);
        groups
    }
}

/// Scores `[R][SCORE_STRIDE]` of all keys of the groups, masked or not.
///
/// # Safety
/// `q` is `[head_dim][R]`, `scores` holds `R` rows, the groups are valid.
#[inline(always)]
unsafe fn score<S: Simd, E: KvElement, const R: usize, const G: usize>(
    s: S,
    groups: &Groups,
    layout: &KvLayout,
    q: *const f32,
    scores: *mut f32,
) {
    let (num_pairs, pair_bytes) = (layout.head_dim() / 2, layout.k_pair_bytes());
    for first in (0..groups.num_groups).step_by(G) {
        let mut sums = [[s.zero(); G]; R];
        // SAFETY: `first + G` is within the padded keys; `num_pairs` pairs of each group lie in its tile, and `R`
        // rows of scores have room for groups of a whole tile.
        unsafe {
            let keys: [*const u8; G] = *groups.keys.as_ptr().add(first).cast();
            let mut q = q;
            for pair in 0..num_pairs {
                let offset = pair * pair_bytes;
                if R < MAX_ROWS_WIDE {
                    for group in 0..G {
                        s.prefetch(groups.values[first + group].wrapping_add(pair * LINE_BYTES));
                    }
                }
                add_products::<S, E, R, G, 0>(s, &keys, offset, pair_bytes / 2, q, &mut sums);
                add_products::<S, E, R, G, 1>(s, &keys, offset, pair_bytes / 2, q.add(R), &mut sums);
                q = q.add(2 * R);
            }
            for row in 0..R {
                for group in 0..G {
                    s.store(scores.add(row * SCORE_STRIDE + (first + group) * LANES), sums[row][group]);
                }
            }
        }
    }
}

/// # Safety
/// As [`score`].
#[inline(always)]
unsafe fn add_products<S: Simd, E: KvElement, const R: usize, const G: usize, const MEMBER: usize>(
    s: S,
    keys: &[*const u8; G],
    offset: usize,
    member_bytes: usize,
    q: *const f32,
    sums: &mut [[S::F32; G]; R],
) {
    let mut k = [s.zero(); G];
    // SAFETY: the caller's promise.
    unsafe {
        for group in 0..G {
            k[group] = E::load::<S, MEMBER>(s, keys[group].add(offset), member_bytes);
        }
        for row in 0..R {
            let q = s.splat(*q.add(row));
            for group in 0..G {
                sums[row][group] = s.mul_add(q, k[group], sums[row][group]);
            }
        }
    }
}

/// Turns the scores of every row, `stride` numbers apart, into weights `e^(score - max)`, zero where masked. Scores are
/// capped before, where the model says so.
///
/// # Safety
/// `scores` holds the rows of `head`.
#[inline(always)]
pub(super) unsafe fn normalise<S: Simd>(
    s: S,
    head: &HeadRows,
    groups: &Groups,
    chunk: usize,
    scores: *mut f32,
    stride: usize,
    states: &mut [RowState],
) {
    for (row, state) in states.iter_mut().enumerate().take(head.rows.len()) {
        let keys = head.sequence.key_range(head.batch, head.rows.start + row);
        let start = keys.start.max(chunk * CHUNK).max(groups.first_position) - groups.first_position;
        let end = keys.end.min((chunk + 1) * CHUNK).max(groups.first_position) - groups.first_position;
        // SAFETY: the caller's promise.
        unsafe {
            let scores = scores.add(row * stride);
            if let Some(cap) = head.batch.softcap {
                cap_row(s, scores, &(start..end), cap);
            }
            *state = normalise_row(s, scores, groups.num_groups, start..end);
        }
    }
}

/// Caps the scores of the columns `seen`, and others beside them.
///
/// # Safety
/// `scores` holds the vectors with those columns.
#[inline(always)]
unsafe fn cap_row<S: Simd>(s: S, scores: *mut f32, seen: &Range<usize>, cap: f32) {
    for group in seen.start / LANES..seen.end.div_ceil(LANES) {
        // SAFETY: one of the vectors.
        unsafe {
            let place = scores.add(group * LANES);
            s.store(place, capped(s, s.load(place), cap));
        }
    }
}

/// One row; `seen` are the columns that are not masked.
///
/// # Safety
/// `scores` holds `num_groups` vectors.
#[inline(always)]
unsafe fn normalise_row<S: Simd>(s: S, scores: *mut f32, num_groups: usize, seen: Range<usize>) -> RowState {
    let is_empty = seen.start >= seen.end;
    let seen_groups = if is_empty { 0..0 } else { seen.start / LANES..seen.end.div_ceil(LANES) };
    let mut max = s.splat(f32::NEG_INFINITY);
    let mut sum = s.zero();
    // SAFETY: every access is to one of the vectors.
    unsafe {
        for group in (0..seen_groups.start).chain(seen_groups.end..num_groups) {
            s.store(scores.add(group * LANES), s.zero());
        }
        if is_empty {
            return RowState::EMPTY;
        }
        for group in seen_groups.clone() {
            let place = scores.add(group * LANES);
            let mask = lane_mask(group, &seen);
            let x = s.select(mask, s.load(place), s.splat(f32::NEG_INFINITY));
            s.store(place, x);
            max = s.max(x, max);
        }
        let max = s.reduce_max(max);
        for group in seen_groups {
            let place = scores.add(group * LANES);
            let weight = exp(s, s.sub(s.load(place), s.splat(max)));
            s.store(place, weight);
            sum = s.add(sum, weight);
        }
        RowState { max, sum: s.reduce_add(sum), is_empty: false }
    }
}

/// The lanes of a group whose columns are seen; the group has at least one.
#[inline(always)]
fn lane_mask(group: usize, seen: &Range<usize>) -> u16 {
    let start = seen.start.saturating_sub(group * LANES);
    let end = (seen.end - group * LANES).min(LANES);
    ((1u32 << end) - (1u32 << start)) as u16
}

/// Sums of values times weights, `[R][head_dim]`, over the positions that some row sees: others may hold anything.
///
/// # Safety
/// `weights` and `target` hold `R` rows, the groups are valid.
#[inline(always)]
unsafe fn weigh_values<S: Simd, E: KvElement, const R: usize, const V: usize>(
    s: S,
    groups: &Groups,
    upcoming: &Groups,
    layout: &KvLayout,
    positions: &Range<usize>,
    weights: *const f32,
    target: *mut f32,
) {
    let head_dim = layout.head_dim();
    let columns = positions.start - groups.first_position..positions.end - groups.first_position;
    let mut dim = 0;
    // SAFETY: the caller's promise; `dim` and the vectors after it are below `head_dim`.
    unsafe {
        while dim + V * LANES <= head_dim {
            weigh_columns::<S, E, R, V>(s, groups, upcoming, layout, &columns, dim, weights, target.add(dim));
            dim += V * LANES;
        }
        while dim < head_dim {
            weigh_columns::<S, E, R, 1>(s, groups, upcoming, layout, &columns, dim, weights, target.add(dim));
            dim += LANES;
        }
    }
}

/// The share of token pair `part` of 8 in asking for the keys of a group. With few rows memory is what attention waits
/// for, and blocks are too small for the processor to guess what comes next.
#[inline(always)]
fn prefetch_keys<S: Simd>(s: S, keys: *const u8, part: usize, layout: &KvLayout) {
    let num_pairs = layout.head_dim() / LANES;
    for pair in part * num_pairs..(part + 1) * num_pairs {
        s.prefetch(keys.wrapping_add(pair * layout.k_pair_bytes()));
    }
}

/// `V` vectors of dimensions from `dim` on.
///
/// # Safety
/// As [`weigh_values`].
#[inline(always)]
unsafe fn weigh_columns<S: Simd, E: KvElement, const R: usize, const V: usize>(
    s: S,
    groups: &Groups,
    upcoming: &Groups,
    layout: &KvLayout,
    columns: &Range<usize>,
    dim: usize,
    weights: *const f32,
    target: *mut f32,
) {
    let pair_bytes = layout.v_pair_bytes();
    let mut sums = [[s.zero(); V]; R];
    // SAFETY: the caller's promise; a word or an f32 of a dimension takes 4 bytes.
    unsafe {
        for group in 0..groups.num_groups {
            let values = groups.values[group].add(4 * dim);
            let weights = weights.add(group * LANES);
            let mut token = columns.start.saturating_sub(group * LANES);
            let end = (columns.end - group * LANES).min(LANES);
            if token % 2 == 1 {
                let pair = values.add(token / 2 * pair_bytes);
                add_weighted::<S, E, R, V, 1>(s, pair, pair_bytes / 2, weights.add(token), &mut sums);
                token += 1;
            }
            while token + 1 < end {
                if R < MAX_ROWS_WIDE && dim == 0 {
                    prefetch_keys(s, upcoming.keys[group], token / 2, layout);
                }
                let pair = values.add(token / 2 * pair_bytes);
                add_weighted::<S, E, R, V, 0>(s, pair, pair_bytes / 2, weights.add(token), &mut sums);
                add_weighted::<S, E, R, V, 1>(s, pair, pair_bytes / 2, weights.add(token + 1), &mut sums);
                token += 2;
            }
            if token < end {
                let pair = values.add(token / 2 * pair_bytes);
                add_weighted::<S, E, R, V, 0>(s, pair, pair_bytes / 2, weights.add(token), &mut sums);
            }
        }
        for row in 0..R {
            for vector in 0..V {
                s.store(target.add(row * layout.head_dim() + vector * LANES), sums[row][vector]);
            }
        }
    }
}

/// # Safety
/// As [`weigh_values`].
#[inline(always)]
unsafe fn add_weighted<S: Simd, E: KvElement, const R: usize, const V: usize, const MEMBER: usize>(
    s: S,
    pair: *const u8,
    member_bytes: usize,
    weights: *const f32,
    sums: &mut [[S::F32; V]; R],
) {
    let mut values = [s.zero(); V];
    // SAFETY: the caller's promise.
    unsafe {
        for vector in 0..V {
            values[vector] = E::load::<S, MEMBER>(s, pair.add(vector * LANES * 4), member_bytes);
        }
        for row in 0..R {
            let weight = s.splat(*weights.add(row * SCORE_STRIDE));
            for vector in 0..V {
                sums[row][vector] = s.mul_add(weight, values[vector], sums[row][vector]);
            }
        }
    }
}
