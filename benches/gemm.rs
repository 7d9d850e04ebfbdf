//! Throughput of the CPU matrix multiply, at the sizes of small models.
//!
//! One row is bound by memory: its throughput is bytes of weights. The matrices of one id together exceed the caches.
//! Many rows are bound by arithmetic: their throughput is multiply-adds, in "elements".

#![allow(missing_docs)]

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use mneme::backend::cpu::{GemmScratch, Isa, PackedMatrix, Rows, RowsMut, ThreadPool, gemm};
use mneme::backend::{DType, HostTensor};

const DTYPES: [DType; 6] = [DType::F32, DType::F16, DType::BF16, DType::Q8_0, DType::Q4_0, DType::Q4K];
/// More than any last-level cache the figures are for.
const COLD_BYTES: usize = 160 << 20;

fn matrix(dtype: DType, n: usize, k: usize, pool: &mut ThreadPool) -> Option<PackedMatrix> {
    let bytes = vec![0x11u8; dtype.row_bytes(k)? * n];
    let len = bytes.len();
    let tensor = HostTensor::new("weights", Arc::new(bytes), 0..len, dtype, n, k).ok()?;
    PackedMatrix::pack(&[tensor], None, pool).ok()
}

fn one_row(c: &mut Criterion) {
    let mut pool = ThreadPool::new(std::thread::available_parallelism().map_or(1, usize::from));
    let mut scratch = GemmScratch::default();
    let mut group = c.benchmark_group("gemm/one_row");
    for dtype in DTYPES {
        for (n, k) in [(3072, 576), (576, 1536), (49152, 576), (9728, 896)] {
            let Some(first) = matrix(dtype, n, k, &mut pool) else { continue };
            let num_bytes = first.num_bytes();
            let more = (0..COLD_BYTES / num_bytes).filter_map(|_| matrix(dtype, n, k, &mut pool));
            let matrices: Vec<PackedMatrix> = std::iter::once(first).chain(more).collect();
            let (x, mut out) = (vec![0.01f32; k], vec![0.0f32; n]);
            group.throughput(Throughput::Bytes((num_bytes * matrices.len()) as u64));
            group.bench_function(BenchmarkId::new(dtype.to_string(), format!("n{n}_k{k}")), |b| {
                b.iter(|| {
                    for w in &matrices {
                        let (x, out) =
                            (Rows { data: &x, num_rows: 1, stride: k }, RowsMut { data: &mut out, stride: n });
                        gemm(&mut pool, Isa::best(), x, w, None, out, &mut scratch);
                    }
                    black_box(&mut out);
                });
            });
        }
    }
}

fn many_rows(c: &mut Criterion) {
    let mut pool = ThreadPool::new(std::thread::available_parallelism().map_or(1, usize::from));
    let mut scratch = GemmScratch::default();
    let mut group = c.benchmark_group("gemm/many_rows");
    for dtype in DTYPES {
        for (m, n, k) in [(16, 3072, 576), (512, 3072, 576), (512, 576, 1536), (1024, 4864, 896)] {
            let Some(w) = matrix(dtype, n, k, &mut pool) else { continue };
            let (x, mut out) = (vec![0.01f32; m * k], vec![0.0f32; m * n]);
            group.throughput(Throughput::Elements((m * n * k) as u64));
            group.bench_function(BenchmarkId::new(dtype.to_string(), format!("m{m}_n{n}_k{k}")), |b| {
                b.iter(|| {
                    let (x, out) = (Rows { data: &x, num_rows: m, stride: k }, RowsMut { data: &mut out, stride: n });
                    gemm(&mut pool, Isa::best(), x, &w, None, out, &mut scratch);
                });
            });
        }
    }
}

criterion_group!(benches, one_row, many_rows);
criterion_main!(benches);
