//! The stream of one thread's copies between the host and the device, and waits for them that have an end.

#![allow(unsafe_code)]

use std::ops::Range;
use std::ptr;
use std::sync::Arc;

use cudarc::driver::{CudaContext, result, sys};

use super::driver::driver_error;
use super::memory::CudaHostBuffer;
use super::stream::{CudaEvent, CudaStream, EventPool};
use super::watch::CopyWatch;
use crate::Result;

/// The stream.
pub(super) struct CopyStream {
    stream: CudaStream,
    events: Arc<EventPool>,
    watch: Arc<CopyWatch>,
}

/// Blocks that lie one behind the other on both sides, in one allocation on each.
pub(super) struct Run<'a> {
    pub(super) first: &'a CudaHostBuffer,
    pub(super) target: sys::CUdeviceptr,
    pub(super) num_blocks: usize,
}

impl CopyStream {
    pub(super) fn new(context: &Arc<CudaContext>, events: &Arc<EventPool>, watch: &Arc<CopyWatch>) -> Result<Self> {
        let (events, watch) = (Arc::clone(events), Arc::clone(watch));
        Ok(Self { stream: CudaStream::new(context)?, events, watch })
    }

    /// Makes the device the calling thread's. A copy that stands still may yet touch page-locked memory.
    pub(super) fn bind(&self) -> Result<()> {
        self.watch.check()?;
        self.stream.get().context().bind_to_thread().map_err(driver_error("use the device"))
    }

    /// Queues a copy to the device.
    ///
    /// # Safety
    /// The bytes exist at `target`, and nobody changes `source` until the copy has been waited for.
    pub(super) unsafe fn queue_up(&self, source: &[u8], target: sys::CUdeviceptr) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { result::memcpy_htod_async(target, source, self.stream.get().cu_stream()) }
            .map_err(driver_error("swap a block in"))
    }

    /// Queues a copy to the host.
    ///
    /// # Safety
    /// The bytes exist at `source`, and nobody touches `target` until the copy has been waited for.
    pub(super) unsafe fn queue_down(&self, source: sys::CUdeviceptr, target: &mut [u8]) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { result::memcpy_dtoh_async(target, source, self.stream.get().cu_stream()) }
            .map_err(driver_error("swap a block out"))
    }

    /// Queues a copy of some bytes of each block of a run.
    ///
    /// # Safety
    /// All blocks exist on both sides, and nobody changes those of the host until the copy has been waited for.
    pub(super) unsafe fn queue_run(&self, run: &Run<'_>, bytes: Range<usize>, block_bytes: usize) -> Result<()> {
        let copy = sys::CUDA_MEMCPY2D {
            srcXInBytes: bytes.start,
            srcY: 0,
            srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_HOST,
            srcHost: run.first.as_ref().as_ptr().cast(),
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
        // SAFETY: the caller's promise.
        unsafe { sys::cuMemcpy2DAsync_v2(&copy, self.stream.get().cu_stream()) }
            .result()
            .map_err(driver_error("swap blocks in"))
    }

    /// The point up to which copies are queued.
    pub(super) fn record(&self) -> Result<CudaEvent> {
        CudaEvent::record(&self.events, &self.stream)
    }

    /// Returns when what is before `event` is there.
    pub(super) fn wait(&self, event: &CudaEvent) -> Result<()> {
        self.watch.wait("copy between tiers", || event.get().try_is_complete())
    }

    /// Returns when all is there.
    pub(super) fn synchronize(&self) -> Result<()> {
        self.watch.wait("copy between tiers", || self.stream.is_done())
    }
}
