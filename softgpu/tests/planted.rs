//! Planted mistakes: each must be found by the checker that is meant for it, and the kernels without a mistake must be
//! right and silent under every schedule.

mod support;

use softgpu::counters::Counters;
use softgpu::fault::{Fault, FaultKind};
use support::{Arg, Gpu, compile, values};

const SEEDS: [u64; 4] = [0, 1, 2, 3];
/// A read that a barrier should have held back: a warp that runs early finds nothing written, a late one races.
const READ_TOO_EARLY: [FaultKind; 2] = [FaultKind::Race, FaultKind::Uninitialised];

fn gpu(bug: u32) -> Option<Gpu> {
    compile("planted.cu", &[&format!("BUG={bug}")]).map(|ptx| Gpu::new(&ptx))
}

fn bf16(values: &[f32]) -> Vec<u16> {
    values.iter().map(|v| half::bf16::from_f32(*v).to_bits()).collect()
}

fn single(bits: u16) -> f32 {
    half::bf16::from_bits(bits).to_f32()
}

/// Runs `matmul` and compares with plain loops.
fn matmul(gpu: &Gpu, m: usize, n: usize, k: usize) -> Result<Counters, Fault> {
    let (a, b) = (bf16(&values(m * k, 1)), bf16(&values(n * k, 2)));
    let (a_at, b_at, out) = (gpu.upload(&a), gpu.upload(&b), gpu.reserve(m * n * 4));
    let args = [
        Arg::Pointer(a_at),
        Arg::Pointer(b_at),
        Arg::Pointer(out),
        Arg::Int(m as i32),
        Arg::Int(n as i32),
        Arg::Int(k as i32),
    ];
    let grid = [n.div_ceil(32) as u32, m.div_ceil(64) as u32, 1];
    let counters = gpu.launch("matmul", grid, [128, 1, 1], 0, &args)?;
    let got = gpu.download::<f32>(out, m * n);
    for (i, got) in got.iter().enumerate() {
        let (row, column) = (i / n, i % n);
        let want: f32 = (0..k).map(|j| single(a[row * k + j]) * single(b[column * k + j])).sum();
        assert!((got - want).abs() < 1e-4 * k as f32, "({row}, {column}): {got}, wanted {want}");
    }
    Ok(counters)
}

/// Runs `softmax` on rows of which only the first `lengths` values exist, and compares.
fn softmax(gpu: &Gpu, lengths: &[i32], stride: usize) -> Result<Counters, Fault> {
    let rows = lengths.len();
    let x = values(rows * stride, 3);
    let input = gpu.memory.allocate((rows * stride * 4) as u64, "rows").expect("memory");
    for (row, &n) in lengths.iter().enumerate() {
        let at = (row * stride * 4) as u64;
        // SAFETY: the row lies inside the allocation.
        unsafe { std::ptr::copy_nonoverlapping(x[row * stride..].as_ptr().cast(), input.data(at), 4 * n as usize) };
        input.mark_init(at, 4 * n as u64);
    }
    let (lengths_at, out) = (gpu.upload(lengths), gpu.reserve(rows * stride * 4));
    let args = [Arg::Pointer(input.base), Arg::Pointer(lengths_at), Arg::Pointer(out), Arg::Int(stride as i32)];
    let counters = gpu.launch("softmax", [rows as u32, 1, 1], [128, 1, 1], 0, &args)?;
    let got = gpu.download::<f32>(out, rows * stride);
    for (row, &n) in lengths.iter().enumerate() {
        let line = &x[row * stride..row * stride + n as usize];
        let best = line.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f32 = line.iter().map(|v| (v - best).exp()).sum();
        for (i, v) in line.iter().enumerate() {
            assert!((got[row * stride + i] - (v - best).exp() / sum).abs() < 1e-5);
        }
    }
    Ok(counters)
}

fn total(gpu: &Gpu, kernel: &str, n: usize) -> Result<Counters, Fault> {
    let x = values(n, 4);
    let (x_at, sum) = (gpu.upload(&x), gpu.upload(&[0f32]));
    let blocks = n.div_ceil(32) as u32;
    if kernel == "total" {
        let args = [Arg::Pointer(x_at), Arg::Pointer(sum), Arg::Int(n as i32)];
        let counters = gpu.launch(kernel, [blocks, 1, 1], [32, 1, 1], 0, &args)?;
        assert!((gpu.download::<f32>(sum, 1)[0] - x.iter().sum::<f32>()).abs() < 1e-3);
        return Ok(counters);
    }
    let (partial, arrived) = (gpu.reserve(4 * blocks as usize), gpu.upload(&[0u32]));
    let args = [Arg::Pointer(x_at), Arg::Pointer(partial), Arg::Pointer(arrived), Arg::Pointer(sum)];
    let counters = gpu.launch(kernel, [blocks, 1, 1], [32, 1, 1], 0, &args)?;
    assert!((gpu.download::<f32>(sum, 1)[0] - x.iter().sum::<f32>()).abs() < 1e-3);
    Ok(counters)
}

fn run(gpu: &Gpu, kernel: &str) -> Result<Counters, Fault> {
    match kernel {
        "matmul" => matmul(gpu, 70, 45, 96),
        "softmax" => softmax(gpu, &[300, 129, 400], 512),
        _ => total(gpu, kernel, 320),
    }
}

#[test]
fn kernels_without_a_mistake_are_right_and_silent() {
    let Some(mut gpu) = gpu(0) else { return };
    for seed in SEEDS {
        gpu.seed = seed;
        for kernel in ["matmul", "softmax", "total", "ordered_total"] {
            run(&gpu, kernel).unwrap_or_else(|fault| panic!("{kernel}, seed {seed}: {fault}"));
        }
    }
}

/// The mistake must be found under every seed, by this checker, with the line and the thread.
fn must_find(bug: u32, kernel: &str, kind: FaultKind) {
    must_find_one_of(bug, kernel, &[kind]);
}

fn must_find_one_of(bug: u32, kernel: &str, kinds: &[FaultKind]) {
    let Some(mut gpu) = gpu(bug) else { return };
    for seed in SEEDS {
        gpu.seed = seed;
        let fault = run(&gpu, kernel).expect_err(&format!("bug {bug} in {kernel} not found, seed {seed}"));
        assert!(kinds.contains(&fault.kind), "bug {bug}, seed {seed}: {fault}");
        assert!(fault.place.contains(kernel) && fault.place.contains("planted.cu:"), "{fault}");
        assert!(fault.place.contains("block (") && fault.place.contains("thread ("), "{fault}");
    }
}

#[test]
fn barrier_after_the_tile_is_loaded() {
    must_find_one_of(1, "matmul", &READ_TOO_EARLY);
}

#[test]
fn barrier_before_the_tile_is_overwritten() {
    must_find(2, "matmul", FaultKind::Race);
}

#[test]
fn barrier_between_the_maxima_and_their_use() {
    must_find_one_of(3, "softmax", &READ_TOO_EARLY);
}

#[test]
fn barrier_before_the_scratch_is_used_again() {
    must_find(4, "softmax", FaultKind::Race);
}

#[test]
fn barrier_between_the_sums_and_their_use() {
    must_find(5, "softmax", FaultKind::Race);
}

#[test]
fn wait_for_an_async_copy_is_too_short() {
    must_find(6, "matmul", FaultKind::AsyncCopy);
}

#[test]
fn wait_for_an_async_copy_is_dropped() {
    must_find(7, "matmul", FaultKind::AsyncCopy);
}

#[test]
fn one_row_too_many() {
    must_find(8, "matmul", FaultKind::OutOfBounds);
}

#[test]
fn tail_predicate_is_dropped() {
    // Beyond a row's end lies the next row, which another block writes, and after the last row nothing.
    must_find_one_of(9, "matmul", &[FaultKind::OutOfBounds, FaultKind::Race]);
}

#[test]
fn wide_load_one_element_off() {
    must_find(10, "matmul", FaultKind::Misaligned);
}

#[test]
fn mask_off_by_one() {
    must_find(11, "softmax", FaultKind::Uninitialised);
}

#[test]
fn swizzle_removed_shows_in_the_wavefronts() {
    let (Some(good), Some(bad)) = (gpu(0), gpu(12)) else { return };
    let ratio = |c: Counters| c.shared_wavefronts as f64 / c.shared_wavefronts_ideal as f64;
    let (good, bad) = (ratio(run(&good, "matmul").unwrap()), ratio(run(&bad, "matmul").unwrap()));
    assert!(good < 1.01, "{good}");
    assert!(bad > 1.9, "{bad}");
}

#[test]
fn shuffle_under_a_condition() {
    must_find(13, "softmax", FaultKind::InactiveLane);
}

#[test]
fn barrier_in_half_a_warp() {
    must_find(14, "softmax", FaultKind::BarrierDivergence);
}

#[test]
fn plain_add_where_blocks_meet() {
    must_find(15, "total", FaultKind::Race);
}

#[test]
fn fence_before_the_arrival_is_dropped() {
    must_find(16, "ordered_total", FaultKind::Race);
}
