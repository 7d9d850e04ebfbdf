//! The arithmetic of `TDPBF16PS` on vectors, for one row.
//!
//! A tile instruction adds up the products with even `k` of its 16 pairs, and those with odd `k`, each in order with
//! one rounding a product; it adds the two sums, and adds that to the result (Intel 64 and IA-32 Architectures Software
//! Developer's Manual, volume 2). Vectors that do the same give the same bits, and keep memory busier than loads of
//! tiles do, which is all that counts when there is one row.

#![allow(unsafe_code)]
// Indices are constants, and those beyond an array are in branches that are never taken.
#![allow(clippy::out_of_bounds_indexing)]

use std::arch::x86_64::*;

use super::amx::{PANEL_STRIDE, STEP_BYTES, STEP_COLUMNS};
use super::float_avx512::unroll;

/// Panels taken at a time: independent streams keep memory busy.
pub(super) const STREAMS: usize = 4;

/// How far ahead weights are asked for: the hardware's own prefetch ends at each 4 KiB.
const PREFETCH_BYTES: usize = 1024;

/// A product of one row by one panel of weights, or by [`STREAMS`].
pub(super) struct RowProduct {
    /// `[num_steps][32]`: bf16 numbers as f32.
    pub(super) x: *const f32,
    /// The first panel, `[num_steps][16][32][2]` bf16.
    pub(super) weights: *const u8,
    pub(super) num_panels: usize,
    /// From one panel to the next.
    pub(super) panel_bytes: usize,
    pub(super) num_steps: usize,
    /// `[32 num_panels]`.
    pub(super) out: *mut f32,
    /// Whether `out` holds the sums over the `k` before.
    pub(super) resume: bool,
}

impl RowProduct {
    /// Computes it.
    ///
    /// # Safety
    /// Every pointer is good for the sizes beside it; the machine has AVX-512.
    pub(super) unsafe fn run(&self) {
        // SAFETY: the caller's promise.
        unsafe { if self.num_panels == 1 { multiply::<1>(self) } else { multiply::<STREAMS>(self) } }
    }
}

/// # Safety
/// As for [`RowProduct::run`], for the product's number of panels.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn multiply<const PANELS: usize>(product: &RowProduct) {
    debug_assert_eq!(product.num_panels, PANELS);
    let mut sums = [[_mm512_setzero_ps(); 2]; PANELS];
    // SAFETY: each step of x is 32 numbers, each of a panel 32 rows; sums are the row of `out`.
    unsafe {
        if product.resume {
            unroll!(PANEL in PANELS => {
                let out = product.out.add(PANEL * 32);
                sums[PANEL] = [_mm512_loadu_ps(out), _mm512_loadu_ps(out.add(16))];
            });
        }
        let (mut x, mut weights) = (product.x, product.weights);
        for _ in 0..product.num_steps {
            let mut even = [[_mm512_setzero_ps(); 2]; PANELS];
            let mut odd = [[_mm512_setzero_ps(); 2]; PANELS];
            for pair in 0..STEP_COLUMNS / 2 {
                let (first, second) = (_mm512_set1_ps(*x.add(2 * pair)), _mm512_set1_ps(*x.add(2 * pair + 1)));
                unroll!(PANEL in PANELS => {
                    let pairs = weights.add(PANEL * product.panel_bytes + pair * PANEL_STRIDE);
                    prefetch(pairs);
                    unroll!(HALF in 2 => {
                        let pairs = _mm512_loadu_si512(pairs.add(HALF * 64).cast());
                        let low = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs));
                        let high = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(!0xffff)));
                        even[PANEL][HALF] = _mm512_fmadd_ps(first, low, even[PANEL][HALF]);
                        odd[PANEL][HALF] = _mm512_fmadd_ps(second, high, odd[PANEL][HALF]);
                    });
                });
            }
            unroll!(PANEL in PANELS => { unroll!(HALF in 2 => {
                let step = _mm512_add_ps(even[PANEL][HALF], odd[PANEL][HALF]);
                sums[PANEL][HALF] = _mm512_add_ps(sums[PANEL][HALF], step);
            }); });
            x = x.add(STEP_COLUMNS);
            weights = weights.add(STEP_BYTES);
        }
        unroll!(PANEL in PANELS => {
            let out = product.out.add(PANEL * 32);
            _mm512_storeu_ps(out, sums[PANEL][0]);
            _mm512_storeu_ps(out.add(16), sums[PANEL][1]);
        });
    }
}

/// Asks for the 128 bytes some way after `pairs`.
#[inline]
#[target_feature(enable = "avx512f")]
fn prefetch(pairs: *const u8) {
    // Any address may be asked for.
    _mm_prefetch::<_MM_HINT_T0>(pairs.wrapping_add(PREFETCH_BYTES).cast());
    _mm_prefetch::<_MM_HINT_T0>(pairs.wrapping_add(PREFETCH_BYTES + 64).cast());
}
