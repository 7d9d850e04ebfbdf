//! Streams and events of the CPU backend.
//!
//! Work on a compute stream is done when the call returns. A copy stream has a thread of its own and completes later,
//! as on a GPU, so that block copies run beside a step.

#![allow(unsafe_code)]

use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};

use crossbeam::channel::{Sender, bounded};

use super::memory::CpuBuffer;
use crate::backend::{BufferCopy, StreamKind};
use crate::{Error, Result};

/// Copies under way on one stream; a caller that gives it more waits.
const MAX_PENDING_COPIES: usize = 1024;

/// An ordered queue of work.
pub struct CpuStream {
    copies: Option<CopyThread>,
}

/// A point in a stream.
pub struct CpuEvent {
    /// The copies that must be done; none for a compute stream.
    after: Option<(Arc<Progress>, u64)>,
}

struct CopyThread {
    sender: Option<Sender<OwnedCopy>>,
    progress: Arc<Progress>,
    num_submitted: Mutex<u64>,
    handle: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Progress {
    num_done: Mutex<u64>,
    advanced: Condvar,
}

struct OwnedCopy {
    source: CpuBuffer,
    source_offset: usize,
    target: CpuBuffer,
    target_offset: usize,
    bytes: usize,
}

impl OwnedCopy {
    fn run(&self) {
        // SAFETY: the ranges do not overlap (checked when it was queued), and the owner of the blocks touches neither
        // before the event behind the copy.
        let (source, target) = unsafe {
            (self.source.bytes(self.source_offset, self.bytes), self.target.bytes_mut(self.target_offset, self.bytes))
        };
        target.copy_from_slice(source);
    }
}

impl CpuStream {
    pub(super) fn new(kind: StreamKind) -> Result<Self> {
        let copies = match kind {
            StreamKind::Compute => None,
            StreamKind::Copy => Some(CopyThread::start()?),
        };
        Ok(Self { copies })
    }

    pub(super) fn copy(&self, copy: &BufferCopy<'_, CpuBuffer>) -> Result<()> {
        let copy = OwnedCopy {
            source: copy.source.clone(),
            source_offset: copy.source_offset,
            target: copy.target.clone(),
            target_offset: copy.target_offset,
            bytes: copy.bytes,
        };
        match &self.copies {
            Some(thread) => thread.submit(copy),
            None => {
                copy.run();
                Ok(())
            }
        }
    }

    pub(super) fn record(&self) -> CpuEvent {
        let after = self.copies.as_ref().map(|thread| (Arc::clone(&thread.progress), *lock(&thread.num_submitted)));
        CpuEvent { after }
    }
}

impl CpuEvent {
    pub(super) fn is_complete(&self) -> bool {
        self.after.as_ref().is_none_or(|(progress, after)| *lock(&progress.num_done) >= *after)
    }

    pub(super) fn synchronize(&self) {
        if let Some((progress, after)) = &self.after {
            let mut num_done = lock(&progress.num_done);
            while *num_done < *after {
                num_done = progress.advanced.wait(num_done).unwrap_or_else(|poisoned| poisoned.into_inner());
            }
        }
    }
}

impl CopyThread {
    fn start() -> Result<Self> {
        let (sender, receiver) = bounded::<OwnedCopy>(MAX_PENDING_COPIES);
        let progress = Arc::new(Progress::default());
        let shared = Arc::clone(&progress);
        let serve = move || {
            for copy in receiver {
                copy.run();
                *lock(&shared.num_done) += 1;
                shared.advanced.notify_all();
            }
        };
        let handle = thread::Builder::new()
            .name("mneme-copy".into())
            .spawn(serve)
            .map_err(|source| Error::Io { context: "cannot start the copy thread".into(), source })?;
        Ok(Self { sender: Some(sender), progress, num_submitted: Mutex::new(0), handle: Some(handle) })
    }

    fn submit(&self, copy: OwnedCopy) -> Result<()> {
        let gone = || Error::Device("the copy thread has ended".into());
        self.sender.as_ref().ok_or_else(gone)?.send(copy).map_err(|_| gone())?;
        *lock(&self.num_submitted) += 1;
        Ok(())
    }
}

impl Drop for CopyThread {
    fn drop(&mut self) {
        self.sender = None;
        if let Some(handle) = self.handle.take() {
            let _ = handle.join();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: usize = 4096;

    /// Copies block 1 of one buffer over block 0 of another, and that over block 2 of the first.
    fn copy_there_and_back(kind: StreamKind) {
        let (device, host) = (CpuBuffer::allocate(3 * BLOCK).unwrap(), CpuBuffer::allocate(BLOCK).unwrap());
        // SAFETY: nothing is queued yet.
        unsafe { device.bytes_mut(BLOCK, BLOCK) }.fill(7);
        let stream = CpuStream::new(kind).unwrap();
        let copy = |source, source_offset, target, target_offset| BufferCopy {
            source,
            source_offset,
            target,
            target_offset,
            bytes: BLOCK,
        };
        stream.copy(&copy(&device, BLOCK, &host, 0)).unwrap();
        stream.copy(&copy(&host, 0, &device, 2 * BLOCK)).unwrap();
        let done = stream.record();
        done.synchronize();
        assert!(done.is_complete());
        // SAFETY: everything that was queued is done.
        let bytes = unsafe { device.bytes(0, 3 * BLOCK) };
        assert!(bytes[..BLOCK].iter().all(|&byte| byte == 0) && bytes[BLOCK..].iter().all(|&byte| byte == 7));
    }

    #[test]
    fn copies_of_a_stream_run_in_order_and_are_done_at_its_event() {
        copy_there_and_back(StreamKind::Compute);
        copy_there_and_back(StreamKind::Copy);
    }
}
