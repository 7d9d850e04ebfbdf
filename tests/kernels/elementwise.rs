//! Kernels that treat rows or numbers alone: embedding, norms, activations, gathering, argmax.

use mneme::backend::{Activation, Backend, DType, Device, Norm, StreamKind};

use crate::gpu::{self, Gpu, assert_close, encode, epsilon};
use crate::support::random::Random;

#[test]
fn embeddings_are_scaled_rows() {
    for gpu in gpu::lend().iter() {
        let random = &mut Random::new(1);
        for (vocab, hidden, num_tokens, scale) in [(5, 8, 1, 1.0f32), (300, 64, 33, 8.0), (17, 1032, 3, 0.7)] {
            let table = gpu.numbers(random, vocab * hidden, 1.0);
            let ids: Vec<i32> = (0..num_tokens).map(|_| random.below(vocab) as i32).collect();
            let out = gpu.output(num_tokens, hidden, DType::F32);
            let matrix = gpu.matrix(&table, vocab, hidden);
            gpu.backend.embed(&gpu.stream, &matrix, &gpu.indices(&ids, 1, num_tokens), scale, &out.tensor).unwrap();
            let rows = ids.iter().flat_map(|id| &table[*id as usize * hidden..(*id as usize + 1) * hidden]);
            let wanted: Vec<f32> = rows.map(|value| value * scale).collect();
            assert_eq!(out.numbers(gpu), wanted, "{} hidden {hidden}", gpu.dtype());
        }
    }
}

const EPSILON: f32 = 1e-5;

/// Rows of normal numbers, the first so small that epsilon matters.
fn rows_with_a_small_one(gpu: &Gpu, random: &mut Random, rows: usize, columns: usize) -> Vec<f32> {
    let small = gpu.numbers(random, columns, 0.003);
    [small, gpu.numbers(random, (rows - 1) * columns, 3.0)].concat()
}

fn normalised(x: &[f32], weight: &[f32]) -> Vec<f64> {
    let columns = weight.len();
    let mut out = Vec::new();
    for row in x.chunks_exact(columns) {
        let mean = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / columns as f64;
        let inverse = (mean + f64::from(EPSILON)).sqrt().recip();
        out.extend(row.iter().zip(weight).map(|(x, weight)| f64::from(*x) * inverse * f64::from(*weight)));
    }
    out
}

/// One thread per vector, threads with nothing to do, several vectors per thread, the larger block; so many rows that a
/// block has several.
const NORM_SHAPES: [(usize, usize); 9] =
    [(1, 8), (3, 64), (2, 576), (1, 1032), (2, 4096), (1, 8192), (2, 8200), (335, 4096), (230, 4104)];

/// Norms of `rows` tokens of a large model, which has so many columns.
pub fn norm_large(gpu: &Gpu, rows: usize, columns: usize) {
    let weight = gpu.vector(&vec![1.0; columns]);
    let norm = Norm { weight: &weight, epsilon: EPSILON };
    let (kept, out) = (gpu.output(rows, columns, DType::F32), gpu.output(rows, columns, gpu.dtype()));
    gpu.write(&kept.tensor, &encode(&vec![0.5; rows * columns], DType::F32));
    gpu.backend.rms_norm(&gpu.stream, &kept.tensor, &norm, &out.tensor).unwrap();
    let delta = gpu.activations(&vec![0.25; rows * columns], rows, columns);
    gpu.backend.add_rms_norm(&gpu.stream, &kept.tensor, &delta, &norm, &out.tensor).unwrap();
    gpu.synchronize();
}

#[test]
fn norms_are_root_mean_square() {
    for gpu in gpu::lend().iter() {
        let random = &mut Random::new(2);
        for (rows, columns) in NORM_SHAPES {
            let weight: Vec<f32> = (0..columns).map(|_| random.normal() as f32).collect();
            let device_weight = gpu.vector(&weight);
            let norm = Norm { weight: &device_weight, epsilon: EPSILON };
            for dtype in [DType::F32, gpu.dtype()] {
                let x = rows_with_a_small_one(gpu, random, rows, columns);
                let out = gpu.output(rows, columns, gpu.dtype());
                let device_x = gpu.tensor(&x, rows, columns, dtype);
                gpu.backend.rms_norm(&gpu.stream, &device_x, &norm, &out.tensor).unwrap();
                let what = format!("{} norm of {dtype} [{rows}, {columns}]", gpu.dtype());
                assert_close(&what, &out.numbers(gpu), &normalised(&x, &weight), epsilon(gpu.dtype()) * 1.01, 1e-6);
            }
        }
    }
}

#[test]
fn sums_are_kept_and_normalised() {
    for gpu in gpu::lend().iter() {
        let random = &mut Random::new(3);
        for (rows, columns) in NORM_SHAPES {
            let weight: Vec<f32> = (0..columns).map(|_| random.normal() as f32).collect();
            let residual = rows_with_a_small_one(gpu, random, rows, columns);
            let delta = rows_with_a_small_one(gpu, random, rows, columns);
            let sum: Vec<f32> = residual.iter().zip(&delta).map(|(a, b)| a + b).collect();
            let device_weight = gpu.vector(&weight);
            let norm = Norm { weight: &device_weight, epsilon: EPSILON };
            let (kept, out) = (gpu.output(rows, columns, DType::F32), gpu.output(rows, columns, gpu.dtype()));
            gpu.write(&kept.tensor, &encode(&residual, DType::F32));
            let device_delta = gpu.activations(&delta, rows, columns);
            gpu.backend.add_rms_norm(&gpu.stream, &kept.tensor, &device_delta, &norm, &out.tensor).unwrap();
            assert_eq!(kept.numbers(gpu), sum, "{} residual [{rows}, {columns}]", gpu.dtype());
            let what = format!("{} sum and norm [{rows}, {columns}]", gpu.dtype());
            assert_close(&what, &out.numbers(gpu), &normalised(&sum, &weight), epsilon(gpu.dtype()) * 1.01, 1e-6);
        }
    }
}

fn gate(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            0.5 * x * (1.0 + inner.tanh())
        }
    }
}

#[test]
fn activations_gate() {
    for gpu in gpu::lend().iter() {
        let random = &mut Random::new(4);
        for (rows, features) in [(1, 8), (3, 96), (5, 1536), (2, 2048), (1, 4104)] {
            for activation in [Activation::Silu, Activation::GeluTanh] {
                let mut gate_up = gpu.numbers(random, rows * 2 * features, 2.0);
                gate_up[..4].copy_from_slice(&[60.0, -60.0, 0.0, -0.0]);
                let out = gpu.output(rows, features, gpu.dtype());
                let device = gpu.activations(&gate_up, rows, 2 * features);
                gpu.backend.gated_activation(&gpu.stream, &device, activation, &out.tensor).unwrap();
                let mut wanted = Vec::new();
                for row in gate_up.chunks_exact(2 * features) {
                    let (gates, ups) = row.split_at(features);
                    let each = gates.iter().zip(ups);
                    wanted.extend(each.map(|(x, up)| gate(activation, f64::from(*x)) * f64::from(*up)));
                }
                let what = format!("{} {activation:?} [{rows}, {features}]", gpu.dtype());
                assert_close(&what, &out.numbers(gpu), &wanted, epsilon(gpu.dtype()) * 1.01, 1e-5);
            }
        }
    }
}

/// Any number of numbers, of any size.
#[test]
fn numbers_are_capped() {
    let gpus = gpu::lend();
    let gpu = &gpus[0];
    let random = &mut Random::new(7);
    for (rows, columns, cap) in [(1, 1, 30.0), (1, 7, 2.0), (3, 300, 30.0), (2, 1025, 0.5), (1, 49_152, 30.0)] {
        let mut x: Vec<f32> = (0..rows * columns).map(|_| (random.normal() * 1.5 * f64::from(cap)) as f32).collect();
        for (x, special) in x.iter_mut().zip([0.0, 1e-20, -1e-3, 1e30, -1e30, f32::INFINITY, f32::NEG_INFINITY]) {
            *x = special;
        }
        let out = gpu.output(rows, columns, DType::F32);
        gpu.write(&out.tensor, &encode(&x, DType::F32));
        gpu.backend.softcap(&gpu.stream, &out.tensor, cap).unwrap();
        let wanted: Vec<f64> = x.iter().map(|x| f64::from(cap) * (f64::from(*x) / f64::from(cap)).tanh()).collect();
        assert_close(&format!("cap {cap} [{rows}, {columns}]"), &out.numbers(gpu), &wanted, 0.0, 5e-7 * f64::from(cap));
    }
    let out = gpu.output(1, 4, DType::F32);
    assert!(gpu.backend.softcap(&gpu.stream, &out.tensor, 0.0).unwrap_err().to_string().contains("soft cap"));
}

#[test]
fn rows_are_gathered() {
    for gpu in gpu::lend().iter() {
        let random = &mut Random::new(5);
        for (rows, columns, dtype) in [(7, 8, gpu.dtype()), (40, 576, gpu.dtype()), (3, 2052, DType::F32)] {
            let x = gpu.numbers(random, rows * columns, 1.0);
            let indices: Vec<i32> = (0..2 * rows).map(|_| random.below(rows) as i32).collect();
            let out = gpu.output(indices.len(), columns, dtype);
            let device_x = gpu.tensor(&x, rows, columns, dtype);
            let device_indices = gpu.indices(&indices, 1, indices.len());
            gpu.backend.gather_rows(&gpu.stream, &device_x, &device_indices, &out.tensor).unwrap();
            let wanted: Vec<f32> =
                indices.iter().flat_map(|at| &x[*at as usize * columns..][..columns]).copied().collect();
            assert_eq!(out.numbers(gpu), wanted);
        }
    }
}

fn argmax(gpu: &Gpu, logits: &[f32], rows: usize) -> Vec<i32> {
    let out = gpu.output(1, rows, DType::I32);
    let device = gpu.tensor(logits, rows, logits.len() / rows, DType::F32);
    gpu.backend.argmax(&gpu.stream, &device, &out.tensor).unwrap();
    out.indices(gpu)
}

#[test]
fn argmax_is_the_first_of_the_largest() {
    let gpus = gpu::lend();
    let gpu = &gpus[0];
    let random = &mut Random::new(6);
    for (rows, vocab) in [(1, 1), (3, 7), (2, 300), (2, 1024), (3, 1025), (1, 49_152)] {
        // Few different numbers, so that many are equal.
        let logits: Vec<f32> = (0..rows * vocab).map(|_| random.below(vocab / 2 + 1) as f32 - 3.0).collect();
        let first_largest = |row: &[f32]| {
            let most = row.iter().fold(f32::NEG_INFINITY, |most, value| most.max(*value));
            row.iter().position(|value| *value == most).unwrap() as i32
        };
        let wanted: Vec<i32> = logits.chunks_exact(vocab).map(first_largest).collect();
        assert_eq!(argmax(gpu, &logits, rows), wanted, "[{rows}, {vocab}]");
    }
    let (nan, least) = (f32::NAN, f32::NEG_INFINITY);
    let odd = [nan, -2.0, -1.0, nan, least, least, least, least, least, 5.0, f32::INFINITY, nan, -0.0, 0.0, nan, -1.0];
    assert_eq!(argmax(gpu, &odd, 4), [2, 0, 2, 0]);
}

/// Copies between streams are ordered by events alone.
#[test]
fn copies_keep_the_order_of_events() {
    use mneme::backend::BufferCopy;
    let gpus = gpu::lend();
    let gpu = &gpus[0];
    let copies = gpu.backend.create_stream(StreamKind::Copy).unwrap();
    let bytes: Vec<u8> = (0..4096u32).map(|at| (at * 7 % 251) as u8).collect();
    let (source, target) = (gpu.output(1, 1024, DType::I32), gpu.output(1, 1024, DType::I32));
    for round in 0..5u8 {
        let bytes: Vec<u8> = bytes.iter().map(|byte| byte.wrapping_add(round)).collect();
        gpu.write(&source.tensor, &bytes);
        let written = gpu.backend.record(&gpu.stream).unwrap();
        gpu.backend.wait(&copies, &written).unwrap();
        let copy = BufferCopy {
            source: source.tensor.buffer(),
            source_offset: source.tensor.offset_bytes(),
            target: target.tensor.buffer(),
            target_offset: target.tensor.offset_bytes(),
            bytes: bytes.len(),
        };
        gpu.backend.copy(&copies, &copy).unwrap();
        let copied = gpu.backend.record(&copies).unwrap();
        gpu.backend.wait(&gpu.stream, &copied).unwrap();
        assert_eq!(target.bytes(gpu), bytes);
        assert!(gpu.backend.is_complete(&copied).unwrap(), "what a completed event waited for is complete");
        let beyond = BufferCopy { bytes: bytes.len() + 1024, ..copy };
        assert!(gpu.backend.copy(&copies, &beyond).is_err());
    }
}
