//! Python and pip, which fetch the models that have short names.

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;

/// How long `pip --version` may take, and how often it is looked at.
const PATIENCE: Duration = Duration::from_secs(15);
const POLL: Duration = Duration::from_millis(20);

/// The interpreter that downloads would use.
#[derive(Debug, Serialize)]
pub(super) struct Python {
    pub(super) interpreter: Option<PathBuf>,
    pub(super) has_pip: bool,
}

impl Python {
    /// Looks for the interpreter and asks it for pip.
    pub(super) fn detect() -> Self {
        let interpreter = find(&env::var_os("PATH").unwrap_or_default());
        let has_pip = interpreter.as_deref().is_some_and(|python| has_pip(python, PATIENCE));
        Self { interpreter, has_pip }
    }
}

/// The first `python3`, or else `python`, as downloads choose it.
fn find(search_path: &OsStr) -> Option<PathBuf> {
    let in_folders = |name| env::split_paths(search_path).map(move |folder| folder.join(name));
    let mut candidates = ["python3", "python"].into_iter().flat_map(in_folders);
    candidates.find(|path| path.is_absolute() && path.is_file())
}

fn has_pip(python: &Path, patience: Duration) -> bool {
    let mut command = Command::new(python);
    command.args(["-m", "pip", "--version"]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    // Python looks for modules in its current folder first.
    let Ok(mut child) = command.current_dir("/").spawn() else { return false };
    let started_at = Instant::now();
    while started_at.elapsed() < patience {
        match child.try_wait() {
            Ok(Some(status)) => return status.success(),
            Ok(None) => thread::sleep(POLL),
            Err(_) => break,
        }
    }
    // Both fail only when the child has already ended.
    let _ = child.kill();
    let _ = child.wait();
    false
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn script(folder: &Path, name: &str, text: &str) -> PathBuf {
        let path = folder.join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn python3_goes_before_python() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(find(folder.path().as_os_str()), None);
        let python = script(folder.path(), "python", "");
        assert_eq!(find(folder.path().as_os_str()), Some(python));
        let python3 = script(folder.path(), "python3", "");
        assert_eq!(find(folder.path().as_os_str()), Some(python3));
    }

    #[test]
    fn pip_is_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let with = script(folder.path(), "with", "test \"$*\" = \"-m pip --version\"");
        let without = script(folder.path(), "without", "exit 1");
        let stuck = script(folder.path(), "stuck", "exec tail -f /dev/null");
        assert!(has_pip(&with, PATIENCE));
        assert!(!has_pip(&without, PATIENCE));
        assert!(!has_pip(&stuck, Duration::ZERO));
        assert!(!has_pip(&folder.path().join("none"), PATIENCE));
    }
}
