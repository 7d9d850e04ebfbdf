//! The GPUs of this machine, in builds that can use them and in builds that cannot.

use std::fmt;
use std::path::Path;

use crate::Result;

/// The oldest devices that have the instructions the kernels are written in (Ampere: `mma.sync` on bf16, `cp.async`).
const MIN_COMPUTE_CAPABILITY: (i32, i32) = (8, 0);

/// What the device name of a software GPU contains, in small letters.
const SOFTWARE_GPU: [&str; 2] = ["softgpu", "software gpu"];

/// A device that the driver shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuInfo {
    /// Its number, as the driver counts.
    pub ordinal: usize,
    /// What it calls itself.
    pub name: String,
    /// Major and minor version of its instructions.
    pub compute_capability: (i32, i32),
    /// Its memory in bytes.
    pub memory_bytes: usize,
    /// Its multiprocessors.
    pub multiprocessors: usize,
    /// Major and minor version of CUDA that its driver supports.
    pub driver_version: (i32, i32),
}

impl GpuInfo {
    /// Whether it is the device that tests compute on: a program, not a GPU.
    pub fn is_software(&self) -> bool {
        let name = self.name.to_ascii_lowercase();
        SOFTWARE_GPU.iter().any(|known| name.contains(known))
    }

    /// Why the kernels cannot run on it, if they cannot.
    pub fn problem(&self) -> Option<String> {
        if self.compute_capability < MIN_COMPUTE_CAPABILITY {
            let (major, minor) = MIN_COMPUTE_CAPABILITY;
            return Some(format!("{self} is too old: the kernels need compute capability {major}.{minor}"));
        }
        self.driver_problem(min_driver())
    }

    /// What its driver lacks, if that is to support CUDA `wanted`.
    fn driver_problem(&self, wanted: (i32, i32)) -> Option<String> {
        let ((found_major, found_minor), (major, minor)) = (self.driver_version, wanted);
        (self.driver_version < wanted).then(|| {
            format!(
                "the driver of {self} supports CUDA {found_major}.{found_minor} and the kernels need {major}.{minor}: update \
                 it to {} or newer",
                needed_release(wanted)
            )
        })
    }
}

/// The first release of NVIDIA's driver that supports such a version of CUDA, of those that kernels are compiled for.
pub(super) fn needed_release(cuda: (i32, i32)) -> &'static str {
    if cuda < (13, 0) { "R525" } else { "R580" }
}

/// The version of CUDA that a driver has to support, as far as it is known when the program is built.
fn min_driver() -> (i32, i32) {
    #[cfg(feature = "cuda")]
    return super::cuda::MIN_DRIVER;
    #[cfg(not(feature = "cuda"))]
    return (0, 0);
}

impl fmt::Display for GpuInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = self.compute_capability;
        let gib = self.memory_bytes as f64 / f64::from(1 << 30);
        write!(f, "device {} ({}, {gib:.1} GiB, compute capability {major}.{minor})", self.ordinal, self.name)
    }
}

/// The GPUs of this machine, the software GPU included. An error says why there are none.
pub fn find_gpus() -> Result<Vec<GpuInfo>> {
    #[cfg(feature = "cuda")]
    return super::cuda::find_gpus();
    #[cfg(not(feature = "cuda"))]
    return Err(crate::Error::NotFound(
        "this build has no CUDA (it was built without the cargo feature \"cuda\")".into(),
    ));
}

/// How the kernels get onto a GPU. An error says what is missing.
pub fn kernel_source() -> Result<&'static str> {
    #[cfg(feature = "cuda")]
    return super::cuda::kernel_source();
    #[cfg(not(feature = "cuda"))]
    return Err(crate::unsupported!("this build has no CUDA kernels (cargo feature \"cuda\")"));
}

/// The version of cuBLASLt that products on this GPU would be computed by, from the file `library` or where the system's
/// loader finds it. An error says what is missing.
pub fn cublaslt_version(library: Option<&Path>, gpu: &GpuInfo) -> Result<String> {
    #[cfg(feature = "cuda")]
    return super::cuda::cublaslt_version(library, gpu.driver_version);
    #[cfg(not(feature = "cuda"))]
    {
        let _ = (library, gpu);
        Err(crate::unsupported!("this build has no CUDA (cargo feature \"cuda\")"))
    }
}

/// The version of candle-flash-attn that prefill attention would be computed by on any GPU. An error says what is missing.
pub fn flash_attention_version() -> Result<&'static str> {
    #[cfg(feature = "cuda")]
    return super::cuda::flash_attention_version();
    #[cfg(not(feature = "cuda"))]
    return Err(crate::unsupported!("this build has no CUDA (cargo feature \"cuda\")"));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(name: &str, compute_capability: (i32, i32)) -> GpuInfo {
        let driver_version = (13, 0);
        let (name, memory_bytes, multiprocessors) = (name.into(), 3 << 29, 108);
        GpuInfo { ordinal: 1, name, compute_capability, memory_bytes, multiprocessors, driver_version }
    }

    #[test]
    fn old_devices_are_refused_by_name() {
        assert_eq!(gpu("NVIDIA A100", (8, 0)).problem(), None);
        assert_eq!(gpu("NVIDIA H100", (9, 0)).problem(), None);
        let problem = gpu("Tesla V100", (7, 0)).problem().unwrap();
        assert!(problem.contains("device 1 (Tesla V100, 1.5 GiB, compute capability 7.0)"), "{problem}");
    }

    #[test]
    fn old_drivers_are_refused_by_what_they_lack() {
        let with_driver = |driver_version| GpuInfo { driver_version, ..gpu("NVIDIA A100", (8, 0)) };
        let problem = with_driver((11, 8)).driver_problem((12, 0)).unwrap();
        assert!(problem.contains("CUDA 11.8 and the kernels need 12.0: update it to R525"), "{problem}");
        let problem = with_driver((12, 9)).driver_problem((13, 0)).unwrap();
        assert!(problem.contains("CUDA 12.9 and the kernels need 13.0: update it to R580"), "{problem}");
        for (found, wanted) in [((12, 0), (12, 0)), ((13, 1), (12, 0)), ((13, 0), (13, 0)), ((11, 8), (0, 0))] {
            assert_eq!(with_driver(found).driver_problem(wanted), None);
        }
    }

    #[test]
    fn the_software_gpu_is_known_by_its_name() {
        assert!(gpu("mneme software GPU", (8, 0)).is_software());
        assert!(gpu("softgpu (software device for tests)", (8, 0)).is_software());
        assert!(!gpu("NVIDIA H100", (9, 0)).is_software());
    }
}
