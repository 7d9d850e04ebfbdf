//! The compiled kernels: embedded in the program, or compiled by NVRTC when only their sources are.

#![allow(unsafe_code)]

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use cudarc::driver::{CudaContext, CudaFunction, CudaModule, DriverError, sys};
use cudarc::nvrtc::{self, CompileOptions, Ptx};

use super::driver::driver_error;
use crate::{Error, Result, unsupported};

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// The compute capability of Hopper: no other GPU has the instructions of files whose names end in `_sm90a`.
pub(super) const HOPPER: (i32, i32) = (9, 0);

/// Modules by the name of their source file, each loaded onto the device when the first of its kernels is asked for.
pub(super) struct Modules {
    context: Arc<CudaContext>,
    loaded: Mutex<HashMap<&'static str, Arc<CudaModule>>>,
}

impl Modules {
    pub(super) fn new(context: &Arc<CudaContext>) -> Self {
        Self { context: Arc::clone(context), loaded: Mutex::default() }
    }

    /// Kernel `name` of source file `file`.
    pub(super) fn function(&self, file: &str, name: &str) -> Result<CudaFunction> {
        let module = self.module(file)?;
        module.load_function(name).map_err(driver_error(&format!("find kernel {name} in {file}.cu")))
    }

    /// Shared memory that a block may have at the most.
    pub(super) fn max_shared_bytes(&self) -> Result<usize> {
        let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        let bytes = self.context.attribute(attribute).map_err(driver_error("ask for the shared memory of a block"))?;
        Ok(usize::try_from(bytes).unwrap_or(0))
    }

    /// Major and minor.
    pub(super) fn compute_capability(&self) -> Result<(i32, i32)> {
        self.context.compute_capability().map_err(driver_error("ask for the compute capability"))
    }

    fn module(&self, file: &str) -> Result<Arc<CudaModule>> {
        let image = IMAGES.iter().find(|(name, _)| *name == file);
        let (name, image) = image.ok_or_else(|| Error::Device(format!("there is no kernel file {file}.cu")))?;
        let mut loaded = self.loaded.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(module) = loaded.get(name) {
            return Ok(Arc::clone(module));
        }
        let module = load_module(&self.context, name, image)?;
        loaded.insert(name, Arc::clone(&module));
        Ok(module)
    }
}

fn load_module(context: &Arc<CudaContext>, name: &str, image: &Image) -> Result<Arc<CudaModule>> {
    let image = match image {
        Image::Fatbin(bytes) => Ptx::from_binary(bytes.to_vec()),
        Image::Source(source) => compile(context, name, source)?,
    };
    context.load_module(image).map_err(|error| load_error(name, error))
}

fn load_error(name: &str, error: DriverError) -> Error {
    let error_text = driver_error(&format!("load the kernels of {name}.cu"))(error);
    match error.0 {
        sys::CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION | sys::CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU => {
            Error::Unsupported(format!("{error_text}; the driver is older than what compiled the kernels: update it"))
        }
        _ => error_text,
    }
}

/// Compiles one source for the device's instructions; what has a name for it, for those of that generation alone.
fn compile(context: &Arc<CudaContext>, name: &str, source: &str) -> Result<Ptx> {
    kernel_source()?;
    let (major, minor) = context.compute_capability().map_err(driver_error("ask for the compute capability"))?;
    let own = if name.ends_with("_sm90a") { "a" } else { "" };
    let options = CompileOptions {
        options: vec![
            format!("--gpu-architecture=compute_{major}{minor}{own}"),
            "--std=c++17".into(),
            "-lineinfo".into(),
        ],
        name: Some(format!("{name}.cu")),
        ..CompileOptions::default()
    };
    nvrtc::compile_ptx_with_opts(source, options).map_err(|error| match error {
        nvrtc::CompileError::CompileError { log, .. } => {
            Error::Device(format!("NVRTC cannot compile {name}.cu: {}", log.to_string_lossy()))
        }
        other => Error::Device(format!("NVRTC cannot compile {name}.cu: {other}")),
    })
}

#[cfg(not(feature = "flash-attn"))]
fn has_nvrtc() -> bool {
    // SAFETY: opens a library and closes it again.
    unsafe { nvrtc::sys::is_culib_present() }
}

/// A program with candle's CUDA is linked to NVRTC.
#[cfg(feature = "flash-attn")]
fn has_nvrtc() -> bool {
    true
}

/// How the kernels get onto a device; an error says what to install.
pub(in crate::backend) fn kernel_source() -> Result<&'static str> {
    if IMAGES.iter().all(|(_, image)| matches!(image, Image::Fatbin(_))) {
        return Ok("compiled into this program");
    }
    match has_nvrtc() {
        true => Ok("compiled by NVRTC when a model is loaded"),
        false => Err(unsupported!(
            "this program was built without nvcc, and NVRTC, which could compile its kernels now, is not installed; \
             install libnvrtc (package cuda-nvrtc-13-0, or nvidia-cuda-nvrtc from PyPI with its folder in \
             LD_LIBRARY_PATH), or build again with nvcc on the PATH"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Set where the kernels must be there: a build without them then fails.
    const REQUIRE_VARIABLE: &str = "MNEME_REQUIRE_CUDA_TESTS";

    /// Kinds of what a fatbin holds.
    const PTX: u16 = 1;
    const MACHINE_CODE: u16 = 2;

    /// What a fatbin holds: kinds, the compute capability each is for, and its bytes. `softgpu/src/fatbin.rs` says how.
    fn entries(fatbin: &[u8]) -> Vec<((u16, u32), &[u8])> {
        let number = |at: usize, len: usize| {
            fatbin[at..at + len].iter().rev().fold(0, |number, byte| number << 8 | usize::from(*byte))
        };
        let (mut at, mut found) = (number(6, 2), Vec::new());
        while at < fatbin.len() {
            let [header, len] = [number(at + 4, 4), number(at + 8, 8)];
            found.push(((number(at, 2) as u16, number(at + 28, 4) as u32), &fatbin[at + header..at + header + len]));
            at += header + len;
        }
        found
    }

    /// What is built without the assembler of CUDA 12 needs drivers from R580 on.
    #[test]
    fn kernels_are_machine_code_and_ptx_for_old_drivers() {
        if MIN_DRIVER != (12, 0) {
            assert!(std::env::var_os(REQUIRE_VARIABLE).is_none(), "drivers have to support CUDA {MIN_DRIVER:?}");
            return;
        }
        assert!(!IMAGES.is_empty());
        for (name, image) in IMAGES {
            let Image::Fatbin(fatbin) = image else { panic!("{name}.cu is embedded as source") };
            let entries = entries(fatbin);
            let kinds: Vec<(u16, u32)> = entries.iter().map(|(kind, _)| *kind).collect();
            let (wanted, version) = match name.ends_with("_sm90a") {
                true => (&[(MACHINE_CODE, 90), (PTX, 90)][..], ".version 8.0"),
                false => (&[(MACHINE_CODE, 80), (MACHINE_CODE, 90), (PTX, 80)][..], ".version 7.8"),
            };
            assert_eq!(kinds, wanted, "{name}.cu");
            let (ptx, codes) = entries.split_last().unwrap();
            for (_, code) in codes {
                assert!(code.starts_with(b"\x7fELF"), "{name}.cu");
            }
            assert!(String::from_utf8_lossy(ptx.1).lines().any(|line| line == version), "{name}.cu");
        }
    }
}
