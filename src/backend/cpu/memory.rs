//! Memory of the CPU backend: anonymous mappings that stand for device and host buffers.

#![allow(unsafe_code)]

use std::ptr::NonNull;
use std::slice;
use std::sync::Arc;
use std::thread;

use bytemuck::Pod;
use memmap2::{Advice, MmapMut, MmapOptions};

use crate::backend::{DType, Tensor};
use crate::{Error, Result};

/// Buffers from this size on are made ready ahead of their use.
const MIN_READY_BYTES: usize = 64 << 20;

/// How much of a buffer is made ready: ten thousand tokens and more of a small model. The rest is when it is used.
const READY_BYTES: usize = 256 << 20;

/// Made ready at a time: a huge page.
const READY_STEP: usize = 2 << 20;

/// "Device" memory: zeroed, in huge pages where the system gives them. A clone is the same memory.
#[derive(Clone)]
pub struct CpuBuffer(Arc<Region>);

/// "Pinned" memory of the host side.
pub struct CpuHostBuffer(MmapMut);

struct Region {
    start: NonNull<u8>,
    len: usize,
    /// Owns what `start` points to; never dereferenced while the region lives.
    mapping: MmapMut,
}

// SAFETY: the region is plain memory, reachable only through the unsafe accessors below, whose callers order access.
unsafe impl Send for Region {}
// SAFETY: as for `Send`.
unsafe impl Sync for Region {}

/// Zeroed memory, in huge pages where the system gives them; at least one byte.
pub(super) fn map_memory(bytes: usize, what: &str) -> Result<MmapMut> {
    let io = |source| Error::Io { context: format!("cannot get {bytes} bytes of memory for {what}"), source };
    let mapping = MmapOptions::new().len(bytes.max(1)).map_anon().map_err(io)?;
    #[cfg(target_os = "linux")]
    // Only speed depends on it, and kernels without huge pages refuse.
    let _ = mapping.advise(Advice::HugePage);
    Ok(mapping)
}

impl CpuBuffer {
    pub(super) fn allocate(bytes: usize) -> Result<Self> {
        let mut mapping = map_memory(bytes, "a buffer")?;
        let start = NonNull::new(mapping.as_mut_ptr()).expect("a mapping is never at address zero");
        let buffer = Self(Arc::new(Region { start, len: bytes, mapping }));
        #[cfg(target_os = "linux")]
        buffer.make_ready();
        Ok(buffer)
    }

    /// Has the system find the first pages of a large buffer before they are used, without changing what they hold. On
    /// virtual machines a page that is touched for the first time can cost as much as computing what goes there, or ten
    /// times reading it from a file.
    #[cfg(target_os = "linux")]
    fn make_ready(&self) {
        if self.len() < MIN_READY_BYTES {
            return;
        }
        let region = Arc::clone(&self.0);
        let run = move || {
            // SAFETY: takes numbers alone, and on Linux means the calling thread. What it does not do costs only speed.
            let _ = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 19) };
            for offset in (0..region.len.min(READY_BYTES)).step_by(READY_STEP) {
                let bytes = READY_STEP.min(region.len - offset);
                // Nothing is lost where the kernel is too old for it or has no room.
                if region.mapping.advise_range(Advice::PopulateWrite, offset, bytes).is_err() {
                    break;
                }
            }
        };
        // Without the thread pages come when they are used.
        let _ = thread::Builder::new().name("mneme-pages".into()).spawn(run);
    }

    /// Bytes `[offset, offset + len)`.
    ///
    /// # Safety
    /// Nobody writes them while the slice lives.
    pub(super) unsafe fn bytes(&self, offset: usize, len: usize) -> &[u8] {
        self.check(offset, len);
        // SAFETY: inside the region, and the caller promises that nobody writes.
        unsafe { slice::from_raw_parts(self.0.start.as_ptr().add(offset), len) }
    }

    /// Bytes `[offset, offset + len)`.
    ///
    /// # Safety
    /// Nobody else reads or writes them while the slice lives.
    #[allow(clippy::mut_from_ref)]
    pub(super) unsafe fn bytes_mut(&self, offset: usize, len: usize) -> &mut [u8] {
        self.check(offset, len);
        // SAFETY: inside the region, and the caller promises that nobody else looks.
        unsafe { slice::from_raw_parts_mut(self.0.start.as_ptr().add(offset), len) }
    }

    /// The first byte. What may be touched through it is for callers to agree on.
    pub(super) fn start(&self) -> *mut u8 {
        self.0.start.as_ptr()
    }

    pub(super) fn len(&self) -> usize {
        self.0.len
    }

    fn check(&self, offset: usize, len: usize) {
        let size = self.0.len;
        assert!(offset <= size && len <= size - offset, "bytes {offset}+{len} lie outside a buffer of {size}");
    }
}

/// The numbers of a tensor.
///
/// # Safety
/// Nobody writes them while the slice lives.
pub(super) unsafe fn numbers<T: Pod>(tensor: &Tensor<CpuBuffer>) -> &[T] {
    assert_eq!(
        size_of::<T>(),
        tensor.dtype().block_bytes(),
        "a tensor of {} is read as something else",
        tensor.dtype()
    );
    // SAFETY: the caller's promise.
    bytemuck::cast_slice(unsafe { tensor.buffer().bytes(tensor.offset_bytes(), tensor.num_bytes()) })
}

/// The numbers of a tensor, to write.
///
/// # Safety
/// Nobody else reads or writes them while the slice lives.
#[allow(clippy::mut_from_ref)]
pub(super) unsafe fn numbers_mut<T: Pod>(tensor: &Tensor<CpuBuffer>) -> &mut [T] {
    assert_eq!(
        size_of::<T>(),
        tensor.dtype().block_bytes(),
        "a tensor of {} is used as something else",
        tensor.dtype()
    );
    // SAFETY: the caller's promise.
    bytemuck::cast_slice_mut(unsafe { tensor.buffer().bytes_mut(tensor.offset_bytes(), tensor.num_bytes()) })
}

/// An f32 vector `[1, N]`.
pub(super) fn vector(values: &[f32]) -> Result<Tensor<CpuBuffer>> {
    let bytes: &[u8] = bytemuck::cast_slice(values);
    let buffer = CpuBuffer::allocate(bytes.len())?;
    // SAFETY: the buffer was just made; nobody else has it.
    unsafe { buffer.bytes_mut(0, bytes.len()) }.copy_from_slice(bytes);
    Ok(Tensor::new(buffer, 0, 1, values.len(), DType::F32))
}

impl CpuHostBuffer {
    pub(super) fn allocate(bytes: usize) -> Result<Self> {
        map_memory(bytes, "a host buffer").map(Self)
    }
}

impl AsRef<[u8]> for CpuHostBuffer {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl AsMut<[u8]> for CpuHostBuffer {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}
