//! Compiles `kernels/*.cu` when it finds nvcc, and embeds what the program needs to run them on a GPU.
//!
//! Writes `kernels.rs` into `OUT_DIR`: `IMAGES` names every kernel file with its fatbin or, when there is no nvcc, with
//! its source for NVRTC. nvcc is looked for in `MNEME_NVCC`, on the `PATH`, in `CUDA_HOME` and in `target/nvcc`
//! (`kernels/install-nvcc`). One that `MNEME_NVCC` names must work; another that does not is reported and left alone.
//! `MNEME_NVCC=none` embeds sources.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs, thread};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Uncompressed, so that the PTX can be read where no driver is; one pass of the front end serves all targets.
const TARGETS: [&str; 4] = ["-no-compress", "-fatbin", "-gencode", "arch=compute_80,code=[compute_80,sm_80,sm_90]"];

/// A kernel that spills registers is an error.
const GATES: [&str; 4] = ["-Werror", "all-warnings", "-Xptxas", "-warn-spills,-warn-lmem-usage,-Werror"];

const HEADER: &str = "/// A kernel file as it was embedded.
#[allow(dead_code)]
pub(super) enum Image {
    /// Compiled by nvcc.
    Fatbin(&'static [u8]),
    /// To be compiled by NVRTC.
    Source(&'static str),
}

/// Kernel files by name.
pub(super) const IMAGES: &[(&str, Image)] = &[
";

struct Compiler {
    nvcc: PathBuf,
    is_named: bool,
}

fn main() -> Result<()> {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(env::var("OUT_DIR")?);
    println!("cargo:rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return Ok(());
    }
    let sources = kernel_sources(&root.join("kernels"))?;
    for variable in ["MNEME_NVCC", "CUDA_HOME"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    let mut fatbins = None;
    if let Some(compiler) = find_compiler(&root)? {
        println!("cargo:rerun-if-changed={}", compiler.nvcc.display());
        fatbins = match compile_all(&compiler.nvcc, &sources, &out) {
            Err(error) if compiler.is_named => return Err(error),
            Err(error) => {
                println!("cargo:warning=kernels are embedded as sources: {}", error.to_string().replace('\n', " | "));
                None
            }
            Ok(fatbins) => Some(fatbins),
        };
    }
    let entries = match fatbins {
        Some(fatbins) => fatbins.iter().map(|path| entry(path, "Fatbin(include_bytes")).collect::<Result<String>>()?,
        None => embed_sources(&sources, &root.join("kernels/common.cuh"), &out)?,
    };
    Ok(fs::write(out.join("kernels.rs"), format!("{HEADER}{entries}];\n"))?)
}

/// All `.cu` files in order of name; tells cargo to watch them.
fn kernel_sources(directory: &Path) -> Result<Vec<PathBuf>> {
    println!("cargo:rerun-if-changed={}", directory.join("common.cuh").display());
    let files = fs::read_dir(directory)?.map(|entry| entry.map(|entry| entry.path()));
    let mut sources = files.collect::<std::io::Result<Vec<_>>>()?;
    sources.retain(|path| path.extension().is_some_and(|extension| extension == "cu"));
    sources.sort();
    sources.iter().for_each(|path| println!("cargo:rerun-if-changed={}", path.display()));
    Ok(sources)
}

fn find_compiler(root: &Path) -> Result<Option<Compiler>> {
    match env::var_os("MNEME_NVCC") {
        Some(value) if value == "none" => return Ok(None),
        Some(value) if Path::new(&value).is_file() => {
            return Ok(Some(Compiler { nvcc: value.into(), is_named: true }));
        }
        Some(value) => return Err(format!("MNEME_NVCC names no file: {}", value.display()).into()),
        None => {}
    }
    let on_path = env::var_os("PATH").map(|path| env::split_paths(&path).collect::<Vec<_>>()).unwrap_or_default();
    let toolkit = env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin"));
    let found = on_path.into_iter().chain(toolkit).chain([root.join("target/nvcc/bin")]);
    let nvcc = found.map(|directory| directory.join("nvcc")).find(|nvcc| nvcc.is_file());
    Ok(nvcc.map(|nvcc| Compiler { nvcc, is_named: false }))
}

/// Compiles every source, all at a time: two of them take most of it.
fn compile_all<'a>(nvcc: &'a Path, sources: &'a [PathBuf], out: &'a Path) -> Result<Vec<PathBuf>> {
    thread::scope(|scope| {
        let spawn = |source: &'a PathBuf| scope.spawn(move || compile(nvcc, source, out));
        let running: Vec<_> = sources.iter().map(spawn).collect();
        running.into_iter().map(|thread| thread.join().map_err(|_| "compiling a kernel panicked")?).collect()
    })
}

fn compile(nvcc: &Path, source: &Path, out: &Path) -> Result<PathBuf> {
    let fatbin = out.join(source.file_name().unwrap_or_default()).with_extension("fatbin");
    // Line numbers more than double a fatbin; programs that are debugged have them.
    let lines = if env::var("PROFILE").is_ok_and(|profile| profile == "debug") { &["-lineinfo"][..] } else { &[] };
    let command_line = [&["-std=c++17", "-O3"][..], &TARGETS, &GATES, lines].concat();
    let output = Command::new(nvcc).args(command_line).arg("-o").arg(&fatbin).arg(source).output();
    let output = output.map_err(|error| format!("cannot run {}: {error}", nvcc.display()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{} cannot compile {}:\n{said}", nvcc.display(), source.display()).into());
    }
    Ok(fatbin)
}

/// Writes the sources with `common.cuh` in the place of its inclusion: NVRTC has no include path.
fn embed_sources(sources: &[PathBuf], common: &Path, out: &Path) -> Result<String> {
    let common = fs::read_to_string(common)?;
    let mut entries = String::new();
    for source in sources {
        let whole = fs::read_to_string(source)?.replace("#include \"common.cuh\"", &common);
        let path = out.join(source.file_name().unwrap_or_default());
        fs::write(&path, whole)?;
        entries += &entry(&path, "Source(include_str")?;
    }
    Ok(entries)
}

fn entry(path: &Path, embed: &str) -> Result<String> {
    let name = path.file_stem().and_then(|name| name.to_str()).ok_or("kernel files have names in UTF-8")?;
    Ok(format!("    ({name:?}, Image::{embed}!({:?}))),\n", path.display().to_string()))
}
