//! Tokens moved within the KV cache, and compared with it, against plain loops.

use mneme::backend::{
    AttentionShape, Backend, DType, KvLayer, KvLayout, KvOrder, RopeConfig, RopeScaling, RotatedCopies, cpu,
};

use crate::gpu::{self, Gpu, GpuTensor, assert_close};
use crate::support::random::Random;

const NUM_LAYERS: usize = 2;
const LAYER: usize = 1;
const MAX_POSITIONS: usize = 512;

fn rope(head_dim: usize) -> RopeConfig {
    RopeConfig { head_dim, theta: 10_000.0, scaling: RopeScaling::Plain }
}

fn layout(dtype: DType, num_kv_heads: usize, head_dim: usize, block_size: usize) -> KvLayout {
    KvLayout::with_order(KvOrder::Rows, NUM_LAYERS, num_kv_heads, head_dim, block_size, dtype).unwrap()
}

/// The types of caches beside activations of each.
fn caches(gpus: &[Gpu; 2]) -> [(&Gpu, DType); 3] {
    let [bf16, f16] = gpus;
    [(bf16, DType::BF16), (f16, DType::F16), (bf16, DType::F8E4M3)]
}

/// Numbers of the cache before the token `slot` of a KV head, its key or its value.
fn place(layout: &KvLayout, slot: usize, head: usize, is_value: bool) -> usize {
    let (block, token) = (slot / layout.block_size(), slot % layout.block_size());
    let within = match is_value {
        false => layout.k_tile_offset(LAYER, head) + layout.k_offset(token, 0),
        true => layout.v_tile_offset(LAYER, head) + layout.v_offset(token, 0),
    };
    (block * layout.block_bytes() + within) / layout.dtype().block_bytes()
}

/// A cache of random numbers, and the same on the host.
fn cache(gpu: &Gpu, layout: &KvLayout, num_blocks: usize, random: &mut Random) -> (GpuTensor, Vec<f32>) {
    let dtype = layout.dtype();
    let count = num_blocks * layout.block_bytes() / dtype.block_bytes();
    let numbers: Vec<f32> = (0..count).map(|_| gpu::round(random.normal() as f32, dtype)).collect();
    (gpu.tensor(&numbers, 1, numbers.len(), dtype), numbers)
}

#[derive(Clone, Default)]
struct Copies {
    sources: Vec<i32>,
    targets: Vec<i32>,
    deltas: Vec<i32>,
}

impl Copies {
    /// From the first `half` slots to others behind them.
    fn random(num_copies: usize, half: usize, random: &mut Random) -> Self {
        let mut free: Vec<i32> = (half as i32..2 * half as i32).collect();
        let mut copies = Self::default();
        for _ in 0..num_copies {
            copies.sources.push(random.below(half) as i32);
            copies.targets.push(free.swap_remove(random.below(free.len())));
            let delta = [0, 1, -1, 37, -300, MAX_POSITIONS as i32 - 1][random.below(6)];
            // Now and then the same as before: kernels fetch angles when it changes.
            let same = copies.deltas.last().copied().filter(|_| random.below(2) == 0);
            copies.deltas.push(same.unwrap_or(delta));
        }
        copies
    }

    fn on_device(&self, gpu: &Gpu) -> RotatedCopies<mneme::backend::cuda::CudaBuffer> {
        let indices = |values: &[i32]| gpu.indices(values, 1, values.len());
        RotatedCopies {
            source_slots: indices(&self.sources),
            target_slots: indices(&self.targets),
            position_deltas: indices(&self.deltas),
        }
    }

    /// The cache afterwards.
    fn apply(&self, layout: &KvLayout, before: &[f32], dtype: DType) -> Vec<f32> {
        let (mut after, head_dim) = (before.to_vec(), layout.head_dim());
        let table = cpu::RopeTable::new(&rope(head_dim), MAX_POSITIONS).unwrap();
        for ((source, target), delta) in self.sources.iter().zip(&self.targets).zip(&self.deltas) {
            let (cosines, sines) = table.row(delta.unsigned_abs() as usize);
            for head in 0..layout.num_kv_heads() {
                let [from, to] = [source, target].map(|slot| place(layout, *slot as usize, head, true));
                after[to..to + head_dim].copy_from_slice(&before[from..from + head_dim]);
                let [from, to] = [source, target].map(|slot| place(layout, *slot as usize, head, false));
                for dim in 0..head_dim / 2 {
                    let (a, b) = (before[from + dim], before[from + dim + head_dim / 2]);
                    let (cos, sin) = (cosines[dim], if *delta < 0 { -sines[dim] } else { sines[dim] });
                    after[to + dim] = gpu::round(a.mul_add(cos, -(b * sin)), dtype);
                    after[to + dim + head_dim / 2] = gpu::round(b.mul_add(cos, a * sin), dtype);
                }
            }
        }
        after
    }
}

/// Tokens of two cubes that are moved in a layer of a model of 8 billion weights whose cache is of `dtype`.
pub fn move_large(gpu: &Gpu, dtype: DType, num_copies: usize) {
    let (random, layout) = (&mut Random::new(5), layout(dtype, 8, 128, 16));
    let (blocks, _) = cache(gpu, &layout, 2 * num_copies.div_ceil(16), random);
    let table = gpu.backend.load_rope(&rope(128), MAX_POSITIONS).unwrap();
    let slots = |first: usize| (first as i32..(first + num_copies) as i32).collect();
    // A cube goes to another place as a whole.
    let deltas = (0..num_copies).map(|copy| if copy < num_copies / 3 { 37 } else { -5 }).collect();
    let copies = Copies { sources: slots(0), targets: slots(num_copies.next_multiple_of(16)), deltas };
    let kv = KvLayer { blocks: blocks.buffer(), layout: &layout, layer: LAYER };
    gpu.backend.rotate_gather(&gpu.stream, &kv, &copies.on_device(gpu), &table).unwrap();
    gpu.synchronize();
}

#[test]
fn copies_are_rotated_and_nothing_else_is_written() {
    for (gpu, dtype) in caches(&gpu::lend()) {
        let random = &mut Random::new(90);
        for (num_kv_heads, head_dim, block_size) in
            [(1, 64, 16), (3, 64, 32), (2, 128, 16), (1, 256, 16), (2, 16, 48), (1, 80, 16), (2, 96, 16), (9, 128, 16)]
        {
            let layout = layout(dtype, num_kv_heads, head_dim, block_size);
            let table = gpu.backend.load_rope(&rope(head_dim), MAX_POSITIONS).unwrap();
            // The more there are, the more a block has.
            for num_copies in [0usize, 1, 7, 60, 250, 450] {
                let half = num_copies.max(64).next_multiple_of(block_size);
                let (blocks, before) = cache(gpu, &layout, 2 * half / block_size, random);
                let copies = Copies::random(num_copies, half, random);
                let kv = KvLayer { blocks: blocks.buffer(), layout: &layout, layer: LAYER };
                gpu.backend.rotate_gather(&gpu.stream, &kv, &copies.on_device(gpu), &table).unwrap();
                let found = gpu::decode(&gpu.download(&blocks), dtype);
                let wanted = copies.apply(&layout, &before, dtype);
                assert!(found == wanted, "{num_copies} copies of {layout:?}");
            }
        }
    }
}

#[test]
fn deviations_are_sums_of_squares() {
    for (gpu, dtype) in caches(&gpu::lend()) {
        let random = &mut Random::new(91);
        for (num_kv_heads, group, head_dim) in [(1, 1, 64), (3, 3, 64), (2, 2, 128), (8, 1, 256), (1, 4, 16)] {
            let layout = layout(dtype, num_kv_heads, head_dim, 16);
            let (blocks, stored) = cache(gpu, &layout, 3, random);
            let (num_heads, num_tokens) = (num_kv_heads * group, 20);
            let columns = (num_heads + 2 * num_kv_heads) * head_dim;
            let mut rows = gpu.numbers(random, num_tokens * columns, 1.0);
            let slots: Vec<i32> = (0..num_tokens as i32).map(|at| if at == 3 { -1 } else { at * 7 % 48 }).collect();
            let mut wanted = vec![f64::INFINITY; num_tokens];
            for (token, row) in rows.chunks_exact_mut(columns).enumerate().filter(|(token, _)| *token != 3) {
                wanted[token] = 0.0;
                let fresh = row[num_heads * head_dim..].chunks_exact_mut(head_dim).enumerate();
                for (at, fresh) in fresh {
                    let (head, is_value) = (at % num_kv_heads, at >= num_kv_heads);
                    let stored = &stored[place(&layout, slots[token] as usize, head, is_value)..][..head_dim];
                    if token % 4 == 0 {
                        fresh.copy_from_slice(stored);
                    }
                    let rounded = fresh.iter().map(|number| gpu::round(*number, dtype));
                    wanted[token] +=
                        rounded.zip(stored).map(|(a, b)| (f64::from(a) - f64::from(*b)).powi(2)).sum::<f64>();
                }
            }
            let qkv = gpu.activations(&rows, num_tokens, columns);
            let out = gpu.output(1, num_tokens, DType::F32);
            let shape = AttentionShape { num_heads, num_kv_heads, head_dim, scale: 1.0, softcap: None, window: None };
            let kv = KvLayer { blocks: blocks.buffer(), layout: &layout, layer: LAYER };
            let slots = gpu.indices(&slots, 1, num_tokens);
            gpu.backend.kv_deviation(&gpu.stream, &qkv, &shape, &kv, &slots, &out.tensor).unwrap();
            let found = out.numbers(gpu);
            assert!(found[3] == f32::INFINITY && found[4] == 0.0 && found[5] > 0.0, "{found:?}");
            let finite = |at: &usize| *at != 3;
            let found: Vec<f32> = (0..num_tokens).filter(finite).map(|at| found[at]).collect();
            let wanted: Vec<f64> = (0..num_tokens).filter(finite).map(|at| wanted[at]).collect();
            assert_close(&format!("{shape:?}"), &found, &wanted, 1e-5, 0.0);
        }
    }
}

#[test]
fn impossible_copies_are_refused() {
    let gpus = gpu::lend();
    let gpu = &gpus[0];
    let layout = layout(gpu.dtype(), 1, 64, 16);
    let (blocks, _) = cache(gpu, &layout, 2, &mut Random::new(92));
    let table = gpu.backend.load_rope(&rope(64), MAX_POSITIONS).unwrap();
    let good = Copies { sources: vec![1], targets: vec![20], deltas: vec![-4] };
    let run = |layout: &KvLayout, layer: usize, copies: &Copies| {
        let kv = KvLayer { blocks: blocks.buffer(), layout, layer };
        let done = gpu.backend.rotate_gather(&gpu.stream, &kv, &copies.on_device(gpu), &table);
        done.map_err(|error| error.to_string())
    };
    assert_eq!(run(&layout, LAYER, &good), Ok(()));
    assert!(run(&layout, NUM_LAYERS, &good).unwrap_err().contains("layers"));
    assert!(run(&layout, LAYER, &Copies { deltas: vec![], ..good.clone() }).unwrap_err().contains("position_deltas"));
    let pairs = KvLayout::new(NUM_LAYERS, 1, 64, 16, DType::BF16).unwrap();
    assert!(run(&pairs, LAYER, &good).unwrap_err().contains("Pairs"));
    let wide = KvLayout::with_order(KvOrder::Rows, NUM_LAYERS, 1, 128, 16, gpu.dtype()).unwrap();
    assert!(run(&wide, LAYER, &good).unwrap_err().contains("angles for 64"));
}
