//! `wgmma` on a device of compute capability 9.0: against plain Rust, bit for bit against `mma.sync`, and with mistakes
//! planted, each of which its checker finds under several schedules.
//!
//! The compute capability is one per process and comes from the environment: each test runs itself again with it.

mod support;

use half::{bf16, f16};
use softgpu::capability::capability;
use softgpu::counters::Counters;
use softgpu::exec::simd;
use softgpu::fault::{Fault, FaultKind};
use softgpu::module::Module;
use support::{Arg, Gpu, VARIABLE, on, values};

/// A product is as deep as four instructions.
const K: usize = 64;
const M: usize = 64;
const THREADS: usize = 128;
/// Shared memory behind the tiles, bytes: one may begin later without running out of bounds.
const SLACK: u32 = 1024;
const SEEDS: [u64; 4] = [0, 1, 2, 3];

/// How an operand lies in shared memory.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Major {
    K,
    /// M or N runs fastest.
    Mn,
}

/// A product and how its operands are given.
#[derive(Clone, Copy, Debug)]
struct Case {
    n: usize,
    is_bf16: bool,
    /// A from registers, not from shared memory.
    a_in_registers: bool,
    a: Major,
    b: Major,
    /// Bytes of the swizzle of both; 16 for none.
    swizzle: usize,
    /// scale-d of the first instruction: an operand.
    first_scale: &'static str,
    /// imm-scale-a and imm-scale-b.
    scales: [i32; 2],
}

const PLAIN: Case = Case {
    n: 64,
    is_bf16: true,
    a_in_registers: false,
    a: Major::K,
    b: Major::K,
    swizzle: 128,
    first_scale: "1",
    scales: [1, 1],
};

/// Byte of element (row along M or N, k) of an operand of so many rows, as the canonical layouts of CUTLASS say.
fn place(row: usize, k: usize, rows: usize, major: Major, swizzle: usize) -> usize {
    let elements = swizzle / 2;
    let at = match (major, swizzle) {
        // Core matrices of 8 rows of 16 bytes, those of 8 rows side by side.
        (Major::K, 16) => row / 8 * 128 + row % 8 * 16 + k / 8 * (rows / 8 * 128) + k % 8 * 2,
        (Major::Mn, 16) => row / 8 * 128 + k % 8 * 16 + k / 8 * (rows / 8 * 128) + row % 8 * 2,
        (Major::K, _) => row * swizzle + k / elements * (rows * swizzle) + k % elements * 2,
        // Blocks of 64 columns (for 128 bytes), each K rows.
        (Major::Mn, _) => row / elements * (K * swizzle) + k * swizzle + row % elements * 2,
    };
    let chunks = swizzle / 16;
    at ^ (at >> 7 & (chunks - 1)) << 4
}

/// Leading and stride offset of the descriptor, and how far on the operand of instruction `step` begins, bytes.
fn strides(rows: usize, major: Major, swizzle: usize, step: usize) -> (usize, usize, usize) {
    match (major, swizzle) {
        (_, 16) => (rows / 8 * 128, 128, step * 2 * (rows / 8 * 128)),
        (Major::K, _) => {
            let steps = swizzle / 32;
            (16, 8 * swizzle, step / steps * (rows * swizzle) + step % steps * 32)
        }
        (Major::Mn, _) => (K * swizzle, 8 * swizzle, step * 16 * swizzle),
    }
}

/// A descriptor but for the start.
fn descriptor(leading: usize, stride: usize, swizzle: usize) -> u64 {
    let mode: u64 = match swizzle {
        128 => 1,
        64 => 2,
        32 => 3,
        _ => 0,
    };
    (leading as u64 / 16) << 16 | (stride as u64 / 16) << 32 | mode << 62
}

/// What a mistake does to the text: a piece of it, and what stands there instead.
type Bug = (&'static str, &'static str);

/// A kernel `product` that copies the tiles into shared memory and multiplies, and a kernel `steps` that does the same by
/// `mma.sync`. Accumulators begin at what `out` holds, register by register, and end there.
fn program(case: &Case, bugs: &[Bug]) -> String {
    let mut text = format!("{}{}", product(case), steps(case));
    for (found, instead) in bugs {
        assert!(text.contains(found), "{found}");
        text = text.replace(found, instead);
    }
    text
}

/// Bytes of A in shared memory.
const A_BYTES: usize = M * K * 2;

fn list(count: usize) -> String {
    (0..count).map(|i| format!("%f{i}")).collect::<Vec<_>>().join(", ")
}

fn accumulators(count: usize, opcode: &str) -> String {
    (0..count)
        .map(|i| match opcode {
            "ld" => format!("ld.global.f32 %f{i}, [%o+{}];\n", i * THREADS * 4),
            _ => format!("st.global.f32 [%o+{}], %f{i};\n", i * THREADS * 4),
        })
        .collect()
}

fn product(case: &Case) -> String {
    let (n, ty) = (case.n, if case.is_bf16 { "bf16" } else { "f16" });
    let bytes = A_BYTES + n * K * 2;
    let mut body = String::new();
    for step in 0..K / 16 {
        let scale = if step == 0 { case.first_scale } else { "1" };
        let (leading, stride, b_on) = strides(n, case.b, case.swizzle, step);
        body += &format!(
            "add.u32 %t, %base, {}; shr.u32 %t, %t, 4; cvt.u64.u32 %db, %t; or.b64 %db, %db, {};\n",
            A_BYTES + b_on,
            descriptor(leading, stride, case.swizzle)
        );
        let a = if case.a_in_registers {
            for i in 0..4 {
                body += &format!("ld.global.b32 %a{i}, [%fa+{}];\n", (step * 4 + i) * THREADS * 4);
            }
            "{%a0, %a1, %a2, %a3}"
        } else {
            let (leading, stride, a_on) = strides(M, case.a, case.swizzle, step);
            body += &format!(
                "add.u32 %t, %base, {a_on}; shr.u32 %t, %t, 4; cvt.u64.u32 %da, %t; or.b64 %da, %da, {};\n",
                descriptor(leading, stride, case.swizzle)
            );
            "%da"
        };
        let [scale_a, scale_b] = case.scales;
        let trans_a = if case.a_in_registers { "" } else { [", 0", ", 1"][usize::from(case.a == Major::Mn)] };
        body += &format!(
            "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{ty}.{ty} {{{}}}, {a}, %db, {scale}, {scale_a}, {scale_b}{trans_a}, {};\n",
            list(n / 2),
            u8::from(case.b == Major::Mn)
        );
    }
    format!(
        ".version 8.0\n.target sm_90a\n.address_size 64\n.extern .shared .align 1024 .b8 tiles[];\n\
         .visible .entry product(.param .u64 image, .param .u64 fragments, .param .u64 out)\n{{\n\
         .reg .b32 %t, %base, %tid, %at, %warp, %a<4>, %v<4>; .reg .b64 %i, %o, %fa, %w, %da, %db; .reg .pred %p, %on, %off, %first;\n\
         .reg .f32 %f<128>;\n\
         ld.param.u64 %i, [image]; ld.param.u64 %fa, [fragments]; ld.param.u64 %o, [out];\n\
         mov.u32 %tid, %tid.x; shr.u32 %warp, %tid, 5; setp.eq.u32 %first, %warp, 0;\n\
         mul.wide.u32 %w, %tid, 4; add.s64 %fa, %fa, %w; add.s64 %o, %o, %w;\n\
         mul.wide.u32 %w, %tid, 16; add.s64 %i, %i, %w;\n\
         mov.u32 %base, tiles; // base\n\
         shl.b32 %at, %tid, 4; setp.eq.u32 %on, 0, 0; setp.ne.u32 %off, 0, 0;\n{}\
         COPY: setp.ge.u32 %p, %at, {bytes}; @%p bra COPIED;\n\
         ld.global.v4.b32 {{%v0, %v1, %v2, %v3}}, [%i]; add.u32 %t, %base, %at;\n\
         st.shared.v4.b32 [%t], {{%v0, %v1, %v2, %v3}};\n\
         add.u32 %at, %at, {}; add.s64 %i, %i, {}; bra COPY;\n\
         COPIED:\nfence.proxy.async.shared::cta;\nbar.sync 0;\n// before\nwgmma.fence.sync.aligned;\n{body}\
         // issued\nwgmma.commit_group.sync.aligned;\n// committed\nwgmma.wait_group.sync.aligned 0;\n// waited\n{}ret;\n}}\n",
        accumulators(n / 2, "ld"),
        THREADS * 16,
        THREADS * 16,
        accumulators(n / 2, "st"),
    )
}

/// Fragments of A: step, register, thread. Of B: step, columns / 8, register, lane.
fn steps(case: &Case) -> String {
    let (n, ty) = (case.n, if case.is_bf16 { "bf16" } else { "f16" });
    let mut body = String::new();
    for step in 0..K / 16 {
        for i in 0..4 {
            body += &format!("ld.global.b32 %a{i}, [%fa+{}];\n", (step * 4 + i) * THREADS * 4);
        }
        for j in 0..n / 8 {
            let at = ((step * n / 8) + j) * 2 * 32 * 4;
            body += &format!("ld.global.b32 %b0, [%fb+{at}]; ld.global.b32 %b1, [%fb+{}];\n", at + 128);
            let sums = (4 * j..4 * j + 4).map(|i| format!("%f{i}")).collect::<Vec<_>>().join(", ");
            body += &format!(
                "mma.sync.aligned.m16n8k16.row.col.f32.{ty}.{ty}.f32 {{{sums}}}, {{%a0, %a1, %a2, %a3}}, {{%b0, %b1}}, {{{sums}}};\n"
            );
        }
    }
    format!(
        ".visible .entry steps(.param .u64 pa, .param .u64 pb, .param .u64 out)\n{{\n\
         .reg .b32 %tid, %lane, %a<4>, %b<2>; .reg .b64 %o, %fa, %fb, %w; .reg .f32 %f<128>;\n\
         ld.param.u64 %fa, [pa]; ld.param.u64 %fb, [pb]; ld.param.u64 %o, [out];\n\
         mov.u32 %tid, %tid.x; mul.wide.u32 %w, %tid, 4; add.s64 %fa, %fa, %w; add.s64 %o, %o, %w;\n\
         and.b32 %lane, %tid, 31; mul.wide.u32 %w, %lane, 4; add.s64 %fb, %fb, %w;\n{}{body}{}ret;\n}}\n",
        accumulators(n / 2, "ld"),
        accumulators(n / 2, "st"),
    )
}

/// The numbers of a product.
struct Numbers {
    a: Vec<u16>,
    b: Vec<u16>,
    /// As registers hold them: register, thread.
    c: Vec<f32>,
}

fn numbers(case: &Case) -> Numbers {
    let half = |v: f32| if case.is_bf16 { bf16::from_f32(v).to_bits() } else { f16::from_f32(v).to_bits() };
    let halves = |n: usize, seed: u64| values(n, seed).into_iter().map(half).collect();
    Numbers { a: halves(M * K, 1), b: halves(case.n * K, 2), c: values(case.n / 2 * THREADS, 3) }
}

fn single(case: &Case, bits: u16) -> f32 {
    if case.is_bf16 { bf16::from_bits(bits).to_f32() } else { f16::from_bits(bits).to_f32() }
}

/// Row and column that register `i` of a thread holds.
fn position(i: usize, thread: usize) -> (usize, usize) {
    let (warp, lane) = (thread / 32, thread % 32);
    (16 * warp + lane / 4 + 8 * (i % 4 / 2), 8 * (i / 4) + 2 * (lane % 4) + i % 2)
}

impl Numbers {
    /// Shared memory with both operands.
    fn image(&self, case: &Case) -> Vec<u8> {
        let mut image = vec![0; A_BYTES + case.n * K * 2];
        for (first, rows, numbers, major) in [(0, M, &self.a, case.a), (A_BYTES, case.n, &self.b, case.b)] {
            for (at, bits) in numbers.iter().enumerate() {
                let place = first + place(at / K, at % K, rows, major, case.swizzle);
                image[place..place + 2].copy_from_slice(&bits.to_le_bytes());
            }
        }
        image
    }

    fn a_fragments(&self) -> Vec<u32> {
        let pair = |row: usize, k: usize| u32::from(self.a[row * K + k + 1]) << 16 | u32::from(self.a[row * K + k]);
        let mut words = Vec::new();
        for step in 0..K / 16 {
            for i in 0..4 {
                words.extend((0..THREADS).map(|thread| {
                    let (warp, g, t) = (thread / 32, thread % 32 / 4, thread % 4);
                    pair(16 * warp + g + 8 * (i & 1), 16 * step + 2 * t + 8 * (i >> 1))
                }));
            }
        }
        words
    }

    fn b_fragments(&self, n: usize) -> Vec<u32> {
        let pair = |row: usize, k: usize| u32::from(self.b[row * K + k + 1]) << 16 | u32::from(self.b[row * K + k]);
        let mut words = Vec::new();
        for (step, j, i) in (0..K / 16).flat_map(|s| (0..n / 8).flat_map(move |j| (0..2).map(move |i| (s, j, i)))) {
            words.extend((0..32).map(|lane| pair(8 * j + lane / 4, 16 * step + 2 * (lane % 4) + 8 * i)));
        }
        words
    }
}

fn launch(gpu: &Gpu, case: &Case, numbers: &Numbers) -> Result<(Vec<f32>, Counters), Fault> {
    let image = numbers.image(case);
    let (image_at, fragments) = (gpu.upload(&image), gpu.upload(&numbers.a_fragments()));
    let out = gpu.upload(&numbers.c);
    let args = [image_at, fragments, out].map(Arg::Pointer);
    let counters = gpu.launch("product", [1; 3], [THREADS as u32, 1, 1], image.len() as u32 + SLACK, &args)?;
    Ok((gpu.download(out, numbers.c.len()), counters))
}

fn by_steps(gpu: &Gpu, case: &Case, numbers: &Numbers, begins_at: &[f32]) -> Vec<f32> {
    let (a, b) = (gpu.upload(&numbers.a_fragments()), gpu.upload(&numbers.b_fragments(case.n)));
    let out = gpu.upload(begins_at);
    let args = [a, b, out].map(Arg::Pointer);
    gpu.launch("steps", [1; 3], [THREADS as u32, 1, 1], 0, &args).unwrap_or_else(|fault| panic!("{fault}"));
    gpu.download(out, begins_at.len())
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// The product must be right, and have the bits that `mma.sync` gives.
fn check(case: &Case) {
    let numbers = numbers(case);
    for simd in simd::available() {
        let mut gpu = Gpu::new(&program(case, &[]));
        gpu.simd = simd;
        gpu.module.functions["product"].max_dynamic_shared.store(100 << 10, std::sync::atomic::Ordering::Relaxed);
        let (got, counters) = launch(&gpu, case, &numbers).unwrap_or_else(|fault| panic!("{case:?}: {fault}"));
        assert_eq!(counters.mma_flops, (2 * M * case.n * K) as u64, "{case:?}");
        let begins_at = if matches!(case.first_scale, "0" | "%off" | "!%on") {
            vec![0.0; numbers.c.len()]
        } else {
            numbers.c.clone()
        };
        let sign: f32 = case.scales.iter().product::<i32>() as f32;
        for (at, got) in got.iter().enumerate() {
            let (row, column) = position(at / THREADS, at % THREADS);
            let products =
                (0..K).map(|k| single(case, numbers.a[row * K + k]) * single(case, numbers.b[column * K + k]));
            let want = begins_at[at] + sign * products.sum::<f32>();
            assert!((got - want).abs() < 1e-4, "{case:?}, ({row}, {column}): {got}, wanted {want}");
        }
        if sign > 0.0 {
            assert_eq!(bits(&got), bits(&by_steps(&gpu, case, &numbers, &begins_at)), "{case:?}");
        }
    }
}

#[test]
fn products_have_the_bits_of_mma() {
    on("9.0", "products_have_the_bits_of_mma", || {
        for is_bf16 in [true, false] {
            for a_in_registers in [true, false] {
                for n in [8, 64, 136, 256] {
                    check(&Case { n, is_bf16, a_in_registers, ..PLAIN });
                }
            }
        }
    });
}

#[test]
fn accumulators_begin_at_zero_or_not() {
    on("9.0", "accumulators_begin_at_zero_or_not", || {
        for first_scale in ["0", "1", "%on", "%off", "!%on", "!%off"] {
            check(&Case { first_scale, ..PLAIN });
        }
        for scales in [[-1, 1], [1, -1], [-1, -1]] {
            check(&Case { scales, ..PLAIN });
        }
    });
}

#[test]
fn every_layout_of_shared_memory() {
    on("9.0", "every_layout_of_shared_memory", || {
        for swizzle in [16, 32, 64, 128] {
            for (a, b) in [(Major::K, Major::K), (Major::K, Major::Mn), (Major::Mn, Major::Mn)] {
                check(&Case { n: 192, swizzle, a, b, ..PLAIN });
            }
        }
        check(&Case { n: 256, is_bf16: false, b: Major::Mn, a_in_registers: true, ..PLAIN });
    });
}

/// A mistake must be found under every schedule, by one of these checkers, with words that say what is wrong.
fn must_find(case: &Case, bugs: &[Bug], kinds: &[FaultKind], words: &str) {
    let numbers = numbers(case);
    let mut gpu = Gpu::new(&program(case, bugs));
    for seed in SEEDS {
        gpu.seed = seed;
        let fault = match launch(&gpu, case, &numbers) {
            Err(fault) => fault,
            Ok(_) => panic!("{bugs:?} not found, seed {seed}"),
        };
        assert!(kinds.contains(&fault.kind), "{bugs:?}, seed {seed}: {fault}");
        assert!(kinds.len() > 1 || fault.what.contains(words), "{bugs:?}, seed {seed}: {fault}");
        assert!(fault.place.contains("kernel product") && fault.place.contains("thread ("), "{fault}");
    }
}

/// Nothing must be found under any schedule.
fn silent(case: &Case, changes: &[Bug]) {
    let mut gpu = Gpu::new(&program(case, changes));
    let allowed = &gpu.module.functions["product"].max_dynamic_shared;
    allowed.store(100 << 10, std::sync::atomic::Ordering::Relaxed);
    for seed in SEEDS {
        gpu.seed = seed;
        launch(&gpu, case, &numbers(case)).unwrap_or_else(|fault| panic!("{changes:?}, seed {seed}: {fault}"));
    }
}

fn must_find_in_plain(bug: Bug, kind: FaultKind, words: &str) {
    must_find(&PLAIN, &[bug], &[kind], words);
}

#[test]
fn kernels_without_a_mistake_are_silent_under_every_schedule() {
    on("9.0", "kernels_without_a_mistake_are_silent_under_every_schedule", || {
        // Not an alignment that happens to be there, but one of the kernel's own.
        let aligned = [
            (".align 1024 .b8 tiles", ".align 16 .b8 tiles"),
            (
                "mov.u32 %base, tiles; // base",
                "mov.u32 %base, tiles; add.u32 %base, %base, 1023; and.b32 %base, %base, -1024;",
            ),
        ];
        let registers = [("// before", "setmaxnreg.inc.sync.aligned.u32 240;")];
        for changes in [&[][..], &aligned, &registers] {
            silent(&PLAIN, changes);
        }
    });
}

#[test]
fn a_tile_is_overwritten_before_its_wait() {
    on("9.0", "a_tile_is_overwritten_before_its_wait", || {
        let store = "shl.b32 %at, %tid, 2; add.u32 %t, %base, %at; st.shared.b32 [%t], %at;";
        let leak = |text: String| -> &'static str { Box::leak(text.into_boxed_str()) };
        let covered = "no wgmma.wait_group has covered it";
        // By the warps themselves, before and after the commit; by all behind a barrier.
        must_find_in_plain(("// issued", "@%first st.shared.b32 [%base], %tid;"), FaultKind::AsyncMatrix, covered);
        must_find_in_plain(("// committed", leak(store.to_owned())), FaultKind::AsyncMatrix, covered);
        must_find_in_plain(("// committed", leak(format!("bar.sync 0; {store}"))), FaultKind::AsyncMatrix, covered);
        // The wait leaves the group that it should not.
        let short = (
            "wgmma.wait_group.sync.aligned 0;\n",
            leak(format!("wgmma.wait_group.sync.aligned 1; bar.sync 0; {store} wgmma.wait_group.sync.aligned 0;\n")),
        );
        must_find(&PLAIN, &[short], &[FaultKind::AsyncMatrix], covered);
        // By a copy and by an atomic.
        let copy = "@%first cp.async.ca.shared.global [%base], [%i+-2048], 4; cp.async.wait_all;";
        must_find_in_plain(("// committed", copy), FaultKind::AsyncMatrix, covered);
        must_find_in_plain(("// committed", "@%first red.shared.add.u32 [%base], 1;"), FaultKind::AsyncMatrix, covered);
        // Behind the wait, which does not hold other warps back.
        let late = leak(format!("@%first bra STAY; {store} STAY:"));
        must_find(&PLAIN, &[("// waited", late)], &[FaultKind::Race, FaultKind::AsyncMatrix], "");
    });
}

#[test]
fn products_nobody_waits_for() {
    on("9.0", "products_nobody_waits_for", || {
        let wait = ("wgmma.wait_group.sync.aligned 0;", "");
        must_find_in_plain(wait, FaultKind::AsyncMatrix, "never waited for");
        let short = ("wgmma.wait_group.sync.aligned 0;", "wgmma.wait_group.sync.aligned 1;");
        must_find_in_plain(short, FaultKind::AsyncMatrix, "never waited for");
        let commit = ("wgmma.commit_group.sync.aligned;", "");
        must_find_in_plain(commit, FaultKind::AsyncMatrix, "never committed");
    });
}

#[test]
fn fence_of_the_async_proxy_is_dropped() {
    on("9.0", "fence_of_the_async_proxy_is_dropped", || {
        let fence = "fence.proxy.async.shared::cta;";
        for instead in ["", "fence.proxy.async.global;", "membar.cta;"] {
            must_find_in_plain((fence, instead), FaultKind::ProxyFence, "without fence.proxy.async");
        }
        // One thread alone, one warp alone.
        for who in ["setp.eq.u32 %p, %tid, 0; @%p", "@%first"] {
            let instead: &'static str = Box::leak(format!("{who} {fence}").into_boxed_str());
            must_find_in_plain((fence, instead), FaultKind::ProxyFence, "without fence.proxy.async");
        }
        // Behind the barrier: whether a warp is in time is chance.
        must_find(&PLAIN, &[(fence, ""), ("// before", fence)], &[FaultKind::ProxyFence], "fence.proxy.async");
        // Before the copies are there.
        let copies = ("st.shared.v4.b32 [%t], {%v0, %v1, %v2, %v3};", "cp.async.cg.shared.global [%t], [%i], 16;");
        let wait = (fence, "fence.proxy.async; cp.async.wait_all;");
        must_find(&PLAIN, &[copies, wait], &[FaultKind::ProxyFence], "without fence.proxy.async");
        let right = (fence, "cp.async.wait_all; fence.proxy.async;");
        silent(&PLAIN, &[copies, right]);
        // Not there at all.
        must_find(
            &PLAIN,
            &[copies, (fence, fence), ("ret;", "cp.async.wait_all; ret;")],
            &[FaultKind::AsyncCopy, FaultKind::Race],
            "",
        );
    });
}

#[test]
fn barrier_before_the_product_is_dropped() {
    on("9.0", "barrier_before_the_product_is_dropped", || {
        must_find(&PLAIN, &[("bar.sync 0;", "")], &[FaultKind::Race, FaultKind::Uninitialised], "");
    });
}

#[test]
fn fence_of_the_warpgroup_is_dropped() {
    on("9.0", "fence_of_the_warpgroup_is_dropped", || {
        let fence = "wgmma.fence.sync.aligned;";
        must_find_in_plain((fence, ""), FaultKind::AsyncMatrix, "no wgmma.fence");
        must_find_in_plain(
            (fence, "wgmma.fence.sync.aligned; wgmma.wait_group.sync.aligned 0;"),
            FaultKind::AsyncMatrix,
            "no wgmma.fence",
        );
    });
}

#[test]
fn a_tile_lies_wrong() {
    on("9.0", "a_tile_lies_wrong", || {
        let base = "mov.u32 %base, tiles; // base";
        must_find_in_plain(
            (base, "mov.u32 %base, tiles; add.u32 %base, %base, 128;"),
            FaultKind::Misaligned,
            "multiple of 1024",
        );
        // What does not ask for its alignment does not have it.
        must_find_in_plain((".align 1024 .b8 tiles", ".align 16 .b8 tiles"), FaultKind::Misaligned, "multiple of 1024");
        let narrow = Case { swizzle: 64, ..PLAIN };
        must_find(
            &narrow,
            &[(base, "mov.u32 %base, tiles; add.u32 %base, %base, 64;")],
            &[FaultKind::Misaligned],
            "multiple of 512",
        );
        // 48 bytes on in a row, of which a product reads 32.
        let beyond = ("add.u32 %t, %base, 96;", "add.u32 %t, %base, 112;");
        must_find_in_plain(beyond, FaultKind::Misaligned, "beyond a row of 128");
        let end = ("add.u32 %t, %base, 8192;", "add.u32 %t, %base, 32768;");
        must_find_in_plain(end, FaultKind::OutOfBounds, "shared memory");
        let offset = (
            "shr.u32 %t, %t, 4; cvt.u64.u32 %db, %t;",
            "shr.u32 %t, %t, 4; cvt.u64.u32 %db, %t; or.b64 %db, %db, 562949953421312;",
        );
        must_find_in_plain(offset, FaultKind::AsyncMatrix, "base offset");
        let address = ("shr.u32 %t, %t, 4; cvt.u64.u32 %db, %t;", "cvt.u64.u32 %db, %t; or.b64 %db, %db, 16384;");
        must_find_in_plain(address, FaultKind::AsyncMatrix, "bits outside its fields");
        let differs = (
            "shr.u32 %t, %t, 4; cvt.u64.u32 %da, %t;",
            "shr.u32 %t, %t, 4; add.u32 %t, %t, %tid; cvt.u64.u32 %da, %t;",
        );
        must_find_in_plain(differs, FaultKind::AsyncMatrix, "in lane 0");
    });
}

#[test]
fn a_warpgroup_is_not_whole() {
    on("9.0", "a_warpgroup_is_not_whole", || {
        let gpu = Gpu::new(&program(&PLAIN, &[]));
        let numbers = numbers(&PLAIN);
        let image = numbers.image(&PLAIN);
        let args = [gpu.upload(&image), gpu.upload(&numbers.a_fragments()), gpu.upload(&numbers.c)].map(Arg::Pointer);
        let fault = gpu.launch("product", [1; 3], [96, 1, 1], image.len() as u32 + SLACK, &args).unwrap_err();
        assert!(matches!(fault.kind, FaultKind::InactiveLane | FaultKind::Uninitialised), "{fault}");
        // A warp that takes no part, one that takes another part, a lane that does not come.
        let skip = [("// before", "@%first bra SKIP;"), ("// waited", "SKIP:")];
        must_find(&PLAIN, &skip, &[FaultKind::AsyncMatrix], "another warp of its warpgroup");
        let other = [("cvt.u64.u32 %da, %t;", "cvt.u64.u32 %da, %t; @%first or.b64 %da, %da, 131072;")];
        must_find(&PLAIN, &other, &[FaultKind::AsyncMatrix], "another warp of its warpgroup");
        let lane = [("// before", "setp.eq.u32 %p, %tid, 5; @%p bra SKIP;"), ("// waited", "SKIP:")];
        must_find(&PLAIN, &lane, &[FaultKind::InactiveLane], "");
        let half = [("// before", "setp.lt.u32 %off, %tid, 16;")];
        must_find(&Case { first_scale: "%off", ..PLAIN }, &half, &[FaultKind::InactiveLane], "scale-d");
    });
}

#[test]
fn what_the_decoder_refuses() {
    on("9.0", "what_the_decoder_refuses", || {
        let refused = |found: &'static str, instead: &'static str, words: &str| {
            let memory = softgpu::memory::Memory::new(1 << 20);
            let error = Module::load(&program(&PLAIN, &[(found, instead)]), &memory).expect_err(instead);
            assert!(error.message.contains(words) && error.line > 0, "{error}");
        };
        refused("m64n64k16", "m64n72k16", "36 wanted");
        refused("m64n64k16", "m64n60k16", "only m64nNk16");
        refused("f32.bf16.bf16 {%f0, %f1, %f2, %f3, %f4", "f32.tf32.tf32 {%f0, %f1, %f2, %f3, %f4", "tf32");
        refused("mma_async.sync.aligned", "mma_async.sp.sync.aligned", "only wgmma.mma_async");
        refused(", 1, 1, 1, 0, 0;", ", 1, 2, 1, 0, 0;", "1 and -1");
        refused(", 1, 1, 1, 0, 0;", ", 1, 1, 1, 0;", "missing");
        refused(", 1, 1, 1, 0, 0;", ", 1, 1, 1, 0, 0, 0;", "wanted");
    });
}

#[test]
fn the_limits_of_both_devices() {
    use softgpu::driver::identity::*;
    fn attribute(number: u32) -> i32 {
        let mut value = 0;
        // SAFETY: a pointer to a local.
        assert_eq!(unsafe { cuDeviceGetAttribute(&mut value, number, 0) }, 0);
        value
    }
    fn limits() -> [i32; 6] {
        [75, 76, 97, 81, 16, 38].map(attribute)
    }
    on("9.0", "the_limits_of_both_devices", || assert_eq!(limits(), [9, 0, 227 << 10, 228 << 10, 132, 50 << 20]));
    if std::env::var_os(VARIABLE).is_none() {
        assert_eq!(limits(), [8, 0, 163 << 10, 164 << 10, 108, 40 << 20]);
    }
}

#[test]
fn a_variable_that_names_no_device() {
    on("7.5", "a_variable_that_names_no_device", || {
        // SAFETY: it has no arguments that point anywhere.
        assert_eq!(unsafe { softgpu::driver::identity::cuInit(0) }, 1);
        let message = softgpu::report::message();
        assert!(message.contains("7.5") && message.contains("9.0"), "{message}");
        assert_eq!(capability().number, 80);
    });
}

/// Entries as `fatbinary` writes them: PTX of a compute capability, not compressed.
fn fatbin(texts: &[(u32, &str)]) -> Vec<u8> {
    let mut entries = Vec::new();
    for (number, text) in texts {
        let mut header = [0u8; 64];
        header[..2].copy_from_slice(&1u16.to_le_bytes());
        header[4..8].copy_from_slice(&64u32.to_le_bytes());
        header[8..16].copy_from_slice(&(text.len() as u64 + 1).to_le_bytes());
        header[28..32].copy_from_slice(&number.to_le_bytes());
        entries.extend_from_slice(&header);
        entries.extend_from_slice(text.as_bytes());
        entries.push(0);
    }
    let mut whole = 0xba55_ed50u32.to_le_bytes().to_vec();
    whole.extend_from_slice(&[1, 0, 16, 0]);
    whole.extend_from_slice(&(entries.len() as u64).to_le_bytes());
    whole.extend_from_slice(&entries);
    whole
}

#[test]
fn images_for_other_devices() {
    use softgpu::driver::{context::*, identity::*, module::*};
    fn load(image: &[u8]) -> u32 {
        let (mut context, mut module) = (0, 0);
        // SAFETY: pointers to locals; the image is whole.
        unsafe {
            assert_eq!(cuInit(0), 0);
            assert_eq!(cuDevicePrimaryCtxRetain(&mut context, 0), 0);
            assert_eq!(cuCtxSetCurrent(context), 0);
            cuModuleLoadData(&mut module, image.as_ptr().cast())
        }
    }
    fn texts() -> (String, String) {
        let hopper = program(&PLAIN, &[]);
        let ampere = ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry old()\n{\nret;\n}\n".to_owned();
        (ampere, hopper)
    }
    on("8.0", "images_for_other_devices", || {
        let (ampere, hopper) = texts();
        let text = format!("{hopper}\0");
        for image in [text.as_bytes(), &fatbin(&[(90, &hopper)])] {
            assert_eq!(load(image), 209);
            let message = softgpu::report::message();
            assert!(message.contains("sm_90a") && message.contains("8.0"), "{message}");
        }
        assert_eq!(load(&fatbin(&[(90, &hopper), (80, &ampere)])), 0);
    });
    on("9.0", "images_for_other_devices", || {
        let (ampere, hopper) = texts();
        for order in [[(90, &*hopper), (80, &*ampere)], [(80, &*ampere), (90, &*hopper)]] {
            let chosen = softgpu::fatbin::ptx_of_fatbin(&fatbin(&order), capability()).expect("one that it runs");
            assert_eq!(chosen, hopper);
        }
        assert_eq!(load(&fatbin(&[(80, &ampere)])), 0);
    });
}
