//! Products with weights that stay quantised, against the same weights unpacked to the device's type: bit for bit, since
//! both are the same sums.

use half::f16;
use mneme::backend::cuda::CudaMatrix;
use mneme::backend::{Backend, DType};

use crate::gpu::{self, Gpu, host_tensor};
use crate::linear::check_parts;
use crate::support::random::Random;

pub const FORMATS: [DType; 8] =
    [DType::Q4_0, DType::Q4_1, DType::Q5_0, DType::Q5_1, DType::Q8_0, DType::Q4K, DType::Q5K, DType::Q6K];

/// Tokens, outputs, columns over those of a block: around the edges of tiles (16 and 64 tokens, 8 to 64 outputs), of records
/// (8 rows, 64 columns) and of what is copied at once (256 columns).
const SHAPES: [(usize, usize, usize); 9] =
    [(1, 1, 1), (1, 33, 3), (2, 31, 2), (16, 40, 9), (17, 65, 5), (5, 130, 8), (64, 7, 4), (65, 64, 1), (100, 77, 6)];

/// Blocks with random codes and scales, `[rows, columns]`. Numbers are about one in size.
pub fn random_blocks(random: &mut Random, format: DType, rows: usize, columns: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..rows * format.row_bytes(columns).unwrap()).map(|_| random.below(256) as u8).collect();
    let codes = match format {
        DType::Q4K | DType::Q5K => 16.0 * 63.0,
        DType::Q6K => 32.0 * 128.0,
        DType::Q8_0 => 128.0,
        _ => 16.0,
    };
    let scales_at: &[usize] = match format {
        DType::Q4_1 | DType::Q5_1 | DType::Q4K | DType::Q5K => &[0, 2],
        DType::Q6K => &[208],
        _ => &[0],
    };
    for block in bytes.chunks_exact_mut(format.block_bytes()) {
        for at in scales_at {
            let scale = f16::from_f64(random.normal() / codes);
            block[*at..at + 2].copy_from_slice(&scale.to_le_bytes());
        }
    }
    bytes
}

/// The same blocks as they are and unpacked.
fn both(gpu: &Gpu, blocks: &[u8], rows: usize, columns: usize, format: DType) -> [CudaMatrix; 2] {
    let part = host_tensor(blocks, rows, columns, format);
    [None, Some(gpu.dtype())].map(|wanted| gpu.backend.load_matrix(std::slice::from_ref(&part), wanted).unwrap())
}

fn check_product(gpu: &Gpu, random: &mut Random, format: DType, shape: (usize, usize, usize)) {
    let (num_tokens, outputs, blocks) = shape;
    let inputs = blocks.min(if format.block_elements() == 256 { 3 } else { 9 }) * format.block_elements();
    let stored = random_blocks(random, format, outputs, inputs);
    let [quantised, unpacked] = both(gpu, &stored, outputs, inputs, format);
    let x = gpu.random_rows(random, num_tokens, inputs);
    let bias = (blocks % 2 == 0).then(|| gpu.vector(&gpu.numbers(random, outputs, 1.0)));
    for dtype in [gpu.dtype(), DType::F32] {
        let [found, wanted] =
            [&quantised, &unpacked].map(|matrix| gpu.product(&x, matrix, bias.as_ref(), outputs, dtype));
        let what = format!("{format} in {}, [{num_tokens}, {inputs}] x [{outputs}, {inputs}]", gpu.dtype());
        let numbers = wanted.numbers(gpu);
        assert!(
            numbers.iter().all(|number| number.is_finite()) && numbers.iter().any(|number| *number != 0.0),
            "{what}"
        );
        assert_eq!(found.bytes(gpu), wanted.bytes(gpu), "{what} to {dtype}");
    }
}

fn check_products(format: DType) {
    for gpu in gpu::lend().iter() {
        let random = &mut Random::new(1);
        SHAPES.into_iter().for_each(|shape| check_product(gpu, random, format, shape));
    }
}

macro_rules! products {
    ($($name:ident $format:expr,)*) => {$(
        #[test]
        fn $name() {
            check_products($format);
        }
    )*};
}

products! {
    q4_0_multiplies_as_its_numbers DType::Q4_0,
    q4_1_multiplies_as_its_numbers DType::Q4_1,
    q5_0_multiplies_as_its_numbers DType::Q5_0,
    q5_1_multiplies_as_its_numbers DType::Q5_1,
    q8_0_multiplies_as_its_numbers DType::Q8_0,
    q4_k_multiplies_as_its_numbers DType::Q4K,
    q5_k_multiplies_as_its_numbers DType::Q5K,
    q6_k_multiplies_as_its_numbers DType::Q6K,
}

/// More outputs than a narrow tile's blocks should have: the wide ones, which several rows take.
#[test]
fn wide_tiles_give_the_same_bits() {
    const OUTPUTS: usize = 8200;
    const INPUTS: usize = 64;
    let gpus = gpu::lend();
    let gpu = &gpus[0];
    for (format, num_tokens) in [(DType::Q8_0, 66), (DType::Q5_0, 70)] {
        let random = &mut Random::new(2);
        let [quantised, unpacked] = both(gpu, &random_blocks(random, format, OUTPUTS, INPUTS), OUTPUTS, INPUTS, format);
        let x = gpu.random_rows(random, num_tokens, INPUTS);
        let [found, wanted] =
            [quantised, unpacked].map(|matrix| gpu.product(&x, &matrix, None, OUTPUTS, DType::F32).bytes(gpu));
        assert!(found == wanted, "{format}, {num_tokens} tokens");
    }
}

#[test]
fn a_row_has_the_same_bits_in_any_batch() {
    for gpu in gpu::lend().iter() {
        let random = &mut Random::new(3);
        let (outputs, inputs, format) = (70, 512, DType::Q4K);
        let [matrix, _] = both(gpu, &random_blocks(random, format, outputs, inputs), outputs, inputs, format);
        check_parts(gpu, random, &matrix, outputs, inputs);
    }
}

/// Stacked parts of several formats, as q, k and v of mixed files are; one of them with rows that fill no record.
#[test]
fn formats_are_stacked() {
    for gpu in gpu::lend().iter() {
        let random = &mut Random::new(4);
        let (inputs, num_tokens) = (256, 19);
        let parts = [(DType::Q4K, 20), (DType::Q4K, 15), (DType::Q6K, 9), (DType::Q8_0, 24)]
            .map(|(format, rows)| host_tensor(&random_blocks(random, format, rows, inputs), rows, inputs, format));
        let x = gpu.random_rows(random, num_tokens, inputs);
        let bias = gpu.vector(&gpu.numbers(random, 68, 1.0));
        for dtype in [gpu.dtype(), DType::F32] {
            let [found, wanted] = [None, Some(gpu.dtype())].map(|kept| {
                let matrix = gpu.backend.load_matrix(&parts, kept).unwrap();
                gpu.product(&x, &matrix, Some(&bias), 68, dtype).bytes(gpu)
            });
            assert_eq!(found, wanted, "{dtype}");
        }
    }
}

#[test]
fn rows_are_embeddings() {
    for gpu in gpu::lend().iter() {
        let random = &mut Random::new(5);
        for format in FORMATS {
            let (rows, columns) = (37, format.block_elements() * 3);
            let tables = both(gpu, &random_blocks(random, format, rows, columns), rows, columns, format);
            let ids: Vec<i32> = [0, 36, 7, 8, 7, 31].to_vec();
            let device_ids = gpu.indices(&ids, 1, ids.len());
            let [found, wanted] = tables.map(|table| {
                let out = gpu.output(ids.len(), columns, DType::F32);
                gpu.backend.embed(&gpu.stream, &table, &device_ids, 1.5, &out.tensor).unwrap();
                out.numbers(gpu)
            });
            assert_eq!(found, wanted, "{format} in {}", gpu.dtype());
        }
    }
}

/// There is nothing that a sum could be rounded to.
#[test]
fn adapters_are_not_merged_into_blocks() {
    let gpus = gpu::lend();
    let gpu = &gpus[0];
    let blocks = random_blocks(&mut Random::new(6), DType::Q8_0, 8, 64);
    let [quantised, unpacked] = both(gpu, &blocks, 8, 64, DType::Q8_0);
    let error = gpu.backend.merged_bytes(&quantised).unwrap_err().to_string();
    assert!(error.contains("--dtype bf16"), "{error}");
    assert!(gpu.backend.allocate_merged(&quantised).is_err());
    assert_eq!(gpu.backend.merged_bytes(&unpacked).unwrap(), 8 * 64 * 2);
}
