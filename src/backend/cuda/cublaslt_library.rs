//! The cuBLASLt library: found at run time, its functions by their names, its answers as errors.
//!
//! The types are those that every version since 11 has.

#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::{Error, Result, unsupported};

/// Names of the library by the major version of CUDA that its driver has to support.
const NAMES: [(i32, &str); 2] = [(13, "libcublasLt.so.13"), (12, "libcublasLt.so.12")];

/// What to do about a library that cannot be used.
const ADVICE: &str = "install it (package libcublas-13-0, or nvidia-cublas from PyPI with its folder in LD_LIBRARY_PATH), \
                      name its file with --cublaslt-library, or leave --gemm exact";

/// An object of the library.
pub(super) type Handle = *mut c_void;

/// `cublasStatus_t`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub(super) struct Status(u32);

/// `cublasLtMatmulAlgo_t`: opaque, may be copied.
pub(super) type Algorithm = [u64; 8];

/// `cublasLtMatmulHeuristicResult_t`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct HeuristicResult {
    pub(super) algorithm: Algorithm,
    pub(super) workspace_bytes: usize,
    pub(super) state: u32,
    pub(super) waves: f32,
    pub(super) reserved: [c_int; 4],
}

/// `cudaDataType`, of the kinds of numbers there are here.
#[derive(Debug, Clone, Copy)]
#[repr(u32)]
pub(super) enum DataType {
    F32 = 0,
    F16 = 2,
    Bf16 = 14,
}

/// `CUBLAS_COMPUTE_32F`.
pub(super) const COMPUTE_F32: u32 = 68;

/// `CUBLASLT_MATMUL_DESC_TRANSA`, and `CUBLAS_OP_T`.
pub(super) const TRANSPOSE_A: u32 = 3;
pub(super) const TRANSPOSED: u32 = 1;

/// Attributes of `cublasLtMatmulPreference_t`; of the last, one each for A, B, C and D.
pub(super) const MOST_WORKSPACE: u32 = 1;
pub(super) const REDUCTION_SCHEMES: u32 = 3;
pub(super) const ALIGNMENTS: [u32; 4] = [5, 6, 7, 8];

/// `CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE`: parts of a sum are kept in f32 until they are added up.
pub(super) const IN_COMPUTE_TYPE: u32 = 2;

pub(super) type Create = unsafe extern "C" fn(*mut Handle) -> Status;
pub(super) type Destroy = unsafe extern "C" fn(Handle) -> Status;
type SetAttribute = unsafe extern "C" fn(Handle, u32, *const c_void, usize) -> Status;

/// Declares the table of functions, each with its name and type.
macro_rules! functions {
    ($($field:ident: $name:literal, $function:ty;)+) => {
        /// Functions of the library, which stays for good.
        #[derive(Clone, Copy)]
        pub(super) struct Library {
            $(pub(super) $field: $function,)+
        }

        impl Library {
            /// Finds all of them; an error is the name of one that there is not.
            ///
            /// # Safety
            /// `find` gives null, or the function of the name.
            unsafe fn resolve(find: impl Fn(&CStr) -> *mut c_void) -> std::result::Result<Self, &'static CStr> {
                Ok(Self {
                    $($field: match find($name) {
                        address if address.is_null() => return Err($name),
                        // SAFETY: the caller's promise; this is the function's type.
                        address => unsafe { std::mem::transmute::<*mut c_void, $function>(address) },
                    },)+
                })
            }
        }
    };
}

functions! {
    create: c"cublasLtCreate", Create;
    destroy: c"cublasLtDestroy", Destroy;
    version: c"cublasLtGetVersion", unsafe extern "C" fn() -> usize;
    create_operation: c"cublasLtMatmulDescCreate", unsafe extern "C" fn(*mut Handle, u32, DataType) -> Status;
    set_operation: c"cublasLtMatmulDescSetAttribute", SetAttribute;
    destroy_operation: c"cublasLtMatmulDescDestroy", Destroy;
    create_layout: c"cublasLtMatrixLayoutCreate",
        unsafe extern "C" fn(*mut Handle, DataType, u64, u64, i64) -> Status;
    destroy_layout: c"cublasLtMatrixLayoutDestroy", Destroy;
    create_preference: c"cublasLtMatmulPreferenceCreate", Create;
    set_preference: c"cublasLtMatmulPreferenceSetAttribute", SetAttribute;
    destroy_preference: c"cublasLtMatmulPreferenceDestroy", Destroy;
    // Library, operation, layouts of A, B, C and D, preference, results wanted, results, results found.
    heuristics: c"cublasLtMatmulAlgoGetHeuristic",
        unsafe extern "C" fn(
            Handle, Handle, Handle, Handle, Handle, Handle, Handle, c_int, *mut HeuristicResult, *mut c_int,
        ) -> Status;
    // Library, operation, alpha, A, B, beta, C, D with their layouts, algorithm, workspace and its bytes, stream.
    multiply: c"cublasLtMatmul",
        unsafe extern "C" fn(
            Handle, Handle, *const f32, u64, Handle, u64, Handle, *const f32, u64, Handle, u64, Handle,
            *const Algorithm, u64, usize, *mut c_void,
        ) -> Status;
}

impl Library {
    /// Loads the library from `path`, or under its own names, the newest that a driver for `driver_version` of CUDA takes.
    pub(super) fn load(path: Option<&Path>, driver_version: (i32, i32)) -> Result<Self> {
        let names: Vec<CString> = match path {
            Some(path) => vec![terminated(path.as_os_str().as_bytes())?],
            None => own_names(driver_version).map(|name| terminated(name.as_bytes())).collect::<Result<_>>()?,
        };
        let mut problems = Vec::new();
        for name in names {
            match open(&name) {
                Ok(library) => return Self::of(library, &name),
                Err(problem) => problems.push(problem),
            }
        }
        Err(Error::NotFound(format!("--gemm cublaslt wants cuBLASLt, and {}; {ADVICE}", problems.join(", "))))
    }

    /// Its version, as it counts.
    pub(super) fn version_number(&self) -> usize {
        // SAFETY: it takes nothing.
        unsafe { (self.version)() }
    }

    fn of(library: *mut c_void, name: &CStr) -> Result<Self> {
        // SAFETY: the library is loaded and never closed; the names are those of the functions.
        let resolved = unsafe { Self::resolve(|function| libc::dlsym(library, function.as_ptr())) };
        resolved.map_err(|missing| {
            let (name, missing) = (name.to_string_lossy(), missing.to_string_lossy());
            unsupported!("--gemm cublaslt wants cuBLASLt, and {name} has no {missing}: it is another library, or too old; {ADVICE}")
        })
    }
}

/// The version of the library that [`Library::load`] finds, as its packages have it.
pub(in crate::backend) fn cublaslt_version(path: Option<&Path>, driver_version: (i32, i32)) -> Result<String> {
    Ok(version_text(Library::load(path, driver_version)?.version_number()))
}

fn version_text(number: usize) -> String {
    format!("{}.{}.{}", number / 10_000, number / 100 % 100, number % 100)
}

fn own_names((major, _): (i32, i32)) -> impl Iterator<Item = &'static str> {
    NAMES.into_iter().filter(move |(wanted, _)| *wanted <= major).map(|(_, name)| name)
}

fn terminated(text: &[u8]) -> Result<CString> {
    CString::new(text).map_err(|_| Error::Invalid("a file name with a zero byte".into()))
}

/// Opens a library for good: it may have threads.
fn open(name: &CStr) -> std::result::Result<*mut c_void, String> {
    // SAFETY: the name ends in zero; initialisers of the library depend on nothing here.
    let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if !library.is_null() {
        return Ok(library);
    }
    // SAFETY: the loader's text of this thread's last failure, or null.
    let text: *const c_char = unsafe { libc::dlerror() };
    // SAFETY: not null, so it ends in zero.
    let text = (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned());
    Err(format!("{} cannot be loaded ({})", name.to_string_lossy(), text.unwrap_or_else(|| "no reason given".into())))
}

impl Status {
    /// Whether all went well.
    pub(super) fn is_success(self) -> bool {
        self.0 == 0
    }

    /// Whether the library does not know how to do what was asked.
    pub(super) fn is_unsupported(self) -> bool {
        self.0 == 15
    }

    /// Its error; `action` is what was being done.
    pub(super) fn check(self, action: &str) -> Result<()> {
        let name = match self.0 {
            0 => return Ok(()),
            1 => "NOT_INITIALIZED",
            3 => "ALLOC_FAILED",
            7 => "INVALID_VALUE",
            8 => "ARCH_MISMATCH",
            11 => "MAPPING_ERROR",
            13 => "EXECUTION_FAILED",
            14 => "INTERNAL_ERROR",
            15 => "NOT_SUPPORTED",
            other => return Err(Error::Device(format!("cuBLASLt cannot {action}: status {other}"))),
        };
        Err(Error::Device(format!("cuBLASLt cannot {action}: CUBLAS_STATUS_{name}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error_of(path: &str) -> String {
        Library::load(Some(Path::new(path)), (13, 0)).err().unwrap().to_string()
    }

    #[test]
    fn a_library_that_is_not_there_is_named() {
        let error = error_of("/nowhere/libcublasLt.so.13");
        assert!(error.contains("/nowhere/libcublasLt.so.13 cannot be loaded"), "{error}");
        assert!(error.contains("--cublaslt-library") && error.contains("--gemm exact"), "{error}");
    }

    #[test]
    fn another_library_is_not_taken_for_it() {
        let error = error_of("libc.so.6");
        assert!(error.contains("libc.so.6 has no cublasLtCreate") && error.contains("--gemm exact"), "{error}");
    }

    #[test]
    fn versions_are_those_of_packages() {
        assert_eq!([130_000, 120_905, 111_103].map(version_text), ["13.0.0", "12.9.5", "11.11.3"]);
    }

    #[test]
    fn a_driver_gets_no_newer_library_than_it_supports() {
        assert_eq!(own_names((13, 2)).collect::<Vec<_>>(), ["libcublasLt.so.13", "libcublasLt.so.12"]);
        assert_eq!(own_names((12, 4)).collect::<Vec<_>>(), ["libcublasLt.so.12"]);
    }
}
