//! Device memory, and the host's memory that copies reach.

#![allow(unsafe_code)]

use std::alloc::{self, Layout};
use std::slice;
use std::sync::Arc;

use cudarc::driver::{CudaContext, DriverError, result, sys};

use super::driver::driver_error;
use super::graphs::wait_for_all;
use crate::backend::Tensor;
use crate::telemetry::{Degradation, Degradations};
use crate::{Error, Result, invalid};

/// Ordinary host memory begins at multiples of it.
const PAGE_BYTES: usize = 4096;

/// Memory of the device. A clone is the same memory; the last one frees it.
#[derive(Clone)]
pub struct CudaBuffer(Arc<Allocation>);

struct Allocation {
    context: Arc<CudaContext>,
    address: sys::CUdeviceptr,
    bytes: usize,
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // Work that uses the memory may still be queued on any stream.
        self.context.record_err(wait_for_all(&self.context));
        // SAFETY: nobody else has the address any more, and nothing is queued.
        self.context.record_err(unsafe { result::free_sync(self.address) });
    }
}

impl CudaBuffer {
    /// Zeroed memory.
    pub(super) fn allocate(context: &Arc<CudaContext>, bytes: usize) -> Result<Self> {
        let action = format!("get {bytes} bytes of device memory");
        let error = driver_error(&action);
        context.bind_to_thread().map_err(&error)?;
        // SAFETY: the memory is written before anybody gets to see it.
        let address = unsafe { result::malloc_sync(bytes.max(1)) }.map_err(|problem| exhausted(problem, &error))?;
        let buffer = Self(Arc::new(Allocation { context: Arc::clone(context), address, bytes }));
        // SAFETY: the range was just allocated.
        unsafe { result::memset_d8_sync(address, 0, bytes.max(1)) }.map_err(&error)?;
        // Our streams do not wait for the default stream.
        wait_for_all(context).map_err(&error)?;
        Ok(buffer)
    }

    pub(super) fn len(&self) -> usize {
        self.0.bytes
    }

    /// The address of byte `offset`; the bytes `[offset, offset + len)` exist.
    pub(super) fn address(&self, offset: usize, len: usize) -> Result<sys::CUdeviceptr> {
        let size = self.0.bytes;
        if offset > size || len > size - offset {
            return Err(invalid!("bytes {offset}+{len} lie outside a buffer of {size}"));
        }
        Ok(self.0.address + offset as u64)
    }
}

/// Bytes of device memory that are free, and all of them. The calling thread uses the device.
pub(super) fn free_bytes() -> std::result::Result<(usize, usize), DriverError> {
    result::mem_get_info()
}

/// What is said about an allocation that failed: with what there is, and what to do, where there was not enough.
fn exhausted(problem: DriverError, error: impl Fn(DriverError) -> Error) -> Error {
    let is_short = problem.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY;
    let message = error(problem);
    match free_bytes() {
        Ok((free, total)) if is_short => Error::Exhausted(format!(
            "{message}: {free} of {total} are free; give a smaller --kv-cache-memory-bytes or --max-num-batched-tokens, \
             or take a smaller model"
        )),
        _ => message,
    }
}

/// Where a tensor begins; all of it lies in its buffer.
pub(super) fn address(tensor: &Tensor<CudaBuffer>) -> Result<sys::CUdeviceptr> {
    tensor.buffer().address(tensor.offset_bytes(), tensor.num_bytes())
}

/// Memory of the host that copies can reach, cached by the processor: results are read from it. Page-locked, or where the
/// system gives no more of that, ordinary memory, which the driver copies through its own.
pub struct CudaHostBuffer {
    start: *mut u8,
    bytes: usize,
    /// What it is a part of.
    memory: Arc<HostMemory>,
}

// SAFETY: it is plain memory with one owner.
unsafe impl Send for CudaHostBuffer {}

/// What was allocated at once.
struct HostMemory {
    context: Arc<CudaContext>,
    start: *mut u8,
    bytes: usize,
    is_pinned: bool,
}

// SAFETY: whoever holds one touches no byte through it.
unsafe impl Send for HostMemory {}
// SAFETY: as for `Send`.
unsafe impl Sync for HostMemory {}

/// What gives out such memory, and says where it is not page-locked.
#[derive(Clone)]
pub(super) struct HostAllocator {
    context: Arc<CudaContext>,
    degradations: Degradations,
}

impl HostAllocator {
    pub(super) fn new(context: &Arc<CudaContext>, degradations: &Degradations) -> Self {
        Self { context: Arc::clone(context), degradations: degradations.clone() }
    }

    pub(super) fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    pub(super) fn degradations(&self) -> &Degradations {
        &self.degradations
    }

    /// Zeroed memory, page-locked if there is so much.
    pub(super) fn allocate(&self, bytes: usize) -> Result<CudaHostBuffer> {
        self.pin_one(bytes)?.map_or_else(|| self.allocate_pageable(bytes), Ok)
    }

    /// Zeroed ordinary memory, where there is no other.
    pub(super) fn allocate_pageable(&self, bytes: usize) -> Result<CudaHostBuffer> {
        HostMemory::allocate(&self.context, bytes).map(CudaHostBuffer::whole)
    }

    /// Zeroed page-locked memory, if there is so much.
    pub(super) fn pin_one(&self, bytes: usize) -> Result<Option<CudaHostBuffer>> {
        Ok(self.pin(bytes)?.map(CudaHostBuffer::whole))
    }

    /// Zeroed memory, page-locked if there is any of a size between `least` and `most`, the largest of its halves.
    pub(super) fn allocate_up_to(&self, most: usize, least: usize) -> Result<CudaHostBuffer> {
        let mut bytes = most;
        while bytes >= least {
            if let Some(pinned) = self.pin_one(bytes)? {
                return Ok(pinned);
            }
            bytes /= 2;
        }
        self.allocate_pageable(least)
    }

    /// Page-locked buffers of so many bytes, one behind the other: `count`, or half as many again and again down to an
    /// eighth, or `None`.
    pub(super) fn pin_row(&self, count: usize, bytes: usize) -> Result<Option<Vec<CudaHostBuffer>>> {
        for count in [count, count / 2, count / 4, count / 8].into_iter().filter(|count| *count > 0) {
            let total = count.checked_mul(bytes).ok_or_else(|| invalid!("{count} host blocks of {bytes} bytes"))?;
            if let Some(memory) = self.pin(total)? {
                return Ok(Some(CudaHostBuffer::parts(memory, count, bytes)));
            }
        }
        Ok(None)
    }

    /// Page-locked memory; `None` when the system gives no so much.
    fn pin(&self, bytes: usize) -> Result<Option<HostMemory>> {
        let memory = HostMemory::pin(&self.context, bytes)?;
        if memory.is_none() {
            let text = format!("the system page-locks no {bytes} bytes more (ulimit -l, or the memory of a container)");
            self.degradations.report(Degradation::PinnedMemory, text);
        }
        Ok(memory)
    }
}

impl CudaHostBuffer {
    /// Whether it begins `bytes` behind the beginning of `first`, in the same allocation.
    pub(super) fn is_behind(&self, first: &Self, bytes: usize) -> bool {
        Arc::ptr_eq(&self.memory, &first.memory) && first.start.wrapping_add(bytes) == self.start
    }

    fn whole(memory: HostMemory) -> Self {
        Self { start: memory.start, bytes: memory.bytes, memory: Arc::new(memory) }
    }

    fn parts(memory: HostMemory, count: usize, bytes: usize) -> Vec<Self> {
        let memory = Arc::new(memory);
        // SAFETY: so many bytes were allocated.
        let part = |at: usize| unsafe { memory.start.add(at * bytes) };
        (0..count).map(|at| Self { start: part(at), bytes, memory: Arc::clone(&memory) }).collect()
    }
}

impl HostMemory {
    /// Page-locked; `None` when the system gives no so much.
    fn pin(context: &Arc<CudaContext>, bytes: usize) -> Result<Option<Self>> {
        let action = format!("get {bytes} bytes of pinned host memory");
        let error = driver_error(&action);
        context.bind_to_thread().map_err(&error)?;
        // SAFETY: the memory is written before anybody reads it. Without flags it is not write-combined.
        let start = match unsafe { result::malloc_host(bytes.max(1), 0) } {
            Ok(start) => start.cast::<u8>(),
            Err(problem) if problem.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => return Ok(None),
            Err(problem) => return Err(error(problem)),
        };
        // SAFETY: the range was just allocated.
        unsafe { start.write_bytes(0, bytes.max(1)) };
        Ok(Some(Self { context: Arc::clone(context), start, bytes, is_pinned: true }))
    }

    /// Ordinary memory.
    fn allocate(context: &Arc<CudaContext>, bytes: usize) -> Result<Self> {
        let start = Self::layout(bytes).map(|layout| {
            // SAFETY: the layout has a size above zero.
            unsafe { alloc::alloc_zeroed(layout) }
        });
        match start {
            Some(start) if !start.is_null() => {
                Ok(Self { context: Arc::clone(context), start, bytes, is_pinned: false })
            }
            _ => Err(Error::Device(format!("cannot get {bytes} bytes of host memory"))),
        }
    }

    fn layout(bytes: usize) -> Option<Layout> {
        Layout::from_size_align(bytes.max(1), PAGE_BYTES).ok()
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        // A copy may still be queued.
        self.context.record_err(wait_for_all(&self.context));
        match Self::layout(self.bytes) {
            // SAFETY: the memory came from `malloc_host`, and nothing is queued.
            _ if self.is_pinned => self.context.record_err(unsafe { result::free_host(self.start.cast()) }),
            // SAFETY: it came from `alloc_zeroed` with this layout.
            Some(layout) => unsafe { alloc::dealloc(self.start, layout) },
            None => {}
        }
    }
}

impl AsRef<[u8]> for CudaHostBuffer {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the range is ours and written; the caller does not look while a copy is in flight.
        unsafe { slice::from_raw_parts(self.start, self.bytes) }
    }
}

impl AsMut<[u8]> for CudaHostBuffer {
    fn as_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `as_ref`.
        unsafe { slice::from_raw_parts_mut(self.start, self.bytes) }
    }
}
