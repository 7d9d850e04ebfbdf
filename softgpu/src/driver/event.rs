//! Events.

use super::context::need;
use super::{INVALID_VALUE, entries, put};
use crate::device::device;
use std::ffi::c_uint;

fn elapsed(target: *mut f32, start: usize, end: usize) -> Result<(), u32> {
    if target.is_null() {
        return Err(INVALID_VALUE);
    }
    let ms = device().streams.elapsed_ms(start, end)?;
    // SAFETY: the entry point's contract.
    unsafe { put(target, ms) }
}

entries! {
    fn cuEventCreate(event: *mut usize, _flags: c_uint) {
        need()?;
        let handle = device().new_handle();
        device().streams.create_event(handle);
        put(event, handle)
    }

    fn cuEventDestroy_v2(event: usize) {
        device().streams.destroy_event(event)
    }

    fn cuEventRecord(event: usize, stream: usize) {
        need()?;
        device().streams.record(event, stream)
    }

    fn cuEventRecordWithFlags(event: usize, stream: usize, _flags: c_uint) {
        need()?;
        device().streams.record(event, stream)
    }

    fn cuEventQuery(event: usize) {
        need()?;
        device().streams.query_event(event)
    }

    fn cuEventSynchronize(event: usize) {
        need()?;
        device().streams.synchronize_event(event)
    }

    fn cuEventElapsedTime(ms: *mut f32, start: usize, end: usize) {
        elapsed(ms, start, end)
    }

    fn cuEventElapsedTime_v2(ms: *mut f32, start: usize, end: usize) {
        elapsed(ms, start, end)
    }
}
