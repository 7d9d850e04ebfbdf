//! Attention against plain f64 loops, and against itself: a row has the same bits however it is computed.

use half::bf16;

use super::*;

/// Queries of a sequence, and the tokens in its cache after them.
#[derive(Clone, Copy)]
struct Lengths {
    num_queries: usize,
    context_len: usize,
}

impl Lengths {
    fn positions(&self) -> Vec<usize> {
        (self.context_len - self.num_queries..self.context_len).collect()
    }
}

#[derive(Debug, Clone, Copy)]
struct Shape {
    num_kv_heads: usize,
    group: usize,
    head_dim: usize,
    block_size: usize,
    dtype: DType,
    window: Option<usize>,
    softcap: Option<f32>,
}

const SMALL: Shape =
    Shape { num_kv_heads: 2, group: 3, head_dim: 64, block_size: 16, dtype: DType::BF16, window: None, softcap: None };

/// Sequences whose queries, keys and values are functions of sequence, position, head and dimension.
struct World {
    shape: Shape,
    layout: KvLayout,
    bytes: Vec<u8>,
    tables: Vec<Vec<i32>>,
}

fn number(seed: usize, sequence: usize, position: usize, head: usize, dim: usize) -> f32 {
    let mut x = (seed * 31 + sequence) as u64 * 0x9e37_79b9 + (position * 65_537 + head * 4099 + dim * 17) as u64;
    x = (x ^ (x >> 15)).wrapping_mul(0x2c1b_3c6d_0000_0001 | 0x1234_5679);
    x = (x ^ (x >> 29)).wrapping_mul(0x297a_2d39_5bd1_e995);
    ((x >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * if seed == 0 { 3.0 } else { 1.0 }
}

const LAYER: usize = 1;

impl World {
    /// A cache that holds `context_lens` tokens in scattered blocks, NaN everywhere else.
    fn new(shape: Shape, context_lens: &[usize]) -> Self {
        let Shape { num_kv_heads, head_dim, block_size, dtype, .. } = shape;
        let layout = KvLayout::new(2, num_kv_heads, head_dim, block_size, dtype).unwrap();
        let num_blocks: usize = context_lens.iter().map(|len| len.div_ceil(block_size)).sum::<usize>() + 3;
        let step = (num_blocks / 3..).find(|step| greatest_common_divisor(*step, num_blocks) == 1).unwrap();
        let mut free = (0..num_blocks).map(|index| (index * step % num_blocks) as i32);
        let tables: Vec<Vec<i32>> =
            context_lens.iter().map(|len| free.by_ref().take(len.div_ceil(block_size)).collect()).collect();
        let mut world = World { shape, layout, bytes: vec![0xff; num_blocks * layout.block_bytes()], tables };
        for (sequence, len) in context_lens.iter().enumerate() {
            (0..*len).for_each(|position| world.write(sequence, position));
        }
        world
    }

    fn key(&self, sequence: usize, position: usize, head: usize, dim: usize) -> f32 {
        self.rounded(number(1, sequence, position, head, dim))
    }

    fn value(&self, sequence: usize, position: usize, head: usize, dim: usize) -> f32 {
        self.rounded(number(2, sequence, position, head, dim))
    }

    fn rounded(&self, x: f32) -> f32 {
        if self.shape.dtype == DType::BF16 { bf16::from_f32(x).to_f32() } else { x }
    }

    fn write(&mut self, sequence: usize, position: usize) {
        let (layout, block_size) = (self.layout, self.shape.block_size);
        let block = self.tables[sequence][position / block_size] as usize * layout.block_bytes();
        let token = position % block_size;
        for head in 0..self.shape.num_kv_heads {
            for dim in 0..self.shape.head_dim {
                let k_offset = layout.k_tile_offset(LAYER, head) + layout.k_offset(token, dim);
                let v_offset = layout.v_tile_offset(LAYER, head) + layout.v_offset(token, dim);
                let (k, v) = (self.key(sequence, position, head, dim), self.value(sequence, position, head, dim));
                for (offset, x) in [(block + k_offset, k), (block + v_offset, v)] {
                    let bytes = x.to_le_bytes();
                    let kept = if self.shape.dtype == DType::BF16 { &bytes[2..] } else { &bytes[..] };
                    self.bytes[offset..offset + kept.len()].copy_from_slice(kept);
                }
            }
        }
    }

    fn query(&self, sequence: usize, position: usize, head: usize, dim: usize) -> f32 {
        number(0, sequence, position, head, dim)
    }

    /// Attention of the last queries of the listed sequences in one call.
    fn attend(&mut self, pool: &mut ThreadPool, isa: Isa, parts: &[(usize, Lengths)]) -> Vec<f32> {
        let parts: Vec<_> = parts.iter().map(|(sequence, lengths)| (*sequence, lengths.positions())).collect();
        self.attend_at(pool, isa, &parts)
    }

    /// Attention of the queries at some positions of the listed sequences in one call.
    fn attend_at(&mut self, pool: &mut ThreadPool, isa: Isa, parts: &[(usize, Vec<usize>)]) -> Vec<f32> {
        let Shape { num_kv_heads, group, head_dim, block_size, window, softcap, .. } = self.shape;
        let num_q_heads = num_kv_heads * group;
        let max_blocks = self.tables.iter().map(Vec::len).max().unwrap_or(0) + 1;
        let (mut qkv, mut cu_seqlens_q, mut tables) = (Vec::new(), vec![0], Vec::new());
        let (mut positions, mut context_lens) = (Vec::new(), Vec::new());
        for (sequence, wanted) in parts {
            for position in wanted {
                positions.push(*position as i32);
                for head in 0..num_q_heads {
                    qkv.extend((0..head_dim).map(|dim| self.query(*sequence, *position, head, dim)));
                }
                qkv.extend(std::iter::repeat_n(f32::NAN, 2 * num_kv_heads * head_dim));
            }
            cu_seqlens_q.push(positions.len() as i32);
            let context_len = wanted.last().map_or(0, |last| last + 1);
            context_lens.push(context_len as i32);
            let needed = context_len.div_ceil(block_size);
            tables.extend_from_slice(&self.tables[*sequence][..needed]);
            tables.extend(std::iter::repeat_n(-1, max_blocks - needed));
        }
        let mut out = vec![f32::NAN; *cu_seqlens_q.last().unwrap() as usize * num_q_heads * head_dim];
        let batch = AttentionBatch {
            qkv: &qkv,
            num_q_heads,
            cu_seqlens_q: &cu_seqlens_q,
            positions: &positions,
            context_lens: &context_lens,
            block_tables: &tables,
            max_blocks,
            layer: LAYER,
            scale: 1.0 / (head_dim as f32).sqrt(),
            softcap,
            window,
        };
        let layout = self.layout;
        let mut scratch = AttentionScratch::default();
        attention(pool, isa, &mut scratch, &batch, &KvArena::new(&mut self.bytes, layout), &mut out);
        out
    }

    /// The same in f64, one row.
    fn reference(&self, sequence: usize, position: usize) -> Vec<f64> {
        let Shape { num_kv_heads, group, head_dim, window, softcap, .. } = self.shape;
        let cap = |score: f64| softcap.map(f64::from).map_or(score, |cap| cap * (score / cap).tanh());
        let first = window.map_or(0, |window| (position + 1).saturating_sub(window));
        let mut out = Vec::new();
        for head in 0..num_kv_heads * group {
            let score = |key: usize| {
                let product = |dim: usize| {
                    f64::from(self.query(sequence, position, head, dim))
                        * f64::from(self.key(sequence, key, head / group, dim))
                };
                cap((0..head_dim).map(product).sum::<f64>() / (head_dim as f64).sqrt())
            };
            let scores: Vec<f64> = (first..=position).map(score).collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
            let sum: f64 = weights.iter().sum();
            out.extend((0..head_dim).map(|dim| {
                let values = (first..=position).map(|key| f64::from(self.value(sequence, key, head / group, dim)));
                weights.iter().zip(values).map(|(weight, value)| weight * value).sum::<f64>() / sum
            }));
        }
        out
    }

    fn row_len(&self) -> usize {
        self.shape.num_kv_heads * self.shape.group * self.shape.head_dim
    }
}

fn greatest_common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// What rounding may cost: to f32, or of queries and weights to bf16.
fn tolerance(isa: Isa, layout: &KvLayout) -> f64 {
    if rounds_to_bf16(isa, layout) { 1e-2 } else { 2e-6 }
}

fn rounds_to_bf16(isa: Isa, layout: &KvLayout) -> bool {
    uses_tile_registers(isa, layout) || uses_bf16_dot(isa, layout)
}

/// All sequences in one call: close to f64 (the last query of each), the same bits with every set of vector instructions.
fn check_against_reference(shape: Shape, lengths: &[Lengths]) {
    let context_lens: Vec<usize> = lengths.iter().map(|lengths| lengths.context_len).collect();
    let mut world = World::new(shape, &context_lens);
    let parts: Vec<(usize, Lengths)> = lengths.iter().copied().enumerate().collect();
    let mut pool = ThreadPool::new(2);
    let mut first: Option<Vec<u32>> = None;
    for isa in Isa::available() {
        let out = world.attend(&mut pool, isa, &parts);
        let is_rounded = rounds_to_bf16(isa, &world.layout);
        let mut rows = out.chunks_exact(world.row_len());
        for (sequence, lengths) in &parts {
            for position in lengths.context_len - lengths.num_queries..lengths.context_len {
                let found = rows.next().unwrap();
                if first.is_some() && !is_rounded || position % 7 != 0 && position + 1 != lengths.context_len {
                    continue;
                }
                for (wanted, found) in world.reference(*sequence, position).into_iter().zip(found) {
                    let error = (wanted - f64::from(*found)).abs();
                    assert!(error < tolerance(isa, &world.layout), "{isa} {position}: {wanted} {found}");
                }
            }
        }
        assert!(is_rounded || *first.get_or_insert_with(|| bits(&out)) == bits(&out), "{isa}: other bits");
    }
}

#[test]
fn agrees_with_f64_over_shapes() {
    let lengths = [(1, 1), (5, 17), (1, 300), (33, 33), (0, 40), (2, 515)]
        .map(|(num_queries, context_len)| Lengths { num_queries, context_len });
    for (num_kv_heads, group, head_dim, block_size) in [
        (2, 1, 64, 16),
        (1, 3, 64, 16),
        (3, 3, 64, 32),
        (1, 8, 128, 16),
        (1, 4, 256, 64),
        (1, 5, 80, 16),
        (2, 7, 16, 48),
    ] {
        for dtype in [DType::BF16, DType::F32] {
            for window in [None, Some(1), Some(37), Some(300)] {
                let shape = Shape { num_kv_heads, group, head_dim, block_size, dtype, window, softcap: None };
                check_against_reference(shape, &lengths);
            }
        }
    }
}

#[test]
fn long_contexts_split_over_threads_agree_with_f64() {
    for group in [1, 2, 8] {
        for window in [None, Some(1000)] {
            let shape = Shape { group, window, ..SMALL };
            check_against_reference(shape, &[Lengths { num_queries: 1, context_len: 2345 }]);
        }
    }
}

/// Caps far above the scores, among them and below most of them, for every number of rows that a tile has.
#[test]
fn capped_scores_agree_with_f64_over_shapes() {
    let lengths = [(1, 1), (5, 17), (1, 300), (33, 33), (2, 515)]
        .map(|(num_queries, context_len)| Lengths { num_queries, context_len });
    for (group, head_dim) in [(1, 64), (2, 256), (3, 64), (4, 16), (6, 80), (8, 128), (12, 64)] {
        for dtype in [DType::BF16, DType::F32] {
            for (softcap, window) in [(50.0, None), (2.0, Some(37)), (0.25, Some(300)), (2.0, None)] {
                let shape = Shape { num_kv_heads: 1, group, head_dim, dtype, window, softcap: Some(softcap), ..SMALL };
                check_against_reference(shape, &lengths);
            }
        }
    }
}

/// A row in a call without a cap has the bits it always had, and one with a cap has others.
#[test]
fn a_cap_changes_what_it_should() {
    let lengths = [(0, Lengths { num_queries: 3, context_len: 300 })];
    for isa in Isa::available() {
        let attend = |softcap: Option<f32>| {
            let mut world = World::new(Shape { softcap, ..SMALL }, &[300]);
            world.attend(&mut ThreadPool::new(1), isa, &lengths)
        };
        let (plain, high, low) = (attend(None), attend(Some(1e6)), attend(Some(1.0)));
        let distance = |other: &[f32]| plain.iter().zip(other).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(distance(&high) < 1e-5 && distance(&low) > 0.01, "{isa}: {} {}", distance(&high), distance(&low));
    }
}

/// The contract the prefix cache and preemption rest on: one result per row, whatever it shares a call with.
#[test]
fn a_row_has_the_same_bits_however_it_is_computed() {
    let lens = [531usize, 60, 270];
    for shape in [
        SMALL,
        Shape { window: Some(100), ..SMALL },
        Shape { window: Some(100), softcap: Some(2.0), ..SMALL },
        Shape { softcap: Some(50.0), group: 1, head_dim: 80, dtype: DType::F32, ..SMALL },
        Shape { group: 8, head_dim: 128, ..SMALL },
        Shape { group: 1, head_dim: 80, dtype: DType::F32, block_size: 32, ..SMALL },
    ] {
        let mut world = World::new(shape, &lens);
        let whole: Vec<(usize, Lengths)> =
            lens.iter().map(|len| Lengths { num_queries: *len, context_len: *len }).enumerate().collect();
        for isa in Isa::available().filter(|isa| *isa != Isa::Portable) {
            let mut pools: Vec<ThreadPool> = (1..4).map(ThreadPool::new).collect();
            let wanted = bits(&world.attend(&mut pools[0], isa, &whole));
            for pool in &mut pools {
                assert!(bits(&world.attend(pool, isa, &whole)) == wanted, "threads");
            }
            let mut alone = Vec::new();
            for part in &whole {
                alone.extend(bits(&world.attend(&mut pools[1], isa, &[*part])));
            }
            assert!(alone == wanted, "alone");
            for chunk in [1, 7, 64, 200] {
                let found = in_chunks(&mut world, &mut pools[chunk % 3], isa, &lens, chunk);
                assert!(found == wanted, "{isa}: chunks of {chunk}");
            }
        }
    }
}

/// All sequences in steps of `chunk` queries each, side by side.
fn in_chunks(world: &mut World, pool: &mut ThreadPool, isa: Isa, lens: &[usize], chunk: usize) -> Vec<u32> {
    let mut rows: Vec<Vec<u32>> = vec![Vec::new(); lens.len()];
    for start in (0..*lens.iter().max().unwrap()).step_by(chunk) {
        let parts: Vec<(usize, Lengths)> = lens
            .iter()
            .enumerate()
            .filter(|(_, len)| **len > start)
            .map(|(sequence, len)| {
                let end = (start + chunk).min(*len);
                (sequence, Lengths { num_queries: end - start, context_len: end })
            })
            .collect();
        let out = bits(&world.attend(pool, isa, &parts));
        let mut out = out.as_slice();
        for (sequence, lengths) in parts {
            let (own, rest) = out.split_at(lengths.num_queries * world.row_len());
            rows[sequence].extend_from_slice(own);
            out = rest;
        }
    }
    rows.concat()
}

/// Positions in order, each with one chance in `one_in` of being there; the last one always is.
fn some_positions(len: usize, one_in: usize, seed: usize) -> Vec<usize> {
    let mut state = seed as u64;
    let mut is_taken = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33).is_multiple_of(one_in as u64)
    };
    (0..len).filter(|position| is_taken() || position + 1 == len).collect()
}

#[test]
fn queries_with_gaps_see_what_lies_before_them() {
    let lens = [1usize, 18, 300, 771];
    for (num_kv_heads, group, head_dim, block_size) in
        [(2, 1, 64, 16), (1, 3, 64, 32), (1, 8, 128, 16), (1, 5, 80, 16), (2, 7, 16, 48)]
    {
        for dtype in [DType::BF16, DType::F32] {
            for window in [None, Some(1), Some(37), Some(300)] {
                let mut world = World::new(
                    Shape { num_kv_heads, group, head_dim, block_size, dtype, window, softcap: None },
                    &lens,
                );
                // The third sequence has ordinary queries.
                let parts: Vec<_> = lens
                    .iter()
                    .enumerate()
                    .map(|(at, len)| (at, if at == 2 { vec![298, 299] } else { some_positions(*len, 40, at) }))
                    .collect();
                for isa in Isa::available() {
                    let out = world.attend_at(&mut ThreadPool::new(2), isa, &parts);
                    let mut rows = out.chunks_exact(world.row_len());
                    for (sequence, positions) in &parts {
                        for position in positions {
                            for (wanted, found) in
                                world.reference(*sequence, *position).iter().zip(rows.next().unwrap())
                            {
                                let error = (wanted - f64::from(*found)).abs();
                                assert!(error < tolerance(isa, &world.layout), "{isa} {position}: {wanted} {found}");
                            }
                        }
                    }
                }
            }
        }
    }
}

/// What composition rests on: a recomputed token has the bits it has in a prefill, whichever others are recomputed.
#[test]
fn a_query_does_not_depend_on_the_others_of_its_sequence() {
    let lens = [531usize, 60];
    for shape in [
        SMALL,
        Shape { window: Some(20), ..SMALL },
        Shape { window: Some(20), softcap: Some(2.0), ..SMALL },
        Shape { window: Some(300), group: 8, head_dim: 128, ..SMALL },
        Shape { group: 1, head_dim: 80, dtype: DType::F32, block_size: 32, ..SMALL },
    ] {
        let mut world = World::new(shape, &lens);
        let row_len = world.row_len();
        let mut pools: Vec<ThreadPool> = (1..4).map(ThreadPool::new).collect();
        for isa in Isa::available().filter(|isa| *isa != Isa::Portable) {
            let whole: Vec<Vec<u32>> = (0..lens.len())
                .map(|at| bits(&world.attend_at(&mut pools[0], isa, &[(at, (0..lens[at]).collect())])))
                .collect();
            for (seed, one_in) in [1, 2, 3, 10, 50, 400].into_iter().enumerate() {
                let parts: Vec<_> = (0..lens.len()).map(|at| (at, some_positions(lens[at], one_in, seed))).collect();
                let found = bits(&world.attend_at(&mut pools[seed % 3], isa, &parts));
                let wanted: Vec<u32> = parts
                    .iter()
                    .flat_map(|(at, positions)| positions.iter().map(|position| (*at, *position)))
                    .flat_map(|(at, position)| whole[at][position * row_len..(position + 1) * row_len].to_vec())
                    .collect();
                assert!(found == wanted, "{isa}: one in {one_in} of {shape:?}");
            }
        }
    }
}

#[test]
#[should_panic(expected = "in order of position")]
fn queries_out_of_order_are_refused() {
    World::new(SMALL, &[20]).attend_at(&mut ThreadPool::new(1), Isa::best(), &[(0, vec![7, 3, 19])]);
}

/// Blocks are reused without being cleared: nothing but the sequence's own tokens may reach its result.
#[test]
fn what_lies_beyond_the_context_does_not_matter() {
    let parts: Vec<(usize, Lengths)> = [(1, 1), (3, 18), (20, 259)]
        .map(|(num_queries, context_len)| Lengths { num_queries, context_len })
        .into_iter()
        .enumerate()
        .collect();
    let lens: Vec<usize> = parts.iter().map(|(_, lengths)| lengths.context_len).collect();
    for dtype in [DType::BF16, DType::F32] {
        let mut poisoned = World::new(Shape { dtype, ..SMALL }, &lens);
        let mut clean = World::new(Shape { dtype, ..SMALL }, &lens);
        clean.bytes.fill(0x41);
        for (sequence, len) in lens.iter().enumerate() {
            (0..*len).for_each(|position| clean.write(sequence, position));
        }
        let mut pool = ThreadPool::new(2);
        for isa in Isa::available() {
            let wanted = clean.attend(&mut pool, isa, &parts);
            assert!(wanted.iter().all(|x| x.is_finite()));
            assert_eq!(bits(&wanted), bits(&poisoned.attend(&mut pool, isa, &parts)), "{isa}");
        }
    }
}

/// Large scores, in one chunk or apart, neither overflow nor lose the winner.
#[test]
fn a_key_far_above_the_others_takes_all_the_weight() {
    for winner in [3usize, 700] {
        let mut world = World::new(Shape { num_kv_heads: 1, group: 1, ..SMALL }, &[1000]);
        let layout = world.layout;
        let block = world.tables[0][winner / 16] as usize * layout.block_bytes();
        for dim in 0..64 {
            let k = bf16::from_f32(world.query(0, 999, 0, dim) * 1e4);
            let offset = block + layout.k_tile_offset(LAYER, 0) + layout.k_offset(winner % 16, dim);
            world.bytes[offset..offset + 2].copy_from_slice(&k.to_le_bytes());
        }
        let out =
            world.attend(&mut ThreadPool::new(2), Isa::best(), &[(0, Lengths { num_queries: 1, context_len: 1000 })]);
        for (dim, found) in out.into_iter().enumerate() {
            assert_eq!(found, world.value(0, winner, 0, dim));
        }
    }
}

/// A batch at least as costly to plan for as most: of few tokens or many, short contexts or the longest.
fn random_lengths(next: &mut impl FnMut(usize) -> usize, bounds: &StepBounds) -> Vec<Lengths> {
    let mut num_tokens = bounds.max_tokens;
    let longest = [1, 2, 17, bounds.max_tokens][next(4)];
    let shortest = if next(2) == 0 { bounds.max_context_len } else { 1 };
    (0..1 + next(bounds.max_sequences))
        .map_while(|_| {
            let num_queries = (1 + next(longest)).min(num_tokens);
            num_tokens -= num_queries;
            let least = shortest.max(num_queries);
            let context_len = least + next(bounds.max_context_len - least + 1);
            (num_queries > 0).then_some(Lengths { num_queries, context_len })
        })
        .collect()
}

#[test]
fn reserved_scratch_holds_every_plan() {
    let mut seed = 1u64;
    let mut next = |below: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize % below
    };
    let (mut most_tasks, mut most_partials) = (0.0f64, 0.0f64);
    for isa in Isa::available() {
        for (num_kv_heads, group, num_threads) in [(1, 1, 1), (1, 1, 64), (1, 4, 2), (3, 3, 2), (2, 7, 16)] {
            let layout = KvLayout::new(2, num_kv_heads, 64, 16, DType::BF16).unwrap();
            let num_heads = num_kv_heads * group;
            let bounds =
                StepBounds { max_tokens: 96, max_sequences: 24, max_context_len: 5000, num_heads, layout: &layout };
            let mut scratch = AttentionScratch::default();
            scratch.reserve(isa, num_threads, &bounds);
            let capacities = |scratch: &AttentionScratch| {
                (scratch.tasks.capacity(), scratch.merges.capacity(), scratch.partials.capacity())
            };
            let reserved = capacities(&scratch);
            for _ in 0..300 {
                let lengths = random_lengths(&mut next, &bounds);
                let mut cu_seqlens_q = vec![0i32];
                lengths.iter().for_each(|it| cu_seqlens_q.push(cu_seqlens_q.last().unwrap() + it.num_queries as i32));
                let context_lens: Vec<i32> = lengths.iter().map(|it| it.context_len as i32).collect();
                let ends = lengths.iter().map(|it| it.context_len - it.num_queries..it.context_len);
                let positions: Vec<i32> = ends.flatten().map(|position| position as i32).collect();
                let batch = AttentionBatch {
                    qkv: &[],
                    positions: &positions,
                    num_q_heads: num_heads,
                    cu_seqlens_q: &cu_seqlens_q,
                    context_lens: &context_lens,
                    block_tables: &[],
                    max_blocks: 0,
                    layer: LAYER,
                    scale: 1.0,
                    softcap: None,
                    window: [None, Some(700)][next(2)],
                };
                scratch.plan(&batch, &layout, max_rows(isa, &layout), num_threads);
                assert_eq!(capacities(&scratch), reserved, "{isa} {num_kv_heads} {group} {num_threads}");
                most_tasks = most_tasks.max(scratch.tasks.len() as f64 / reserved.0 as f64);
                most_partials = most_partials.max(scratch.partials.len() as f64 / reserved.2 as f64);
            }
        }
    }
    assert!(most_tasks > 0.5 && most_partials > 0.5, "the batches are too easy: {most_tasks}, {most_partials}");
}
