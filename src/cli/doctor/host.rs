//! Processor, memory and system, from the files Linux shows them in. What another system does not tell is `None`.

use std::fs;
use std::num::NonZeroUsize;
use std::thread;

use serde::Serialize;

use crate::cli::engine_args::num_physical_cores;

/// The machine.
#[derive(Debug, Serialize)]
pub(super) struct Host {
    pub(super) os: String,
    pub(super) arch: &'static str,
    pub(super) kernel: Option<String>,
    pub(super) cpu_model: Option<String>,
    /// Hardware threads that this process may use.
    pub(super) num_logical_cores: usize,
    pub(super) num_physical_cores: usize,
    pub(super) memory: Memory,
    /// The chosen one of `always`, `madvise` and `never`.
    pub(super) transparent_huge_pages: Option<String>,
}

/// Main memory in bytes.
#[derive(Debug, Serialize)]
pub(super) struct Memory {
    pub(super) total_bytes: Option<u64>,
    pub(super) available_bytes: Option<u64>,
    /// Bound of this process's control group, when it has one.
    pub(super) cgroup_limit_bytes: Option<u64>,
}

impl Host {
    /// Looks around.
    pub(super) fn detect() -> Self {
        Self {
            os: os_name(&read("/etc/os-release")),
            arch: std::env::consts::ARCH,
            kernel: non_empty(read("/proc/sys/kernel/osrelease")),
            cpu_model: value_of(&read("/proc/cpuinfo"), "model name", ':'),
            num_logical_cores: thread::available_parallelism().map_or(1, NonZeroUsize::get),
            num_physical_cores: num_physical_cores(),
            memory: Memory::detect(),
            transparent_huge_pages: chosen(&read("/sys/kernel/mm/transparent_hugepage/enabled")),
        }
    }
}

impl Memory {
    fn detect() -> Self {
        let meminfo = read("/proc/meminfo");
        Self {
            total_bytes: kibibytes(&meminfo, "MemTotal"),
            available_bytes: kibibytes(&meminfo, "MemAvailable"),
            cgroup_limit_bytes: read("/sys/fs/cgroup/memory.max").trim().parse().ok(),
        }
    }
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn non_empty(text: String) -> Option<String> {
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

fn os_name(os_release: &str) -> String {
    let name = value_of(os_release, "PRETTY_NAME", '=').map(|name| name.trim_matches('"').to_owned());
    name.unwrap_or_else(|| std::env::consts::OS.to_owned())
}

/// The value of the first line `name SEPARATOR value`.
fn value_of(text: &str, name: &str, separator: char) -> Option<String> {
    let mut pairs = text.lines().filter_map(|line| line.split_once(separator));
    pairs.find(|(found, _)| found.trim() == name).and_then(|(_, value)| non_empty(value.to_owned()))
}

fn kibibytes(meminfo: &str, name: &str) -> Option<u64> {
    let value = value_of(meminfo, name, ':')?;
    value.strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// The word in brackets.
fn chosen(text: &str) -> Option<String> {
    let (_, rest) = text.split_once('[')?;
    rest.split_once(']').map(|(word, _)| word.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn system_files_are_read() {
        assert_eq!(os_name("NAME=x\nPRETTY_NAME=\"Some Linux 12\"\n"), "Some Linux 12");
        assert_eq!(os_name(""), std::env::consts::OS);
        assert_eq!(kibibytes("MemTotal:       2048 kB\nMemFree: 1 kB\n", "MemTotal"), Some(2 << 20));
        assert_eq!(kibibytes("MemTotal: lots\n", "MemTotal"), None);
        let cpuinfo = "processor\t: 0\nmodel name\t: Fast CPU @ 3 GHz\nmodel name\t: Other\n";
        assert_eq!(value_of(cpuinfo, "model name", ':').as_deref(), Some("Fast CPU @ 3 GHz"));
        assert_eq!(chosen("always [madvise] never\n").as_deref(), Some("madvise"));
        assert_eq!(chosen(""), None);
    }

    #[test]
    fn this_machine_has_cores() {
        let host = Host::detect();
        assert!(host.num_physical_cores >= 1 && host.num_physical_cores <= host.num_logical_cores);
    }
}
