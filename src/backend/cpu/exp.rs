//! The exponential of a vector: one algorithm for every instruction set, so one result.

use super::simd::Simd;

/// Below this the result is zero: smaller results would be subnormal.
const MIN: f32 = -87.0;
/// Above this the result stays that of this: larger ones would be infinite.
const MAX: f32 = 88.375;
/// 1.5 * 2^23: adding it rounds to an integer, which the low bits of the sum then hold.
const ROUND: f32 = 12_582_912.0;
/// ln 2 in two parts; the first is short, so a multiple of it by a small integer is exact.
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;
/// Coefficients of r^7 to r^2 of a polynomial for e^r, |r| <= ln 2 / 2 (Cephes `expf`, S. Moshier).
const COEFFICIENTS: [f32; 6] = [1.987_569_1e-4, 1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5e-1];

/// e^x within 1 ulp for x in `[-87, 88.375]`; 0 below, constant above, NaN for NaN, exactly 1 for 0.
#[inline(always)]
pub(super) fn exp<S: Simd>(s: S, x: S::F32) -> S::F32 {
    // The constants come first, for a NaN in the second operand is what these return.
    let clamped = s.min(s.splat(MAX), s.max(s.splat(MIN), x));
    let Reduced { shift, less_one } = reduce(s, clamped);
    let power = s.add(less_one, s.splat(1.0));
    s.zero_where_less(s.add_exponent(power, shift), x, s.splat(MIN))
}

/// e^x - 1 within 2 ulp for x in `[-87, 88.375]`, near zero too; NaN for NaN, exactly 0 for 0.
#[inline(always)]
pub(super) fn exp_less_one<S: Simd>(s: S, x: S::F32) -> S::F32 {
    let Reduced { shift, less_one } = reduce(s, x);
    let scale = s.add_exponent(s.splat(1.0), shift);
    s.mul_add(less_one, scale, s.sub(scale, s.splat(1.0)))
}

/// `e^x = 2^n e^r`, |r| <= ln 2 / 2.
struct Reduced<F> {
    /// Its low bits are n.
    shift: F,
    /// `e^r - 1`.
    less_one: F,
}

#[inline(always)]
fn reduce<S: Simd>(s: S, x: S::F32) -> Reduced<S::F32> {
    let shift = s.mul_add(x, s.splat(std::f32::consts::LOG2_E), s.splat(ROUND));
    let n = s.sub(shift, s.splat(ROUND));
    let r = s.mul_add(n, s.splat(-LN2_HIGH), x);
    let r = s.mul_add(n, s.splat(-LN2_LOW), r);
    let mut sum = s.splat(COEFFICIENTS[0]);
    sum = s.mul_add(sum, r, s.splat(COEFFICIENTS[1]));
    sum = s.mul_add(sum, r, s.splat(COEFFICIENTS[2]));
    sum = s.mul_add(sum, r, s.splat(COEFFICIENTS[3]));
    sum = s.mul_add(sum, r, s.splat(COEFFICIENTS[4]));
    sum = s.mul_add(sum, r, s.splat(COEFFICIENTS[5]));
    Reduced { shift, less_one: s.mul_add(sum, s.mul(r, r), r) }
}

#[cfg(test)]
mod tests {
    use super::super::Isa;
    use super::super::simd::{Kernel, LANES, dispatch};
    use super::*;

    struct Exp([f32; LANES]);

    impl Kernel for Exp {
        type Output = [f32; LANES];

        #[inline(always)]
        #[allow(unsafe_code)]
        fn run<S: Simd>(self, s: S) -> [f32; LANES] {
            // SAFETY: the array holds 16 numbers.
            let x = unsafe { s.load(self.0.as_ptr()) };
            s.to_array(exp(s, x))
        }
    }

    #[test]
    fn is_within_an_ulp_and_the_same_everywhere() {
        let mut worst = 0.0f64;
        for step in 0..40_000 {
            let x: [f32; LANES] =
                std::array::from_fn(|lane| -87.0 + (step * LANES + lane) as f32 * (175.3 / 640_000.0));
            let wanted = dispatch(Isa::Portable, Exp(x));
            for isa in Isa::available() {
                assert_eq!(dispatch(isa, Exp(x)).map(f32::to_bits), wanted.map(f32::to_bits));
            }
            for (x, found) in x.into_iter().zip(wanted) {
                let exact = f64::from(x).exp();
                let ulp = f64::from(f32::from_bits(found.to_bits() + 1)) - f64::from(found);
                worst = worst.max((f64::from(found) - exact).abs() / ulp);
            }
        }
        assert!(worst < 1.0, "{worst} ulp");
    }

    #[test]
    fn special_values() {
        let mut x = [0.0; LANES];
        x[..6].copy_from_slice(&[f32::NEG_INFINITY, -87.1, f32::NAN, 100.0, f32::INFINITY, -0.0]);
        for isa in Isa::available() {
            let y = dispatch(isa, Exp(x));
            assert_eq!((y[0], y[1], y[5], y[6]), (0.0, 0.0, 1.0, 1.0));
            assert!(y[2].is_nan() && y[3] > 2e38 && y[3].is_finite() && y[4] == y[3]);
        }
    }
}
