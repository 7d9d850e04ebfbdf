//! Where the shared library is, for programs that want to load it.

use std::io;
use std::path::{Path, PathBuf};

/// Names under which programs look for the driver and for cuBLASLt.
const NAMES: [&str; 3] = ["libcuda.so.1", "libcuda.so", "libcublasLt.so.13"];

/// The built library: `SOFTGPU_LIBRARY`, or `libsoftgpu.so` beside the running program or in a folder above it (where cargo
/// puts it for tests of this crate and of crates that depend on it).
///
/// # Errors
/// No library found; the message says how to build it.
pub fn library_path() -> io::Result<PathBuf> {
    if let Some(path) = std::env::var_os("SOFTGPU_LIBRARY") {
        return Ok(path.into());
    }
    let program = std::env::current_exe()?;
    let found =
        program.ancestors().skip(1).take(3).map(|folder| folder.join("libsoftgpu.so")).find(|path| path.exists());
    found.ok_or_else(|| {
        let message = format!(
            "libsoftgpu.so is not beside {}: build it with `cargo build -p softgpu` or set SOFTGPU_LIBRARY",
            program.display()
        );
        io::Error::new(io::ErrorKind::NotFound, message)
    })
}

/// Makes `libcuda.so.1`, `libcuda.so` and `libcublasLt.so.13` in `folder`, links to [`library_path`]. A program started with `folder` first in
/// `LD_LIBRARY_PATH` finds the software device.
///
/// # Errors
/// No library, or the folder cannot be written.
pub fn link_into(folder: &Path) -> io::Result<()> {
    let library = library_path()?;
    std::fs::create_dir_all(folder)?;
    for name in NAMES {
        let link = folder.join(name);
        if link.symlink_metadata().is_ok() {
            std::fs::remove_file(&link)?;
        }
        std::os::unix::fs::symlink(&library, link)?;
    }
    Ok(())
}
