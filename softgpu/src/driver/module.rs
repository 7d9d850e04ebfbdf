//! Modules, functions, launches.

use super::context::need;
use super::{
    FILE_NOT_FOUND, INVALID_HANDLE, INVALID_IMAGE, INVALID_PTX, INVALID_VALUE, NO_BINARY, NOT_FOUND, NOT_SUPPORTED,
    entries, put, refuse,
};
use crate::capability::capability;
use crate::device::device;
use crate::fatbin::{ImageError, ptx_of_image};
use crate::fault::{Fault, FaultKind};
use crate::module::{Function, Module};
use crate::report;
use crate::work::Work;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard};

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// # Safety
/// As [`ptx_of_image`].
unsafe fn load(target: *mut usize, image: *const c_void) -> Result<(), u32> {
    need()?;
    if image.is_null() {
        return Err(INVALID_VALUE);
    }
    // SAFETY: the caller's promise.
    let text = unsafe { ptx_of_image(image.cast()) };
    let text = match text {
        Ok(text) => text,
        Err(ImageError::NoPtx(message)) => return refuse(NO_BINARY, &message),
        Err(ImageError::Unknown(message)) => return refuse(INVALID_IMAGE, &message),
    };
    match Module::load(&text, &device().memory) {
        Ok(module) => {
            let handle = device().new_handle();
            lock(&device().modules).insert(handle, module);
            // SAFETY: the entry point's contract.
            unsafe { put(target, handle) }
        }
        Err(error) => refuse(INVALID_PTX, &error.to_string()),
    }
}

fn function(handle: usize) -> Result<Arc<Function>, u32> {
    lock(&device().functions).get(&handle).cloned().ok_or(INVALID_HANDLE)
}

/// Copies the arguments into the layout of the parameter buffer.
///
/// # Safety
/// `params` has a pointer per parameter, each to as many bytes as the parameter has.
unsafe fn gather(function: &Function, params: *mut *mut c_void) -> Result<Arc<[u8]>, u32> {
    let kernel = &function.kernel;
    let mut buffer = vec![0u8; kernel.param_bytes() as usize];
    if params.is_null() && !kernel.params.is_empty() {
        return refuse(
            INVALID_VALUE,
            &format!("kernel {}: launched without its {} arguments", kernel.name, kernel.params.len()),
        );
    }
    for (i, param) in kernel.params.iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe {
            let source = *params.add(i);
            if source.is_null() {
                return refuse(INVALID_VALUE, &format!("kernel {}: argument {i} is a null pointer", kernel.name));
            }
            let target = &mut buffer[param.offset as usize..(param.offset + param.bytes) as usize];
            std::ptr::copy_nonoverlapping(source.cast::<u8>(), target.as_mut_ptr(), target.len());
        }
    }
    Ok(buffer.into())
}

/// # Safety
/// As [`gather`].
unsafe fn launch(
    handle: usize,
    grid: [u32; 3],
    block: [u32; 3],
    shared: u32,
    stream: usize,
    params: *mut *mut c_void,
    extra: *mut *mut c_void,
) -> Result<(), u32> {
    need()?;
    let function = function(handle)?;
    if !extra.is_null() {
        return refuse(NOT_SUPPORTED, "kernel arguments through `extra` are not supported; use `kernelParams`");
    }
    if let Some(reason) = function.refuse(grid, block, shared) {
        let fault = Fault::new(FaultKind::LaunchShape, reason);
        return refuse(fault.kind.code(), &fault.to_string());
    }
    // SAFETY: the caller's promise.
    let params = unsafe { gather(&function, params)? };
    device().streams.push(stream, Work::Launch { function, shape: (grid, block, shared), params }).map(drop)
}

/// Attributes of `CUfunction_attribute`.
fn attribute(function: &Function, number: c_uint) -> Option<c_int> {
    let kernel = &function.kernel;
    Some(match number {
        0 => kernel.max_threads.unwrap_or(1024) as c_int,
        1 => kernel.static_shared as c_int,
        2 => 0,
        3 => kernel.local_bytes as c_int,
        // Registers are not assigned here; 0 says so.
        4 => 0,
        5 | 6 => capability().number as c_int,
        7 => 0,
        8 => function.max_dynamic_shared.load(Relaxed) as c_int,
        9 => -1,
        _ => return None,
    })
}

entries! {
    fn cuModuleLoadData(module: *mut usize, image: *const c_void) {
        load(module, image)
    }

    fn cuModuleLoadDataEx(
        module: *mut usize,
        image: *const c_void,
        _count: c_uint,
        _options: *mut c_uint,
        _values: *mut *mut c_void,
    ) {
        load(module, image)
    }

    fn cuModuleLoadFatBinary(module: *mut usize, image: *const c_void) {
        load(module, image)
    }

    fn cuModuleLoad(module: *mut usize, path: *const c_char) {
        need()?;
        if path.is_null() {
            return Err(INVALID_VALUE);
        }
        let path = CStr::from_ptr(path).to_string_lossy().into_owned();
        let Ok(mut bytes) = std::fs::read(&path) else { return refuse(FILE_NOT_FOUND, &format!("cannot read {path}")) };
        bytes.push(0);
        load(module, bytes.as_ptr().cast())
    }

    fn cuModuleUnload(module: usize) {
        need()?;
        device().streams.synchronize_all()?;
        let module = lock(&device().modules).remove(&module).ok_or(INVALID_HANDLE)?;
        lock(&device().functions).retain(|_, f| !module.functions.values().any(|own| Arc::ptr_eq(own, f)));
        for (address, _) in module.globals.values() {
            if let Err(fault) = device().memory.free(*address) {
                report::set_message(&fault.to_string());
            }
        }
        Ok(())
    }

    fn cuModuleGetFunction(target: *mut usize, module: usize, name: *const c_char) {
        need()?;
        if name.is_null() {
            return Err(INVALID_VALUE);
        }
        let name = CStr::from_ptr(name).to_string_lossy().into_owned();
        let modules = lock(&device().modules);
        let module = modules.get(&module).ok_or(INVALID_HANDLE)?;
        let Some(function) = module.functions.get(&name) else {
            let mut names: Vec<&str> = module.functions.keys().map(String::as_str).collect();
            names.sort_unstable();
            return refuse(NOT_FOUND, &format!("no kernel {name} in the module; it has {names:?}"));
        };
        let mut functions = lock(&device().functions);
        let known = functions.iter().find(|(_, f)| Arc::ptr_eq(f, function)).map(|(&handle, _)| handle);
        let handle = known.unwrap_or_else(|| device().new_handle());
        functions.insert(handle, Arc::clone(function));
        put(target, handle)
    }

    fn cuModuleGetGlobal_v2(address: *mut u64, bytes: *mut usize, module: usize, name: *const c_char) {
        need()?;
        if name.is_null() {
            return Err(INVALID_VALUE);
        }
        let name = CStr::from_ptr(name).to_string_lossy().into_owned();
        let modules = lock(&device().modules);
        let module = modules.get(&module).ok_or(INVALID_HANDLE)?;
        let &(base, size) = module.globals.get(&name).ok_or(NOT_FOUND)?;
        if !address.is_null() {
            put(address, base)?;
        }
        if bytes.is_null() { Ok(()) } else { put(bytes, size as usize) }
    }

    fn cuModuleGetLoadingMode(mode: *mut c_uint) {
        put(mode, 1)
    }

    fn cuFuncGetAttribute(value: *mut c_int, number: c_uint, handle: usize) {
        let function = function(handle)?;
        put(value, attribute(&function, number).ok_or(INVALID_VALUE)?)
    }

    fn cuFuncSetAttribute(handle: usize, number: c_uint, value: c_int) {
        let function = function(handle)?;
        match number {
            8 if value >= 0 && value as u32 + function.kernel.static_shared <= capability().max_shared => {
                function.max_dynamic_shared.store(value as u32, Relaxed);
                Ok(())
            }
            8 => refuse(
                INVALID_VALUE,
                &format!(
                    "kernel {}: {value} bytes of dynamic shared memory wanted, the device has {}",
                    function.kernel.name,
                    capability().max_shared
                ),
            ),
            9 => Ok(()),
            _ => Err(INVALID_VALUE),
        }
    }

    fn cuFuncSetCacheConfig(handle: usize, _config: c_uint) {
        function(handle).map(drop)
    }

    fn cuFuncGetName(target: *mut *const c_char, handle: usize) {
        let function = function(handle)?;
        let name = std::ffi::CString::new(function.kernel.name.clone()).map_err(|_| INVALID_VALUE)?;
        put(target, name.into_raw().cast_const())
    }

    fn cuLaunchKernel(
        handle: usize,
        grid_x: c_uint,
        grid_y: c_uint,
        grid_z: c_uint,
        block_x: c_uint,
        block_y: c_uint,
        block_z: c_uint,
        shared: c_uint,
        stream: usize,
        params: *mut *mut c_void,
        extra: *mut *mut c_void,
    ) {
        launch(handle, [grid_x, grid_y, grid_z], [block_x, block_y, block_z], shared, stream, params, extra)
    }

    // Occupancy is arithmetic over the launch limits; registers are not counted.
    fn cuOccupancyMaxActiveBlocksPerMultiprocessor(blocks: *mut c_int, handle: usize, threads: c_int, shared: usize) {
        let function = function(handle)?;
        put(blocks, occupancy(&function, threads, shared))
    }

    fn cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
        blocks: *mut c_int,
        handle: usize,
        threads: c_int,
        shared: usize,
        _flags: c_uint,
    ) {
        let function = function(handle)?;
        put(blocks, occupancy(&function, threads, shared))
    }
}

fn occupancy(function: &Function, threads: c_int, shared: usize) -> c_int {
    let by_threads = 2048 / threads.clamp(1, 1024);
    let bytes = function.kernel.static_shared as usize + shared + 1024;
    by_threads.min((capability().multiprocessor_shared as usize / bytes) as c_int).min(32)
}
