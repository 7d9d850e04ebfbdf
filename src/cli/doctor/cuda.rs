//! Whether an NVIDIA driver is installed, by the name of its library. Nothing is loaded.

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use serde::Serialize;

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
    /// Whether this program can compute on it.
    pub(super) is_used: bool,
}

impl Cuda {
    /// Looks for the library.
    pub(super) fn detect() -> Self {
        let search_path = env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
        Self { driver_library: find(&search_path, &FOLDERS), is_used: false }
    }
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
