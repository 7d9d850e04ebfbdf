//! The program itself: which device it takes, and what it says about it.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

use crate::support::random::Random;
use crate::support::softgpu;
use crate::support::tiny_model::{Family, TinyModel};

/// A folder in which the loader finds the software GPU under the driver's name.
pub(crate) fn driver_folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(softgpu::library(), folder.path().join("libcuda.so.1")).unwrap();
    folder
}

pub(crate) fn mneme(arguments: &[&str], library_path: &Path) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mneme"));
    command.args(arguments).env("LD_LIBRARY_PATH", library_path).env_remove("MNEME_DEVICE").env("MNEME_LOG", "info");
    command.output().unwrap()
}

pub(crate) fn doctor(library_path: &Path) -> Value {
    serde_json::from_slice(&mneme(&["doctor", "--json"], library_path).stdout).unwrap()
}

#[test]
fn the_doctor_says_what_computes_and_why() {
    softgpu::end_without_kernels();
    let empty = tempfile::tempdir().unwrap();
    let cuda = &doctor(empty.path())["cuda"];
    // Where there is a driver, it is used or the reason says why not.
    assert!(cuda["chosen"].is_string() != cuda["problem"].is_string(), "{cuda}");
    let folder = driver_folder();
    let cuda = &doctor(folder.path())["cuda"];
    assert_eq!(cuda["devices"].as_array().unwrap().len(), 1, "{cuda}");
    assert_eq!(cuda["chosen"], Value::Null);
    assert!(cuda["problem"].as_str().unwrap().contains("--device softgpu"), "{cuda}");
    let text = String::from_utf8(mneme(&["doctor"], folder.path()).stdout).unwrap();
    assert!(text.lines().any(|line| line.starts_with("computes on") && line.contains("--device softgpu")), "{text}");
}

#[test]
fn the_software_gpu_has_to_be_asked_for() {
    softgpu::end_without_kernels();
    let (folder, empty) = (driver_folder(), tempfile::tempdir().unwrap());
    let model = TinyModel::new(Family::Llama, Random::new(1).next()).write();
    let path = model.path().to_str().unwrap();
    let mut cases = vec![
        ("cuda", folder.path(), "--device softgpu uses it all the same"),
        ("cuda:7", folder.path(), "the driver shows only"),
        ("softgpu", empty.path(), "softgpu"),
    ];
    if doctor(empty.path())["cuda"]["devices"].as_array().unwrap().is_empty() {
        cases.push(("cuda", empty.path(), "--device cuda:0: "));
    }
    for (device, library_path, wanted) in cases {
        let output = mneme(&["bench", "latency", path, "--device", device], library_path);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && text.contains(wanted), "--device {device}: {text}");
    }
}
