//! Products by cuBLASLt: near, asked for once per shape, other bits beside other rows; and what stays with our kernels.

use mneme::backend::{Backend, DType, Tensor};

use crate::gpu::{Gpu, GpuTensor, assert_close, epsilon, host_tensor};
use crate::linear::{SHAPES, product};
use crate::support::random::Random;
use crate::support::softgpu;
use crate::support::tiny_gguf::Storage;

const DTYPES: [DType; 2] = [DType::BF16, DType::F16];

/// What sums of parts, each cut to 14 bits, may be off by where the sum of their magnitudes is some 3.
const OFF: f64 = 2e-3;

/// The bits of `x W^T` for numbers of a seed, in f32: their first row is always the same.
fn product_bits(gpu: &Gpu, num_tokens: usize) -> Vec<u8> {
    let (outputs, inputs) = (70, 328);
    let matrix = gpu.matrix(&gpu.numbers(&mut Random::new(1), outputs * inputs, 0.1), outputs, inputs);
    let x = gpu.numbers(&mut Random::new(2), num_tokens * inputs, 1.0);
    let out = gpu.output(num_tokens, outputs, DType::F32);
    gpu.backend.linear(&gpu.stream, &gpu.activations(&x, num_tokens, inputs), &matrix, None, &out.tensor).unwrap();
    out.bytes(gpu)[..outputs * 4].to_vec()
}

#[test]
fn products_are_near() {
    for gpu in DTYPES.into_iter().filter_map(Gpu::fast) {
        let random = &mut Random::new(1);
        for (num_tokens, outputs, inputs) in SHAPES {
            let x = gpu.numbers(random, num_tokens * inputs, 1.0);
            let weight = gpu.numbers(random, outputs * inputs, 1.0 / (inputs as f64).sqrt());
            let matrix = gpu.matrix(&weight, outputs, inputs);
            let device_x = gpu.activations(&x, num_tokens, inputs);
            let wanted = product(&x, &weight, None, inputs);
            for dtype in [gpu.dtype(), DType::F32] {
                let out = gpu.output(num_tokens, outputs, dtype);
                gpu.backend.linear(&gpu.stream, &device_x, &matrix, None, &out.tensor).unwrap();
                let what = format!("{} to {dtype}, [{num_tokens}, {inputs}] x [{outputs}, {inputs}]", gpu.dtype());
                assert_close(&what, &out.numbers(&gpu), &wanted, epsilon(dtype), OFF);
            }
        }
    }
}

/// What relies on a row's bits being its own fails in this mode: the software GPU sees to that.
#[test]
fn a_rows_bits_depend_on_the_batch() {
    if softgpu::is_replaced() {
        return;
    }
    for dtype in DTYPES {
        let (fast, exact) = (Gpu::fast(dtype).unwrap(), Gpu::new(dtype));
        let sizes = [1, 2, 3, 8, 16, 17, 64, 100];
        assert!(sizes.iter().all(|size| product_bits(&exact, *size) == product_bits(&exact, 1)));
        let found = sizes.map(|size| product_bits(&fast, size));
        for (at, bits) in found.iter().enumerate() {
            assert!(!found[..at].contains(bits), "{dtype}: a row beside {} others is as before", sizes[at] - 1);
        }
        assert_eq!(product_bits(&fast, 3), found[2]);
    }
}

/// KV of one mode is not taken for the other's: the name is part of every block's identity.
#[test]
fn the_modes_have_names() {
    let exact = Gpu::new(DType::BF16).backend.name();
    let Some(fast) = Gpu::fast(DType::BF16) else { return };
    let name = fast.backend.name();
    assert!(name.starts_with(&format!("{exact}-cublaslt1")), "{name}");
}

#[test]
fn algorithms_are_asked_for_once_per_shape() {
    if !softgpu::is_alone("cublaslt::algorithms_are_asked_for_once_per_shape") {
        return;
    }
    let gpu = Gpu::fast(DType::BF16).unwrap();
    let multiply = |num_tokens: usize, outputs: usize, dtype: DType| {
        let [x, matrix] = [num_tokens, outputs].map(|rows| vec![0.5; rows * 64]);
        let (x, out) = (gpu.activations(&x, num_tokens, 64), gpu.output(num_tokens, outputs, dtype));
        let matrix = gpu.matrix(&matrix, outputs, 64);
        gpu.backend.linear(&gpu.stream, &x, &matrix, None, &out.tensor).unwrap();
    };
    for _ in 0..3 {
        for (num_tokens, outputs, dtype) in
            [(1, 16, DType::BF16), (2, 16, DType::BF16), (2, 24, DType::BF16), (2, 24, DType::F32)]
        {
            multiply(num_tokens, outputs, dtype);
        }
    }
    gpu.synchronize();
    assert_eq!(softgpu::cublaslt_counts(), [4, 12]);
}

/// An algorithm for aligned pointers is none for others.
#[test]
fn rows_may_begin_anywhere() {
    let Some(gpu) = Gpu::fast(DType::BF16) else { return };
    let (outputs, inputs) = (8, 16);
    let values = gpu.numbers(&mut Random::new(5), 3 * inputs, 1.0);
    let weight = gpu.numbers(&mut Random::new(6), outputs * inputs, 0.25);
    let matrix = gpu.matrix(&weight, outputs, inputs);
    let all = gpu.activations(&values, 3, inputs);
    let row = |at: usize| -> GpuTensor { Tensor::new(all.buffer().clone(), at * inputs * 2, 1, inputs, DType::BF16) };
    for at in 0..3 {
        let out = gpu.output(1, outputs, DType::F32);
        gpu.backend.linear(&gpu.stream, &row(at), &matrix, None, &out.tensor).unwrap();
        let wanted = product(&values[at * inputs..][..inputs], &weight, None, inputs);
        assert_close(&format!("row {at}"), &out.numbers(&gpu), &wanted, epsilon(DType::F32), OFF);
    }
}

/// Biases are f32, which the library does not add to numbers of 16 bits; quantised weights it does not know.
#[test]
fn biases_and_quantised_weights_stay_with_our_kernels() {
    let (Some(fast), exact) = (Gpu::fast(DType::BF16), Gpu::new(DType::BF16)) else { return };
    let (num_tokens, outputs, inputs) = (5, 32, 64);
    let random = &mut Random::new(4);
    let x = exact.numbers(random, num_tokens * inputs, 1.0);
    let weight = exact.numbers(random, outputs * inputs, 0.1);
    let bias = exact.numbers(random, outputs, 1.0);
    let blocks = Storage::Q8_0.encode(&weight);
    let run = |gpu: &Gpu| {
        let device_x = gpu.activations(&x, num_tokens, inputs);
        let quantised = gpu.backend.load_matrix(&[host_tensor(&blocks, outputs, inputs, DType::Q8_0)], None).unwrap();
        let plain = gpu.matrix(&weight, outputs, inputs);
        let bias = gpu.vector(&bias);
        [(&plain, Some(&bias)), (&quantised, None)].map(|(matrix, bias)| {
            let out = gpu.output(num_tokens, outputs, DType::F32);
            gpu.backend.linear(&gpu.stream, &device_x, matrix, bias, &out.tensor).unwrap();
            out.bytes(gpu)
        })
    };
    assert_eq!(run(&fast), run(&exact));
}

#[test]
fn shapes_without_an_algorithm_stay_with_our_kernels() {
    if !softgpu::is_alone("cublaslt::shapes_without_an_algorithm_stay_with_our_kernels") {
        return;
    }
    let (fast, exact) = (Gpu::fast(DType::F16).unwrap(), Gpu::new(DType::F16));
    softgpu::fail("cublasLtMatmulAlgoGetHeuristic=15x1");
    let wanted = product_bits(&exact, 4);
    assert_eq!([product_bits(&fast, 4), product_bits(&fast, 4)], [wanted.clone(), wanted]);
    assert_eq!(softgpu::cublaslt_counts(), [0, 0]);
}

#[test]
fn what_fails_is_named() {
    if !softgpu::is_alone("cublaslt::what_fails_is_named") {
        return;
    }
    let gpu = Gpu::fast(DType::BF16).unwrap();
    let (x, matrix) = (gpu.activations(&[0.0; 8], 1, 8), gpu.matrix(&[0.0; 64], 8, 8));
    let out = gpu.output(1, 8, DType::F32);
    for (rules, wanted) in [
        ("cublasLtMatmulPreferenceSetAttribute=7", "describe what algorithms may use: CUBLAS_STATUS_INVALID_VALUE"),
        ("cublasLtMatmulAlgoGetHeuristic=14", "choose an algorithm for Shape { num_tokens: 1, outputs: 8, inputs: 8"),
        ("cublasLtMatmul=13", "multiply matrices: CUBLAS_STATUS_EXECUTION_FAILED"),
    ] {
        softgpu::fail(rules);
        let error = gpu.backend.linear(&gpu.stream, &x, &matrix, None, &out.tensor).unwrap_err().to_string();
        assert!(error.contains("cuBLASLt cannot ") && error.contains(wanted), "{rules}: {error}");
        softgpu::fail("");
    }
    gpu.backend.linear(&gpu.stream, &x, &matrix, None, &out.tensor).unwrap();
    softgpu::fail("cublasLtCreate=1");
    let error = softgpu::backend(DType::BF16).with_cublaslt(Some(&softgpu::library())).err().unwrap().to_string();
    assert!(error.contains("cuBLASLt cannot start: CUBLAS_STATUS_NOT_INITIALIZED"), "{error}");
}
