//! The software GPU in place of the driver, for the test programs that compute on it.
//!
//! Cargo builds its library beside the test programs. Loading it by its path before anything asks for the driver is
//! enough: the system's loader then finds it under the driver's name.
//!
//! A program built without compiled kernels, on a machine without NVRTC, has nothing to test: it says so and ends.

#![allow(unsafe_code)]

use std::ffi::{CString, c_char};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use mneme::backend::cuda::CudaBackend;
use mneme::backend::{DType, find_gpus, kernel_source};
use serde_json::Value;

/// Names another library than the one Cargo built: a build with other options, or the driver of a real GPU.
const LIBRARY_VARIABLE: &str = "MNEME_TEST_LIBCUDA";

/// Set where the kernels must be there: a run without them then fails.
const REQUIRE_VARIABLE: &str = "MNEME_REQUIRE_CUDA_TESTS";

/// Names the file for what every kernel did.
const REPORT_VARIABLE: &str = "SOFTGPU_REPORT";

/// Set in the process of a test that makes the device fail.
const ALONE_VARIABLE: &str = "MNEME_TEST_ALONE";

/// Orders blocks and warps.
const SEED_VARIABLE: &str = "SOFTGPU_SEED";
const LAZY: (&str, &str) = ("lazy", "1");
const SCHEDULES: [(&str, &str); 2] = [LAZY, ("eager", "2")];

/// What the device says it is.
const CAPABILITY_VARIABLE: &str = "SOFTGPU_COMPUTE_CAPABILITY";
const HOPPER: &str = "9.0";

/// The library that stands for the driver.
pub fn library() -> PathBuf {
    if let Some(path) = std::env::var_os(LIBRARY_VARIABLE) {
        return path.into();
    }
    let program = std::env::current_exe().unwrap();
    program.parent().unwrap().join("libsoftgpu.so")
}

/// A new backend on the software GPU, or on the GPU whose driver was named, for a KV cache of `dtype`: activations are of
/// the same type, beside fp8 of bf16.
pub fn backend(dtype: DType) -> CudaBackend {
    load();
    CudaBackend::new(0, if dtype == DType::F8E4M3 { DType::BF16 } else { dtype }).unwrap()
}

/// The same with products by cuBLASLt: that of the software GPU, or beside a driver that was named NVIDIA's, if it is there.
pub fn fast_backend(dtype: DType) -> Option<CudaBackend> {
    let exact = backend(dtype);
    if !is_replaced() {
        return Some(exact.with_cublaslt(Some(&library())).unwrap());
    }
    exact.with_cublaslt(None).inspect_err(|error| eprintln!("skipped: {error}")).ok()
}

/// The same with prompts by candle-flash-attn, where a driver was named whose device can run it.
#[cfg(feature = "flash-attn")]
pub fn flash_backend(dtype: DType) -> Option<CudaBackend> {
    is_replaced().then(|| backend(dtype).with_flash_attention().unwrap())
}

/// How often cuBLASLt was asked for algorithms, and for products, since the program began.
pub fn cublaslt_counts() -> [u64; 2] {
    let [mut asked, mut queued] = [0; 2];
    let ask = |ask: &unsafe extern "C" fn(*mut u64, *mut u64) -> u32| {
        // SAFETY: pointers to locals.
        unsafe { ask(&mut asked, &mut queued) }
    };
    // SAFETY: the function's type.
    unsafe { tell("softgpu_cublaslt_counts", ask) };
    [asked, queued]
}

/// Whether another library was named in its place, perhaps the driver of a GPU, which reports nothing.
pub fn is_replaced() -> bool {
    std::env::var_os(LIBRARY_VARIABLE).is_some()
}

/// Has the software GPU run copies to the device only when so many more kernels have been launched.
pub fn hold_copies(num_launches: u64) {
    // SAFETY: the function's type.
    unsafe { tell::<unsafe extern "C" fn(u64) -> u32>("softgpu_hold_copies", |hold| hold(num_launches)) };
}

/// Has calls of the driver fail as `softgpu/README.md` says, until it is told otherwise.
pub fn fail(rules: &str) {
    let rules = CString::new(rules).unwrap();
    // SAFETY: the function's type, and a text that ends in zero.
    unsafe { tell::<unsafe extern "C" fn(*const c_char) -> u32>("softgpu_fail", |fail| fail(rules.as_ptr())) };
}

/// Has the device forget what it failed with.
pub fn revive() {
    fail("");
    // SAFETY: the function's type.
    unsafe { tell::<unsafe extern "C" fn() -> u32>("softgpu_clear_error", |clear| clear()) };
}

/// Runs the ignored test `name` in a process whose driver is `library`, where it has to pass.
pub fn pass_with(name: &str, library: &Path) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([name, "--exact", "--ignored", "--nocapture"]).env(LIBRARY_VARIABLE, library);
    let output = command.output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    assert!(output.status.success() && text.contains("1 passed"), "{name}: {text}");
}

/// Has copies stand still on streams without kernels, or go on.
pub fn stall_copies(is_stalled: bool) {
    // SAFETY: the function's type.
    unsafe { tell::<unsafe extern "C" fn(u32) -> u32>("softgpu_stall_copies", |stall| stall(u32::from(is_stalled))) };
}

/// Lets there be so many bytes of page-locked memory in all.
pub fn limit_pinned(bytes: u64) {
    // SAFETY: the function's type.
    unsafe { tell::<unsafe extern "C" fn(u64) -> u32>("softgpu_limit_pinned", |limit| limit(bytes)) };
}

/// Bytes of page-locked memory that there are.
pub fn pinned_bytes() -> u64 {
    let mut bytes = 0;
    // SAFETY: the function's type, and a pointer to a local.
    unsafe { tell::<unsafe extern "C" fn(*mut u64) -> u32>("softgpu_pinned_bytes", |ask| ask(&mut bytes)) };
    bytes
}

/// Calls a function that the software GPU alone has.
///
/// # Safety
/// `F` is its type.
unsafe fn tell<F>(name: &str, call: impl FnOnce(&F) -> u32) {
    load();
    if is_replaced() {
        return;
    }
    // SAFETY: the library is loaded already; the caller's promise.
    let code = unsafe {
        let library = Library::open(Some(library()), RTLD_NOW).unwrap();
        call(&library.get::<F>(name.as_bytes()).unwrap())
    };
    assert_eq!(code, 0);
}

/// Whether this process is test `name`'s alone, which makes the device fail: other tests must not be in it. Otherwise the
/// test is run in such a process, and has to pass there.
pub fn is_alone(name: &str) -> bool {
    if std::env::var_os(ALONE_VARIABLE).is_some() {
        return true;
    }
    end_without_kernels();
    if is_replaced() {
        return false;
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    let output = command.args([name, "--exact", "--nocapture"]).env(ALONE_VARIABLE, "1").output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    assert!(output.status.success() && text.contains("1 passed"), "{name}: {text}");
    false
}

/// Loads the library, once.
fn load() {
    static LOADED: OnceLock<()> = OnceLock::new();
    LOADED.get_or_init(|| {
        end_without_kernels();
        let path = library();
        // SAFETY: the library has no initialisers that depend on anything, and it stays for good.
        let library = unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) };
        std::mem::forget(library.unwrap_or_else(|error| panic!("cannot load {}: {error}", path.display())));
        let gpus = find_gpus().unwrap();
        let is_expected = gpus[0].is_software() || std::env::var_os(LIBRARY_VARIABLE).is_some();
        assert!(is_expected, "the driver of {} was found before the software GPU", gpus[0]);
    });
}

/// Runs the tests of this program whose names contain one of `wanted` but not `skipped` again, in other schedules of the
/// software GPU: how it orders what may run in any order is decided when it is loaded.
pub fn pass_in_other_schedules(wanted: &[&str], skipped: &str) {
    SCHEDULES.into_iter().for_each(|schedule| pass_in(schedule, wanted, skipped));
}

/// The same in the one of these in which work runs only when somebody waits for it.
pub fn pass_lazily(wanted: &[&str], skipped: &str) {
    pass_in(LAZY, wanted, skipped);
}

fn pass_in((streams, seed): (&str, &str), wanted: &[&str], skipped: &str) {
    pass_with_variables(&[("SOFTGPU_STREAMS", streams), (SEED_VARIABLE, seed)], wanted, &["--skip", skipped]);
}

/// Runs those tests on a software GPU of Hopper's compute capability; in that run it does nothing.
pub fn pass_on_hopper(wanted: &[&str]) {
    if !is_hopper() {
        pass_with_variables(&[(CAPABILITY_VARIABLE, HOPPER)], wanted, &[]);
    }
}

/// Whether the software GPU is.
pub fn is_hopper() -> bool {
    std::env::var(CAPABILITY_VARIABLE).is_ok_and(|capability| capability == HOPPER)
}

fn pass_with_variables(variables: &[(&str, &str)], wanted: &[&str], options: &[&str]) {
    if std::env::var_os(SEED_VARIABLE).is_some() || std::env::var_os(LIBRARY_VARIABLE).is_some() {
        return;
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(wanted).args(options).envs(variables.iter().copied());
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    // What the device found stands there.
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "with {variables:?}: {text}\n{errors}");
    for name in wanted {
        let is_run = text.lines().any(|line| line.starts_with("test ") && line.contains(name));
        assert!(is_run, "no test is called {name}");
    }
}

/// What each kernel does in `work`, as the software GPU counts it: it counts for a whole program, so this program runs
/// `test`, the one that calls, again and alone. `None` in that run, and where nobody counts.
pub fn count(test: &str, work: impl FnOnce()) -> Option<Value> {
    load();
    if std::env::var_os(REPORT_VARIABLE).is_some() {
        work();
        return None;
    }
    if std::env::var_os(SEED_VARIABLE).is_some() || std::env::var_os(LIBRARY_VARIABLE).is_some() {
        return None;
    }
    let report = tempfile::NamedTempFile::new().unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    let output = command.args(["--exact", test]).env(REPORT_VARIABLE, report.path()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{test}: {text}");
    Some(serde_json::from_slice(&std::fs::read(report.path()).unwrap()).unwrap())
}

/// Ends the program when there are no kernels. The message goes past the capture of test output.
pub fn end_without_kernels() {
    let Err(error) = kernel_source() else { return };
    assert!(std::env::var_os(REQUIRE_VARIABLE).is_none(), "{REQUIRE_VARIABLE} is set, but {error}");
    let program = std::env::args().next().unwrap_or_default();
    let message = format!("\nskipped: every test of {program}, because {error}\n");
    std::io::stderr().write_all(message.as_bytes()).unwrap();
    std::process::exit(0);
}
