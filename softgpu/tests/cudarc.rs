//! The library under an unmodified cudarc: a kernel launched, its result read back.

use cudarc::driver::{CudaContext, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::Ptx;

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
