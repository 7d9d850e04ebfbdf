//! Initialisation and what the device says about itself.

use super::{INVALID_DEVICE, INVALID_VALUE, entries, put, refuse};
use crate::capability::{capability, wanted};
use crate::device::device;
use crate::module::DEFAULT_SHARED;
use std::ffi::{c_char, c_int, c_uint};

/// The name says what it is, so that nobody takes it for a GPU.
pub const NAME: &str = "softgpu (software device for tests)";
const DRIVER_VERSION: c_int = 13_000;
/// Names another version that the driver is to be of.
const VERSION_VARIABLE: &str = "SOFTGPU_DRIVER_VERSION";
const UUID: [u8; 16] = *b"softgpu-device-0";

fn check(device: c_int) -> Result<(), u32> {
    if device == 0 { Ok(()) } else { Err(INVALID_DEVICE) }
}

/// Attribute numbers of `CUdevice_attribute`; what is not listed is 0, "not supported".
fn attribute(number: c_uint) -> c_int {
    let capability = capability();
    let (major, minor) = capability.version();
    match number {
        1 => 1024,                    // threads per block
        2 | 3 => 1024,                // block x, y
        4 => 64,                      // block z
        5 => i32::MAX,                // grid x
        6 | 7 => 65535,               // grid y, z
        8 => DEFAULT_SHARED as c_int, // shared memory per block
        9 => 65536,                   // constant memory
        10 => 32,                     // warp
        12 => 65536,                  // registers per block
        13 | 36 => 1_000_000,         // clock and memory clock, kHz: nominal
        15 | 31 | 40 | 41 => 1,       // overlap, concurrent kernels, async engine, unified addressing
        16 => capability.multiprocessors as c_int,
        37 => 5120, // memory bus, bits, as an A100 and an H100
        38 => capability.l2_bytes as c_int,
        39 => 2048,           // threads per multiprocessor
        75 => major as c_int, // compute capability
        76 => minor as c_int,
        78..=80 => 1, // stream priorities, global and local L1
        81 => capability.multiprocessor_shared as c_int,
        82 => 65536,                          // registers per multiprocessor
        97 => capability.max_shared as c_int, // shared memory per block, on request
        106 => 32,                            // blocks per multiprocessor
        111 => 1024,                          // reserved shared memory per block
        115 => 1,                             // memory pools
        _ => 0,
    }
}

entries! {
    fn cuInit(_flags: c_uint) {
        if let Err(message) = wanted() {
            return refuse(INVALID_VALUE, &message);
        }
        device();
        Ok(())
    }

    fn cuDriverGetVersion(version: *mut c_int) {
        let named = std::env::var(VERSION_VARIABLE).ok().and_then(|named| named.parse().ok());
        put(version, named.unwrap_or(DRIVER_VERSION))
    }

    fn cuDeviceGetCount(count: *mut c_int) {
        put(count, 1)
    }

    fn cuDeviceGet(handle: *mut c_int, ordinal: c_int) {
        check(ordinal)?;
        put(handle, 0)
    }

    fn cuDeviceGetName(name: *mut c_char, length: c_int, handle: c_int) {
        check(handle)?;
        if name.is_null() || length < 1 {
            return Err(INVALID_VALUE);
        }
        let n = NAME.len().min(length as usize - 1);
        std::ptr::copy_nonoverlapping(NAME.as_ptr().cast(), name, n);
        put(name.add(n), 0)
    }

    fn cuDeviceGetAttribute(value: *mut c_int, number: c_uint, handle: c_int) {
        check(handle)?;
        put(value, attribute(number))
    }

    fn cuDeviceTotalMem_v2(bytes: *mut usize, handle: c_int) {
        check(handle)?;
        put(bytes, device().memory.info().1 as usize)
    }

    fn cuDeviceGetUuid(uuid: *mut [u8; 16], handle: c_int) {
        check(handle)?;
        put(uuid, UUID)
    }

    fn cuDeviceGetUuid_v2(uuid: *mut [u8; 16], handle: c_int) {
        check(handle)?;
        put(uuid, UUID)
    }

    fn cuDeviceComputeCapability(major: *mut c_int, minor: *mut c_int, handle: c_int) {
        check(handle)?;
        put(major, attribute(75))?;
        put(minor, attribute(76))
    }

    fn cuDeviceGetPCIBusId(text: *mut c_char, length: c_int, handle: c_int) {
        check(handle)?;
        let id = c"0000:00:00.0".to_bytes_with_nul();
        if text.is_null() || (length as usize) < id.len() {
            return Err(INVALID_VALUE);
        }
        std::ptr::copy_nonoverlapping(id.as_ptr().cast(), text, id.len());
        Ok(())
    }

    fn cuDeviceCanAccessPeer(can: *mut c_int, a: c_int, b: c_int) {
        check(a)?;
        check(b)?;
        put(can, 0)
    }
}
