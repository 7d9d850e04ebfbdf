//! What other blocks of a cluster read of a block's shared memory.
//!
//! They may read at any time from one barrier of the cluster to the next, so nobody may write what one of them reads in between,
//! and the block may not exit. PTX ISA, "barrier.cluster".

use crate::fault::{Fault, FaultKind};

/// Bytes whose last reader is known.
const GRANULE: usize = 4;

/// When bytes were read last. Phases count barriers of the cluster and go on from block to block.
#[derive(Debug, Default)]
pub(super) struct PeerReads {
    /// Whether the kernel has instructions that read so. Nothing is kept for others.
    is_used: bool,
    phase: u32,
    /// Of each granule, the phase in which it was read last.
    read: Vec<u32>,
    /// The last one of all: its phase, the address, and the block in the cluster that read it.
    last: (u32, u32, u32),
}

impl PeerReads {
    /// Makes it that of shared memory of so many bytes.
    pub(super) fn prepare(&mut self, bytes: usize, is_used: bool) {
        self.is_used = is_used;
        if is_used {
            self.read.resize(self.read.len().max(bytes.div_ceil(GRANULE)), 0);
        }
    }

    /// A block begins, or a barrier of the cluster has completed.
    pub(super) fn next_phase(&mut self) {
        if self.phase == u32::MAX {
            self.read.fill(0);
            self.phase = 0;
        }
        self.phase += 1;
    }

    /// Block `by` of the cluster reads bytes.
    pub(super) fn read(&mut self, address: u32, bytes: u32, by: u32) {
        let granules = address as usize / GRANULE..((address + bytes) as usize).div_ceil(GRANULE);
        self.read[granules].fill(self.phase);
        self.last = (self.phase, address, by);
    }

    /// Checks that `warp` of the block may write bytes.
    #[inline(always)]
    pub(super) fn claim(&self, address: u64, bytes: u64, warp: u32) -> Result<(), Fault> {
        if !self.is_used {
            return Ok(());
        }
        let granules = address as usize / GRANULE..((address + bytes) as usize).div_ceil(GRANULE);
        if self.read[granules].contains(&self.phase) {
            return Err(explain_claim(address, warp));
        }
        Ok(())
    }

    /// Checks that the block may exit.
    pub(super) fn check_exit(&self) -> Result<(), Fault> {
        let (phase, address, by) = self.last;
        if !self.is_used || phase != self.phase {
            return Ok(());
        }
        let what = format!(
            "block {by} of the cluster reads shared address {address:#x} of this block, which may have exited: no barrier of the \
             cluster lies behind it"
        );
        Err(Fault::new(FaultKind::Race, what))
    }
}

#[cold]
fn explain_claim(address: u64, warp: u32) -> Fault {
    let what = format!(
        "warp {warp} writes shared address {address:#x}, which another block of the cluster read with no barrier of the cluster \
         between"
    );
    Fault::new(FaultKind::Race, what)
}
