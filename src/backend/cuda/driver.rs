//! The NVIDIA driver: whether there is one, and which devices it shows.
//!
//! The library is loaded at run time. `cudarc` panics when it is missing, so nothing calls the driver before
//! [`find_gpus`] has found it.

#![allow(unsafe_code)]

use std::ffi::CStr;
use std::sync::Arc;

use cudarc::driver::{CudaContext, DriverError, result, sys};

use crate::backend::GpuInfo;
use crate::{Error, Result, invalid, unsupported};

/// The devices of this machine, the software GPU included. An error says why there are none.
pub(in crate::backend) fn find_gpus() -> Result<Vec<GpuInfo>> {
    // SAFETY: opens a library and closes it again.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::NotFound("there is no NVIDIA driver (libcuda.so.1 cannot be loaded)".into()));
    }
    let count = CudaContext::device_count().map_err(driver_error("start the NVIDIA driver"))?;
    let devices: Vec<GpuInfo> = (0..usize::try_from(count).unwrap_or(0)).map(describe).collect::<Result<_>>()?;
    if devices.is_empty() {
        return Err(Error::NotFound("the NVIDIA driver shows no device".into()));
    }
    Ok(devices)
}

fn describe(ordinal: usize) -> Result<GpuInfo> {
    let read = || -> std::result::Result<GpuInfo, DriverError> {
        let device = result::device::get(ordinal as i32)?;
        // SAFETY: the driver just handed the device out.
        let attribute = |which| unsafe { result::device::get_attribute(device, which) };
        Ok(GpuInfo {
            ordinal,
            name: result::device::get_name(device)?,
            compute_capability: (
                attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            driver_version: driver_version()?,
            // SAFETY: as above.
            memory_bytes: unsafe { result::device::total_mem(device) }?,
        })
    };
    read().map_err(driver_error("describe the devices"))
}

/// The CUDA version that the driver supports.
fn driver_version() -> std::result::Result<(i32, i32), DriverError> {
    let mut version = 0;
    // SAFETY: the driver writes one number.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result()?;
    Ok((version / 1000, version % 1000 / 10))
}

/// Opens a device that [`find_gpus`] found. Its context follows our own events only.
pub(super) fn open(ordinal: usize) -> Result<(Arc<CudaContext>, GpuInfo)> {
    let devices = find_gpus()?;
    let num_devices = devices.len();
    let info = devices
        .into_iter()
        .nth(ordinal)
        .ok_or_else(|| invalid!("there is no CUDA device {ordinal}; the driver shows {num_devices}"))?;
    if let Some(problem) = info.problem() {
        return Err(unsupported!("{problem}"));
    }
    let context = CudaContext::new(ordinal).map_err(driver_error("open the device"))?;
    // SAFETY: streams are ordered by the events of this module, and memory is freed after the device has come to rest.
    unsafe { context.disable_event_tracking() };
    Ok((context, info))
}

/// Turns an error of the driver into ours; `action` is what was being done.
pub(super) fn driver_error(action: &str) -> impl Fn(DriverError) -> Error {
    move |error| {
        let text = |found: std::result::Result<&CStr, DriverError>| {
            found.map_or_else(|_| format!("error {}", error.0 as u32), |text| text.to_string_lossy().into_owned())
        };
        Error::Device(format!("cannot {action}: {}: {}", text(error.error_name()), text(error.error_string())))
    }
}
