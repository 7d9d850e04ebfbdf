//! Compiles `kernels/*.cu` when it finds nvcc, and embeds what the program needs to run them on a GPU.
//!
//! Writes `kernels.rs` into `OUT_DIR`: `IMAGES` names every kernel file with its fatbin or, when there is no nvcc, with
//! its source for NVRTC. nvcc is looked for in `MNEME_NVCC`, on the `PATH`, in `CUDA_HOME` and in `target/nvcc`
//! (`kernels/install-nvcc`). One that `MNEME_NVCC` names must work; another that does not is reported and left alone.
//! `MNEME_NVCC=none` embeds sources.
//!
//! Kernels that nvcc 13 assembles need a driver of that version. Where the assembler of CUDA 12 lies beside nvcc, as
//! `ptxas-12`, it assembles the same PTX for older drivers, and the PTX that is embedded says that it is older: the kernels
//! use nothing that is new. `MIN_DRIVER` is the CUDA version that a driver then has to support.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs, thread};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// What a kernel file is compiled for: the instructions it may use, and the machine code made of them.
struct Target {
    ptx: &'static str,
    code: &'static [&'static str],
    /// The version of PTX that the oldest driver of CUDA 12 reads and that has the instructions.
    old_ptx: &'static str,
}

const EVERYWHERE: Target = Target { ptx: "80", code: &["80", "90"], old_ptx: ".version 7.8" };

/// Hopper's own instructions, which no other GPU has: files whose names end in `_sm90a`.
const HOPPER: Target = Target { ptx: "90a", code: &["90a"], old_ptx: ".version 8.0" };

impl Target {
    fn of(source: &Path) -> &'static Self {
        let is_hopper = source.file_stem().and_then(|name| name.to_str()).is_some_and(|name| name.ends_with("_sm90a"));
        if is_hopper { &HOPPER } else { &EVERYWHERE }
    }
}

/// A kernel that spills registers is an error.
const GATES: [&str; 4] = ["-Werror", "all-warnings", "-Xptxas", "-warn-spills,-warn-lmem-usage,-Werror"];

/// CUDA versions that a driver supports: what machine code and PTX of nvcc 13 want, and those of `ptxas-12` (R525).
const NEW_DRIVER: (i32, i32) = (13, 0);
const OLD_DRIVER: (i32, i32) = (12, 0);

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

/// What assembles kernels for older drivers.
struct Assembler {
    ptxas: PathBuf,
    fatbinary: PathBuf,
}

impl Assembler {
    /// Both programs lie beside nvcc, or there is none.
    fn beside(nvcc: &Path) -> Option<Self> {
        let beside = |name: &str| Some(nvcc.with_file_name(name)).filter(|path| path.is_file());
        Some(Self { ptxas: beside("ptxas-12")?, fatbinary: beside("fatbinary")? })
    }
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
    // What NVRTC needs is its own matter.
    let (mut fatbins, mut min_driver) = (None, (0, 0));
    if let Some(compiler) = find_compiler(&root)? {
        println!("cargo:rerun-if-changed={}", compiler.nvcc.display());
        let assembler = Assembler::beside(&compiler.nvcc);
        fatbins = match compile_all(&compiler.nvcc, assembler.as_ref(), &sources, &out) {
            Err(error) if compiler.is_named => return Err(error),
            Err(error) => {
                println!("cargo:warning=kernels are embedded as sources: {}", error.to_string().replace('\n', " | "));
                None
            }
            Ok(fatbins) => {
                min_driver = if assembler.is_some() { OLD_DRIVER } else { NEW_DRIVER };
                Some(fatbins)
            }
        };
    }
    let entries = match fatbins {
        Some(fatbins) => fatbins.iter().map(|path| entry(path, "Fatbin(include_bytes")).collect::<Result<String>>()?,
        None => embed_sources(&sources, &headers(&root.join("kernels"))?, &out)?,
    };
    let driver = format!(
        "/// The CUDA version that a driver has to support; 0 where NVRTC decides it.\n\
         pub(in crate::backend) const MIN_DRIVER: (i32, i32) = {min_driver:?};\n"
    );
    Ok(fs::write(out.join("kernels.rs"), format!("{HEADER}{entries}];\n\n{driver}"))?)
}

/// All `.cu` files in order of name; tells cargo to watch them and what they include.
fn kernel_sources(directory: &Path) -> Result<Vec<PathBuf>> {
    for path in headers(directory)?.iter().chain(&files(directory, "cu")?) {
        println!("cargo:rerun-if-changed={}", path.display());
    }
    files(directory, "cu")
}

fn headers(directory: &Path) -> Result<Vec<PathBuf>> {
    files(directory, "cuh")
}

/// Those with an extension, in order of name.
fn files(directory: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let files = fs::read_dir(directory)?.map(|entry| entry.map(|entry| entry.path()));
    let mut files = files.collect::<std::io::Result<Vec<_>>>()?;
    files.retain(|path| path.extension().is_some_and(|found| found == extension));
    files.sort();
    Ok(files)
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
fn compile_all<'a>(
    nvcc: &'a Path,
    assembler: Option<&'a Assembler>,
    sources: &'a [PathBuf],
    out: &'a Path,
) -> Result<Vec<PathBuf>> {
    thread::scope(|scope| {
        let compile = move |source: &'a PathBuf| match assembler {
            Some(assembler) => compile_for_older_drivers(nvcc, assembler, source, out),
            None => compile(nvcc, source, out),
        };
        let spawn = |source: &'a PathBuf| scope.spawn(move || compile(source));
        let running: Vec<_> = sources.iter().map(spawn).collect();
        running.into_iter().map(|thread| thread.join().map_err(|_| "compiling a kernel panicked")?).collect()
    })
}

/// Line numbers more than double a fatbin; programs that are debugged have them.
fn line_numbers() -> &'static [&'static str] {
    if env::var("PROFILE").is_ok_and(|profile| profile == "debug") { &["-lineinfo"] } else { &[] }
}

fn compile(nvcc: &Path, source: &Path, out: &Path) -> Result<PathBuf> {
    let fatbin = out.join(source.file_name().unwrap_or_default()).with_extension("fatbin");
    let Target { ptx, code, .. } = Target::of(source);
    let codes: String = code.iter().map(|code| format!(",sm_{code}")).collect();
    // Uncompressed, so that the PTX can be read where no driver is; one pass of the front end serves all targets.
    let target = format!("-gencode=arch=compute_{ptx},code=[compute_{ptx}{codes}]");
    let command_line =
        [&["-std=c++17", "-O3", "-no-compress", "-fatbin", &target][..], &GATES, line_numbers()].concat();
    run(Command::new(nvcc).args(command_line).arg("-o").arg(&fatbin).arg(source), source)?;
    Ok(fatbin)
}

/// nvcc makes the PTX, the older assembler what a device runs.
fn compile_for_older_drivers(nvcc: &Path, assembler: &Assembler, source: &Path, out: &Path) -> Result<PathBuf> {
    let at = |extension: &str| out.join(source.file_name().unwrap_or_default()).with_extension(extension);
    let (ptx, fatbin) = (at("ptx"), at("fatbin"));
    let target = Target::of(source);
    let instructions = format!("-arch=compute_{}", target.ptx);
    let to_ptx = [&["-std=c++17", "-O3", "-ptx", &instructions, GATES[0], GATES[1]][..], line_numbers()].concat();
    run(Command::new(nvcc).args(to_ptx).arg("-o").arg(&ptx).arg(source), source)?;
    fs::write(&ptx, with_version(target.old_ptx, &fs::read_to_string(&ptx)?)?)?;
    let mut pack = Command::new(&assembler.fatbinary);
    pack.args(["-64", "-compress=false", "--create"]).arg(&fatbin);
    for architecture in target.code {
        let cubin = at(&format!("sm_{architecture}.cubin"));
        let gates = ["-O3", "-warn-spills", "-warn-lmem-usage", "-Werror"];
        let mut assemble = Command::new(&assembler.ptxas);
        assemble.arg(format!("-arch=sm_{architecture}")).args(gates).args(line_numbers());
        run(assemble.arg("-o").arg(&cubin).arg(&ptx), source)?;
        pack.arg(format!("--image3=kind=elf,sm={architecture},file={}", cubin.display()));
    }
    pack.arg(format!("--image3=kind=ptx,sm={},file={}", target.ptx, ptx.display()));
    run(&mut pack, source)?;
    Ok(fatbin)
}

fn with_version(wanted: &str, ptx: &str) -> Result<String> {
    let is_version = |line: &&str| line.starts_with(".version ");
    let version = ptx.lines().find(is_version).ok_or("nvcc wrote PTX without a version")?;
    Ok(ptx.replacen(version, wanted, 1))
}

fn run(command: &mut Command, source: &Path) -> Result<()> {
    let program = PathBuf::from(command.get_program());
    let output = command.output().map_err(|error| format!("cannot run {}: {error}", program.display()))?;
    match output.status.success() {
        true => Ok(()),
        false => {
            let said = String::from_utf8_lossy(&output.stderr);
            Err(format!("{} cannot compile {}:\n{said}", program.display(), source.display()).into())
        }
    }
}

/// Writes the sources with headers in the place of their inclusion: NVRTC has no include path.
fn embed_sources(sources: &[PathBuf], headers: &[PathBuf], out: &Path) -> Result<String> {
    let mut entries = String::new();
    for source in sources {
        let mut whole = fs::read_to_string(source)?;
        for header in headers {
            let inclusion = format!("#include \"{}\"", header.file_name().unwrap_or_default().display());
            whole = whole.replace(&inclusion, &fs::read_to_string(header)?);
        }
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
