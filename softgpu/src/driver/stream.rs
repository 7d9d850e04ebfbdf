//! Streams.

use super::context::need;
use super::{INVALID_VALUE, entries, put};
use crate::device::device;
use crate::work::{HostFunction, Work};
use std::ffi::{c_int, c_uint, c_void};

const NON_BLOCKING: c_uint = 1;

entries! {
    fn cuStreamCreate(stream: *mut usize, flags: c_uint) {
        need()?;
        put(stream, device().streams.create(flags & NON_BLOCKING == 0))
    }

    // Priorities change nothing: one operation runs at a time.
    fn cuStreamCreateWithPriority(stream: *mut usize, flags: c_uint, _priority: c_int) {
        need()?;
        put(stream, device().streams.create(flags & NON_BLOCKING == 0))
    }

    fn cuStreamDestroy_v2(stream: usize) {
        device().streams.destroy(stream)
    }

    fn cuStreamSynchronize(stream: usize) {
        need()?;
        device().streams.synchronize(stream)
    }

    fn cuStreamQuery(stream: usize) {
        need()?;
        device().streams.query(stream)
    }

    fn cuStreamWaitEvent(stream: usize, event: usize, _flags: c_uint) {
        need()?;
        device().streams.wait_event(stream, event)
    }

    fn cuLaunchHostFunc(stream: usize, function: Option<HostFunction>, argument: *mut c_void) {
        need()?;
        let function = function.ok_or(INVALID_VALUE)?;
        device().streams.push(stream, Work::Host(function, argument as usize)).map(drop)
    }
}
