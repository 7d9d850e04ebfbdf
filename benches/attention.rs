//! Speed of paged attention: ids are `decode|prefill/b<sequences>/ctx<tokens>/gqa<group>/d<head size>/t<threads>`.
//! Decode counts the bytes of keys and values it reads, prefill its multiply-adds, masked ones left out.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use mneme::backend::cpu::{AttentionBatch, AttentionScratch, Isa, KvArena, ThreadPool, attention};
use mneme::backend::{DType, KvLayout};

/// One layer of a model of a few dozen: blocks lie as far apart as in a real cache.
const NUM_LAYERS: usize = 8;

#[derive(Clone, Copy)]
struct Shape {
    num_sequences: usize,
    num_queries: usize,
    context_len: usize,
    num_kv_heads: usize,
    group: usize,
    head_dim: usize,
}

struct Setup {
    layout: KvLayout,
    bytes: Vec<u8>,
    qkv: Vec<f32>,
    cu_seqlens_q: Vec<i32>,
    positions: Vec<i32>,
    context_lens: Vec<i32>,
    block_tables: Vec<i32>,
    max_blocks: usize,
    out: Vec<f32>,
}

impl Setup {
    fn new(shape: Shape) -> Self {
        let Shape { num_sequences, num_queries, context_len, num_kv_heads, group, head_dim } = shape;
        let layout = KvLayout::new(NUM_LAYERS, num_kv_heads, head_dim, 16, DType::BF16).expect("a valid layout");
        let max_blocks = context_len.div_ceil(16);
        let num_blocks = num_sequences * max_blocks;
        let num_tokens = num_sequences * num_queries;
        // bf16 numbers of either sign around 0.25.
        let bytes = (0..num_blocks * layout.block_bytes())
            .map(|i| if i % 2 == 0 { ((i * 37) >> 3) as u8 } else { 0x3e | ((i >> 4 & 1) as u8 * 0x80) })
            .collect();
        let row = (num_kv_heads * group + 2 * num_kv_heads) * head_dim;
        Setup {
            layout,
            bytes,
            qkv: (0..num_tokens * row).map(|i| (i * 7919 % 2003) as f32 / 1000.0 - 1.0).collect(),
            cu_seqlens_q: (0..=num_sequences).map(|index| (index * num_queries) as i32).collect(),
            positions: (0..num_tokens).map(|index| (context_len - num_queries + index % num_queries) as i32).collect(),
            context_lens: vec![context_len as i32; num_sequences],
            block_tables: (0..num_blocks).map(|index| index as i32).collect(),
            max_blocks,
            out: vec![0.0; num_tokens * num_kv_heads * group * head_dim],
        }
    }
}

fn bench(criterion: &mut Criterion, kind: &str, shape: Shape, num_threads: usize, throughput: Throughput) {
    let mut setup = Setup::new(shape);
    let mut pool = ThreadPool::new(num_threads);
    let mut scratch = AttentionScratch::default();
    let Shape { num_sequences, context_len, group, head_dim, .. } = shape;
    let id = format!("b{num_sequences}/ctx{context_len}/gqa{group}/d{head_dim}/t{num_threads}");
    let isa = std::env::var("MNEME_ISA").ok().map_or(Isa::best(), |name| name.parse().expect("a known set"));
    let mut layer = 0;
    let mut benches = criterion.benchmark_group(kind);
    benches.throughput(throughput).bench_function(BenchmarkId::from_parameter(id), |bencher| {
        bencher.iter(|| {
            layer = (layer + 1) % NUM_LAYERS;
            let batch = AttentionBatch {
                qkv: &setup.qkv,
                num_q_heads: shape.num_kv_heads * group,
                cu_seqlens_q: &setup.cu_seqlens_q,
                positions: &setup.positions,
                context_lens: &setup.context_lens,
                block_tables: &setup.block_tables,
                max_blocks: setup.max_blocks,
                layer,
                scale: 0.125,
                softcap: None,
                window: None,
            };
            let cache = KvArena::new(&mut setup.bytes, setup.layout);
            attention(&mut pool, isa, &mut scratch, &batch, &cache, &mut setup.out);
        });
    });
    benches.finish();
}

fn benches(criterion: &mut Criterion) {
    let plain = Shape { num_sequences: 1, num_queries: 1, context_len: 1024, num_kv_heads: 3, group: 3, head_dim: 64 };
    let decodes = [
        plain,
        Shape { num_sequences: 16, ..plain },
        Shape { context_len: 16384, ..plain },
        Shape { num_sequences: 16, num_kv_heads: 2, group: 7, ..plain },
        Shape { num_sequences: 16, num_kv_heads: 8, group: 4, head_dim: 128, ..plain },
        Shape { num_sequences: 16, num_kv_heads: 9, group: 1, ..plain },
    ];
    for shape in decodes {
        let bytes = 4 * shape.num_sequences * shape.context_len * shape.num_kv_heads * shape.head_dim;
        for threads in [1, 2] {
            bench(criterion, "decode", shape, threads, Throughput::Bytes(bytes as u64));
        }
    }
    for shape in [
        Shape { num_queries: 1024, ..plain },
        Shape { num_queries: 512, context_len: 4096, num_kv_heads: 4, group: 1, head_dim: 256, ..plain },
        Shape { num_queries: 512, context_len: 4096, num_kv_heads: 8, group: 4, head_dim: 128, ..plain },
    ] {
        let pairs = shape.num_queries * shape.context_len - shape.num_queries * (shape.num_queries - 1) / 2;
        let products = 2 * pairs * shape.num_kv_heads * shape.group * shape.head_dim;
        for threads in [1, 2] {
            bench(criterion, "prefill", shape, threads, Throughput::Elements(products as u64));
        }
    }
}

criterion_group!(all, benches);
criterion_main!(all);
