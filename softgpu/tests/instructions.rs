//! Each instruction group against plain Rust, on every instruction set of this CPU, in full and in partial warps.

mod support;

use half::{bf16, f16};
use softgpu::exec::simd;
use support::{Arg, Gpu};

/// Threads per run: one full warp and one of 13.
const THREADS: u32 = 45;

/// A kernel that loads a, b and c as 64, 32 and 16 bits, runs `body`, and stores `%d` (64 bits; `%r` widened if `narrow`).
fn program(body: &str, narrow: bool) -> String {
    let widen = if narrow { "cvt.u64.u32 %d, %r;" } else { "" };
    format!(
        ".version 9.0\n.target sm_80\n.address_size 64\n\
         .visible .entry k(.param .u64 pa, .param .u64 pb, .param .u64 pc, .param .u64 pd)\n{{\n\
         .reg .b64 %a, %b, %c, %d, %x<9>; .reg .b32 %ra, %rb, %rc, %r, %t<9>; .reg .b16 %ha, %hb, %hc, %h;\n\
         .reg .pred %p, %q;\n\
         ld.param.u64 %x0, [pa]; ld.param.u64 %x1, [pb]; ld.param.u64 %x2, [pc]; ld.param.u64 %x3, [pd];\n\
         mov.u32 %t0, %tid.x; mul.wide.u32 %x4, %t0, 8;\n\
         add.s64 %x0, %x0, %x4; add.s64 %x1, %x1, %x4; add.s64 %x2, %x2, %x4; add.s64 %x3, %x3, %x4;\n\
         ld.global.u64 %a, [%x0]; ld.global.u64 %b, [%x1]; ld.global.u64 %c, [%x2];\n\
         ld.global.u32 %ra, [%x0]; ld.global.u32 %rb, [%x1]; ld.global.u32 %rc, [%x2];\n\
         ld.global.u16 %ha, [%x0]; ld.global.u16 %hb, [%x1]; ld.global.u16 %hc, [%x2];\n\
         mov.u32 %r, 0; mov.u64 %d, 0;\n{body}\n{widen}\nst.global.u64 [%x3], %d;\nret;\n}}\n"
    )
}

const EDGES: [u64; 20] = [
    0,
    1,
    2,
    31,
    32,
    33,
    63,
    64,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x3f80_0000,
    0xbf80_0000,
    0x7fff,
    0x8000,
    0xffff,
    0x7fff_ffff_ffff_ffff,
    0x8000_0000_0000_0000,
    u64::MAX,
    0x4048_f5c3,
];

/// Inputs: edges against each other, then noise.
fn inputs(round: u64) -> [Vec<u64>; 3] {
    let mut rng = softgpu::rng::Rng::new(round);
    let mut pick = || if rng.below(3) == 0 { EDGES[rng.below(EDGES.len())] } else { rng.bits() };
    std::array::from_fn(|_| (0..THREADS).map(|_| pick()).collect())
}

/// Finite f32 of moderate size in the low half.
fn float_inputs(round: u64) -> [Vec<u64>; 3] {
    let make =
        |seed: u64| support::values(THREADS as usize, seed).iter().map(|v| u64::from((v * 20.0).to_bits())).collect();
    std::array::from_fn(|i| make(round * 3 + i as u64))
}

fn run(body: &str, narrow: bool, inputs: &[Vec<u64>; 3], check: impl Fn(u64, u64, u64, u64)) {
    for simd in simd::available() {
        let mut gpu = Gpu::new(&program(body, narrow));
        gpu.simd = simd;
        let [a, b, c] = inputs.each_ref().map(|v| gpu.upload(v));
        let out = gpu.reserve(8 * THREADS as usize);
        let args = [a, b, c, out].map(Arg::Pointer);
        gpu.launch("k", [1; 3], [THREADS, 1, 1], 0, &args).unwrap_or_else(|f| panic!("{body}: {f}"));
        let got = gpu.download::<u64>(out, THREADS as usize);
        for i in 0..THREADS as usize {
            check(inputs[0][i], inputs[1][i], inputs[2][i], got[i]);
        }
    }
}

/// The result must be the reference's, bit for bit.
fn exact(body: &str, narrow: bool, want: impl Fn(u64, u64, u64) -> u64) {
    for round in 0..4 {
        run(body, narrow, &inputs(round), |a, b, c, got| {
            assert_eq!(got, want(a, b, c), "{body} on {a:#x}, {b:#x}, {c:#x}");
        });
    }
}

fn exact32(body: &str, want: impl Fn(u32, u32, u32) -> u32) {
    exact(body, true, |a, b, c| u64::from(want(a as u32, b as u32, c as u32)));
}

fn exact16(body: &str, want: impl Fn(u16, u16, u16) -> u16) {
    exact(&format!("{body} cvt.u32.u16 %r, %h;"), true, |a, b, c| u64::from(want(a as u16, b as u16, c as u16)));
}

/// A float result within `tolerance`, relative above 1 and absolute below.
fn near(body: &str, tolerance: f32, want: impl Fn(f32, f32, f32) -> f32) {
    for round in 0..4 {
        run(body, true, &float_inputs(round), |a, b, c, got| {
            let [a, b, c, got] = [a, b, c, got].map(|v| f32::from_bits(v as u32));
            let want = want(a, b, c);
            let same = got == want || got.is_nan() && want.is_nan();
            assert!(
                same || (got - want).abs() <= tolerance * want.abs().max(1.0),
                "{body}({a}, {b}, {c}): {got}, not {want}"
            );
        });
    }
}

#[test]
fn integer_arithmetic() {
    exact32("add.s32 %r, %ra, %rb;", |a, b, _| a.wrapping_add(b));
    exact32("sub.s32 %r, %ra, %rb;", |a, b, _| a.wrapping_sub(b));
    exact32("mul.lo.s32 %r, %ra, %rb;", |a, b, _| a.wrapping_mul(b));
    exact32("mul.hi.u32 %r, %ra, %rb;", |a, b, _| ((u64::from(a) * u64::from(b)) >> 32) as u32);
    exact32("mul.hi.s32 %r, %ra, %rb;", |a, b, _| ((i64::from(a as i32) * i64::from(b as i32)) >> 32) as u32);
    exact32("mad.lo.s32 %r, %ra, %rb, %rc;", |a, b, c| a.wrapping_mul(b).wrapping_add(c));
    exact32("div.u32 %r, %ra, %rb;", |a, b, _| a.checked_div(b).unwrap_or(u32::MAX));
    exact32("rem.s32 %r, %ra, 7;", |a, _, _| (a as i32 % 7) as u32);
    exact32("div.s32 %r, %ra, -3;", |a, _, _| (a as i32).wrapping_div(-3) as u32);
    exact32("min.s32 %r, %ra, %rb;", |a, b, _| (a as i32).min(b as i32) as u32);
    exact32("max.u32 %r, %ra, %rb;", |a, b, _| a.max(b));
    exact32("abs.s32 %r, %ra;", |a, _, _| (a as i32).wrapping_abs() as u32);
    exact32("neg.s32 %r, %ra;", |a, _, _| a.wrapping_neg());
    exact("mul.wide.u32 %d, %ra, %rb;", false, |a, b, _| u64::from(a as u32) * u64::from(b as u32));
    exact("mul.wide.s32 %d, %ra, %rb;", false, |a, b, _| (i64::from(a as i32) * i64::from(b as i32)) as u64);
    exact("mad.wide.s32 %d, %ra, %rb, %c;", false, |a, b, c| {
        (i64::from(a as i32) * i64::from(b as i32)).wrapping_add(c as i64) as u64
    });
    exact("mul.lo.s64 %d, %a, %b;", false, |a, b, _| a.wrapping_mul(b));
    exact("mul.hi.s64 %d, %a, %b;", false, |a, b, _| ((i128::from(a as i64) * i128::from(b as i64)) >> 64) as u64);
    exact("sub.s64 %d, %a, %b;", false, |a, b, _| a.wrapping_sub(b));
    exact("div.s64 %d, %a, 10;", false, |a, _, _| (a as i64 / 10) as u64);
    exact("rem.u64 %d, %a, 1000;", false, |a, _, _| a % 1000);
    exact("max.s64 %d, %a, %b;", false, |a, b, _| (a as i64).max(b as i64) as u64);
    exact16("add.s16 %h, %ha, %hb;", |a, b, _| a.wrapping_add(b));
    exact16("mul.lo.u16 %h, %ha, %hb;", |a, b, _| a.wrapping_mul(b));
    exact16("shr.s16 %h, %ha, 3;", |a, _, _| ((a as i16) >> 3) as u16);
    exact16("max.s16 %h, %ha, %hb;", |a, b, _| (a as i16).max(b as i16) as u16);
}

#[test]
fn bits() {
    exact32("and.b32 %r, %ra, %rb;", |a, b, _| a & b);
    exact32("xor.b32 %r, %ra, -1;", |a, _, _| !a);
    exact32("not.b32 %r, %ra;", |a, _, _| !a);
    exact32("shl.b32 %r, %ra, %rb;", |a, b, _| a.checked_shl(b).unwrap_or(0));
    exact32("shr.u32 %r, %ra, %rb;", |a, b, _| a.checked_shr(b).unwrap_or(0));
    exact32("shr.s32 %r, %ra, %rb;", |a, b, _| ((a as i32) >> b.min(31)) as u32);
    exact("shl.b64 %d, %a, %rb;", false, |a, b, _| a.checked_shl(b as u32).unwrap_or(0));
    exact("shr.s64 %d, %a, 5;", false, |a, _, _| ((a as i64) >> 5) as u64);
    exact32("popc.b32 %r, %ra;", |a, _, _| a.count_ones());
    exact32("clz.b32 %r, %ra;", |a, _, _| a.leading_zeros());
    exact("popc.b64 %r, %a;", true, |a, _, _| u64::from(a.count_ones()));
    exact32("brev.b32 %r, %ra;", |a, _, _| a.reverse_bits());
    exact32("bfind.u32 %r, %ra;", |a, _, _| if a == 0 { u32::MAX } else { 31 - a.leading_zeros() });
    exact32("shf.l.wrap.b32 %r, %ra, %rb, %rc;", |a, b, c| {
        (((u64::from(b) << 32 | u64::from(a)) << (c & 31)) >> 32) as u32
    });
    exact32("shf.r.clamp.b32 %r, %ra, %rb, %rc;", |a, b, c| ((u64::from(b) << 32 | u64::from(a)) >> c.min(32)) as u32);
    exact32("lop3.b32 %r, %ra, %rb, %rc, 0xe8;", |a, b, c| a & b | b & c | a & c);
    exact32("lop3.b32 %r, %ra, %rb, %rc, 0x1e;", |a, b, c| a ^ (b | c));
    exact32("bfe.u32 %r, %ra, 5, 9;", |a, _, _| a >> 5 & 0x1ff);
    exact32("bfe.s32 %r, %ra, 28, 9;", |a, _, _| ((a as i32) >> 28) as u32);
    exact32("bfi.b32 %r, %ra, %rb, 8, 12;", |a, b, _| b & !0xfff00 | (a & 0xfff) << 8);
    exact("bfi.b64 %d, %a, %b, 40, 30;", false, |a, b, _| b & !(0xff_ffff << 40) | a << 40);
    exact32("prmt.b32 %r, %ra, %rb, 0x5410;", |a, b, _| a & 0xffff | b << 16);
    exact32("prmt.b32 %r, %ra, %rb, 0x7632;", |a, b, _| a >> 16 | b & 0xffff_0000);
    exact32("prmt.b32 %r, %ra, 0, 0x8888;", |a, _, _| if a & 0x80 != 0 { u32::MAX } else { 0 });
    exact32("{ .reg .b16 lo, hi; mov.b32 {lo, hi}, %ra; mov.b32 %r, {hi, lo}; }", |a, _, _| a.rotate_left(16));
    exact("{ .reg .b32 lo; mov.b64 {lo, %r}, %a; }", true, |a, _, _| a >> 32);
}

#[test]
fn comparison_and_selection() {
    let pick = |test: &str| format!("{test} selp.b32 %r, %rb, %rc, %p;");
    exact32(&pick("setp.lt.s32 %p, %ra, %rb;"), |a, b, c| if (a as i32) < b as i32 { b } else { c });
    exact32(&pick("setp.hi.u32 %p, %ra, %rb;"), |a, b, c| if a > b { b } else { c });
    exact(&pick("setp.ge.u64 %p, %a, %b;"), true, |a, b, c| u64::from((if a >= b { b } else { c }) as u32));
    exact32(&pick("setp.eq.s16 %p, %ha, %hb;"), |a, b, c| if a as u16 == b as u16 { b } else { c });
    let f = f32::from_bits;
    exact32(&pick("setp.gt.f32 %p, %ra, %rb;"), |a, b, c| if f(a) > f(b) { b } else { c });
    exact32(&pick("setp.gtu.f32 %p, %ra, %rb;"), |a, b, c| if f(a) <= f(b) { c } else { b });
    exact32(&pick("setp.neu.f32 %p, %ra, %rb;"), |a, b, c| if f(a) == f(b) { c } else { b });
    exact32(&pick("setp.nan.f32 %p, %ra, %rb;"), |a, b, c| if f(a).is_nan() || f(b).is_nan() { b } else { c });
    exact32(
        &pick("setp.ne.s32 %q, %rc, 0; setp.lt.and.u32 %p, %ra, %rb, %q;"),
        |a, b, c| if a < b && c != 0 { b } else { c },
    );
    exact32(&pick("setp.lt.u32 %q, %ra, %rb; not.pred %p, %q;"), |a, b, c| if a < b { c } else { b });
    exact32(&pick("setp.lt.u32 %q, %ra, %rb; xor.pred %p, %q, -1;"), |a, b, c| if a < b { c } else { b });
    exact32(&pick("setp.lt.u32 %q, %ra, %rb; xor.pred %p, %q, 0;"), |a, b, c| if a < b { b } else { c });
    exact32(&pick("setp.lt.u32 %q, %ra, %rb; and.pred %p, %q, -1;"), |a, b, c| if a < b { b } else { c });
    exact32(&pick("setp.lt.u32 %q, %ra, %rb; and.pred %p, %q, 0;"), |_, _, c| c);
    exact32(&pick("setp.lt.u32 %q, %ra, %rb; or.pred %p, %q, -1;"), |_, b, _| b);
    exact32(&pick("setp.lt.u32 %p|%q, %ra, %rb; and.pred %p, %p, !%q;"), |a, b, c| if a < b { b } else { c });
    exact32(
        &pick("mov.pred %p, 0; setp.lt.u32 %q, %ra, %rb; @%q mov.pred %p, -1;"),
        |a, b, c| if a < b { b } else { c },
    );
    exact32("setp.lt.u32 %p, %ra, %rb; @%p mov.u32 %r, %ra; @!%p mov.u32 %r, %rb;", |a, b, _| a.min(b));
}

#[test]
fn branches_meet_again() {
    let body = "setp.lt.u32 %p, %ra, %rb; @%p bra LESS; mov.u32 %r, %rc; bra.uni END;\n\
                LESS: mov.u32 %r, %ra;\nEND: add.u32 %r, %r, 1;";
    exact32(body, |a, b, c| (if a < b { a } else { c }).wrapping_add(1));
    // A loop of its own length in every lane: sum of 0..a % 16.
    let body = "and.b32 %t1, %ra, 15; mov.u32 %t2, 0;\nTOP: setp.ge.u32 %p, %t2, %t1; @%p bra OUT;\n\
                add.u32 %r, %r, %t2; add.u32 %t2, %t2, 1; bra.uni TOP;\nOUT: ";
    exact32(body, |a, _, _| (0..a % 16).sum());
    let body = "and.b32 %t1, %ra, 3; brx.idx %t1, LIST; LIST: .branchtargets L0, L1, L2, L3;\n\
                L0: mov.u32 %r, 7; bra END; L1: mov.u32 %r, %rb; bra END; L2: mov.u32 %r, 9;\nL3: add.u32 %r, %r, 1;\nEND: ";
    exact32(body, |a, b, _| [7, b, 10, 1][a as usize & 3]);
}

#[test]
fn float_arithmetic() {
    near("add.f32 %r, %ra, %rb;", 0.0, |a, b, _| a + b);
    near("mul.rn.f32 %r, %ra, %rb;", 0.0, |a, b, _| a * b);
    near("fma.rn.f32 %r, %ra, %rb, %rc;", 0.0, f32::mul_add);
    near("div.rn.f32 %r, %ra, %rb;", 0.0, |a, b, _| a / b);
    near("div.full.f32 %r, %ra, %rb;", 3e-7, |a, b, _| a / b);
    near("min.f32 %r, %ra, %rb;", 0.0, |a, b, _| a.min(b));
    near("max.f32 %r, %ra, %rb;", 0.0, |a, b, _| a.max(b));
    near("neg.f32 %r, %ra;", 0.0, |a, _, _| -a);
    near("abs.f32 %r, %ra; sqrt.rn.f32 %r, %r;", 0.0, |a, _, _| a.abs().sqrt());
    near("abs.f32 %r, %ra; rsqrt.approx.f32 %r, %r;", 3e-7, |a, _, _| 1.0 / a.abs().sqrt());
    near("rcp.approx.ftz.f32 %r, %ra;", 3e-7, |a, _, _| 1.0 / a);
    near("ex2.approx.ftz.f32 %r, %ra;", 3e-7, |a, _, _| a.exp2());
    near("abs.f32 %r, %ra; lg2.approx.f32 %r, %r;", 3e-7, |a, _, _| a.abs().log2());
    near("sin.approx.f32 %r, %ra;", 3e-7, |a, _, _| a.sin());
    near("cos.approx.f32 %r, %ra;", 3e-7, |a, _, _| a.cos());
    near("tanh.approx.f32 %r, %ra;", 3e-7, |a, _, _| a.tanh());
    near("add.sat.f32 %r, %ra, %rb;", 0.0, |a, b, _| (a + b).clamp(0.0, 1.0));
    let down = |a: f32, b: f32, c: f32| {
        let exact = f64::from(a) * f64::from(b) + f64::from(c);
        let near = exact as f32;
        if f64::from(near) > exact { near.next_down() } else { near }
    };
    near("fma.rm.f32 %r, %ra, %rb, %rc;", 0.0, down);
    // NaN payloads are nobody's business: they are masked to one.
    let canonical = "mul.ftz.f32 %r, %ra, %rb; setp.nan.f32 %p, %r, %r; @%p mov.u32 %r, 0x7fc00000;";
    exact32(canonical, |a, b, _| {
        let flush = |x: f32| if x.is_subnormal() { 0f32.copysign(x) } else { x };
        let product = flush(flush(f32::from_bits(a)) * flush(f32::from_bits(b)));
        if product.is_nan() { 0x7fc0_0000 } else { product.to_bits() }
    });
}

#[test]
fn doubles() {
    let d = f64::from_bits;
    let same = |got: u64, want: f64| d(got) == want || d(got).is_nan() && want.is_nan();
    for round in 0..4 {
        run("add.f64 %d, %a, %b;", false, &inputs(round), |a, b, _, got| assert!(same(got, d(a) + d(b))));
        run("fma.rn.f64 %d, %a, %b, %c;", false, &inputs(round), |a, b, c, got| {
            assert!(same(got, d(a).mul_add(d(b), d(c))))
        });
        run("div.rn.f64 %d, %a, %b;", false, &inputs(round), |a, b, _, got| assert!(same(got, d(a) / d(b))));
    }
}

#[test]
fn conversions() {
    let f = f32::from_bits;
    exact("cvt.s64.s32 %d, %ra;", false, |a, _, _| i64::from(a as i32) as u64);
    exact("cvt.u64.u32 %d, %ra;", false, |a, _, _| u64::from(a as u32));
    exact("cvt.u32.u64 %r, %a;", true, |a, _, _| u64::from(a as u32));
    exact32("cvt.u32.u16 %r, %ha;", |a, _, _| a & 0xffff);
    exact32("cvt.s32.s16 %r, %ha;", |a, _, _| a as u16 as i16 as u32);
    exact32("cvt.s32.s8 %r, %ra;", |a, _, _| a as u8 as i8 as u32);
    exact32("cvt.u32.u8 %r, %ra;", |a, _, _| a & 0xff);
    exact16("cvt.u16.u32 %h, %ra;", |a, _, _| a);
    exact32("cvt.rn.f32.s32 %r, %ra;", |a, _, _| (a as i32 as f32).to_bits());
    exact32("cvt.rn.f32.u32 %r, %ra;", |a, _, _| (a as f32).to_bits());
    exact("cvt.rn.f32.s64 %r, %a;", true, |a, _, _| u64::from((a as i64 as f32).to_bits()));
    exact32("cvt.rzi.s32.f32 %r, %ra;", |a, _, _| f(a) as i32 as u32);
    exact32("cvt.rni.s32.f32 %r, %ra;", |a, _, _| f(a).round_ties_even() as i32 as u32);
    exact32("cvt.rmi.s32.f32 %r, %ra;", |a, _, _| f(a).floor() as i32 as u32);
    exact32("cvt.rzi.u32.f32 %r, %ra;", |a, _, _| f(a) as u32);
    near("cvt.rmi.f32.f32 %r, %ra;", 0.0, |a, _, _| a.floor());
    near("cvt.sat.f32.f32 %r, %ra;", 0.0, |a, _, _| a.clamp(0.0, 1.0));
    near("cvt.rn.f16.f32 %h, %ra; cvt.f32.f16 %r, %h;", 0.0, |a, _, _| f16::from_f32(a).to_f32());
    near("cvt.rn.bf16.f32 %h, %ra; mov.b32 %r, {0, %h};", 0.0, |a, _, _| bf16::from_f32(a).to_f32());
    near("cvt.rn.bf16x2.f32 %r, %ra, %rb; and.b32 %r, %r, 0xffff0000;", 0.0, |a, _, _| bf16::from_f32(a).to_f32());
    near(
        "cvt.rn.f16x2.f32 %r, %ra, %rb; { .reg .b16 lo, hi; mov.b32 {lo, hi}, %r; cvt.f32.f16 %r, lo; }",
        0.0,
        |_, b, _| f16::from_f32(b).to_f32(),
    );
}

#[test]
fn every_half_converts() {
    for bits in 0..=u16::MAX {
        let (got, want) = (softgpu::exec::convert::f16_to_f32(bits), f16::from_bits(bits).to_f32());
        assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{bits:#x}");
    }
}

#[test]
fn halves() {
    let pair = |bits: u32| [bits as u16, (bits >> 16) as u16];
    let both = |a: u32, b: u32, c: u32, f: &dyn Fn(u16, u16, u16) -> u16| {
        let ([a0, a1], [b0, b1], [c0, c1]) = (pair(a), pair(b), pair(c));
        u32::from(f(a1, b1, c1)) << 16 | u32::from(f(a0, b0, c0))
    };
    let b = |x: u16| bf16::from_bits(x).to_f64();
    let h = |x: u16| f16::from_bits(x).to_f64();
    type Reference = Box<dyn Fn(u16, u16, u16) -> f64>;
    let cases: [(&str, Reference, bool); 6] = [
        ("fma.rn.bf16x2 %r, %ra, %rb, %rc;", Box::new(move |x, y, z| b(x) * b(y) + b(z)), true),
        ("mul.bf16x2 %r, %ra, %rb;", Box::new(move |x, y, _| b(x) * b(y)), true),
        ("add.bf16x2 %r, %ra, %rb;", Box::new(move |x, y, _| b(x) + b(y)), true),
        ("add.f16x2 %r, %ra, %rb;", Box::new(move |x, y, _| h(x) + h(y)), false),
        ("mul.f16x2 %r, %ra, %rb;", Box::new(move |x, y, _| h(x) * h(y)), false),
        ("fma.rn.f16x2 %r, %ra, %rb, %rc;", Box::new(move |x, y, z| h(x) * h(y) + h(z)), false),
    ];
    for (body, value, is_bf16) in &cases {
        // Moderate halves: exponents near 1.
        let small = |seed: u64| -> Vec<u64> {
            let values = support::values(2 * THREADS as usize, seed);
            let bits = |v: f32| if *is_bf16 { bf16::from_f32(v).to_bits() } else { f16::from_f32(v).to_bits() };
            values.chunks(2).map(|v| u64::from(bits(v[0])) | u64::from(bits(v[1])) << 16).collect()
        };
        run(body, true, &[small(1), small(2), small(3)], |x, y, z, got| {
            let round = |v: f64| if *is_bf16 { bf16::from_f64(v).to_bits() } else { f16::from_f64(v).to_bits() };
            let want = both(x as u32, y as u32, z as u32, &|x, y, z| round(value(x, y, z)));
            assert_eq!(got as u32, want, "{body} on {x:#x}, {y:#x}, {z:#x}");
        });
    }
}

#[test]
fn lanes_exchange() {
    let full = "-1";
    let warp = |body: &str, want: &dyn Fn(usize, &[u32]) -> u32| {
        for simd in simd::available() {
            let mut gpu = Gpu::new(&program(body, true));
            gpu.simd = simd;
            let data: Vec<u64> = (0..32).map(|i| i * i + 5).collect();
            let at = gpu.upload(&data);
            let out = gpu.reserve(256);
            gpu.launch("k", [1; 3], [32, 1, 1], 0, &[at, at, at, out].map(Arg::Pointer)).unwrap();
            let values: Vec<u32> = data.iter().map(|&v| v as u32).collect();
            for (lane, got) in gpu.download::<u64>(out, 32).into_iter().enumerate() {
                assert_eq!(got as u32, want(lane, &values), "{body}, lane {lane}");
            }
        }
    };
    warp(&format!("shfl.sync.bfly.b32 %r, %ra, 5, 31, {full};"), &|i, v| v[i ^ 5]);
    warp(&format!("shfl.sync.down.b32 %r|%p, %ra, 3, 31, {full};"), &|i, v| v[if i + 3 < 32 { i + 3 } else { i }]);
    warp(&format!("shfl.sync.up.b32 %r|%p, %ra, 2, 0, {full};"), &|i, v| v[if i >= 2 { i - 2 } else { i }]);
    warp(&format!("shfl.sync.idx.b32 %r, %ra, 7, 31, {full};"), &|_, v| v[7]);
    // Segments of 8: c holds the clamp 7 and the segment mask 24.
    warp(&format!("shfl.sync.idx.b32 %r, %ra, 2, 6175, {full};"), &|i, v| v[(i & 24) + 2]);
    warp(&format!("setp.gt.u32 %p, %ra, 100; vote.sync.ballot.b32 %r, %p, {full};"), &|_, v| {
        v.iter().enumerate().fold(0, |m, (i, &x)| m | u32::from(x > 100) << i)
    });
    warp(&format!("setp.gt.u32 %p, %ra, 4; vote.sync.all.pred %q, %p, {full}; selp.u32 %r, 1, 2, %q;"), &|_, _| 1);
    warp(&format!("redux.sync.add.u32 %r, %ra, {full};"), &|_, v| v.iter().sum());
    warp(&format!("redux.sync.max.s32 %r, %ra, {full};"), &|_, v| *v.iter().max().unwrap());
    warp(&format!("shr.u32 %t1, %t0, 2; match.any.sync.b32 %r, %t1, {full};"), &|i, _| 0xf << (i & !3));
    warp("activemask.b32 %r;", &|_, _| u32::MAX);
    warp("mov.u32 %r, %lanemask_lt;", &|i, _| (1u32 << i) - 1);
}

#[test]
fn what_is_not_supported_is_refused_with_its_line() {
    let text = program("mbarrier.inval.b64 [%x0];", true);
    let line = text.lines().position(|l| l.contains("mbarrier")).unwrap() as u32 + 1;
    let memory = softgpu::memory::Memory::new(1 << 20);
    let error = softgpu::module::Module::load(&text, &memory).unwrap_err();
    assert_eq!(error.line, line, "{error}");
    assert!(error.message.contains("mbarrier.inval") && error.message.contains("kernel k"), "{error}");
}
