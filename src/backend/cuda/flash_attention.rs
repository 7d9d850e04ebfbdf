//! Attention by candle-flash-attn of sequences that have no cached context: queries, keys and values are read where they lie,
//! and what comes of it is copied to where it is wanted.
//!
//! candle has a stream and memory of its own on the device. Its tensors over our memory are ours again before it could free
//! that, and events order the two streams. It follows no memory by events itself.

#![allow(unsafe_code)]

use std::cell::Cell;
use std::mem::{self, ManuallyDrop};
use std::ops::Range;
use std::sync::Arc;

use candle_core::cuda_backend::{CudaDType, CudaStorageSlice};
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, CudaDevice, CudaStorage, InplaceOp1, Layout, Storage};
use cudarc::driver::{self, CudaSlice, DevicePtr, DeviceRepr, result, sys};
use half::{bf16, f16};

use super::attention::Uncached;
use super::backend::{CudaBackend, CudaTensor};
use super::driver::driver_error;
use super::memory::address;
use super::stream::{CudaEvent, CudaStream};
use crate::backend::{DType, GpuInfo, StepBounds};
use crate::{Error, Result, invalid, unsupported};

/// What Cargo.toml names.
const VERSION: &str = "0.11.1";

/// Bytes at multiples of which rows and heads begin: the kernels load that many at once.
const ALIGNMENT: u64 = 16;

/// See [`flash_attention_version`](crate::backend::flash_attention_version).
pub(in crate::backend) fn flash_attention_version() -> Result<&'static str> {
    Ok(VERSION)
}

/// candle's device, on the context that is ours too.
pub(super) struct FlashAttention {
    device: CudaDevice,
    stream: CudaStream,
}

impl FlashAttention {
    pub(super) fn open(info: &GpuInfo) -> Result<Self> {
        let device = CudaDevice::new_with_stream(info.ordinal).map_err(candle_error("start on the device"))?;
        // SAFETY: its memory is used on its own stream alone. Ours is used there between two events.
        unsafe { device.disable_event_tracking() };
        let stream = CudaStream::of(device.cuda_stream());
        Ok(Self { device, stream })
    }

    /// Has the driver keep as much memory for candle as the largest step takes, so that none is taken from it later.
    pub(super) fn reserve(&self, bounds: &StepBounds<'_>) -> Result<()> {
        let StepBounds { max_tokens, num_heads, layout, .. } = *bounds;
        // The output, in 16 bits, and a sum for each head, in f32.
        let bytes = max_tokens * num_heads * (layout.head_dim() * 2 + 4);
        let action = format!("get {bytes} bytes of device memory for --prefill-attention flash-attn");
        let error = driver_error(&action);
        let stream = self.device.cuda_stream();
        if stream.context().has_async_alloc() {
            keep_freed_memory(&stream).map_err(&error)?;
        }
        // SAFETY: nobody reads it.
        unsafe { stream.alloc::<u8>(bytes) }.map(drop).map_err(error)
    }

    /// Queues the attention of one run: what `stream` is given afterwards finds its rows of the output written. Our kernels
    /// take no head sizes that candle's do not.
    pub(super) fn attend(&self, backend: &CudaBackend, stream: &CudaStream, work: &Uncached<'_>) -> Result<()> {
        self.follow(backend, stream, &self.stream)?;
        match backend.dtype() {
            DType::BF16 => self.attend_in::<bf16>(work)?,
            DType::F16 => self.attend_in::<f16>(work)?,
            other => return Err(unsupported!("flash-attn computes in bf16 or f16, not {other}")),
        }
        self.follow(backend, &self.stream, stream)
    }

    /// Has `follower` wait for all that `leader` was given.
    fn follow(&self, backend: &CudaBackend, leader: &CudaStream, follower: &CudaStream) -> Result<()> {
        let event = CudaEvent::record(backend.events(), leader)?;
        follower.get().wait(event.get()).map_err(driver_error("wait for an event on a stream"))
    }

    fn attend_in<T: CudaDType + DeviceRepr>(&self, work: &Uncached<'_>) -> Result<()> {
        let Uncached { qkv, out, shape, run, ref cu_seqlens } = *work;
        let (num_heads, num_kv_heads, head_dim) = (shape.num_heads, shape.num_kv_heads, shape.head_dim);
        if !address(qkv)?.is_multiple_of(ALIGNMENT) {
            return Err(invalid!("flash-attn reads rows that begin at a multiple of {ALIGNMENT} bytes"));
        }
        // Rows are counted from the step's first, so those before the run are described as well.
        let rows = Lent::new::<T>(self, qkv, (qkv.rows(), num_heads + 2 * num_kv_heads, head_dim))?;
        let cu_seqlens = Lent::new::<u32>(self, cu_seqlens, cu_seqlens.columns())?;
        let heads = |heads: Range<usize>| rows.tensor.narrow(0, 0, run.tokens.end)?.narrow(1, heads.start, heads.len());
        let attend = || {
            candle_flash_attn::flash_attn_varlen_alibi_windowed_softcap(
                &heads(0..num_heads)?,
                &heads(num_heads..num_heads + num_kv_heads)?,
                &heads(num_heads + num_kv_heads..num_heads + 2 * num_kv_heads)?,
                None,
                &cu_seqlens.tensor,
                &cu_seqlens.tensor,
                run.max_query_len,
                run.max_query_len,
                shape.scale,
                // Its window is what lies before a token.
                shape.window.filter(|window| *window <= run.max_query_len).map(|window| window.saturating_sub(1)),
                Some(0),
                // As its kernels have it for scores without a cap.
                shape.softcap.unwrap_or(0.0),
            )
        };
        let attended = attend().map_err(candle_error("attend"))?;
        self.copy::<T>(&attended, &run.tokens, out)
    }

    /// Copies token rows of candle's output to ours.
    fn copy<T: CudaDType + DeviceRepr>(
        &self,
        attended: &candle_core::Tensor,
        tokens: &Range<usize>,
        out: &CudaTensor,
    ) -> Result<()> {
        let (storage, _) = attended.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else {
            return Err(Error::Device("candle's attention is not on the device".into()));
        };
        let numbers = storage.as_cuda_slice::<T>().map_err(candle_error("find its output"))?;
        let row_bytes = out.columns() * size_of::<T>();
        let offset_bytes = tokens.start * row_bytes;
        let stream = self.device.cuda_stream();
        let (source, _guard) = numbers.device_ptr(&stream);
        let target = out.rows_from(tokens.start).first_rows(tokens.len());
        // SAFETY: both have the rows up to the end of `tokens`, and do not overlap. The copy is on candle's stream, where its
        // output was written and is freed later.
        let copied = unsafe {
            result::memcpy_dtod_async(
                address(&target)?,
                source + offset_bytes as u64,
                tokens.len() * row_bytes,
                stream.cu_stream(),
            )
        };
        copied.map_err(driver_error("copy the attention of prompts"))
    }
}

/// Has the device's pool, from which candle takes memory, keep what is given back to it.
fn keep_freed_memory(stream: &Arc<driver::CudaStream>) -> std::result::Result<(), driver::DriverError> {
    let mut bytes = u64::MAX;
    let threshold = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the context names its device, the driver the pool, and the attribute is a number of 64 bits.
    unsafe {
        let pool = result::device::get_default_mem_pool(stream.context().cu_device())?;
        result::mem_pool::set_attribute(pool, threshold, (&raw mut bytes).cast())
    }
}

/// A tensor of candle's over memory of ours.
struct Lent {
    tensor: ManuallyDrop<candle_core::Tensor>,
    /// What candle gets to free in its place.
    substitute: Cell<Option<CudaSlice<u8>>>,
}

impl Lent {
    /// `source` as numbers of type `T`, as many bytes each as its own, in rows of `shape`.
    fn new<T: CudaDType + DeviceRepr>(
        flash: &FlashAttention,
        source: &CudaTensor,
        shape: impl Into<candle_core::Shape>,
    ) -> Result<Self> {
        let (start, stream) = (address(source)?, flash.device.cuda_stream());
        // SAFETY: nobody reads it.
        let substitute = unsafe { stream.alloc::<u8>(1) }.map_err(driver_error("get device memory"))?;
        // SAFETY: so many bytes of the buffer lie there, and it outlives this, which gives them back.
        let slice = unsafe { stream.upgrade_device_ptr::<T>(start, source.num_bytes() / size_of::<T>()) };
        let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(slice, flash.device.clone()));
        let tensor = candle_core::Tensor::from_storage(storage, shape, BackpropOp::none(), false);
        Ok(Self { tensor: ManuallyDrop::new(tensor), substitute: Cell::new(Some(substitute)) })
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        match self.tensor.inplace_op1(&GiveBack(&self.substitute)) {
            // SAFETY: it is dropped once, and has nothing any more but the substitute.
            Ok(()) => unsafe { ManuallyDrop::drop(&mut self.tensor) },
            // A tensor that is never dropped is better than memory of ours that is freed.
            Err(error) => tracing::error!(%error, "candle keeps a tensor over memory that is not its own"),
        }
    }
}

/// What takes our memory out of a tensor and leaves the substitute there.
struct GiveBack<'a>(&'a Cell<Option<CudaSlice<u8>>>);

impl InplaceOp1 for GiveBack<'_> {
    fn name(&self) -> &'static str {
        "give-back"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> candle_core::Result<()> {
        candle_core::bail!("only device memory is lent")
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, _: &Layout) -> candle_core::Result<()> {
        let Some(substitute) = self.0.take() else { candle_core::bail!("it was given back before") };
        let _address = match mem::replace(&mut storage.slice, CudaStorageSlice::U8(substitute)) {
            CudaStorageSlice::BF16(slice) => slice.leak(),
            CudaStorageSlice::F16(slice) => slice.leak(),
            CudaStorageSlice::U32(slice) => slice.leak(),
            other => {
                mem::forget(other);
                candle_core::bail!("memory of this type is never lent")
            }
        };
        Ok(())
    }
}

/// Turns an error of candle into ours; `action` is what it was doing.
fn candle_error(action: &'static str) -> impl Fn(candle_core::Error) -> Error {
    move |error| Error::Device(format!("candle-flash-attn cannot {action}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// KV blocks are known by it.
    #[test]
    fn the_version_is_the_one_that_was_built() {
        let manifest = include_str!("../../../Cargo.toml");
        assert!(manifest.contains(&format!("candle-flash-attn = {{ version = \"={VERSION}\"")));
    }
}
