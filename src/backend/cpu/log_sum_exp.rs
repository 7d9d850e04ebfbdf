//! The normaliser of a row of logits.

#![allow(unsafe_code)]

use super::Isa;
use super::argmax::largest;
use super::exp::exp;
use super::simd::{Kernel, LANES, Simd, dispatch};

/// Numbers that are summed as f32 before their sum becomes an f64.
const STRIP: usize = 64 * LANES;

/// `ln(sum of exp(x))` over a row, to some units in the last place of an f32; minus infinity for a row without a number
/// above it. The order of summing is one.
pub fn log_sum_exp(isa: Isa, row: &[f32]) -> f64 {
    let (_, most) = largest(isa, row);
    if !most.is_finite() {
        return f64::from(most);
    }
    f64::from(most) + dispatch(isa, SumExp { row, most }).ln()
}

struct SumExp<'a> {
    row: &'a [f32],
    most: f32,
}

impl Kernel for SumExp<'_> {
    type Output = f64;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f64 {
        let most = s.splat(self.most);
        // The second operand is what a comparison with NaN gives.
        let weigh = |x| s.max(exp(s, s.sub(x, most)), s.zero());
        let mut total = 0.0;
        for strip in self.row.chunks(STRIP) {
            let mut sum = s.zero();
            let mut groups = strip.chunks_exact(LANES);
            for group in &mut groups {
                // SAFETY: the group holds one vector.
                sum = s.add(sum, weigh(unsafe { s.load(group.as_ptr()) }));
            }
            let mut rest = [f32::NEG_INFINITY; LANES];
            rest[..groups.remainder().len()].copy_from_slice(groups.remainder());
            // SAFETY: the array holds one vector.
            sum = s.add(sum, weigh(unsafe { s.load(rest.as_ptr()) }));
            total += f64::from(s.reduce_add(sum));
        }
        total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_sums_in_f64() {
        for len in [1, 15, 16, 1000, 1024, 49_152, 151_936] {
            let row: Vec<f32> = (0..len).map(|at| ((at * 7919 % 2003) as f32 - 1000.0) / 90.0).collect();
            let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f64 = row.iter().map(|x| f64::from(x - most).exp()).sum();
            let wanted = f64::from(most) + sum.ln();
            let portable = log_sum_exp(Isa::Portable, &row);
            assert!((portable - wanted).abs() < 1e-5, "{len}: {portable}, wanted {wanted}");
            for isa in Isa::available() {
                assert_eq!(log_sum_exp(isa, &row).to_bits(), portable.to_bits());
            }
        }
    }

    #[test]
    fn forbidden_tokens_and_oddities_have_no_weight() {
        let row = [f32::NEG_INFINITY, 2.0, f32::NAN, 2.0];
        assert!((log_sum_exp(Isa::best(), &row) - (2.0 + 2f64.ln())).abs() < 1e-6);
        assert_eq!(log_sum_exp(Isa::best(), &[f32::NEG_INFINITY; 3]), f64::NEG_INFINITY);
    }
}
