//! Matrix products against sums in f64, and against themselves in other company.

use mneme::backend::cuda::CudaMatrix;
use mneme::backend::{Backend, DType, dequantize_row};

use crate::gpu::{self, Gpu, assert_close, encode, epsilon, host_tensor};
use crate::support::random::Random;
use crate::support::softgpu;
use crate::support::tiny_gguf::Storage;

/// Tiles of warps, which every GPU has, and of warpgroups, which Hopper has beside them, as their kernels' names end.
pub const WARP_TILES: [&str; 5] = ["t16x32", "t32x64", "t64x64", "t128x128", "t128x256"];
pub const WARPGROUP_TILES: [&str; 5] = ["w64x64", "w128x128s3", "w128x128s6", "w128x192", "w128x256"];

/// Tokens and outputs of a tile.
pub fn tile_size(name: &str) -> (usize, usize) {
    let (tokens, outputs) = name[1..].split_once('x').unwrap();
    (tokens.parse().unwrap(), outputs.split('s').next().unwrap().parse().unwrap())
}

/// Tokens, outputs, inputs: around the edges of every tile (16, 32, 64 and 128 tokens; 32, 64, 128, 192 and 256 outputs), and
/// inputs that end inside a step, or inside any stage of a ring.
pub const SHAPES: [(usize, usize, usize); 16] = [
    (1, 1, 8),
    (1, 33, 72),
    (2, 31, 64),
    (15, 7, 40),
    (16, 32, 136),
    (17, 65, 96),
    (32, 31, 80),
    (33, 34, 56),
    (63, 64, 64),
    (64, 130, 200),
    (65, 127, 48),
    (127, 5, 104),
    (128, 128, 64),
    (130, 129, 88),
    (20, 257, 264),
    (140, 391, 520),
];

/// `x weight^T + bias` in f64.
pub fn product(x: &[f32], weight: &[f32], bias: Option<&[f32]>, inputs: usize) -> Vec<f64> {
    let dot = |row: &[f32], column: &[f32]| -> f64 {
        row.iter().zip(column).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    let mut out = Vec::new();
    for row in x.chunks_exact(inputs) {
        for (at, column) in weight.chunks_exact(inputs).enumerate() {
            out.push(dot(row, column) + bias.map_or(0.0, |bias| f64::from(bias[at])));
        }
    }
    out
}

#[test]
fn products_are_sums_of_products() {
    for gpu in gpu::lend().iter() {
        let random = &mut Random::new(1);
        for (at, (num_tokens, outputs, inputs)) in SHAPES.into_iter().enumerate() {
            let x = gpu.numbers(random, num_tokens * inputs, 1.0);
            let weight = gpu.numbers(random, outputs * inputs, 1.0 / (inputs as f64).sqrt());
            let bias: Option<Vec<f32>> = (at % 2 == 1).then(|| gpu.numbers(random, outputs, 1.0));
            let matrix = gpu.matrix(&weight, outputs, inputs);
            let device_x = gpu.activations(&x, num_tokens, inputs);
            let device_bias = bias.as_ref().map(|bias| gpu.vector(bias));
            let wanted = product(&x, &weight, bias.as_deref(), inputs);
            for dtype in [gpu.dtype(), DType::F32] {
                let out = gpu.product(&device_x, &matrix, device_bias.as_ref(), outputs, dtype);
                let what = format!("{} to {dtype}, [{num_tokens}, {inputs}] x [{outputs}, {inputs}]", gpu.dtype());
                assert_close(&what, &out.numbers(gpu), &wanted, epsilon(dtype), 1e-5);
            }
        }
    }
}

/// Which one a product takes depends on the device and on shapes larger than those of tests.
#[test]
fn all_tiles_give_the_same_bits() {
    for dtype in [DType::BF16, DType::F16] {
        let tiles = Gpu::tiles(dtype);
        let tilings: Vec<Gpu> = tiles.iter().map(|tile| Gpu::with_tile(dtype, tile)).collect();
        let random = &mut Random::new(4);
        for (num_tokens, outputs, inputs) in SHAPES {
            let x = tilings[0].numbers(random, num_tokens * inputs, 1.0);
            let weight = tilings[0].numbers(random, outputs * inputs, 0.1);
            let product = |gpu: &Gpu| {
                let matrix = gpu.matrix(&weight, outputs, inputs);
                let x = gpu.activations(&x, num_tokens, inputs);
                [dtype, DType::F32].map(|dtype| gpu.product(&x, &matrix, None, outputs, dtype).bytes(gpu))
            };
            let results: Vec<[Vec<u8>; 2]> = tilings.iter().map(product).collect();
            for (found, tile) in results.iter().zip(&tiles) {
                assert!(*found == results[0], "{dtype}, [{num_tokens}, {inputs}] x [{outputs}, {inputs}], {tile}");
            }
        }
    }
}

#[test]
fn hopper_has_tiles_of_warpgroups_beside_the_others() {
    if !softgpu::is_replaced() {
        let of_warpgroups = if softgpu::is_hopper() { &WARPGROUP_TILES[..] } else { &[] };
        assert_eq!(Gpu::tiles(DType::BF16), [&WARP_TILES[..], of_warpgroups].concat());
    }
}

/// Rows of a batch of 150 alone and in other company, each `first` and how many.
const BATCH: usize = 150;
const PARTS: [(usize, usize); 8] = [(0, 1), (149, 1), (3, 16), (20, 17), (7, 33), (80, 64), (40, 65), (0, 128)];

/// Decode and prefill take different tiles; a row must not notice. The matrix has `outputs` rows of `inputs` numbers.
pub fn check_parts(gpu: &Gpu, random: &mut Random, matrix: &CudaMatrix, outputs: usize, inputs: usize) {
    let x = gpu.numbers(random, BATCH * inputs, 1.0);
    let run = |first: usize, num_tokens: usize| {
        let rows = gpu.activations(&x[first * inputs..(first + num_tokens) * inputs], num_tokens, inputs);
        gpu.product(&rows, matrix, None, outputs, DType::F32).bytes(gpu)
    };
    let whole = run(0, BATCH);
    for (first, num_tokens) in PARTS {
        let part = &whole[first * outputs * 4..(first + num_tokens) * outputs * 4];
        assert_eq!(run(first, num_tokens), part, "{num_tokens} rows from {first} on");
    }
}

#[test]
fn a_row_has_the_same_bits_in_any_batch() {
    for gpu in gpu::lend().iter() {
        let random = &mut Random::new(2);
        let (outputs, inputs) = (70, 328);
        let matrix = gpu.matrix(&gpu.numbers(random, outputs * inputs, 0.1), outputs, inputs);
        check_parts(gpu, random, &matrix, outputs, inputs);
    }
}

/// Matrices of several parts and stored types become one matrix of the device's type.
#[test]
fn stored_types_become_the_devices() {
    for gpu in gpu::lend().iter() {
        let random = &mut Random::new(3);
        let columns = 64;
        let stored: Vec<f32> = (0..3 * columns).map(|_| random.normal() as f32).collect();
        let quantised = Storage::Q8_0.encode(&stored);
        let mut unpacked = vec![0.0; stored.len()];
        dequantize_row(DType::Q8_0, &quantised, &mut unpacked);
        let parts = [
            host_tensor(&encode(&stored, DType::F32), 3, columns, DType::F32),
            host_tensor(&encode(&stored, DType::BF16), 3, columns, DType::BF16),
            host_tensor(&encode(&stored, DType::F16), 3, columns, DType::F16),
            host_tensor(&quantised, 3, columns, DType::Q8_0),
        ];
        let matrix = gpu.backend.load_matrix(&parts, Some(gpu.dtype())).unwrap();
        let ids: Vec<i32> = (0..12).rev().collect();
        let out = gpu.output(12, columns, DType::F32);
        gpu.backend.embed(&gpu.stream, &matrix, &gpu.indices(&ids, 1, 12), 1.0, &out.tensor).unwrap();
        let found = out.numbers(gpu);
        let each = [DType::F32, DType::BF16, DType::F16].map(|dtype| {
            stored.iter().map(|value| gpu::round(gpu::round(*value, dtype), gpu.dtype())).collect::<Vec<f32>>()
        });
        let last: Vec<f32> = unpacked.iter().map(|value| gpu::round(*value, gpu.dtype())).collect();
        let all = [each.concat(), last].concat();
        for (id, row) in ids.iter().zip(found.chunks_exact(columns)) {
            assert_eq!(row, &all[*id as usize * columns..(*id as usize + 1) * columns], "row {id}");
        }
        let odd = host_tensor(&encode(&stored[..30], DType::F32), 3, 10, DType::F32);
        let error = gpu.backend.load_matrix(&[odd], None).err().unwrap().to_string();
        assert!(error.contains("10 columns"), "{error}");
        let error = gpu.backend.load_matrix(&parts[..1], Some(DType::F32)).err().unwrap().to_string();
        assert!(error.contains("--device cpu"), "{error}");
    }
}

#[test]
fn wrong_shapes_are_refused_before_a_launch() {
    let gpus = gpu::lend();
    let gpu = &gpus[0];
    let matrix = gpu.matrix(&[0.0; 16 * 8], 16, 8);
    let x = gpu.activations(&[0.0; 8], 1, 8);
    for (rows, columns, dtype) in [(1, 15, DType::F32), (2, 16, DType::F32), (1, 16, DType::I32)] {
        let out = gpu.output(rows, columns, dtype);
        assert!(gpu.backend.linear(&gpu.stream, &x, &matrix, None, &out.tensor).is_err());
    }
    let beyond = mneme::backend::Tensor::new(x.buffer().clone(), 8, 1, 8, gpu.dtype());
    let out = gpu.output(1, 16, DType::F32);
    let error = gpu.backend.linear(&gpu.stream, &beyond, &matrix, None, &out.tensor).unwrap_err().to_string();
    assert!(error.contains("outside a buffer"), "{error}");
}
