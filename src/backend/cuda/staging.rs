//! Memory of the host that blocks of one thread go through: page-locked, so that copies go beside kernels.
//!
//! A block has a buffer of its size. Where the system page-locks no such, it lies in ordinary memory and goes through a ring of
//! two smaller buffers: one is copied while the other is filled or emptied. Where there are not even those, the driver
//! copies through its own.

#![allow(unsafe_code)]

use cudarc::driver::sys::CUdeviceptr;

use super::copies::CopyStream;
use super::memory::{CudaHostBuffer, HostAllocator};
use super::stream::CudaEvent;
use crate::Result;

/// A ring has an eighth of a block in each of its buffers, or less.
const PARTS_OF_BLOCK: usize = 8;

/// The fewest bytes of such a buffer: below, calls of the driver take longer than copies.
const MIN_PART_BYTES: usize = 64 << 10;

/// Room for one block on its way.
pub(super) enum Staging {
    /// It lies there as a whole.
    Whole(CudaHostBuffer),
    /// It lies in `block`.
    Ring { block: Vec<u8>, ring: Ring },
}

impl Staging {
    /// For blocks of at most so many bytes.
    pub(super) fn allocate(host: &HostAllocator, bytes: usize) -> Result<Self> {
        if let Some(whole) = host.pin_one(bytes)? {
            return Ok(Self::Whole(whole));
        }
        match Ring::allocate(host, bytes / PARTS_OF_BLOCK)? {
            Some(ring) => Ok(Self::Ring { block: vec![0; bytes], ring }),
            None => host.allocate_pageable(bytes).map(Self::Whole),
        }
    }

    /// Bytes of the largest block.
    pub(super) fn len(&self) -> usize {
        self.bytes().len()
    }

    /// What lies there.
    pub(super) fn bytes(&self) -> &[u8] {
        match self {
            Self::Whole(whole) => whole.as_ref(),
            Self::Ring { block, .. } => block,
        }
    }

    /// For a block on its way up to be written to.
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Whole(whole) => whole.as_mut(),
            Self::Ring { block, .. } => block,
        }
    }

    /// Copies the first `bytes` to the device, and waits until they are there.
    ///
    /// # Safety
    /// So many exist at `target`.
    pub(super) unsafe fn bring_up(&mut self, copies: &CopyStream, target: CUdeviceptr, bytes: usize) -> Result<()> {
        // SAFETY: the caller's promise; nobody has the bytes of the host before they have been waited for.
        let queued = unsafe {
            match self {
                Self::Whole(whole) => copies.queue_up(&whole.as_ref()[..bytes], target),
                Self::Ring { block, ring } => ring.bring_up(copies, &block[..bytes], target),
            }
        };
        // Also after an error: the next block goes through the same memory.
        copies.synchronize().and(queued)
    }

    /// Has the first `bytes` be what lies on the device.
    ///
    /// # Safety
    /// So many exist at `source`.
    pub(super) unsafe fn bring_down(&mut self, copies: &CopyStream, source: CUdeviceptr, bytes: usize) -> Result<()> {
        // SAFETY: as for `bring_up`.
        let queued = unsafe {
            match self {
                Self::Whole(whole) => copies.queue_down(source, &mut whole.as_mut()[..bytes]),
                Self::Ring { block, ring } => ring.bring_down(copies, source, &mut block[..bytes]),
            }
        };
        copies.synchronize().and(queued)
    }
}

/// Two page-locked buffers that are used in turn.
pub(super) struct Ring {
    parts: [CudaHostBuffer; 2],
    part_bytes: usize,
}

impl Ring {
    /// Of buffers of at most so many bytes, or the largest of their halves that there are two of.
    fn allocate(host: &HostAllocator, most: usize) -> Result<Option<Self>> {
        let mut part_bytes = most;
        while part_bytes >= MIN_PART_BYTES {
            if let (Some(first), Some(second)) = (host.pin_one(part_bytes)?, host.pin_one(part_bytes)?) {
                return Ok(Some(Self { parts: [first, second], part_bytes }));
            }
            part_bytes /= 2;
        }
        Ok(None)
    }

    /// # Safety
    /// So many bytes exist at `target`.
    unsafe fn bring_up(&mut self, copies: &CopyStream, block: &[u8], target: CUdeviceptr) -> Result<()> {
        let mut copied: [Option<CudaEvent>; 2] = [None, None];
        for (number, bytes) in block.chunks(self.part_bytes).enumerate() {
            let at = number % 2;
            if let Some(copied) = &copied[at] {
                copies.wait(copied)?;
            }
            let part = &mut self.parts[at].as_mut()[..bytes.len()];
            part.copy_from_slice(bytes);
            // SAFETY: the caller's promise; the part is not touched again before its event.
            unsafe { copies.queue_up(part, target + (number * self.part_bytes) as u64) }?;
            copied[at] = Some(copies.record()?);
        }
        Ok(())
    }

    /// # Safety
    /// So many bytes exist at `source`.
    unsafe fn bring_down(&mut self, copies: &CopyStream, source: CUdeviceptr, block: &mut [u8]) -> Result<()> {
        // The part before, once it is there.
        let mut pending: Option<(CudaEvent, &mut [u8], usize)> = None;
        for (number, bytes) in block.chunks_mut(self.part_bytes).enumerate() {
            let at = number % 2;
            let part = &mut self.parts[at].as_mut()[..bytes.len()];
            // SAFETY: the caller's promise; the part is not touched again before its event.
            unsafe { copies.queue_down(source + (number * self.part_bytes) as u64, part) }?;
            let copied = copies.record()?;
            if let Some(before) = pending.replace((copied, bytes, at)) {
                self.take(copies, before)?;
            }
        }
        pending.map_or(Ok(()), |last| self.take(copies, last))
    }

    fn take(&self, copies: &CopyStream, (copied, bytes, at): (CudaEvent, &mut [u8], usize)) -> Result<()> {
        copies.wait(&copied)?;
        bytes.copy_from_slice(&self.parts[at].as_ref()[..bytes.len()]);
        Ok(())
    }
}
