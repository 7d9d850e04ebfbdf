//! Decode steps as CUDA graphs: what a step of some shape queues is recorded, and queued again in one call.
//!
//! There is one graph per number of sequences, for the shape that such a step had last. A shape is recorded when it is seen
//! for the second time in a row: what was queued the ordinary way before has every kernel loaded. A graph of the same
//! kernels on other shapes is updated rather than made anew.
//!
//! While a stream records, no thread may wait for the whole device, so those who do take turns with recordings here.

#![allow(unsafe_code)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use cudarc::driver::{CudaContext, DriverError, result, sys};

use super::driver::{driver_error, missing_for_graphs};
use super::stream::CudaStream;
use crate::Result;
use crate::backend::DecodeShape;
use crate::telemetry::{Degradation, Degradations};

/// Graphs that are kept; the one that was used least lately makes room. A graph takes the host some hundred kilobytes.
const MAX_GRAPHS: usize = 64;

/// Recordings in a row that may fail before no more is tried.
const MAX_FAILURES: u32 = 4;

/// Held by whoever records, and by whoever waits for the whole device.
static TURN: Mutex<()> = Mutex::new(());

fn take_turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Waits until the device has done all it was given, on any stream. Not to be called by who records.
pub(super) fn wait_for_all(context: &CudaContext) -> std::result::Result<(), DriverError> {
    let _turn = take_turn();
    context.synchronize()
}

/// The graphs of one device.
pub(super) struct Graphs {
    context: Arc<CudaContext>,
    is_enabled: AtomicBool,
    kept: Mutex<Kept>,
    degradations: Degradations,
}

#[derive(Default)]
struct Kept {
    entries: Vec<Entry>,
    /// Goes up with every step.
    clock: u64,
    num_failures: u32,
}

/// Steps of one number of sequences.
struct Entry {
    /// What the last of them was.
    shape: DecodeShape,
    graph: Option<Graph>,
    last_used: u64,
}

/// A graph that can be launched, and what it was recorded of.
struct Graph {
    exec: Exec,
    shape: DecodeShape,
}

/// How a step is queued.
enum Way {
    /// By calling what queues it.
    Anew,
    /// The same, recorded.
    Recorded,
    /// By its graph.
    Again,
}

impl Graphs {
    pub(super) fn new(context: &Arc<CudaContext>, degradations: &Degradations) -> Self {
        let (is_enabled, degradations) = (AtomicBool::new(true), degradations.clone());
        let graphs = Self { context: Arc::clone(context), is_enabled, kept: Mutex::default(), degradations };
        if let Some(name) = missing_for_graphs() {
            graphs.give_up(&format!("the NVIDIA driver has no {name}"));
        }
        graphs
    }

    /// Has every step queued anew from now on, though that was not asked for.
    fn give_up(&self, why: &str) {
        self.is_enabled.store(false, Ordering::Relaxed);
        self.degradations.report(Degradation::CudaGraphs, format!("{why}: decode steps are launched kernel by kernel"));
    }

    pub(super) fn is_enabled(&self) -> bool {
        self.is_enabled.load(Ordering::Relaxed)
    }

    /// Has every step queued anew from now on, as was asked for.
    pub(super) fn disable(&self) {
        self.is_enabled.store(false, Ordering::Relaxed);
        self.degradations.clear(Degradation::CudaGraphs);
    }

    /// See [`Backend::repeat_step`](crate::backend::Backend::repeat_step).
    pub(super) fn repeat(
        &self,
        stream: &CudaStream,
        shape: DecodeShape,
        queue: &mut dyn FnMut() -> Result<()>,
    ) -> Result<bool> {
        if !self.is_enabled() {
            return queue().map(|()| false);
        }
        let mut kept = self.kept.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let (entry, way) = kept.visit(shape);
        match way {
            Way::Anew => queue().map(|()| false),
            Way::Again => entry.launch(stream).map(|()| true),
            Way::Recorded => match self.record(stream, shape, entry.graph.take(), queue) {
                Ok(graph) => {
                    entry.graph = Some(graph);
                    entry.launch(stream)?;
                    kept.num_failures = 0;
                    Ok(false)
                }
                // Nothing was queued. What is wrong with the step itself is said now.
                Err(error) => {
                    kept.num_failures += 1;
                    if kept.num_failures == MAX_FAILURES {
                        self.give_up(&error.to_string());
                    }
                    queue().map(|()| false)
                }
            },
        }
    }

    /// Records what `queue` queues, into the graph there was if that is of the same kernels.
    fn record(
        &self,
        stream: &CudaStream,
        shape: DecodeShape,
        known: Option<Graph>,
        queue: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Graph> {
        let recorded = self.capture(stream, queue)?;
        let exec = match known {
            Some(Graph { exec, .. }) if recorded.update(&exec) => exec,
            _ => recorded.instantiate()?,
        };
        Ok(Graph { exec, shape })
    }

    fn capture(&self, stream: &CudaStream, queue: &mut dyn FnMut() -> Result<()>) -> Result<Recorded> {
        let error = driver_error("record a step as a CUDA graph");
        let _turn = take_turn();
        // Other threads may allocate meanwhile.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        stream.get().begin_capture(mode).map_err(&error)?;
        let queued = queue();
        // SAFETY: the stream lives as long as the reference to it. It records no more afterwards, whatever comes of it.
        let graph = unsafe { result::stream::end_capture(stream.get().cu_stream()) };
        let recorded = graph.map(|graph| Recorded { graph, context: Arc::clone(&self.context) });
        queued.and(recorded.map_err(error))
    }
}

impl Kept {
    /// The entry of a step, and how to queue it.
    fn visit(&mut self, shape: DecodeShape) -> (&mut Entry, Way) {
        self.clock += 1;
        let known = self.entries.iter().position(|entry| entry.shape.num_seqs == shape.num_seqs);
        let is_new = known.is_none();
        let at = known.unwrap_or_else(|| self.make_room(shape));
        let entry = &mut self.entries[at];
        let is_same = !is_new && entry.shape == shape;
        (entry.shape, entry.last_used) = (shape, self.clock);
        let way = match &entry.graph {
            Some(graph) if graph.shape == shape => Way::Again,
            _ if is_same => Way::Recorded,
            _ => Way::Anew,
        };
        (entry, way)
    }

    fn make_room(&mut self, shape: DecodeShape) -> usize {
        if self.entries.len() == MAX_GRAPHS {
            let oldest = (0..MAX_GRAPHS).min_by_key(|at| self.entries[*at].last_used).unwrap_or(0);
            self.entries.swap_remove(oldest);
        }
        self.entries.push(Entry { shape, graph: None, last_used: 0 });
        self.entries.len() - 1
    }
}

impl Entry {
    fn launch(&self, stream: &CudaStream) -> Result<()> {
        let graph = self.graph.as_ref().expect("a shape is launched when it was recorded");
        let error = driver_error("launch a step as a CUDA graph");
        graph.exec.context.bind_to_thread().map_err(&error)?;
        // SAFETY: both live; buffers of a step live as long as the model and the engine's, which outlive its steps.
        unsafe { result::graph::launch(graph.exec.exec, stream.get().cu_stream()) }.map_err(error)
    }
}

/// What was recorded.
struct Recorded {
    graph: sys::CUgraph,
    context: Arc<CudaContext>,
}

impl Recorded {
    fn instantiate(&self) -> Result<Exec> {
        // SAFETY: the graph is whole, as the driver gave it out.
        let exec = unsafe { result::graph::instantiate(self.graph, sys::CUgraphInstantiate_flags(0)) };
        let exec = exec.map_err(driver_error("make a CUDA graph ready"))?;
        Ok(Exec { exec, context: Arc::clone(&self.context) })
    }

    /// Has `exec` do what was recorded; `false` when that is something else than before.
    fn update(&self, exec: &Exec) -> bool {
        let mut info = std::mem::MaybeUninit::<sys::CUgraphExecUpdateResultInfo>::uninit();
        // SAFETY: both live; the driver writes the result, which is not read.
        unsafe { sys::cuGraphExecUpdate_v2(exec.exec, self.graph, info.as_mut_ptr()) }.result().is_ok()
    }
}

impl Drop for Recorded {
    fn drop(&mut self) {
        // SAFETY: nobody else has it.
        self.context.record_err(unsafe { result::graph::destroy(self.graph) });
    }
}

/// A graph that is ready.
struct Exec {
    exec: sys::CUgraphExec,
    context: Arc<CudaContext>,
}

// SAFETY: it is used by one thread at a time, behind a lock.
unsafe impl Send for Exec {}

impl Drop for Exec {
    fn drop(&mut self) {
        // SAFETY: nobody else has it; the driver waits for its end where it still runs.
        self.context.record_err(unsafe { result::graph::exec_destroy(self.exec) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(num_seqs: usize, max_context_len: usize) -> DecodeShape {
        DecodeShape { num_seqs, max_blocks: 16, max_context_len, adapters: 0, merged: None }
    }

    #[test]
    fn a_shape_is_recorded_when_it_comes_twice_in_a_row() {
        let mut kept = Kept::default();
        let mut way = |shape| kept.visit(shape).1;
        assert!(matches!(way(shape(1, 256)), Way::Anew));
        assert!(matches!(way(shape(1, 512)), Way::Anew));
        assert!(matches!(way(shape(2, 512)), Way::Anew));
        assert!(matches!(way(shape(1, 512)), Way::Recorded));
    }

    #[test]
    fn other_adapters_are_another_shape() {
        let mut kept = Kept::default();
        let mut way = |adapters| kept.visit(DecodeShape { adapters, ..shape(2, 256) }).1;
        assert!(matches!([way(1), way(1)], [Way::Anew, Way::Recorded]));
        assert!(matches!([way(2), way(0), way(1)], [Way::Anew, Way::Anew, Way::Anew]));
    }

    #[test]
    fn the_least_recently_used_makes_room() {
        let mut kept = Kept::default();
        for num_seqs in 1..=MAX_GRAPHS {
            kept.visit(shape(num_seqs, 256));
        }
        kept.visit(shape(1, 256));
        kept.visit(shape(MAX_GRAPHS + 1, 256));
        assert_eq!(kept.entries.len(), MAX_GRAPHS);
        assert!(matches!(kept.visit(shape(1, 256)).1, Way::Recorded));
        assert!(matches!(kept.visit(shape(2, 256)).1, Way::Anew));
    }
}
