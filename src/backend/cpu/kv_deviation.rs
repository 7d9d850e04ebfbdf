//! How far freshly computed keys and values are from stored ones, token by token.

#![allow(unsafe_code)]

use half::bf16;

use super::disjoint::DisjointSlice;
use super::{KvArena, ThreadPool};
use crate::backend::{DType, KvLayout};

/// Tokens of a task.
const TASK_TOKENS: usize = 16;

/// The tokens to compare.
#[derive(Clone, Copy)]
pub struct KvDeviationBatch<'a> {
    /// `[T, (num_q_heads + 2 * num_kv_heads) * head_dim]`, keys rotated.
    pub qkv: &'a [f32],
    /// Query heads in a row of qkv, before the heads of K and of V.
    pub num_q_heads: usize,
    /// `block * block_size + offset` of the stored token; negative where nothing is stored.
    pub slots: &'a [i32],
    /// Layer of the cache.
    pub layer: usize,
}

/// `out[t]`: sum of the squared differences of the k and v of token `t`, rounded to the type of the cache, from those in
/// its slot, over KV heads and dimensions in order; infinite where nothing is stored.
pub fn kv_deviation(pool: &mut ThreadPool, batch: &KvDeviationBatch, cache: &KvArena, out: &mut [f32]) {
    let layout = cache.layout();
    let num_tokens = out.len();
    let row = (batch.num_q_heads + 2 * layout.num_kv_heads()) * layout.head_dim();
    assert_eq!(batch.qkv.len(), num_tokens * row, "qkv holds a row for each token");
    assert_eq!(batch.slots.len(), num_tokens, "each token has a slot");
    assert!(batch.layer < layout.num_layers(), "layer {} of {}", batch.layer, layout.num_layers());
    let out = DisjointSlice::new(out);
    pool.run(num_tokens.div_ceil(TASK_TOKENS), |task, _| {
        let first = task * TASK_TOKENS;
        let count = TASK_TOKENS.min(num_tokens - first);
        // SAFETY: tasks have different tokens.
        let deviations = unsafe { out.part(first, count) };
        for (token, deviation) in (first..first + count).zip(deviations) {
            let heads = &batch.qkv[token * row..(token + 1) * row][batch.num_q_heads * layout.head_dim()..];
            *deviation = match usize::try_from(batch.slots[token]) {
                Ok(slot) => token_deviation(cache, batch.layer, slot, heads),
                Err(_) => f32::INFINITY,
            };
        }
    });
}

/// Of one token; `heads` are its keys, then its values.
fn token_deviation(cache: &KvArena, layer: usize, slot: usize, heads: &[f32]) -> f32 {
    let layout = cache.layout();
    let (block, token) = (cache.block(slot / layout.block_size()), slot % layout.block_size());
    let (k, v) = heads.split_at(layout.num_kv_heads() * layout.head_dim());
    let mut sum = 0.0;
    for (kv_head, (k, v)) in k.chunks_exact(layout.head_dim()).zip(v.chunks_exact(layout.head_dim())).enumerate() {
        let (k_tile, v_tile) = (layout.k_tile_offset(layer, kv_head), layout.v_tile_offset(layer, kv_head));
        for (dim, (k, v)) in k.iter().zip(v).enumerate() {
            let places = [(k, k_tile + layout.k_offset(token, dim)), (v, v_tile + layout.v_offset(token, dim))];
            for (fresh, offset) in places {
                // SAFETY: the number lies in a tile of the block, which nobody writes meanwhile.
                let difference = unsafe { difference(*fresh, block.add(offset), layout) };
                sum += difference * difference;
            }
        }
    }
    sum
}

/// `fresh`, rounded, minus the number stored at `place`.
///
/// # Safety
/// A number of the cache's type can be read there.
unsafe fn difference(fresh: f32, place: *const u8, layout: &KvLayout) -> f32 {
    // SAFETY: the caller's promise.
    unsafe {
        match layout.dtype() {
            DType::BF16 => {
                bf16::from_f32(fresh).to_f32() - bf16::from_le_bytes(place.cast::<[u8; 2]>().read()).to_f32()
            }
            _ => fresh - f32::from_le_bytes(place.cast::<[u8; 4]>().read()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::{Isa, KvStoreBatch, RopeTable, rope_and_store_kv};
    use crate::backend::{RopeConfig, RopeScaling};

    const NUM_Q_HEADS: usize = 3;

    fn numbers(len: usize, seed: usize) -> Vec<f32> {
        (0..len).map(|i| ((((i + seed) * 7919 + 13) % 2003) as f32 - 1001.0) / 500.0).collect()
    }

    /// Stores tokens, changes some numbers of them, and compares with sums in f64.
    fn check(layout: KvLayout, num_tokens: usize) {
        let head_dim = layout.head_dim();
        let kv_size = layout.num_kv_heads() * head_dim;
        let row = NUM_Q_HEADS * head_dim + 2 * kv_size;
        let num_blocks = num_tokens.div_ceil(layout.block_size()) + 1;
        let mut bytes = vec![0xffu8; num_blocks * layout.block_bytes()];
        let (mut qkv, mut pool) = (numbers(num_tokens * row, 0), ThreadPool::new(3));
        let positions: Vec<i32> = (0..num_tokens as i32).collect();
        let slots: Vec<i32> = (0..num_tokens).map(|token| ((token * 7 + 3) % (num_blocks * 16)) as i32).collect();
        let config = RopeConfig { head_dim, theta: 1e4, scaling: RopeScaling::Plain };
        let table = RopeTable::new(&config, num_tokens).unwrap();
        let store = KvStoreBatch {
            num_q_heads: NUM_Q_HEADS,
            positions: &positions,
            slot_mapping: &slots,
            q_norm: None,
            k_norm: None,
            eps: 0.0,
            table: &table,
            layer: 1,
        };
        let cache = KvArena::new(&mut bytes, layout);
        rope_and_store_kv(&mut pool, Isa::best(), &mut qkv, &store, &cache);
        let mut deviate = |qkv: &[f32], slots: &[i32]| {
            let mut out = vec![f32::NAN; num_tokens];
            let batch = KvDeviationBatch { qkv, num_q_heads: NUM_Q_HEADS, slots, layer: 1 };
            kv_deviation(&mut pool, &batch, &cache, &mut out);
            out
        };
        assert!(deviate(&qkv, &slots).iter().all(|deviation| *deviation == 0.0), "what was just stored is the same");
        let stored: Vec<f32> =
            qkv.iter().map(|x| if layout.dtype() == DType::BF16 { bf16::from_f32(*x).to_f32() } else { *x }).collect();
        let mut changed = stored.clone();
        for token in (0..num_tokens).filter(|token| token % 3 != 1) {
            // A query, then a key and a value.
            changed[token * row] += 100.0;
            let start = token * row + NUM_Q_HEADS * head_dim;
            changed[start + token % (2 * kv_size)] += 4.0;
            changed[start + 2 * kv_size - 1] -= 2.0;
        }
        let slots: Vec<i32> = slots.iter().enumerate().map(|(at, slot)| if at % 5 == 4 { -1 } else { *slot }).collect();
        for (token, found) in deviate(&changed, &slots).into_iter().enumerate() {
            let kv = token * row + NUM_Q_HEADS * head_dim..(token + 1) * row;
            let rounded = |x: f32| if layout.dtype() == DType::BF16 { bf16::from_f32(x).to_f32() } else { x };
            let differences = stored[kv.clone()].iter().zip(&changed[kv]);
            let wanted: f64 = differences.map(|(a, b)| (f64::from(*a) - f64::from(rounded(*b))).powi(2)).sum();
            match token % 5 {
                4 => assert_eq!(found, f32::INFINITY),
                _ => assert!((f64::from(found) - wanted).abs() <= 1e-6 * wanted, "{token}: {found}, wanted {wanted}"),
            }
        }
    }

    #[test]
    fn deviations_are_sums_of_squares_over_keys_and_values() {
        for (num_kv_heads, head_dim, num_tokens) in [(1, 64, 1), (2, 80, 17), (3, 128, 40), (2, 16, 100)] {
            for dtype in [DType::BF16, DType::F32] {
                check(KvLayout::new(2, num_kv_heads, head_dim, 16, dtype).unwrap(), num_tokens);
            }
        }
    }
}
