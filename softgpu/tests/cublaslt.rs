//! cuBLASLt through its C interface: products are near, differ with their shape and algorithm, can be recorded, and what a
//! device might let pass is refused or found.

#[path = "support/calls.rs"]
mod calls;

use calls::{BYTES, allocate, event, ok, run_cases, stream};
use softgpu::cublaslt::*;
use softgpu::driver::{context::*, event::*, graph::*, memory::*, stream::*};
use softgpu::report;

const INVALID_VALUE: u32 = 7;
const NOT_SUPPORTED: u32 = 15;
const BF16: u32 = 14;
const F32: u32 = 0;

/// `d = a^T b` with `a` `[K, M]`, `b` `[K, n]` of bf16 and `d` `[M, n]` of f32.
const M: usize = 8;
const K: usize = 32;
const WORKSPACE: usize = 4096;

/// A library with the descriptors of such products.
struct Library {
    handle: usize,
    operation: usize,
    preference: usize,
}

/// Layouts of a product with `n` columns, and its algorithms.
struct Plan {
    layouts: [usize; 3],
    algorithms: Vec<HeuristicResult>,
}

impl Library {
    fn new() -> Self {
        let (mut handle, mut operation, mut preference) = (0, 0, 0);
        let (transposed, workspace) = (1u32, WORKSPACE as u64);
        // SAFETY: pointers to locals.
        unsafe {
            ok(cublasLtCreate(&mut handle));
            ok(cublasLtMatmulDescCreate(&mut operation, 68, F32));
            ok(cublasLtMatmulDescSetAttribute(operation, 3, (&raw const transposed).cast(), 4));
            ok(cublasLtMatmulPreferenceCreate(&mut preference));
            ok(cublasLtMatmulPreferenceSetAttribute(preference, 1, (&raw const workspace).cast(), 8));
        }
        Self { handle, operation, preference }
    }

    fn plan(&self, n: usize) -> Plan {
        let layout = |data_type, rows: usize, columns: usize| {
            let mut handle = 0;
            // SAFETY: a pointer to a local.
            ok(unsafe { cublasLtMatrixLayoutCreate(&mut handle, data_type, rows as u64, columns as u64, rows as i64) });
            handle
        };
        let layouts = [layout(BF16, K, M), layout(BF16, K, n), layout(F32, M, n)];
        let [a, b, d] = layouts;
        let mut algorithms =
            vec![HeuristicResult { algorithm: [0; 8], workspace_bytes: 0, state: 9, waves: 0.0, reserved: [0; 4] }; 8];
        let (wanted, mut found) = (algorithms.len() as i32, 0);
        // SAFETY: there is room for as many as are wanted.
        ok(unsafe {
            let (results, preference) = (algorithms.as_mut_ptr(), self.preference);
            cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                self.operation,
                a,
                b,
                d,
                d,
                preference,
                wanted,
                results,
                &mut found,
            )
        });
        algorithms.truncate(found as usize);
        assert!(algorithms.len() > 1 && algorithms.iter().all(|result| result.state == 0));
        Plan { layouts, algorithms }
    }

    fn multiply(&self, plan: &Plan, algorithm: usize, [a, b, d]: [u64; 3], workspace: u64, stream: usize) -> u32 {
        let [a_layout, b_layout, d_layout] = plan.layouts;
        let algorithm = &raw const plan.algorithms[algorithm].algorithm;
        // SAFETY: handles and addresses of the case; factors and the algorithm are locals.
        unsafe {
            cublasLtMatmul(
                self.handle,
                self.operation,
                &1.0,
                a,
                a_layout,
                b,
                b_layout,
                &0.0,
                d,
                d_layout,
                d,
                d_layout,
                algorithm,
                workspace,
                WORKSPACE,
                stream,
            )
        }
    }

    fn destroy(self, plans: Vec<Plan>) {
        // SAFETY: handles of the case.
        unsafe {
            plans.iter().flat_map(|plan| plan.layouts).for_each(|layout| ok(cublasLtMatrixLayoutDestroy(layout)));
            ok(cublasLtMatmulDescDestroy(self.operation));
            ok(cublasLtMatmulPreferenceDestroy(self.preference));
            ok(cublasLtDestroy(self.handle));
            assert_eq!(cublasLtDestroy(self.handle), 1);
        }
        assert_eq!(num_objects(), 0);
    }
}

/// Numbers whose sums depend on their order.
fn numbers(seed: usize) -> Vec<f32> {
    (0..BYTES / 2).map(|at| half::bf16::from_f32(((at * 37 + seed) as f32).sin()).to_f32()).collect()
}

fn upload(numbers: &[f32]) -> u64 {
    let target = allocate();
    let bytes: Vec<u8> = numbers.iter().flat_map(|number| half::bf16::from_f32(*number).to_le_bytes()).collect();
    // SAFETY: as many bytes as were allocated.
    ok(unsafe { cuMemcpyHtoD_v2(target, bytes.as_ptr().cast(), bytes.len()) });
    target
}

fn download(source: u64, count: usize) -> Vec<f32> {
    let mut found = vec![0.0f32; count];
    // SAFETY: the target has so many bytes.
    ok(unsafe { cuMemcpyDtoH_v2(found.as_mut_ptr().cast(), source, count * 4) });
    found
}

/// The first column is the same numbers in all products.
fn products_differ_with_columns_and_algorithm() {
    let (library, s) = (Library::new(), stream());
    let (a, b) = (numbers(1), numbers(2));
    let pointers = [upload(&a), upload(&b), allocate()];
    let workspace = allocate();
    let (mut plans, mut columns) = (Vec::new(), Vec::new());
    for n in 1..6 {
        let plan = library.plan(n);
        for algorithm in 0..plan.algorithms.len() {
            ok(library.multiply(&plan, algorithm, pointers, workspace, s));
            // SAFETY: a handle of the case.
            ok(unsafe { cuStreamSynchronize(s) });
            let found = download(pointers[2], M * n);
            for (at, found) in found.iter().enumerate() {
                let (row, column) = (&a[at % M * K..][..K], &b[at / M * K..][..K]);
                let wanted: f32 = row.iter().zip(column).map(|(a, b)| a * b).sum();
                assert!((found - wanted).abs() < 5e-3, "{found}, wanted {wanted}");
            }
            columns.push(found[..M].to_vec());
        }
        plans.push(plan);
    }
    for (at, column) in columns.iter().enumerate() {
        assert!(!columns[..at].contains(column), "two products of {} have the same bits", columns.len());
    }
    assert_eq!(counts(), [5, columns.len() as u64]);
    library.destroy(plans);
}

fn products_are_recorded() {
    let (library, s) = (Library::new(), stream());
    let pointers = [upload(&numbers(1)), upload(&numbers(2)), allocate()];
    let (plan, workspace) = (library.plan(3), allocate());
    let (mut graph, mut exec) = (0, 0);
    // SAFETY: handles and addresses of the case.
    unsafe {
        ok(library.multiply(&plan, 0, pointers, workspace, s));
        ok(cuStreamSynchronize(s));
        let wanted = download(pointers[2], M * 3);
        ok(cuStreamBeginCapture_v2(s, 1));
        ok(library.multiply(&plan, 0, pointers, workspace, s));
        ok(cuStreamEndCapture(s, &mut graph));
        ok(cuMemsetD8_v2(pointers[2], 0, BYTES));
        ok(cuCtxSynchronize());
        ok(cuGraphInstantiateWithFlags(&mut exec, graph, 0));
        ok(cuGraphLaunch(exec, s));
        ok(cuStreamSynchronize(s));
        assert_eq!(download(pointers[2], M * 3), wanted);
    }
    library.destroy(vec![plan]);
}

fn what_a_device_may_let_pass_is_refused() {
    let (library, s) = (Library::new(), stream());
    let pointers = [upload(&numbers(1)), upload(&numbers(2)), allocate()];
    let (plan, mut other, workspace) = (library.plan(3), library.plan(4), allocate());
    assert_eq!(library.multiply(&plan, 0, [pointers[0], pointers[1] + 16, pointers[2]], workspace, s), INVALID_VALUE);
    assert!(report::message().contains("as promised"), "{}", report::message());
    assert_eq!(library.multiply(&plan, 0, pointers, 0, s), INVALID_VALUE);
    assert!(report::message().contains("workspace"), "{}", report::message());
    let own = std::mem::replace(&mut other.algorithms, plan.algorithms.clone());
    assert_eq!(library.multiply(&other, 0, pointers, workspace, s), NOT_SUPPORTED);
    assert!(report::message().contains("an algorithm for"), "{}", report::message());
    other.algorithms = own;
    ok(library.multiply(&other, 0, pointers, workspace, s));
    // SAFETY: handles of the case.
    unsafe {
        ok(cuStreamSynchronize(s));
        assert_eq!(cublasLtMatrixLayoutDestroy(0), INVALID_VALUE);
        assert_eq!(
            cublasLtMatmulDescSetAttribute(library.operation, 7, (&raw const pointers).cast(), 4),
            NOT_SUPPORTED
        );
    }
    library.destroy(vec![plan, other]);
}

/// Two streams with one workspace, with an event between and without.
fn a_workspace_is_one_streams() {
    let (library, first, second) = (Library::new(), stream(), stream());
    let (a, b, plan, workspace) = (upload(&numbers(1)), upload(&numbers(2)), library.plan(3), allocate());
    let [one, two] = [allocate(), allocate()];
    let done = event();
    // SAFETY: handles and addresses of the case.
    let code = unsafe {
        ok(library.multiply(&plan, 0, [a, b, one], workspace, first));
        ok(cuEventRecord(done, first));
        ok(cuStreamWaitEvent(second, done, 0));
        ok(library.multiply(&plan, 0, [a, b, two], workspace, second));
        ok(cuStreamSynchronize(second));
        ok(library.multiply(&plan, 0, [a, b, one], workspace, first));
        ok(library.multiply(&plan, 0, [a, b, two], workspace, second));
        cuStreamSynchronize(first) | cuStreamSynchronize(second)
    };
    assert_eq!(code, 719);
    assert!(report::message().contains("StreamOrder"), "{}", report::message());
}

fn numbers_that_nobody_wrote_are_found() {
    let (library, s) = (Library::new(), stream());
    let (plan, pointers) = (library.plan(2), [upload(&numbers(1)), allocate(), allocate()]);
    ok(library.multiply(&plan, 0, pointers, allocate(), s));
    // SAFETY: a handle of the case.
    assert_eq!(unsafe { cuStreamSynchronize(s) }, 719);
    assert!(report::message().contains("Uninitialised"), "{}", report::message());
}

const CASES: [(&str, fn()); 5] = [
    ("products_differ_with_columns_and_algorithm", products_differ_with_columns_and_algorithm),
    ("products_are_recorded", products_are_recorded),
    ("what_a_device_may_let_pass_is_refused", what_a_device_may_let_pass_is_refused),
    ("a_workspace_is_one_streams", a_workspace_is_one_streams),
    ("numbers_that_nobody_wrote_are_found", numbers_that_nobody_wrote_are_found),
];

#[test]
fn every_case_in_every_mode() {
    run_cases("every_case_in_every_mode", &CASES);
}
