//! Vectors of 16 f32 with AVX-512: one register each.

#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::bf16_rounding::low_lanes;
use super::simd::{Kernel, LANES, Simd};

/// Exists only inside [`run`].
#[derive(Clone, Copy)]
pub(super) struct Avx512(());

/// Runs `kernel` with AVX-512 instructions.
/// # Safety
/// The machine has AVX-512 F, BW, DQ and VL, AVX2 and FMA.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx512(()))
}

impl Simd for Avx512 {
    type F32 = __m512;
    const IS_WIDE: bool = true;

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F32 {
        // SAFETY: `self` proves the instructions.
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves the instructions.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves the instructions.
        unsafe { _mm512_sub_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves the instructions.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves the instructions.
        unsafe { _mm512_div_ps(a, b) }
    }

    #[inline(always)]
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves the instructions.
        unsafe { _mm512_max_ps(a, b) }
    }

    #[inline(always)]
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves the instructions.
        unsafe { _mm512_min_ps(a, b) }
    }

    #[inline(always)]
    fn mul_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves the instructions.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn select(self, mask: u16, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves the instructions.
        unsafe { _mm512_mask_blend_ps(mask, b, a) }
    }

    #[inline(always)]
    fn zero_where_less(self, value: Self::F32, x: Self::F32, limit: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves the instructions.
        unsafe { _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, limit), value) }
    }

    #[inline(always)]
    fn add_exponent(self, value: Self::F32, shift: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves the instructions.
        unsafe {
            let shift = _mm512_slli_epi32::<23>(_mm512_castps_si512(shift));
            _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(value), shift))
        }
    }

    #[inline(always)]
    fn to_array(self, value: Self::F32) -> [f32; LANES] {
        // SAFETY: `self` proves the instructions.
        unsafe { std::mem::transmute(value) }
    }

    #[inline(always)]
    unsafe fn load(self, source: *const f32) -> Self::F32 {
        // SAFETY: the caller's promise, and `self` proves the instructions.
        unsafe { _mm512_loadu_ps(source) }
    }

    #[inline(always)]
    unsafe fn store(self, target: *mut f32, value: Self::F32) {
        // SAFETY: the caller's promise, and `self` proves the instructions.
        unsafe { _mm512_storeu_ps(target, value) }
    }

    #[inline(always)]
    unsafe fn load_bf16_low(self, source: *const u8) -> Self::F32 {
        // SAFETY: the caller's promise, and `self` proves the instructions.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_loadu_si512(source.cast()))) }
    }

    #[inline(always)]
    unsafe fn load_bf16_high(self, source: *const u8) -> Self::F32 {
        // SAFETY: the caller's promise, and `self` proves the instructions.
        unsafe {
            let words = _mm512_loadu_si512(source.cast());
            _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(0xffff_0000_u32 as i32)))
        }
    }

    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        // SAFETY: `self` proves the instructions.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) }
    }

    #[inline(always)]
    fn reduce_add(self, value: Self::F32) -> f32 {
        // SAFETY: `self` proves the instructions.
        unsafe {
            let sum = _mm256_add_ps(_mm512_castps512_ps256(value), _mm512_extractf32x8_ps::<1>(value));
            let sum = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps::<1>(sum));
            let sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
            _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)))
        }
    }

    #[inline(always)]
    fn reduce_max(self, value: Self::F32) -> f32 {
        // SAFETY: `self` proves the instructions.
        unsafe {
            let max = _mm512_max_ps(value, _mm512_set1_ps(f32::NEG_INFINITY));
            let max = _mm256_max_ps(_mm512_castps512_ps256(max), _mm512_extractf32x8_ps::<1>(max));
            let max = _mm_max_ps(_mm256_castps256_ps128(max), _mm256_extractf128_ps::<1>(max));
            let max = _mm_max_ps(max, _mm_movehl_ps(max, max));
            _mm_cvtss_f32(_mm_max_ss(max, _mm_movehdup_ps(max)))
        }
    }

    #[inline(always)]
    unsafe fn load_first(self, source: *const f32, count: usize) -> Self::F32 {
        // SAFETY: only the first `count` numbers are read, and `self` proves the instructions.
        unsafe { _mm512_maskz_loadu_ps(low_lanes(count), source) }
    }

    #[inline(always)]
    unsafe fn store_first(self, target: *mut f32, value: Self::F32, count: usize) {
        // SAFETY: only the first `count` numbers are written, and `self` proves the instructions.
        unsafe { _mm512_mask_storeu_ps(target, low_lanes(count), value) }
    }

    /// In integers: the instruction for it takes subnormal numbers for zero.
    #[inline(always)]
    fn round_bf16(self, value: Self::F32) -> [u16; LANES] {
        // SAFETY: `self` proves the instructions; both types are 256 bits without invalid values.
        unsafe {
            let bits = _mm512_castps_si512(value);
            let upper = _mm512_srli_epi32::<16>(bits);
            let odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
            let half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
            let rounded = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, half));
            let quiet = _mm512_or_si512(upper, _mm512_set1_epi32(0x40));
            let is_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(value, value);
            let words = _mm512_mask_blend_epi32(is_nan, rounded, quiet);
            std::mem::transmute::<__m256i, [u16; LANES]>(_mm512_cvtepi32_epi16(words))
        }
    }
}
