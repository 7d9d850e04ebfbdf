//! Lane arithmetic: one table from PTX opcode to its function.
//!
//! A row reads: the opcodes without rounding (`.rn`), precision (`.approx`, `.full`), `.ftz` and `.sat`; a name; the
//! lane types; the function. `.ftz` and `.sat` are applied around it (see [`super::simd`]). Semantics from the
//! PTX ISA 9.0; approximate functions are computed to f32 accuracy, which is inside the documented error.

use super::lanes::{Regs, map1, map2, map3};
use half::{bf16, f16};

/// How many sources an operation has and in which rows they and the result live.
#[derive(Clone, Copy, Debug)]
pub struct Signature {
    /// For each source: does it live in 64-bit rows?
    pub sources: &'static [bool],
    /// Does the result live in 64-bit rows?
    pub wide: bool,
    /// Is the result a 32-bit float (so that `.ftz` and `.sat` mean something)?
    pub is_f32: bool,
}

macro_rules! alu {
    ($( $name:ident: $($op:literal)|+ => $map:ident ($($source:ty),+) -> $result:ty, $f:expr; )+) => {
        /// An operation on lanes; each variant is named after its opcode.
        #[allow(missing_docs)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Alu { $($name),+ }

        /// Finds the operation of an opcode, or `None`.
        pub fn lookup(opcode: &str) -> Option<Alu> {
            match opcode {
                $($($op)|+ => Some(Alu::$name),)+
                _ => None,
            }
        }

        /// The sources and the result of an operation.
        pub fn signature(op: Alu) -> Signature {
            use super::lanes::Lane;
            match op {
                $(Alu::$name => Signature {
                    sources: const { &[$(<$source as Lane>::WIDE),+] },
                    wide: <$result as Lane>::WIDE,
                    is_f32: const { str_eq(stringify!($result), "f32") },
                },)+
            }
        }

        /// Runs one operation on the lanes of `mask`.
        #[inline(always)]
        pub fn run(op: Alu, regs: &mut Regs, d: u16, s: [u16; 3], mask: u32) {
            match op {
                $(Alu::$name => $map::<$($source,)+ $result>(regs, d, s, mask, $f),)+
            }
        }
    };
}

const fn str_eq(a: &str, b: &str) -> bool {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    a.len() == 3 && b.len() == 3 && a[0] == b[0] && a[1] == b[1] && a[2] == b[2]
}

alu! {
    Mov32: "mov.b32"|"mov.u32"|"mov.s32"|"mov.f32"|"mov.b16"|"mov.u16"|"mov.s16"|"mov.f16" => map1(u32) -> u32, |a| a;
    Mov64: "mov.b64"|"mov.u64"|"mov.s64"|"mov.f64" => map1(u64) -> u64, |a| a;

    AddU16: "add.u16"|"add.s16" => map2(u16, u16) -> u16, u16::wrapping_add;
    SubU16: "sub.u16"|"sub.s16" => map2(u16, u16) -> u16, u16::wrapping_sub;
    MulLoU16: "mul.lo.u16"|"mul.lo.s16" => map2(u16, u16) -> u16, u16::wrapping_mul;
    MadLoU16: "mad.lo.u16"|"mad.lo.s16" => map3(u16, u16, u16) -> u16, |a, b, c| a.wrapping_mul(b).wrapping_add(c);
    MulWideU16: "mul.wide.u16" => map2(u16, u16) -> u32, |a, b| u32::from(a) * u32::from(b);
    MulWideS16: "mul.wide.s16" => map2(i16, i16) -> i32, |a, b| i32::from(a) * i32::from(b);
    MinU16: "min.u16" => map2(u16, u16) -> u16, u16::min;
    MaxU16: "max.u16" => map2(u16, u16) -> u16, u16::max;
    MinS16: "min.s16" => map2(i16, i16) -> i16, i16::min;
    MaxS16: "max.s16" => map2(i16, i16) -> i16, i16::max;
    DivU16: "div.u16" => map2(u16, u16) -> u16, |a, b| a.checked_div(b).unwrap_or(u16::MAX);
    RemU16: "rem.u16" => map2(u16, u16) -> u16, |a, b| a.checked_rem(b).unwrap_or(a);
    NegS16: "neg.s16" => map1(i16) -> i16, i16::wrapping_neg;
    AndB16: "and.b16" => map2(u16, u16) -> u16, |a, b| a & b;
    OrB16: "or.b16" => map2(u16, u16) -> u16, |a, b| a | b;
    XorB16: "xor.b16" => map2(u16, u16) -> u16, |a, b| a ^ b;
    NotB16: "not.b16" => map1(u16) -> u16, |a| !a;
    ShlB16: "shl.b16" => map2(u16, u32) -> u16, |a, b| if b < 16 { a << b } else { 0 };
    ShrU16: "shr.u16"|"shr.b16" => map2(u16, u32) -> u16, |a, b| if b < 16 { a >> b } else { 0 };
    ShrS16: "shr.s16" => map2(i16, u32) -> i16, |a, b| a >> b.min(15);

    AddU32: "add.u32"|"add.s32" => map2(u32, u32) -> u32, u32::wrapping_add;
    SubU32: "sub.u32"|"sub.s32" => map2(u32, u32) -> u32, u32::wrapping_sub;
    MulLoU32: "mul.lo.u32"|"mul.lo.s32" => map2(u32, u32) -> u32, u32::wrapping_mul;
    MulHiU32: "mul.hi.u32" => map2(u32, u32) -> u32, |a, b| ((u64::from(a) * u64::from(b)) >> 32) as u32;
    MulHiS32: "mul.hi.s32" => map2(i32, i32) -> i32, |a, b| ((i64::from(a) * i64::from(b)) >> 32) as i32;
    MulWideU32: "mul.wide.u32" => map2(u32, u32) -> u64, |a, b| u64::from(a) * u64::from(b);
    MulWideS32: "mul.wide.s32" => map2(i32, i32) -> i64, |a, b| i64::from(a) * i64::from(b);
    Mul24LoU32: "mul24.lo.u32" => map2(u32, u32) -> u32, |a, b| (a & 0xff_ffff).wrapping_mul(b & 0xff_ffff);
    MadLoU32: "mad.lo.u32"|"mad.lo.s32" => map3(u32, u32, u32) -> u32, |a, b, c| a.wrapping_mul(b).wrapping_add(c);
    MadHiU32: "mad.hi.u32" => map3(u32, u32, u32) -> u32,
        |a, b, c| (((u64::from(a) * u64::from(b)) >> 32) as u32).wrapping_add(c);
    MadHiS32: "mad.hi.s32" => map3(i32, i32, i32) -> i32,
        |a, b, c| (((i64::from(a) * i64::from(b)) >> 32) as i32).wrapping_add(c);
    MadWideU32: "mad.wide.u32" => map3(u32, u32, u64) -> u64, |a, b, c| (u64::from(a) * u64::from(b)).wrapping_add(c);
    MadWideS32: "mad.wide.s32" => map3(i32, i32, i64) -> i64, |a, b, c| (i64::from(a) * i64::from(b)).wrapping_add(c);
    MadWideU16: "mad.wide.u16" => map3(u16, u16, u32) -> u32, |a, b, c| (u32::from(a) * u32::from(b)).wrapping_add(c);
    MadWideS16: "mad.wide.s16" => map3(i16, i16, i32) -> i32, |a, b, c| (i32::from(a) * i32::from(b)).wrapping_add(c);
    DivU32: "div.u32" => map2(u32, u32) -> u32, |a, b| a.checked_div(b).unwrap_or(u32::MAX);
    DivS32: "div.s32" => map2(i32, i32) -> i32, |a, b| if b == 0 { -1 } else { a.wrapping_div(b) };
    RemU32: "rem.u32" => map2(u32, u32) -> u32, |a, b| a.checked_rem(b).unwrap_or(a);
    RemS32: "rem.s32" => map2(i32, i32) -> i32, |a, b| if b == 0 { a } else { a.wrapping_rem(b) };
    MinU32: "min.u32" => map2(u32, u32) -> u32, u32::min;
    MaxU32: "max.u32" => map2(u32, u32) -> u32, u32::max;
    MinS32: "min.s32" => map2(i32, i32) -> i32, i32::min;
    MaxS32: "max.s32" => map2(i32, i32) -> i32, i32::max;
    AbsS32: "abs.s32" => map1(i32) -> i32, i32::wrapping_abs;
    NegS32: "neg.s32" => map1(i32) -> i32, i32::wrapping_neg;
    SadU32: "sad.u32" => map3(u32, u32, u32) -> u32, |a, b, c| a.abs_diff(b).wrapping_add(c);
    SadS32: "sad.s32" => map3(i32, i32, u32) -> u32, |a, b, c| a.abs_diff(b).wrapping_add(c);
    AndB32: "and.b32" => map2(u32, u32) -> u32, |a, b| a & b;
    OrB32: "or.b32" => map2(u32, u32) -> u32, |a, b| a | b;
    XorB32: "xor.b32" => map2(u32, u32) -> u32, |a, b| a ^ b;
    NotB32: "not.b32" => map1(u32) -> u32, |a| !a;
    ShlB32: "shl.b32" => map2(u32, u32) -> u32, |a, b| if b < 32 { a << b } else { 0 };
    ShrU32: "shr.u32"|"shr.b32" => map2(u32, u32) -> u32, |a, b| if b < 32 { a >> b } else { 0 };
    ShrS32: "shr.s32" => map2(i32, u32) -> i32, |a, b| a >> b.min(31);
    ShfLWrap: "shf.l.wrap.b32" => map3(u32, u32, u32) -> u32, |a, b, c| (join(a, b) << (c & 31) >> 32) as u32;
    ShfRWrap: "shf.r.wrap.b32" => map3(u32, u32, u32) -> u32, |a, b, c| (join(a, b) >> (c & 31)) as u32;
    ShfLClamp: "shf.l.clamp.b32" => map3(u32, u32, u32) -> u32, |a, b, c| (join(a, b) << c.min(32) >> 32) as u32;
    ShfRClamp: "shf.r.clamp.b32" => map3(u32, u32, u32) -> u32, |a, b, c| (join(a, b) >> c.min(32)) as u32;
    BfeU32: "bfe.u32" => map3(u32, u32, u32) -> u32, |a, b, c| extract(u64::from(a), b, c, 32, false) as u32;
    BfeS32: "bfe.s32" => map3(i32, u32, u32) -> u32, |a, b, c| extract(i64::from(a) as u64, b, c, 32, true) as u32;
    BfeU64: "bfe.u64" => map3(u64, u32, u32) -> u64, |a, b, c| extract(a, b, c, 64, false);
    BfeS64: "bfe.s64" => map3(u64, u32, u32) -> u64, |a, b, c| extract(a, b, c, 64, true);
    Brev32: "brev.b32" => map1(u32) -> u32, u32::reverse_bits;
    Brev64: "brev.b64" => map1(u64) -> u64, u64::reverse_bits;
    Popc32: "popc.b32" => map1(u32) -> u32, u32::count_ones;
    Popc64: "popc.b64" => map1(u64) -> u32, u64::count_ones;
    Clz32: "clz.b32" => map1(u32) -> u32, u32::leading_zeros;
    Clz64: "clz.b64" => map1(u64) -> u32, u64::leading_zeros;
    BfindU32: "bfind.u32" => map1(u32) -> u32, |a| 31u32.wrapping_sub(a.leading_zeros());
    BfindS32: "bfind.s32" => map1(i32) -> u32, |a| 31u32.wrapping_sub((a ^ (a >> 31)).leading_zeros());
    BfindShiftU32: "bfind.shiftamt.u32" => map1(u32) -> u32, |a| if a == 0 { u32::MAX } else { a.leading_zeros() };
    BfindU64: "bfind.u64" => map1(u64) -> u32, |a| 63u32.wrapping_sub(a.leading_zeros());
    Prmt: "prmt.b32" => map3(u32, u32, u32) -> u32, permute;

    AddU64: "add.u64"|"add.s64" => map2(u64, u64) -> u64, u64::wrapping_add;
    SubU64: "sub.u64"|"sub.s64" => map2(u64, u64) -> u64, u64::wrapping_sub;
    MulLoU64: "mul.lo.u64"|"mul.lo.s64" => map2(u64, u64) -> u64, u64::wrapping_mul;
    MulHiU64: "mul.hi.u64" => map2(u64, u64) -> u64, |a, b| ((u128::from(a) * u128::from(b)) >> 64) as u64;
    MulHiS64: "mul.hi.s64" => map2(i64, i64) -> i64, |a, b| ((i128::from(a) * i128::from(b)) >> 64) as i64;
    MadLoU64: "mad.lo.u64"|"mad.lo.s64" => map3(u64, u64, u64) -> u64, |a, b, c| a.wrapping_mul(b).wrapping_add(c);
    DivU64: "div.u64" => map2(u64, u64) -> u64, |a, b| a.checked_div(b).unwrap_or(u64::MAX);
    DivS64: "div.s64" => map2(i64, i64) -> i64, |a, b| if b == 0 { -1 } else { a.wrapping_div(b) };
    RemU64: "rem.u64" => map2(u64, u64) -> u64, |a, b| a.checked_rem(b).unwrap_or(a);
    RemS64: "rem.s64" => map2(i64, i64) -> i64, |a, b| if b == 0 { a } else { a.wrapping_rem(b) };
    MinU64: "min.u64" => map2(u64, u64) -> u64, u64::min;
    MaxU64: "max.u64" => map2(u64, u64) -> u64, u64::max;
    MinS64: "min.s64" => map2(i64, i64) -> i64, i64::min;
    MaxS64: "max.s64" => map2(i64, i64) -> i64, i64::max;
    AbsS64: "abs.s64" => map1(i64) -> i64, i64::wrapping_abs;
    NegS64: "neg.s64" => map1(i64) -> i64, i64::wrapping_neg;
    AndB64: "and.b64" => map2(u64, u64) -> u64, |a, b| a & b;
    OrB64: "or.b64" => map2(u64, u64) -> u64, |a, b| a | b;
    XorB64: "xor.b64" => map2(u64, u64) -> u64, |a, b| a ^ b;
    NotB64: "not.b64" => map1(u64) -> u64, |a| !a;
    ShlB64: "shl.b64" => map2(u64, u32) -> u64, |a, b| if b < 64 { a << b } else { 0 };
    ShrU64: "shr.u64"|"shr.b64" => map2(u64, u32) -> u64, |a, b| if b < 64 { a >> b } else { 0 };
    ShrS64: "shr.s64" => map2(i64, u32) -> i64, |a, b| a >> b.min(63);

    AddF32: "add.f32" => map2(f32, f32) -> f32, |a, b| a + b;
    SubF32: "sub.f32" => map2(f32, f32) -> f32, |a, b| a - b;
    MulF32: "mul.f32" => map2(f32, f32) -> f32, |a, b| a * b;
    FmaF32: "fma.f32"|"mad.f32" => map3(f32, f32, f32) -> f32, f32::mul_add;
    FmaRzF32: "fma.rz.f32" => map3(f32, f32, f32) -> f32, |a, b, c| round_to_zero(exact_fma(a, b, c));
    FmaRmF32: "fma.rm.f32" => map3(f32, f32, f32) -> f32, |a, b, c| round_down(exact_fma(a, b, c));
    FmaRpF32: "fma.rp.f32" => map3(f32, f32, f32) -> f32, |a, b, c| -round_down(-exact_fma(a, b, c));
    AddRzF32: "add.rz.f32" => map2(f32, f32) -> f32, |a, b| round_to_zero(f64::from(a) + f64::from(b));
    AddRmF32: "add.rm.f32" => map2(f32, f32) -> f32, |a, b| round_down(f64::from(a) + f64::from(b));
    MulRzF32: "mul.rz.f32" => map2(f32, f32) -> f32, |a, b| round_to_zero(f64::from(a) * f64::from(b));
    DivF32: "div.f32" => map2(f32, f32) -> f32, |a, b| a / b;
    MinF32: "min.f32" => map2(f32, f32) -> f32, f32_min;
    MaxF32: "max.f32" => map2(f32, f32) -> f32, f32_max;
    MinNanF32: "min.NaN.f32" => map2(f32, f32) -> f32,
        |a, b| if a.is_nan() || b.is_nan() { f32::NAN } else { f32_min(a, b) };
    MaxNanF32: "max.NaN.f32" => map2(f32, f32) -> f32,
        |a, b| if a.is_nan() || b.is_nan() { f32::NAN } else { f32_max(a, b) };
    AbsF32: "abs.f32" => map1(f32) -> f32, f32::abs;
    NegF32: "neg.f32" => map1(f32) -> f32, |a| -a;
    CopysignF32: "copysign.f32" => map2(f32, f32) -> f32, |a, b| b.copysign(a);
    SqrtF32: "sqrt.f32" => map1(f32) -> f32, f32::sqrt;
    RsqrtF32: "rsqrt.f32" => map1(f32) -> f32, |a| (1.0 / f64::from(a).sqrt()) as f32;
    RcpF32: "rcp.f32" => map1(f32) -> f32, |a| 1.0 / a;
    Ex2F32: "ex2.f32" => map1(f32) -> f32, exp2;
    Lg2F32: "lg2.f32" => map1(f32) -> f32, f32::log2;
    SinF32: "sin.f32" => map1(f32) -> f32, f32::sin;
    CosF32: "cos.f32" => map1(f32) -> f32, f32::cos;
    TanhF32: "tanh.f32" => map1(f32) -> f32, f32::tanh;

    AddF64: "add.f64" => map2(f64, f64) -> f64, |a, b| a + b;
    SubF64: "sub.f64" => map2(f64, f64) -> f64, |a, b| a - b;
    MulF64: "mul.f64" => map2(f64, f64) -> f64, |a, b| a * b;
    FmaF64: "fma.f64"|"mad.f64" => map3(f64, f64, f64) -> f64, f64::mul_add;
    DivF64: "div.f64" => map2(f64, f64) -> f64, |a, b| a / b;
    MinF64: "min.f64" => map2(f64, f64) -> f64, f64::min;
    MaxF64: "max.f64" => map2(f64, f64) -> f64, f64::max;
    AbsF64: "abs.f64" => map1(f64) -> f64, f64::abs;
    NegF64: "neg.f64" => map1(f64) -> f64, |a| -a;
    CopysignF64: "copysign.f64" => map2(f64, f64) -> f64, |a, b| b.copysign(a);
    SqrtF64: "sqrt.f64" => map1(f64) -> f64, f64::sqrt;
    RsqrtF64: "rsqrt.f64" => map1(f64) -> f64, |a| 1.0 / a.sqrt();
    RcpF64: "rcp.f64"|"rcp.ftz.f64" => map1(f64) -> f64, |a| 1.0 / a;

    AddF16: "add.f16" => map2(f16, f16) -> f16, |a, b| half_of(single(a) + single(b));
    SubF16: "sub.f16" => map2(f16, f16) -> f16, |a, b| half_of(single(a) - single(b));
    MulF16: "mul.f16" => map2(f16, f16) -> f16, |a, b| half_of(single(a) * single(b));
    FmaF16: "fma.f16" => map3(f16, f16, f16) -> f16, fma_f16;
    MinF16: "min.f16" => map2(f16, f16) -> f16, |a, b| half_of(f32_min(single(a), single(b)));
    MaxF16: "max.f16" => map2(f16, f16) -> f16, |a, b| half_of(f32_max(single(a), single(b)));
    NegF16: "neg.f16"|"neg.bf16" => map1(u16) -> u16, |a| a ^ 0x8000;
    AbsF16: "abs.f16"|"abs.bf16" => map1(u16) -> u16, |a| a & 0x7fff;
    Ex2F16: "ex2.f16" => map1(f16) -> f16, |a| half_of(single(a).exp2());
    TanhF16: "tanh.f16" => map1(f16) -> f16, |a| half_of(single(a).tanh());
    AddBf16: "add.bf16" => map2(bf16, bf16) -> bf16, |a, b| brain_of(brain(a) + brain(b));
    SubBf16: "sub.bf16" => map2(bf16, bf16) -> bf16, |a, b| brain_of(brain(a) - brain(b));
    MulBf16: "mul.bf16" => map2(bf16, bf16) -> bf16, |a, b| brain_of(brain(a) * brain(b));
    FmaBf16: "fma.bf16" => map3(bf16, bf16, bf16) -> bf16, fma_bf16;
    MinBf16: "min.bf16" => map2(bf16, bf16) -> bf16, |a, b| brain_of(f32_min(brain(a), brain(b)));
    MaxBf16: "max.bf16" => map2(bf16, bf16) -> bf16, |a, b| brain_of(f32_max(brain(a), brain(b)));

    AddF16x2: "add.f16x2" => map2(u32, u32) -> u32, |a, b| halves(a, b, |x, y| half_of(single(x) + single(y)));
    SubF16x2: "sub.f16x2" => map2(u32, u32) -> u32, |a, b| halves(a, b, |x, y| half_of(single(x) - single(y)));
    MulF16x2: "mul.f16x2" => map2(u32, u32) -> u32, |a, b| halves(a, b, |x, y| half_of(single(x) * single(y)));
    MinF16x2: "min.f16x2" => map2(u32, u32) -> u32, |a, b| halves(a, b, |x, y| half_of(f32_min(single(x), single(y))));
    MaxF16x2: "max.f16x2" => map2(u32, u32) -> u32, |a, b| halves(a, b, |x, y| half_of(f32_max(single(x), single(y))));
    FmaF16x2: "fma.f16x2" => map3(u32, u32, u32) -> u32, |a, b, c| pack(
        fma_f16(f16::from_bits(a as u16), f16::from_bits(b as u16), f16::from_bits(c as u16)).to_bits(),
        fma_f16(f16::from_bits((a >> 16) as u16), f16::from_bits((b >> 16) as u16), f16::from_bits((c >> 16) as u16)).to_bits());
    NegF16x2: "neg.f16x2"|"neg.bf16x2" => map1(u32) -> u32, |a| a ^ 0x8000_8000;
    AbsF16x2: "abs.f16x2"|"abs.bf16x2" => map1(u32) -> u32, |a| a & 0x7fff_7fff;
    AddBf16x2: "add.bf16x2" => map2(u32, u32) -> u32, |a, b| brains(a, b, |x, y| x + y);
    SubBf16x2: "sub.bf16x2" => map2(u32, u32) -> u32, |a, b| brains(a, b, |x, y| x - y);
    MulBf16x2: "mul.bf16x2" => map2(u32, u32) -> u32, |a, b| brains(a, b, |x, y| x * y);
    MinBf16x2: "min.bf16x2" => map2(u32, u32) -> u32, |a, b| brains(a, b, f32_min);
    MaxBf16x2: "max.bf16x2" => map2(u32, u32) -> u32, |a, b| brains(a, b, f32_max);
    FmaBf16x2: "fma.bf16x2" => map3(u32, u32, u32) -> u32, |a, b, c| pack(
        fma_bf16(bf16::from_bits(a as u16), bf16::from_bits(b as u16), bf16::from_bits(c as u16)).to_bits(),
        fma_bf16(bf16::from_bits((a >> 16) as u16), bf16::from_bits((b >> 16) as u16), bf16::from_bits((c >> 16) as u16)).to_bits());

    CvtU64U32: "cvt.u64.u32"|"cvt.s64.u32" => map1(u32) -> u64, u64::from;
    CvtS64S32: "cvt.s64.s32"|"cvt.u64.s32" => map1(i32) -> i64, i64::from;
    CvtU32U64: "cvt.u32.u64"|"cvt.s32.s64"|"cvt.u32.s64"|"cvt.s32.u64" => map1(u64) -> u32, |a| a as u32;
    CvtU32U16: "cvt.u32.u16"|"cvt.s32.u16" => map1(u16) -> u32, u32::from;
    CvtS32S16: "cvt.s32.s16"|"cvt.u32.s16" => map1(i16) -> i32, i32::from;
    CvtU16U32: "cvt.u16.u32"|"cvt.u16.s32"|"cvt.s16.s32"|"cvt.s16.u32" => map1(u32) -> u16, |a| a as u16;
    CvtF32S32: "cvt.f32.s32" => map1(i32) -> f32, |a| a as f32;
    CvtF32U32: "cvt.f32.u32" => map1(u32) -> f32, |a| a as f32;
    CvtRniS32F32: "cvt.rni.s32.f32" => map1(f32) -> i32, |a| a.round_ties_even() as i32;
    CvtRziS32F32: "cvt.rzi.s32.f32" => map1(f32) -> i32, |a| a as i32;
    CvtRziU32F32: "cvt.rzi.u32.f32" => map1(f32) -> u32, |a| a as u32;
    CvtF32F32: "cvt.f32.f32" => map1(f32) -> f32, |a| a;
    CvtRniF32F32: "cvt.rni.f32.f32" => map1(f32) -> f32, f32::round_ties_even;
    CvtRziF32F32: "cvt.rzi.f32.f32" => map1(f32) -> f32, f32::trunc;
    CvtRmiF32F32: "cvt.rmi.f32.f32" => map1(f32) -> f32, f32::floor;
    CvtRpiF32F32: "cvt.rpi.f32.f32" => map1(f32) -> f32, f32::ceil;
    CvtF32F16: "cvt.f32.f16" => map1(f16) -> f32, single;
    CvtF16F32: "cvt.f16.f32" => map1(f32) -> f16, half_of;
    CvtF32Bf16: "cvt.f32.bf16" => map1(bf16) -> f32, brain;
    CvtBf16F32: "cvt.bf16.f32" => map1(f32) -> bf16, brain_of;
    CvtRzBf16F32: "cvt.rz.bf16.f32" => map1(f32) -> u16, |a| (a.to_bits() >> 16) as u16;
    CvtReluBf16F32: "cvt.relu.bf16.f32" => map1(f32) -> bf16, |a| brain_of(f32_max(a, 0.0));
    CvtF16x2F32: "cvt.f16x2.f32" => map2(f32, f32) -> u32, |a, b| pack(half_of(b).to_bits(), half_of(a).to_bits());
    CvtBf16x2F32: "cvt.bf16x2.f32" => map2(f32, f32) -> u32, |a, b| pack(brain_of(b).to_bits(), brain_of(a).to_bits());
    CvtF64F32: "cvt.f64.f32" => map1(f32) -> f64, f64::from;
    CvtF32F64: "cvt.f32.f64" => map1(f64) -> f32, |a| a as f32;
}

#[inline(always)]
fn join(low: u32, high: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

#[inline(always)]
fn pack(low: u16, high: u16) -> u32 {
    u32::from(high) << 16 | u32::from(low)
}

#[inline(always)]
fn single(a: f16) -> f32 {
    super::convert::f16_to_f32(a.to_bits())
}

#[inline(always)]
fn half_of(a: f32) -> f16 {
    f16::from_bits(super::convert::f32_to_f16(a))
}

#[inline(always)]
fn brain(a: bf16) -> f32 {
    f32::from_bits(u32::from(a.to_bits()) << 16)
}

#[inline(always)]
fn brain_of(a: f32) -> bf16 {
    bf16::from_bits(super::convert::f32_to_bf16(a))
}

#[inline(always)]
fn halves(a: u32, b: u32, f: impl Fn(f16, f16) -> f16) -> u32 {
    let low = f(f16::from_bits(a as u16), f16::from_bits(b as u16));
    let high = f(f16::from_bits((a >> 16) as u16), f16::from_bits((b >> 16) as u16));
    pack(low.to_bits(), high.to_bits())
}

#[inline(always)]
fn brains(a: u32, b: u32, f: impl Fn(f32, f32) -> f32) -> u32 {
    let low = f(f32::from_bits(a << 16), f32::from_bits(b << 16));
    let high = f(f32::from_bits(a & 0xffff_0000), f32::from_bits(b & 0xffff_0000));
    pack(brain_of(low).to_bits(), brain_of(high).to_bits())
}

/// One rounding: the product and sum of halves are exact enough in f64.
fn fma_f16(a: f16, b: f16, c: f16) -> f16 {
    f16::from_f64(a.to_f64() * b.to_f64() + c.to_f64())
}

fn fma_bf16(a: bf16, b: bf16, c: bf16) -> bf16 {
    bf16::from_f64(a.to_f64() * b.to_f64() + c.to_f64())
}

/// PTX `min`: a number beats a NaN, -0 is below +0.
#[inline(always)]
pub(super) fn f32_min(a: f32, b: f32) -> f32 {
    if a.is_nan() || b < a || (a == b && b.is_sign_negative()) { b } else { a }
}

/// PTX `max`: a number beats a NaN, +0 is above -0.
#[inline(always)]
pub(super) fn f32_max(a: f32, b: f32) -> f32 {
    if a.is_nan() || b > a || (a == b && b.is_sign_positive()) { b } else { a }
}

/// 2^x: the fraction by a polynomial of degree 7 on [-0.5, 0.5] (Taylor, below 1.5 ulp), the integer part by the
/// exponent in two steps so that denormal results round once.
#[inline(always)]
fn exp2(x: f32) -> f32 {
    let clamped = if x.is_nan() { 0.0 } else { x.clamp(-151.0, 129.0) };
    let whole = clamped.round_ties_even();
    let t = (clamped - whole) * std::f32::consts::LN_2;
    let mut p = 1.0 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = p * t + c;
    }
    let n = whole as i32;
    let first = n / 2;
    let scale = |e: i32| f32::from_bits(((e + 127) as u32) << 23);
    let value = p * scale(first) * scale(n - first);
    if x.is_nan() { x } else { value }
}

#[inline(always)]
fn exact_fma(a: f32, b: f32, c: f32) -> f64 {
    f64::from(a) * f64::from(b) + f64::from(c)
}

#[inline(always)]
fn round_down(x: f64) -> f32 {
    let near = x as f32;
    if f64::from(near) > x { near.next_down() } else { near }
}

#[inline(always)]
fn round_to_zero(x: f64) -> f32 {
    let near = x as f32;
    if f64::from(near).abs() > x.abs() { if x > 0.0 { near.next_down() } else { near.next_up() } } else { near }
}

/// PTX `bfe`: position and length are taken modulo 256; bits beyond the value are its sign (or zero).
fn extract(a: u64, position: u32, length: u32, bits: u32, signed: bool) -> u64 {
    let (position, length) = (position & 0xff, length & 0xff);
    if length == 0 {
        return 0;
    }
    let sign_at = (position + length - 1).min(bits - 1);
    let fill = signed && a >> sign_at & 1 == 1;
    let field = if position >= bits { 0 } else { (a & (u64::MAX >> (64 - bits))) >> position };
    let taken = length.min(bits.saturating_sub(position));
    let mask = if taken == 0 { 0 } else { u64::MAX >> (64 - taken) };
    if fill { field | !mask } else { field & mask }
}

/// PTX `bfi` on 64 bits; narrower values pass zero-extended.
pub(super) fn insert(field: u64, base: u64, position: u32, length: u32, bits: u32) -> u64 {
    let (position, length) = (position & 0xff, length & 0xff);
    if length == 0 || position >= bits {
        return base;
    }
    let length = length.min(bits - position);
    let mask = (u64::MAX >> (64 - length)) << position;
    base & !mask | field << position & mask
}

/// PTX `prmt` in its default mode.
#[inline(always)]
fn permute(a: u32, b: u32, selector: u32) -> u32 {
    let bytes = join(a, b);
    let mut out = 0;
    for i in 0..4 {
        let select = selector >> (4 * i) & 0xf;
        let byte = (bytes >> (8 * (select & 7))) as u8;
        let byte = if select & 8 != 0 { ((byte as i8) >> 7) as u8 } else { byte };
        out |= u32::from(byte) << (8 * i);
    }
    out
}
