//! Copies of stored tokens to other slots and positions: K rotated by the difference of positions, V as it is.
//!
//! Tokens that lie side by side in both blocks are a run. A vector holds one dimension of up to 16 tokens of a run, as
//! they lie in a K tile, so neither reading nor writing takes numbers apart.

#![allow(unsafe_code)]

use half::bf16;

use super::simd::{Kernel, LANES, Simd, dispatch};
use super::{Isa, KvArena, RopeTable, ThreadPool};
use crate::backend::{DType, KvLayout};

/// Work below this many numbers is not worth waking other threads.
const MIN_PARALLEL_NUMBERS: usize = 8 * 1024;

/// Copies of a task: a few blocks, so that few runs are cut.
const TASK_COPIES: usize = 64;

/// Tasks of a call are at most as many as a region of the pool takes.
const MAX_COPIES: usize = super::pool::MAX_TASKS * TASK_COPIES;

const WORD_BYTES: usize = 4;

/// Which tokens go where. No block has both a source and a target, and targets differ.
#[derive(Clone, Copy)]
pub struct RotateGatherBatch<'a> {
    /// `block * block_size + offset` of each stored token.
    pub source_slots: &'a [i32],
    /// The same of its copy.
    pub target_slots: &'a [i32],
    /// Position of the copy minus that of the stored token; its absolute value is inside `table`.
    pub position_deltas: &'a [i32],
    /// Angles of the layer.
    pub table: &'a RopeTable,
    /// Layer of the cache.
    pub layer: usize,
}

/// Writes every copy: V of all KV heads as it is stored, K rotated (pairs `(i, i + head_dim / 2)`) by the delta, in f32
/// and rounded once to the type of the cache. A delta of 0 leaves the bits as they are.
pub fn rotate_gather(pool: &mut ThreadPool, isa: Isa, batch: &RotateGatherBatch, cache: &KvArena) {
    let layout = cache.layout();
    batch.check(layout);
    let num_copies = batch.source_slots.len();
    let gather = |first: usize, count: usize| {
        dispatch(isa, GatherTokens { batch, cache, first, end: first + count });
    };
    let numbers = num_copies * layout.num_kv_heads() * layout.head_dim();
    if numbers < MIN_PARALLEL_NUMBERS || pool.num_threads() == 1 {
        return gather(0, num_copies);
    }
    pool.run(num_copies.div_ceil(TASK_COPIES), |task, _| {
        let first = task * TASK_COPIES;
        gather(first, TASK_COPIES.min(num_copies - first));
    });
}

impl RotateGatherBatch<'_> {
    fn check(&self, layout: &KvLayout) {
        let num_copies = self.source_slots.len();
        assert_eq!(self.target_slots.len(), num_copies, "each copy has a target");
        assert_eq!(self.position_deltas.len(), num_copies, "each copy has a delta");
        assert!(num_copies <= MAX_COPIES, "{num_copies} copies in one call; {MAX_COPIES} at most");
        assert_eq!(self.table.head_dim(), layout.head_dim(), "the rotary table is for heads of this size");
        assert!(self.layer < layout.num_layers(), "layer {} of {}", self.layer, layout.num_layers());
    }

    /// The longest run from copy `first` on that ends before `end`.
    fn run(&self, layout: &KvLayout, first: usize, end: usize) -> Run {
        let block_size = layout.block_size();
        let slot = |slots: &[i32]| usize::try_from(slots[first]).expect("slots of a copy are not negative");
        let (source, target, delta) = (slot(self.source_slots), slot(self.target_slots), self.position_deltas[first]);
        let room = block_size - (source % block_size).max(target % block_size);
        let follows = |at: usize| {
            let step = (at - first) as i32;
            self.source_slots[at] == self.source_slots[first] + step
                && self.target_slots[at] == self.target_slots[first] + step
                && self.position_deltas[at] == delta
        };
        let end = end.min(first + room);
        let len = (first + 1..end).find(|at| !follows(*at)).unwrap_or(end) - first;
        Run { source, target, len, delta }
    }
}

/// Tokens side by side in one block and in another.
#[derive(Clone, Copy)]
struct Run {
    source: usize,
    target: usize,
    len: usize,
    delta: i32,
}

struct GatherTokens<'a> {
    batch: &'a RotateGatherBatch<'a>,
    cache: &'a KvArena<'a>,
    first: usize,
    end: usize,
}

impl Kernel for GatherTokens<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let layout = self.cache.layout();
        let mut first = self.first;
        while first < self.end {
            let run = self.batch.run(layout, first, self.end);
            for kv_head in 0..layout.num_kv_heads() {
                gather_head(s, self.batch, self.cache, &run, kv_head);
            }
            first += run.len;
        }
    }
}

/// One run of one head.
#[inline(always)]
fn gather_head<S: Simd>(s: S, batch: &RotateGatherBatch, cache: &KvArena, run: &Run, kv_head: usize) {
    let layout = cache.layout();
    let block_size = layout.block_size();
    let (source, target) = (cache.block(run.source / block_size), cache.block(run.target / block_size));
    let (from, to) = (run.source % block_size, run.target % block_size);
    let (k_tile, v_tile) = (layout.k_tile_offset(batch.layer, kv_head), layout.v_tile_offset(batch.layer, kv_head));
    let angles = batch.table.row(run.delta.unsigned_abs() as usize);
    // SAFETY: the tiles lie inside the blocks, and a run ends inside both. Nobody writes to a block with sources, and
    // no other task writes numbers of these targets.
    unsafe {
        let (source_k, target_k) = (source.add(k_tile + from * WORD_BYTES), target.add(k_tile + to * WORD_BYTES));
        match (run.delta, layout.dtype()) {
            (0, _) => copy_keys(layout, source_k, target_k, run.len),
            (delta, DType::BF16) => rotate_bf16(s, layout, source_k, target_k, run.len, angles, delta < 0),
            (delta, _) => rotate_f32(s, layout, source_k, target_k, run.len, angles, delta < 0),
        }
        match layout.dtype() {
            DType::BF16 => copy_values_bf16(layout, source.add(v_tile), target.add(v_tile), from, to, run.len),
            _ => {
                let row_bytes = layout.v_offset(1, 0);
                let (source, target) = (source.add(v_tile + from * row_bytes), target.add(v_tile + to * row_bytes));
                std::ptr::copy_nonoverlapping(source, target, run.len * row_bytes);
            }
        }
    }
}

/// Rows of a K tile: a word of each token, which is two dimensions in bf16 and one in f32.
fn num_key_rows(layout: &KvLayout) -> usize {
    layout.tile_bytes() / (layout.block_size() * WORD_BYTES)
}

/// # Safety
/// `source` and `target` are the places of `len` tokens in the first rows of two K tiles.
#[inline(always)]
unsafe fn copy_keys(layout: &KvLayout, source: *const u8, target: *mut u8, len: usize) {
    for row in 0..num_key_rows(layout) {
        let offset = row * layout.block_size() * WORD_BYTES;
        // SAFETY: the caller's promise; rows of a tile are a word of each token.
        unsafe { std::ptr::copy_nonoverlapping(source.add(offset), target.add(offset), len * WORD_BYTES) };
    }
}

/// Rotates the keys of `len` tokens of a bf16 tile; `backwards` turns the other way.
///
/// # Safety
/// As [`copy_keys`].
#[inline(always)]
unsafe fn rotate_bf16<S: Simd>(
    s: S,
    layout: &KvLayout,
    source: *const u8,
    target: *mut u8,
    len: usize,
    (cos, sin): (&[f32], &[f32]),
    backwards: bool,
) {
    let half = num_key_rows(layout) / 2;
    let row_bytes = layout.block_size() * WORD_BYTES;
    for row in 0..half {
        let angles = [2 * row, 2 * row + 1].map(|dim| Angle::new(s, cos[dim], sin[dim], backwards));
        for token in (0..len).step_by(LANES) {
            let (count, low) = (LANES.min(len - token), row * row_bytes + token * WORD_BYTES);
            let high = low + half * row_bytes;
            // SAFETY: the caller's promise; vectors are read from and written to whole arrays.
            unsafe {
                let (a, b) = (load_words(source.add(low), count), load_words(source.add(high), count));
                let (a, b) = (a.as_ptr().cast::<u8>(), b.as_ptr().cast::<u8>());
                let (a0, b0) = angles[0].rotate(s, s.load_bf16_low(a), s.load_bf16_low(b));
                let (a1, b1) = angles[1].rotate(s, s.load_bf16_high(a), s.load_bf16_high(b));
                store_words(target.add(low), &pack_bf16(s, a0, a1), count);
                store_words(target.add(high), &pack_bf16(s, b0, b1), count);
            }
        }
    }
}

/// The same for an f32 tile.
///
/// # Safety
/// As [`copy_keys`].
#[inline(always)]
unsafe fn rotate_f32<S: Simd>(
    s: S,
    layout: &KvLayout,
    source: *const u8,
    target: *mut u8,
    len: usize,
    (cos, sin): (&[f32], &[f32]),
    backwards: bool,
) {
    let half = num_key_rows(layout) / 2;
    let row_bytes = layout.block_size() * WORD_BYTES;
    for row in 0..half {
        let angle = Angle::new(s, cos[row], sin[row], backwards);
        for token in (0..len).step_by(LANES) {
            let (count, low) = (LANES.min(len - token), row * row_bytes + token * WORD_BYTES);
            let high = low + half * row_bytes;
            // SAFETY: the caller's promise; vectors are read from whole arrays.
            unsafe {
                let (a, b) = (load_words(source.add(low), count), load_words(source.add(high), count));
                let (a, b) = angle.rotate(s, s.load(a.as_ptr().cast()), s.load(b.as_ptr().cast()));
                store_words(target.add(low), &s.to_array(a).map(f32::to_bits), count);
                store_words(target.add(high), &s.to_array(b).map(f32::to_bits), count);
            }
        }
    }
}

/// How far one pair of dimensions is turned.
struct Angle<V> {
    cos: V,
    sin: V,
}

impl<V: Copy> Angle<V> {
    #[inline(always)]
    fn new<S: Simd<F32 = V>>(s: S, cos: f32, sin: f32, backwards: bool) -> Self {
        Self { cos: s.splat(cos), sin: s.splat(if backwards { -sin } else { sin }) }
    }

    /// The same operations as when a token is stored, so that both round alike.
    #[inline(always)]
    fn rotate<S: Simd<F32 = V>>(&self, s: S, a: V, b: V) -> (V, V) {
        let low = s.mul_add(a, self.cos, s.sub(s.zero(), s.mul(b, self.sin)));
        (low, s.mul_add(b, self.cos, s.mul(a, self.sin)))
    }
}

/// `count` words, then zeros.
///
/// # Safety
/// `count <= 16` words can be read at `source`.
#[inline(always)]
unsafe fn load_words(source: *const u8, count: usize) -> [u32; LANES] {
    let mut words = [0; LANES];
    // SAFETY: the caller's promise. A whole vector is one load, because its length is a constant.
    unsafe {
        if count == LANES {
            std::ptr::copy_nonoverlapping(source, words.as_mut_ptr().cast(), LANES * WORD_BYTES);
        } else {
            std::ptr::copy_nonoverlapping(source, words.as_mut_ptr().cast(), count * WORD_BYTES);
        }
    }
    words
}

/// # Safety
/// `count <= 16` words can be written at `target`.
#[inline(always)]
unsafe fn store_words(target: *mut u8, words: &[u32; LANES], count: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        if count == LANES {
            std::ptr::copy_nonoverlapping(words.as_ptr().cast(), target, LANES * WORD_BYTES);
        } else {
            std::ptr::copy_nonoverlapping(words.as_ptr().cast(), target, count * WORD_BYTES);
        }
    }
}

#[inline(always)]
fn pack_bf16<S: Simd>(s: S, low: S::F32, high: S::F32) -> [u32; LANES] {
    let (low, high) = (s.to_array(low), s.to_array(high));
    let round = |x: f32| u32::from(bf16::from_f32(x).to_bits());
    std::array::from_fn(|lane| (round(low[lane]) | round(high[lane]) << 16).to_le())
}

/// Values of `len` tokens from token `from` to token `to` of two bf16 V tiles, whose words are a dimension of two
/// tokens. A word of which one token only is copied may be another task's as well, so just that half is written.
///
/// # Safety
/// The tokens lie in the tiles that begin at `source` and `target`; nobody writes to the source's block.
#[inline(always)]
unsafe fn copy_values_bf16(layout: &KvLayout, source: *const u8, target: *mut u8, from: usize, to: usize, len: usize) {
    let (pair_bytes, head_dim) = (layout.v_pair_bytes(), layout.head_dim());
    let mut done = 0;
    while done < len {
        let (from, to) = (from + done, to + done);
        let is_whole = to.is_multiple_of(2) && done + 1 < len;
        // SAFETY: the caller's promise; `from + 1` is copied too when the pair is whole.
        unsafe {
            let pair = source.add(from / 2 * pair_bytes);
            match (is_whole, from.is_multiple_of(2)) {
                (false, _) => {
                    copy_halves(source.add(layout.v_offset(from, 0)), target.add(layout.v_offset(to, 0)), head_dim)
                }
                (true, true) => std::ptr::copy_nonoverlapping(pair, target.add(to / 2 * pair_bytes), pair_bytes),
                (true, false) => join_halves(pair, pair.add(pair_bytes), target.add(to / 2 * pair_bytes), head_dim),
            }
        }
        done += if is_whole { 2 } else { 1 };
    }
}

/// One half of each of `len` words.
///
/// # Safety
/// The halves, a word apart, can be read and written.
#[inline(always)]
unsafe fn copy_halves(source: *const u8, target: *mut u8, len: usize) {
    for dim in 0..len {
        // SAFETY: the caller's promise.
        unsafe {
            let half = source.add(dim * WORD_BYTES).cast::<[u8; 2]>().read();
            target.add(dim * WORD_BYTES).cast::<[u8; 2]>().write(half);
        }
    }
}

/// Words of the high halves of `first` and the low halves of `second`.
///
/// # Safety
/// All three are `len` words.
#[inline(always)]
unsafe fn join_halves(first: *const u8, second: *const u8, target: *mut u8, len: usize) {
    for dim in 0..len {
        // SAFETY: the caller's promise.
        unsafe {
            let word = |row: *const u8| u32::from_le(row.add(dim * WORD_BYTES).cast::<u32>().read_unaligned());
            let joined = word(first) >> 16 | word(second) << 16;
            target.add(dim * WORD_BYTES).cast::<u32>().write_unaligned(joined.to_le());
        }
    }
}

#[cfg(test)]
mod tests;
