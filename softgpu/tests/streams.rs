//! Streams, events and copies through the C interface, eager and lazy, right and wrong.

#[path = "support/calls.rs"]
mod calls;

use calls::{BYTES, NOT_READY, WORDS, allocate, event, is_lazy, ok, pinned, read, run_cases, stream};
use softgpu::driver::{context::*, event::*, memory::*, module::*, stream::*, tools::*};
use softgpu::report;
use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

/// Host functions that have met another.
static MEETINGS: AtomicU32 = AtomicU32::new(0);

const INVALID_HANDLE: u32 = 400;

/// How long one waits for the other.
const PATIENCE: Duration = Duration::from_secs(60);

/// Writes in one stream, an event, a copy in another: the right way.
fn ordered_by_an_event() {
    let (a, b, copies, compute, ready) = (allocate(), allocate(), stream(), stream(), event());
    // SAFETY: handles and addresses of this case.
    unsafe {
        ok(cuMemsetD32Async(a, 7, WORDS, compute));
        ok(cuEventRecord(ready, compute));
        ok(cuStreamWaitEvent(copies, ready, 0));
        ok(cuMemcpyDtoDAsync_v2(b, a, BYTES, copies));
        ok(cuStreamSynchronize(copies));
    }
    assert_eq!(read(b), [7; WORDS]);
}

/// The same without the event.
fn copy_without_an_event() {
    let (a, b, copies, compute) = (allocate(), allocate(), stream(), stream());
    // SAFETY: handles and addresses of this case.
    let code = unsafe {
        ok(cuMemsetD32_v2(a, 1, WORDS));
        ok(cuCtxSynchronize());
        ok(cuMemsetD32Async(a, 7, WORDS, compute));
        cuMemcpyDtoDAsync_v2(b, a, BYTES, copies);
        cuStreamSynchronize(copies) | cuStreamSynchronize(compute)
    };
    assert_eq!(code, 719);
    assert!(report::message().contains("StreamOrder"), "{}", report::message());
}

/// A stream that begins where one has ended whose work the host has seen complete: its handle is another.
fn streams_after_an_end() {
    let (a, old) = (allocate(), stream());
    // SAFETY: handles and addresses of this case.
    let new = unsafe {
        ok(cuMemsetD32Async(a, 7, WORDS, old));
        ok(cuCtxSynchronize());
        ok(cuStreamDestroy_v2(old));
        let new = stream();
        assert_ne!(new, old);
        assert_eq!(cuMemsetD32Async(a, 8, WORDS, old), INVALID_HANDLE);
        ok(cuMemsetD32Async(a, 9, WORDS, new));
        ok(cuStreamSynchronize(new));
        new
    };
    assert_eq!(read(a), [9; WORDS]);
    // SAFETY: a handle of this case.
    ok(unsafe { cuStreamDestroy_v2(new) });
}

/// Nobody waits for the work of a stream that has ended: another one is not ordered behind it.
fn copy_after_an_end() {
    let (a, b, old) = (allocate(), allocate(), stream());
    // SAFETY: handles and addresses of this case.
    let code = unsafe {
        ok(cuMemsetD32_v2(a, 1, WORDS));
        ok(cuCtxSynchronize());
        ok(cuMemsetD32Async(a, 7, WORDS, old));
        ok(cuStreamDestroy_v2(old));
        cuMemcpyDtoDAsync_v2(b, a, BYTES, stream());
        cuCtxSynchronize()
    };
    assert_eq!(code, 719);
    assert!(report::message().contains("StreamOrder"), "{}", report::message());
}

/// A kernel in one stream reads what a copy in another brings.
fn kernel_without_an_event() {
    let (a, copies, compute) = (allocate(), stream(), stream());
    let (mut module, mut kernel) = (0, 0);
    let text = std::ffi::CString::new(include_str!("ptx/vector_add.ptx")).expect("no zero in the text");
    let (mut pa, mut pb, mut pc, mut n) = (a, a, allocate(), WORDS as i32);
    let source = pinned();
    // SAFETY: handles and addresses of this case; the arguments are those of the kernel.
    let code = unsafe {
        ok(cuModuleLoadData(&mut module, text.as_ptr().cast()));
        ok(cuModuleGetFunction(&mut kernel, module, c"vadd".as_ptr()));
        ok(cuMemsetD32_v2(a, 0, WORDS));
        ok(cuCtxSynchronize());
        let mut args: [*mut c_void; 4] =
            [(&raw mut pa).cast(), (&raw mut pb).cast(), (&raw mut pc).cast(), (&raw mut n).cast()];
        ok(cuMemcpyHtoDAsync_v2(a, source.as_ptr().cast(), BYTES, copies));
        cuLaunchKernel(kernel, 8, 1, 1, 128, 1, 1, 0, compute, args.as_mut_ptr(), null_mut());
        cuStreamSynchronize(compute) | cuStreamSynchronize(copies)
    };
    assert_eq!(code, 719);
    assert!(report::message().contains("StreamOrder"), "{}", report::message());
}

/// Tells the host function of another stream that this one runs, and waits for the other's word.
unsafe extern "C" fn meet(argument: *mut c_void) {
    // SAFETY: `streams_run_at_once` keeps it alive until both streams are done.
    let (sender, receiver) = unsafe { &*argument.cast::<(Sender<()>, Mutex<Receiver<()>>)>() };
    let met = sender.send(()).is_ok() && receiver.lock().is_ok_and(|other| other.recv_timeout(PATIENCE).is_ok());
    MEETINGS.fetch_add(u32::from(met), Relaxed);
}

/// Streams that nothing orders run at once where the host has threads for them.
fn streams_run_at_once() {
    if is_lazy() || softgpu::exec::launch::host_threads() < 2 {
        return;
    }
    let ((first_sender, first), (second_sender, second)) = (channel::<()>(), channel::<()>());
    let ends = [(first_sender, Mutex::new(second)), (second_sender, Mutex::new(first))];
    for end in &ends {
        // SAFETY: `meet` takes such an end, which lives until the streams are done.
        ok(unsafe { cuLaunchHostFunc(stream(), Some(meet), std::ptr::from_ref(end).cast_mut().cast()) });
    }
    // SAFETY: no arguments.
    ok(unsafe { cuCtxSynchronize() });
    assert_eq!(MEETINGS.load(Relaxed), 2);
}

/// An asynchronous copy to the host has not happened before its stream is waited for.
fn copies_complete_later() {
    let (a, s, target) = (allocate(), stream(), pinned());
    // SAFETY: handles and addresses of this case.
    unsafe {
        ok(cuMemsetD32_v2(a, 5, WORDS));
        ok(cuCtxSynchronize());
        ok(cuMemcpyDtoHAsync_v2(target.as_mut_ptr().cast(), a, BYTES, s));
    }
    if is_lazy() {
        assert_eq!(target[0], 0xdbdb_dbdb, "too early a read must not see the data");
    }
    // SAFETY: a handle of this case.
    ok(unsafe { cuStreamSynchronize(s) });
    assert_eq!(target, [5; WORDS]);
}

/// Page-locked memory changed between the call and the copy. Eager streams may be quicker than the change.
fn source_changed_too_early() {
    let (a, s, source) = (allocate(), stream(), pinned());
    // SAFETY: handles and addresses of this case.
    let code = unsafe {
        ok(cuMemcpyHtoDAsync_v2(a, source.as_ptr().cast(), BYTES, s));
        source[3] = 1;
        cuStreamSynchronize(s)
    };
    if is_lazy() {
        assert_eq!(code, 719);
        assert!(report::message().contains("HostBuffer"), "{}", report::message());
    }
}

fn source_freed_too_early() {
    let (a, s, source) = (allocate(), stream(), pinned());
    // SAFETY: handles and addresses of this case.
    let code = unsafe {
        ok(cuMemcpyHtoDAsync_v2(a, source.as_ptr().cast(), BYTES, s));
        cuMemFreeHost(source.as_mut_ptr().cast())
    };
    if is_lazy() {
        assert_eq!(code, 719);
        assert!(report::message().contains("HostBuffer"), "{}", report::message());
    }
}

fn uninitialised_to_the_host() {
    let a = allocate();
    let mut words = vec![0u32; WORDS];
    // SAFETY: addresses of this case.
    let code = unsafe { cuMemcpyDtoH_v2(words.as_mut_ptr().cast(), a, BYTES) };
    assert_eq!(code, 719);
    assert!(report::message().contains("Uninitialised"), "{}", report::message());
}

fn freed_twice() {
    let a = allocate();
    // SAFETY: addresses of this case.
    let (first, second) = unsafe { (cuMemFree_v2(a), cuMemFree_v2(a)) };
    assert_eq!((first, second), (0, 1));
    assert!(report::message().contains("second free"), "{}", report::message());
}

fn used_after_free() {
    let (a, s) = (allocate(), stream());
    // SAFETY: addresses of this case.
    let code = unsafe {
        ok(cuMemFreeAsync(a, s));
        cuMemsetD8Async(a, 0, 16, s);
        cuStreamSynchronize(s)
    };
    assert_eq!(code, 700);
    assert!(report::message().contains("UseAfterFree"), "{}", report::message());
}

/// A poll does not lie, and a program that polls comes to an end.
fn polling_ends() {
    let (a, s, done) = (allocate(), stream(), event());
    // SAFETY: handles and addresses of this case.
    unsafe {
        ok(cuMemsetD32Async(a, 3, WORDS, s));
        ok(cuEventRecord(done, s));
        let mut polls = 0;
        loop {
            match cuEventQuery(done) {
                0 => break,
                code => assert_eq!(code, NOT_READY),
            }
            polls += 1;
            assert!(polls < 1_000_000);
            std::thread::yield_now();
        }
        if is_lazy() {
            assert!(polls > 0);
        }
    }
    assert_eq!(read(a), [3; WORDS]);
}

/// Launches that the kernel or the device does not allow.
fn launch_shape() {
    let (mut module, mut kernel) = (0, 0);
    let text = std::ffi::CString::new(include_str!("ptx/vector_add.ptx")).expect("no zero in the text");
    // SAFETY: the launches are refused before the arguments are looked at.
    unsafe {
        ok(cuModuleLoadData(&mut module, text.as_ptr().cast()));
        ok(cuModuleGetFunction(&mut kernel, module, c"vadd".as_ptr()));
        for (block, shared) in [(2048, 0), (0, 0), (128, 49 << 10)] {
            assert_eq!(cuLaunchKernel(kernel, 1, 1, 1, block, 1, 1, shared, 0, null_mut(), null_mut()), 1);
            assert!(report::message().contains("LaunchShape"), "{}", report::message());
        }
        ok(cuFuncSetAttribute(kernel, 8, 160 << 10));
        assert_eq!(cuFuncSetAttribute(kernel, 8, 164 << 10), 1);
    }
}

/// A host pointer given to a copy as a device address.
fn host_address() {
    let words = [0u32; 4];
    // SAFETY: the copy is refused.
    let code = unsafe { cuMemsetD8_v2(words.as_ptr() as u64, 0, 16) | cuCtxSynchronize() };
    assert_eq!(code, 700);
    assert!(report::message().contains("host address"), "{}", report::message());
}

/// The middle words of four rows of eight, to rows twice as long.
fn rows_to_the_device() {
    let (a, s, source) = (allocate(), stream(), pinned());
    (0..).zip(source.iter_mut()).for_each(|(at, word)| *word = at);
    let copy = Copy2D {
        source_x: 8,
        source_y: 1,
        source_type: 1,
        source_host: source.as_ptr().cast(),
        source_device: 0,
        source_array: 0,
        source_pitch: 32,
        target_x: 4,
        target_y: 0,
        target_type: 2,
        target_host: null_mut(),
        target_device: a,
        target_array: 0,
        target_pitch: 64,
        width: 16,
        height: 4,
    };
    // SAFETY: handles and addresses of this case.
    unsafe {
        ok(cuMemsetD32_v2(a, 99, WORDS));
        ok(cuCtxSynchronize());
        ok(cuMemcpy2DAsync_v2(&copy, s));
        ok(cuStreamSynchronize(s));
        let wide = Copy2D { width: 25, ..copy };
        assert_eq!(cuMemcpy2DAsync_v2(&wide, s), 1, "a row is longer than its pitch");
    }
    let mut wanted = vec![99; WORDS];
    for row in 0..4 {
        (0..4).for_each(|word| wanted[16 * row + 1 + word] = (8 * (row + 1) + 2 + word) as u32);
    }
    assert_eq!(read(a), wanted);
}

/// Held copies run when enough kernels are launched, which do not wait for them.
fn held_copies() {
    let (a, copies, compute, done) = (allocate(), stream(), stream(), event());
    let (mut module, mut kernel) = (0, 0);
    let text = std::ffi::CString::new(include_str!("ptx/vector_add.ptx")).expect("no zero in the text");
    let (mut pa, mut pb, mut pc, mut n) = (allocate(), allocate(), allocate(), WORDS as i32);
    let source = pinned();
    source.fill(4);
    // SAFETY: handles and addresses of this case; the arguments are those of the kernel.
    unsafe {
        ok(cuModuleLoadData(&mut module, text.as_ptr().cast()));
        ok(cuModuleGetFunction(&mut kernel, module, c"vadd".as_ptr()));
        ok(cuMemsetD32_v2(pa, 0, WORDS));
        ok(cuMemsetD32_v2(pb, 0, WORDS));
        ok(cuCtxSynchronize());
        ok(softgpu_hold_copies(2));
        ok(cuMemcpyHtoDAsync_v2(a, source.as_ptr().cast(), BYTES, copies));
        ok(cuEventRecord(done, copies));
        for _ in 0..2 {
            (0..8).for_each(|_| assert_eq!(cuEventQuery(done), NOT_READY));
            let mut args: [*mut c_void; 4] =
                [(&raw mut pa).cast(), (&raw mut pb).cast(), (&raw mut pc).cast(), (&raw mut n).cast()];
            ok(cuLaunchKernel(kernel, 8, 1, 1, 128, 1, 1, 0, compute, args.as_mut_ptr(), null_mut()));
        }
        ok(cuEventSynchronize(done));
    }
    assert_eq!(read(a), [4; WORDS]);
}

const CASES: [(&str, fn()); 17] = [
    ("ordered_by_an_event", ordered_by_an_event),
    ("copy_without_an_event", copy_without_an_event),
    ("streams_after_an_end", streams_after_an_end),
    ("copy_after_an_end", copy_after_an_end),
    ("kernel_without_an_event", kernel_without_an_event),
    ("streams_run_at_once", streams_run_at_once),
    ("copies_complete_later", copies_complete_later),
    ("source_changed_too_early", source_changed_too_early),
    ("source_freed_too_early", source_freed_too_early),
    ("uninitialised_to_the_host", uninitialised_to_the_host),
    ("freed_twice", freed_twice),
    ("used_after_free", used_after_free),
    ("polling_ends", polling_ends),
    ("launch_shape", launch_shape),
    ("host_address", host_address),
    ("rows_to_the_device", rows_to_the_device),
    ("held_copies", held_copies),
];

#[test]
fn every_case_in_every_mode() {
    run_cases("every_case_in_every_mode", &CASES);
}
