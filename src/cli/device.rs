//! Which device computes: what was asked for, what there is, and why.

use std::fmt;
use std::str::FromStr;

use mneme::backend::{GpuInfo, find_gpus, kernel_source};

/// The value of `--device`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DeviceArg {
    /// The first GPU that can be used, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// The GPU of this number.
    Cuda(usize),
    /// The software GPU, which only tests are meant to use.
    SoftGpu,
}

/// Where the model will run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Chosen {
    /// On the CPU, with the reason when a GPU might have been expected, and whether a driver says that there is one.
    Cpu { reason: Option<String>, has_gpu: bool },
    /// On this GPU.
    Gpu(GpuInfo),
}

impl FromStr for DeviceArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "auto" => Ok(DeviceArg::Auto),
            None if text == "cpu" => Ok(DeviceArg::Cpu),
            None if text == "cuda" => Ok(DeviceArg::Cuda(0)),
            None if text == "softgpu" => Ok(DeviceArg::SoftGpu),
            Some(("cuda", ordinal)) if ordinal.parse::<u16>().is_ok() => {
                Ok(DeviceArg::Cuda(ordinal.parse().map_err(|_| ordinal.to_owned())?))
            }
            _ => Err(format!("{text:?} is no device; auto, cpu, cuda, cuda:N and softgpu are")),
        }
    }
}

impl fmt::Display for DeviceArg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceArg::Auto => f.write_str("auto"),
            DeviceArg::Cpu => f.write_str("cpu"),
            DeviceArg::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
            DeviceArg::SoftGpu => f.write_str("softgpu"),
        }
    }
}

impl DeviceArg {
    /// Looks at this machine and decides.
    pub(crate) fn choose(self) -> anyhow::Result<Chosen> {
        match self {
            DeviceArg::Cpu => Ok(Chosen::Cpu { reason: None, has_gpu: false }),
            _ => self.choose_among(find_gpus(), kernel_source()),
        }
    }

    /// Decides among what the driver shows; `kernels` says whether there are kernels to run on it.
    fn choose_among(
        self,
        gpus: mneme::Result<Vec<GpuInfo>>,
        kernels: mneme::Result<&'static str>,
    ) -> anyhow::Result<Chosen> {
        if self == DeviceArg::Auto {
            return Ok(match gpus {
                Ok(gpus) => first_usable(&gpus, kernels),
                Err(error) => without_gpu(&error, !matches!(error, mneme::Error::NotFound(_))),
            });
        }
        let found = self.find(&gpus.map_err(|error| anyhow::anyhow!("--device {self}: {error}"))?)?;
        kernels.map_err(|error| anyhow::anyhow!("--device {self}: {error}"))?;
        match found.problem() {
            Some(problem) => anyhow::bail!("--device {self}: {problem}"),
            None => Ok(Chosen::Gpu(found)),
        }
    }

    /// The GPU that was named.
    fn find(self, gpus: &[GpuInfo]) -> anyhow::Result<GpuInfo> {
        match self {
            DeviceArg::Cuda(ordinal) => match gpus.iter().find(|gpu| gpu.ordinal == ordinal) {
                Some(gpu) if gpu.is_software() => anyhow::bail!(
                    "--device {self}: {gpu} is a program for tests, thousands of times slower than a GPU; \
                     --device softgpu uses it all the same"
                ),
                Some(gpu) => Ok(gpu.clone()),
                None => anyhow::bail!("--device {self}: the driver shows only {}", list(gpus)),
            },
            _ => match gpus.iter().find(|gpu| gpu.is_software()) {
                Some(gpu) => Ok(gpu.clone()),
                None => anyhow::bail!(
                    "--device {self}: the software GPU's libcuda.so.1 is not the driver that was found, which shows \
                     {}; build it with `cargo build --release -p softgpu` and put its folder into LD_LIBRARY_PATH",
                    list(gpus)
                ),
            },
        }
    }
}

/// The first real GPU the kernels can run on, or the CPU and why.
fn first_usable(gpus: &[GpuInfo], kernels: mneme::Result<&'static str>) -> Chosen {
    let real = || gpus.iter().filter(|gpu| !gpu.is_software());
    let problems: Vec<String> = real().filter_map(GpuInfo::problem).collect();
    match (real().find(|gpu| gpu.problem().is_none()), kernels) {
        (Some(gpu), Ok(_)) => Chosen::Gpu(gpu.clone()),
        (Some(_), Err(error)) => without_gpu(&error, true),
        (None, _) if problems.is_empty() => {
            without_gpu(&"the driver found is the software GPU, which only --device softgpu uses", false)
        }
        (None, _) => without_gpu(&problems.join("; "), true),
    }
}

fn without_gpu(reason: &dyn fmt::Display, has_gpu: bool) -> Chosen {
    Chosen::Cpu { reason: Some(reason.to_string()), has_gpu }
}

fn list(gpus: &[GpuInfo]) -> String {
    gpus.iter().map(GpuInfo::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(ordinal: usize, name: &str, major: i32) -> GpuInfo {
        GpuInfo {
            ordinal,
            name: name.into(),
            compute_capability: (major, 0),
            memory_bytes: 1 << 34,
            multiprocessors: 108,
            driver_version: (13, 0),
        }
    }

    fn choose(device: DeviceArg, gpus: &[GpuInfo]) -> Result<Chosen, String> {
        device.choose_among(Ok(gpus.to_vec()), Ok("")).map_err(|error| error.to_string())
    }

    #[test]
    fn devices_have_names() {
        for text in ["auto", "cpu", "cuda:0", "cuda:3", "softgpu"] {
            assert_eq!(text.parse::<DeviceArg>().unwrap().to_string(), text);
        }
        assert_eq!("cuda".parse(), Ok(DeviceArg::Cuda(0)));
        for text in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0"] {
            assert!(text.parse::<DeviceArg>().unwrap_err().contains("cuda:N"), "{text}");
        }
    }

    #[test]
    fn auto_takes_the_first_gpu_that_can_be_used() {
        let (old, new) = (gpu(0, "Tesla V100", 7), gpu(1, "NVIDIA H100", 9));
        assert_eq!(choose(DeviceArg::Auto, &[old.clone(), new.clone()]), Ok(Chosen::Gpu(new)));
        let Ok(Chosen::Cpu { reason: Some(reason), has_gpu: true }) = choose(DeviceArg::Auto, &[old]) else { panic!() };
        assert!(reason.contains("Tesla V100") && reason.contains("too old"), "{reason}");
    }

    #[test]
    fn auto_falls_back_to_the_cpu_and_says_why() {
        let missing = || Err(mneme::Error::NotFound("no driver here".into()));
        let reason = |chosen: anyhow::Result<Chosen>| match chosen {
            Ok(Chosen::Cpu { reason: Some(reason), has_gpu }) => (reason, has_gpu),
            other => panic!("{other:?}"),
        };
        assert_eq!(reason(DeviceArg::Auto.choose_among(missing(), Ok(""))), ("no driver here".into(), false));
        let old = Err(mneme::Error::Unsupported("an old driver".into()));
        assert_eq!(reason(DeviceArg::Auto.choose_among(old, Ok(""))), ("an old driver".into(), true));
        let gpus = Ok(vec![gpu(0, "NVIDIA H100", 9)]);
        let kernels = Err(mneme::Error::NotFound("no kernels here".into()));
        assert_eq!(reason(DeviceArg::Auto.choose_among(gpus, kernels)), ("no kernels here".into(), true));
        assert!(DeviceArg::Cuda(0).choose_among(missing(), Ok("")).unwrap_err().to_string().contains("no driver here"));
    }

    #[test]
    fn the_software_gpu_is_used_only_when_asked_for() {
        let soft = [gpu(0, "mneme software GPU", 8)];
        assert_eq!(choose(DeviceArg::SoftGpu, &soft), Ok(Chosen::Gpu(soft[0].clone())));
        assert!(choose(DeviceArg::Cuda(0), &soft).unwrap_err().contains("--device softgpu"));
        let Ok(Chosen::Cpu { reason: Some(reason), has_gpu: false }) = choose(DeviceArg::Auto, &soft) else { panic!() };
        assert!(reason.contains("software GPU"), "{reason}");
        let real = [gpu(0, "NVIDIA H100", 9)];
        assert!(choose(DeviceArg::SoftGpu, &real).unwrap_err().contains("LD_LIBRARY_PATH"));
        assert!(choose(DeviceArg::Cuda(1), &real).unwrap_err().contains("NVIDIA H100"));
    }
}
