//! What happened: the last finding, and counters per kernel, written to `SOFTGPU_REPORT` when the program ends.

use crate::counters::Counters;
use crate::roofline::{DEVICES, Estimate};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Mutex, MutexGuard, Once};

static KERNELS: Mutex<BTreeMap<String, Counters>> = Mutex::new(BTreeMap::new());
static MESSAGE: Mutex<String> = Mutex::new(String::new());
static AT_EXIT: Once = Once::new();

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// Keeps a message for [`message`] and writes it to standard error unless `SOFTGPU_QUIET` is set.
pub fn set_message(text: &str) {
    if std::env::var_os("SOFTGPU_QUIET").is_none() {
        eprintln!("softgpu: {text}");
    }
    *lock(&MESSAGE) = text.to_owned();
}

/// The last finding or refusal, empty if there was none.
pub fn message() -> String {
    lock(&MESSAGE).clone()
}

/// Forgets the message.
pub fn clear_message() {
    lock(&MESSAGE).clear();
}

/// Adds a launch to its kernel's totals.
pub fn add(kernel: &str, counters: Counters) {
    *lock(&KERNELS).entry(kernel.to_owned()).or_default() += counters;
    AT_EXIT.call_once(|| {
        if std::env::var_os("SOFTGPU_REPORT").is_some() {
            // SAFETY: `write_report` is a C function that does not unwind.
            unsafe { atexit(write_report) };
        }
    });
}

/// Totals of one kernel.
pub fn counters(kernel: &str) -> Option<Counters> {
    lock(&KERNELS).get(kernel).copied()
}

/// Forgets all totals.
pub fn reset() {
    lock(&KERNELS).clear();
}

/// All kernels as JSON: an object per kernel with every counter, the ratios people look at, and estimates for real devices.
pub fn json() -> String {
    let mut out = String::from("{\n");
    let kernels = lock(&KERNELS);
    for (i, (name, counters)) in kernels.iter().enumerate() {
        let _ = write!(out, "  \"{name}\": {{");
        for (field, value) in counters.fields() {
            let _ = write!(out, "\"{field}\": {value}, ");
        }
        let _ = writeln!(
            out,
            "\"simt_efficiency\": {:.4}, \"load_efficiency\": {:.4}, \"roofline_estimates_not_times\": {{{}}}}}{}",
            counters.simt_efficiency(),
            counters.load_efficiency(),
            roofline_estimates(counters),
            if i + 1 < kernels.len() { "," } else { "" }
        );
    }
    out + "}\n"
}

/// For each device, microseconds and what they are bound by.
fn roofline_estimates(counters: &Counters) -> String {
    let members = DEVICES.map(|device| {
        let Estimate { seconds, limit } = device.estimate(counters);
        format!("\"{}\": {{\"least_us\": {:.4}, \"bound_by\": \"{limit}\"}}", device.name, seconds * 1e6)
    });
    members.join(", ")
}

extern "C" fn write_report() {
    if let Some(path) = std::env::var_os("SOFTGPU_REPORT")
        && let Err(error) = std::fs::write(&path, json())
    {
        eprintln!("softgpu: cannot write {}: {error}", path.display());
    }
}

unsafe extern "C" {
    fn atexit(function: extern "C" fn()) -> i32;
}
