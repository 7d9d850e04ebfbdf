//! A device of its own for each test: memory, a module, launches that return what the checkers find.

#![allow(dead_code)] // Each test program uses a part of it.

use softgpu::counters::Counters;
use softgpu::exec::launch::{Launch, host_threads};
use softgpu::exec::simd::{self, Simd};
use softgpu::fault::Fault;
use softgpu::memory::{Accessor, Memory, stamp};
use softgpu::module::Module;
use std::cell::Cell;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

/// Names the compute capability of the device.
pub(crate) const VARIABLE: &str = "SOFTGPU_COMPUTE_CAPABILITY";

/// Runs `body` on a device of this compute capability, from the test of this name. A process that has another one leaves it
/// to its parent.
pub(crate) fn on(version: &str, test: &str, body: fn()) {
    match std::env::var(VARIABLE) {
        Ok(here) if here == version => return body(),
        Ok(_) => return,
        Err(_) => {}
    }
    let program = std::env::current_exe().expect("a test program has a path");
    let mut command = Command::new(program);
    command.args([test, "--exact", "--nocapture"]).env(VARIABLE, version);
    let run = command.output().expect("the program can be run again");
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
}

/// An argument of a kernel.
pub(crate) enum Arg {
    Pointer(u64),
    Int(i32),
    Float(f32),
}

/// A device with one module.
pub(crate) struct Gpu {
    pub(crate) memory: Memory,
    pub(crate) module: Module,
    pub(crate) seed: u64,
    pub(crate) simd: Simd,
    position: Cell<u64>,
}

/// Types that may be copied as bytes.
pub(crate) trait Plain: Copy + Default {}
impl Plain for u8 {}
impl Plain for u16 {}
impl Plain for u32 {}
impl Plain for i32 {}
impl Plain for u64 {}
impl Plain for i64 {}
impl Plain for f32 {}
impl Plain for f64 {}

impl Gpu {
    pub(crate) fn new(ptx: &str) -> Self {
        let memory = Memory::new(1 << 30);
        let module = Module::load(ptx, &memory).unwrap_or_else(|e| panic!("{e}"));
        Self { memory, module, seed: 0, simd: *simd::detect(), position: Cell::new(1) }
    }

    /// Uninitialised memory.
    pub(crate) fn reserve(&self, bytes: usize) -> u64 {
        self.memory.allocate(bytes as u64, "test").expect("memory").base
    }

    /// Memory with these values, `reserve` bytes in all.
    pub(crate) fn upload_into<T: Plain>(&self, values: &[T], bytes: usize) -> u64 {
        let allocation = self.memory.allocate(bytes as u64, "test").expect("memory");
        // SAFETY: the allocation has at least as many bytes.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr().cast(), allocation.data(0), size_of_val(values)) };
        allocation.mark_init(0, size_of_val(values) as u64);
        allocation.base
    }

    pub(crate) fn upload<T: Plain>(&self, values: &[T]) -> u64 {
        self.upload_into(values, size_of_val(values))
    }

    pub(crate) fn download<T: Plain>(&self, address: u64, count: usize) -> Vec<T> {
        let bytes = (count * size_of::<T>()) as u64;
        let allocation = self.memory.resolve(address, bytes).expect("a live range");
        let mut out = vec![T::default(); count];
        // SAFETY: `resolve` found the range.
        unsafe {
            std::ptr::copy_nonoverlapping(
                allocation.data(address - allocation.base),
                out.as_mut_ptr().cast(),
                bytes as usize,
            )
        };
        out
    }

    pub(crate) fn launch(
        &self,
        kernel: &str,
        grid: [u32; 3],
        block: [u32; 3],
        shared: u32,
        args: &[Arg],
    ) -> Result<Counters, Fault> {
        let function = Arc::clone(&self.module.functions[kernel]);
        let mut params = vec![0u8; function.kernel.param_bytes() as usize];
        for (param, arg) in function.kernel.params.iter().zip(args) {
            let bytes: Vec<u8> = match arg {
                Arg::Pointer(p) => p.to_le_bytes().into(),
                Arg::Int(i) => i.to_le_bytes().into(),
                Arg::Float(f) => f.to_le_bytes().into(),
            };
            params[param.offset as usize..][..bytes.len()].copy_from_slice(&bytes);
        }
        let number = self.position.replace(self.position.get() + 1);
        let by = Accessor { stamp: stamp(0, number), clock: Arc::default(), launch: number, ..Accessor::default() };
        Launch::new(&function.kernel, &self.memory, (grid, block, shared), &params, by, self.seed, &self.simd)
            .run(host_threads())
    }
}

/// PTX of a CUDA file in tests/kernels, by nvcc of CUDA 13.0.
///
/// The compiler is found through `MNEME_NVCC`, in target/nvcc, or on the PATH. Without one the test fails and says how to
/// get it; `SOFTGPU_SKIP_NVCC=1` leaves the test out and says so: the result is `None`.
pub(crate) fn compile(file: &str, defines: &[&str]) -> Option<String> {
    if std::env::var_os("SOFTGPU_SKIP_NVCC").is_some() {
        eprintln!("left out because SOFTGPU_SKIP_NVCC is set: {file}");
        return None;
    }
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let local = root.join("../target/nvcc/bin/nvcc");
    let nvcc = match std::env::var_os("MNEME_NVCC") {
        Some(path) => PathBuf::from(path),
        None if local.exists() => local,
        None => PathBuf::from("nvcc"),
    };
    let folder = tempfile::tempdir().expect("a folder for the compiler");
    let target = folder.path().join("out.ptx");
    let run = Command::new(&nvcc)
        .args(["-std=c++17", "-lineinfo", "-arch=compute_80", "-ptx", "-o"])
        .arg(&target)
        .args(defines.iter().map(|d| format!("-D{d}")))
        .arg(root.join("tests/kernels").join(file))
        .output()
        .unwrap_or_else(|e| panic!("cannot run {}: {e}; run kernels/install-nvcc or set MNEME_NVCC (SOFTGPU_SKIP_NVCC=1 leaves these tests out)", nvcc.display()));
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    Some(std::fs::read_to_string(target).expect("the compiler wrote it"))
}

/// Repeatable values in (-1, 1).
pub(crate) fn values(n: usize, seed: u64) -> Vec<f32> {
    let mut rng = softgpu::rng::Rng::new(seed);
    (0..n).map(|_| (rng.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0).collect()
}
