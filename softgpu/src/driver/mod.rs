//! The C interface: entry points by group, named as in the CUDA driver API 13.0.
//!
//! Each follows the manual of its function; comments say only where the software device differs. What is not here does not
//! exist: a program that needs it fails to resolve the symbol.

// Names and signatures are the driver's; the manual documents them and their safety.
#![allow(non_snake_case, missing_docs, clippy::missing_safety_doc, clippy::too_many_arguments)]

pub mod context;
pub mod event;
pub mod graph;
pub mod identity;
pub mod memory;
pub mod module;
pub mod names;
pub mod resolve;
pub mod stream;
pub mod tools;

use crate::device::device;
use crate::{inject, report};
use std::ffi::c_void;

/// A call's result: nothing or a `CUresult`.
pub(crate) type Outcome = Result<(), u32>;

pub(crate) const INVALID_VALUE: u32 = 1;
pub(crate) const OUT_OF_MEMORY: u32 = 2;
pub(crate) const INVALID_DEVICE: u32 = 101;
pub(crate) const INVALID_IMAGE: u32 = 200;
pub(crate) const INVALID_CONTEXT: u32 = 201;
pub(crate) const NO_BINARY: u32 = 209;
pub(crate) const INVALID_PTX: u32 = 218;
pub(crate) const FILE_NOT_FOUND: u32 = 301;
pub(crate) const INVALID_HANDLE: u32 = 400;
pub(crate) const NOT_FOUND: u32 = 500;
pub(crate) const NOT_SUPPORTED: u32 = 801;

/// Runs an entry point, unless it is to fail; a panic in the library becomes `CUDA_ERROR_UNKNOWN`, not an unwind into C.
pub(crate) fn guard(name: &str, body: impl FnOnce() -> Outcome) -> u32 {
    if let Some((code, is_lasting)) = inject::failure(name) {
        report::set_message(&format!("{name} fails because it is told to"));
        if is_lasting {
            device().streams.set_error(code);
        }
        return code;
    }
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)) {
        Ok(Ok(())) => 0,
        Ok(Err(code)) => code,
        Err(_) => {
            report::set_message("the software device itself failed; the panic message is on standard error");
            999
        }
    }
}

/// Writes a result through a pointer of the caller.
///
/// # Errors
/// `INVALID_VALUE` for a null pointer.
///
/// # Safety
/// A pointer that is not null is valid for writes.
pub(crate) unsafe fn put<T>(target: *mut T, value: T) -> Outcome {
    if target.is_null() {
        return Err(INVALID_VALUE);
    }
    // SAFETY: the caller's promise.
    unsafe { target.write(value) };
    Ok(())
}

/// Keeps a message and fails with a code.
pub(crate) fn refuse<T>(code: u32, message: &str) -> Result<T, u32> {
    report::set_message(message);
    Err(code)
}

/// Defines exported functions whose bodies give an [`Outcome`].
macro_rules! exports {
    ($(fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $body:block)+) => {
        $(
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name($($arg: $ty),*) -> u32 {
                // SAFETY: the contract of the C function, as its manual states it: pointers are null or valid.
                #[allow(unused_unsafe)]
                $crate::driver::guard(stringify!($name), move || unsafe { $body })
            }
        )+
    };
}
pub(crate) use exports;

/// The same, and a table of them.
macro_rules! entries {
    ($(fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $body:block)+) => {
        $crate::driver::exports! { $(fn $name($($arg: $ty),*) $body)+ }

        /// Name and address of every function here.
        pub(super) fn table() -> Vec<(&'static str, *const std::ffi::c_void)> {
            vec![$((stringify!($name), $name as *const std::ffi::c_void)),+]
        }
    };
}
pub(crate) use entries;

/// All functions of all groups.
pub(crate) fn table() -> Vec<(&'static str, *const c_void)> {
    let groups = [
        context::table(),
        event::table(),
        graph::table(),
        identity::table(),
        memory::table(),
        module::table(),
        names::table(),
        resolve::table(),
        stream::table(),
        tools::table(),
    ];
    groups.concat()
}
