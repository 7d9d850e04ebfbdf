//! Transfers of CUDA: one stream per thread, so that the copy engine works beside kernels. Blocks that land layer by layer
//! come from pinned memory as they lie there, all others go through one pinned buffer.

#![allow(unsafe_code)]

use std::ops::Range;
use std::ptr;
use std::sync::Arc;

use cudarc::driver::{CudaContext, result, sys};

use super::driver::driver_error;
use super::memory::{CudaBuffer, CudaHostBuffer};
use super::stream::{CudaEvent, CudaStream, EventPool};
use super::watch::CopyWatch;
use crate::backend::{KvLayout, Landing, LandingBlock, Transfer};
use crate::{Result, invalid};

/// Events of blocks that land layer by layer: each costs calls of the driver for every run of blocks. A step waits an
/// eighth of a copy's time at the least, which is little beside the rest.
const MAX_LANDING_EVENTS: usize = 8;

/// One thread's way to the device. Its buffer grows to the largest run and stays.
pub struct CudaTransfer {
    // Before the context it came from.
    staging: Option<CudaHostBuffer>,
    stream: CudaStream,
    events: Arc<EventPool>,
    watch: Arc<CopyWatch>,
    context: Arc<CudaContext>,
}

/// Blocks that lie one behind the other on both sides.
struct Run {
    source: *const u8,
    target: sys::CUdeviceptr,
    num_blocks: usize,
}

impl CudaTransfer {
    pub(super) fn new(context: &Arc<CudaContext>, events: &Arc<EventPool>, watch: &Arc<CopyWatch>) -> Result<Self> {
        let (events, watch, context) = (Arc::clone(events), Arc::clone(watch), Arc::clone(context));
        Ok(Self { staging: None, stream: CudaStream::new(&context)?, events, watch, context })
    }

    /// Queues a copy of some bytes of each block of a run.
    fn queue(&self, run: &Run, bytes: Range<usize>, block_bytes: usize) -> Result<()> {
        let copy = sys::CUDA_MEMCPY2D {
            srcXInBytes: bytes.start,
            srcY: 0,
            srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_HOST,
            srcHost: run.source.cast(),
            srcDevice: 0,
            srcArray: ptr::null_mut(),
            srcPitch: block_bytes,
            dstXInBytes: bytes.start,
            dstY: 0,
            dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
            dstHost: ptr::null_mut(),
            dstDevice: run.target,
            dstArray: ptr::null_mut(),
            dstPitch: block_bytes,
            WidthInBytes: bytes.len(),
            Height: run.num_blocks,
        };
        // SAFETY: all blocks of the run exist on both sides, and nobody touches those of the host before `finish` has
        // returned.
        unsafe { sys::cuMemcpy2DAsync_v2(&copy, self.stream.get().cu_stream()) }
            .result()
            .map_err(driver_error("swap blocks in"))
    }

    /// The first `bytes` of the buffer, which is made at first use: most starts never move a block.
    fn reserve(&mut self, bytes: usize) -> Result<()> {
        self.bind()?;
        if self.staging.as_ref().is_none_or(|staging| staging.as_ref().len() < bytes) {
            self.staging = None;
            self.staging = Some(CudaHostBuffer::allocate(&self.context, bytes)?);
        }
        Ok(())
    }

    /// Makes the device the calling thread's. A copy that stands still may yet read the pinned buffer.
    fn bind(&self) -> Result<()> {
        self.watch.check()?;
        self.context.bind_to_thread().map_err(driver_error("use the device"))
    }

    fn synchronize(&self) -> Result<()> {
        self.watch.wait("copy between tiers", || self.stream.is_done())
    }
}

/// The blocks in runs; those of one run follow each other.
fn runs(target: &CudaBuffer, blocks: &[LandingBlock<'_, CudaHostBuffer>], block_bytes: usize) -> Result<Vec<Run>> {
    let mut runs: Vec<Run> = Vec::new();
    for LandingBlock { source, target_offset } in blocks {
        let bytes = source.as_ref();
        if bytes.len() != block_bytes {
            return Err(invalid!("a host block has {} bytes, a block of the device {block_bytes}", bytes.len()));
        }
        let address = target.address(*target_offset, block_bytes)?;
        let follows = |run: &&mut Run| {
            let num_bytes = run.num_blocks * block_bytes;
            run.source.wrapping_add(num_bytes) == bytes.as_ptr() && run.target + num_bytes as u64 == address
        };
        match runs.last_mut().filter(follows) {
            Some(run) => run.num_blocks += 1,
            None => runs.push(Run { source: bytes.as_ptr(), target: address, num_blocks: 1 }),
        }
    }
    Ok(runs)
}

impl Transfer for CudaTransfer {
    type Buffer = CudaBuffer;
    type HostBuffer = CudaHostBuffer;
    type Event = CudaEvent;

    fn fill(
        &mut self,
        target: &CudaBuffer,
        offset: usize,
        bytes: usize,
        write: &mut dyn FnMut(&mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let address = target.address(offset, bytes)?;
        self.reserve(bytes)?;
        let staging = self.staging.as_mut().map(|staging| &mut staging.as_mut()[..bytes]).unwrap_or_default();
        write(staging)?;
        // SAFETY: both ranges exist, and nobody touches the host side until the stream is done, below.
        unsafe { result::memcpy_htod_async(address, staging, self.stream.get().cu_stream()) }
            .map_err(driver_error("swap a block in"))?;
        self.synchronize()
    }

    fn land(
        &mut self,
        target: &CudaBuffer,
        layout: &KvLayout,
        blocks: &[LandingBlock<'_, CudaHostBuffer>],
    ) -> Result<Landing<CudaEvent>> {
        self.bind()?;
        let block_bytes = layout.block_bytes();
        let runs = runs(target, blocks, block_bytes)?;
        Landing::queue(layout, MAX_LANDING_EVENTS, |first, end| {
            runs.iter().try_for_each(|run| self.queue(run, layout.layer_bytes(first, end), block_bytes))?;
            CudaEvent::record(&self.events, &self.stream)
        })
    }

    fn finish(&mut self) -> Result<()> {
        self.synchronize()
    }

    fn show(
        &mut self,
        source: &CudaBuffer,
        offset: usize,
        bytes: usize,
        read: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let address = source.address(offset, bytes)?;
        self.reserve(bytes)?;
        let stream = self.stream.get().cu_stream();
        let staging = self.staging.as_mut().map(|staging| &mut staging.as_mut()[..bytes]).unwrap_or_default();
        // SAFETY: as for `fill`.
        unsafe { result::memcpy_dtoh_async(staging, address, stream) }.map_err(driver_error("swap a block out"))?;
        self.synchronize()?;
        read(self.staging.as_ref().map(|staging| &staging.as_ref()[..bytes]).unwrap_or_default())
    }
}
