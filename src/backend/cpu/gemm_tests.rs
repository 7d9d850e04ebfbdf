//! The matrix multiply against slow loops, and its bits against themselves.

use std::sync::Arc;

use super::super::{DType, HostTensor, RowOrder};
use super::dequantize::{Block, code_bias};
use super::float_tile::multiply_add;
use super::quantize::QuantBlock;
use super::*;

/// A small generator, so that a failure repeats.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as u32
    }

    fn value(&mut self) -> f32 {
        self.next() as f32 / (1u64 << 30) as f32 - 1.0
    }

    fn values(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.value()).collect()
    }
}

fn tensor(dtype: DType, rows: usize, columns: usize, random: &mut Random) -> HostTensor {
    let values = random.values(rows * columns);
    let bytes: Vec<u8> = match dtype {
        DType::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        DType::F16 => values.iter().flat_map(|value| half::f16::from_f32(*value).to_le_bytes()).collect(),
        DType::BF16 => values.iter().flat_map(|value| half::bf16::from_f32(*value).to_le_bytes()).collect(),
        dtype => quantised(dtype, &values, columns),
    };
    let len = bytes.len();
    HostTensor::new("weights", Arc::new(bytes), 0..len, dtype, rows, columns).unwrap()
}

fn quantised(dtype: DType, values: &[f32], columns: usize) -> Vec<u8> {
    use candle_core::quantized::{GgmlDType, QTensor};
    let theirs = match dtype {
        DType::Q4_0 => GgmlDType::Q4_0,
        DType::Q4_1 => GgmlDType::Q4_1,
        DType::Q5_0 => GgmlDType::Q5_0,
        DType::Q5_1 => GgmlDType::Q5_1,
        DType::Q8_0 => GgmlDType::Q8_0,
        DType::Q4K => GgmlDType::Q4K,
        DType::Q5K => GgmlDType::Q5K,
        DType::Q6K => GgmlDType::Q6K,
        dtype => unreachable!("{dtype} is not quantised"),
    };
    let shape = (values.len() / columns, columns);
    let values = candle_core::Tensor::from_slice(values, shape, &candle_core::Device::Cpu).unwrap();
    QTensor::quantize(&values, theirs).unwrap().data().unwrap().to_vec()
}

/// Multiplies dense rows.
fn multiply(threads: usize, isa: Isa, x: &[f32], num_rows: usize, w: &PackedMatrix, bias: Option<&[f32]>) -> Vec<f32> {
    let mut out = vec![f32::NAN; num_rows * w.num_rows()];
    let x = Rows { data: x, num_rows, stride: w.num_columns() };
    let target = RowsMut { data: &mut out, stride: w.num_rows() };
    gemm(&mut ThreadPool::new(threads), isa, x, w, bias, target, &mut GemmScratch::default());
    out
}

/// `(sum, sum of magnitudes)` of one output, in f64.
fn slow_dot(x: &[f32], weights: &[f32]) -> (f64, f64) {
    x.iter().zip(weights).fold((0.0, 0.0), |(sum, size), (x, w)| {
        let product = f64::from(*x) * f64::from(*w);
        (sum + product, size + product.abs())
    })
}

/// Compares with f64 loops over `unpack_row`; the error allowed is `tolerance` of the sum of magnitudes.
fn check_against_loops(isa: Isa, w: &PackedMatrix, num_rows: usize, tolerance: f64, random: &mut Random) {
    let (n, k) = (w.num_rows(), w.num_columns());
    let (x, bias) = (random.values(num_rows * k), random.values(n));
    let out = multiply(2, isa, &x, num_rows, w, Some(&bias));
    let mut weights = vec![0.0; k];
    for column in 0..n {
        w.unpack_row(column, &mut weights);
        for row in 0..num_rows {
            let (sum, size) = slow_dot(&x[row * k..(row + 1) * k], &weights);
            let (wanted, found) = (sum + f64::from(bias[column]), f64::from(out[row * n + column]));
            let error = (wanted - found).abs();
            assert!(error <= tolerance * (size + 1.0), "{isa} [{num_rows}, {n}, {k}] {row} {column}: {wanted} {found}");
        }
    }
}

fn float_tolerance(isa: Isa, dtype: DType) -> f64 {
    if isa >= Isa::Avx512Bf16 && dtype == DType::BF16 { 4e-3 } else { 2e-6 }
}

const PLAIN: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

#[test]
fn plain_products_are_what_loops_give() {
    let mut random = Random(1);
    let mut pool = ThreadPool::new(2);
    for isa in Isa::available() {
        for dtype in PLAIN {
            for (n, k) in [(1, 1), (31, 3), (33, 31), (64, 576), (200, 896), (70, 2050)] {
                let tensors = [tensor(dtype, n, k, &mut random)];
                let w = PackedMatrix::pack(&tensors, None, &mut pool).unwrap();
                for num_rows in [1, 2, 5, 13, 40] {
                    check_against_loops(isa, &w, num_rows, float_tolerance(isa, dtype), &mut random);
                }
            }
        }
    }
}

/// Whatever else is in the batch and however many threads work, a row has the bits it has alone.
fn check_bits(isa: Isa, w: &PackedMatrix, random: &mut Random) {
    let (n, k) = (w.num_rows(), w.num_columns());
    let (x, bias) = (random.values(60 * k), random.values(n));
    let alone: Vec<f32> = x.chunks(k).flat_map(|x| multiply(1, isa, x, 1, w, Some(&bias))).collect();
    for num_rows in (1..=40).chain([60]) {
        for threads in 1..=3 {
            let out = multiply(threads, isa, &x[..num_rows * k], num_rows, w, Some(&bias));
            for (index, (wanted, found)) in alone.iter().zip(&out).enumerate() {
                let (row, column) = (index / n, index % n);
                assert_eq!(wanted.to_bits(), found.to_bits(), "{isa}: row {row} of {num_rows}, column {column}");
            }
        }
    }
}

#[test]
fn plain_bits_depend_on_neither_rows_nor_threads() {
    let mut random = Random(2);
    for isa in Isa::available() {
        for dtype in PLAIN {
            for (n, k) in [(200, 64), (33, 2051)] {
                let tensors = [tensor(dtype, n, k, &mut random)];
                let w = PackedMatrix::pack(&tensors, None, &mut ThreadPool::new(1)).unwrap();
                check_bits(isa, &w, &mut random);
            }
        }
    }
}

#[test]
fn packed_rows_are_the_tensors_rows() {
    let mut random = Random(3);
    let k = 256;
    let order = RowOrder::InterleavedHalves { num_heads: 2 };
    let tensors = [
        tensor(DType::Q4K, 40, k, &mut random).with_row_order(order),
        tensor(DType::Q4K, 20, k, &mut random),
        tensor(DType::Q6K, 33, k, &mut random),
        tensor(DType::BF16, 5, k, &mut random),
        tensor(DType::Q4_0, 7, k, &mut random),
        tensor(DType::Q4_1, 7, k, &mut random),
        tensor(DType::Q5_0, 7, k, &mut random),
        tensor(DType::Q5_1, 7, k, &mut random),
        tensor(DType::Q8_0, 7, k, &mut random),
        tensor(DType::Q5K, 7, k, &mut random),
        tensor(DType::F16, 7, k, &mut random),
        tensor(DType::F32, 7, k, &mut random),
    ];
    for target in [None, Some(DType::F32), Some(DType::BF16), Some(DType::F16)] {
        let w = PackedMatrix::pack(&tensors, target, &mut ThreadPool::new(2)).unwrap();
        let (mut wanted, mut found, mut row) = (vec![0.0; k], vec![0.0; k], 0);
        for tensor in &tensors {
            for tensor_row in 0..tensor.rows() {
                super::super::dequantize_row(tensor.dtype(), tensor.row_bytes(tensor_row), &mut wanted);
                let rounded = wanted.iter().map(|value| match target {
                    Some(DType::BF16) => half::bf16::from_f32(*value).to_f32(),
                    Some(DType::F16) => half::f16::from_f32(*value).to_f32(),
                    _ => *value,
                });
                w.unpack_row(row, &mut found);
                for (k, (wanted, found)) in rounded.zip(&found).enumerate() {
                    assert_eq!(wanted.to_bits(), found.to_bits(), "{target:?} row {row} column {k}");
                }
                row += 1;
            }
        }
        assert_eq!(row, w.num_rows());
    }
}

#[test]
fn strides_leave_what_lies_between_rows_alone() {
    let mut random = Random(4);
    let w = PackedMatrix::pack(&[tensor(DType::BF16, 37, 65, &mut random)], None, &mut ThreadPool::new(1)).unwrap();
    for isa in Isa::available() {
        for num_rows in [1, 3, 40] {
            let x = random.values(num_rows * 70);
            let dense: Vec<f32> = x.chunks(70).flat_map(|row| row[..65].to_vec()).collect();
            let wanted = multiply(1, isa, &dense, num_rows, &w, None);
            let mut out = vec![7.0; num_rows * 40];
            let target = RowsMut { data: &mut out, stride: 40 };
            let x = Rows { data: &x, num_rows, stride: 70 };
            gemm(&mut ThreadPool::new(2), isa, x, &w, None, target, &mut GemmScratch::default());
            for (row, out) in out.chunks(40).enumerate() {
                assert_eq!(out[..37], wanted[row * 37..(row + 1) * 37]);
                assert_eq!(out[37..], [7.0; 3]);
            }
        }
    }
}

#[test]
fn tensors_that_do_not_fit_together_are_refused() {
    let (mut random, mut pool) = (Random(5), ThreadPool::new(1));
    let tensors = [tensor(DType::F32, 2, 8, &mut random), tensor(DType::F32, 2, 9, &mut random)];
    assert!(PackedMatrix::pack(&tensors, None, &mut pool).is_err());
    assert!(PackedMatrix::pack(&[], None, &mut pool).is_err());
    assert!(PackedMatrix::pack(&tensors[..1], Some(DType::Q8_0), &mut pool).is_err());
}

const QUANTISED: [DType; 8] =
    [DType::Q4_0, DType::Q4_1, DType::Q5_0, DType::Q5_1, DType::Q8_0, DType::Q4K, DType::Q5K, DType::Q6K];

fn fused(isa: Isa, a: f32, b: f32, c: f32) -> f32 {
    if isa == Isa::Portable { multiply_add(a, b, c) } else { a.mul_add(b, c) }
}

/// What the integer kernels must give, to the bit, from the checkpoint's own bytes.
fn slow_quantised_dot(isa: Isa, tensor: &HostTensor, row: usize, x: &[f32]) -> f32 {
    let dtype = tensor.dtype();
    let blocks = tensor.row_bytes(row).chunks(dtype.block_bytes());
    let (mut sum, mut block) = (0.0, Block::new());
    for (bytes, x) in blocks.zip(x.chunks(dtype.block_elements())) {
        block.read(dtype, bytes);
        for (sub, x) in x.as_chunks::<32>().0.iter().enumerate() {
            let x = QuantBlock::new(x);
            let part_len = if dtype == DType::Q6K { 16 } else { 32 };
            for first in (0..32).step_by(part_len) {
                let integers: i32 = (first..first + part_len)
                    .map(|k| (i32::from(block.codes[sub * 32 + k]) - code_bias(dtype)) * i32::from(x.codes[k]))
                    .sum();
                let term = block.term(dtype, sub * 2 + first / 16);
                sum = fused(isa, integers as f32, term.scale * x.scale, sum);
            }
            if let Some(minimum) = block.term(dtype, sub * 2).minimum {
                let codes: i32 = x.codes.iter().map(|&code| i32::from(code)).sum();
                sum = fused(isa, minimum, x.scale * codes as f32, sum);
            }
        }
    }
    sum
}

#[test]
fn quantised_products_are_the_emulated_ones_to_the_bit() {
    let (mut random, mut pool) = (Random(6), ThreadPool::new(2));
    for isa in Isa::available() {
        for dtype in QUANTISED {
            for (num_rows, n, k) in [(7, 1, 256), (7, 33, 512), (7, 70, 768), (8, 40, 256), (19, 70, 1280)] {
                let tensors = [tensor(dtype, n, k, &mut random)];
                let w = PackedMatrix::pack(&tensors, None, &mut pool).unwrap();
                let x = random.values(num_rows * k);
                let out = multiply(2, isa, &x, num_rows, &w, None);
                for (index, found) in out.iter().enumerate() {
                    let (row, column) = (index / n, index % n);
                    let wanted = slow_quantised_dot(isa, &tensors[0], column, &x[row * k..(row + 1) * k]);
                    assert_eq!(wanted.to_bits(), found.to_bits(), "{isa} {dtype} [{n}, {k}] {row} {column}");
                }
            }
        }
    }
}

/// The codes' extremes: no instruction may saturate.
#[test]
fn the_largest_codes_do_not_saturate() {
    let mut pool = ThreadPool::new(1);
    for isa in Isa::available() {
        for dtype in QUANTISED {
            for byte in [0x00, 0x7f, 0x80, 0xff] {
                let (rows, k) = (3, 256);
                let len = dtype.row_bytes(k).unwrap() * rows;
                // Scales of one, so that no number is infinite.
                let mut bytes = vec![byte; len];
                for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
                    let at = if dtype == DType::Q6K { 208 } else { 0 };
                    block[at..at + 2].copy_from_slice(&half::f16::ONE.to_le_bytes());
                    if matches!(dtype, DType::Q4_1 | DType::Q5_1 | DType::Q4K | DType::Q5K) {
                        block[2..4].copy_from_slice(&half::f16::ONE.to_le_bytes());
                    }
                }
                let tensors = [HostTensor::new("weights", Arc::new(bytes), 0..len, dtype, rows, k).unwrap()];
                let w = PackedMatrix::pack(&tensors, None, &mut pool).unwrap();
                for (sign, num_rows) in [(1.0, 1), (-1.0, 1), (1.0, 9), (-1.0, 9)] {
                    let x = vec![127.0 * sign; num_rows * k];
                    let out = multiply(1, isa, &x, num_rows, &w, None);
                    let wanted = slow_quantised_dot(isa, &tensors[0], 2, &x[..k]);
                    let found = out.iter().skip(2).step_by(rows);
                    assert!(found.eq([wanted].iter().cycle().take(num_rows)), "{isa} {dtype} {byte:#x}");
                }
            }
        }
    }
}

#[test]
fn quantised_products_are_close_to_what_loops_give() {
    let (mut random, mut pool) = (Random(7), ThreadPool::new(2));
    for isa in Isa::available() {
        for dtype in QUANTISED {
            for (n, k) in [(5, 256), (64, 1024)] {
                let w = PackedMatrix::pack(&[tensor(dtype, n, k, &mut random)], None, &mut pool).unwrap();
                check_against_loops(isa, &w, 13, 5e-3, &mut random);
            }
        }
    }
}

#[test]
fn bits_of_stacked_tensors_depend_on_neither_rows_nor_threads() {
    let mut random = Random(8);
    let order = RowOrder::InterleavedHalves { num_heads: 2 };
    let stack = |random: &mut Random, dtypes: &[DType]| -> Vec<HostTensor> {
        dtypes.iter().map(|&dtype| tensor(dtype, 44, 256, random).with_row_order(order)).collect()
    };
    let stacks = [
        vec![DType::Q4K, DType::Q6K, DType::Q4K],
        vec![DType::Q8_0, DType::BF16, DType::Q4_0],
        vec![DType::Q5K, DType::Q5_0],
        vec![DType::Q4_1, DType::Q5_1, DType::F16],
    ];
    for isa in Isa::available() {
        for dtypes in &stacks {
            let tensors = stack(&mut random, dtypes);
            let w = PackedMatrix::pack(&tensors, None, &mut ThreadPool::new(2)).unwrap();
            assert_eq!(w.num_rows(), 44 * dtypes.len());
            check_bits(isa, &w, &mut random);
            check_against_loops(isa, &w, 3, 5e-3, &mut random);
        }
    }
}

/// Weights of all kinds, some of which lie in panels of tiles and some not.
#[test]
fn feed_forward_layers_have_the_bits_of_their_products_and_the_activation() {
    let mut random = Random(11);
    let mut scratch = GemmScratch::default();
    use DType::{BF16, F16, F32, Q4_1, Q4K, Q6K, Q8_0};
    let types = [
        [BF16; 3],
        [F32; 3],
        [Q4_1; 3],
        [Q4K, Q6K, Q8_0],
        [BF16, Q8_0, BF16],
        [BF16, BF16, Q8_0],
        [Q8_0, Q8_0, BF16],
        [BF16, BF16, F16],
    ];
    for (num_features, k) in [(32, 64), (288, 576), (256, 256), (96, 3104), (160, 32), (1632, 64), (64, 40)] {
        let has_blocks =
            |dtype: &DType| [num_features, k].into_iter().all(|len: usize| len.is_multiple_of(dtype.block_elements()));
        for types in types.into_iter().filter(|types| types.iter().all(has_blocks)) {
            let sizes = [(num_features, k), (num_features, k), (k, num_features)];
            let tensors: Vec<HostTensor> =
                (0..3).map(|at| tensor(types[at], sizes[at].0, sizes[at].1, &mut random)).collect();
            let [gate_up, down] = [&tensors[..2], &tensors[2..]]
                .map(|tensors| PackedMatrix::pack(tensors, None, &mut ThreadPool::new(1)).unwrap());
            for num_rows in [1, 31, 65, 128, 200, 301] {
                let x = random.values(num_rows * k);
                // The last instruction set alone has the layer for weights that are not quantised.
                let is_short = num_features * k * num_rows < 20 << 20;
                let takes_part = |isa: &Isa| *isa == Isa::Amx || is_short && types[0].is_quantised();
                let isas = Isa::available().filter(takes_part);
                for (isa, kind) in isas.flat_map(|isa| [(isa, GateKind::SiLu), (isa, GateKind::GeluTanh)]) {
                    let mut pool = ThreadPool::new(3);
                    let sums = multiply(1, isa, &x, num_rows, &gate_up, None);
                    let mut activated = vec![f32::NAN; num_rows * num_features];
                    gated(&mut pool, isa, &sums, kind, num_features, &mut activated);
                    let wanted = multiply(1, isa, &activated, num_rows, &down, None);
                    let mut room = [sums.len(), activated.len(), wanted.len()].map(|len| vec![f32::NAN; len]);
                    let weights = FeedForwardWeights { gate_up: &gate_up, kind, down: &down };
                    let buffers = room.each_mut().map(Vec::as_mut_slice);
                    let x = Rows { data: &x, num_rows, stride: k };
                    feed_forward(&mut pool, isa, x, weights, buffers, &mut scratch);
                    let bits = |numbers: &[f32]| numbers.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                    assert!(
                        bits(&room[2]) == bits(&wanted),
                        "{isa}, {types:?}, {num_rows} rows, {num_features} features of {k}, {kind:?}"
                    );
                }
            }
        }
    }
}
