//! Device memory and pinned host memory.

#![allow(unsafe_code)]

use std::slice;
use std::sync::Arc;

use cudarc::driver::{CudaContext, result, sys};

use super::driver::driver_error;
use crate::backend::Tensor;
use crate::{Result, invalid};

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
        self.context.record_err(self.context.synchronize());
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
        let address = unsafe { result::malloc_sync(bytes.max(1)) }.map_err(&error)?;
        let buffer = Self(Arc::new(Allocation { context: Arc::clone(context), address, bytes }));
        // SAFETY: the range was just allocated.
        unsafe { result::memset_d8_sync(address, 0, bytes.max(1)) }.map_err(&error)?;
        // Our streams do not wait for the default stream.
        context.synchronize().map_err(&error)?;
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

/// Where a tensor begins; all of it lies in its buffer.
pub(super) fn address(tensor: &Tensor<CudaBuffer>) -> Result<sys::CUdeviceptr> {
    tensor.buffer().address(tensor.offset_bytes(), tensor.num_bytes())
}

/// Page-locked memory of the host, cached by the processor: results are read from it.
pub struct CudaHostBuffer {
    start: *mut u8,
    bytes: usize,
    /// What it is a part of.
    _pinned: Arc<Pinned>,
}

// SAFETY: it is plain memory with one owner.
unsafe impl Send for CudaHostBuffer {}

/// What was page-locked at once.
struct Pinned {
    context: Arc<CudaContext>,
    start: *mut u8,
}

// SAFETY: whoever holds one touches no byte through it.
unsafe impl Send for Pinned {}
// SAFETY: as for `Send`.
unsafe impl Sync for Pinned {}

impl CudaHostBuffer {
    /// Zeroed memory.
    pub(super) fn allocate(context: &Arc<CudaContext>, bytes: usize) -> Result<Self> {
        let pinned = Arc::new(Pinned::allocate(context, bytes)?);
        Ok(Self { start: pinned.start, bytes, _pinned: pinned })
    }

    /// `count` buffers of so many bytes, one behind the other.
    pub(super) fn allocate_row(context: &Arc<CudaContext>, count: usize, bytes: usize) -> Result<Vec<Self>> {
        let total = count.checked_mul(bytes).ok_or_else(|| invalid!("{count} host blocks of {bytes} bytes"))?;
        let pinned = Arc::new(Pinned::allocate(context, total)?);
        // SAFETY: so many bytes were allocated.
        let part = |at: usize| unsafe { pinned.start.add(at * bytes) };
        Ok((0..count).map(|at| Self { start: part(at), bytes, _pinned: Arc::clone(&pinned) }).collect())
    }
}

impl Pinned {
    fn allocate(context: &Arc<CudaContext>, bytes: usize) -> Result<Self> {
        let action = format!("get {bytes} bytes of pinned host memory");
        let error = driver_error(&action);
        context.bind_to_thread().map_err(&error)?;
        // SAFETY: the memory is written before anybody reads it. Without flags it is not write-combined.
        let start = unsafe { result::malloc_host(bytes.max(1), 0) }.map_err(&error)?.cast::<u8>();
        // SAFETY: the range was just allocated.
        unsafe { start.write_bytes(0, bytes.max(1)) };
        Ok(Self { context: Arc::clone(context), start })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // A copy may still be queued.
        self.context.record_err(self.context.synchronize());
        // SAFETY: the memory came from `malloc_host`, and nothing is queued.
        self.context.record_err(unsafe { result::free_host(self.start.cast()) });
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
