//! Transfers of CUDA: one stream per thread, so that the copy engine works beside kernels. Blocks that land layer by layer
//! come from pinned memory as they lie there, all others go through memory of the thread's own.

#![allow(unsafe_code)]

use std::sync::Arc;

use super::copies::{CopyStream, Run};
use super::memory::{CudaBuffer, CudaHostBuffer, HostAllocator};
use super::staging::Staging;
use super::stream::{CudaEvent, EventPool};
use super::watch::CopyWatch;
use crate::backend::{KvLayout, Landing, LandingBlock, Transfer};
use crate::{Result, invalid};

/// Events of blocks that land layer by layer: each costs calls of the driver for every run of blocks. A step waits an
/// eighth of a copy's time at the least, which is little beside the rest.
const MAX_LANDING_EVENTS: usize = 8;

/// One thread's way to the device. Its memory grows to the largest run and stays.
pub struct CudaTransfer {
    staging: Option<Staging>,
    copies: CopyStream,
    host: HostAllocator,
}

impl CudaTransfer {
    pub(super) fn new(host: &HostAllocator, events: &Arc<EventPool>, watch: &Arc<CopyWatch>) -> Result<Self> {
        let copies = CopyStream::new(host.context(), events, watch)?;
        Ok(Self { staging: None, copies, host: host.clone() })
    }

    /// The device is the calling thread's, and there is room for a run of `bytes` on its way: made at first use, because most
    /// starts never move a block.
    fn prepare(&mut self, bytes: usize) -> Result<(&mut Staging, &CopyStream)> {
        self.copies.bind()?;
        if self.staging.as_ref().is_none_or(|staging| staging.len() < bytes) {
            self.staging = None;
        }
        let staging = match self.staging.take() {
            Some(staging) => staging,
            None => Staging::allocate(&self.host, bytes)?,
        };
        Ok((self.staging.insert(staging), &self.copies))
    }
}

/// The blocks in runs; those of one run follow each other.
fn runs<'a>(
    target: &CudaBuffer,
    blocks: &[LandingBlock<'a, CudaHostBuffer>],
    block_bytes: usize,
) -> Result<Vec<Run<'a>>> {
    let mut runs: Vec<Run<'a>> = Vec::new();
    for LandingBlock { source, target_offset } in blocks {
        let (source, target_offset) = (*source, *target_offset);
        let bytes = source.as_ref();
        if bytes.len() != block_bytes {
            return Err(invalid!("a host block has {} bytes, a block of the device {block_bytes}", bytes.len()));
        }
        let address = target.address(target_offset, block_bytes)?;
        let follows = |run: &&mut Run<'a>| {
            let num_bytes = run.num_blocks * block_bytes;
            source.is_behind(run.first, num_bytes) && run.target + num_bytes as u64 == address
        };
        match runs.last_mut().filter(follows) {
            Some(run) => run.num_blocks += 1,
            None => runs.push(Run { first: source, target: address, num_blocks: 1 }),
        }
    }
    Ok(runs)
}

impl Transfer for CudaTransfer {
    type Buffer = CudaBuffer;
    type HostBuffer = CudaHostBuffer;
    type Event = CudaEvent;

    fn allocate_host_blocks(&self, num_blocks: usize, block_bytes: usize) -> Result<Option<Vec<CudaHostBuffer>>> {
        self.host.pin_row(num_blocks, block_bytes)
    }

    fn fill(
        &mut self,
        target: &CudaBuffer,
        offset: usize,
        bytes: usize,
        write: &mut dyn FnMut(&mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let address = target.address(offset, bytes)?;
        let (staging, copies) = self.prepare(bytes)?;
        write(&mut staging.bytes_mut()[..bytes])?;
        // SAFETY: the range exists.
        unsafe { staging.bring_up(copies, address, bytes) }
    }

    fn land(
        &mut self,
        target: &CudaBuffer,
        layout: &KvLayout,
        blocks: &[LandingBlock<'_, CudaHostBuffer>],
    ) -> Result<Landing<CudaEvent>> {
        self.copies.bind()?;
        let block_bytes = layout.block_bytes();
        let runs = runs(target, blocks, block_bytes)?;
        Landing::queue(layout, MAX_LANDING_EVENTS, |first, end| {
            let bytes = layout.layer_bytes(first, end);
            // SAFETY: all blocks exist, and nobody touches those of the host before `finish` has returned.
            runs.iter().try_for_each(|run| unsafe { self.copies.queue_run(run, bytes.clone(), block_bytes) })?;
            self.copies.record()
        })
    }

    fn finish(&mut self) -> Result<()> {
        self.copies.synchronize()
    }

    fn show(
        &mut self,
        source: &CudaBuffer,
        offset: usize,
        bytes: usize,
        read: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let address = source.address(offset, bytes)?;
        let (staging, copies) = self.prepare(bytes)?;
        // SAFETY: the range exists.
        unsafe { staging.bring_down(copies, address, bytes) }?;
        read(&staging.bytes()[..bytes])
    }
}
