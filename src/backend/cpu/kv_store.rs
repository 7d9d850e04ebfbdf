//! What happens to a token between the qkv projection and attention: norms of the heads, rotation, and storing its
//! keys and values in the cache.

#![allow(unsafe_code)]

use super::disjoint::DisjointSlice;
use super::norm::rms_norm_row;
use super::simd::{Kernel, LANES, Simd, dispatch};
use super::{Isa, KvArena, RopeTable, ThreadPool};
use crate::backend::{DType, KvLayout};

/// Work below this many numbers is not worth waking other threads.
const MIN_PARALLEL_NUMBERS: usize = 8 * 1024;

/// Tokens of a task: those of a block, so that two threads seldom write to one cache line.
const TASK_TOKENS: usize = 16;

/// The tokens of a step and where their keys and values go.
#[derive(Clone, Copy)]
pub struct KvStoreBatch<'a> {
    /// Query heads in a row of qkv, before the heads of K and of V.
    pub num_q_heads: usize,
    /// Position of each token in its sequence, `[tokens]`.
    pub positions: &'a [i32],
    /// `block * block_size + offset` for each token, `[tokens]`; a negative slot stores nothing.
    pub slot_mapping: &'a [i32],
    /// Weights `[head_dim]` of the norm of query heads, in models that have one (Qwen 3, Gemma 3).
    pub q_norm: Option<&'a [f32]>,
    /// Weights `[head_dim]` of the norm of key heads.
    pub k_norm: Option<&'a [f32]>,
    /// Epsilon of both norms.
    pub eps: f32,
    /// Angles for every position.
    pub table: &'a RopeTable,
    /// Layer of the cache.
    pub layer: usize,
}

/// For each row `[q heads | k heads | v heads]` of `qkv`: normalises heads of q and k if asked, rotates them (pairs
/// `(i, i + head_dim / 2)`), and stores k and v in their slot, rounded to the cache's type. Changes q and k in place.
pub fn rope_and_store_kv(pool: &mut ThreadPool, isa: Isa, qkv: &mut [f32], batch: &KvStoreBatch, cache: &KvArena) {
    let layout = cache.layout();
    let num_tokens = batch.positions.len();
    let row = (batch.num_q_heads + 2 * layout.num_kv_heads()) * layout.head_dim();
    batch.check(layout, qkv.len(), num_tokens * row);
    let qkv_len = qkv.len();
    let qkv = DisjointSlice::new(qkv);
    let store = |first: usize, count: usize| {
        // SAFETY: tasks have different tokens.
        let rows = unsafe { qkv.part(first * row, count * row) };
        dispatch(isa, StoreTokens { batch, cache, rows, row, first });
    };
    if qkv_len < MIN_PARALLEL_NUMBERS || pool.num_threads() == 1 {
        return store(0, num_tokens);
    }
    pool.run(num_tokens.div_ceil(TASK_TOKENS), |task, _| {
        let first = task * TASK_TOKENS;
        store(first, TASK_TOKENS.min(num_tokens - first));
    });
}

impl KvStoreBatch<'_> {
    fn check(&self, layout: &KvLayout, qkv_len: usize, wanted_len: usize) {
        assert_eq!(qkv_len, wanted_len, "qkv holds a row for each position");
        assert_eq!(self.positions.len(), self.slot_mapping.len(), "each token has a slot");
        assert_eq!(self.table.head_dim(), layout.head_dim(), "the rotary table is for heads of this size");
        assert!(self.layer < layout.num_layers(), "layer {} of {}", self.layer, layout.num_layers());
        for norm in [self.q_norm, self.k_norm].into_iter().flatten() {
            assert_eq!(norm.len(), layout.head_dim(), "the norm of a head has a weight for each number");
        }
    }
}

struct StoreTokens<'a> {
    batch: &'a KvStoreBatch<'a>,
    cache: &'a KvArena<'a>,
    rows: &'a mut [f32],
    row: usize,
    first: usize,
}

impl Kernel for StoreTokens<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let batch = self.batch;
        let layout = self.cache.layout();
        let head_dim = layout.head_dim();
        for (index, row) in self.rows.chunks_exact_mut(self.row).enumerate() {
            let token = self.first + index;
            let position = usize::try_from(batch.positions[token]).expect("positions are not negative");
            let (cos, sin) = batch.table.row(position);
            let (q, rest) = row.split_at_mut(batch.num_q_heads * head_dim);
            let (k, v) = rest.split_at_mut(layout.num_kv_heads() * head_dim);
            prepare_heads(s, q, batch.q_norm, batch.eps, cos, sin);
            prepare_heads(s, k, batch.k_norm, batch.eps, cos, sin);
            if let Ok(slot) = usize::try_from(batch.slot_mapping[token]) {
                store_token(s, self.cache, batch.layer, slot, k, v);
            }
        }
    }
}

#[inline(always)]
fn prepare_heads<S: Simd>(s: S, heads: &mut [f32], norm: Option<&[f32]>, eps: f32, cos: &[f32], sin: &[f32]) {
    let head_dim = 2 * cos.len();
    for head in heads.chunks_exact_mut(head_dim) {
        if let Some(weight) = norm {
            let start = head.as_mut_ptr();
            // SAFETY: the head and the weight hold `head_dim` numbers (checked before the launch).
            unsafe { rms_norm_row(s, start, weight.as_ptr(), eps, start, head_dim) };
        }
        rotate(s, head, cos, sin);
    }
}

/// Rotates pairs `(i, i + half)`.
#[inline(always)]
fn rotate<S: Simd>(s: S, head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = cos.len();
    let (low, high) = head.split_at_mut(half);
    assert!(high.len() == half && sin.len() == half);
    for i in (0..half).step_by(LANES) {
        let count = LANES.min(half - i);
        // SAFETY: all four slices hold `half >= i + count` numbers.
        unsafe {
            let (cos, sin) = (s.load_first(cos.as_ptr().add(i), count), s.load_first(sin.as_ptr().add(i), count));
            let (a, b) = (s.load_first(low.as_ptr().add(i), count), s.load_first(high.as_ptr().add(i), count));
            let rotated = s.mul_add(a, cos, s.sub(s.zero(), s.mul(b, sin)));
            s.store_first(low.as_mut_ptr().add(i), rotated, count);
            s.store_first(high.as_mut_ptr().add(i), s.mul_add(b, cos, s.mul(a, sin)), count);
        }
    }
}

/// Writes the heads `k` and `v` of one token. Different tokens write different numbers, so threads need no lock.
#[inline(always)]
fn store_token<S: Simd>(s: S, cache: &KvArena, layer: usize, slot: usize, k: &[f32], v: &[f32]) {
    let layout = cache.layout();
    let (head_dim, token) = (layout.head_dim(), slot % layout.block_size());
    let block = cache.block(slot / layout.block_size());
    let heads = k.chunks_exact(head_dim).zip(v.chunks_exact(head_dim));
    for (head, (k, v)) in heads.enumerate() {
        // SAFETY: the tiles lie inside the block.
        let (k_tile, v_tile) =
            unsafe { (block.add(layout.k_tile_offset(layer, head)), block.add(layout.v_tile_offset(layer, head))) };
        // SAFETY: `token` is below the block size and the heads hold `head_dim` numbers; slots of a step differ, so
        // nobody else writes or reads this token's numbers now.
        unsafe {
            match layout.dtype() {
                DType::BF16 => store_bf16(s, layout, token, k, v, k_tile, v_tile),
                _ => store_f32(layout, token, k, v, k_tile, v_tile),
            }
        }
    }
}

/// # Safety
/// `k` and `v` hold `head_dim` numbers, a multiple of 16, the tiles are those of a bf16 block, `token` is one of its tokens,
/// and nobody else touches the token's numbers.
#[inline(always)]
unsafe fn store_bf16<S: Simd>(
    s: S,
    layout: &KvLayout,
    token: usize,
    k: &[f32],
    v: &[f32],
    k_tile: *mut u8,
    v_tile: *mut u8,
) {
    let pair_bytes = layout.k_pair_bytes();
    for (vector, (k, v)) in k.chunks_exact(LANES).zip(v.chunks_exact(LANES)).enumerate() {
        let dim = vector * LANES;
        // SAFETY: both are 16 numbers. The offsets of a token and of dimensions below `head_dim` lie in the tiles;
        // dimensions `2i` and `2i + 1` of K are one word.
        unsafe {
            let (k, v) = (s.round_bf16(s.load(k.as_ptr())), s.round_bf16(s.load(v.as_ptr())));
            let k_target = k_tile.add(layout.k_offset(token, dim));
            for (pair, numbers) in k.as_chunks::<2>().0.iter().enumerate() {
                let word = u32::from(numbers[0]) | u32::from(numbers[1]) << 16;
                k_target.add(pair * pair_bytes).cast::<[u8; 4]>().write(word.to_le_bytes());
            }
            let v_target = v_tile.add(layout.v_offset(token, dim));
            for (dim, number) in v.iter().enumerate() {
                v_target.add(4 * dim).cast::<[u8; 2]>().write(number.to_le_bytes());
            }
        }
    }
}

/// # Safety
/// As [`store_bf16`], for an f32 block.
#[inline(always)]
unsafe fn store_f32(layout: &KvLayout, token: usize, k: &[f32], v: &[f32], k_tile: *mut u8, v_tile: *mut u8) {
    // SAFETY: the offsets of a token and of dimensions below `head_dim` lie in the tiles.
    unsafe {
        for (dim, (k, v)) in k.iter().zip(v).enumerate() {
            k_tile.add(layout.k_offset(token, dim)).cast::<[u8; 4]>().write(k.to_le_bytes());
            v_tile.add(layout.v_offset(token, dim)).cast::<[u8; 4]>().write(v.to_le_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::backend::{RopeConfig, RopeScaling};

    fn numbers(len: usize) -> Vec<f32> {
        (0..len).map(|i| (((i * 7919 + 13) % 2003) as f32 - 1001.0) / 500.0).collect()
    }

    /// A head after norm and rotation, in f64.
    fn reference(head: &[f32], norm: Option<&[f32]>, table: &RopeTable, position: usize) -> Vec<f64> {
        let mut x: Vec<f64> = head.iter().map(|x| f64::from(*x)).collect();
        if let Some(weight) = norm {
            let inverse = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64 + 1e-6).sqrt();
            x.iter_mut().zip(weight).for_each(|(x, w)| *x *= inverse * f64::from(*w));
        }
        let half = x.len() / 2;
        let (cos, sin) = table.row(position);
        let pair = |i: usize| (x[i], x[i + half], f64::from(cos[i]), f64::from(sin[i]));
        let low = (0..half).map(&pair).map(|(a, b, cos, sin)| a * cos - b * sin);
        let high = (0..half).map(pair).map(|(a, b, cos, sin)| b * cos + a * sin);
        low.chain(high).collect()
    }

    fn read(bytes: &[u8], offset: usize, dtype: DType) -> f32 {
        match dtype {
            DType::BF16 => bf16::from_le_bytes([bytes[offset], bytes[offset + 1]]).to_f32(),
            _ => f32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap()),
        }
    }

    fn check(isa: Isa, head_dim: usize, dtype: DType, num_tokens: usize, with_norms: bool) -> Vec<u8> {
        let (num_q_heads, num_kv_heads, layer) = (4, 2, 1);
        let layout = KvLayout::new(2, num_kv_heads, head_dim, 32, dtype).unwrap();
        let num_blocks = num_tokens.div_ceil(32) + 1;
        let table =
            RopeTable::new(&RopeConfig { head_dim, theta: 10_000.0, scaling: RopeScaling::Plain }, 1000).unwrap();
        let row = (num_q_heads + 2 * num_kv_heads) * head_dim;
        let source = numbers(num_tokens * row);
        let (q_norm, k_norm) = (numbers(head_dim), numbers(2 * head_dim)[head_dim..].to_vec());
        let positions: Vec<i32> = (0..num_tokens).map(|token| (token * 37 % 1000) as i32).collect();
        let num_slots = num_blocks * 32;
        let slot = |token: usize| if token % 5 == 4 { -1 } else { ((token * 7 + 3) % num_slots) as i32 };
        let slot_mapping: Vec<i32> = (0..num_tokens).map(slot).collect();
        let batch = KvStoreBatch {
            num_q_heads,
            positions: &positions,
            slot_mapping: &slot_mapping,
            q_norm: with_norms.then_some(&q_norm),
            k_norm: with_norms.then_some(&k_norm),
            eps: 1e-6,
            table: &table,
            layer,
        };
        let (mut qkv, mut bytes) = (source.clone(), vec![0x55u8; num_blocks * layout.block_bytes()]);
        rope_and_store_kv(&mut ThreadPool::new(3), isa, &mut qkv, &batch, &KvArena::new(&mut bytes, layout));
        let mut untouched = vec![0x55u8; bytes.len()];
        for token in 0..num_tokens {
            let (before, after) = (&source[token * row..][..row], &qkv[token * row..][..row]);
            for head in 0..num_q_heads + num_kv_heads {
                let norm = if head < num_q_heads { batch.q_norm } else { batch.k_norm };
                let range = head * head_dim..(head + 1) * head_dim;
                let wanted = reference(&before[range.clone()], norm, &table, positions[token] as usize);
                for (wanted, found) in wanted.into_iter().zip(&after[range]) {
                    assert!((wanted - f64::from(*found)).abs() < 2e-6 * 4.0, "{wanted} {found}");
                }
            }
            let v = (num_q_heads + num_kv_heads) * head_dim;
            assert_eq!(before[v..], after[v..]);
            let Ok(slot) = usize::try_from(slot_mapping[token]) else { continue };
            let block = slot / 32 * layout.block_bytes();
            for (head, dim) in (0..num_kv_heads).flat_map(|head| (0..head_dim).map(move |dim| (head, dim))) {
                let k_offset = block + layout.k_tile_offset(layer, head) + layout.k_offset(slot % 32, dim);
                let v_offset = block + layout.v_tile_offset(layer, head) + layout.v_offset(slot % 32, dim);
                let number = head * head_dim + dim;
                for (offset, wanted) in
                    [(k_offset, after[num_q_heads * head_dim + number]), (v_offset, after[v + number])]
                {
                    let wanted = if dtype == DType::BF16 { bf16::from_f32(wanted).to_f32() } else { wanted };
                    assert_eq!(read(&bytes, offset, dtype), wanted);
                    let written = offset..offset + dtype.block_bytes();
                    untouched[written.clone()].copy_from_slice(&bytes[written]);
                }
            }
        }
        assert!(untouched == bytes, "nothing else is written");
        bytes
    }

    #[test]
    fn heads_are_rotated_and_stored_in_their_slots() {
        for (head_dim, num_tokens) in [(64, 1), (80, 5), (128, 33), (256, 9), (16, 200)] {
            for (dtype, with_norms) in [(DType::BF16, false), (DType::BF16, true), (DType::F32, true)] {
                let wanted = check(Isa::Portable, head_dim, dtype, num_tokens, with_norms);
                for isa in Isa::available() {
                    assert!(check(isa, head_dim, dtype, num_tokens, with_norms) == wanted, "{isa}");
                }
            }
        }
    }

    #[test]
    fn bf16_is_rounded_to_nearest_even() {
        for (bits, wanted) in [(0x3f80_8000u32, 0x3f80u16), (0x3f81_8000, 0x3f82), (0x3f80_8001, 0x3f81)] {
            assert_eq!(bf16::from_f32(f32::from_bits(bits)).to_bits(), wanted);
        }
    }
}
