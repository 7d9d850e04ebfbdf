//! Contexts. There is one set of streams and memory; a context is a handle that must be current.

use super::{INVALID_CONTEXT, INVALID_DEVICE, entries, put};
use crate::device::device;
use std::cell::Cell;
use std::ffi::{c_int, c_uint, c_void};
use std::sync::Mutex;

/// The primary context's handle.
const PRIMARY: usize = 0x800;
const DEFAULT_LIMIT: usize = 1 << 20;

thread_local! {
    static STACK: Cell<Vec<usize>> = const { Cell::new(Vec::new()) };
}

struct Contexts {
    primary_uses: u64,
    others: Vec<usize>,
}

static CONTEXTS: Mutex<Contexts> = Mutex::new(Contexts { primary_uses: 0, others: Vec::new() });

fn with<T>(f: impl FnOnce(&mut Contexts) -> T) -> T {
    f(&mut CONTEXTS.lock().unwrap_or_else(|e| e.into_inner()))
}

fn stack<T>(f: impl FnOnce(&mut Vec<usize>) -> T) -> T {
    STACK.with(|cell| {
        let mut stack = cell.take();
        let result = f(&mut stack);
        cell.set(stack);
        result
    })
}

fn current() -> usize {
    stack(|s| s.last().copied().unwrap_or(0))
}

/// Whether calls that need a context may go on.
///
/// # Errors
/// `INVALID_CONTEXT`: none is current on this thread, or it was destroyed; or the error of an earlier finding.
pub(crate) fn need() -> Result<(), u32> {
    let current = current();
    let is_alive = with(|c| (current == PRIMARY && c.primary_uses > 0) || c.others.contains(&current));
    if !is_alive {
        return Err(INVALID_CONTEXT);
    }
    device().streams.check()
}

fn create(context: *mut usize, dev: c_int) -> Result<(), u32> {
    if dev != 0 {
        return Err(INVALID_DEVICE);
    }
    let handle = device().new_handle();
    with(|c| c.others.push(handle));
    stack(|s| s.push(handle));
    // SAFETY: the entry point's contract.
    unsafe { put(context, handle) }
}

entries! {
    fn cuDevicePrimaryCtxRetain(context: *mut usize, dev: c_int) {
        if dev != 0 {
            return Err(INVALID_DEVICE);
        }
        with(|c| c.primary_uses += 1);
        put(context, PRIMARY)
    }

    fn cuDevicePrimaryCtxRelease_v2(dev: c_int) {
        if dev != 0 {
            return Err(INVALID_DEVICE);
        }
        with(|c| match c.primary_uses {
            0 => Err(INVALID_CONTEXT),
            _ => {
                c.primary_uses -= 1;
                Ok(())
            }
        })
    }

    fn cuDevicePrimaryCtxReset_v2(dev: c_int) {
        if dev != 0 {
            return Err(INVALID_DEVICE);
        }
        device().streams.clear_error();
        Ok(())
    }

    fn cuDevicePrimaryCtxGetState(dev: c_int, flags: *mut c_uint, active: *mut c_int) {
        if dev != 0 {
            return Err(INVALID_DEVICE);
        }
        put(flags, 0)?;
        put(active, c_int::from(with(|c| c.primary_uses > 0)))
    }

    fn cuDevicePrimaryCtxSetFlags_v2(_dev: c_int, _flags: c_uint) {
        Ok(())
    }

    fn cuCtxCreate_v2(context: *mut usize, _flags: c_uint, dev: c_int) {
        create(context, dev)
    }

    fn cuCtxCreate_v3(context: *mut usize, _params: *mut c_void, _count: c_int, _flags: c_uint, dev: c_int) {
        create(context, dev)
    }

    fn cuCtxCreate_v4(context: *mut usize, _params: *mut c_void, _flags: c_uint, dev: c_int) {
        create(context, dev)
    }

    fn cuCtxDestroy_v2(context: usize) {
        let known = with(|c| {
            let before = c.others.len();
            c.others.retain(|&other| other != context);
            c.others.len() < before
        });
        stack(|s| s.retain(|&other| other != context));
        if known { Ok(()) } else { Err(INVALID_CONTEXT) }
    }

    fn cuCtxSetCurrent(context: usize) {
        stack(|s| {
            s.pop();
            if context != 0 {
                s.push(context);
            }
        });
        Ok(())
    }

    fn cuCtxGetCurrent(context: *mut usize) {
        put(context, current())
    }

    fn cuCtxPushCurrent_v2(context: usize) {
        stack(|s| s.push(context));
        Ok(())
    }

    fn cuCtxPopCurrent_v2(context: *mut usize) {
        let top = stack(Vec::pop).ok_or(INVALID_CONTEXT)?;
        if context.is_null() { Ok(()) } else { put(context, top) }
    }

    fn cuCtxGetDevice(dev: *mut c_int) {
        need()?;
        put(dev, 0)
    }

    fn cuCtxGetApiVersion(_context: usize, version: *mut c_uint) {
        put(version, 3020)
    }

    fn cuCtxSynchronize() {
        need()?;
        device().streams.synchronize_all()
    }

    fn cuCtxGetStreamPriorityRange(least: *mut c_int, greatest: *mut c_int) {
        need()?;
        put(least, 0)?;
        put(greatest, -5)
    }

    fn cuCtxGetLimit(value: *mut usize, _limit: c_uint) {
        need()?;
        put(value, DEFAULT_LIMIT)
    }

    fn cuCtxSetLimit(_limit: c_uint, _value: usize) {
        need()
    }

    fn cuCtxSetFlags(_flags: c_uint) {
        need()
    }

    fn cuCtxGetFlags(flags: *mut c_uint) {
        need()?;
        put(flags, 0)
    }

    fn cuCtxGetCacheConfig(config: *mut c_uint) {
        need()?;
        put(config, 0)
    }

    fn cuCtxSetCacheConfig(_config: c_uint) {
        need()
    }
}
