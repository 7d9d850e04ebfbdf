//! Vectors of 16 f32 with AVX2 and FMA: two registers each.

#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::simd::{Kernel, LANES, Simd};

/// Exists only inside [`run`].
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

/// Runs `kernel` with AVX2 and FMA instructions.
/// # Safety
/// The machine has AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx2(()))
}

impl Simd for Avx2 {
    type F32 = [__m256; 2];
    const IS_WIDE: bool = false;

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F32 {
        // SAFETY: `self` proves the instructions.
        unsafe { [_mm256_set1_ps(value); 2] }
    }

    #[inline(always)]
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves the instructions.
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves the instructions.
        unsafe { [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves the instructions.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves the instructions.
        unsafe { [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves the instructions.
        unsafe { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves the instructions.
        unsafe { [_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn mul_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves the instructions.
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }

    #[inline(always)]
    fn select(self, mask: u16, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves the instructions.
        unsafe {
            let bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
            let low = _mm256_and_si256(_mm256_set1_epi32(i32::from(mask)), bits);
            let high = _mm256_and_si256(_mm256_set1_epi32(i32::from(mask >> 8)), bits);
            let low = _mm256_castsi256_ps(_mm256_cmpeq_epi32(low, bits));
            let high = _mm256_castsi256_ps(_mm256_cmpeq_epi32(high, bits));
            [_mm256_blendv_ps(b[0], a[0], low), _mm256_blendv_ps(b[1], a[1], high)]
        }
    }

    #[inline(always)]
    fn zero_where_less(self, value: Self::F32, x: Self::F32, limit: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves the instructions.
        unsafe {
            let low = _mm256_cmp_ps::<_CMP_NLT_UQ>(x[0], limit[0]);
            let high = _mm256_cmp_ps::<_CMP_NLT_UQ>(x[1], limit[1]);
            [_mm256_and_ps(value[0], low), _mm256_and_ps(value[1], high)]
        }
    }

    #[inline(always)]
    fn add_exponent(self, value: Self::F32, shift: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves the instructions.
        unsafe {
            let low = _mm256_slli_epi32::<23>(_mm256_castps_si256(shift[0]));
            let high = _mm256_slli_epi32::<23>(_mm256_castps_si256(shift[1]));
            let low = _mm256_add_epi32(_mm256_castps_si256(value[0]), low);
            let high = _mm256_add_epi32(_mm256_castps_si256(value[1]), high);
            [_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)]
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
        unsafe { [_mm256_loadu_ps(source), _mm256_loadu_ps(source.add(8))] }
    }

    #[inline(always)]
    unsafe fn store(self, target: *mut f32, value: Self::F32) {
        // SAFETY: the caller's promise, and `self` proves the instructions.
        unsafe {
            _mm256_storeu_ps(target, value[0]);
            _mm256_storeu_ps(target.add(8), value[1]);
        }
    }

    #[inline(always)]
    unsafe fn load_bf16_low(self, source: *const u8) -> Self::F32 {
        // SAFETY: the caller's promise, and `self` proves the instructions.
        unsafe {
            let low = _mm256_slli_epi32::<16>(_mm256_loadu_si256(source.cast()));
            let high = _mm256_slli_epi32::<16>(_mm256_loadu_si256(source.add(32).cast()));
            [_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)]
        }
    }

    #[inline(always)]
    unsafe fn load_bf16_high(self, source: *const u8) -> Self::F32 {
        // SAFETY: the caller's promise, and `self` proves the instructions.
        unsafe {
            let kept = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            let low = _mm256_and_si256(_mm256_loadu_si256(source.cast()), kept);
            let high = _mm256_and_si256(_mm256_loadu_si256(source.add(32).cast()), kept);
            [_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)]
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
            let sum = _mm256_add_ps(value[0], value[1]);
            let sum = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps::<1>(sum));
            let sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
            _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)))
        }
    }

    #[inline(always)]
    fn reduce_max(self, value: Self::F32) -> f32 {
        // SAFETY: `self` proves the instructions.
        unsafe {
            let least = _mm256_set1_ps(f32::NEG_INFINITY);
            let max = _mm256_max_ps(_mm256_max_ps(value[0], least), _mm256_max_ps(value[1], least));
            let max = _mm_max_ps(_mm256_castps256_ps128(max), _mm256_extractf128_ps::<1>(max));
            let max = _mm_max_ps(max, _mm_movehl_ps(max, max));
            _mm_cvtss_f32(_mm_max_ss(max, _mm_movehdup_ps(max)))
        }
    }
}
