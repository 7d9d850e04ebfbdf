//! Transfers of CUDA: through one pinned buffer and one stream per thread, so that the copy engine works beside kernels.

#![allow(unsafe_code)]

use std::sync::Arc;

use cudarc::driver::{CudaContext, result};

use super::driver::driver_error;
use super::memory::{CudaBuffer, CudaHostBuffer};
use super::stream::CudaStream;
use crate::Result;
use crate::backend::Transfer;

/// One thread's way to the device. The pinned buffer grows to the largest run and stays.
pub struct CudaTransfer {
    // Before the context it came from.
    staging: Option<CudaHostBuffer>,
    stream: CudaStream,
    context: Arc<CudaContext>,
}

impl CudaTransfer {
    pub(super) fn new(context: &Arc<CudaContext>) -> Result<Self> {
        Ok(Self { staging: None, stream: CudaStream::new(context)?, context: Arc::clone(context) })
    }

    /// The first `bytes` of the pinned buffer, which is made at first use: most starts never move a block.
    fn reserve(&mut self, bytes: usize) -> Result<()> {
        self.context.bind_to_thread().map_err(driver_error("use the device"))?;
        if self.staging.as_ref().is_none_or(|staging| staging.as_ref().len() < bytes) {
            self.staging = None;
            self.staging = Some(CudaHostBuffer::allocate(&self.context, bytes)?);
        }
        Ok(())
    }

    fn synchronize(&self) -> Result<()> {
        self.stream.get().synchronize().map_err(driver_error("copy between tiers"))
    }
}

impl Transfer for CudaTransfer {
    type Buffer = CudaBuffer;

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
