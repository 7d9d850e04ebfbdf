//! Rotated copies against plain loops, bit for bit, and against tokens stored at the other position to begin with.

use super::*;
use crate::backend::cpu::{KvStoreBatch, rope_and_store_kv};
use crate::backend::{RopeConfig, RopeScaling};

const LAYER: usize = 1;
const MAX_POSITIONS: usize = 4096;

fn random(state: &mut u64) -> usize {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 33) as usize
}

fn numbers(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    (0..len).map(|_| (random(&mut state) % 20_001) as f32 / 5000.0 - 2.0).collect()
}

fn table(head_dim: usize, scaling: RopeScaling) -> RopeTable {
    RopeTable::new(&RopeConfig { head_dim, theta: 10_000.0, scaling }, MAX_POSITIONS).unwrap()
}

/// Stores `keys` and `values`, `[tokens][kv_heads * head_dim]`, at positions and slots.
fn store(
    bytes: &mut [u8],
    layout: KvLayout,
    table: &RopeTable,
    [keys, values]: [&[f32]; 2],
    positions: &[i32],
    slots: &[i32],
) {
    let kv_size = layout.num_kv_heads() * layout.head_dim();
    let rows = keys.chunks_exact(kv_size).zip(values.chunks_exact(kv_size));
    let mut qkv: Vec<f32> = rows.flat_map(|(k, v)| [k, v].concat()).collect();
    let batch = KvStoreBatch {
        num_q_heads: 0,
        positions,
        slot_mapping: slots,
        q_norm: None,
        k_norm: None,
        eps: 0.0,
        table,
        layer: LAYER,
    };
    rope_and_store_kv(&mut ThreadPool::new(1), Isa::best(), &mut qkv, &batch, &KvArena::new(bytes, layout));
}

fn read(bytes: &[u8], offset: usize, dtype: DType) -> f32 {
    match dtype {
        DType::BF16 => bf16::from_le_bytes([bytes[offset], bytes[offset + 1]]).to_f32(),
        _ => f32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap()),
    }
}

/// Byte offsets of the key and the value of one number of a slot.
fn places(layout: &KvLayout, slot: usize, head: usize, dim: usize) -> [usize; 2] {
    let (block, token) = (slot / layout.block_size() * layout.block_bytes(), slot % layout.block_size());
    let k_offset = layout.k_tile_offset(LAYER, head) + layout.k_offset(token, dim);
    [block + k_offset, block + layout.v_tile_offset(LAYER, head) + layout.v_offset(token, dim)]
}

/// Sources in the first half of the blocks, targets in the second.
struct Copies {
    num_blocks: usize,
    source_slots: Vec<i32>,
    target_slots: Vec<i32>,
    deltas: Vec<i32>,
}

impl Copies {
    /// Runs of random lengths between random places, each with its own delta.
    fn random(num_copies: usize, block_size: usize, seed: u64) -> Self {
        let mut state = seed;
        let half = num_copies.div_ceil(block_size) + 1;
        let num_slots = half * block_size;
        let shift = random(&mut state) % block_size;
        let mut copies = Copies { num_blocks: 2 * half, source_slots: vec![], target_slots: vec![], deltas: vec![] };
        while copies.deltas.len() < num_copies {
            let delta = [0, 1, -1, 17, -300, 1900][random(&mut state) % 6];
            let source = random(&mut state) % num_slots;
            let len = 1 + random(&mut state) % (2 * block_size);
            for at in 0..len.min(num_copies - copies.deltas.len()).min(num_slots - source) {
                copies.target_slots.push((num_slots + shift + copies.deltas.len()) as i32);
                copies.source_slots.push((source + at) as i32);
                copies.deltas.push(delta);
            }
        }
        copies
    }

    fn run(&self, pool: &mut ThreadPool, isa: Isa, bytes: &mut [u8], layout: KvLayout, table: &RopeTable) {
        let batch = RotateGatherBatch {
            source_slots: &self.source_slots,
            target_slots: &self.target_slots,
            position_deltas: &self.deltas,
            table,
            layer: LAYER,
        };
        rotate_gather(pool, isa, &batch, &KvArena::new(bytes, layout));
    }
}

/// What a copy is defined as, number by number.
fn reference(copies: &Copies, before: &[u8], layout: &KvLayout, table: &RopeTable) -> Vec<u8> {
    let (mut after, dtype, half) = (before.to_vec(), layout.dtype(), layout.head_dim() / 2);
    let mut write = |offset: usize, x: f32| match dtype {
        DType::BF16 => after[offset..offset + 2].copy_from_slice(&bf16::from_f32(x).to_le_bytes()),
        _ => after[offset..offset + 4].copy_from_slice(&x.to_le_bytes()),
    };
    for ((source, target), delta) in copies.source_slots.iter().zip(&copies.target_slots).zip(&copies.deltas) {
        let (cos, sin) = table.row(delta.unsigned_abs() as usize);
        for (head, dim) in (0..layout.num_kv_heads()).flat_map(|head| (0..half).map(move |dim| (head, dim))) {
            let [from, to] =
                [source, target].map(|slot| [dim, dim + half].map(|dim| places(layout, *slot as usize, head, dim)));
            let [low, high] = from.map(|[k, _]| read(before, k, dtype));
            let (cos, sin) = (cos[dim], if *delta < 0 { -sin[dim] } else { sin[dim] });
            let rotated = match delta {
                0 => [low, high],
                _ => [low.mul_add(cos, -(high * sin)), high.mul_add(cos, low * sin)],
            };
            for at in 0..2 {
                write(to[at][0], rotated[at]);
                write(to[at][1], read(before, from[at][1], dtype));
            }
        }
    }
    after
}

#[test]
fn copies_have_the_bits_of_plain_loops_and_nothing_else_is_written() {
    let mut pools: Vec<ThreadPool> = (1..4).map(ThreadPool::new).collect();
    let shapes = [(1, 64, 16), (3, 64, 32), (2, 80, 16), (8, 128, 16), (1, 256, 48), (2, 16, 16)];
    for (seed, (num_kv_heads, head_dim, block_size)) in shapes.into_iter().enumerate() {
        for dtype in [DType::BF16, DType::F32] {
            let layout = KvLayout::new(3, num_kv_heads, head_dim, block_size, dtype).unwrap();
            let table = table(head_dim, RopeScaling::Plain);
            for num_copies in [0, 1, 2, 15, 37, 400] {
                let copies = Copies::random(num_copies, block_size, (seed * 1000 + num_copies) as u64);
                let num_bytes = copies.num_blocks * layout.block_bytes();
                let mut before = vec![0u8; num_bytes];
                for (at, x) in numbers(num_bytes / 4, 7).into_iter().enumerate() {
                    let bits = x.to_bits() >> 16;
                    let word = if dtype == DType::BF16 { bits | (bits ^ 0x8005) << 16 } else { x.to_bits() };
                    before[4 * at..4 * at + 4].copy_from_slice(&word.to_le_bytes());
                }
                let wanted = reference(&copies, &before, &layout, &table);
                for isa in Isa::available() {
                    for pool in &mut pools {
                        let mut found = before.clone();
                        copies.run(pool, isa, &mut found, layout, &table);
                        assert!(found == wanted, "{isa}, {num_copies} copies of {layout:?}");
                    }
                }
            }
        }
    }
}

/// A token stored at `p` and moved by `d` is the token stored at `p + d`, but for roundings: to the type of the cache
/// once more, and of the angles, which are products of a position and a frequency in f32.
#[test]
fn moving_a_stored_key_is_storing_it_elsewhere() {
    let llama3 =
        RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_position: 512.0 };
    let factors = RopeScaling::Factors((0..32).map(|pair| 1.0 + pair as f32).collect());
    for scaling in [RopeScaling::Plain, RopeScaling::Linear { factor: 4.0 }, llama3, factors] {
        let (head_dim, num_tokens) = (64, 200);
        let table = table(head_dim, scaling.clone());
        for dtype in [DType::BF16, DType::F32] {
            let layout = KvLayout::new(2, 2, head_dim, 16, dtype).unwrap();
            let copies = Copies::random(num_tokens, 16, 11);
            let (keys, values) = (numbers(num_tokens * 2 * head_dim, 1), numbers(num_tokens * 2 * head_dim, 2));
            let mut state = 5;
            let positions: Vec<i32> =
                copies.deltas.iter().map(|delta| (random(&mut state) % 2000) as i32 - delta.min(&0)).collect();
            let moved: Vec<i32> = positions.iter().zip(&copies.deltas).map(|(at, delta)| at + delta).collect();
            // Every copy has a source of its own here.
            let copies = Copies { source_slots: (0..num_tokens as i32).collect(), ..copies };
            let mut found = vec![0u8; copies.num_blocks * layout.block_bytes()];
            let mut wanted = found.clone();
            store(&mut found, layout, &table, [&keys, &values], &positions, &copies.source_slots);
            copies.run(&mut ThreadPool::new(2), Isa::best(), &mut found, layout, &table);
            store(&mut wanted, layout, &table, [&keys, &values], &moved, &copies.target_slots);
            let epsilon = if dtype == DType::BF16 { 2f32.powi(-8) } else { 2f32.powi(-22) };
            for (token, target) in copies.target_slots.iter().enumerate() {
                let angle_error = 2f32.powi(-23) * (positions[token] + copies.deltas[token].abs()) as f32;
                for (head, dim) in (0..2).flat_map(|head| (0..head_dim).map(move |dim| (head, dim))) {
                    let [k, v] = places(&layout, *target as usize, head, dim);
                    let start = (token * 2 + head) * head_dim;
                    let length = keys[start + dim].hypot(keys[start + (dim + head_dim / 2) % head_dim]);
                    let off = (read(&found, k, dtype) - read(&wanted, k, dtype)).abs();
                    assert!(off <= length * (2.0 * epsilon + angle_error), "{scaling:?} {token} {dim}: off by {off}");
                    assert_eq!(read(&found, v, dtype), read(&wanted, v, dtype), "values do not turn");
                }
            }
        }
    }
}

#[test]
#[should_panic(expected = "each copy has a delta")]
fn arrays_of_other_lengths_are_refused() {
    let layout = KvLayout::new(2, 1, 64, 16, DType::BF16).unwrap();
    let copies = Copies { deltas: vec![], ..Copies::random(3, 16, 1) };
    let mut bytes = vec![0; copies.num_blocks * layout.block_bytes()];
    copies.run(&mut ThreadPool::new(1), Isa::best(), &mut bytes, layout, &table(64, RopeScaling::Plain));
}
