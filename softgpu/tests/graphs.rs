//! Graphs through the C interface: recorded, replayed, updated, and what a recording does not allow.

#[path = "support/calls.rs"]
mod calls;

use calls::{BYTES, WORDS, allocate, event, ok, pinned, read, run_cases, stream};
use softgpu::driver::{context::*, event::*, graph::*, memory::*, module::*, stream::*};
use softgpu::report;
use std::ffi::c_void;
use std::ptr::null_mut;

/// `CUstreamCaptureMode`.
const GLOBAL: u32 = 0;
const THREAD_LOCAL: u32 = 1;
const RELAXED: u32 = 2;

const UNSUPPORTED: u32 = 900;
const INVALIDATED: u32 = 901;
const UPDATE_FAILURE: u32 = 910;

/// Ends a recording that must be whole.
fn end(stream: usize) -> usize {
    let mut graph = 0;
    // SAFETY: a pointer to a local.
    ok(unsafe { cuStreamEndCapture(stream, &mut graph) });
    graph
}

fn instantiate(graph: usize) -> usize {
    let mut exec = 0;
    // SAFETY: a pointer to a local.
    ok(unsafe { cuGraphInstantiateWithFlags(&mut exec, graph, 0) });
    exec
}

fn launch(exec: usize, stream: usize) {
    // SAFETY: handles of the case.
    unsafe {
        ok(cuGraphLaunch(exec, stream));
        ok(cuStreamSynchronize(stream));
    }
}

fn status(stream: usize) -> u32 {
    let mut status = 9;
    // SAFETY: a pointer to a local.
    ok(unsafe { cuStreamIsCapturing(stream, &mut status) });
    status
}

/// A graph that fills memory with a number.
fn fill_graph(stream: usize, address: u64, number: u32) -> usize {
    // SAFETY: handles and addresses of the case.
    unsafe {
        ok(cuStreamBeginCapture_v2(stream, THREAD_LOCAL));
        ok(cuMemsetD32Async(address, number, WORDS, stream));
    }
    end(stream)
}

/// A recorded graph runs when launched, each time anew.
fn graph_replays() {
    let (a, s) = (allocate(), stream());
    let (mut graph, mut exec) = (0, 0);
    // SAFETY: handles and addresses of this case.
    unsafe {
        ok(cuMemsetD32Async(a, 1, WORDS, s));
        ok(cuStreamSynchronize(s));
        ok(cuStreamBeginCapture_v2(s, THREAD_LOCAL));
        ok(cuMemsetD32Async(a, 2, WORDS, s));
        ok(cuStreamEndCapture(s, &mut graph));
        ok(cuGraphInstantiateWithFlags(&mut exec, graph, 0));
        assert_eq!(read(a), [1; WORDS]);
        for _ in 0..2 {
            ok(cuGraphLaunch(exec, s));
            ok(cuStreamSynchronize(s));
            assert_eq!(read(a), [2; WORDS]);
            ok(cuMemsetD32_v2(a, 1, WORDS));
            ok(cuCtxSynchronize());
        }
    }
}

/// Arguments are those at the recording, and what they point to is what is there when the graph runs.
fn kernels_are_replayed() {
    let (s, source) = (stream(), pinned());
    let (mut module, mut kernel) = (0, 0);
    let text = std::ffi::CString::new(include_str!("ptx/vector_add.ptx")).expect("no zero in the text");
    let (a, b, c) = (allocate(), allocate(), allocate());
    let (mut pa, mut pb, mut pc, mut n) = (a, b, c, WORDS as i32);
    // SAFETY: handles and addresses of this case; the arguments are those of the kernel.
    unsafe {
        ok(cuModuleLoadData(&mut module, text.as_ptr().cast()));
        ok(cuModuleGetFunction(&mut kernel, module, c"vadd".as_ptr()));
        ok(cuMemsetD32_v2(b, 1f32.to_bits(), WORDS));
        ok(cuCtxSynchronize());
        ok(cuStreamBeginCapture_v2(s, THREAD_LOCAL));
        let mut args: [*mut c_void; 4] =
            [(&raw mut pa).cast(), (&raw mut pb).cast(), (&raw mut pc).cast(), (&raw mut n).cast()];
        ok(cuLaunchKernel(kernel, 8, 1, 1, 128, 1, 1, 0, s, args.as_mut_ptr(), null_mut()));
        let exec = instantiate(end(s));
        *args[0].cast::<u64>() = 0;
        for number in [2.0f32, 5.0] {
            source.fill(number.to_bits());
            ok(cuMemcpyHtoDAsync_v2(a, source.as_ptr().cast(), BYTES, s));
            launch(exec, s);
            assert_eq!(f32::from_bits(read(c)[WORDS - 1]), number + 1.0);
        }
    }
}

/// An update takes over parameters, and nothing where the operations are others.
fn graphs_are_updated() {
    let (a, b, s) = (allocate(), allocate(), stream());
    let exec = instantiate(fill_graph(s, a, 1));
    let mut result = UpdateResult { result: 9, error_node: 9, error_from_node: 9 };
    // SAFETY: handles and addresses of this case.
    unsafe {
        ok(cuMemsetD32_v2(b, 7, WORDS));
        ok(cuCtxSynchronize());
        let updated = fill_graph(s, b, 2);
        ok(cuGraphExecUpdate_v2(exec, updated, &mut result));
        assert_eq!(result.result, 0);
        ok(cuGraphDestroy(updated));
        launch(exec, s);
        assert_eq!(read(b), [2; WORDS]);

        ok(cuStreamBeginCapture_v2(s, THREAD_LOCAL));
        ok(cuMemcpyDtoDAsync_v2(a, b, BYTES, s));
        let other = end(s);
        assert_eq!(cuGraphExecUpdate_v2(exec, other, &mut result), UPDATE_FAILURE);
        assert_eq!(result.result, 3);
        ok(cuStreamBeginCapture_v2(s, THREAD_LOCAL));
        let empty = end(s);
        assert_eq!(cuGraphExecUpdate_v2(exec, empty, &mut result), UPDATE_FAILURE);
        assert_eq!(result.result, 2);
        let (mut nodes, mut count) = ([0; 2], 2);
        ok(cuGraphGetNodes(other, nodes.as_mut_ptr(), &mut count));
        assert_eq!((count, nodes[0] != 0, nodes[1]), (1, true, 0));
        launch(exec, s);
        ok(cuGraphExecDestroy(exec));
        assert_ne!(cuGraphLaunch(exec, s), 0);
    }
}

/// A second stream that joins is recorded too, and has to be waited for.
fn streams_join() {
    let (a, b, s, beside, began, ended) = (allocate(), allocate(), stream(), stream(), event(), event());
    // SAFETY: handles and addresses of this case.
    unsafe {
        for is_joined in [true, false] {
            ok(cuStreamBeginCapture_v2(s, THREAD_LOCAL));
            ok(cuMemsetD32Async(a, 3, WORDS, s));
            ok(cuEventRecord(began, s));
            ok(cuStreamWaitEvent(beside, began, 0));
            ok(cuMemcpyDtoDAsync_v2(b, a, BYTES, beside));
            assert_eq!((status(s), status(beside)), (1, 1));
            let mut graph = 9;
            // The end of the recording is where it began.
            assert_eq!(cuStreamEndCapture(beside, &mut graph), 903);
            ok(cuEventRecord(ended, beside));
            if is_joined {
                ok(cuStreamWaitEvent(s, ended, 0));
                launch(instantiate(end(s)), s);
                assert_eq!(read(b), [3; WORDS]);
            } else {
                assert_eq!((cuStreamEndCapture(s, &mut graph), graph), (904, 0));
            }
            assert_eq!((status(s), status(beside)), (0, 0));
        }
    }
}

/// What a recording cannot hold spoils it, and the stream is as before afterwards.
fn unsupported_calls_spoil_a_recording() {
    let (a, s, plain, recorded) = (allocate(), stream(), stream(), event());
    type Call = Box<dyn Fn() -> u32>;
    // SAFETY: handles and addresses of this case.
    let calls: [(&str, u32, Call); 8] = unsafe {
        [
            ("wait for the stream", UNSUPPORTED, Box::new(move || cuStreamSynchronize(s))),
            ("ask for the stream", UNSUPPORTED, Box::new(move || cuStreamQuery(s))),
            ("wait for all", UNSUPPORTED, Box::new(|| cuCtxSynchronize())),
            ("allocate", UNSUPPORTED, Box::new(|| cuMemAlloc_v2(&mut 0, 16))),
            ("free", UNSUPPORTED, Box::new(move || cuMemFree_v2(a))),
            ("pin", UNSUPPORTED, Box::new(|| cuMemHostAlloc(&mut null_mut(), 16, 0))),
            ("wait for a recorded event", 907, Box::new(move || cuEventSynchronize(recorded))),
            (
                "wait for an event outside",
                905,
                Box::new(move || {
                    let outside = event();
                    ok(cuEventRecord(outside, plain));
                    cuStreamWaitEvent(s, outside, 0)
                }),
            ),
        ]
    };
    for (what, wanted, call) in calls {
        let mut graph = 9;
        // SAFETY: handles and addresses of this case.
        unsafe {
            ok(cuStreamBeginCapture_v2(s, THREAD_LOCAL));
            ok(cuMemsetD32Async(a, 1, WORDS, s));
            ok(cuEventRecord(recorded, s));
            assert_eq!(call(), wanted, "{what}");
            assert_eq!(status(s), 2, "{what}");
            assert_eq!(cuMemsetD32Async(a, 2, WORDS, s), INVALIDATED, "{what}");
            assert_eq!((cuStreamEndCapture(s, &mut graph), graph), (INVALIDATED, 0), "{what}");
        }
        launch(instantiate(fill_graph(s, a, 4)), s);
        assert_eq!(read(a), [4; WORDS], "{what}");
    }
}

/// Whether another thread may allocate while a stream records depends on the mode; nobody may wait for all.
fn other_threads_and_recordings() {
    for (mode, wanted) in [(GLOBAL, UNSUPPORTED), (THREAD_LOCAL, 0), (RELAXED, 0)] {
        let (s, a) = (stream(), allocate());
        // SAFETY: handles and addresses of this case.
        unsafe {
            ok(cuStreamBeginCapture_v2(s, mode));
            ok(cuMemsetD32Async(a, 1, WORDS, s));
            assert_eq!(elsewhere(|| cuMemAlloc_v2(&mut 0, 16)), wanted, "mode {mode}");
            let mut graph = 0;
            if mode != RELAXED {
                assert_eq!(elsewhere(move || cuStreamEndCapture(s, &mut 0)), 908, "mode {mode}");
            }
            assert_eq!(elsewhere(|| cuCtxSynchronize()), UNSUPPORTED, "mode {mode}");
            assert_eq!(cuStreamEndCapture(s, &mut graph), INVALIDATED, "mode {mode}");
        }
    }
}

fn elsewhere(call: impl FnOnce() -> u32 + Send) -> u32 {
    let mut context = 0;
    // SAFETY: a pointer to a local; the context is the process's.
    unsafe { ok(cuCtxGetCurrent(&mut context)) };
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: as above.
            ok(unsafe { cuCtxSetCurrent(context) });
            call()
        });
        thread.join().expect("the call returns")
    })
}

/// Memory that was freed since is found when the graph runs.
fn freed_memory_in_a_graph() {
    let (a, s) = (allocate(), stream());
    let exec = instantiate(fill_graph(s, a, 1));
    // SAFETY: handles and addresses of this case.
    let code = unsafe {
        ok(cuMemFree_v2(a));
        cuGraphLaunch(exec, s) | cuStreamSynchronize(s)
    };
    assert_eq!(code, 700);
    assert!(report::message().contains("UseAfterFree"), "{}", report::message());
}

/// A graph is ordered like what else its stream is given.
fn graph_without_an_event() {
    let (a, b, s, copies) = (allocate(), allocate(), stream(), stream());
    let exec = instantiate(fill_graph(s, a, 7));
    // SAFETY: handles and addresses of this case.
    let code = unsafe {
        ok(cuMemsetD32_v2(a, 1, WORDS));
        ok(cuCtxSynchronize());
        ok(cuGraphLaunch(exec, s));
        cuMemcpyDtoDAsync_v2(b, a, BYTES, copies);
        cuStreamSynchronize(copies) | cuStreamSynchronize(s)
    };
    assert_eq!(code, 719);
    assert!(report::message().contains("StreamOrder"), "{}", report::message());
}

const CASES: [(&str, fn()); 8] = [
    ("graph_replays", graph_replays),
    ("kernels_are_replayed", kernels_are_replayed),
    ("graphs_are_updated", graphs_are_updated),
    ("streams_join", streams_join),
    ("unsupported_calls_spoil_a_recording", unsupported_calls_spoil_a_recording),
    ("other_threads_and_recordings", other_threads_and_recordings),
    ("freed_memory_in_a_graph", freed_memory_in_a_graph),
    ("graph_without_an_event", graph_without_an_event),
];

#[test]
fn every_case_in_every_mode() {
    run_cases("every_case_in_every_mode", &CASES);
}
