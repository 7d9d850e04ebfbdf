//! The report as data and as text.

use std::env;
use std::fmt;
use std::path::PathBuf;

use mneme::backend::cpu::Isa;
use mneme::hub::{Cache, CachedModel, catalog};
use serde::Serialize;

use super::cuda::{self, Cuda};
use super::host::Host;
use super::python::Python;

/// Variables that change where models come from and where they run.
const VARIABLES: [&str; 10] = [
    "MNEME_MODEL",
    "MNEME_DEVICE",
    "MNEME_GEMM",
    "MNEME_CUBLASLT_LIBRARY",
    "MNEME_PREFILL_ATTENTION",
    "MNEME_CACHE_DIR",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "HF_HOME",
    "HF_HUB_CACHE",
];

/// All that was found.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    version: &'static str,
    host: Host,
    isa: IsaChoice,
    /// Threads that compute unless `--threads` says otherwise.
    num_threads: usize,
    cuda: Cuda,
    cache: CacheReport,
    python: Python,
    /// Those that are set.
    variables: Vec<(&'static str, String)>,
}

/// Instruction sets of the kernels.
#[derive(Debug, Serialize)]
struct IsaChoice {
    available: Vec<String>,
    unavailable: Vec<String>,
    /// What `MNEME_ISA` asks for.
    requested: Option<String>,
    chosen: Option<String>,
    /// Why none was chosen.
    problem: Option<String>,
}

/// The model cache.
#[derive(Debug, Default, Serialize)]
struct CacheReport {
    root: Option<PathBuf>,
    models: Vec<CachedModel>,
    /// Why it could not be read.
    problem: Option<String>,
}

impl Report {
    /// Looks at this machine.
    pub(super) fn of_this_machine() -> Self {
        let host = Host::detect();
        let set = |name| Some((name, without_credentials(&env::var_os(name)?.to_string_lossy())));
        Self {
            version: env!("CARGO_PKG_VERSION"),
            isa: IsaChoice::new(env::var("MNEME_ISA").ok().filter(|name| !name.is_empty())),
            num_threads: host.num_physical_cores,
            host,
            cuda: Cuda::detect(),
            cache: CacheReport::read(),
            python: Python::detect(),
            variables: VARIABLES.into_iter().filter_map(set).collect(),
        }
    }
}

impl IsaChoice {
    fn new(requested: Option<String>) -> Self {
        let names = |is_available| {
            Isa::ALL.into_iter().filter(|isa| isa.is_available() == is_available).map(|isa| isa.to_string()).collect()
        };
        let (chosen, problem) = match requested.as_deref().map(str::parse::<Isa>) {
            None => (Some(Isa::best().to_string()), None),
            Some(Ok(isa)) if isa.is_available() => (Some(isa.to_string()), None),
            Some(Ok(isa)) => (None, Some(format!("MNEME_ISA asks for {isa}, which this processor does not have"))),
            Some(Err(error)) => (None, Some(format!("MNEME_ISA: {error}"))),
        };
        Self { available: names(true), unavailable: names(false), requested, chosen, problem }
    }
}

impl CacheReport {
    fn read() -> Self {
        let cache = match Cache::from_env() {
            Ok(cache) => cache,
            Err(error) => return Self { problem: Some(error.to_string()), ..Self::default() },
        };
        let root = Some(cache.root().to_path_buf());
        match cache.list() {
            Ok(models) => Self { root, models, problem: None },
            Err(error) => Self { root, models: Vec::new(), problem: Some(error.to_string()) },
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        line(f, "mneme", self.version)?;
        self.write_host(f)?;
        self.write_compute(f)?;
        self.write_models(f)?;
        for (name, value) in &self.variables {
            line(f, name, value)?;
        }
        Ok(())
    }
}

impl Report {
    fn write_host(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = &self.host;
        let kernel = host.kernel.as_deref().map_or_else(String::new, |kernel| format!(", kernel {kernel}"));
        line(f, "system", &format!("{} ({}){kernel}", host.os, host.arch))?;
        line(f, "processor", host.cpu_model.as_deref().unwrap_or("unknown"))?;
        line(f, "cores", &format!("{} physical, {} logical", host.num_physical_cores, host.num_logical_cores))?;
        let (total, available) = (size(host.memory.total_bytes), size(host.memory.available_bytes));
        line(f, "memory", &format!("{total} in all, {available} available"))?;
        if let Some(limit) = host.memory.cgroup_limit_bytes {
            line(f, "memory limit", &format!("{} for this control group", size(Some(limit))))?;
        }
        line(f, "huge pages", host.transparent_huge_pages.as_deref().unwrap_or("unknown"))
    }

    fn write_compute(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let isa = &self.isa;
        line(f, "kernels for", &isa.available.join(", "))?;
        if !isa.unavailable.is_empty() {
            line(f, "not here", &isa.unavailable.join(", "))?;
        }
        match (&isa.chosen, &isa.problem) {
            (_, Some(problem)) => line(f, "problem", problem)?,
            (Some(chosen), None) => {
                let reason = if isa.requested.is_some() { " (MNEME_ISA)" } else { "" };
                line(f, "will use", &format!("{chosen}{reason} on {} threads", self.num_threads))?;
            }
            (None, None) => {}
        }
        self.write_cuda(f)
    }

    fn write_cuda(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cuda = &self.cuda;
        let driver = match &cuda.driver_library {
            Some(path) => format!("driver library {} found: {}", cuda::LIBRARY, path.display()),
            None => format!("driver library {} not found", cuda::LIBRARY),
        };
        line(f, "CUDA", &driver)?;
        if let Some(version) = &cuda.driver_version {
            line(f, "driver", &format!("supports CUDA {version}"))?;
        }
        for device in &cuda.devices {
            line(f, "GPU", device)?;
        }
        line(f, "GPU kernels", &cuda.kernels)?;
        match (&cuda.cublaslt_version, &cuda.cublaslt_problem) {
            (Some(version), _) => line(f, "cuBLASLt", &format!("{version}; --gemm cublaslt multiplies by it"))?,
            (None, Some(problem)) => line(f, "cuBLASLt", problem)?,
            (None, None) => {}
        }
        match (&cuda.flash_attention_version, &cuda.flash_attention_problem) {
            (Some(version), _) => {
                line(f, "flash-attn", &format!("{version}; --prefill-attention flash-attn attends by it"))?
            }
            (None, Some(problem)) => line(f, "flash-attn", problem)?,
            (None, None) => {}
        }
        match (&cuda.chosen, &cuda.problem) {
            (Some(gpu), _) => {
                line(f, "computes on", &format!("CUDA {gpu}; --device cpu overrides"))?;
                line(f, "GPU weights", "bf16; quantised ones stay quantised; --dtype bf16 unpacks them")
            }
            (None, Some(problem)) => line(f, "computes on", &format!("the CPU: {problem}")),
            (None, None) => line(f, "computes on", "the CPU"),
        }
    }

    fn write_models(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cache = &self.cache;
        if let Some(root) = &cache.root {
            line(f, "model cache", &root.display().to_string())?;
        }
        if let Some(problem) = &cache.problem {
            line(f, "problem", problem)?;
        }
        for model in &cache.models {
            line(f, "model", &format!("{} ({})", model.name, size(Some(model.size_bytes))))?;
        }
        if cache.models.is_empty() {
            line(f, "models", &format!("none; mneme pull fetches {}", catalog::DEFAULT_MODEL))?;
        }
        line(f, "python", &self.python_text())
    }

    fn python_text(&self) -> String {
        match (&self.python.interpreter, self.python.has_pip) {
            (Some(python), true) => format!("{} with pip", python.display()),
            (Some(python), false) => format!(
                "{} without pip, which fetches models with short names (on Debian: apt install python3-pip)",
                python.display()
            ),
            (None, _) => "none; python3 and pip fetch models with short names (on Debian: apt install python3 \
                          python3-pip)"
                .to_owned(),
        }
    }
}

/// Reports are shown to others; a URL may have a name and a password in it.
fn without_credentials(value: &str) -> String {
    let Some((scheme, rest)) = value.split_once("://") else { return value.to_owned() };
    let authority = rest.split('/').next().unwrap_or_default();
    match authority.rfind('@') {
        Some(at) => format!("{scheme}://***{}", &rest[at..]),
        None => value.to_owned(),
    }
}

fn line(f: &mut fmt::Formatter<'_>, label: &str, value: &str) -> fmt::Result {
    writeln!(f, "{label:<16}{value}")
}

fn size(bytes: Option<u64>) -> String {
    match bytes {
        None => "unknown".to_owned(),
        Some(bytes) if bytes < 1 << 30 => format!("{} MiB", bytes >> 20),
        Some(bytes) => format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_names_this_machines_instruction_set() {
        let mut report = Report::of_this_machine();
        report.isa = IsaChoice::new(None);
        let text = report.to_string();
        let wanted = format!("{} on {} threads", Isa::best(), report.num_threads);
        assert!(text.lines().any(|line| line.starts_with("will use") && line.ends_with(&wanted)), "{text}");
        for isa in Isa::available() {
            assert!(text.contains(&isa.to_string()), "{text}");
        }
        assert!(text.lines().any(|line| line.starts_with("computes on")), "{text}");
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["isa"]["chosen"], Isa::best().to_string());
    }

    #[test]
    fn a_wrong_choice_is_shown() {
        let portable = IsaChoice::new(Some("portable".into()));
        assert_eq!((portable.chosen.as_deref(), portable.problem), (Some("portable"), None));
        let mut report = Report::of_this_machine();
        report.isa = IsaChoice::new(Some("sse9".into()));
        assert!(report.isa.chosen.is_none());
        assert!(report.to_string().contains("sse9"), "{report}");
    }

    #[test]
    fn credentials_are_hidden() {
        assert_eq!(without_credentials("https://me:secret@hub.local/a@b"), "https://***@hub.local/a@b");
        assert_eq!(without_credentials("https://hub.local/a@b"), "https://hub.local/a@b");
        assert_eq!(without_credentials("/cache/me@home"), "/cache/me@home");
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(size(Some(3 << 20)), "3 MiB");
        assert_eq!(size(Some(3 << 29)), "1.5 GiB");
        assert_eq!(size(None), "unknown");
    }
}
