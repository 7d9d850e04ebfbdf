//! Gated activations: `activation(gate) * up` (Shazeer, arXiv 2002.05202).

#![allow(unsafe_code)]

use super::disjoint::DisjointSlice;
use super::exp::exp;
use super::simd::{Kernel, LANES, Simd, dispatch};
use super::{Isa, ThreadPool};

/// Work below this many numbers is not worth waking other threads.
const MIN_PARALLEL_NUMBERS: usize = 16 * 1024;

/// Numbers a task gives, at most; it splits wide rows as well.
const TASK_NUMBERS: usize = 4 * 1024;

/// The activation of the gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GateKind {
    /// `x * sigmoid(x)`.
    SiLu,
    /// `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))`.
    GeluTanh,
}

/// `out = kind(gate) * up`: `gate_up` is `[tokens, gate | up]`, 2 * `features` wide, `out` is `[tokens, features]`.
pub fn gated(pool: &mut ThreadPool, isa: Isa, gate_up: &[f32], kind: GateKind, features: usize, out: &mut [f32]) {
    assert_eq!(gate_up.len(), 2 * out.len(), "every output has a gate and an up");
    assert!(features > 0 && out.len().is_multiple_of(features), "{} numbers are not rows of {features}", out.len());
    let num_numbers = out.len();
    let out = DisjointSlice::new(out);
    let part = |start: usize, len: usize| {
        let (row, column) = (start / features, start % features);
        let gate = row * 2 * features + column;
        // SAFETY: tasks have different parts of rows.
        let out = unsafe { out.part(start, len) };
        let (gate, up) = (&gate_up[gate..gate + len], &gate_up[gate + features..gate + features + len]);
        dispatch(isa, Gated { gate, up, kind, out });
    };
    let rows = |first: usize, count: usize| (first..first + count).for_each(|row| part(row * features, features));
    let num_rows = num_numbers / features;
    if num_numbers < MIN_PARALLEL_NUMBERS || pool.num_threads() == 1 {
        rows(0, num_rows);
    } else if features > TASK_NUMBERS && num_rows < 4 * pool.num_threads() {
        let num_parts = features.div_ceil(TASK_NUMBERS);
        pool.run(num_rows * num_parts, |task, _| {
            let column = task % num_parts * TASK_NUMBERS;
            part(task / num_parts * features + column, TASK_NUMBERS.min(features - column));
        });
    } else {
        let count = (TASK_NUMBERS / features).max(1);
        pool.run(num_rows.div_ceil(count), |task, _| rows(task * count, count.min(num_rows - task * count)));
    }
}

/// Some numbers of a row.
pub(super) struct Gated<'a> {
    pub(super) gate: &'a [f32],
    pub(super) up: &'a [f32],
    pub(super) kind: GateKind,
    pub(super) out: &'a mut [f32],
}

impl Kernel for Gated<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let len = self.out.len();
        assert!(self.gate.len() == len && self.up.len() == len);
        let whole = len - len % LANES;
        let (gate, up, out) = (self.gate.as_ptr(), self.up.as_ptr(), self.out.as_mut_ptr());
        // SAFETY: every access is to one of the `len` numbers.
        unsafe {
            for i in (0..whole).step_by(LANES) {
                let y = activate(s, self.kind, s.load(gate.add(i)));
                s.store(out.add(i), s.mul(y, s.load(up.add(i))));
            }
            if whole < len {
                let count = len - whole;
                let y = activate(s, self.kind, s.load_first(gate.add(whole), count));
                s.store_first(out.add(whole), s.mul(y, s.load_first(up.add(whole), count)), count);
            }
        }
    }
}

/// Both activations are `x * sigmoid(t)`: `(1 + tanh(u)) / 2` is `sigmoid(2 u)`, which loses no digits near zero.
#[inline(always)]
fn activate<S: Simd>(s: S, kind: GateKind, x: S::F32) -> S::F32 {
    /// 2 sqrt(2 / pi).
    const GELU_SCALE: f32 = 1.595_769;
    let minus_t = match kind {
        GateKind::SiLu => s.sub(s.zero(), x),
        GateKind::GeluTanh => {
            let square = s.mul(x, x);
            let factor = s.mul_add(square, s.splat(-GELU_SCALE * 0.044_715), s.splat(-GELU_SCALE));
            s.mul(x, factor)
        }
    };
    s.div(x, s.add(s.splat(1.0), exp(s, minus_t)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reference(kind: GateKind, x: f32) -> f64 {
        let x = f64::from(x);
        match kind {
            GateKind::SiLu => x / (1.0 + (-x).exp()),
            GateKind::GeluTanh => {
                let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
                x / (1.0 + (-2.0 * u).exp())
            }
        }
    }

    #[test]
    fn is_accurate_to_a_few_ulp() {
        for kind in [GateKind::SiLu, GateKind::GeluTanh] {
            let (mut worst, mut worst_tail) = (0.0f64, 0.0f64);
            let gates: Vec<f32> = (0..200_001).map(|i| (i - 100_000) as f32 * 4e-5).collect();
            let gate_up: Vec<f32> = gates.iter().copied().chain(gates.iter().map(|_| 1.0)).collect();
            let mut out = vec![0.0; gates.len()];
            gated(&mut ThreadPool::new(2), Isa::best(), &gate_up, kind, gates.len(), &mut out);
            for (gate, found) in gates.iter().zip(out) {
                let wanted = reference(kind, *gate);
                let error = (f64::from(found) - wanted).abs() / wanted.abs().max(1e-30) / f64::from(f32::EPSILON);
                let worst = if *gate < -1.0 { &mut worst_tail } else { &mut worst };
                *worst = worst.max(error);
            }
            // Far left the result is an exponential, whose argument (up to 11 here) carries its own rounding.
            assert!(worst < 3.0 && worst_tail < 16.0, "{kind:?}: {worst} {worst_tail}");
        }
    }

    #[test]
    fn large_gates_saturate_and_nan_stays() {
        for kind in [GateKind::SiLu, GateKind::GeluTanh] {
            for isa in Isa::available() {
                let mut out = [0.0; 4];
                let gate_up = [1e4, -1e4, f32::NAN, 0.0, 2.0, 2.0, 2.0, 2.0];
                gated(&mut ThreadPool::new(1), isa, &gate_up, kind, 4, &mut out);
                assert_eq!((out[0], out[3]), (2e4, 0.0));
                assert!(out[1].abs() < 1e-30 && out[2].is_nan(), "{out:?}");
            }
        }
    }

    #[test]
    fn any_shape_gives_the_same_bits_everywhere() {
        for (tokens, features) in [(1, 1), (3, 17), (50, 1536), (1, 20_000), (9, 5000), (300, 64)] {
            let numbers = |i: usize| (((i * 7919) % 2003) as f32 - 1001.0) / 150.0;
            let gate_up: Vec<f32> = (0..tokens * 2 * features).map(numbers).collect();
            for kind in [GateKind::SiLu, GateKind::GeluTanh] {
                let mut wanted = vec![0.0; tokens * features];
                gated(&mut ThreadPool::new(1), Isa::Portable, &gate_up, kind, features, &mut wanted);
                for (row, wanted) in gate_up.chunks(2 * features).zip(wanted.chunks(features)) {
                    for ((gate, up), wanted) in row.iter().zip(&row[features..]).zip(wanted) {
                        let exact = reference(kind, *gate) * f64::from(*up);
                        assert!((exact - f64::from(*wanted)).abs() <= 1e-5 * exact.abs().max(1e-5));
                    }
                }
                for isa in Isa::available() {
                    let mut out = vec![0.0; tokens * features];
                    gated(&mut ThreadPool::new(3), isa, &gate_up, kind, features, &mut out);
                    assert_eq!(out, wanted, "{isa}");
                }
            }
        }
    }
}
