//! Root-mean-square normalisation of rows (Zhang and Sennrich, arXiv 1910.07467).

#![allow(unsafe_code)]

use super::disjoint::DisjointSlice;
use super::simd::{Kernel, LANES, Simd, dispatch};
use super::{Isa, ThreadPool};

/// Work below this many numbers is not worth waking other threads.
const MIN_PARALLEL_NUMBERS: usize = 16 * 1024;

/// Numbers a task takes, at least.
const TASK_NUMBERS: usize = 8 * 1024;

/// `out = x / sqrt(mean(x^2) + eps) * weight` for each row. `x` and `out` are `[tokens, features]`, `weight` is
/// `[features]`.
pub fn rms_norm(pool: &mut ThreadPool, isa: Isa, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "the input and the output of a norm have one shape");
    let out = DisjointSlice::new(out);
    for_rows(pool, x.len(), weight.len(), |start, len| {
        // SAFETY: tasks have different rows.
        let out = unsafe { out.part(start, len) };
        dispatch(isa, RmsNorm { x: &x[start..start + len], weight, eps, out });
    });
}

/// `residual += delta`, then `out = rms_norm(residual)`. All three are `[tokens, features]`.
pub fn add_rms_norm(
    pool: &mut ThreadPool,
    isa: Isa,
    residual: &mut [f32],
    delta: &[f32],
    weight: &[f32],
    eps: f32,
    out: &mut [f32],
) {
    assert!(residual.len() == delta.len() && delta.len() == out.len(), "the tensors of a norm have one shape");
    let (residual, out) = (DisjointSlice::new(residual), DisjointSlice::new(out));
    for_rows(pool, delta.len(), weight.len(), |start, len| {
        // SAFETY: tasks have different rows.
        let (residual, out) = unsafe { (residual.part(start, len), out.part(start, len)) };
        dispatch(isa, Add { target: residual, delta: &delta[start..start + len] });
        dispatch(isa, RmsNorm { x: residual, weight, eps, out });
    });
}

/// Calls `task(first number, numbers)` for runs of whole rows.
fn for_rows(pool: &mut ThreadPool, len: usize, features: usize, task: impl Fn(usize, usize) + Sync) {
    assert!(features > 0 && len.is_multiple_of(features), "{len} numbers are not rows of {features}");
    if len < MIN_PARALLEL_NUMBERS || pool.num_threads() == 1 {
        return task(0, len);
    }
    let part = (TASK_NUMBERS.max(len / (8 * pool.num_threads())) / features).max(1) * features;
    pool.run(len.div_ceil(part), |index, _| {
        let start = index * part;
        task(start, part.min(len - start));
    });
}

struct Add<'a> {
    target: &'a mut [f32],
    delta: &'a [f32],
}

impl Kernel for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (target, delta) in self.target.iter_mut().zip(self.delta) {
            *target += delta;
        }
    }
}

struct RmsNorm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Kernel for RmsNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let features = self.weight.len();
        for (x, out) in self.x.chunks_exact(features).zip(self.out.chunks_exact_mut(features)) {
            // SAFETY: all three hold `features` numbers.
            unsafe { rms_norm_row(s, x.as_ptr(), self.weight.as_ptr(), self.eps, out.as_mut_ptr(), features) };
        }
    }
}

/// One row; the order of its sums depends on `features` alone.
///
/// # Safety
/// `features` numbers can be read at `x` and `weight` and written at `out`, which may be `x`.
#[inline(always)]
pub(super) unsafe fn rms_norm_row<S: Simd>(
    s: S,
    x: *const f32,
    weight: *const f32,
    eps: f32,
    out: *mut f32,
    features: usize,
) {
    let whole = features - features % LANES;
    // SAFETY: every access is to one of the `features` numbers.
    unsafe {
        let mean = sum_of_squares(s, x, features) / features as f32;
        let inverse = s.splat(1.0 / (mean + eps).sqrt());
        for i in (0..whole).step_by(LANES) {
            let normal = s.mul(s.load(x.add(i)), inverse);
            s.store(out.add(i), s.mul(normal, s.load(weight.add(i))));
        }
        if whole < features {
            let count = features - whole;
            let normal = s.mul(s.load_first(x.add(whole), count), inverse);
            s.store_first(out.add(whole), s.mul(normal, s.load_first(weight.add(whole), count)), count);
        }
    }
}

/// # Safety
/// `len` numbers can be read at `x`.
#[inline(always)]
unsafe fn sum_of_squares<S: Simd>(s: S, x: *const f32, len: usize) -> f32 {
    let mut sums = [s.zero(); 4];
    let mut i = 0;
    // SAFETY: every access is to one of the `len` numbers.
    unsafe {
        while i + 4 * LANES <= len {
            for (part, sum) in sums.iter_mut().enumerate() {
                let x = s.load(x.add(i + part * LANES));
                *sum = s.mul_add(x, x, *sum);
            }
            i += 4 * LANES;
        }
        while i < len {
            let count = LANES.min(len - i);
            let x = s.load_first(x.add(i), count);
            sums[0] = s.mul_add(x, x, sums[0]);
            i += count;
        }
    }
    s.reduce_add(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(len: usize, seed: usize) -> Vec<f32> {
        (0..len).map(|i| (((i * 7919 + seed * 104_729) % 2003) as f32 - 1001.0) / 500.0).collect()
    }

    fn reference(x: &[f32], weight: &[f32], eps: f32) -> Vec<f64> {
        let row = |x: &[f32]| {
            let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / x.len() as f64;
            let inverse = 1.0 / (mean + f64::from(eps)).sqrt();
            x.iter().zip(weight).map(move |(x, w)| f64::from(*x) * inverse * f64::from(*w)).collect::<Vec<_>>()
        };
        x.chunks(weight.len()).flat_map(row).collect()
    }

    #[test]
    fn agrees_with_f64_on_every_instruction_set() {
        let mut pool = ThreadPool::new(3);
        for (tokens, features) in [(1, 1), (3, 15), (2, 64), (5, 100), (40, 576), (7, 2049)] {
            let (x, weight) = (numbers(tokens * features, 1), numbers(features, 2));
            let wanted = reference(&x, &weight, 1e-5);
            let mut first: Option<Vec<f32>> = None;
            for isa in Isa::available() {
                let mut out = vec![0.0; x.len()];
                rms_norm(&mut pool, isa, &x, &weight, 1e-5, &mut out);
                for (wanted, found) in wanted.iter().zip(&out) {
                    assert!((wanted - f64::from(*found)).abs() <= 1e-6 * wanted.abs().max(1e-3), "{wanted} {found}");
                }
                assert_eq!(first.get_or_insert_with(|| out.clone()), &out, "{isa}");
            }
        }
    }

    #[test]
    fn adds_the_residual_and_rows_do_not_depend_on_their_batch() {
        let (tokens, features) = (64, 576);
        let (delta, weight) = (numbers(tokens * features, 4), numbers(features, 5));
        for isa in Isa::available() {
            let mut residual = numbers(tokens * features, 3);
            let sum: Vec<f32> = residual.iter().zip(&delta).map(|(a, b)| a + b).collect();
            let mut out = vec![0.0; residual.len()];
            add_rms_norm(&mut ThreadPool::new(2), isa, &mut residual, &delta, &weight, 1e-6, &mut out);
            assert_eq!(residual, sum);
            for (x, out) in sum.chunks(features).zip(out.chunks(features)) {
                let mut alone = vec![0.0; features];
                rms_norm(&mut ThreadPool::new(1), isa, x, &weight, 1e-6, &mut alone);
                assert_eq!(alone, out);
            }
        }
    }
}
