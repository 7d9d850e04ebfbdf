//! Brings weights to the device through two pinned buffers: one is filled while the other is copied.

#![allow(unsafe_code)]

use std::sync::Arc;

use cudarc::driver::result;

use super::driver::driver_error;
use super::memory::{CudaBuffer, CudaHostBuffer, HostAllocator};
use super::stream::{CudaEvent, CudaStream, EventPool};
use crate::Result;

/// Bytes of one staging buffer.
const STAGING_BYTES: usize = 4 << 20;

/// The fewest, where the system page-locks little.
const MIN_STAGING_BYTES: usize = 64 << 10;

/// The staging buffers and the stream they are emptied on.
pub(super) struct Uploader {
    stream: CudaStream,
    events: Arc<EventPool>,
    slots: [Slot; 2],
    /// Bytes of each.
    slot_bytes: usize,
    next: usize,
}

struct Slot {
    host: CudaHostBuffer,
    /// The end of its last copy.
    copied: Option<CudaEvent>,
}

impl Uploader {
    pub(super) fn new(host: &HostAllocator, events: &Arc<EventPool>) -> Result<Self> {
        let slot = || -> Result<Slot> {
            let host = host.allocate_up_to(STAGING_BYTES, MIN_STAGING_BYTES)?;
            Ok(Slot { host, copied: None })
        };
        let stream = CudaStream::new(host.context())?;
        let slots = [slot()?, slot()?];
        let slot_bytes = slots[0].host.as_ref().len().min(slots[1].host.as_ref().len());
        Ok(Self { stream, events: Arc::clone(events), slots, slot_bytes, next: 0 })
    }

    /// Writes `num_rows` rows of `row_bytes` into `target`, beginning at its byte 0, and waits until they are there.
    /// `fill(row, out)` writes one row.
    pub(super) fn upload_rows(
        &mut self,
        target: &CudaBuffer,
        num_rows: usize,
        row_bytes: usize,
        mut fill: impl FnMut(usize, &mut [u8]),
    ) -> Result<()> {
        let slot_bytes = self.slot_bytes;
        if row_bytes > slot_bytes {
            let mut row = vec![0; row_bytes];
            for index in 0..num_rows {
                fill(index, &mut row);
                for (part, bytes) in row.chunks(slot_bytes).enumerate() {
                    let offset = index * row_bytes + part * slot_bytes;
                    self.upload_part(target, offset, bytes.len(), |out| out.copy_from_slice(bytes))?;
                }
            }
            return self.finish();
        }
        let rows_per_part = slot_bytes / row_bytes.max(1);
        for first in (0..num_rows).step_by(rows_per_part) {
            let rows = first..num_rows.min(first + rows_per_part);
            self.upload_part(target, first * row_bytes, rows.len() * row_bytes, |out| {
                for (row, out) in rows.clone().zip(out.chunks_exact_mut(row_bytes)) {
                    fill(row, out);
                }
            })?;
        }
        self.finish()
    }

    fn upload_part(
        &mut self,
        target: &CudaBuffer,
        offset: usize,
        len: usize,
        fill: impl FnOnce(&mut [u8]),
    ) -> Result<()> {
        let error = driver_error("upload weights");
        let slot = &mut self.slots[self.next];
        self.next = 1 - self.next;
        if let Some(copied) = slot.copied.take() {
            copied.get().synchronize().map_err(&error)?;
        }
        let bytes = &mut slot.host.as_mut()[..len];
        fill(bytes);
        let address = target.address(offset, len)?;
        self.stream.get().context().bind_to_thread().map_err(&error)?;
        // SAFETY: both ranges exist, and the slot is not touched again before its event.
        unsafe { result::memcpy_htod_async(address, bytes, self.stream.get().cu_stream()) }.map_err(&error)?;
        slot.copied = Some(CudaEvent::record(&self.events, &self.stream)?);
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        for slot in &mut self.slots {
            if let Some(copied) = slot.copied.take() {
                copied.get().synchronize().map_err(driver_error("upload weights"))?;
            }
        }
        Ok(())
    }
}
