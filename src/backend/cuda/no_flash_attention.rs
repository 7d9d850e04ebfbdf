//! What stands for `flash_attention.rs` in builds without the cargo feature `flash-attn`: an error that says how to get it.

use super::attention::Uncached;
use super::backend::CudaBackend;
use super::stream::CudaStream;
use crate::backend::{GpuInfo, StepBounds};
use crate::{Result, unsupported};

/// Nothing: there is none in this build.
pub(super) enum FlashAttention {}

impl FlashAttention {
    pub(super) fn open(_: &GpuInfo) -> Result<Self> {
        flash_attention_version().and_then(|version| Err(unsupported!("flash-attn {version} is not in this build")))
    }

    pub(super) fn reserve(&self, _: &StepBounds<'_>) -> Result<()> {
        match *self {}
    }

    pub(super) fn attend(&self, _: &CudaBackend, _: &CudaStream, _: &Uncached<'_>) -> Result<()> {
        match *self {}
    }
}

/// See [`flash_attention_version`](crate::backend::flash_attention_version).
pub(in crate::backend) fn flash_attention_version() -> Result<&'static str> {
    Err(unsupported!(
        "--prefill-attention flash-attn wants a program that was built with the cargo feature \"flash-attn\", and this one was \
         not: build it with cargo build --release --features flash-attn, which takes a CUDA toolkit (docs/gpu.md), or leave \
         --prefill-attention paged"
    ))
}
