//! What the async proxy, through which `wgmma` reads shared memory, may read.
//!
//! It reads at any time from an instruction to its wait, so nobody may write what it reads until then. It sees what a thread
//! wrote only if that thread ran `fence.proxy.async` behind it, and other warps only if a barrier lies behind that fence.
//! PTX ISA, "Async proxy".

use super::shared::{EPOCH_SHIFT, MANY, name};
use crate::fault::{Fault, FaultKind};

/// Bytes that one read takes.
const CHUNK: usize = 16;
/// Bytes whose writer is known.
const PIECE: usize = 2;
const LANE_SHIFT: u32 = 21;
const WARP_SHIFT: u32 = LANE_SHIFT + 5;
const MAX_FENCES: u32 = (1 << LANE_SHIFT) - 1;
/// Warps of a block.
const WARPS: usize = 32;

#[derive(Clone, Copy, Debug, Default)]
struct Chunk {
    /// Epoch in which every warp may read what is here.
    seen: u32,
    /// Reads under way.
    reads: u32,
    /// Where the last read ended, in the form of a cell of shared memory: epoch and warp, or several.
    ended: u32,
}

#[derive(Clone, Copy, Debug)]
struct Fence {
    epoch: u32,
    lanes: u32,
}

/// Reads under way, and who wrote what they read.
#[derive(Debug, Default)]
pub(super) struct AsyncProxy {
    /// Whether the kernel has instructions that read so. Nothing is kept for others.
    is_used: bool,
    chunks: Vec<Chunk>,
    /// For each piece the thread that wrote it last, and how many fences its warp had run.
    writers: Vec<u32>,
    /// Of each warp in this block.
    fences: Vec<Vec<Fence>>,
}

impl AsyncProxy {
    /// Makes it that of shared memory of so many bytes.
    pub(super) fn prepare(&mut self, bytes: usize, is_used: bool) {
        self.is_used = is_used;
        if is_used {
            self.chunks.resize(self.chunks.len().max(bytes.div_ceil(CHUNK)), Chunk::default());
            self.writers.resize(self.chunks.len() * (CHUNK / PIECE), 0);
            self.fences.resize(WARPS, Vec::new());
        }
    }

    /// Begins a block.
    pub(super) fn begin_block(&mut self) {
        self.fences.iter_mut().for_each(Vec::clear);
    }

    /// Epochs begin anew.
    pub(super) fn clear(&mut self) {
        self.chunks.iter_mut().for_each(|chunk| (chunk.seen, chunk.ended) = (0, 0));
    }

    /// `lanes` of a warp run `fence.proxy.async`.
    pub(super) fn fence(&mut self, warp: u32, lanes: u32, epoch: u32) {
        if self.is_used {
            self.fences[warp as usize].push(Fence { epoch, lanes });
        }
    }

    /// Checks that bytes may be written by `mine`, epoch and warp in the form of a cell.
    #[inline(always)]
    pub(super) fn claim(&mut self, address: u64, bytes: u64, mine: u32) -> Result<(), Fault> {
        if !self.is_used {
            return Ok(());
        }
        for chunk in &mut self.chunks[address as usize / CHUNK..(address + bytes).div_ceil(CHUNK as u64) as usize] {
            if chunk.reads > 0 || chunk.ended != mine && chunk.ended >> EPOCH_SHIFT == mine >> EPOCH_SHIFT {
                return Err(explain_claim(address, mine & MANY, *chunk));
            }
            chunk.seen = 0;
        }
        Ok(())
    }

    /// A lane of a warp has written bytes.
    #[inline(always)]
    pub(super) fn wrote(&mut self, address: u64, bytes: u64, (warp, lane): (u32, usize)) {
        if !self.is_used {
            return;
        }
        let fences = (self.fences[warp as usize].len() as u32).min(MAX_FENCES);
        let writer = warp << WARP_SHIFT | (lane as u32) << LANE_SHIFT | fences;
        self.writers[address as usize / PIECE..(address + bytes).div_ceil(PIECE as u64) as usize].fill(writer);
    }

    /// Whether every warp may read a chunk in this epoch, as far as is known.
    #[inline(always)]
    pub(super) fn is_seen(&self, address: u32, epoch: u32) -> bool {
        self.chunks[address as usize / CHUNK].seen == epoch
    }

    /// Every warp may read a chunk in this epoch.
    pub(super) fn see(&mut self, address: u32, epoch: u32) {
        self.chunks[address as usize / CHUNK].seen = epoch;
    }

    /// A read of a chunk begins.
    #[inline(always)]
    pub(super) fn begin(&mut self, address: u32) {
        self.chunks[address as usize / CHUNK].reads += 1;
    }

    /// A read of a chunk ends in the epoch and for the warp of `mine`.
    #[inline(always)]
    pub(super) fn end(&mut self, address: u32, mine: u32) {
        let chunk = &mut self.chunks[address as usize / CHUNK];
        let is_shared = chunk.ended != mine && chunk.ended >> EPOCH_SHIFT == mine >> EPOCH_SHIFT;
        (chunk.reads, chunk.ended) = (chunk.reads - 1, if is_shared { mine | MANY } else { mine });
    }

    /// Checks that fences lie behind what was written to a chunk, in time for `warp` in this epoch; whether they are in time
    /// for all.
    pub(super) fn check_fences(&self, address: u32, warp: u32, epoch: u32) -> Result<bool, Fault> {
        let first = address as usize / PIECE;
        let (mut last, mut is_old) = (None, true);
        for (piece, &writer) in self.writers[first..first + CHUNK / PIECE].iter().enumerate() {
            if last.replace(writer) != Some(writer) {
                is_old &= self
                    .check_fence(writer, warp, epoch)
                    .map_err(|missing| explain_fence(address + (piece * PIECE) as u32, writer, warp, missing))?;
            }
        }
        Ok(is_old)
    }

    fn check_fence(&self, writer: u32, warp: u32, epoch: u32) -> Result<bool, &'static str> {
        let (by, lane) = (writer >> WARP_SHIFT, writer >> LANE_SHIFT & 31);
        let fences = &self.fences[by as usize];
        let since = &fences[fences.len().min((writer & MAX_FENCES) as usize)..];
        match since.iter().find(|fence| fence.lanes >> lane & 1 == 1) {
            None => Err("without fence.proxy.async behind it"),
            Some(fence) if fence.epoch < epoch => Ok(true),
            Some(_) if by == warp => Ok(false),
            Some(_) => Err("with no barrier behind its fence.proxy.async"),
        }
    }
}

#[cold]
fn explain_claim(address: u64, warp: u32, chunk: Chunk) -> Fault {
    let writes = format!("warp {warp} writes shared address {address:#x}, which");
    if chunk.reads > 0 {
        let what = format!("{writes} a wgmma may still read: no wgmma.wait_group has covered it");
        return Fault::new(FaultKind::AsyncMatrix, what);
    }
    let by = name(chunk.ended & MANY);
    Fault::new(FaultKind::Race, format!("{writes} a wgmma of {by} read until its wait, with no barrier between"))
}

#[cold]
fn explain_fence(address: u32, writer: u32, warp: u32, missing: &str) -> Fault {
    let thread = (writer >> WARP_SHIFT) * 32 + (writer >> LANE_SHIFT & 31);
    let what = format!(
        "wgmma of warp {warp} reads shared address {address:#x}, written by the generic proxy (thread {thread} of the block) \
         {missing}"
    );
    Fault::new(FaultKind::ProxyFence, what)
}
