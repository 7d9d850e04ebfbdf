//! Finding entry points by name.

use super::{INVALID_VALUE, NOT_FOUND, entries, put};
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

/// What `cuGetExportTable` gives: a table whose size says that there is nothing in it. NVRTC asks for one.
static EMPTY_TABLE: [u64; 1] = [8];

const FOUND: c_uint = 0;
const SYMBOL_NOT_FOUND: c_uint = 1;

/// The newest variant of a function: callers name it without `_v2`.
fn find(symbol: &str) -> Option<*const c_void> {
    let entries = super::table();
    let named = |name: String| entries.iter().find(|(entry, _)| *entry == name).map(|&(_, address)| address);
    ["_v4", "_v3", "_v2", ""].iter().find_map(|suffix| named(format!("{symbol}{suffix}")))
}

entries! {
    fn cuGetProcAddress_v2(
        symbol: *const c_char,
        target: *mut *const c_void,
        _version: c_int,
        _flags: u64,
        status: *mut c_uint,
    ) {
        if symbol.is_null() {
            return Err(INVALID_VALUE);
        }
        let found = find(&CStr::from_ptr(symbol).to_string_lossy());
        if !status.is_null() {
            put(status, if found.is_some() { FOUND } else { SYMBOL_NOT_FOUND })?;
        }
        put(target, found.unwrap_or(std::ptr::null()))?;
        found.map(drop).ok_or(NOT_FOUND)
    }

    fn cuGetExportTable(target: *mut *const c_void, _id: *const c_void) {
        put(target, EMPTY_TABLE.as_ptr().cast())
    }

    fn cuProfilerStart() {
        Ok(())
    }

    fn cuProfilerStop() {
        Ok(())
    }
}
