//! Clusters of blocks on a device of compute capability 9.0: barriers of a cluster and loads from the shared memory of its
//! blocks, right under every schedule, and with mistakes planted.

mod support;

use softgpu::counters::Counters;
use softgpu::fault::{Fault, FaultKind};
use softgpu::memory::Memory;
use softgpu::module::Module;
use support::{Arg, Gpu, on, values};

const SEEDS: [u64; 4] = [0, 1, 2, 3];
const BLOCKS: u32 = 4;
const THREADS: u32 = 64;
const CLUSTERS: u32 = 3;

/// Each thread of each block of a cluster adds up what threads of its number in blocks 0, 1, ... of the cluster have loaded.
const SUMS: &str = "\
.version 8.0
.target sm_90a
.address_size 64
.visible .entry sums(.param .u64 x, .param .u64 out) .explicitcluster .reqnctapercluster 4, 1, 1
{
.reg .b32 %t, %base, %at, %tid, %block, %size, %rank, %peer; .reg .b64 %x, %o, %w; .reg .pred %p; .reg .f32 %v, %sum;
.shared .align 16 .b8 numbers[256];
ld.param.u64 %x, [x]; ld.param.u64 %o, [out];
mov.u32 %tid, %tid.x; mov.u32 %block, %ctaid.x; mad.lo.u32 %t, %block, 64, %tid;
mul.wide.u32 %w, %t, 4; add.s64 %x, %x, %w; add.s64 %o, %o, %w;
mov.u32 %base, numbers; mad.lo.u32 %at, %tid, 4, %base;
mov.u32 %size, %cluster_nctarank; mov.u32 %rank, %cluster_ctarank;
// before
ld.global.f32 %v, [%x]; st.shared.f32 [%at], %v; // loaded
barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned; // first
mov.f32 %sum, 0f00000000; mov.u32 %t, 0;
NEXT: mapa.shared::cluster.u32 %peer, %at, %t; // mapped
ld.shared::cluster.f32 %v, [%peer]; add.f32 %sum, %sum, %v;
add.u32 %t, %t, 1; setp.lt.u32 %p, %t, %size; @%p bra NEXT;
barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned; // last
// after
st.global.f32 [%o], %sum; DONE: ret;
}
";

const FIRST: &str = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned; // first";
const LAST: &str = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned; // last";

/// What a mistake does to the text: a piece of it, and what stands there instead.
type Bug = (&'static str, &'static str);

fn program(bugs: &[Bug]) -> String {
    bugs.iter().fold(SUMS.to_owned(), |text, (found, instead)| {
        assert!(text.contains(found), "{found}");
        text.replace(found, instead)
    })
}

fn run(gpu: &Gpu) -> Result<(Vec<f32>, Counters), Fault> {
    let count = (CLUSTERS * BLOCKS * THREADS) as usize;
    let (x, out) = (gpu.upload(&values(count, 1)), gpu.reserve(count * 4));
    let args = [x, out].map(Arg::Pointer);
    let counters = gpu.launch("sums", [CLUSTERS * BLOCKS, 1, 1], [THREADS, 1, 1], 0, &args)?;
    Ok((gpu.download(out, count), counters))
}

/// The sums that every block of a cluster comes to.
fn wanted() -> Vec<f32> {
    let x = values((CLUSTERS * BLOCKS * THREADS) as usize, 1);
    let (blocks, threads) = (BLOCKS as usize, THREADS as usize);
    let sum = |cluster: usize, thread: usize| {
        (0..blocks).fold(0.0, |sum, block| sum + x[(cluster * blocks + block) * threads + thread])
    };
    (0..x.len()).map(|at| sum(at / (blocks * threads), at % threads)).collect()
}

fn silent(changes: &[Bug]) -> Counters {
    let mut gpu = Gpu::new(&program(changes));
    let mut last = Counters::default();
    for seed in SEEDS {
        gpu.seed = seed;
        let (got, counters) = run(&gpu).unwrap_or_else(|fault| panic!("{changes:?}, seed {seed}: {fault}"));
        assert_eq!(got, wanted(), "seed {seed}");
        last = counters;
    }
    last
}

/// A mistake must be found under every schedule, by one of these checkers; by one alone with these words.
fn must_find(bugs: &[Bug], kinds: &[FaultKind], words: &str) {
    let mut gpu = Gpu::new(&program(bugs));
    for seed in SEEDS {
        gpu.seed = seed;
        let fault = match run(&gpu) {
            Err(fault) => fault,
            Ok(_) => panic!("{bugs:?} not found, seed {seed}"),
        };
        assert!(kinds.contains(&fault.kind), "{bugs:?}, seed {seed}: {fault}");
        assert!(kinds.len() > 1 || fault.what.contains(words), "{bugs:?}, seed {seed}: {fault}");
        assert!(fault.place.contains("kernel sums") && fault.place.contains("thread ("), "{fault}");
    }
}

#[test]
fn blocks_read_each_others_memory() {
    on("9.0", "blocks_read_each_others_memory", || {
        let counters = silent(&[]);
        let blocks = u64::from(CLUSTERS * BLOCKS);
        assert_eq!((counters.blocks, counters.barriers), (blocks, 2 * blocks));
        // Of four blocks three are others.
        assert_eq!(counters.peer_load_bytes, blocks * u64::from(THREADS) * 3 * 4);
        // A block reads its own memory behind a barrier of its own, by this name or without one.
        let own = ("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned; // last", "// last");
        let own_memory = ("mapa.shared::cluster.u32 %peer, %at, %t; // mapped", "mov.u32 %peer, %at;");
        for mapped in [own_memory, ("%peer, %at, %t;", "%peer, %at, %rank;")] {
            let mut gpu = Gpu::new(&program(&[(FIRST, "bar.sync 0;"), mapped, own]));
            gpu.seed = 1;
            run(&gpu).unwrap_or_else(|fault| panic!("{fault}"));
        }
    });
}

#[test]
fn the_places_of_blocks() {
    on("9.0", "the_places_of_blocks", || {
        let value = |special: &str| {
            let text = format!("mov.u32 %t, {special}; cvt.rn.f32.u32 %sum, %t; // after");
            let gpu = Gpu::new(&SUMS.replace("// after", &text));
            let (got, _) = run(&gpu).unwrap_or_else(|fault| panic!("{special}: {fault}"));
            let of_block = |block: u32| got[(block * THREADS) as usize] as u32;
            (0..CLUSTERS * BLOCKS).map(of_block).collect::<Vec<_>>()
        };
        let blocks = 0..CLUSTERS * BLOCKS;
        let all = |number: u32| vec![number; (CLUSTERS * BLOCKS) as usize];
        for special in ["%cluster_ctarank", "%cluster_ctaid.x"] {
            assert_eq!(value(special), blocks.clone().map(|block| block % BLOCKS).collect::<Vec<_>>());
        }
        assert_eq!(value("%clusterid.x"), blocks.map(|block| block / BLOCKS).collect::<Vec<_>>());
        assert_eq!(value("%nclusterid.x"), all(CLUSTERS));
        for special in ["%cluster_nctarank", "%cluster_nctaid.x"] {
            assert_eq!(value(special), all(BLOCKS));
        }
        assert_eq!((value("%cluster_nctaid.y"), value("%clusterid.z")), (all(1), all(0)));
    });
}

#[test]
fn a_barrier_of_the_cluster_is_dropped() {
    on("9.0", "a_barrier_of_the_cluster_is_dropped", || {
        let early = [FaultKind::Race, FaultKind::Uninitialised];
        for instead in ["", "bar.sync 0;"] {
            must_find(&[(FIRST, instead)], &early, "");
        }
        // A block may have exited, or write what is still read.
        must_find(&[(LAST, "")], &[FaultKind::Race], "may have exited");
        let write =
            "bar.sync 0; st.shared.f32 [%at], %sum; barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;";
        must_find(&[(LAST, write)], &early, "");
        // Behind the barrier it may.
        silent(&[("// after", "st.shared.f32 [%at], %sum;")]);
    });
}

#[test]
fn a_copy_is_not_waited_for() {
    on("9.0", "a_copy_is_not_waited_for", || {
        let load = "ld.global.f32 %v, [%x]; st.shared.f32 [%at], %v; // loaded";
        silent(&[(load, "cp.async.ca.shared.global [%at], [%x], 4; cp.async.wait_all;")]);
        let late = (load, "cp.async.ca.shared.global [%at], [%x], 4;");
        must_find(&[late, (LAST, "cp.async.wait_all;")], &[FaultKind::AsyncCopy], "before the cp.async of warp");
    });
}

#[test]
fn somebody_does_not_come() {
    on("9.0", "somebody_does_not_come", || {
        let kind = [FaultKind::BarrierDivergence];
        must_find(&[("// before", "setp.eq.u32 %p, %rank, 2; @%p bra DONE;")], &kind, "blocks [2] of it");
        must_find(&[("// before", "setp.lt.u32 %p, %tid, 32; @%p bra DONE;")], &kind, "warps [0], which have exited");
        must_find(&[("// before", "setp.eq.u32 %p, %tid, 5; @%p bra DONE;")], &kind, "lanes 0x00000020");
        // One warp waits for its block, the other for the cluster.
        let other = "setp.lt.u32 %p, %tid, 32; @%p bra OTHER; bar.sync 0; OTHER: // loaded";
        must_find(&[("// loaded", other)], &kind, "have exited or wait for the cluster");
    });
}

#[test]
fn a_block_that_is_not_there() {
    on("9.0", "a_block_that_is_not_there", || {
        must_find(
            &[("mov.u32 %t, 0;", "mov.u32 %t, 1;"), ("%t, %size; @", "%t, 5; @")],
            &[FaultKind::OutOfBounds],
            "block 4",
        );
        must_find(&[("[%peer]", "[%peer+1024]")], &[FaultKind::OutOfBounds], "4 bytes at shared address 0x400");
        must_find(&[("[%peer]", "[%peer+2]")], &[FaultKind::Misaligned], "4-byte access");
    });
}

#[test]
fn what_the_decoder_refuses() {
    on("9.0", "what_the_decoder_refuses", || {
        let refused = |found: &'static str, instead: &'static str, words: &str| {
            let error = Module::load(&program(&[(found, instead)]), &Memory::new(1 << 20)).expect_err(instead);
            assert!(error.message.contains(words), "{error}");
        };
        refused(LAST, "barrier.cluster.arrive.aligned;", "no wait behind it");
        refused(LAST, "@%p barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;", "under a predicate");
        refused(LAST, "barrier.cluster.wait.aligned;", "an arrive, with release");
        refused(
            LAST,
            "barrier.cluster.arrive.aligned; mov.u32 %t, 0; barrier.cluster.wait.aligned;",
            "right behind it",
        );
        refused(
            LAST,
            "barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned;",
            "an arrive, with release",
        );
        refused("ld.shared::cluster.f32 %v, [%peer];", "st.shared::cluster.f32 [%peer], %v;", "shared::cluster");
        refused("mapa.shared::cluster.u32 %peer", "mapa.u32 %peer", "mapa");
    });
}

#[test]
fn grids_that_clusters_do_not_divide() {
    on("9.0", "grids_that_clusters_do_not_divide", || {
        let gpu = Gpu::new(&program(&[]));
        let function = &gpu.module.functions["sums"];
        assert_eq!(function.refuse([8, 3, 1], [THREADS, 1, 1], 0), None);
        let message = function.refuse([6, 1, 1], [THREADS, 1, 1], 0).unwrap_or_default();
        assert!(message.contains("[6, 1, 1]") && message.contains("[4, 1, 1]"), "{message}");
        let gpu = Gpu::new(&program(&[("reqnctapercluster 4", "reqnctapercluster 16")]));
        assert!(gpu.module.functions["sums"].refuse([16, 1, 1], [THREADS, 1, 1], 0).is_some());
    });
}
