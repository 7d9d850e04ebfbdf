//! Graphs: recorded lists of operations, replayed in program order on the launching stream.

use super::context::need;
use super::{INVALID_HANDLE, INVALID_VALUE, entries, put, refuse};
use crate::capture::Graph;
use crate::device::device;
use std::collections::HashMap;
use std::ffi::{c_uint, c_ulonglong};
use std::mem::discriminant;
use std::sync::Mutex;

/// What there are handles of.
#[derive(Default)]
struct Handles {
    recorded: HashMap<usize, Graph>,
    /// Ready to be launched.
    executable: HashMap<usize, Graph>,
}

/// `CUgraphExecUpdateResultInfo`. There are no handles of nodes.
#[repr(C)]
#[derive(Debug)]
pub struct UpdateResult {
    /// `CUgraphExecUpdateResult`.
    pub result: c_uint,
    /// The node that could not be updated.
    pub error_node: usize,
    /// The node that it depends on.
    pub error_from_node: usize,
}

static HANDLES: Mutex<Option<Handles>> = Mutex::new(None);

/// Flags of `cuGraphInstantiateWithFlags` that may stand together: auto free, upload, node priority.
const KNOWN_FLAGS: u64 = 1 | 2 | 8;

const UPDATE_FAILURE: u32 = 910;
const UPDATED: c_uint = 0;
const TOPOLOGY_CHANGED: c_uint = 2;
const NODE_TYPE_CHANGED: c_uint = 3;

fn with<T>(f: impl FnOnce(&mut Handles) -> T) -> T {
    f(HANDLES.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert_default())
}

fn recorded(graph: usize) -> Result<Graph, u32> {
    with(|handles| handles.recorded.get(&graph).cloned()).ok_or(INVALID_HANDLE)
}

/// Why an executable graph cannot be made to do `wanted`: parameters may differ, the kinds of operations and their order
/// may not.
fn update_problem(known: &Graph, wanted: &Graph) -> Option<c_uint> {
    if known.len() != wanted.len() {
        return Some(TOPOLOGY_CHANGED);
    }
    let is_other = known.iter().zip(wanted).any(|(known, wanted)| discriminant(known) != discriminant(wanted));
    is_other.then_some(NODE_TYPE_CHANGED)
}

entries! {
    fn cuStreamBeginCapture_v2(stream: usize, mode: c_uint) {
        need()?;
        device().streams.begin_capture(stream, mode)
    }

    // After an error there is no graph, and the stream records no more.
    fn cuStreamEndCapture(stream: usize, graph: *mut usize) {
        need()?;
        if graph.is_null() {
            return Err(INVALID_VALUE);
        }
        put(graph, 0)?;
        let recorded = device().streams.end_capture(stream)?;
        let handle = device().new_handle();
        with(|handles| handles.recorded.insert(handle, recorded));
        put(graph, handle)
    }

    fn cuStreamIsCapturing(stream: usize, status: *mut c_uint) {
        need()?;
        put(status, device().streams.capture_status(stream)?)
    }

    fn cuGraphInstantiateWithFlags(exec: *mut usize, graph: usize, flags: c_ulonglong) {
        need()?;
        if flags & !KNOWN_FLAGS != 0 {
            return Err(INVALID_VALUE);
        }
        let copy = recorded(graph)?;
        let handle = device().new_handle();
        with(|handles| handles.executable.insert(handle, copy));
        put(exec, handle)
    }

    // Nodes in the order of their recording.
    fn cuGraphGetNodes(graph: usize, nodes: *mut usize, count: *mut usize) {
        let found = recorded(graph)?.len();
        if count.is_null() {
            return Err(INVALID_VALUE);
        }
        if !nodes.is_null() {
            let room = count.read();
            (0..room).try_for_each(|at| put(nodes.add(at), if at < found { graph + 1 + at } else { 0 }))?;
        }
        put(count, found)
    }

    fn cuGraphExecUpdate_v2(exec: usize, graph: usize, result: *mut UpdateResult) {
        need()?;
        let wanted = recorded(graph)?;
        let problem = with(|handles| {
            let known = handles.executable.get_mut(&exec).ok_or(INVALID_HANDLE)?;
            let problem = update_problem(known, &wanted);
            if problem.is_none() {
                *known = wanted;
            }
            Ok::<_, u32>(problem)
        })?;
        if !result.is_null() {
            put(result, UpdateResult { result: problem.unwrap_or(UPDATED), error_node: 0, error_from_node: 0 })?;
        }
        match problem {
            None => Ok(()),
            Some(_) => refuse(UPDATE_FAILURE, "the graph has other operations than the one to be updated"),
        }
    }

    fn cuGraphUpload(exec: usize, _stream: usize) {
        need()?;
        with(|handles| handles.executable.contains_key(&exec)).then_some(()).ok_or(INVALID_HANDLE)
    }

    fn cuGraphLaunch(exec: usize, stream: usize) {
        need()?;
        let work = with(|handles| handles.executable.get(&exec).cloned()).ok_or(INVALID_HANDLE)?;
        for item in work {
            device().streams.push(stream, item)?;
        }
        Ok(())
    }

    fn cuGraphExecDestroy(exec: usize) {
        with(|handles| handles.executable.remove(&exec)).map(drop).ok_or(INVALID_HANDLE)
    }

    fn cuGraphDestroy(graph: usize) {
        with(|handles| handles.recorded.remove(&graph)).map(drop).ok_or(INVALID_HANDLE)
    }
}
