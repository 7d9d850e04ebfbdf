//! What there is of CUDA: the driver's library, the devices it shows, the kernels of this build, and what follows.

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use mneme::backend::{GpuInfo, cublaslt_version, find_gpus, flash_attention_version, kernel_source};
use serde::Serialize;

use crate::cli::device::{Chosen, DeviceArg};

/// The driver's library.
pub(super) const LIBRARY: &str = "libcuda.so.1";

/// Where loaders and distributions keep it.
const FOLDERS: [&str; 12] = [
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/lib/x86_64-linux-gnu",
    "/usr/lib64",
    "/usr/lib",
    "/lib64",
    "/usr/local/nvidia/lib64",
    "/usr/local/nvidia/lib",
    "/usr/local/cuda/compat",
    "/usr/lib/wsl/lib",
    "/run/opengl-driver/lib",
    "/opt/cuda/lib64",
];

/// What there is of CUDA.
#[derive(Debug, Serialize)]
pub(super) struct Cuda {
    pub(super) driver_library: Option<PathBuf>,
    /// The version of CUDA that it supports.
    pub(super) driver_version: Option<String>,
    /// What the driver shows, and what is wrong with it.
    pub(super) devices: Vec<String>,
    /// Where the kernels come from, or what they lack.
    pub(super) kernels: String,
    /// The version of the library of `--gemm cublaslt`, where there is a GPU.
    pub(super) cublaslt_version: Option<String>,
    /// Why there is a GPU and no such library.
    pub(super) cublaslt_problem: Option<String>,
    /// The version of the library of `--prefill-attention flash-attn`, where there is a GPU.
    pub(super) flash_attention_version: Option<&'static str>,
    /// Why there is a GPU and no such library.
    pub(super) flash_attention_problem: Option<String>,
    /// The device that `--device auto` takes; `None` is the CPU.
    pub(super) chosen: Option<String>,
    /// Why it is the CPU.
    pub(super) problem: Option<String>,
}

impl Cuda {
    /// Looks for the library, and asks it.
    pub(super) fn detect() -> Self {
        let search_path = env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
        let (chosen, problem) = match DeviceArg::Auto.choose() {
            Ok(Chosen::Gpu(gpu)) => (Some(gpu.to_string()), None),
            Ok(Chosen::Cpu { reason, .. }) => (None, reason),
            Err(error) => (None, Some(error.to_string())),
        };
        let gpus = find_gpus().unwrap_or_default();
        let cublaslt = gpus.first().map(find_cublaslt);
        let flash_attention = gpus.first().map(|_| flash_attention_version().map_err(|error| error.to_string()));
        Self {
            driver_library: find(&search_path, &FOLDERS),
            driver_version: gpus.first().map(|gpu| format!("{}.{}", gpu.driver_version.0, gpu.driver_version.1)),
            devices: gpus.iter().map(|gpu| gpu.problem().unwrap_or_else(|| gpu.to_string())).collect(),
            kernels: kernel_source().map_or_else(|error| error.to_string(), str::to_owned),
            cublaslt_version: cublaslt.as_ref().and_then(|found| found.clone().ok()),
            cublaslt_problem: cublaslt.and_then(Result::err),
            flash_attention_version: flash_attention.as_ref().and_then(|found| found.clone().ok()),
            flash_attention_problem: flash_attention.and_then(Result::err),
            chosen,
            problem,
        }
    }
}

/// The version of what a server would load.
fn find_cublaslt(gpu: &GpuInfo) -> Result<String, String> {
    let named = env::var_os("MNEME_CUBLASLT_LIBRARY").filter(|path| !path.is_empty());
    cublaslt_version(named.as_deref().map(Path::new), gpu).map_err(|error| error.to_string())
}

fn find(search_path: &OsStr, folders: &[&str]) -> Option<PathBuf> {
    let own = env::split_paths(search_path).filter(|folder| folder.is_absolute());
    let mut candidates = own.chain(folders.iter().map(PathBuf::from)).map(|folder| folder.join(LIBRARY));
    candidates.find(|path| Path::is_file(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_search_path_comes_first() {
        let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let folders = [second.path().to_str().unwrap()];
        let search_path = first.path().as_os_str();
        assert_eq!(find(search_path, &folders), None);
        std::fs::write(second.path().join(LIBRARY), "").unwrap();
        assert_eq!(find(search_path, &folders), Some(second.path().join(LIBRARY)));
        std::fs::write(first.path().join(LIBRARY), "").unwrap();
        assert_eq!(find(search_path, &folders), Some(first.path().join(LIBRARY)));
    }
}
