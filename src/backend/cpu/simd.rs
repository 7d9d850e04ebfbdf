//! Vectors of 16 f32 for every instruction set, so that a kernel is written once and gives the same bits everywhere.
//!
//! A kernel is a [`Kernel`] over any [`Simd`]; [`dispatch`] runs it compiled for the instructions asked for. The types
//! of the instruction sets are tokens: one exists only where its instructions may run, which makes the lane-wise
//! operations safe. `a * b + c` is always fused and sums across lanes always take the same tree.

#![allow(unsafe_code)]

use half::bf16;

use super::Isa;

/// Lanes of a vector.
pub(super) const LANES: usize = 16;

/// Operations on vectors of 16 f32. A value proves that its instructions can run.
pub(super) trait Simd: Copy {
    /// 16 numbers.
    type F32: Copy;

    /// Whether 32 vectors fit into registers; 8 otherwise.
    const IS_WIDE: bool;

    fn splat(self, value: f32) -> Self::F32;
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a * b + c`, rounded once.
    fn mul_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;
    /// The larger; `b` where either is NaN.
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// The smaller; `b` where either is NaN.
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a` in the lanes whose bit of `mask` is set, else `b`.
    fn select(self, mask: u16, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `value`, but zero where `x < limit`; NaN is not below the limit.
    fn zero_where_less(self, value: Self::F32, x: Self::F32, limit: Self::F32) -> Self::F32;
    /// `value` with the low 9 bits of the bits of `shift` added to its exponent.
    fn add_exponent(self, value: Self::F32, shift: Self::F32) -> Self::F32;
    fn to_array(self, value: Self::F32) -> [f32; LANES];

    /// # Safety
    /// 16 f32 can be read at `source`, which needs no alignment.
    unsafe fn load(self, source: *const f32) -> Self::F32;
    /// # Safety
    /// 16 f32 can be written at `target`, which needs no alignment.
    unsafe fn store(self, target: *mut f32, value: Self::F32);
    /// The low halves of 16 words, as bf16.
    /// # Safety
    /// 64 bytes can be read at `source`, which needs no alignment.
    unsafe fn load_bf16_low(self, source: *const u8) -> Self::F32;
    /// The high halves of 16 words, as bf16.
    /// # Safety
    /// 64 bytes can be read at `source`, which needs no alignment.
    unsafe fn load_bf16_high(self, source: *const u8) -> Self::F32;
    /// Asks for the cache line at `address`, which may be any address, to come to the second-level cache.
    fn prefetch(self, address: *const u8);

    #[inline(always)]
    fn zero(self) -> Self::F32 {
        self.splat(0.0)
    }

    /// The sum of the lanes: halves are added until one lane is left.
    #[inline(always)]
    fn reduce_add(self, value: Self::F32) -> f32 {
        let mut lanes = self.to_array(value);
        let mut width = LANES / 2;
        while width > 0 {
            for lane in 0..width {
                lanes[lane] += lanes[lane + width];
            }
            width /= 2;
        }
        lanes[0]
    }

    /// The largest lane; NaN counts as nothing.
    #[inline(always)]
    fn reduce_max(self, value: Self::F32) -> f32 {
        let lanes = self.to_array(value);
        let mut max = f32::NEG_INFINITY;
        for lane in lanes {
            max = if lane > max { lane } else { max };
        }
        max
    }

    /// The first `count` numbers, then zeros.
    /// # Safety
    /// `count <= 16` f32 can be read at `source`.
    #[inline(always)]
    unsafe fn load_first(self, source: *const f32, count: usize) -> Self::F32 {
        let mut lanes = [0.0; LANES];
        // SAFETY: the caller's promise; `lanes` holds 16.
        unsafe {
            std::ptr::copy_nonoverlapping(source, lanes.as_mut_ptr(), count);
            self.load(lanes.as_ptr())
        }
    }

    /// Writes the first `count` lanes.
    /// # Safety
    /// `count <= 16` f32 can be written at `target`.
    #[inline(always)]
    unsafe fn store_first(self, target: *mut f32, value: Self::F32, count: usize) {
        let lanes = self.to_array(value);
        // SAFETY: the caller's promise; `lanes` holds 16.
        unsafe { std::ptr::copy_nonoverlapping(lanes.as_ptr(), target, count) };
    }

    /// As bits of bf16: to the nearest, ties to even.
    #[inline(always)]
    fn round_bf16(self, value: Self::F32) -> [u16; LANES] {
        self.to_array(value).map(|x| bf16::from_f32(x).to_bits())
    }
}

/// Work written over [`Simd`]. `run` and what it calls in its loops are `#[inline(always)]`, or they would be compiled
/// without the instructions.
pub(super) trait Kernel {
    type Output;
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// Runs `kernel` compiled for `isa`, which this machine must have.
pub(super) fn dispatch<K: Kernel>(isa: Isa, kernel: K) -> K::Output {
    assert!(isa.is_available(), "this machine cannot run {isa} instructions");
    match isa {
        Isa::Portable => kernel.run(Portable),
        // SAFETY: the instructions are available.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { super::simd_avx2::run(kernel) },
        // SAFETY: the instructions are available.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => unsafe { super::simd_avx512::run(kernel) },
        #[cfg(not(target_arch = "x86_64"))]
        _ => unreachable!("only x86-64 has {isa}"),
    }
}

/// Plain Rust: what the other instruction sets must reproduce.
#[derive(Clone, Copy)]
pub(super) struct Portable;

#[inline(always)]
fn zip(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    std::array::from_fn(|lane| f(a[lane], b[lane]))
}

impl Simd for Portable {
    type F32 = [f32; LANES];
    const IS_WIDE: bool = false;

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F32 {
        [value; LANES]
    }

    #[inline(always)]
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        zip(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        zip(a, b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        zip(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        zip(a, b, |a, b| a / b)
    }

    #[inline(always)]
    fn mul_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        std::array::from_fn(|lane| a[lane].mul_add(b[lane], c[lane]))
    }

    #[inline(always)]
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        zip(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        zip(a, b, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn select(self, mask: u16, a: Self::F32, b: Self::F32) -> Self::F32 {
        std::array::from_fn(|lane| if mask >> lane & 1 == 1 { a[lane] } else { b[lane] })
    }

    #[inline(always)]
    fn zero_where_less(self, value: Self::F32, x: Self::F32, limit: Self::F32) -> Self::F32 {
        std::array::from_fn(|lane| if x[lane] < limit[lane] { 0.0 } else { value[lane] })
    }

    #[inline(always)]
    fn add_exponent(self, value: Self::F32, shift: Self::F32) -> Self::F32 {
        zip(value, shift, |value, shift| f32::from_bits(value.to_bits().wrapping_add(shift.to_bits() << 23)))
    }

    #[inline(always)]
    fn to_array(self, value: Self::F32) -> [f32; LANES] {
        value
    }

    #[inline(always)]
    unsafe fn load(self, source: *const f32) -> Self::F32 {
        // SAFETY: the caller's promise.
        unsafe { source.cast::<[f32; LANES]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(self, target: *mut f32, value: Self::F32) {
        // SAFETY: the caller's promise.
        unsafe { target.cast::<[f32; LANES]>().write_unaligned(value) };
    }

    #[inline(always)]
    unsafe fn load_bf16_low(self, source: *const u8) -> Self::F32 {
        // SAFETY: the caller's promise.
        let words = unsafe { source.cast::<[u32; LANES]>().read_unaligned() };
        words.map(|word| f32::from_bits(u32::from_le(word) << 16))
    }

    #[inline(always)]
    unsafe fn load_bf16_high(self, source: *const u8) -> Self::F32 {
        // SAFETY: the caller's promise.
        let words = unsafe { source.cast::<[u32; LANES]>().read_unaligned() };
        words.map(|word| f32::from_bits(u32::from_le(word) & 0xffff_0000))
    }

    #[inline(always)]
    fn prefetch(self, _address: *const u8) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    struct EveryOperation {
        a: [f32; LANES],
        b: [f32; LANES],
        mask: u16,
    }

    struct RoundBf16([f32; LANES]);

    impl Kernel for RoundBf16 {
        type Output = [u16; LANES];

        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> [u16; LANES] {
            // SAFETY: the array holds 16 numbers.
            s.round_bf16(unsafe { s.load(self.0.as_ptr()) })
        }
    }

    /// A part of a vector, through memory and back.
    struct First {
        numbers: [f32; LANES],
        count: usize,
    }

    impl Kernel for First {
        type Output = [f32; LANES];

        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> [f32; LANES] {
            let mut target = [-1.0; LANES];
            // SAFETY: both arrays hold more than `count` numbers.
            unsafe {
                let value = s.load_first(self.numbers.as_ptr(), self.count);
                assert!(s.to_array(value)[self.count..].iter().all(|x| x.to_bits() == 0));
                s.store_first(target.as_mut_ptr(), value, self.count);
            }
            target
        }
    }

    impl Kernel for EveryOperation {
        type Output = Vec<u32>;

        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Vec<u32> {
            // SAFETY: the arrays hold 16 numbers, 64 bytes.
            let (a, b, low, high, first) = unsafe {
                let bytes = self.a.as_ptr().cast::<u8>();
                let (low, high) = (s.load_bf16_low(bytes), s.load_bf16_high(bytes));
                (s.load(self.a.as_ptr()), s.load(self.b.as_ptr()), low, high, s.load_first(self.b.as_ptr(), 5))
            };
            let vectors = [
                s.add(a, b),
                s.sub(a, b),
                s.mul(a, b),
                s.div(a, b),
                s.mul_add(a, b, first),
                s.max(a, b),
                s.min(a, b),
                s.select(self.mask, a, b),
                s.zero_where_less(a, b, s.splat(0.25)),
                s.add_exponent(a, s.splat(f32::from_bits(3))),
                low,
                high,
                s.splat(s.reduce_add(s.select(0x7fff, a, b))),
                s.splat(s.reduce_max(a)),
            ];
            vectors.into_iter().flat_map(|vector| s.to_array(vector).map(f32::to_bits)).collect()
        }
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let a: [f32; LANES] = std::array::from_fn(|lane| (lane as f32 * 0.77 - 3.1) * 1.3);
        let mut b: [f32; LANES] = std::array::from_fn(|lane| 5.0 - lane as f32 * 0.61);
        b[15] = f32::NAN;
        for isa in Isa::available() {
            for mask in [0, 1, 0x8001, 0xa5c3, 0xffff] {
                let wanted = EveryOperation { a, b, mask }.run(Portable);
                let found = dispatch(isa, EveryOperation { a, b, mask });
                for (wanted, found) in wanted.into_iter().zip(found) {
                    let both_nan = f32::from_bits(wanted).is_nan() && f32::from_bits(found).is_nan();
                    assert!(wanted == found || both_nan, "{isa}: {wanted:x} {found:x}");
                }
            }
        }
    }

    #[test]
    fn parts_of_vectors_are_read_and_written() {
        let numbers: [f32; LANES] = std::array::from_fn(|lane| lane as f32 + 0.5);
        for isa in Isa::available() {
            for count in 0..=LANES {
                let wanted: [f32; LANES] = std::array::from_fn(|lane| if lane < count { numbers[lane] } else { -1.0 });
                assert_eq!(dispatch(isa, First { numbers, count }), wanted, "{isa}, {count}");
            }
        }
    }

    #[test]
    fn every_kind_of_number_is_rounded_to_bf16() {
        // Every sign, exponent and upper half of a fraction, with lower halves around a tie: zeros, subnormal numbers,
        // infinities and NaN are among them.
        let lower = [0, 1, 0x7fff, 0x8000, 0x8001, 0xc000, 0xffff];
        let bits = (0..=u16::MAX).flat_map(|upper| lower.map(|lower| u32::from(upper) << 16 | lower));
        let numbers: Vec<f32> = bits.map(f32::from_bits).collect();
        for isa in Isa::available() {
            for numbers in numbers.as_chunks::<LANES>().0 {
                let wanted = numbers.map(|x| bf16::from_f32(x).to_bits());
                assert_eq!(dispatch(isa, RoundBf16(*numbers)), wanted, "{isa}, {numbers:?}");
            }
        }
    }
}
