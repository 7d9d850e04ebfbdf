//! Calls of the C interface that most cases make, and cases that have a process each.
//!
//! The device is one per process and its mode comes from the environment, so each case runs in a process of its own: the
//! test starts itself again with the name of the case.

#![allow(dead_code)] // Each test program uses a part of it.

use softgpu::driver::{context::*, event::*, identity::*, memory::*, stream::*};
use softgpu::report;
use std::ffi::c_void;
use std::process::Command;
use std::ptr::null_mut;

/// Names the case that a process runs.
const CASE: &str = "SOFTGPU_TEST_CASE";
pub(crate) const WORDS: usize = 1024;
pub(crate) const BYTES: usize = WORDS * 4;
pub(crate) const NOT_READY: u32 = 600;

/// The outcome of a call that must succeed.
pub(crate) fn ok(code: u32) {
    assert_eq!(code, 0, "{}", report::message());
}

fn open() {
    let mut context = 0;
    // SAFETY: pointers to locals.
    unsafe {
        ok(cuInit(0));
        ok(cuDevicePrimaryCtxRetain(&mut context, 0));
        ok(cuCtxSetCurrent(context));
    }
}

pub(crate) fn allocate() -> u64 {
    let mut address = 0;
    // SAFETY: a pointer to a local.
    ok(unsafe { cuMemAlloc_v2(&mut address, BYTES) });
    address
}

pub(crate) fn stream() -> usize {
    let mut stream = 0;
    // SAFETY: a pointer to a local.
    ok(unsafe { cuStreamCreate(&mut stream, 1) });
    stream
}

pub(crate) fn event() -> usize {
    let mut event = 0;
    // SAFETY: a pointer to a local.
    ok(unsafe { cuEventCreate(&mut event, 0) });
    event
}

pub(crate) fn pinned() -> &'static mut [u32] {
    let mut pointer: *mut c_void = null_mut();
    // SAFETY: a pointer to a local; the memory has BYTES zeroed bytes and is never freed unless the case does.
    unsafe {
        ok(cuMemHostAlloc(&mut pointer, BYTES, 0));
        std::slice::from_raw_parts_mut(pointer.cast(), WORDS)
    }
}

pub(crate) fn read(address: u64) -> Vec<u32> {
    let mut words = vec![0u32; WORDS];
    // SAFETY: the target has BYTES bytes.
    ok(unsafe { cuMemcpyDtoH_v2(words.as_mut_ptr().cast(), address, BYTES) });
    words
}

/// Whether work runs only when something waits for it.
pub(crate) fn is_lazy() -> bool {
    std::env::var("SOFTGPU_STREAMS").as_deref() == Ok("lazy")
}

/// Runs every case in every mode, from the test of this name.
pub(crate) fn run_cases(test: &str, cases: &[(&str, fn())]) {
    if let Ok(name) = std::env::var(CASE) {
        let case = cases.iter().find(|(case, _)| *case == name).expect("a case").1;
        open();
        return case();
    }
    let program = std::env::current_exe().expect("a test program has a path");
    for (name, _) in cases {
        for (mode, seed) in [("eager", "0"), ("lazy", "0"), ("lazy", "1"), ("lazy", "2")] {
            let run = Command::new(&program)
                .args([test, "--exact", "--nocapture"])
                .env(CASE, name)
                .env("SOFTGPU_STREAMS", mode)
                .env("SOFTGPU_SEED", seed)
                .output()
                .expect("the program can be run again");
            let log = String::from_utf8_lossy(&run.stderr);
            assert!(run.status.success(), "{name}, {mode}, seed {seed}:\n{log}");
        }
    }
}
