//! Allocation, copies, fills.

use super::context::need;
use super::{INVALID_VALUE, NOT_SUPPORTED, OUT_OF_MEMORY, entries, put, refuse};
use crate::device::device;
use crate::fault::Fault;
use crate::report;
use crate::work::{HostSource, HostTarget, Work};
use std::ffi::{c_int, c_uint, c_ulonglong, c_void};

/// `CU_MEMORYTYPE_HOST` and `CU_MEMORYTYPE_DEVICE`.
const HOST: c_uint = 1;
const DEVICE: c_uint = 2;

/// `CUDA_MEMCPY2D`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Copy2D {
    pub source_x: usize,
    pub source_y: usize,
    pub source_type: c_uint,
    pub source_host: *const c_void,
    pub source_device: u64,
    pub source_array: usize,
    pub source_pitch: usize,
    pub target_x: usize,
    pub target_y: usize,
    pub target_type: c_uint,
    pub target_host: *mut c_void,
    pub target_device: u64,
    pub target_array: usize,
    pub target_pitch: usize,
    pub width: usize,
    pub height: usize,
}

/// The default pool's handle.
const POOL: usize = 0x900;

fn allocate(target: *mut u64, bytes: usize, origin: &str) -> Result<(), u32> {
    if bytes == 0 {
        return Err(INVALID_VALUE);
    }
    device().streams.check_unsafe_call()?;
    let Some(allocation) = device().memory.allocate(bytes as u64, origin) else {
        let (free, total) = device().memory.info();
        return refuse(
            OUT_OF_MEMORY,
            &format!("{bytes} bytes wanted, {free} of {total} free (SOFTGPU_MEMORY_MIB sets the size)"),
        );
    };
    // SAFETY: the entry point's contract.
    unsafe { put(target, allocation.base) }
}

fn pin(target: *mut *mut c_void, bytes: usize) -> Result<(), u32> {
    device().streams.check_unsafe_call()?;
    let pointer = device().pinned.allocate(bytes).ok_or(OUT_OF_MEMORY)?;
    // SAFETY: the entry point's contract.
    unsafe { put(target, pointer.cast()) }
}

fn report_fault(fault: &Fault) -> u32 {
    report::set_message(&fault.to_string());
    fault.kind.code()
}

/// The source of a copy to the device: pageable memory is copied now, as the driver does, page-locked memory is read late.
///
/// # Safety
/// `source` has `bytes` readable bytes.
unsafe fn host_source(source: *const c_void, bytes: usize, stream: usize) -> HostSource {
    let start = source as usize;
    if device().streams.is_capturing(stream).unwrap_or(false) {
        return HostSource::Live(start);
    }
    if device().pinned.contains(start, bytes) {
        return HostSource::Pinned(start, device().pinned.begin_read(start, bytes));
    }
    // SAFETY: the caller's promise.
    HostSource::Snapshot(unsafe { std::slice::from_raw_parts(source.cast::<u8>(), bytes) }.into())
}

fn fill(target: u64, value: u32, width: u64, count: usize) -> Work {
    Work::Fill { target, value, width, count: count as u64 }
}

/// Queues a copy to the host; into pageable memory it is complete when the call returns, as with the driver.
fn to_host(target: *mut c_void, source: u64, bytes: usize, stream: usize) -> Result<(), u32> {
    need()?;
    let start = target as usize;
    if device().streams.is_capturing(stream)? {
        let target = HostTarget { start, is_pinned: false };
        return device().streams.push(stream, Work::ToHost(source, target, bytes as u64)).map(drop);
    }
    if !device().pinned.contains(start, bytes) {
        let target = HostTarget { start, is_pinned: false };
        return device().streams.push_and_wait(stream, Work::ToHost(source, target, bytes as u64));
    }
    device().pinned.begin_write(start, bytes);
    let target = HostTarget { start, is_pinned: true };
    device().streams.push(stream, Work::ToHost(source, target, bytes as u64)).map(drop)
}

entries! {
    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) {
        need()?;
        let info = device().memory.info();
        put(free, info.0 as usize)?;
        put(total, info.1 as usize)
    }

    fn cuMemAlloc_v2(target: *mut u64, bytes: usize) {
        need()?;
        allocate(target, bytes, "cuMemAlloc")
    }

    fn cuMemAllocAsync(target: *mut u64, bytes: usize, stream: usize) {
        need()?;
        if device().streams.is_capturing(stream)? {
            return refuse(NOT_SUPPORTED, "allocation while a stream records is not supported; allocate before");
        }
        allocate(target, bytes, "cuMemAllocAsync")
    }

    fn cuMemAllocFromPoolAsync(target: *mut u64, bytes: usize, _pool: usize, _stream: usize) {
        need()?;
        allocate(target, bytes, "cuMemAllocFromPoolAsync")
    }

    fn cuMemFree_v2(address: u64) {
        need()?;
        if address == 0 {
            return Ok(());
        }
        device().streams.check_unsafe_call()?;
        // The call waits for the device, so no kernel runs while the memory goes.
        device().streams.finish_all()?;
        device().memory.free(address).map_err(|fault| report_fault(&fault))
    }

    fn cuMemFreeAsync(address: u64, stream: usize) {
        need()?;
        if address == 0 {
            return Ok(());
        }
        device().streams.push(stream, Work::Free(address)).map(drop)
    }

    fn cuMemHostAlloc(target: *mut *mut c_void, bytes: usize, _flags: c_uint) {
        need()?;
        pin(target, bytes)
    }

    fn cuMemAllocHost_v2(target: *mut *mut c_void, bytes: usize) {
        need()?;
        pin(target, bytes)
    }

    fn cuMemFreeHost(pointer: *mut c_void) {
        device().streams.check_unsafe_call()?;
        device().pinned.free(pointer as usize).map_err(|fault| report_fault(&fault))
    }

    fn cuMemHostRegister_v2(pointer: *mut c_void, bytes: usize, _flags: c_uint) {
        need()?;
        device().pinned.register(pointer as usize, bytes);
        Ok(())
    }

    fn cuMemHostUnregister(pointer: *mut c_void) {
        device().pinned.free(pointer as usize).map_err(|fault| report_fault(&fault))
    }

    fn cuMemHostGetDevicePointer_v2(_target: *mut u64, _pointer: *mut c_void, _flags: c_uint) {
        refuse(NOT_SUPPORTED, "kernels cannot reach host memory here; copy it to the device")
    }

    fn cuMemHostGetFlags(flags: *mut c_uint, _pointer: *mut c_void) {
        put(flags, 0)
    }

    fn cuMemcpyHtoD_v2(target: u64, source: *const c_void, bytes: usize) {
        need()?;
        let source = host_source(source, bytes, 0);
        device().streams.push_and_wait(0, Work::ToDevice(source, target, bytes as u64))
    }

    fn cuMemcpyHtoDAsync_v2(target: u64, source: *const c_void, bytes: usize, stream: usize) {
        need()?;
        let source = host_source(source, bytes, stream);
        device().streams.push(stream, Work::ToDevice(source, target, bytes as u64)).map(drop)
    }

    // Rows from the host to the device, each an operation of its own.
    fn cuMemcpy2DAsync_v2(copy: *const Copy2D, stream: usize) {
        need()?;
        let copy = copy.as_ref().ok_or(INVALID_VALUE)?;
        if (copy.source_type, copy.target_type) != (HOST, DEVICE) {
            return refuse(NOT_SUPPORTED, "copies of two dimensions other than from the host to the device are not supported");
        }
        let is_cut = |x: usize, pitch: usize| copy.height > 1 && x.saturating_add(copy.width) > pitch;
        if is_cut(copy.source_x, copy.source_pitch) || is_cut(copy.target_x, copy.target_pitch) {
            return Err(INVALID_VALUE);
        }
        for row in 0..copy.height {
            let offset = (copy.source_y + row) * copy.source_pitch + copy.source_x;
            let source = host_source(copy.source_host.byte_add(offset), copy.width, stream);
            let target = copy.target_device + ((copy.target_y + row) * copy.target_pitch + copy.target_x) as u64;
            device().streams.push(stream, Work::ToDevice(source, target, copy.width as u64))?;
        }
        Ok(())
    }

    fn cuMemcpyDtoH_v2(target: *mut c_void, source: u64, bytes: usize) {
        need()?;
        let target = HostTarget { start: target as usize, is_pinned: false };
        device().streams.push_and_wait(0, Work::ToHost(source, target, bytes as u64))
    }

    fn cuMemcpyDtoHAsync_v2(target: *mut c_void, source: u64, bytes: usize, stream: usize) {
        to_host(target, source, bytes, stream)
    }

    fn cuMemcpyDtoD_v2(target: u64, source: u64, bytes: usize) {
        need()?;
        device().streams.push(0, Work::Copy(source, target, bytes as u64)).map(drop)
    }

    fn cuMemcpyDtoDAsync_v2(target: u64, source: u64, bytes: usize, stream: usize) {
        need()?;
        device().streams.push(stream, Work::Copy(source, target, bytes as u64)).map(drop)
    }

    fn cuMemcpyPeerAsync(target: u64, _target_context: usize, source: u64, _source_context: usize, bytes: usize, stream: usize) {
        need()?;
        device().streams.push(stream, Work::Copy(source, target, bytes as u64)).map(drop)
    }

    fn cuMemsetD8_v2(target: u64, value: u8, count: usize) {
        need()?;
        device().streams.push(0, fill(target, u32::from(value), 1, count)).map(drop)
    }

    fn cuMemsetD8Async(target: u64, value: u8, count: usize, stream: usize) {
        need()?;
        device().streams.push(stream, fill(target, u32::from(value), 1, count)).map(drop)
    }

    fn cuMemsetD16_v2(target: u64, value: u16, count: usize) {
        need()?;
        device().streams.push(0, fill(target, u32::from(value), 2, count)).map(drop)
    }

    fn cuMemsetD16Async(target: u64, value: u16, count: usize, stream: usize) {
        need()?;
        device().streams.push(stream, fill(target, u32::from(value), 2, count)).map(drop)
    }

    fn cuMemsetD32_v2(target: u64, value: u32, count: usize) {
        need()?;
        device().streams.push(0, fill(target, value, 4, count)).map(drop)
    }

    fn cuMemsetD32Async(target: u64, value: u32, count: usize, stream: usize) {
        need()?;
        device().streams.push(stream, fill(target, value, 4, count)).map(drop)
    }

    fn cuMemGetAddressRange_v2(base: *mut u64, bytes: *mut usize, address: u64) {
        need()?;
        let allocation = device().memory.resolve(address, 0).map_err(|fault| report_fault(&fault))?;
        if !base.is_null() {
            put(base, allocation.base)?;
        }
        if bytes.is_null() { Ok(()) } else { put(bytes, allocation.bytes as usize) }
    }

    // One pool without settings: memory goes back to the device at once.
    fn cuDeviceGetDefaultMemPool(pool: *mut usize, _device: c_int) {
        put(pool, POOL)
    }

    fn cuDeviceGetMemPool(pool: *mut usize, _device: c_int) {
        put(pool, POOL)
    }

    fn cuDeviceSetMemPool(_device: c_int, _pool: usize) {
        Ok(())
    }

    fn cuMemPoolTrimTo(_pool: usize, _bytes: usize) {
        Ok(())
    }

    fn cuMemPoolSetAttribute(_pool: usize, _attribute: c_uint, _value: *mut c_void) {
        Ok(())
    }

    fn cuMemPoolGetAttribute(_pool: usize, _attribute: c_uint, value: *mut c_ulonglong) {
        put(value, 0)
    }
}
