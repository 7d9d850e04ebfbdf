//! The library under an unmodified cudarc: a kernel launched and a product queued, their results read back.

use cudarc::cublaslt::{CudaBlasLT, Matmul, MatmulConfig};
use cudarc::driver::{CudaContext, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::Ptx;
use half::bf16;
use std::process::Command;

const VECTOR_ADD: &str = include_str!("ptx/vector_add.ptx");

/// Opens the library under the name that cudarc asks for: a library that is loaded answers to its soname.
fn open_library() {
    let path = softgpu::library::library_path().expect("the shared library is built with this test");
    // SAFETY: the library has no initialisers with effects.
    let library = unsafe { libloading::Library::new(&path) }.expect("the library opens");
    std::mem::forget(library);
}

#[test]
fn vector_add_through_cudarc() {
    open_library();
    let context = CudaContext::new(0).unwrap();
    assert!(context.name().unwrap().contains("softgpu"));
    let stream = context.default_stream();
    let n = 1000usize;
    let a: Vec<f32> = (0..n).map(|i| i as f32).collect();
    let b: Vec<f32> = (0..n).map(|i| 0.5 * i as f32).collect();
    let (a_dev, b_dev) = (stream.clone_htod(&a).unwrap(), stream.clone_htod(&b).unwrap());
    let mut c_dev = stream.alloc_zeros::<f32>(n).unwrap();
    let module = context.load_module(Ptx::from_src(VECTOR_ADD)).unwrap();
    let kernel = module.load_function("vadd").unwrap();
    let count = n as i32;
    let mut launch = stream.launch_builder(&kernel);
    launch.arg(&a_dev).arg(&b_dev).arg(&mut c_dev).arg(&count);
    // SAFETY: the arguments are those of the kernel.
    unsafe { launch.launch(LaunchConfig::for_num_elems(n as u32)) }.unwrap();
    let c = stream.clone_dtoh(&c_dev).unwrap();
    assert!(c.iter().zip(a.iter().zip(&b)).all(|(c, (a, b))| *c == a + b));
}

/// cudarc looks for cuBLASLt by name alone, so this is for a process that finds it.
#[test]
fn products_through_cudarc() {
    let folder = tempfile::tempdir().unwrap();
    softgpu::library::link_into(folder.path()).unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["a_product", "--exact", "--ignored", "--nocapture"]).env("LD_LIBRARY_PATH", folder.path());
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

/// What `products_through_cudarc` runs.
#[test]
#[ignore = "wants the libraries in the search path"]
fn a_product() {
    let stream = CudaContext::new(0).unwrap().default_stream();
    let library = CudaBlasLT::new(stream.clone()).unwrap();
    let (m, n, k) = (5usize, 3usize, 40usize);
    let numbers =
        |count: usize, step: f32| (0..count).map(|at| bf16::from_f32((at as f32 * step).sin())).collect::<Vec<_>>();
    let (a, b) = (numbers(m * k, 0.7), numbers(n * k, 1.3));
    let (a_dev, b_dev) = (stream.clone_htod(&a).unwrap(), stream.clone_htod(&b).unwrap());
    let mut d_dev = stream.alloc_zeros::<bf16>(m * n).unwrap();
    let config = MatmulConfig {
        transa: true,
        transb: false,
        transc: false,
        m: m as u64,
        n: n as u64,
        k: k as u64,
        alpha: 2.0,
        lda: k as i64,
        ldb: k as i64,
        beta: 0.0,
        ldc: m as i64,
        stride_a: None,
        stride_b: None,
        stride_c: None,
        stride_bias: None,
        batch_size: None,
    };
    // SAFETY: the memory has the shapes of the configuration.
    unsafe { library.matmul(config, &a_dev, &b_dev, &mut d_dev, None, None) }.unwrap();
    let d = stream.clone_dtoh(&d_dev).unwrap();
    for (column, b) in b.chunks(k).enumerate() {
        for (row, a) in a.chunks(k).enumerate() {
            let wanted: f32 = 2.0 * a.iter().zip(b).map(|(a, b)| a.to_f32() * b.to_f32()).sum::<f32>();
            let found = d[column * m + row].to_f32();
            assert!((found - wanted).abs() < 0.01 * (1.0 + wanted.abs()), "{found}, wanted {wanted}");
        }
    }
}
