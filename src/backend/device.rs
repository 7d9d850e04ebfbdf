//! What every device has: memory, streams, events and copies that complete later.
//!
//! The trait is CUDA-shaped on purpose. Work on one stream runs in order; between streams only events order it. Nothing
//! here hands out a pointer to device memory: the host sees results by downloading them into a [`HostBuffer`] and
//! synchronising with an event recorded behind the copy.
//!
//! [`HostBuffer`]: Device::HostBuffer

use std::ops::Range;

use super::{DType, Transfer};
use crate::telemetry::Degradations;
use crate::{Result, invalid};

/// What a stream is for. Devices may run copies beside compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamKind {
    /// Kernels, and the uploads and downloads of a step.
    Compute,
    /// Block copies between tiers.
    Copy,
}

/// Memory, ordering and copies of one device.
pub trait Device: Send + 'static {
    /// Device memory; a cheap handle, freed with the last clone.
    type Buffer: Clone + Send + Sync + 'static;
    /// Host memory that copies can reach (pinned, on a GPU). Its bytes must not be touched while a copy is in flight.
    type HostBuffer: AsRef<[u8]> + AsMut<[u8]> + Send + 'static;
    /// An ordered queue of work.
    type Stream: Send + 'static;
    /// A point in a stream.
    type Event: Send + 'static;
    /// One I/O thread's way to and from device memory.
    type Transfer: Transfer<Buffer = Self::Buffer, HostBuffer = Self::HostBuffer, Event = Self::Event>;

    /// Where it is said what the device, and who works with it, go on without.
    fn degradations(&self) -> &Degradations;

    /// `bytes` of zeroed device memory.
    fn allocate(&self, bytes: usize) -> Result<Self::Buffer>;

    /// `bytes` of zeroed host memory.
    fn allocate_host(&self, bytes: usize) -> Result<Self::HostBuffer>;

    /// Bytes of device memory that can still be allocated; `None` where it is the host's.
    fn free_bytes(&self) -> Result<Option<usize>> {
        Ok(None)
    }

    /// A way to device memory for a thread of its own.
    fn create_transfer(&self) -> Result<Self::Transfer>;

    /// A new stream.
    fn create_stream(&self, kind: StreamKind) -> Result<Self::Stream>;

    /// Copies `range` of `source` to the same offsets of `target`.
    fn upload(
        &self,
        stream: &Self::Stream,
        source: &Self::HostBuffer,
        target: &Self::Buffer,
        range: Range<usize>,
    ) -> Result<()>;

    /// Copies the bytes of `source` to `target`, beginning at `target_offset`.
    fn download(
        &self,
        stream: &Self::Stream,
        source: &Tensor<Self::Buffer>,
        target: &mut Self::HostBuffer,
        target_offset: usize,
    ) -> Result<()>;

    /// Copies one run of bytes between or within buffers; the ranges must not overlap.
    fn copy(&self, stream: &Self::Stream, copy: &BufferCopy<'_, Self::Buffer>) -> Result<()>;

    /// Marks the point up to which `stream` has been given work.
    fn record(&self, stream: &Self::Stream) -> Result<Self::Event>;

    /// Lets later work on `stream` begin only after `event`.
    fn wait(&self, stream: &Self::Stream, event: &Self::Event) -> Result<()>;

    /// Whether everything before `event` is done.
    fn is_complete(&self, event: &Self::Event) -> Result<bool>;

    /// Returns when everything before `event` is done, with the error of what failed there.
    fn synchronize(&self, event: &Self::Event) -> Result<()>;

    /// The same where work before `event` waits for copies of other threads. An error when it takes longer than they ever
    /// do: copies can stand still.
    fn synchronize_landed(&self, event: &Self::Event) -> Result<()> {
        self.synchronize(event)
    }

    /// An error when the device has failed, so that nothing it holds is sure any more.
    fn check(&self) -> Result<()> {
        Ok(())
    }

    /// Whether it stands still, so that giving back its memory may have no end.
    fn is_stalled(&self) -> bool {
        false
    }
}

/// A copy of `bytes` from one offset to another; a KV block, usually.
#[derive(Debug, Clone, Copy)]
pub struct BufferCopy<'a, B> {
    /// Where from.
    pub source: &'a B,
    /// Byte offset there.
    pub source_offset: usize,
    /// Where to.
    pub target: &'a B,
    /// Byte offset there.
    pub target_offset: usize,
    /// How many bytes.
    pub bytes: usize,
}

/// A row-major matrix `[rows, columns]` somewhere in a buffer.
#[derive(Debug, Clone)]
pub struct Tensor<B> {
    buffer: B,
    offset_bytes: usize,
    rows: usize,
    columns: usize,
    dtype: DType,
}

impl<B: Clone> Tensor<B> {
    /// Describes a matrix that begins `offset_bytes` into `buffer`.
    pub fn new(buffer: B, offset_bytes: usize, rows: usize, columns: usize, dtype: DType) -> Self {
        Self { buffer, offset_bytes, rows, columns, dtype }
    }

    /// The first `rows` rows.
    pub fn first_rows(&self, rows: usize) -> Self {
        assert!(rows <= self.rows, "asked for {rows} rows of {}", self.rows);
        Self { rows, ..self.clone() }
    }

    /// The rows behind the first `row` ones.
    pub fn rows_from(&self, row: usize) -> Self {
        assert!(row <= self.rows, "asked for the rows behind {row} of {}", self.rows);
        let offset_bytes = self.offset_bytes + row * self.row_bytes();
        Self { offset_bytes, rows: self.rows - row, ..self.clone() }
    }

    /// Row `row` alone.
    pub fn row(&self, row: usize) -> Self {
        assert!(row < self.rows, "asked for row {row} of {}", self.rows);
        let offset_bytes = self.offset_bytes + row * self.row_bytes();
        Self { offset_bytes, rows: 1, ..self.clone() }
    }

    /// The memory it lies in.
    pub fn buffer(&self) -> &B {
        &self.buffer
    }

    /// Where in the buffer it begins.
    pub fn offset_bytes(&self) -> usize {
        self.offset_bytes
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Numbers in a row.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Element type; never a quantised one.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Bytes of all rows.
    pub fn num_bytes(&self) -> usize {
        self.rows * self.row_bytes()
    }

    /// An error that names it `what` unless it has this shape and type.
    pub(super) fn expect(&self, what: &str, rows: usize, columns: usize, dtype: DType) -> Result<()> {
        if (self.rows, self.columns, self.dtype) == (rows, columns, dtype) {
            return Ok(());
        }
        let Self { rows: found_rows, columns: found_columns, dtype: found, .. } = *self;
        Err(invalid!("{what} is [{found_rows}, {found_columns}] {found}, wanted [{rows}, {columns}] {dtype}"))
    }

    fn row_bytes(&self) -> usize {
        self.columns * self.dtype.block_bytes()
    }
}
