//! What a real driver does not have: findings and counters, for tests.

use super::{INVALID_VALUE, NOT_FOUND, entries, put, refuse};
use crate::counters::Counters;
use crate::device::device;
use crate::{cublaslt, inject, report};
use std::ffi::{CStr, c_char, c_uint};

/// Copies text with its terminator into a buffer, cut to fit. `needed` (may be null) gets the bytes for all of it.
///
/// # Safety
/// `buffer` is null or has `length` bytes.
unsafe fn copy_text(text: &str, buffer: *mut c_char, length: usize, needed: *mut usize) -> Result<(), u32> {
    // SAFETY: the caller's promise; the end is inside the buffer.
    unsafe {
        if !needed.is_null() {
            put(needed, text.len() + 1)?;
        }
        if buffer.is_null() || length == 0 {
            return Ok(());
        }
        let n = text.len().min(length - 1);
        std::ptr::copy_nonoverlapping(text.as_ptr().cast(), buffer, n);
        put(buffer.add(n), 0)
    }
}

entries! {
    // The last finding or refusal as text; empty if there was none.
    fn softgpu_last_error_message(buffer: *mut c_char, length: usize, needed: *mut usize) {
        copy_text(&report::message(), buffer, length, needed)
    }

    // Forgets the last finding: calls work again.
    fn softgpu_clear_error() {
        device().streams.clear_error();
        report::clear_message();
        Ok(())
    }

    // Totals of one kernel, in the order of `Counters`.
    fn softgpu_kernel_counters(kernel: *const c_char, counters: *mut Counters) {
        if kernel.is_null() {
            return Err(INVALID_VALUE);
        }
        let found = report::counters(&CStr::from_ptr(kernel).to_string_lossy());
        put(counters, found.ok_or(NOT_FOUND)?)
    }

    // Copies from the host to the device run only when the program has launched so many more kernels.
    fn softgpu_hold_copies(launches: u64) {
        device().streams.hold_copies(launches);
        Ok(())
    }

    // Copies between the host and the device stand still on streams that never launched a kernel, until told otherwise.
    fn softgpu_stall_copies(is_stalled: c_uint) {
        device().streams.stall_copies(is_stalled != 0);
        Ok(())
    }

    // Page-locked memory that there is in all.
    fn softgpu_limit_pinned(bytes: u64) {
        device().pinned.limit(bytes);
        Ok(())
    }

    // Page-locked memory in use.
    fn softgpu_pinned_bytes(bytes: *mut u64) {
        put(bytes, device().pinned.num_bytes())
    }

    // How often cuBLASLt was asked for algorithms, and for products, since the start.
    fn softgpu_cublaslt_counts(heuristics: *mut u64, products: *mut u64) {
        let [asked, queued] = cublaslt::counts();
        put(heuristics, asked)?;
        put(products, queued)
    }

    // Which calls fail from now on; `inject.rs` says how they are named.
    fn softgpu_fail(rules: *const c_char) {
        if rules.is_null() {
            return Err(INVALID_VALUE);
        }
        inject::arm(&CStr::from_ptr(rules).to_string_lossy()).or_else(|problem| refuse(INVALID_VALUE, &problem))
    }

    // All kernels as JSON.
    fn softgpu_report(buffer: *mut c_char, length: usize, needed: *mut usize) {
        copy_text(&report::json(), buffer, length, needed)
    }

    fn softgpu_reset_counters() {
        report::reset();
        Ok(())
    }
}
