//! Streams and events.

#![allow(unsafe_code)]

use std::sync::{Arc, Mutex, MutexGuard};

use cudarc::driver::{self, CudaContext, DriverError, sys};

use super::driver::driver_error;
use crate::Result;

/// Events that are kept for the next use.
const MAX_POOLED_EVENTS: usize = 64;

/// A stream that does not wait for the default stream.
pub struct CudaStream(Arc<driver::CudaStream>);

impl CudaStream {
    pub(super) fn new(context: &Arc<CudaContext>) -> Result<Self> {
        context.new_stream().map(Self).map_err(driver_error("make a stream"))
    }

    /// One that somebody else made.
    #[cfg(feature = "flash-attn")]
    pub(super) fn of(stream: Arc<driver::CudaStream>) -> Self {
        Self(stream)
    }

    pub(super) fn get(&self) -> &driver::CudaStream {
        &self.0
    }

    /// Whether all it was given is done.
    pub(super) fn is_done(&self) -> std::result::Result<bool, DriverError> {
        self.0.context().bind_to_thread()?;
        // SAFETY: the stream lives as long as the reference to it.
        match unsafe { sys::cuStreamQuery(self.0.cu_stream()) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            other => other.result().map(|()| true),
        }
    }
}

/// A point in a stream. Its driver object goes back to the pool it came from.
pub struct CudaEvent {
    /// `None` only while it is dropped.
    event: Option<driver::CudaEvent>,
    pool: Arc<EventPool>,
}

/// Driver objects of events that are not in use.
pub(super) struct EventPool(Mutex<Vec<driver::CudaEvent>>);

impl EventPool {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::new(Vec::with_capacity(MAX_POOLED_EVENTS))))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<driver::CudaEvent>> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl CudaEvent {
    /// Marks the point up to which `stream` has been given work.
    pub(super) fn record(pool: &Arc<EventPool>, stream: &CudaStream) -> Result<Self> {
        let error = driver_error("record an event");
        let pooled = pool.lock().pop();
        let event = match pooled {
            Some(event) => event,
            None => stream.get().context().new_event(None).map_err(&error)?,
        };
        event.record(stream.get()).map_err(&error)?;
        Ok(Self { event: Some(event), pool: Arc::clone(pool) })
    }

    pub(super) fn get(&self) -> &driver::CudaEvent {
        self.event.as_ref().expect("an event is there until it is dropped")
    }
}

impl Drop for CudaEvent {
    fn drop(&mut self) {
        let mut free = self.pool.lock();
        if free.len() < MAX_POOLED_EVENTS {
            free.extend(self.event.take());
        }
    }
}
