//! The few functions of cuBLASLt that matrix products in 16 bits need. Programs find them in `libcublasLt.so.13`, a link to
//! this library ([`crate::library::link_into`]).
//!
//! Each follows the manual of its function, and is stricter where a program could get away with more: an algorithm is good
//! for the shape that it was asked for, and for pointers aligned as was said then. What is not here is
//! `CUBLAS_STATUS_NOT_SUPPORTED`, with a message.

// Names and signatures are the library's; the manual documents them and their safety.
#![allow(non_snake_case, missing_docs, clippy::missing_safety_doc, clippy::too_many_arguments)]

use crate::device::device;
use crate::driver::context::need;
use crate::driver::{exports, put, refuse};
use crate::product::{Matrix, Numbers, Product};
use crate::work::Work;
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// `cublasStatus_t`.
const NOT_INITIALIZED: u32 = 1;
const INVALID_VALUE: u32 = 7;
const EXECUTION_FAILED: u32 = 13;
const NOT_SUPPORTED: u32 = 15;

/// What `cublasLtGetVersion` says.
const VERSION: usize = 130_000;

/// `CUBLAS_COMPUTE_32F`, and `CUDA_R_32F`, the type of factors.
const COMPUTE_F32: u32 = 68;
const F32: u32 = 0;

/// `cublasLtMatmulDescAttributes_t`.
const TRANSPOSE_A: u32 = 3;
const TRANSPOSE_B: u32 = 4;

/// Others that may be set to what they are: C is not transposed, and nothing comes behind the product.
const GIVEN: [(u32, u32); 2] = [(5, 0), (7, 1)];

/// `cublasLtMatmulPreferenceAttributes_t`: of the last, one each for A, B, C and D.
const MOST_WORKSPACE: u32 = 1;
const REDUCTION_SCHEMES: u32 = 3;
const ALIGNMENTS: [u32; 4] = [5, 6, 7, 8];

/// Sums of parts are kept as what computes: `CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE`.
const IN_COMPUTE_TYPE: u32 = 2;

/// The first word of an algorithm.
const MAGIC: u64 = 0x736f_6674_6770_7531;

/// Algorithms that there are for a shape.
const NUM_ALGORITHMS: u64 = 3;

/// `cublasLtMatmulAlgo_t`: [`MAGIC`], parts, m, n, k, promised alignments, bytes of workspace.
type Algorithm = [u64; 8];

/// `cublasLtMatmulHeuristicResult_t`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct HeuristicResult {
    pub algorithm: Algorithm,
    pub workspace_bytes: usize,
    pub state: u32,
    pub waves: f32,
    pub reserved: [i32; 4],
}

/// What a handle stands for.
#[derive(Clone, Copy)]
enum Object {
    Library,
    Operation { transposes: [u32; 2] },
    Layout(Matrix),
    Preference(Preference),
}

/// What an algorithm may rely on and use.
#[derive(Clone, Copy)]
struct Preference {
    most_workspace: u64,
    reduction_schemes: u32,
    /// Of A, B, C and D.
    alignments: [u32; 4],
}

/// A product by its matrices.
#[derive(Clone, Copy)]
struct Problem {
    a: Matrix,
    b: Matrix,
    d: Matrix,
}

static OBJECTS: Mutex<Option<HashMap<usize, Object>>> = Mutex::new(None);

/// Calls that asked for algorithms, and that queued a product, since the start.
static NUM_HEURISTICS: AtomicU64 = AtomicU64::new(0);
static NUM_PRODUCTS: AtomicU64 = AtomicU64::new(0);

fn with<T>(f: impl FnOnce(&mut HashMap<usize, Object>) -> T) -> T {
    f(OBJECTS.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert_default())
}

/// Calls of `cublasLtMatmulAlgoGetHeuristic` and of `cublasLtMatmul` that went well.
pub fn counts() -> [u64; 2] {
    [NUM_HEURISTICS.load(Relaxed), NUM_PRODUCTS.load(Relaxed)]
}

/// Objects of the library that have not been destroyed.
pub fn num_objects() -> usize {
    with(|objects| objects.len())
}

/// # Safety
/// As for [`put`].
unsafe fn create(target: *mut usize, object: Object) -> Result<(), u32> {
    let handle = device().new_handle();
    with(|objects| objects.insert(handle, object));
    // SAFETY: the caller's promise.
    unsafe { put(target, handle) }.map_err(|_| INVALID_VALUE)
}

fn destroy(handle: usize) -> Result<(), u32> {
    with(|objects| objects.remove(&handle)).map(drop).ok_or(INVALID_VALUE)
}

fn find<T>(handle: usize, pick: impl FnOnce(Object) -> Option<T>) -> Result<T, u32> {
    with(|objects| objects.get(&handle).copied()).and_then(pick).ok_or(INVALID_VALUE)
}

fn layout(handle: usize) -> Result<Matrix, u32> {
    find(handle, |object| if let Object::Layout(matrix) = object { Some(matrix) } else { None })
}

fn need_library(handle: usize) -> Result<(), u32> {
    find(handle, |object| matches!(object, Object::Library).then_some(())).map_err(|_| NOT_INITIALIZED)
}

/// An attribute of `N` bytes.
///
/// # Safety
/// The buffer is null or has `bytes` bytes.
unsafe fn attribute<const N: usize>(buffer: *const c_void, bytes: usize) -> Result<[u8; N], u32> {
    if buffer.is_null() || bytes != N {
        return refuse(INVALID_VALUE, &format!("an attribute of {N} bytes is given as {bytes}"));
    }
    // SAFETY: the caller's promise.
    Ok(unsafe { buffer.cast::<[u8; N]>().read() })
}

fn numbers(data_type: u32) -> Result<Numbers, u32> {
    match data_type {
        0 => Ok(Numbers::F32),
        2 => Ok(Numbers::F16),
        14 => Ok(Numbers::Bf16),
        other => refuse(NOT_SUPPORTED, &format!("there are no products of numbers of cudaDataType {other} here")),
    }
}

impl Problem {
    /// The product of these layouts, if it is one.
    fn new(operation: usize, [a, b, c, d]: [usize; 4]) -> Result<Self, u32> {
        let transposes = find(operation, |object| match object {
            Object::Operation { transposes } => Some(transposes),
            _ => None,
        })?;
        let (a, b, c, d) = (layout(a)?, layout(b)?, layout(c)?, layout(d)?);
        if transposes != [1, 0] {
            return refuse(NOT_SUPPORTED, "products are of a transposed A and a B as it is");
        }
        let fits = a.rows == b.rows && (d.rows, d.columns) == (a.columns, b.columns) && c == d;
        if !fits {
            return refuse(INVALID_VALUE, &format!("A {a:?}, B {b:?}, C {c:?} and D {d:?} are no product"));
        }
        let is_known =
            a.numbers != Numbers::F32 && a.numbers == b.numbers && [a.numbers, Numbers::F32].contains(&d.numbers);
        match is_known {
            true => Ok(Self { a, b, d }),
            false => refuse(NOT_SUPPORTED, "products are of f16 or bf16, into the same or f32"),
        }
    }

    fn shape(&self) -> [u64; 3] {
        [self.d.rows, self.d.columns, self.a.rows]
    }

    /// Algorithm number `index`, one with fewer parts when they do not fit into the workspace.
    fn algorithm(&self, index: u64, preference: &Preference) -> Algorithm {
        let [m, n, k] = self.shape();
        let wanted = 2 + (n + index) % NUM_ALGORITHMS;
        let bytes = |num_parts: u64| (num_parts - 1) * m * n * 4;
        let splits = preference.reduction_schemes & IN_COMPUTE_TYPE != 0;
        let fitting = (1..=wanted).rev().find(|parts| splits && bytes(*parts) <= preference.most_workspace);
        let num_parts = fitting.unwrap_or(1);
        let [a, b, _, d] = preference.alignments.map(u64::from);
        [MAGIC, num_parts, m, n, k, a | b << 16 | d << 32, bytes(num_parts), 0]
    }

    /// An error unless the algorithm is for this product, and the pointers are as it was promised.
    fn check(&self, algorithm: &Algorithm, pointers: [u64; 3], workspace: (u64, u64)) -> Result<(), u32> {
        let [magic, _, m, n, k, promised, wanted, _] = *algorithm;
        if magic != MAGIC || [m, n, k] != self.shape() {
            let shape = self.shape();
            return refuse(NOT_SUPPORTED, &format!("an algorithm for {:?} is used for {shape:?}", [m, n, k]));
        }
        let alignments = [promised & 0xffff, promised >> 16 & 0xffff, promised >> 32];
        let is_aligned = |(pointer, alignment): (u64, u64)| pointer.is_multiple_of(alignment.max(1));
        if !pointers.into_iter().zip(alignments).all(is_aligned) {
            return refuse(
                INVALID_VALUE,
                &format!("pointers {pointers:x?} are not aligned to {alignments:?} as promised"),
            );
        }
        match wanted <= workspace.1 && (wanted == 0 || workspace.0 != 0) {
            true => Ok(()),
            false => refuse(INVALID_VALUE, &format!("a workspace of {} bytes where {wanted} are needed", workspace.1)),
        }
    }
}

exports! {
    fn cublasLtCreate(target: *mut usize) {
        need().map_err(|_| NOT_INITIALIZED)?;
        create(target, Object::Library)
    }

    fn cublasLtDestroy(handle: usize) {
        need_library(handle)?;
        destroy(handle)
    }

    fn cublasLtMatmulDescCreate(target: *mut usize, compute_type: u32, scale_type: u32) {
        if (compute_type, scale_type) != (COMPUTE_F32, F32) {
            return refuse(NOT_SUPPORTED, "products are computed in f32");
        }
        create(target, Object::Operation { transposes: [0, 0] })
    }

    fn cublasLtMatmulDescSetAttribute(handle: usize, which: u32, buffer: *const c_void, bytes: usize) {
        let value = u32::from_le_bytes(attribute(buffer, bytes)?);
        with(|objects| {
            let Some(Object::Operation { transposes }) = objects.get_mut(&handle) else { return Err(INVALID_VALUE) };
            match which {
                TRANSPOSE_A => transposes[0] = value,
                TRANSPOSE_B => transposes[1] = value,
                _ if GIVEN.contains(&(which, value)) => {}
                other => return refuse(NOT_SUPPORTED, &format!("attribute {other} of an operation as {value}")),
            }
            Ok(())
        })
    }

    fn cublasLtMatmulDescDestroy(handle: usize) {
        destroy(handle)
    }

    fn cublasLtMatrixLayoutCreate(target: *mut usize, data_type: u32, rows: u64, columns: u64, stride: i64) {
        let matrix = Matrix { numbers: numbers(data_type)?, rows, columns, stride: stride.unsigned_abs() };
        if rows == 0 || columns == 0 || stride < 0 || matrix.stride < rows {
            return refuse(INVALID_VALUE, &format!("{rows} x {columns} numbers with a stride of {stride}"));
        }
        create(target, Object::Layout(matrix))
    }

    fn cublasLtMatrixLayoutDestroy(handle: usize) {
        destroy(handle)
    }

    fn cublasLtMatmulPreferenceCreate(target: *mut usize) {
        let preference = Preference { most_workspace: 0, reduction_schemes: u32::MAX, alignments: [256; 4] };
        create(target, Object::Preference(preference))
    }

    fn cublasLtMatmulPreferenceSetAttribute(handle: usize, which: u32, buffer: *const c_void, bytes: usize) {
        with(|objects| {
            let Some(Object::Preference(preference)) = objects.get_mut(&handle) else { return Err(INVALID_VALUE) };
            let aligned = ALIGNMENTS.iter().position(|alignment| *alignment == which);
            match (which, aligned) {
                (MOST_WORKSPACE, _) => preference.most_workspace = u64::from_le_bytes(attribute(buffer, bytes)?),
                (REDUCTION_SCHEMES, _) => preference.reduction_schemes = u32::from_le_bytes(attribute(buffer, bytes)?),
                (_, Some(at)) => preference.alignments[at] = u32::from_le_bytes(attribute(buffer, bytes)?),
                (other, None) => return refuse(NOT_SUPPORTED, &format!("attribute {other} of a preference")),
            }
            Ok(())
        })
    }

    fn cublasLtMatmulPreferenceDestroy(handle: usize) {
        destroy(handle)
    }

    fn cublasLtMatmulAlgoGetHeuristic(
        handle: usize,
        operation: usize,
        a: usize,
        b: usize,
        c: usize,
        d: usize,
        preference: usize,
        num_wanted: i32,
        results: *mut HeuristicResult,
        num_found: *mut i32,
    ) {
        need_library(handle)?;
        let problem = Problem::new(operation, [a, b, c, d])?;
        let preference = find(preference, |object| match object {
            Object::Preference(preference) => Some(preference),
            _ => None,
        })?;
        if results.is_null() || num_found.is_null() || num_wanted < 1 {
            return Err(INVALID_VALUE);
        }
        NUM_HEURISTICS.fetch_add(1, Relaxed);
        let count = (num_wanted as u64).min(NUM_ALGORITHMS);
        for index in 0..count {
            let algorithm = problem.algorithm(index, &preference);
            let workspace_bytes = algorithm[6] as usize;
            let result = HeuristicResult { algorithm, workspace_bytes, state: 0, waves: 1.0, reserved: [0; 4] };
            results.add(index as usize).write(result);
        }
        num_found.write(count as i32);
        Ok(())
    }

    fn cublasLtMatmul(
        handle: usize,
        operation: usize,
        alpha: *const f32,
        a: u64,
        a_layout: usize,
        b: u64,
        b_layout: usize,
        beta: *const f32,
        _c: u64,
        c_layout: usize,
        d: u64,
        d_layout: usize,
        algorithm: *const Algorithm,
        workspace: u64,
        workspace_bytes: usize,
        stream: usize,
    ) {
        need_library(handle)?;
        need().map_err(|_| EXECUTION_FAILED)?;
        let problem = Problem::new(operation, [a_layout, b_layout, c_layout, d_layout])?;
        if alpha.is_null() || beta.is_null() || beta.read() != 0.0 {
            return refuse(NOT_SUPPORTED, "products are added to nothing: beta is 0");
        }
        if algorithm.is_null() {
            return refuse(NOT_SUPPORTED, "no algorithm is given");
        }
        let algorithm = algorithm.read();
        problem.check(&algorithm, [a, b, d], (workspace, workspace_bytes as u64))?;
        let product = Product {
            a: (problem.a, a),
            b: (problem.b, b),
            d: (problem.d, d),
            alpha: alpha.read(),
            num_parts: algorithm[1],
            workspace: (workspace, algorithm[6]),
        };
        device().streams.push(stream, Work::Product(product)).map_err(|_| EXECUTION_FAILED)?;
        NUM_PRODUCTS.fetch_add(1, Relaxed);
        Ok(())
    }
}

/// The version, which is no status.
#[unsafe(no_mangle)]
pub extern "C" fn cublasLtGetVersion() -> usize {
    VERSION
}
