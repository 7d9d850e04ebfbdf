//! Cache lines of numbers.

#![allow(unsafe_code)]

use super::simd::LANES;

/// 16 numbers, aligned to 64 bytes.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line(pub(super) [f32; LANES]);

impl Line {
    pub(super) const ZERO: Line = Line([0.0; LANES]);
}

/// The numbers of some lines.
pub(super) fn numbers_of(lines: &mut [Line]) -> &mut [f32] {
    // SAFETY: a line is 16 f32 without padding.
    unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), lines.len() * LANES) }
}
