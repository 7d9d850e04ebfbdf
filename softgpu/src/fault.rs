//! What a checker found, in words, and the CUDA result that the call returns for it.

use std::fmt;

/// The kind of a finding; one per checker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FaultKind {
    /// An address outside every live allocation, or past the end of the one it starts in.
    OutOfBounds,
    /// An address inside an allocation that was freed.
    UseAfterFree,
    /// A pointer freed twice, or one that was never allocated.
    BadFree,
    /// An address that is not a multiple of the access width.
    Misaligned,
    /// Bytes that nobody has written, read by a kernel or copied to the host.
    Uninitialised,
    /// Two warps touch the same shared bytes without a barrier between, or two blocks the same global bytes.
    Race,
    /// A barrier that not every thread of the block can reach.
    BarrierDivergence,
    /// A warp-wide instruction whose named lanes are not all there.
    InactiveLane,
    /// `cp.async` read before its wait, overwritten before it, or never waited for.
    AsyncCopy,
    /// `wgmma` whose tiles change before its wait, that is never committed or waited for, that no `wgmma.fence` precedes, on
    /// which the warps of a warpgroup do not agree, or whose descriptor means nothing.
    AsyncMatrix,
    /// Shared memory that threads wrote, read by `wgmma` with no `fence.proxy.async` between.
    ProxyFence,
    /// A launch whose shape or shared-memory size the kernel does not allow.
    LaunchShape,
    /// Host memory changed, freed or read while an asynchronous copy still needed it.
    HostBuffer,
    /// Two operations on the same bytes in different streams without an event between.
    StreamOrder,
    /// `assert` or `trap` in the kernel.
    Assert,
    /// A kernel that does not end.
    Timeout,
}

impl FaultKind {
    /// The `CUresult` that the first waiting call returns.
    pub fn code(self) -> u32 {
        match self {
            Self::OutOfBounds | Self::UseAfterFree => 700,
            Self::BadFree | Self::LaunchShape => 1,
            Self::Misaligned => 716,
            Self::Assert => 710,
            Self::Timeout => 702,
            _ => 719,
        }
    }
}

/// One finding. `Display` gives the whole message.
#[derive(Clone, Debug)]
pub struct Fault {
    /// Which checker spoke.
    pub kind: FaultKind,
    /// What happened: address, size, allocation.
    pub what: String,
    /// Where: kernel, source line, block, thread; empty for host calls.
    pub place: String,
}

impl Fault {
    /// A finding without a place yet.
    pub fn new(kind: FaultKind, what: impl Into<String>) -> Self {
        Self { kind, what: what.into(), place: String::new() }
    }

    /// The same finding with its place in a kernel.
    pub fn at(mut self, place: impl Into<String>) -> Self {
        if self.place.is_empty() {
            self.place = place.into();
        }
        self
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.kind, self.what)?;
        if !self.place.is_empty() {
            write!(f, "\n  at {}", self.place)?;
        }
        Ok(())
    }
}

impl std::error::Error for Fault {}
