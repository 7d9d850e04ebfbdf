//! Prompts by candle-flash-attn: near what attention is defined as, over shapes; what has cached context keeps its bits.
//! For a driver that was named and a program that was built with it: its kernels are beyond the software GPU.

use super::*;

impl World<'_> {
    /// Attention in one call, with keys and values beside the queries as they are in a step.
    fn attend_whole(&self, parts: &[Lengths]) -> Output {
        let (gpu, shape) = (self.gpu, self.shape);
        let sequences: Vec<usize> = (0..parts.len()).collect();
        let metadata = self.metadata(&sequences, parts);
        let columns = shape.columns();
        let row = |sequence: usize, position: usize| &self.rows[sequence][position * columns..][..columns];
        let numbers: Vec<f32> = (parts.iter().enumerate())
            .flat_map(|(at, part)| last_positions(part).into_iter().flat_map(move |position| row(at, position)))
            .copied()
            .collect();
        let qkv = gpu.activations(&numbers, metadata.num_tokens, columns);
        let out = gpu.output(metadata.num_tokens, shape.num_heads() * shape.head_dim, gpu.dtype());
        gpu.backend
            .attention(&gpu.stream, &qkv, &shape.of_backend(), &self.kv_layer(), &metadata, &out.tensor)
            .unwrap();
        out
    }
}

/// Compares every row with sums in f64, and rows of sequences with cached context with our kernel's.
fn check(gpus: &[Gpu; 2], shape: Shape, parts: &[Lengths], seed: u64) {
    let lens: Vec<usize> = parts.iter().map(|part| part.1).collect();
    let [ours, theirs] = gpus.each_ref().map(|gpu| World::new(gpu, shape, &lens, &mut Random::new(seed)));
    let (exact, found) = (ours.attend_whole(parts), theirs.attend_whole(parts));
    let wanted: Vec<f64> =
        parts.iter().enumerate().flat_map(|(at, part)| theirs.reference(at, &last_positions(part))).collect();
    let tolerance = epsilon(gpus[1].dtype());
    let what = format!("{} {shape:?} {parts:?}", gpus[1].dtype());
    assert_close(&what, &found.numbers(&gpus[1]), &wanted, tolerance, 3.0 * tolerance);
    let row_bytes = shape.num_heads() * shape.head_dim * 2;
    let (exact, found) = (exact.bytes(&gpus[0]), found.bytes(&gpus[1]));
    let mut row = 0;
    for &(num_queries, context_len) in parts {
        let bytes = row * row_bytes..(row + num_queries) * row_bytes;
        if num_queries != context_len || num_queries == 1 {
            assert_eq!(exact[bytes.clone()], found[bytes], "{what}: from row {row} on");
        }
        row += num_queries;
    }
}

#[test]
fn prompts_are_near_and_the_rest_is_the_same() {
    for dtype in [DType::BF16, DType::F16] {
        let Some(theirs) = Gpu::flash(dtype) else { return };
        let gpus = [Gpu::new(dtype), theirs];
        for (at, head_dim) in [64, 128, 256].into_iter().enumerate() {
            for group in [1, 3, 8] {
                let shape = Shape { num_kv_heads: 2, group, head_dim, ..SMALL };
                check(&gpus, shape, &[(2, 2), (17, 17), (130, 130)], at as u64);
            }
        }
        for head_dim in [16, 32, 80, 96] {
            check(&gpus, Shape { num_kv_heads: 1, group: 2, head_dim, ..SMALL }, &[(33, 33), (5, 5)], 9);
        }
        for window in [1, 7, 32, 100] {
            let shape = Shape { window: Some(window), ..SMALL };
            check(&gpus, shape, &[(90, 90), (40, 90), (1, 17), (34, 34), (5, 5)], 10 + window as u64);
        }
        check(&gpus, Shape { softcap: Some(2.0), ..SMALL }, &[(33, 33), (1, 40), (90, 90)], 19);
        check(&gpus, SMALL, &[(1, 40), (70, 70), (1, 1), (3, 90), (300, 300), (9, 9), (1, 17)], 20);
    }
}

/// What is freed, allocated and computed behind it finds nothing of candle's in its way.
#[test]
fn our_memory_stays_ours() {
    let Some(gpu) = Gpu::flash(DType::BF16) else { return };
    let world = World::new(&gpu, SMALL, &[70, 40], &mut Random::new(30));
    let parts = [(70, 70), (1, 40)];
    let first = world.attend_whole(&parts).bytes(&gpu);
    for _ in 0..20 {
        assert_eq!(world.attend_whole(&parts).bytes(&gpu), first);
    }
    check_world(&world, &[(1, 70), (1, 40)]);
}

/// Keys of 8 bits are not those that lie beside the queries.
#[test]
fn an_fp8_cache_is_refused() {
    let Some(gpu) = Gpu::flash(DType::BF16) else { return };
    let layout = KvLayout::with_order(KvOrder::Rows, 1, 2, 64, 16, DType::F8E4M3).unwrap();
    let error = gpu.backend.check_kv_layout(&layout).unwrap_err().to_string();
    assert!(error.contains("--kv-cache-dtype auto"), "{error}");
    assert!(gpu.backend.name().contains("-flash-attn0."), "{}", gpu.backend.name());
}
