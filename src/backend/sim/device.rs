//! Memory and streams of the double. Copies on a copy stream run when somebody waits for them.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use super::super::{BufferCopy, Device, StreamKind, Tensor};
use super::{SimBackend, SimTransfer};
use crate::Result;
use crate::telemetry::Degradations;

/// Memory of the double.
#[derive(Clone)]
pub struct SimBuffer(Arc<Mutex<Vec<u8>>>);

impl SimBuffer {
    pub(super) fn new(bytes: Vec<u8>) -> Self {
        Self(Arc::new(Mutex::new(bytes)))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        lock(&self.0)
    }
}

/// All memory that a double has given out, as long as somebody holds on to this.
#[derive(Clone, Default)]
pub struct SimMemory(Arc<Mutex<Vec<SimBuffer>>>);

impl SimMemory {
    /// Whether these bytes stand anywhere in it.
    pub fn contains(&self, bytes: &[u8]) -> bool {
        lock(&self.0).iter().any(|buffer| buffer.lock().windows(bytes.len()).any(|window| window == bytes))
    }

    /// Zeros, which it knows from now on.
    fn allocate(&self, bytes: usize) -> SimBuffer {
        let buffer = SimBuffer::new(vec![0; bytes]);
        lock(&self.0).push(buffer.clone());
        buffer
    }
}

pub(super) type SimTensor = Tensor<SimBuffer>;

/// A stream of the double.
pub struct SimStream {
    kind: StreamKind,
    queue: Arc<Mutex<CopyQueue>>,
}

/// A point in a [`SimStream`].
pub struct SimEvent {
    queue: Arc<Mutex<CopyQueue>>,
    after: u64,
}

#[derive(Default)]
struct CopyQueue {
    num_submitted: u64,
    num_done: u64,
    pending: VecDeque<PendingCopy>,
}

struct PendingCopy {
    source: SimBuffer,
    target: SimBuffer,
    source_range: Range<usize>,
    target_offset: usize,
}

impl SimStream {
    pub(super) fn new(kind: StreamKind) -> Self {
        Self { kind, queue: Arc::default() }
    }

    /// Queues the copy of bytes that are known already.
    pub(super) fn push(&self, source: Vec<u8>, target: &SimBuffer, target_offset: usize) {
        let (source_range, source) = (0..source.len(), SimBuffer::new(source));
        let mut queue = lock(&self.queue);
        queue.num_submitted += 1;
        queue.pending.push_back(PendingCopy { source, target: target.clone(), source_range, target_offset });
    }

    pub(super) fn record(&self) -> SimEvent {
        let after = lock(&self.queue).num_submitted;
        SimEvent { queue: Arc::clone(&self.queue), after }
    }

    /// Runs the oldest copy; `false` when there was none.
    pub(super) fn run_one(&self) -> bool {
        let mut queue = lock(&self.queue);
        let has_one = !queue.pending.is_empty();
        queue.run_one();
        has_one
    }
}

impl CopyQueue {
    fn run_one(&mut self) {
        if let Some(copy) = self.pending.pop_front() {
            let bytes = copy.source.lock()[copy.source_range].to_vec();
            copy.target.lock()[copy.target_offset..copy.target_offset + bytes.len()].copy_from_slice(&bytes);
            self.num_done += 1;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Device for SimBackend {
    type Buffer = SimBuffer;
    type HostBuffer = Vec<u8>;
    type Stream = SimStream;
    type Event = SimEvent;
    type Transfer = SimTransfer;

    fn degradations(&self) -> &Degradations {
        &self.degradations
    }

    fn allocate(&self, bytes: usize) -> Result<SimBuffer> {
        Ok(self.memory.allocate(bytes))
    }

    fn allocate_host(&self, bytes: usize) -> Result<Vec<u8>> {
        Ok(vec![0; bytes])
    }

    fn create_transfer(&self) -> Result<SimTransfer> {
        Ok(SimTransfer::new(self.delays.clone()))
    }

    fn create_stream(&self, kind: StreamKind) -> Result<SimStream> {
        Ok(SimStream::new(kind))
    }

    fn upload(&self, _stream: &SimStream, source: &Vec<u8>, target: &SimBuffer, range: Range<usize>) -> Result<()> {
        target.lock()[range.clone()].copy_from_slice(&source[range]);
        Ok(())
    }

    fn download(
        &self,
        _stream: &SimStream,
        source: &SimTensor,
        target: &mut Vec<u8>,
        target_offset: usize,
    ) -> Result<()> {
        let start = source.offset_bytes();
        let bytes = source.buffer().lock()[start..start + source.num_bytes()].to_vec();
        target[target_offset..target_offset + bytes.len()].copy_from_slice(&bytes);
        Ok(())
    }

    fn copy(&self, stream: &SimStream, copy: &BufferCopy<'_, SimBuffer>) -> Result<()> {
        let mut queue = lock(&stream.queue);
        queue.num_submitted += 1;
        queue.pending.push_back(PendingCopy {
            source: copy.source.clone(),
            target: copy.target.clone(),
            source_range: copy.source_offset..copy.source_offset + copy.bytes,
            target_offset: copy.target_offset,
        });
        if stream.kind == StreamKind::Compute {
            queue.run_one();
        }
        Ok(())
    }

    fn record(&self, stream: &SimStream) -> Result<SimEvent> {
        Ok(stream.record())
    }

    fn wait(&self, _stream: &SimStream, event: &SimEvent) -> Result<()> {
        self.synchronize(event)
    }

    fn is_complete(&self, event: &SimEvent) -> Result<bool> {
        let mut queue = lock(&event.queue);
        queue.run_one();
        Ok(queue.num_done >= event.after)
    }

    fn synchronize(&self, event: &SimEvent) -> Result<()> {
        let mut queue = lock(&event.queue);
        while queue.num_done < event.after {
            queue.run_one();
        }
        Ok(())
    }
}
