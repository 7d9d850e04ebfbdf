//! The largest logit of each row.

#![allow(unsafe_code)]

use super::disjoint::DisjointSlice;
use super::simd::{Kernel, LANES, Simd, dispatch};
use super::{Isa, ThreadPool};

/// Logits of a task: a row is split when there are few rows.
const PART: usize = 16 * 1024;

/// The index of the largest number of each row of `logits`, `[rows, features]`. The lowest index wins ties; NaN never
/// wins, and a row of nothing else gives 0. `out` is `[rows]`.
pub fn argmax(pool: &mut ThreadPool, isa: Isa, logits: &[f32], features: usize, out: &mut [u32]) {
    assert!(features > 0 && features <= u32::MAX as usize, "a row of logits has 1 to 2^32 - 1 numbers");
    assert_eq!(logits.len(), out.len() * features, "each row of logits has an answer");
    let num_rows = out.len();
    if pool.num_threads() == 1 || logits.len() < 2 * PART {
        for (row, out) in logits.chunks_exact(features).zip(out) {
            *out = dispatch(isa, Argmax { row }).index;
        }
        return;
    }
    let rows_per_task = (PART / features).max(1);
    if num_rows >= 2 * pool.num_threads() {
        let out = DisjointSlice::new(out);
        pool.run(num_rows.div_ceil(rows_per_task), |task, _| {
            let first = task * rows_per_task;
            let count = rows_per_task.min(num_rows - first);
            // SAFETY: tasks have different rows.
            let out = unsafe { out.part(first, count) };
            for (row, out) in logits[first * features..].chunks_exact(features).zip(out) {
                *out = dispatch(isa, Argmax { row }).index;
            }
        });
    } else {
        for (row, out) in logits.chunks_exact(features).zip(out) {
            *out = split_row(pool, isa, row);
        }
    }
}

/// The largest number of a row, and its index; minus infinity for a row without one.
pub(super) fn largest(isa: Isa, row: &[f32]) -> (u32, f32) {
    let Largest { index, value, .. } = dispatch(isa, Argmax { row });
    (index, value)
}

/// Most parts of one row.
const MAX_PARTS: usize = 64;

fn split_row(pool: &mut ThreadPool, isa: Isa, row: &[f32]) -> u32 {
    let part = PART.max(row.len().div_ceil(MAX_PARTS));
    let num_parts = row.len().div_ceil(part);
    let mut found = [Largest::NONE; MAX_PARTS];
    let parts = DisjointSlice::new(&mut found);
    pool.run(num_parts, |task, _| {
        let start = task * part;
        let row = &row[start..row.len().min(start + part)];
        let largest = dispatch(isa, Argmax { row });
        // SAFETY: tasks have different parts.
        let found = unsafe { parts.part(task, 1) };
        found[0] = Largest { index: largest.index + start as u32, ..largest };
    });
    let first = found[0];
    found[1..num_parts].iter().fold(first, |best, next| if next.beats(best) { *next } else { best }).index
}

#[derive(Clone, Copy)]
struct Largest {
    value: f32,
    index: u32,
    is_number: bool,
}

impl Largest {
    const NONE: Largest = Largest { value: f32::NEG_INFINITY, index: 0, is_number: false };

    /// Whether it wins against one of lower index.
    fn beats(self, best: Largest) -> bool {
        self.is_number && (!best.is_number || self.value > best.value)
    }
}

struct Argmax<'a> {
    row: &'a [f32],
}

impl Kernel for Argmax<'_> {
    type Output = Largest;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Largest {
        const STRIP: usize = 64 * LANES;
        let (mut max, mut start) = (f32::NEG_INFINITY, 0);
        for (index, strip) in self.row.chunks(STRIP).enumerate() {
            let strip_max = strip_max(s, strip);
            if strip_max > max {
                (max, start) = (strip_max, index * STRIP);
            }
        }
        // Without a number above minus infinity the first minus infinity is the answer.
        match self.row[start..].iter().position(|x| *x == max) {
            Some(offset) => Largest { value: max, index: (start + offset) as u32, is_number: true },
            None => Largest::NONE,
        }
    }
}

#[inline(always)]
fn strip_max<S: Simd>(s: S, strip: &[f32]) -> f32 {
    let mut sums = [s.splat(f32::NEG_INFINITY); 4];
    let mut groups = strip.chunks_exact(4 * LANES);
    for group in &mut groups {
        for (part, max) in sums.iter_mut().enumerate() {
            // SAFETY: the group holds four vectors.
            let x = unsafe { s.load(group.as_ptr().add(part * LANES)) };
            // The second operand is what a comparison with NaN gives.
            *max = s.max(x, *max);
        }
    }
    let rest = groups.remainder().iter().fold(f32::NEG_INFINITY, |max, x| if *x > max { *x } else { max });
    let max = s.max(s.max(sums[0], sums[1]), s.max(sums[2], sums[3]));
    let max = s.reduce_max(max);
    if rest > max { rest } else { max }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reference(row: &[f32]) -> u32 {
        let mut best: Option<usize> = None;
        for (index, x) in row.iter().enumerate() {
            if !x.is_nan() && best.is_none_or(|best| *x > row[best]) {
                best = Some(index);
            }
        }
        best.unwrap_or(0) as u32
    }

    #[test]
    fn agrees_with_a_plain_loop() {
        for (rows, features) in [(1, 1), (2, 17), (3, 1000), (1, 150_001), (9, 49_152), (64, 3000)] {
            let mut logits: Vec<f32> =
                (0..rows * features).map(|i| ((i * 7919 + i / 977 * 31) % 100_003) as f32 * 1e-3 - 50.0).collect();
            logits.iter_mut().step_by(97).for_each(|x| *x = f32::NAN);
            for threads in 1..4 {
                for isa in Isa::available() {
                    let mut out = vec![u32::MAX; rows];
                    argmax(&mut ThreadPool::new(threads), isa, &logits, features, &mut out);
                    let wanted: Vec<u32> = logits.chunks(features).map(reference).collect();
                    assert_eq!(out, wanted);
                }
            }
        }
    }

    #[test]
    fn ties_and_oddities() {
        let cases: [(Vec<f32>, u32); 6] = [
            (vec![f32::NAN; 40_000], 0),
            (vec![f32::NEG_INFINITY; 40_000], 0),
            ([vec![f32::NAN; 20_000], vec![f32::NEG_INFINITY; 20_000]].concat(), 20_000),
            ([vec![0.0; 5], vec![7.0; 39_995]].concat(), 5),
            ([vec![-0.0; 39_999], vec![0.0]].concat(), 0),
            ([vec![1.0; 39_999], vec![f32::INFINITY]].concat(), 39_999),
        ];
        for (logits, wanted) in cases {
            for threads in [1, 2] {
                for isa in Isa::available() {
                    let mut out = [u32::MAX];
                    argmax(&mut ThreadPool::new(threads), isa, &logits, logits.len(), &mut out);
                    assert_eq!(out, [wanted]);
                }
            }
        }
    }
}
