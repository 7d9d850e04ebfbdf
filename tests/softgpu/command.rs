//! The program itself: which device it takes, and what it says about it.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

use crate::support::random::Random;
use crate::support::softgpu;
use crate::support::tiny_model::{Family, TinyModel};

/// A folder in which the loader finds the software GPU under the names of the driver and of cuBLASLt.
pub(crate) fn driver_folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["libcuda.so.1", "libcublasLt.so.13"] {
        std::os::unix::fs::symlink(softgpu::library(), folder.path().join(name)).unwrap();
    }
    folder
}

pub(crate) fn mneme(arguments: &[&str], library_path: &Path) -> Output {
    mneme_with(arguments, library_path, &[])
}

/// The same with other variables set.
pub(crate) fn mneme_with(arguments: &[&str], library_path: &Path, variables: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mneme"));
    command.envs(variables.iter().copied());
    command.args(arguments).env("LD_LIBRARY_PATH", library_path).env_remove("MNEME_DEVICE").env("MNEME_LOG", "info");
    command.env_remove("MNEME_CUBLASLT_LIBRARY");
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
fn the_doctor_says_which_cublaslt_there_is() {
    softgpu::end_without_kernels();
    if softgpu::is_replaced() {
        return;
    }
    let folder = driver_folder();
    let cuda = &doctor(folder.path())["cuda"];
    assert_eq!((&cuda["cublaslt_version"], &cuda["cublaslt_problem"]), (&"13.0.0".into(), &Value::Null));
    let said = |folder: &Path| String::from_utf8(mneme(&["doctor"], folder).stdout).unwrap();
    let line = |text: &str| text.lines().find(|line| line.starts_with("cuBLASLt")).map(str::to_owned);
    assert!(line(&said(folder.path())).is_some_and(|line| line.contains(" 13.0.0; --gemm cublaslt ")));
    // A file of that name that is no library stands before any that the system may have.
    for name in ["libcublasLt.so.13", "libcublasLt.so.12"] {
        std::fs::remove_file(folder.path().join(name)).ok();
        std::fs::write(folder.path().join(name), "no library").unwrap();
    }
    let line = line(&said(folder.path())).unwrap();
    assert!(line.contains("libcublasLt.so.13 cannot be loaded") && line.contains("--cublaslt-library"), "{line}");
    assert_eq!(doctor(folder.path())["cuda"]["cublaslt_version"], Value::Null);
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

/// What is said where attention by another library cannot be.
#[test]
fn flash_attention_is_refused_with_reasons() {
    softgpu::end_without_kernels();
    let folder = driver_folder();
    let model = TinyModel::new(Family::Llama, 1).write();
    let path = model.path().to_str().unwrap();
    let mut cases = vec![
        (["--device", "cpu", "--no-enable-prefix-caching"], "leave --prefill-attention paged"),
        (["--device", "softgpu", "--deterministic"], "leave one of them"),
    ];
    if cfg!(not(feature = "flash-attn")) {
        let not_built = "cargo build --release --features flash-attn";
        cases.push((["--device", "softgpu", "--no-enable-prefix-caching"], not_built));
        let found = doctor(folder.path())["cuda"]["flash_attention_problem"].clone();
        assert!(softgpu::is_replaced() || found.as_str().is_some_and(|text| text.contains(not_built)), "{found}");
    }
    for (arguments, wanted) in cases {
        let arguments = [&["bench", "latency", path, "--prefill-attention", "flash-attn"], &arguments[..]].concat();
        let output = mneme(&arguments, folder.path());
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && text.contains(wanted), "{arguments:?}: {text}");
    }
}

/// What is said where the fast products cannot be.
#[test]
fn fast_products_are_refused_with_reasons() {
    softgpu::end_without_kernels();
    let folder = driver_folder();
    let model = TinyModel::new(Family::Llama, 1).write();
    let path = model.path().to_str().unwrap();
    for (arguments, wanted) in [
        (["--device", "cpu", "--no-enable-prefix-caching"], "leave --gemm exact"),
        (["--device", "softgpu", "--deterministic"], "leave one of them"),
        (["--device", "softgpu", "--cublaslt-library=/nowhere/it.so"], "/nowhere/it.so cannot be loaded"),
        (["--device", "softgpu", "--cublaslt-library=libc.so.6"], "has no cublasLtCreate"),
    ] {
        let arguments = [&["bench", "latency", path, "--gemm", "cublaslt"], arguments.as_slice()].concat();
        let output = mneme(&arguments, folder.path());
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && text.contains(wanted), "{arguments:?}: {text}");
    }
}

/// Every product is measured twice.
#[test]
fn kernels_are_compared_with_cublaslt() {
    softgpu::end_without_kernels();
    if softgpu::is_replaced() {
        return;
    }
    let folder = driver_folder();
    let sizes = ["--shape", "tiny", "--batch-size", "2", "--num-tokens", "8", "--context-len", "16"];
    let arguments = [&["bench", "kernels", "--device", "softgpu", "--json"], sizes.as_slice()].concat();
    let output = mneme(&arguments, folder.path());
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let kernels = report["kernels"].as_array().unwrap();
    let shapes = |library: &str| -> Vec<&Value> {
        let of_library = |kernel: &&Value| kernel["kernel"].as_str().unwrap().starts_with(library);
        kernels.iter().filter(of_library).map(|kernel| &kernel["shape"]).collect()
    };
    assert_eq!(shapes("linear ").len(), 15);
    assert_eq!(shapes("cublaslt "), shapes("linear "));
}
