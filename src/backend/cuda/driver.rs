//! The NVIDIA driver: whether there is one, and which devices it shows.
//!
//! The library is loaded at run time. `cudarc` panics when it is missing, so nothing calls the driver before
//! [`find_gpus`] has found it.

#![allow(unsafe_code)]

use std::ffi::CStr;
use std::sync::Arc;

use cudarc::driver::{CudaContext, DriverError, result, sys};

use super::modules::MIN_DRIVER;
use crate::backend::GpuInfo;
use crate::backend::gpu::needed_release;
use crate::{Error, Result, invalid, unsupported};

/// Functions of the driver without which nothing runs: cudarc panics when it finds one missing.
const NEEDED: [&str; 39] = [
    "cuInit",
    "cuDriverGetVersion",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuDeviceGet",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDeviceGetAttribute",
    "cuDeviceTotalMem_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease_v2",
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuCtxSynchronize",
    "cuMemGetInfo_v2",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemHostAlloc",
    "cuMemFreeHost",
    "cuMemsetD8_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpy2DAsync_v2",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamQuery",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventRecord",
    "cuEventQuery",
    "cuEventSynchronize",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuModuleGetFunction",
    "cuFuncSetAttribute",
    "cuLaunchKernel",
];

/// Functions that decode steps are kept as graphs with.
const FOR_GRAPHS: [&str; 7] = [
    "cuStreamBeginCapture_v2",
    "cuStreamEndCapture",
    "cuGraphInstantiateWithFlags",
    "cuGraphExecUpdate_v2",
    "cuGraphLaunch",
    "cuGraphExecDestroy",
    "cuGraphDestroy",
];

/// Whether the driver's library can be loaded.
#[cfg(not(feature = "flash-attn"))]
fn has_library() -> bool {
    // SAFETY: opens a library and closes it again.
    unsafe { sys::is_culib_present() }
}

/// A program with candle's CUDA is linked to the library: without it, or without one of its functions, it has not started.
#[cfg(feature = "flash-attn")]
fn has_library() -> bool {
    true
}

#[cfg(feature = "flash-attn")]
fn first_missing<'a>(_: &[&'a str]) -> Option<&'a str> {
    None
}

/// The first of these functions that the driver, which is loaded, does not have.
#[cfg(not(feature = "flash-attn"))]
fn first_missing<'a>(names: &[&'a str]) -> Option<&'a str> {
    // SAFETY: the library is there, and the address is not used.
    let is_missing = |name: &&&str| unsafe { sys::culib().get::<*const ()>(name.as_bytes()) }.is_err();
    names.iter().find(is_missing).copied()
}

/// The first function that the driver lacks to keep steps as graphs.
pub(super) fn missing_for_graphs() -> Option<&'static str> {
    first_missing(&FOR_GRAPHS)
}

/// The devices of this machine, the software GPU included. An error says why there are none.
pub(in crate::backend) fn find_gpus() -> Result<Vec<GpuInfo>> {
    if !has_library() {
        return Err(Error::NotFound("there is no NVIDIA driver (libcuda.so.1 cannot be loaded)".into()));
    }
    if let Some(name) = first_missing(&NEEDED) {
        return Err(unsupported!(
            "the NVIDIA driver has no {name}: it is older than the kernels; update it to {} or newer",
            needed_release(MIN_DRIVER)
        ));
    }
    let count = match CudaContext::device_count() {
        // None is there, or none is to be seen.
        Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => 0,
        count => count.map_err(driver_error("start the NVIDIA driver"))?,
    };
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
        let multiprocessors = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
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
            multiprocessors: multiprocessors.max(1) as usize,
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
