//! The [`Device`] trait over the driver.

#![allow(unsafe_code)]

use std::ops::Range;

use cudarc::driver::result;

use super::backend::CudaBackend;
use super::driver::driver_error;
use super::memory::{CudaBuffer, CudaHostBuffer, address, free_bytes};
use super::stream::{CudaEvent, CudaStream};
use super::transfer::CudaTransfer;
use crate::backend::{BufferCopy, Device, StreamKind, Tensor};
use crate::telemetry::Degradations;
use crate::{Result, invalid};

impl Device for CudaBackend {
    type Buffer = CudaBuffer;
    type HostBuffer = CudaHostBuffer;
    type Stream = CudaStream;
    type Event = CudaEvent;
    type Transfer = CudaTransfer;

    fn degradations(&self) -> &Degradations {
        self.host().degradations()
    }

    fn allocate(&self, bytes: usize) -> Result<CudaBuffer> {
        CudaBuffer::allocate(self.context(), bytes)
    }

    fn allocate_host(&self, bytes: usize) -> Result<CudaHostBuffer> {
        self.host().allocate(bytes)
    }

    fn create_transfer(&self) -> Result<CudaTransfer> {
        CudaTransfer::new(self.host(), self.events(), self.watch())
    }

    fn free_bytes(&self) -> Result<Option<usize>> {
        self.bind()?;
        free_bytes().map(|(free, _)| Some(free)).map_err(driver_error("ask for free memory"))
    }

    fn create_stream(&self, _kind: StreamKind) -> Result<CudaStream> {
        CudaStream::new(self.context())
    }

    fn upload(
        &self,
        stream: &CudaStream,
        source: &CudaHostBuffer,
        target: &CudaBuffer,
        range: Range<usize>,
    ) -> Result<()> {
        let bytes = host_range(source.as_ref().len(), &range).map(|range| &source.as_ref()[range])?;
        let target = target.address(range.start, bytes.len())?;
        self.bind()?;
        // SAFETY: both ranges exist, and the caller leaves the host side alone until the copy is done.
        unsafe { result::memcpy_htod_async(target, bytes, stream.get().cu_stream()) }.map_err(driver_error("upload"))
    }

    fn download(
        &self,
        stream: &CudaStream,
        source: &Tensor<CudaBuffer>,
        target: &mut CudaHostBuffer,
        target_offset: usize,
    ) -> Result<()> {
        let range = target_offset..target_offset.saturating_add(source.num_bytes());
        let range = host_range(target.as_ref().len(), &range)?;
        let source = address(source)?;
        self.bind()?;
        // SAFETY: both ranges exist, and the caller leaves the host side alone until the copy is done.
        unsafe { result::memcpy_dtoh_async(&mut target.as_mut()[range], source, stream.get().cu_stream()) }
            .map_err(driver_error("download"))
    }

    fn copy(&self, stream: &CudaStream, copy: &BufferCopy<'_, CudaBuffer>) -> Result<()> {
        let source = copy.source.address(copy.source_offset, copy.bytes)?;
        let target = copy.target.address(copy.target_offset, copy.bytes)?;
        self.bind()?;
        // SAFETY: both ranges exist; the caller promises that they do not overlap.
        unsafe { result::memcpy_dtod_async(target, source, copy.bytes, stream.get().cu_stream()) }
            .map_err(driver_error("copy on the device"))
    }

    fn record(&self, stream: &CudaStream) -> Result<CudaEvent> {
        CudaEvent::record(self.events(), stream)
    }

    fn wait(&self, stream: &CudaStream, event: &CudaEvent) -> Result<()> {
        stream.get().wait(event.get()).map_err(driver_error("wait for an event on a stream"))
    }

    fn is_complete(&self, event: &CudaEvent) -> Result<bool> {
        self.bind()?;
        event.get().try_is_complete().map_err(driver_error("ask for an event"))
    }

    fn synchronize(&self, event: &CudaEvent) -> Result<()> {
        event.get().synchronize().map_err(driver_error("compute"))
    }

    fn synchronize_landed(&self, event: &CudaEvent) -> Result<()> {
        self.bind()?;
        self.watch().wait("compute behind copies", || event.get().try_is_complete())
    }

    /// The driver answers every call with what the device failed with, this cheap one too.
    fn check(&self) -> Result<()> {
        self.watch().check()?;
        self.free_bytes().map(drop)
    }

    fn is_stalled(&self) -> bool {
        self.watch().has_stalled()
    }
}

fn host_range(len: usize, range: &Range<usize>) -> Result<Range<usize>> {
    match range.start <= range.end && range.end <= len {
        true => Ok(range.clone()),
        false => Err(invalid!("bytes {range:?} lie outside a host buffer of {len}")),
    }
}
