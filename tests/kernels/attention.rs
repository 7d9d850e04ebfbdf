//! Rotation, KV store and attention against sums in f64, and a row against itself in other company.

#[cfg(feature = "flash-attn")]
mod flash_attention;
mod traffic;

use mneme::backend::cuda::{CudaBackend, CudaBuffer, CudaRopeTable};
use mneme::backend::{
    AttentionMetadata, AttentionShape, Backend, DType, HeadTransform, KvLayer, KvLayout, KvOrder, Norm, RopeConfig,
    RopeScaling, SequenceRuns, cpu,
};

use crate::gpu::{self, Gpu, GpuTensor, Output, assert_close, epsilon};
use crate::support::random::Random;

const NUM_LAYERS: usize = 2;
const LAYER: usize = 1;
const THETA: f64 = 10_000.0;
const MAX_POSITIONS: usize = 1024;
const EPSILON: f32 = 1e-5;

/// New tokens of a sequence, and the tokens in its cache after them.
pub type Lengths = (usize, usize);

#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub num_kv_heads: usize,
    pub group: usize,
    pub head_dim: usize,
    pub block_size: usize,
    pub window: Option<usize>,
    pub softcap: Option<f32>,
}

pub const SMALL: Shape = Shape { num_kv_heads: 2, group: 3, head_dim: 64, block_size: 16, window: None, softcap: None };

impl Shape {
    pub fn num_heads(&self) -> usize {
        self.num_kv_heads * self.group
    }

    fn columns(&self) -> usize {
        (self.num_heads() + 2 * self.num_kv_heads) * self.head_dim
    }

    fn of_backend(&self) -> AttentionShape {
        AttentionShape {
            num_heads: self.num_heads(),
            num_kv_heads: self.num_kv_heads,
            head_dim: self.head_dim,
            scale: 1.5 / (self.head_dim as f32).sqrt(),
            softcap: self.softcap,
            window: self.window,
        }
    }
}

/// Those of the new tokens.
fn last_positions((num_queries, context_len): &Lengths) -> Vec<usize> {
    (context_len - num_queries..*context_len).collect()
}

fn rope(head_dim: usize) -> RopeConfig {
    RopeConfig { head_dim, theta: THETA, scaling: RopeScaling::Plain }
}

/// The caches of some sequences in scattered blocks of one pool, NaN where nothing was stored.
struct World<'a> {
    gpu: &'a Gpu,
    shape: Shape,
    layout: KvLayout,
    kv: GpuTensor,
    tables: Vec<Vec<i32>>,
    context_lens: Vec<usize>,
    /// Per sequence, rows of `[q heads | k heads | v heads]` after rotation, as they came back from the device.
    rows: Vec<Vec<f32>>,
}

impl<'a> World<'a> {
    /// Stores `context_lens` tokens with random heads; every token in one launch.
    fn new(gpu: &'a Gpu, shape: Shape, context_lens: &[usize], random: &mut Random) -> Self {
        Self::with_cache(gpu, gpu.dtype(), shape, context_lens, random)
    }

    /// The same with a cache of `dtype`.
    fn with_cache(gpu: &'a Gpu, dtype: DType, shape: Shape, context_lens: &[usize], random: &mut Random) -> Self {
        let mut world = Self::empty(gpu, dtype, shape, context_lens, random);
        let all: Vec<Lengths> = world.context_lens.iter().map(|len| (*len, *len)).collect();
        let numbers = gpu.numbers(random, all.iter().map(|all| all.0).sum::<usize>() * shape.columns(), 1.0);
        let stored = world.store(&numbers, &(0..all.len()).collect::<Vec<_>>(), &all, None);
        let mut rest = &stored[..];
        for len in &world.context_lens.clone() {
            let (rows, others) = rest.split_at(len * shape.columns());
            world.rows.push(rows.to_vec());
            rest = others;
        }
        if dtype != gpu.dtype() {
            world.read_back();
        }
        world
    }

    /// With nothing stored.
    fn empty(gpu: &'a Gpu, dtype: DType, shape: Shape, context_lens: &[usize], random: &mut Random) -> Self {
        let Shape { num_kv_heads, head_dim, block_size, .. } = shape;
        let layout =
            KvLayout::with_order(KvOrder::Rows, NUM_LAYERS, num_kv_heads, head_dim, block_size, dtype).unwrap();
        let num_blocks = context_lens.iter().map(|len| len.div_ceil(block_size)).sum::<usize>() + 2;
        let mut free: Vec<i32> = (0..num_blocks as i32).collect();
        let mut take = |_| free.swap_remove(random.below(free.len()));
        let tables = context_lens.iter().map(|len| (0..len.div_ceil(block_size)).map(&mut take).collect()).collect();
        let kv = gpu.poison(1, num_blocks * layout.block_bytes() / 2, gpu.dtype());
        World { gpu, shape, layout, kv, tables, context_lens: context_lens.to_vec(), rows: vec![] }
    }

    /// Has the tables name a block outside of the pool in the place of those that no query of `parts` sees.
    fn lose_blocks_before_windows(&mut self, parts: &[Lengths]) {
        let window = self.shape.window.unwrap();
        let num_blocks = self.kv.num_bytes() / self.layout.block_bytes();
        for (table, (num_queries, context_len)) in self.tables.iter_mut().zip(parts) {
            let first_seen = (context_len - num_queries + 1).saturating_sub(window);
            table[..first_seen / self.shape.block_size].fill(num_blocks as i32);
        }
    }

    /// Takes keys and values for what the cache has made of them.
    fn read_back(&mut self) {
        let Shape { num_kv_heads, head_dim, block_size, .. } = self.shape;
        let (layout, bytes, columns) = (self.layout, self.gpu.download(&self.kv), self.shape.columns());
        let head_bytes = head_dim * layout.dtype().block_bytes();
        for (rows, table) in self.rows.iter_mut().zip(&self.tables) {
            for (position, row) in rows.chunks_exact_mut(columns).enumerate() {
                let (block, token) =
                    (table[position / block_size] as usize * layout.block_bytes(), position % block_size);
                let heads = row[self.shape.num_kv_heads * self.shape.group * head_dim..].chunks_exact_mut(head_dim);
                for (at, head) in heads.enumerate() {
                    let place = match at < num_kv_heads {
                        true => layout.k_tile_offset(LAYER, at) + layout.k_offset(token, 0),
                        false => layout.v_tile_offset(LAYER, at - num_kv_heads) + layout.v_offset(token, 0),
                    };
                    head.copy_from_slice(&gpu::decode(&bytes[block + place..][..head_bytes], layout.dtype()));
                }
            }
        }
    }

    fn kv_layer(&self) -> KvLayer<'_, CudaBuffer> {
        KvLayer { blocks: self.kv.buffer(), layout: &self.layout, layer: LAYER }
    }

    /// Rotates and stores rows of `sequences`; gives them back as they are behind that.
    fn store(
        &self,
        numbers: &[f32],
        sequences: &[usize],
        parts: &[Lengths],
        norms: Option<[&GpuTensor; 2]>,
    ) -> Vec<f32> {
        let (gpu, shape) = (self.gpu, self.shape);
        let metadata = self.metadata(sequences, parts);
        let qkv = gpu.output(metadata.num_tokens, shape.columns(), gpu.dtype());
        gpu.write(&qkv.tensor, &gpu::encode(numbers, gpu.dtype()));
        let table: CudaRopeTable = gpu.backend.load_rope(&rope(shape.head_dim), MAX_POSITIONS).unwrap();
        let norm = |at: usize| norms.map(|norms| Norm { weight: norms[at], epsilon: EPSILON });
        let heads: HeadTransform<'_, CudaBackend> =
            HeadTransform { shape: shape.of_backend(), q_norm: norm(0), k_norm: norm(1), rope: &table };
        gpu.backend.rope_and_store_kv(&gpu.stream, &qkv.tensor, &heads, &self.kv_layer(), &metadata).unwrap();
        qkv.numbers(gpu)
    }

    fn metadata(&self, sequences: &[usize], parts: &[Lengths]) -> AttentionMetadata<CudaBuffer> {
        self.metadata_at(sequences, &parts.iter().map(last_positions).collect::<Vec<_>>())
    }

    /// The step whose queries have these positions in their sequences.
    fn metadata_at(&self, sequences: &[usize], parts: &[Vec<usize>]) -> AttentionMetadata<CudaBuffer> {
        let block_size = self.shape.block_size;
        let max_blocks = self.tables.iter().map(Vec::len).max().unwrap() + 1;
        let (mut starts, mut tables, mut positions, mut slots) = (vec![0i32], vec![], vec![], vec![]);
        let context_len = |part: &Vec<usize>| part.last().unwrap() + 1;
        for (sequence, part) in sequences.iter().zip(parts) {
            let table = &self.tables[*sequence];
            for &position in part {
                positions.push(position as i32);
                slots.push(table[position / block_size] * block_size as i32 + (position % block_size) as i32);
            }
            starts.push(positions.len() as i32);
            let needed = context_len(part).div_ceil(block_size);
            tables.extend_from_slice(&table[..needed]);
            tables.extend(std::iter::repeat_n(-1, max_blocks - needed));
        }
        let lens: Vec<i32> = parts.iter().map(|part| context_len(part) as i32).collect();
        let (num_seqs, num_tokens) = (parts.len(), positions.len());
        AttentionMetadata {
            num_seqs,
            num_tokens,
            max_query_len: parts.iter().map(Vec::len).max().unwrap(),
            max_context_len: parts.iter().map(context_len).max().unwrap(),
            runs: SequenceRuns::of(parts.iter().map(|part| (part.len(), context_len(part)))),
            cu_seqlens_q: self.gpu.indices(&starts, 1, num_seqs + 1),
            context_lens: self.gpu.indices(&lens, 1, num_seqs),
            block_tables: self.gpu.indices(&tables, num_seqs, max_blocks),
            positions: self.gpu.indices(&positions, 1, num_tokens),
            slot_mapping: self.gpu.indices(&slots, 1, num_tokens),
        }
    }

    /// Attention of the listed sequences in one call.
    fn attend(&self, sequences: &[usize], parts: &[Lengths]) -> Output {
        self.attend_with(sequences, parts, &self.metadata(sequences, parts))
    }

    fn attend_with(&self, sequences: &[usize], parts: &[Lengths], metadata: &AttentionMetadata<CudaBuffer>) -> Output {
        self.attend_at(sequences, &parts.iter().map(last_positions).collect::<Vec<_>>(), metadata)
    }

    fn attend_at(&self, sequences: &[usize], parts: &[Vec<usize>], metadata: &AttentionMetadata<CudaBuffer>) -> Output {
        let (gpu, shape) = (self.gpu, self.shape);
        let columns = shape.columns();
        let mut numbers = Vec::new();
        for (sequence, part) in sequences.iter().zip(parts) {
            for &position in part {
                let row = &self.rows[*sequence][position * columns..(position + 1) * columns];
                let q_size = shape.num_heads() * shape.head_dim;
                numbers.extend_from_slice(&row[..q_size]);
                // Keys and values come from the cache, never from here.
                numbers.extend(std::iter::repeat_n(f32::NAN, columns - q_size));
            }
        }
        let qkv = gpu.activations(&numbers, metadata.num_tokens, columns);
        let out = gpu.output(metadata.num_tokens, shape.num_heads() * shape.head_dim, gpu.dtype());
        let attention = shape.of_backend();
        gpu.backend.attention(&gpu.stream, &qkv, &attention, &self.kv_layer(), metadata, &out.tensor).unwrap();
        out
    }

    /// What attention is defined as, for the queries of one sequence.
    fn reference(&self, sequence: usize, positions: &[usize]) -> Vec<f64> {
        let Shape { head_dim, window, group, softcap, .. } = self.shape;
        let cap = |score: f64| softcap.map(f64::from).map_or(score, |cap| cap * (score / cap).tanh());
        let scale = f64::from(self.shape.of_backend().scale);
        let mut out = Vec::new();
        for &position in positions {
            let first = window.map_or(0, |window| (position + 1).saturating_sub(window));
            for head in 0..self.shape.num_heads() {
                let q = self.head(sequence, position, head);
                let kv_head = self.shape.num_heads() + head / group;
                let keys = (first..=position).map(|at| self.head(sequence, at, kv_head));
                let scores: Vec<f64> = keys.map(|k| cap(dot(q, k) * scale)).collect();
                let most = scores.iter().copied().fold(f64::MIN, f64::max);
                let weights: Vec<f64> = scores.iter().map(|score| (score - most).exp()).collect();
                let total: f64 = weights.iter().sum();
                let mut sum = vec![0.0; head_dim];
                for (at, weight) in (first..=position).zip(&weights) {
                    let v = self.head(sequence, at, kv_head + self.shape.num_kv_heads);
                    sum.iter_mut().zip(v).for_each(|(sum, v)| *sum += weight / total * f64::from(*v));
                }
                out.extend(sum);
            }
        }
        out
    }

    fn head(&self, sequence: usize, position: usize, head: usize) -> &[f32] {
        let start = position * self.shape.columns() + head * self.shape.head_dim;
        &self.rows[sequence][start..start + self.shape.head_dim]
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// Attention of a model of 8 billion weights.
pub const LARGE: Shape = Shape { num_kv_heads: 8, group: 4, head_dim: 128, ..SMALL };

/// Types of activations, with those of caches beside them.
pub const CACHES: [(DType, DType); 3] =
    [(DType::BF16, DType::BF16), (DType::BF16, DType::F8E4M3), (DType::F16, DType::F16)];

/// What decode, or prefill, attention is called for such types.
pub fn kernel_name(kind: &str, (dtype, cache): (DType, DType), head_dim: usize) -> String {
    let beside = if cache == dtype { String::new() } else { format!("_{cache}") };
    format!("attention_{kind}_{dtype}{beside}_d{head_dim}")
}

/// Attends in a step to a cache of `dtype` that holds anything, as what kernels move and multiply does not depend on it.
pub fn attend_to_anything(gpu: &Gpu, dtype: DType, shape: Shape, parts: &[Lengths]) {
    let lens: Vec<usize> = parts.iter().map(|part| part.1).collect();
    let world = World::empty(gpu, dtype, shape, &lens, &mut Random::new(1));
    let metadata = world.metadata(&(0..parts.len()).collect::<Vec<_>>(), parts);
    let (num_tokens, columns) = (metadata.num_tokens, shape.columns());
    let qkv = gpu.activations(&vec![0.0; num_tokens * columns], num_tokens, columns);
    let out = gpu.output(num_tokens, shape.num_heads() * shape.head_dim, gpu.dtype());
    let attention = shape.of_backend();
    gpu.backend.attention(&gpu.stream, &qkv, &attention, &world.kv_layer(), &metadata, &out.tensor).unwrap();
    gpu.synchronize();
}

/// A prompt in a layer of such a model, whose cache is of `dtype` and whose heads may have norms.
pub fn store_large(gpu: &Gpu, dtype: DType, num_tokens: usize, has_norms: bool) {
    let random = &mut Random::new(6);
    let world = World::empty(gpu, dtype, LARGE, &[num_tokens], random);
    let numbers = gpu.numbers(random, num_tokens * LARGE.columns(), 1.0);
    let weight = gpu.vector(&vec![1.0; LARGE.head_dim]);
    world.store(&numbers, &[0], &[(num_tokens, num_tokens)], has_norms.then_some([&weight; 2]));
}

/// Attends with `parts` in one call and compares every row.
fn check_attention(gpu: &Gpu, shape: Shape, parts: &[Lengths], seed: u64) {
    let lens: Vec<usize> = parts.iter().map(|part| part.1).collect();
    check_world(&World::new(gpu, shape, &lens, &mut Random::new(seed)), parts);
}

fn check_world(world: &World<'_>, parts: &[Lengths]) {
    let (gpu, shape) = (world.gpu, world.shape);
    let sequences: Vec<usize> = (0..parts.len()).collect();
    let found = world.attend(&sequences, parts).numbers(gpu);
    let wanted: Vec<f64> = sequences.iter().flat_map(|at| world.reference(*at, &last_positions(&parts[*at]))).collect();
    // The output is rounded, and so is every weight: at most that share of the largest value, and values are normal.
    let tolerance = epsilon(gpu.dtype());
    assert_close(&format!("{} {shape:?} {parts:?}", gpu.dtype()), &found, &wanted, tolerance, 3.0 * tolerance);
}

#[test]
fn one_new_token_sees_its_context() {
    for gpu in gpu::lend().iter() {
        for (at, head_dim) in [64, 128, 256].into_iter().enumerate() {
            for group in [1, 3, 8] {
                let shape = Shape { num_kv_heads: 2, group, head_dim, ..SMALL };
                check_attention(gpu, shape, &[(1, 1), (1, 16), (1, 17), (1, 75)], at as u64);
            }
        }
        for head_dim in [16, 32, 80, 96] {
            check_attention(gpu, Shape { num_kv_heads: 1, group: 2, head_dim, ..SMALL }, &[(1, 33), (1, 5)], 9);
        }
    }
}

#[test]
fn many_new_tokens_see_their_context() {
    for gpu in gpu::lend().iter() {
        for (at, head_dim) in [64, 128, 256].into_iter().enumerate() {
            for group in [1, 3, 8] {
                let shape = Shape { num_kv_heads: 1, group, head_dim, ..SMALL };
                check_attention(gpu, shape, &[(2, 2), (17, 50), (9, 9)], 10 + at as u64);
            }
        }
        for head_dim in [16, 32, 80, 96] {
            check_attention(gpu, Shape { num_kv_heads: 2, group: 2, head_dim, ..SMALL }, &[(33, 33), (5, 21)], 19);
        }
    }
}

#[test]
fn decodes_and_prefills_share_a_batch() {
    for gpu in gpu::lend().iter() {
        check_attention(gpu, SMALL, &[(1, 40), (70, 70), (1, 1), (3, 90), (1, 17)], 20);
        check_attention(gpu, Shape { block_size: 64, ..SMALL }, &[(1, 64), (65, 130), (2, 65)], 21);
        // More rows of a KV head than decode attention takes.
        check_attention(gpu, Shape { num_kv_heads: 1, group: 20, ..SMALL }, &[(1, 30), (2, 9)], 22);
    }
}

/// Sequences without cached context get a launch of their own where another library attends to them.
#[test]
fn runs_of_sequences_have_the_bits_of_the_step() {
    for dtype in [DType::BF16, DType::F16] {
        let gpus = [Gpu::new(dtype), Gpu::in_runs(dtype)];
        let steps: [&[Lengths]; 4] = [
            &[(1, 40), (70, 70), (1, 1), (3, 90), (1, 17), (9, 9), (17, 17)],
            &[(2, 2), (33, 33)],
            &[(5, 5), (1, 600), (30, 530)],
            &[(1, 300), (1, 20)],
        ];
        for (at, parts) in steps.into_iter().enumerate() {
            for window in [None, Some(7)] {
                let shape = Shape { window, ..SMALL };
                let lens: Vec<usize> = parts.iter().map(|part| part.1).collect();
                let sequences: Vec<usize> = (0..parts.len()).collect();
                let [whole, apart] = gpus.each_ref().map(|gpu| {
                    let world = World::new(gpu, shape, &lens, &mut Random::new(25 + at as u64));
                    world.attend(&sequences, parts).bytes(gpu)
                });
                assert_eq!(whole, apart, "{dtype} {shape:?} {parts:?}");
            }
        }
    }
}

#[test]
fn long_contexts_are_split_and_combined() {
    for gpu in gpu::lend().iter() {
        check_attention(gpu, SMALL, &[(1, 256), (1, 257), (1, 600), (1, 3)], 30);
        check_attention(gpu, SMALL, &[(30, 530), (1, 511)], 31);
    }
}

#[test]
fn windows_hide_what_lies_before_them() {
    for gpu in gpu::lend().iter() {
        for (at, window) in [1, 7, 16, 32, 100].into_iter().enumerate() {
            let shape = Shape { window: Some(window), ..SMALL };
            check_attention(gpu, shape, &[(1, 50), (40, 90), (1, 5), (1, 17), (2, 34)], 40 + at as u64);
        }
        let shape = Shape { window: Some(300), ..SMALL };
        check_attention(gpu, shape, &[(1, 700), (1, 290), (5, 560)], 49);
    }
}

/// Caps far above the scores, among them and below most of them, in both kernels for every size of heads.
#[test]
fn scores_are_capped() {
    for gpu in gpu::lend().iter() {
        for (at, head_dim) in [16, 32, 64, 80, 96, 128, 256].into_iter().enumerate() {
            let softcap = Some([50.0, 2.0, 0.5][at % 3]);
            let shape = Shape { num_kv_heads: 1, group: 2, head_dim, softcap, ..SMALL };
            check_attention(gpu, shape, &[(1, 40), (40, 70), (1, 1), (3, 17)], 90 + at as u64);
        }
        for (at, softcap) in [50.0, 2.0, 0.5].into_iter().enumerate() {
            for window in [None, Some(40)] {
                let shape = Shape { window, softcap: Some(softcap), ..SMALL };
                check_attention(gpu, shape, &[(1, 600), (30, 300)], 97 + at as u64);
            }
        }
    }
}

/// Scores are so far beyond the cap that all keys weigh the same, or so far below it that it is not there.
#[test]
fn caps_bound_large_scores_and_leave_small_ones() {
    for gpu in gpu::lend().iter() {
        let attend = |softcap: Option<f32>| {
            let shape = Shape { num_kv_heads: 1, group: 1, softcap, ..SMALL };
            let world = World::new(gpu, shape, &[50], &mut Random::new(99));
            let found = world.attend(&[0], &[(1, 50)]).numbers(gpu);
            let values = |dim: usize| (0..50).map(move |at| (at, dim));
            let mean =
                |dim: usize| values(dim).map(|(at, dim)| f64::from(world.head(0, at, 2)[dim])).sum::<f64>() / 50.0;
            (found, (0..64).map(mean).collect::<Vec<_>>())
        };
        let tolerance = 3.0 * epsilon(gpu.dtype());
        let (found, mean) = attend(Some(1e-5));
        assert_close("a cap of next to nothing", &found, &mean, tolerance, tolerance);
        let (found, plain) = (attend(Some(1e3)).0, attend(None).0);
        let plain: Vec<f64> = plain.into_iter().map(f64::from).collect();
        assert_close("a cap far above", &found, &plain, tolerance, tolerance);
    }
}

/// The blocks before a window may be anything, as whoever holds the cache may have given them to others: here they lie
/// outside of the pool.
#[test]
fn blocks_before_a_window_are_not_touched() {
    for gpu in gpu::lend().iter() {
        let caches = CACHES.iter().filter(|types| types.0 == gpu.dtype());
        for (cache, window) in caches.flat_map(|types| [1, 40, 300].map(|window| (types.1, window))) {
            let shape = Shape { window: Some(window), ..SMALL };
            let parts = [(1, 700), (5, 560), (70, 400), (1, 30)];
            let mut world =
                World::with_cache(gpu, cache, shape, &parts.map(|part| part.1), &mut Random::new(45 + window as u64));
            let attend = |world: &World<'_>| {
                let together = world.attend(&[0, 1, 2, 3], &parts).bytes(gpu);
                let metadata = AttentionMetadata { max_context_len: 1 << 28, ..world.metadata(&[0], &parts[..1]) };
                [together, world.attend_with(&[0], &parts[..1], &metadata).bytes(gpu)]
            };
            let wanted = attend(&world);
            world.lose_blocks_before_windows(&parts);
            assert!(attend(&world) == wanted, "{} over {cache}, window {window}", gpu.dtype());
        }
    }
}

/// Chunked prefill, decode, splitting and the rest of the batch leave the bits of a row alone.
#[test]
fn a_row_has_the_same_bits_however_it_is_computed() {
    for gpu in gpu::lend().iter() {
        for (window, softcap) in
            [(None, None), (Some(40), None), (Some(300), None), (None, Some(2.0)), (Some(40), Some(50.0))]
        {
            let shape = Shape { window, softcap, ..SMALL };
            let world = World::new(gpu, shape, &[530, 60, 300], &mut Random::new(50));
            let row_bytes = shape.num_heads() * shape.head_dim * 2;
            let last = |sequences: &[usize], parts: &[Lengths]| {
                let bytes = world.attend(sequences, parts).bytes(gpu);
                bytes[bytes.len() - row_bytes..].to_vec()
            };
            let alone = last(&[0], &[(1, 530)]);
            assert_eq!(last(&[0], &[(2, 530)]), alone, "prefill of two, window {window:?}");
            assert_eq!(last(&[0], &[(67, 530)]), alone, "prefill of many, window {window:?}");
            assert_eq!(last(&[1, 2, 0], &[(1, 60), (1, 300), (1, 530)]), alone, "in a batch, window {window:?}");
            assert_eq!(last(&[1, 0], &[(20, 60), (1, 530)]), alone, "beside a prefill, window {window:?}");
            let parts = [(1, 530)];
            // In a batch that fills the device whole contexts are walked by one block.
            let rows = world.attend(&[0; 82], &[(1, 530); 82]).bytes(gpu);
            assert!(rows.chunks_exact(row_bytes).all(|row| row == alone), "among many, window {window:?}");
            // And one so long that its chunks would not fit is.
            let metadata = AttentionMetadata { max_context_len: 1 << 28, ..world.metadata(&[0], &parts) };
            assert_eq!(world.attend_with(&[0], &parts, &metadata).bytes(gpu), alone, "unsplit, window {window:?}");
        }
    }
}

/// New tokens need not be the last of their sequence: each sees what lies before it, whichever others are new.
#[test]
fn new_tokens_with_gaps_see_what_lies_before_them() {
    for gpu in gpu::lend().iter() {
        for (at, window) in [None, Some(1), Some(40), Some(300)].into_iter().enumerate() {
            // Decode attention takes 16 rows of a KV head at most, but one new token only.
            for group in [1, 3, 20] {
                let random = &mut Random::new(80 + at as u64);
                let shape = Shape { num_kv_heads: 2, group, window, ..SMALL };
                let world = World::new(gpu, shape, &[600, 70, 33], random);
                let spread = [5, 6, 80, 255, 256, 257, 300, 511, 590];
                let dense: Vec<usize> = (0..70).filter(|_| random.below(3) > 0).collect();
                let parts = [spread.to_vec(), dense, vec![20]];
                let metadata = world.metadata_at(&[0, 1, 2], &parts);
                let found = world.attend_at(&[0, 1, 2], &parts, &metadata);
                let wanted: Vec<f64> = (0..3).flat_map(|at| world.reference(at, &parts[at])).collect();
                let tolerance = epsilon(gpu.dtype());
                let what = format!("{} {shape:?}", gpu.dtype());
                assert_close(&what, &found.numbers(gpu), &wanted, tolerance, 3.0 * tolerance);
                let bytes = found.bytes(gpu);
                let row_bytes = shape.num_heads() * shape.head_dim * 2;
                for (row, position) in spread.into_iter().enumerate() {
                    let alone = world.attend(&[0], &[(1, position + 1)]).bytes(gpu);
                    assert_eq!(bytes[row * row_bytes..][..row_bytes], alone, "{what}, position {position}");
                }
            }
        }
    }
}

#[test]
fn heads_are_normalised_rotated_and_stored() {
    for gpu in gpu::lend().iter() {
        let random = &mut Random::new(60);
        let few = [(5, 5), (40, 70), (1, 33)];
        let many = [(5, 5), (110, 120), (1, 33)];
        for (head_dim, block_size, has_norms, group, parts) in [
            (64, 16, false, 3, few),
            (128, 32, true, 3, few),
            (256, 16, true, 3, few),
            (16, 16, true, 3, few),
            (80, 16, false, 3, few),
            (96, 64, true, 3, few),
            (64, 16, true, 3, many),
            // More heads than a block has.
            (128, 16, true, 34, many),
        ] {
            let shape = Shape { num_kv_heads: 2, group, head_dim, block_size, ..SMALL };
            let world = World::new(gpu, shape, &parts.map(|part| part.1), random);
            let num_tokens: usize = parts.iter().map(|part| part.0).sum();
            // The first token is so small that the epsilon of its norms matters.
            let small = gpu.numbers(random, shape.columns(), 0.003);
            let numbers = [small, gpu.numbers(random, (num_tokens - 1) * shape.columns(), 1.0)].concat();
            let weights = [(); 2].map(|()| (0..head_dim).map(|_| random.normal() as f32).collect::<Vec<f32>>());
            let on_device = weights.clone().map(|weight| gpu.vector(&weight));
            let norms = has_norms.then_some([&on_device[0], &on_device[1]]);
            let found = world.store(&numbers, &[0, 1, 2], &parts, norms);
            let table = cpu::RopeTable::new(&rope(head_dim), MAX_POSITIONS).unwrap();
            let mut wanted = Vec::new();
            let positions = parts.iter().flat_map(|part| part.1 - part.0..part.1);
            for (position, row) in positions.zip(numbers.chunks_exact(shape.columns())) {
                for (head, x) in row.chunks_exact(head_dim).enumerate() {
                    let kind = if head < shape.num_heads() { 0 } else { 1 };
                    let weight = has_norms.then_some(&weights[kind][..]);
                    match head < shape.num_heads() + shape.num_kv_heads {
                        true => wanted.extend(transformed(x, weight, table.row(position))),
                        false => wanted.extend(x.iter().map(|x| f64::from(*x))),
                    }
                }
            }
            let what = format!("{} {shape:?}", gpu.dtype());
            assert_close(&what, &found, &wanted, epsilon(gpu.dtype()) * 1.01, 1e-6);
            check_stored(&world, &found, &parts);
        }
    }
}

/// However many heads a block has: that depends on how many tokens there are.
#[test]
fn heads_have_the_same_bits_beside_any_others() {
    for gpu in gpu::lend().iter() {
        let random = &mut Random::new(61);
        for (group, head_dim) in [(3, 64), (1, 16), (34, 128)] {
            let shape = Shape { num_kv_heads: 2, group, head_dim, ..SMALL };
            let num_tokens = 130;
            let numbers = gpu.numbers(random, num_tokens * shape.columns(), 1.0);
            let weights = [(); 2].map(|()| gpu.vector(&gpu.numbers(random, head_dim, 1.0)));
            let store = |steps: &[usize]| {
                let world = World::empty(gpu, gpu.dtype(), shape, &[num_tokens], &mut Random::new(62));
                let (mut rows, mut end) = (vec![], 0);
                for step in steps {
                    let numbers = &numbers[end * shape.columns()..(end + step) * shape.columns()];
                    end += step;
                    rows.extend(world.store(numbers, &[0], &[(*step, end)], Some([&weights[0], &weights[1]])));
                }
                (rows, gpu.download(&world.kv))
            };
            let at_once = store(&[num_tokens]);
            assert!(store(&[1, 50, 79]) == at_once, "{} {shape:?}", gpu.dtype());
        }
    }
}

fn transformed(x: &[f32], weight: Option<&[f32]>, (cosines, sines): (&[f32], &[f32])) -> Vec<f64> {
    let mut x: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
    if let Some(weight) = weight {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        let inverse = (mean + f64::from(EPSILON)).sqrt().recip();
        x.iter_mut().zip(weight).for_each(|(x, weight)| *x *= inverse * f64::from(*weight));
    }
    let half = x.len() / 2;
    let angles = cosines.iter().zip(sines).map(|(cos, sin)| (f64::from(*cos), f64::from(*sin)));
    let (first, second): (Vec<f64>, Vec<f64>) = angles
        .enumerate()
        .map(|(at, (cos, sin))| (x[at] * cos - x[half + at] * sin, x[half + at] * cos + x[at] * sin))
        .unzip();
    [first, second].concat()
}

/// The cache holds exactly the rows' keys and values where the layout says.
fn check_stored(world: &World<'_>, rows: &[f32], parts: &[Lengths]) {
    let Shape { num_kv_heads, head_dim, block_size, .. } = world.shape;
    let (layout, dtype) = (world.layout, world.gpu.dtype());
    let bytes = world.gpu.download(&world.kv);
    let number = |offset: usize| gpu::decode(&bytes[offset..offset + 2], dtype)[0];
    let mut rows = rows.chunks_exact(world.shape.columns());
    for (sequence, (num_queries, context_len)) in parts.iter().enumerate() {
        for position in context_len - num_queries..*context_len {
            let row = rows.next().unwrap();
            let block = world.tables[sequence][position / block_size] as usize * layout.block_bytes();
            for head in 0..num_kv_heads {
                let k = &row[(world.shape.num_heads() + head) * head_dim..][..head_dim];
                let v = &row[(world.shape.num_heads() + num_kv_heads + head) * head_dim..][..head_dim];
                for dim in 0..head_dim {
                    let token = position % block_size;
                    let k_at = block + layout.k_tile_offset(LAYER, head) + layout.k_offset(token, dim);
                    let v_at = block + layout.v_tile_offset(LAYER, head) + layout.v_offset(token, dim);
                    assert_eq!((number(k_at), number(v_at)), (k[dim], v[dim]), "position {position}, head {head}");
                }
            }
        }
    }
    // The other layer is as it was.
    let first = layout.k_tile_offset(0, 0)..layout.k_tile_offset(LAYER, 0);
    assert!(bytes[first].iter().all(|byte| *byte == 0xff), "another layer was written");
}

/// Keys and values are those of the row, rounded to fp8; what is larger than all numbers becomes the largest. Compared with
/// what they were rounded to, they deviate by nothing.
#[test]
fn fp8_keeps_the_nearest_numbers() {
    let gpus = gpu::lend();
    let gpu = &gpus[0];
    let shape = Shape { num_kv_heads: 1, group: 1, head_dim: 64, ..SMALL };
    let world = World::with_cache(gpu, DType::F8E4M3, shape, &[40], &mut Random::new(71));
    let mut numbers = gpu.numbers(&mut Random::new(72), 40 * shape.columns(), 1.0);
    for (at, number) in numbers.iter_mut().enumerate() {
        *number = gpu::round(*number * [1.0, 1000.0, 0.01, 1.0 / 512.0][at % 4], gpu.dtype());
    }
    let rows = world.store(&numbers, &[0], &[(40, 40)], None);
    let mut world = World { rows: vec![rows.clone()], ..world };
    world.read_back();
    let columns = shape.columns();
    for (position, (stored, row)) in world.rows[0].chunks_exact(columns).zip(rows.chunks_exact(columns)).enumerate() {
        for at in shape.head_dim..columns {
            let nearest = gpu::round(row[at], DType::F8E4M3);
            assert!(stored[at] == nearest, "{position}, {at}: {} for {}, not {nearest}", stored[at], row[at]);
        }
    }
    let has = |wanted: &dyn Fn(f32) -> bool| world.rows[0].iter().any(|number| wanted(number.abs()));
    assert!(has(&|size| size == 448.0) && has(&|size| size > 0.0 && size < 0.01));

    let qkv = gpu.activations(&rows, 40, columns);
    let out = gpu.output(1, 40, DType::F32);
    let slots = world.metadata(&[0], &[(40, 40)]).slot_mapping;
    gpu.backend.kv_deviation(&gpu.stream, &qkv, &shape.of_backend(), &world.kv_layer(), &slots, &out.tensor).unwrap();
    assert_eq!(out.numbers(gpu), [0.0; 40]);
}

/// Against the reference over keys and values as the cache has them.
#[test]
fn caches_of_fp8_are_attended() {
    let gpus = gpu::lend();
    let [gpu, f16] = &*gpus;
    for (at, head_dim) in [16, 32, 64, 80, 96, 128, 256].into_iter().enumerate() {
        let shape = Shape { num_kv_heads: 2, group: 3, head_dim, ..SMALL };
        let parts = [(1, 40), (20, 50), (1, 1), (3, 17)];
        let lens = parts.map(|part| part.1);
        let world = World::with_cache(gpu, DType::F8E4M3, shape, &lens, &mut Random::new(73 + at as u64));
        check_world(&world, &parts);
        check_world(&World { shape: Shape { softcap: Some(2.0), ..shape }, ..world }, &parts);
    }
    let parts = [(1, 600), (30, 530), (1, 257)];
    for window in [None, Some(100)] {
        let shape = Shape { window, block_size: 32, ..SMALL };
        let lens = parts.map(|part| part.1);
        check_world(&World::with_cache(gpu, DType::F8E4M3, shape, &lens, &mut Random::new(81)), &parts);
    }
    let layout = KvLayout::with_order(KvOrder::Rows, NUM_LAYERS, 2, 64, 16, DType::F8E4M3).unwrap();
    let world = World::new(f16, SMALL, &[5], &mut Random::new(82));
    let world = World { layout, ..world };
    let metadata = world.metadata(&[0], &[(5, 5)]);
    let qkv = f16.activations(&vec![0.0; 5 * SMALL.columns()], 5, SMALL.columns());
    let out = f16.output(5, SMALL.num_heads() * 64, f16.dtype());
    let refused =
        f16.backend.attention(&f16.stream, &qkv, &SMALL.of_backend(), &world.kv_layer(), &metadata, &out.tensor);
    assert!(refused.unwrap_err().to_string().contains("activations of bf16"));
}

/// As for the other types: decode, prefill and the rest of the batch leave the bits of a row alone.
#[test]
fn rows_over_fp8_have_the_same_bits_however_they_are_computed() {
    let gpus = gpu::lend();
    let gpu = &gpus[0];
    let world = World::with_cache(gpu, DType::F8E4M3, SMALL, &[530, 60], &mut Random::new(83));
    let row_bytes = SMALL.num_heads() * SMALL.head_dim * 2;
    let last = |sequences: &[usize], parts: &[Lengths]| {
        let bytes = world.attend(sequences, parts).bytes(gpu);
        bytes[bytes.len() - row_bytes..].to_vec()
    };
    let alone = last(&[0], &[(1, 530)]);
    assert_eq!(last(&[0], &[(67, 530)]), alone, "prefill of many");
    assert_eq!(last(&[1, 0], &[(20, 60), (1, 530)]), alone, "beside a prefill");
}

#[test]
fn impossible_heads_are_refused() {
    let gpus = gpu::lend();
    let gpu = &gpus[0];
    let world = World::new(gpu, SMALL, &[5], &mut Random::new(70));
    let metadata = world.metadata(&[0], &[(5, 5)]);
    let qkv = gpu.activations(&vec![0.0; 5 * SMALL.columns()], 5, SMALL.columns());
    let out = gpu.output(5, SMALL.num_heads() * 64, gpu.dtype());
    let attend = |shape: AttentionShape, layer: usize, metadata: &AttentionMetadata<CudaBuffer>| {
        let kv = KvLayer { layer, ..world.kv_layer() };
        gpu.backend.attention(&gpu.stream, &qkv, &shape, &kv, metadata, &out.tensor).map_err(|error| error.to_string())
    };
    assert_eq!(attend(SMALL.of_backend(), LAYER, &metadata), Ok(()));
    assert!(attend(AttentionShape { head_dim: 128, ..SMALL.of_backend() }, LAYER, &metadata).is_err());
    assert!(attend(AttentionShape { num_heads: 5, ..SMALL.of_backend() }, LAYER, &metadata).is_err());
    assert!(attend(SMALL.of_backend(), NUM_LAYERS, &metadata).is_err());
    for cap in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let error = attend(AttentionShape { softcap: Some(cap), ..SMALL.of_backend() }, LAYER, &metadata);
        assert!(error.unwrap_err().contains("soft cap"));
    }
    let short = AttentionMetadata { context_lens: gpu.indices(&[], 1, 0), ..metadata.clone() };
    assert!(attend(SMALL.of_backend(), LAYER, &short).unwrap_err().contains("context_lens"));
    let layout = KvLayout::new(NUM_LAYERS, 2, 64, 16, DType::BF16).unwrap();
    let kv = KvLayer { blocks: world.kv.buffer(), layout: &layout, layer: LAYER };
    let error = gpu.backend.attention(&gpu.stream, &qkv, &SMALL.of_backend(), &kv, &metadata, &out.tensor);
    assert!(error.unwrap_err().to_string().contains("Pairs"));
}
