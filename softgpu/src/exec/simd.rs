//! The instruction loop and the lane loops compiled for several instruction sets, chosen when the library starts.

use super::alu::{self, Alu};
use super::block::Block;
use super::isa::{Compare, Mma, NumType, SetPredicate, Wgmma};
use super::lanes::{FULL, LANES, Regs, test2};
use super::warp::{LaneResult, Stop, Warp};
use super::{mma, warpgroup};
use crate::fault::Fault;
use half::{bf16, f16};
use std::sync::OnceLock;

/// Running warps and functions over whole rows, for one instruction set.
#[derive(Clone, Copy)]
pub struct Simd {
    /// Name of the instruction set.
    pub name: &'static str,
    alu: unsafe fn(Alu, &mut Regs, u16, [u16; 3], u32),
    compare: unsafe fn(&SetPredicate, &Regs) -> u32,
    mma: unsafe fn(&Mma, &mut Regs),
    wgmma: unsafe fn(&Wgmma, &mut Warp, &mut Block) -> LaneResult<()>,
    run: unsafe fn(&mut Warp, &mut Block, u32) -> Result<Stop, Fault>,
}

impl Simd {
    /// `alu::run`.
    #[inline(always)]
    pub fn alu(&self, op: Alu, regs: &mut Regs, d: u16, s: [u16; 3], mask: u32) {
        // SAFETY: `detect` chose a function whose instruction set the CPU has.
        unsafe { (self.alu)(op, regs, d, s, mask) }
    }

    /// The lanes in which a comparison holds.
    #[inline(always)]
    pub fn compare(&self, op: &SetPredicate, regs: &Regs) -> u32 {
        // SAFETY: as above.
        unsafe { (self.compare)(op, regs) }
    }

    /// `mma::run`.
    #[inline(always)]
    pub fn mma(&self, op: &Mma, regs: &mut Regs) {
        // SAFETY: as above.
        unsafe { (self.mma)(op, regs) }
    }

    /// `warpgroup::multiply`.
    ///
    /// # Errors
    /// A finding, with the lane.
    #[inline(always)]
    pub fn wgmma(&self, op: &Wgmma, warp: &mut Warp, block: &mut Block) -> LaneResult<()> {
        // SAFETY: as above.
        unsafe { (self.wgmma)(op, warp, block) }
    }

    /// `Warp::run`.
    ///
    /// # Errors
    /// A finding, with the place.
    pub fn run(&self, warp: &mut Warp, block: &mut Block, slice: u32) -> Result<Stop, Fault> {
        // SAFETY: as above.
        unsafe { (self.run)(warp, block, slice) }
    }
}

macro_rules! variant {
    ($module:ident, $constant:ident, $name:literal $(, $features:literal)?) => {
        mod $module {
            use super::*;

            $(#[target_feature(enable = $features)])?
            unsafe fn alu(op: Alu, regs: &mut Regs, d: u16, s: [u16; 3], mask: u32) {
                alu::run(op, regs, d, s, mask);
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn compare(op: &SetPredicate, regs: &Regs) -> u32 {
                super::compare(op, regs)
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn mma(op: &Mma, regs: &mut Regs) {
                super::mma::run(op, regs);
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn wgmma(op: &Wgmma, warp: &mut Warp, block: &mut Block) -> LaneResult<()> {
                warpgroup::multiply(op, warp, block)
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn run(warp: &mut Warp, block: &mut Block, slice: u32) -> Result<Stop, Fault> {
                warp.run(block, slice)
            }

            pub(super) const $constant: Simd = Simd { name: $name, alu, compare, mma, wgmma, run };
        }
    };
}

variant!(portable, PORTABLE, "portable");
#[cfg(target_arch = "x86_64")]
variant!(avx2, AVX2, "avx2", "avx2,fma,bmi1,bmi2,popcnt,lzcnt,f16c");
#[cfg(target_arch = "x86_64")]
variant!(avx512, AVX512, "avx512", "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi1,bmi2,popcnt,lzcnt,f16c");

/// The best variant for this CPU; `SOFTGPU_SIMD` may ask for `portable` or `avx2`.
pub fn detect() -> &'static Simd {
    static CHOICE: OnceLock<Simd> = OnceLock::new();
    CHOICE.get_or_init(|| {
        let wanted = std::env::var("SOFTGPU_SIMD").unwrap_or_default();
        *available().iter().rev().find(|simd| wanted.is_empty() || simd.name == wanted).unwrap_or(&portable::PORTABLE)
    })
}

/// Every variant that this CPU can run, slowest first.
pub fn available() -> Vec<Simd> {
    let mut all = vec![portable::PORTABLE];
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
            all.push(avx2::AVX2);
        }
        if is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
        {
            all.push(avx512::AVX512);
        }
    }
    all
}

#[inline(always)]
fn compare(op: &SetPredicate, regs: &Regs) -> u32 {
    match op.ty {
        NumType::U8 | NumType::U16 => ordered::<u16>(op, regs),
        NumType::S8 | NumType::S16 => ordered::<i16>(op, regs),
        NumType::U32 => ordered::<u32>(op, regs),
        NumType::S32 => ordered::<i32>(op, regs),
        NumType::U64 => ordered::<u64>(op, regs),
        NumType::S64 => ordered::<i64>(op, regs),
        NumType::F32 => floating::<f32>(op, regs, f64::from),
        NumType::F64 => floating::<f64>(op, regs, |a| a),
        NumType::F16 => floating::<f16>(op, regs, f64::from),
        NumType::Bf16 => floating::<bf16>(op, regs, f64::from),
    }
}

#[inline(always)]
fn ordered<T: super::lanes::Lane + PartialOrd>(op: &SetPredicate, regs: &Regs) -> u32 {
    let (a, b) = (op.a, op.b);
    match op.compare {
        Compare::Eq => test2::<T>(regs, a, b, |a, b| a == b),
        Compare::Ne => test2::<T>(regs, a, b, |a, b| a != b),
        Compare::Lt => test2::<T>(regs, a, b, |a, b| a < b),
        Compare::Le => test2::<T>(regs, a, b, |a, b| a <= b),
        Compare::Gt => test2::<T>(regs, a, b, |a, b| a > b),
        Compare::Ge => test2::<T>(regs, a, b, |a, b| a >= b),
        Compare::Num => FULL,
        Compare::Nan => 0,
    }
}

#[inline(always)]
fn floating<T: super::lanes::Lane + PartialOrd>(op: &SetPredicate, regs: &Regs, wide: impl Fn(T) -> f64 + Copy) -> u32 {
    let nan = test2::<T>(regs, op.a, op.b, |a, b| wide(a).is_nan() || wide(b).is_nan());
    let holds = ordered::<T>(op, regs);
    match (op.compare, op.unordered) {
        (Compare::Num, _) => !nan,
        (Compare::Nan, _) => nan,
        (_, true) => holds | nan,
        (_, false) => holds & !nan,
    }
}

/// Replaces denormals by zeros of the same sign.
#[inline(always)]
pub fn flush(row: &mut [u32; LANES]) {
    for bits in row {
        *bits = if *bits & 0x7f80_0000 == 0 { *bits & 0x8000_0000 } else { *bits };
    }
}

/// Clamps to [0, 1]; NaN becomes 0.
#[inline(always)]
pub fn saturate(row: &mut [u32; LANES]) {
    for bits in row {
        let value = f32::from_bits(*bits);
        *bits = (if value.is_nan() { 0.0 } else { value.clamp(0.0, 1.0) }).to_bits();
    }
}
