//! The decoded form of a kernel: what the warps execute.

use super::alu::Alu;
use crate::ptx::syntax::{Loc, Param, Space};
use std::collections::HashMap;
use std::sync::Arc;

/// Number types of conversions, comparisons and atomics.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NumType {
    U8,
    U16,
    U32,
    U64,
    S8,
    S16,
    S32,
    S64,
    F16,
    Bf16,
    F32,
    F64,
}

impl NumType {
    /// The type of a PTX suffix; untyped bits count as unsigned.
    pub fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "u8" | "b8" => Self::U8,
            "u16" | "b16" => Self::U16,
            "u32" | "b32" => Self::U32,
            "u64" | "b64" => Self::U64,
            "s8" => Self::S8,
            "s16" => Self::S16,
            "s32" => Self::S32,
            "s64" => Self::S64,
            "f16" => Self::F16,
            "bf16" => Self::Bf16,
            "f32" => Self::F32,
            "f64" => Self::F64,
            _ => return None,
        })
    }

    /// Width in bits.
    pub fn bits(self) -> u32 {
        match self {
            Self::U8 | Self::S8 => 8,
            Self::U16 | Self::S16 | Self::F16 | Self::Bf16 => 16,
            Self::U32 | Self::S32 | Self::F32 => 32,
            Self::U64 | Self::S64 | Self::F64 => 64,
        }
    }

    /// Whether values live in 64-bit rows.
    pub fn is_wide(self) -> bool {
        self.bits() == 64
    }

    /// Whether it is a signed integer.
    pub fn is_signed(self) -> bool {
        matches!(self, Self::S8 | Self::S16 | Self::S32 | Self::S64)
    }

    /// Whether it is a floating-point type.
    pub fn is_float(self) -> bool {
        matches!(self, Self::F16 | Self::Bf16 | Self::F32 | Self::F64)
    }
}

/// Rounding of `cvt`.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    Nearest,
    NearestInt,
    ZeroInt,
    DownInt,
    UpInt,
}

/// Comparison of `setp`.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compare {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    Num,
    Nan,
}

/// How `setp` combines its result with a predicate, and predicate logic.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Logic {
    And,
    Or,
    Xor,
}

/// A predicate with an optional negation.
#[derive(Clone, Copy, Debug)]
pub struct Pred {
    /// Slot in [`super::lanes::Regs::p`].
    pub slot: u16,
    /// Read inverted.
    pub negated: bool,
}

/// A register address plus a constant.
#[derive(Clone, Copy, Debug)]
pub struct Address {
    /// Register row.
    pub slot: u16,
    /// Whether the row is 64 bits wide.
    pub wide: bool,
    /// Added to every lane.
    pub offset: i64,
}

/// A load or store of `count` elements of `bytes` each.
#[derive(Clone, Copy, Debug)]
pub struct Access {
    /// Where.
    pub space: Space,
    /// Bytes of one element.
    pub bytes: u8,
    /// Elements (`.v2`, `.v4`).
    pub count: u8,
    /// Registers of the elements; [`NONE`] drops one.
    pub regs: [u16; 4],
    /// Whether the registers are 64 bits wide.
    pub wide: bool,
    /// Sign-extend loads.
    pub signed: bool,
    /// The address.
    pub address: Address,
}

/// No register.
pub const NONE: u16 = u16::MAX;

/// Lane exchange of `shfl.sync`.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shuffle {
    Up,
    Down,
    Butterfly,
    Index,
}

/// Result of `vote.sync`.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vote {
    All,
    Any,
    Uniform,
    Ballot,
}

/// Read-modify-write operations of `atom`, `red` and `redux`.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtomOp {
    Add,
    Min,
    Max,
    And,
    Or,
    Xor,
    Exch,
    Cas,
    Inc,
    Dec,
}

/// An atomic access.
#[derive(Clone, Copy, Debug)]
pub struct Atomic {
    /// Where.
    pub space: Space,
    /// What.
    pub op: AtomOp,
    /// On which type.
    pub ty: NumType,
    /// Old value, or [`NONE`] for `red`.
    pub d: u16,
    /// The address.
    pub address: Address,
    /// Operand (the comparand of `cas`).
    pub b: u16,
    /// New value of `cas`.
    pub c: u16,
}

/// `cp.async`.
#[derive(Clone, Copy, Debug)]
pub struct AsyncCopy {
    /// Shared address.
    pub target: Address,
    /// Global address.
    pub source: Address,
    /// Bytes written.
    pub bytes: u8,
    /// Row with the bytes read (the rest is zero), or [`NONE`].
    pub source_bytes: u16,
}

/// `mma.sync.aligned.m16n8kK.row.col.f32.T.T.f32` with T = f16 or bf16, K = 8 or 16.
#[derive(Clone, Copy, Debug)]
pub struct Mma {
    /// bf16 inputs rather than f16.
    pub is_bf16: bool,
    /// 8 or 16.
    pub k: u8,
    /// Accumulator out.
    pub d: [u16; 4],
    /// A fragment; 2 registers for K = 8.
    pub a: [u16; 4],
    /// B fragment; 1 register for K = 8.
    pub b: [u16; 2],
    /// Accumulator in.
    pub c: [u16; 4],
}

/// Where the A matrix of a `wgmma` comes from.
#[derive(Clone, Copy, Debug)]
pub enum Left {
    /// Shared memory: the row of its descriptor, and whether M runs fastest there.
    Shared(u16, bool),
    /// Registers, as those of `mma.m16n8k16`.
    Registers([u16; 4]),
}

/// Whether a `wgmma` adds to what its accumulator holds.
#[derive(Clone, Copy, Debug)]
pub enum Accumulate {
    /// It does.
    Always,
    /// D = A B.
    Never,
    /// Where the predicate holds.
    If(Pred),
}

/// `wgmma.mma_async.sync.aligned.m64nNk16.f32.T.T` with T = f16 or bf16.
#[derive(Clone, Debug)]
pub struct Wgmma {
    /// bf16 inputs rather than f16.
    pub is_bf16: bool,
    /// Accumulator out: N / 2 registers, four for every 8 columns.
    pub d: Box<[u16]>,
    /// Accumulator in, the same registers.
    pub c: Box<[u16]>,
    /// A, 64 rows of 16.
    pub a: Left,
    /// Row of the descriptor of B, N columns of 16.
    pub b: u16,
    /// Whether N runs fastest in B rather than K.
    pub is_b_transposed: bool,
    /// Whether D is added to.
    pub accumulate: Accumulate,
    /// Whether products are taken with the other sign: one of the two scales is -1.
    pub is_negative: bool,
}

/// `setp`.
#[derive(Clone, Copy, Debug)]
pub struct SetPredicate {
    /// The comparison.
    pub compare: Compare,
    /// True when either side is NaN.
    pub unordered: bool,
    /// On which type.
    pub ty: NumType,
    /// Result.
    pub p: u16,
    /// Inverted result, or [`NONE`].
    pub q: u16,
    /// Left side.
    pub a: u16,
    /// Right side.
    pub b: u16,
    /// Combined with a predicate.
    pub combine: Option<(Logic, Pred)>,
}

/// A decoded operation.
#[allow(missing_docs)]
#[derive(Clone, Debug)]
pub enum Op {
    Alu {
        op: Alu,
        d: u16,
        s: [u16; 3],
    },
    /// With `.ftz` on sources and result, `.sat` on the result.
    AluFlush {
        op: Alu,
        d: u16,
        s: [u16; 3],
        count: u8,
        ftz: bool,
        sat: bool,
        flush_result: bool,
    },
    SetPredicate(SetPredicate),
    Select {
        wide: bool,
        d: u16,
        a: u16,
        b: u16,
        p: Pred,
    },
    Logic {
        op: Logic,
        d: u16,
        a: Pred,
        b: Pred,
    },
    MovPredicate {
        d: u16,
        a: Pred,
    },
    Lop3 {
        d: u16,
        a: u16,
        b: u16,
        c: u16,
        table: u8,
    },
    Insert {
        wide: bool,
        d: u16,
        field: u16,
        base: u16,
        position: u16,
        length: u16,
    },
    Convert {
        from: NumType,
        to: NumType,
        rounding: Rounding,
        saturate: bool,
        d: u16,
        d_wide: bool,
        s: u16,
        s_wide: bool,
    },
    Pack {
        d: u16,
        wide: bool,
        parts: [u16; 4],
        count: u8,
    },
    Unpack {
        s: u16,
        wide: bool,
        parts: [u16; 4],
        count: u8,
    },
    Clock {
        d: u16,
        wide: bool,
    },
    Branch {
        target: u32,
    },
    BranchTable {
        index: u16,
        targets: Box<[u32]>,
    },
    Exit,
    Trap,
    Assert {
        message: u16,
        file: u16,
        line: u16,
    },
    Load(Access),
    Store(Access),
    /// From the shared memory of blocks of the cluster.
    PeerLoad(Access),
    /// `mapa`.
    PeerAddress {
        d: u16,
        a: u16,
        rank: u16,
    },
    Atomic(Atomic),
    AsyncCopy(AsyncCopy),
    AsyncCommit,
    /// Waits until at most this many groups are in flight.
    AsyncWait {
        groups: u32,
    },
    AsyncWaitAll,
    Barrier {
        id: u16,
        count: u16,
    },
    BarrierReduce {
        op: Option<Logic>,
        id: u16,
        d: u16,
        p: Pred,
    },
    /// Of the cluster: `barrier.cluster.arrive` and `barrier.cluster.wait` right behind it.
    ClusterBarrier,
    WarpBarrier {
        mask: u16,
    },
    Shuffle {
        mode: Shuffle,
        d: u16,
        p: u16,
        a: u16,
        b: u16,
        c: u16,
        mask: u16,
    },
    Vote {
        mode: Vote,
        d: u16,
        p: Pred,
        mask: u16,
    },
    ActiveMask {
        d: u16,
    },
    Match {
        all: bool,
        wide: bool,
        d: u16,
        p: u16,
        a: u16,
        mask: u16,
    },
    Reduce {
        op: AtomOp,
        signed: bool,
        d: u16,
        a: u16,
        mask: u16,
    },
    LoadMatrix {
        count: u8,
        transposed: bool,
        d: [u16; 4],
        address: Address,
    },
    Mma(Mma),
    Wgmma(Box<Wgmma>),
    WgmmaFence,
    WgmmaCommit,
    /// Waits until at most this many groups are under way.
    WgmmaWait {
        groups: u32,
    },
    Fence,
    /// `fence.proxy.async` for shared memory.
    ProxyFence,
    Nop,
}

impl Op {
    /// Whether warps wait for each other there.
    pub fn is_barrier(&self) -> bool {
        matches!(self, Self::Barrier { .. } | Self::BarrierReduce { .. } | Self::ClusterBarrier)
    }
}

/// One instruction.
#[derive(Clone, Debug)]
pub struct Inst {
    /// What it does.
    pub op: Op,
    /// Lanes that do it.
    pub guard: Option<Pred>,
    /// Index into [`Kernel::locs`].
    pub loc: u32,
}

impl Inst {
    /// Where it may branch to.
    pub fn targets(&self) -> &[u32] {
        match &self.op {
            Op::Branch { target } => std::slice::from_ref(target),
            Op::BranchTable { targets, .. } => targets,
            _ => &[],
        }
    }

    /// Whether a lane may go on with the next instruction.
    pub fn goes_on(&self) -> bool {
        self.guard.is_some() || !matches!(self.op, Op::Branch { .. } | Op::BranchTable { .. } | Op::Exit | Op::Trap)
    }
}

/// Values that the launch gives to a warp.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Special {
    Tid(u8),
    Ntid(u8),
    Ctaid(u8),
    Nctaid(u8),
    ClusterId(u8),
    NumClusters(u8),
    ClusterCtaid(u8),
    ClusterNctaid(u8),
    ClusterRank,
    ClusterSize,
    LaneId,
    WarpId,
    NumWarps,
    SmId,
    LaneMaskEq,
    LaneMaskLt,
    LaneMaskLe,
    LaneMaskGt,
    LaneMaskGe,
    DynamicShared,
    TotalShared,
}

/// A shared variable: name, offset, bytes.
#[derive(Clone, Debug)]
pub struct SharedVar {
    /// Its name.
    pub name: String,
    /// Offset in the shared window.
    pub offset: u32,
    /// Size; for the dynamic array it comes from the launch.
    pub bytes: u32,
}

/// A kernel ready to run.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// No other kernel of the process has it.
    pub id: u64,
    /// Its name.
    pub name: String,
    /// Parameters.
    pub params: Vec<Param>,
    /// Instructions.
    pub insts: Vec<Inst>,
    /// Source positions.
    pub locs: Vec<Loc>,
    /// Names of source files.
    pub files: Arc<HashMap<u32, String>>,
    /// Rows of each [`super::operands::Bank`].
    pub rows: [usize; 3],
    /// Constant rows, 32 bits.
    pub consts32: Vec<(u16, u32)>,
    /// Constant rows, 64 bits.
    pub consts64: Vec<(u16, u64)>,
    /// Rows filled per warp.
    pub specials: Vec<(Special, u16)>,
    /// Static shared variables with the gaps between them.
    pub shared: Vec<SharedVar>,
    /// Bytes of static shared memory that the kernel asks for.
    pub static_shared: u32,
    /// Where dynamic shared memory begins in the shared window.
    pub dynamic_offset: u32,
    /// Bytes of local memory per thread.
    pub local_bytes: u32,
    /// `.maxntid`.
    pub max_threads: Option<u32>,
    /// `.reqntid`.
    pub required_threads: Option<[u32; 3]>,
    /// Blocks of a cluster: `.reqnctapercluster`, or one.
    pub cluster: [u32; 3],
    /// Whether writes can be published to other blocks (fence and atomics).
    pub has_fence: bool,
    /// Whether it has `wgmma`.
    pub has_wgmma: bool,
    /// Whether it reads the shared memory of other blocks.
    pub has_peer_loads: bool,
}

impl Kernel {
    /// Bytes of the parameter buffer.
    pub fn param_bytes(&self) -> u32 {
        self.params.last().map_or(0, |p| p.offset + p.bytes)
    }

    /// Blocks of a cluster.
    pub fn cluster_size(&self) -> u32 {
        self.cluster.iter().product()
    }

    /// Whether control can come from one instruction to another.
    pub fn reaches(&self, from: u32, to: u32) -> bool {
        let mut seen = vec![false; self.insts.len()];
        let mut open = vec![from];
        while let Some(pc) = open.pop() {
            if pc == to {
                return true;
            }
            if std::mem::replace(&mut seen[pc as usize], true) {
                continue;
            }
            let inst = &self.insts[pc as usize];
            open.extend(inst.targets());
            if inst.goes_on() {
                open.push(pc + 1);
            }
        }
        false
    }

    /// `file:line` of an instruction, with the caller's line if it was inlined.
    pub fn source(&self, pc: usize) -> String {
        let Some(inst) = self.insts.get(pc) else { return "end of kernel".to_owned() };
        let loc = self.locs[inst.loc as usize];
        let file = |n: u32| {
            let path = self.files.get(&n).map_or("no line information, compile with -lineinfo", String::as_str);
            path.rsplit('/').next().unwrap_or(path).to_owned()
        };
        match loc.inlined_at {
            _ if loc.line == 0 => format!("instruction {pc} ({})", file(loc.file)),
            Some((f, line)) => format!("{}:{} (inlined at {}:{line})", file(loc.file), loc.line, file(f)),
            None => format!("{}:{}", file(loc.file), loc.line),
        }
    }
}

/// Bits of an address in a block's own shared memory; above them `mapa` puts the number of a block in the cluster, plus one.
pub const CLUSTER_SHIFT: u32 = 24;
/// Start of the window in which generic addresses mean shared memory.
pub const SHARED_WINDOW: u64 = 0x0200_0000_0000_0000;
/// Start of the window in which generic addresses mean local memory.
pub const LOCAL_WINDOW: u64 = 0x0300_0000_0000_0000;
/// Start of the window in which generic addresses mean kernel parameters.
pub const PARAM_WINDOW: u64 = 0x0400_0000_0000_0000;
/// Bytes of a window.
pub const WINDOW_BYTES: u64 = 1 << 32;
