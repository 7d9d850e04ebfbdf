//! Kernels called directly: conversions and block copies, which the backend does not launch yet, and norms in other grids
//! than its. And draws, whose tokens are looked at in bulk.

#![allow(unsafe_code)]

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaFunction, CudaStream, LaunchConfig, PushKernelArg};
use half::{bf16, f16};
use mneme::backend::cpu::{Isa, SampleScratch, sample_row};
use mneme::backend::cuda::CudaBuffer;
use mneme::backend::{Backend, DType, RowSampling, SamplingBatch};

use crate::gpu::{self, Gpu};
use crate::support::random::Random;

/// The device of `gpu` as cudarc sees it, and one of its functions.
fn open(gpu: &Gpu, file: &str, name: &str) -> (Arc<CudaStream>, CudaFunction) {
    let stream = CudaContext::new(gpu.backend.info().ordinal).unwrap().new_stream().unwrap();
    (stream, gpu.backend.function(file, name).unwrap())
}

fn grid(x: usize, y: usize, threads: u32) -> LaunchConfig {
    LaunchConfig { grid_dim: (x as u32, y as u32, 1), block_dim: (threads, 1, 1), shared_mem_bytes: 0 }
}

/// Rows of a norm, so many of their numbers.
struct Norms {
    x: Vec<f32>,
    delta: Vec<f32>,
    weight: Vec<f32>,
}

impl Norms {
    fn random(gpu: &Gpu, random: &mut Random, rows: usize, columns: usize) -> Self {
        let [x, delta] = [(); 2].map(|()| gpu.numbers(random, rows * columns, 1.0));
        Self { x, delta, weight: (0..columns).map(|_| random.normal() as f32).collect() }
    }

    /// What the kernels for rows of up to `widest` numbers write with so many blocks: norms of rows in f32, of rows of
    /// activations, and of sums, with the sums.
    fn run(&self, gpu: &Gpu, widest: usize, threads: u32, blocks: usize) -> (Vec<Vec<u16>>, Vec<f32>) {
        let (dtype, columns) = (gpu.dtype(), self.weight.len());
        let name = |kind: &str| kind.replace("{T}", &format!("{dtype}")) + &format!("_h{widest}");
        let (stream, rms_norm) = open(gpu, "norm", &name("rms_norm_{T}"));
        let narrow = |numbers: &[f32]| stream.clone_htod(&gpu::encode(numbers, dtype)).unwrap();
        let (x, mut residual) = (stream.clone_htod(&self.x).unwrap(), stream.clone_htod(&self.x).unwrap());
        let (short, delta) = (narrow(&self.x), narrow(&self.delta));
        let weight = stream.clone_htod(&self.weight).unwrap();
        let mut outs = [(); 3].map(|()| stream.clone_htod(&vec![0xffffu16; self.x.len()]).unwrap());
        let (rows, hidden, epsilon) = ((self.x.len() / columns) as i32, columns as i32, 1e-5f32);
        let grid = grid(blocks, 1, threads);

        let mut launch = stream.launch_builder(&rms_norm);
        launch.arg(&mut outs[0]).arg(&x).arg(&weight).arg(&rows).arg(&hidden).arg(&epsilon);
        // SAFETY: rms_norm(out, x, weight, num_tokens, hidden, epsilon), and all have `rows` rows of `hidden` numbers.
        unsafe { launch.launch(grid) }.unwrap();
        let of_rows = gpu.backend.function("norm", &name("rms_norm_{T}_rows")).unwrap();
        let mut launch = stream.launch_builder(&of_rows);
        launch.arg(&mut outs[1]).arg(&short).arg(&weight).arg(&rows).arg(&hidden).arg(&epsilon);
        // SAFETY: as above, of 16 bits.
        unsafe { launch.launch(grid) }.unwrap();
        let of_sums = gpu.backend.function("norm", &name("add_rms_norm_{T}")).unwrap();
        let mut launch = stream.launch_builder(&of_sums);
        launch.arg(&mut outs[2]).arg(&mut residual).arg(&delta).arg(&weight).arg(&rows).arg(&hidden).arg(&epsilon);
        // SAFETY: as above, with delta behind residual.
        unsafe { launch.launch(grid) }.unwrap();
        (outs.iter().map(|out| stream.clone_dtoh(out).unwrap()).collect(), stream.clone_dtoh(&residual).unwrap())
    }
}

/// However many rows a block has.
#[test]
fn norms_have_the_same_bits_in_any_number_of_blocks() {
    for gpu in gpu::lend().iter() {
        let random = &mut Random::new(3);
        for (rows, columns) in [(7, 64), (9, 1032), (5, 4096), (6, 4104), (4, 8192)] {
            let norms = Norms::random(gpu, random, rows, columns);
            let wanted = norms.run(gpu, 8192, 256, rows);
            for blocks in 1..=rows {
                assert!(norms.run(gpu, 8192, 256, blocks) == wanted, "[{rows}, {columns}] by {blocks} blocks");
                if columns <= 4096 {
                    let found = norms.run(gpu, 4096, 256, blocks);
                    assert!(found == wanted, "[{rows}, {columns}] by {blocks} blocks for narrow rows");
                }
            }
        }
    }
}

#[test]
fn numbers_are_cast() {
    let gpus = gpu::lend();
    let gpu = &gpus[0];
    let random = &mut Random::new(1);
    for len in [4, 8, 1020, 1024, 1028, 5000] {
        let mut wide: Vec<f32> = (0..len).map(|_| random.normal() as f32).collect();
        wide[..4].copy_from_slice(&[-0.0, 1.0 + 1.0 / 256.0, 3e-39, f32::INFINITY]);
        for dtype in [DType::BF16, DType::F16] {
            let narrow: Vec<u16> = wide
                .iter()
                .map(|x| if dtype == DType::BF16 { bf16::from_f32(*x).to_bits() } else { f16::from_f32(*x).to_bits() })
                .collect();
            let back: Vec<f32> = wide.iter().map(|x| gpu::round(*x, dtype)).collect();
            let (stream, function) = open(gpu, "rows", &format!("cast_f32_{dtype}"));
            let source = stream.clone_htod(&wide).unwrap();
            let mut target = stream.clone_htod(&vec![0xffffu16; len + 8]).unwrap();
            let count = len as u64;
            let mut launch = stream.launch_builder(&function);
            launch.arg(&mut target).arg(&source).arg(&count);
            // SAFETY: cast(out, x, len), and both have `len` numbers.
            unsafe { launch.launch(grid(len.div_ceil(1024), 1, 256)) }.unwrap();
            let found = stream.clone_dtoh(&target).unwrap();
            assert_eq!((&found[..len], &found[len..]), (&narrow[..], &[0xffff; 8][..]), "{len} numbers to {dtype}");
            let function = gpu.backend.function("rows", &format!("cast_{dtype}_f32")).unwrap();
            let mut target = stream.clone_htod(&vec![f32::NAN; len]).unwrap();
            let source = stream.clone_htod(&narrow).unwrap();
            let mut launch = stream.launch_builder(&function);
            launch.arg(&mut target).arg(&source).arg(&count);
            // SAFETY: as above.
            unsafe { launch.launch(grid(len.div_ceil(2048), 1, 256)) }.unwrap();
            assert_eq!(stream.clone_dtoh(&target).unwrap(), back, "{len} numbers from {dtype}");
        }
    }
}

/// Copies blocks of `bytes` by `pairs` of their numbers, from, to, over poison.
fn copied(gpu: &Gpu, bytes: &[u8], block_bytes: usize, pairs: &[i32]) -> Vec<u8> {
    let (stream, function) = open(gpu, "copy_blocks", "copy_blocks");
    let source = stream.clone_htod(bytes).unwrap();
    let mut target = stream.clone_htod(&vec![0xffu8; bytes.len()]).unwrap();
    let device_pairs = stream.clone_htod(pairs).unwrap();
    let size = block_bytes as u64;
    let mut launch = stream.launch_builder(&function);
    launch.arg(&mut target).arg(&source).arg(&device_pairs).arg(&size);
    // SAFETY: copy_blocks(target, source, pairs, block_bytes); all pairs are below the number of blocks.
    unsafe { launch.launch(grid(block_bytes.div_ceil(16384), pairs.len() / 2, 256)) }.unwrap();
    stream.clone_dtoh(&target).unwrap()
}

/// A block of a model of 8 billion weights.
pub const LARGE_BLOCK_BYTES: usize = 2 << 20;

/// Two such blocks.
pub fn copy_large(gpu: &Gpu) {
    copied(gpu, &vec![1; 3 * LARGE_BLOCK_BYTES], LARGE_BLOCK_BYTES, &[2, 0, 0, 1]);
}

#[test]
fn blocks_are_copied_in_pairs() {
    let gpus = gpu::lend();
    let gpu = &gpus[0];
    for (block_bytes, pairs) in [
        (16, vec![0, 1]),
        (4096, vec![3, 0, 1, 4]),
        (16384, vec![2, 2]),
        (16400, vec![4, 0, 0, 3, 2, 1]),
        (40960, vec![1, 2, 3, 3, 0, 0]),
    ] {
        let num_blocks = 5;
        let bytes: Vec<u8> = (0..num_blocks * block_bytes).map(|at| (at * 31 % 253) as u8).collect();
        let mut wanted = vec![0xffu8; bytes.len()];
        for pair in pairs.chunks_exact(2) {
            let [from, to] = [pair[0] as usize * block_bytes, pair[1] as usize * block_bytes];
            wanted[to..to + block_bytes].copy_from_slice(&bytes[from..from + block_bytes]);
        }
        assert_eq!(copied(gpu, &bytes, block_bytes, &pairs), wanted, "blocks of {block_bytes}");
    }
}

/// How one row is sampled from.
#[derive(Debug, Clone, Copy)]
pub struct Params {
    pub temperature: f32,
    pub top_k: i32,
    pub top_p: f32,
    pub min_p: f32,
}

pub const ALL: Params = Params { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 };

/// Rows that are all drawn in the same way, each another draw.
pub fn sampling_batch(gpu: &Gpu, rows: usize, params: Params, seed: u64) -> SamplingBatch<CudaBuffer> {
    let floats = |value: f32| gpu.vector(&vec![value; rows]);
    let longs = |values: &mut dyn Iterator<Item = u64>| {
        let halves: Vec<i32> = values.flat_map(|value| [value as i32, (value >> 32) as i32]).collect();
        gpu.indices(&halves, rows, 2)
    };
    SamplingBatch {
        temperatures: floats(params.temperature),
        top_ks: gpu.indices(&vec![params.top_k; rows], 1, rows),
        top_ps: floats(params.top_p),
        min_ps: floats(params.min_p),
        seeds: longs(&mut std::iter::repeat_n(seed, rows)),
        indices: longs(&mut (0..rows as u64)),
        masks: None,
    }
}

fn sample(gpu: &Gpu, logits: &[f32], vocab: usize, params: Params, seed: u64) -> Vec<i32> {
    let rows = logits.len() / vocab;
    let sampling = sampling_batch(gpu, rows, params, seed);
    let logits = gpu.tensor(logits, rows, vocab, DType::F32);
    let out = gpu.output(1, rows, DType::I32);
    gpu.backend.sample(&gpu.stream, &logits, &sampling, &out.tensor).unwrap();
    out.indices(gpu)
}

/// The same on the CPU. Weights may differ in their last bits, which decide nothing here.
fn sample_on_cpu(logits: &[f32], vocab: usize, params: Params, seed: u64) -> Vec<i32> {
    let Params { temperature, top_k, top_p, min_p } = params;
    let mut scratch = SampleScratch::default();
    let token = |(index, row): (usize, &[f32])| {
        let index = index as u64;
        let sampling = RowSampling { temperature, top_k: top_k as u32, top_p, min_p, seed, index };
        sample_row(Isa::best(), row, &sampling, &mut scratch) as i32
    };
    logits.chunks_exact(vocab).enumerate().map(token).collect()
}

/// The tokens that may be drawn with their weights, in order of id.
fn kept(logits: &[f32], params: Params) -> Vec<(i32, f64)> {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |logit: &f32| (f64::from(logit - most) / f64::from(params.temperature)).exp();
    let mut all: Vec<(i32, f64)> = logits.iter().enumerate().map(|(id, logit)| (id as i32, weight(logit))).collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    if params.top_k > 0 {
        all.truncate(params.top_k as usize);
    }
    let total: f64 = all.iter().map(|token| token.1).sum();
    let least = all[0].1 * f64::from(params.min_p);
    let mut sum = 0.0;
    let mut kept = Vec::new();
    for (id, weight) in all {
        if !kept.is_empty() && (weight < least || sum >= total * f64::from(params.top_p)) {
            break;
        }
        sum += weight;
        kept.push((id, weight));
    }
    kept.sort_by_key(|token| token.0);
    kept
}

#[test]
fn draws_keep_to_the_cuts_and_to_the_distribution() {
    let gpus = gpu::lend();
    let gpu = &gpus[0];
    let random = &mut Random::new(2);
    let (vocab, rows) = (300, 200);
    let row: Vec<f32> = (0..vocab).map(|_| 2.0 * random.normal() as f32).collect();
    let logits = row.repeat(rows);
    for params in [
        ALL,
        Params { temperature: 0.7, ..ALL },
        Params { top_k: 1, ..ALL },
        Params { top_k: 5, ..ALL },
        Params { top_p: 0.5, ..ALL },
        Params { min_p: 0.2, ..ALL },
        Params { temperature: 1.3, top_k: 40, top_p: 0.8, min_p: 0.01 },
    ] {
        let kept = kept(&row, params);
        let total: f64 = kept.iter().map(|token| token.1).sum();
        let drawn = sample(gpu, &logits, vocab, params, 7);
        assert!(drawn.iter().all(|id| kept.iter().any(|token| token.0 == *id)), "{params:?} drew what was cut");
        // Pearson's statistic over tokens that are expected five times at least, the others together.
        let (mut statistic, mut rest, mut num_classes) = (0.0, (rows as f64, rows as f64), 0.0);
        for (id, weight) in &kept {
            let expected = weight / total * rows as f64;
            let found = drawn.iter().filter(|other| *other == id).count() as f64;
            if expected >= 5.0 {
                statistic += (found - expected).powi(2) / expected;
                rest = (rest.0 - expected, rest.1 - found);
                num_classes += 1.0;
            }
        }
        if rest.0 >= 5.0 {
            statistic += (rest.1 - rest.0).powi(2) / rest.0;
        }
        // Six standard deviations of the statistic's distribution.
        let bound = num_classes + 6.0 * (2.0f64 * (num_classes + 1.0)).sqrt();
        assert!(statistic < bound, "{params:?}: {statistic} with {num_classes} classes");
        assert_eq!(sample(gpu, &logits, vocab, params, 7), drawn, "a draw depends on seed and index alone");
        assert_eq!(drawn, sample_on_cpu(&logits, vocab, params, 7), "{params:?}: the CPU draws otherwise");
        if kept.len() > 1 {
            assert_ne!(sample(gpu, &logits, vocab, params, 8), drawn, "another seed draws otherwise");
        }
    }
}

#[test]
fn draws_without_temperature_are_the_largest() {
    let gpus = gpu::lend();
    let gpu = &gpus[0];
    let random = &mut Random::new(3);
    for vocab in [1, 31, 1025, 49_152] {
        let logits: Vec<f32> = (0..2 * vocab).map(|_| random.normal() as f32).collect();
        let largest = |row: &[f32]| {
            row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1).then(b.0.cmp(&a.0))).unwrap().0 as i32
        };
        let wanted: Vec<i32> = logits.chunks_exact(vocab).map(largest).collect();
        assert_eq!(sample(gpu, &logits, vocab, Params { temperature: 0.0, ..ALL }, 1), wanted);
        assert_eq!(sample(gpu, &logits, vocab, Params { top_k: 1, ..ALL }, 1), wanted);
    }
}
