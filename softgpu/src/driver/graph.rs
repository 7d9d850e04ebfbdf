//! Graphs: recorded lists of operations, replayed in program order on the launching stream.

use super::context::need;
use super::{INVALID_HANDLE, INVALID_VALUE, entries, put};
use crate::device::device;
use crate::stream::Graph;
use std::collections::HashMap;
use std::ffi::{c_uint, c_ulonglong};
use std::sync::Mutex;

static GRAPHS: Mutex<Option<HashMap<usize, Graph>>> = Mutex::new(None);

/// Flags of `cuGraphInstantiateWithFlags` that may stand together: auto free, upload, node priority.
const KNOWN_FLAGS: u64 = 1 | 2 | 8;

fn with<T>(f: impl FnOnce(&mut HashMap<usize, Graph>) -> T) -> T {
    f(GRAPHS.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert_default())
}

fn keep(graph: Graph) -> usize {
    let handle = device().new_handle();
    with(|graphs| graphs.insert(handle, graph));
    handle
}

fn drop_graph(handle: usize) -> Result<(), u32> {
    with(|graphs| graphs.remove(&handle)).map(drop).ok_or(INVALID_HANDLE)
}

entries! {
    fn cuStreamBeginCapture_v2(stream: usize, _mode: c_uint) {
        need()?;
        device().streams.begin_capture(stream)
    }

    fn cuStreamEndCapture(stream: usize, graph: *mut usize) {
        need()?;
        let recorded = device().streams.end_capture(stream)?;
        put(graph, keep(recorded))
    }

    fn cuStreamIsCapturing(stream: usize, status: *mut c_uint) {
        need()?;
        put(status, c_uint::from(device().streams.is_capturing(stream)?))
    }

    fn cuGraphInstantiateWithFlags(exec: *mut usize, graph: usize, flags: c_ulonglong) {
        need()?;
        if flags & !KNOWN_FLAGS != 0 {
            return Err(INVALID_VALUE);
        }
        let copy = with(|graphs| graphs.get(&graph).cloned()).ok_or(INVALID_HANDLE)?;
        put(exec, keep(copy))
    }

    fn cuGraphUpload(exec: usize, _stream: usize) {
        need()?;
        with(|graphs| graphs.contains_key(&exec)).then_some(()).ok_or(INVALID_HANDLE)
    }

    fn cuGraphLaunch(exec: usize, stream: usize) {
        need()?;
        let work = with(|graphs| graphs.get(&exec).cloned()).ok_or(INVALID_HANDLE)?;
        for item in work {
            device().streams.push(stream, item)?;
        }
        Ok(())
    }

    fn cuGraphExecDestroy(exec: usize) {
        drop_graph(exec)
    }

    fn cuGraphDestroy(graph: usize) {
        drop_graph(graph)
    }
}
