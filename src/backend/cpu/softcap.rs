//! Soft caps: `cap tanh(x / cap)` in place of x, which stays inside `(-cap, cap)` (Gemma 2, arXiv 2408.00118). One
//! algorithm for every instruction set, so one result.

#![allow(unsafe_code)]

use super::disjoint::DisjointSlice;
use super::exp::exp_less_one;
use super::simd::{Kernel, LANES, Simd, dispatch};
use super::{Isa, ThreadPool};

/// Numbers a task caps; fewer are not worth waking other threads.
const TASK_NUMBERS: usize = 16 * 1024;

/// `cap tanh(x / cap)` in place of every number of `x`; `cap` is positive.
pub fn softcap(pool: &mut ThreadPool, isa: Isa, x: &mut [f32], cap: f32) {
    assert!(cap > 0.0, "a cap of {cap} lets nothing through");
    if pool.num_threads() == 1 || x.len() <= TASK_NUMBERS {
        return dispatch(isa, Softcap { x, cap });
    }
    let len = x.len();
    let x = DisjointSlice::new(x);
    pool.run(len.div_ceil(TASK_NUMBERS), |task, _| {
        let start = task * TASK_NUMBERS;
        // SAFETY: tasks have different parts.
        let x = unsafe { x.part(start, TASK_NUMBERS.min(len - start)) };
        dispatch(isa, Softcap { x, cap });
    });
}

struct Softcap<'a> {
    x: &'a mut [f32],
    cap: f32,
}

impl Kernel for Softcap<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let len = self.x.len();
        let whole = len - len % LANES;
        let x = self.x.as_mut_ptr();
        // SAFETY: every access is to one of the `len` numbers.
        unsafe {
            for i in (0..whole).step_by(LANES) {
                s.store(x.add(i), capped(s, s.load(x.add(i)), self.cap));
            }
            let count = len - whole;
            s.store_first(x.add(whole), capped(s, s.load_first(x.add(whole), count), self.cap), count);
        }
    }
}

/// `cap tanh(x / cap)`.
#[inline(always)]
pub(super) fn capped<S: Simd>(s: S, x: S::F32, cap: f32) -> S::F32 {
    s.mul(tanh(s, s.mul(x, s.splat(cap.recip()))), s.splat(cap))
}

/// Within 3 ulp, near zero too; NaN for NaN, exactly 1 and -1 from where f32 has nothing between.
#[inline(always)]
fn tanh<S: Simd>(s: S, x: S::F32) -> S::F32 {
    /// Twice of where it has long become 1.
    const MAX: f32 = 20.0;
    // The constants come first, for a NaN in the second operand is what these return.
    let doubled = s.min(s.splat(MAX), s.max(s.splat(-MAX), s.add(x, x)));
    let less_one = exp_less_one(s, doubled);
    s.div(less_one, s.add(less_one, s.splat(2.0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Tanh([f32; LANES]);

    impl Kernel for Tanh {
        type Output = [f32; LANES];

        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> [f32; LANES] {
            // SAFETY: the array holds 16 numbers.
            let x = unsafe { s.load(self.0.as_ptr()) };
            s.to_array(tanh(s, x))
        }
    }

    /// Distances between numbers of `x`'s size.
    fn ulps(found: f32, exact: f64) -> f64 {
        let size = (exact.abs() as f32).max(f32::MIN_POSITIVE);
        (f64::from(found) - exact).abs() / f64::from(f32::from_bits(size.to_bits() + 1) - size)
    }

    #[test]
    fn tanh_is_within_3_ulp_and_the_same_everywhere() {
        let mut worst = 0.0f64;
        for step in 0..40_000 {
            // From 1e-12 to beyond 12, as many of every size.
            let x: [f32; LANES] = std::array::from_fn(|lane| {
                let at = (step * LANES + lane) as f32 / 640_000.0;
                10f32.powf(at * 13.1 - 12.0) * if lane % 2 == 0 { 1.0 } else { -1.0 }
            });
            let wanted = dispatch(Isa::Portable, Tanh(x));
            for isa in Isa::available() {
                assert_eq!(dispatch(isa, Tanh(x)).map(f32::to_bits), wanted.map(f32::to_bits), "{isa}");
            }
            for (x, found) in x.into_iter().zip(wanted) {
                worst = worst.max(ulps(found, f64::from(x).tanh()));
            }
        }
        assert!(worst < 3.0, "{worst} ulp");
    }

    #[test]
    fn special_values() {
        let mut x = [0.0; LANES];
        let (nan, most) = (f32::NAN, f32::INFINITY);
        x[..9].copy_from_slice(&[most, -most, nan, 9.5, -9.5, f32::MAX, f32::MIN, 1e-40, -1e-40]);
        for isa in Isa::available() {
            let y = dispatch(isa, Tanh(x));
            assert_eq!((y[0], y[1], y[3], y[4], y[5], y[6]), (1.0, -1.0, 1.0, -1.0, 1.0, -1.0));
            assert!(y[2].is_nan() && y[7] >= 0.0 && y[7] < 1.1e-40 && y[8] <= 0.0 && y[8] > -1.1e-40, "{y:?}");
            assert_eq!(y[9], 0.0);
        }
    }

    #[test]
    fn any_length_is_capped_with_the_same_bits_everywhere() {
        for (len, cap) in [(0, 1.0), (1, 30.0), (15, 2.0), (300, 0.5), (16_384, 30.0), (70_001, 30.0)] {
            let x: Vec<f32> = (0..len).map(|at| ((at * 7919) % 2003) as f32 / 10.0 - 100.0).collect();
            let mut wanted = x.clone();
            softcap(&mut ThreadPool::new(1), Isa::Portable, &mut wanted, cap);
            for (x, found) in x.iter().zip(&wanted) {
                let exact = f64::from(cap) * (f64::from(*x) / f64::from(cap)).tanh();
                assert!(ulps(*found, exact) < 5.0 && found.abs() <= cap, "{x} {found} {exact}");
            }
            for isa in Isa::available() {
                for num_threads in [1, 3] {
                    let mut found = x.clone();
                    softcap(&mut ThreadPool::new(num_threads), isa, &mut found, cap);
                    assert_eq!(found, wanted, "{isa} {num_threads}");
                }
            }
        }
    }
}
