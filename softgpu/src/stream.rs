//! Streams and events: which work may run when, and which orders the program may rely on.
//!
//! Each stream is a queue. An item has dependencies (positions in other streams) and a clock: for each stream, the last
//! position that is known to be complete before it. Work on the same bytes that the clocks do not order is reported when
//! it runs, whatever order it happened to run in. Items of several streams run at once, as many as the host has threads for.
//!
//! *Eager*: threads run items as soon as their dependencies allow. *Lazy*: items run only when the host waits for
//! something that needs them, in an order that the seed varies; so what works without a wait is seen not to.

use crate::capture::{Captures, Graph, Mark, UNSUPPORTED};
use crate::device::{Device, device};
use crate::exec::launch::host_threads;
use crate::memory::{Accessor, stamp};
use crate::report;
use crate::rng::Rng;
use crate::work::Work;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Instant;

/// When work runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// As soon as it may.
    Eager,
    /// Only when something waits for it.
    Lazy,
}

/// A place in a stream: everything up to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    stream: usize,
    number: u64,
}

struct Item {
    work: Work,
    number: u64,
    after: Vec<Position>,
    clock: Arc<Vec<u64>>,
    /// Event whose time is taken when the item runs.
    event: Option<usize>,
}

#[derive(Default)]
struct Stream {
    queue: VecDeque<Item>,
    issued: u64,
    done: u64,
    clock: Vec<u64>,
    is_blocking: bool,
    is_destroyed: bool,
    /// Whether the item behind `done` has left the queue and runs.
    is_running: bool,
    capture: Option<u64>,
    has_launched: bool,
    /// How many streams had the place before.
    generation: usize,
}

#[derive(Clone, Default)]
struct Event {
    at: Option<Position>,
    clock: Vec<u64>,
    time: Option<Instant>,
    /// Where it lies in a recording.
    mark: Option<Mark>,
    queries: u32,
}

struct State {
    streams: Vec<Stream>,
    events: HashMap<usize, Event>,
    captures: Captures,
    host_clock: Vec<u64>,
    /// Items that run.
    num_running: usize,
    has_workers: bool,
    /// Workers without an item, who sleep.
    num_idle: usize,
    /// Whether one of them has been woken and has not looked yet.
    is_waking: bool,
    /// What threads of the program wait for.
    goals: Vec<Position>,
    error: Option<u32>,
    /// Kernels launched.
    num_launches: u64,
    /// How many these must be before copies to the device run.
    held_until: u64,
    /// Whether copies stand still on streams without kernels.
    is_stalled: bool,
    rng: Rng,
    /// The stream that ran last.
    last: usize,
}

/// All streams of the device.
pub struct Streams {
    mode: Mode,
    seed: u64,
    state: Mutex<State>,
    /// For threads of the program.
    changed: Condvar,
    /// For workers.
    ready: Condvar,
}

/// A call that cannot be served, as its `CUresult`.
pub type Outcome<T> = Result<T, u32>;

const INVALID_HANDLE: u32 = 400;
const NOT_READY: u32 = 600;
const CAPTURE_UNMATCHED: u32 = 903;
const CAPTURE_ISOLATION: u32 = 905;
const CAPTURE_IMPLICIT: u32 = 906;
const CAPTURED_EVENT: u32 = 907;
const FIRST_HANDLE: usize = 0x1000;
/// Handles have places in these low bits, as stamps do.
const MAX_STREAMS: usize = 1 << 16;

fn join(into: &mut Vec<u64>, other: &[u64]) {
    if into.len() < other.len() {
        into.resize(other.len(), 0);
    }
    into.iter_mut().zip(other).for_each(|(a, b)| *a = (*a).max(*b));
}

impl Streams {
    /// The default stream alone.
    pub fn new(mode: Mode, seed: u64) -> Self {
        let null = Stream { is_blocking: true, ..Stream::default() };
        let state = State {
            streams: vec![null],
            events: HashMap::new(),
            captures: Captures::default(),
            host_clock: Vec::new(),
            num_running: 0,
            has_workers: false,
            num_idle: 0,
            is_waking: false,
            goals: Vec::new(),
            error: None,
            num_launches: 0,
            held_until: 0,
            is_stalled: false,
            rng: Rng::new(seed),
            last: 0,
        };
        Self { mode, seed, state: Mutex::new(state), changed: Condvar::new(), ready: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The error that every call returns since a checker spoke.
    ///
    /// # Errors
    /// That error.
    pub fn check(&self) -> Outcome<()> {
        self.lock().error.map_or(Ok(()), Err)
    }

    /// Forgets the error.
    pub fn clear_error(&self) {
        self.lock().error = None;
    }

    /// Makes the device fail with `code` from now on.
    pub fn set_error(&self, code: u32) {
        self.lock().error.get_or_insert(code);
    }

    /// Lets copies to the device run only when `launches` more kernels have been launched: a test sees that a program
    /// launches them without waiting for the copies.
    pub fn hold_copies(&self, launches: u64) {
        let mut state = self.lock();
        state.held_until = state.num_launches + launches;
        self.notify_all();
    }

    /// Has copies between host and device stand still on streams that never launched a kernel, or go on.
    pub fn stall_copies(&self, is_stalled: bool) {
        self.lock().is_stalled = is_stalled;
        self.notify_all();
    }

    /// A new stream; `is_blocking` ones wait for the default stream and it for them.
    pub fn create(&self, is_blocking: bool) -> usize {
        let mut state = self.lock();
        let index = state.place_of_a_stream();
        let Stream { issued, done, generation, .. } = state.streams[index];
        state.streams[index] = Stream { is_blocking, issued, done, generation: generation + 1, ..Stream::default() };
        FIRST_HANDLE + ((generation + 1) * MAX_STREAMS + index) * 16
    }

    /// Ends a stream; what is queued still runs.
    ///
    /// # Errors
    /// Not a stream.
    pub fn destroy(&self, handle: usize) -> Outcome<()> {
        let mut state = self.lock();
        let index = state.index(handle)?;
        if index == 0 {
            return Err(INVALID_HANDLE);
        }
        state.streams[index].is_destroyed = true;
        Ok(())
    }

    /// Queues work. While the stream captures, the work is recorded instead.
    ///
    /// # Errors
    /// Not a stream, or an earlier error.
    pub fn push(&self, handle: usize, work: Work) -> Outcome<Position> {
        let mut state = self.lock();
        if let Some(code) = state.error {
            work.settle(device());
            return Err(code);
        }
        let index = state.index(handle)?;
        if let Some(capture) = state.streams[index].capture {
            state.captures.record(capture, index, work)?;
            return Ok(Position { stream: index, number: state.streams[index].issued });
        }
        if let Err(code) = state.check_default_stream(index) {
            work.settle(device());
            return Err(code);
        }
        let position = state.push(index, work, &[], None);
        self.wake(&mut state);
        Ok(position)
    }

    /// Starts the workers on first need and tells everyone that there is work.
    fn wake(&self, state: &mut State) {
        if self.mode == Mode::Eager && !state.has_workers {
            state.has_workers = true;
            (0..host_threads()).for_each(|_| drop(std::thread::spawn(|| device().streams.work())));
        }
        self.wake_worker(state);
        // With lazy streams who waits runs what others queue.
        if self.mode == Mode::Lazy && !state.goals.is_empty() {
            self.changed.notify_all();
        }
    }

    /// Wakes one worker if there is something for it, which wakes the next: one at a time, or most would come in vain.
    fn wake_worker(&self, state: &mut State) {
        if state.num_idle > 0 && !state.is_waking && state.runnable().is_some() {
            state.is_waking = true;
            self.ready.notify_one();
        }
    }

    fn notify_all(&self) {
        self.changed.notify_all();
        self.ready.notify_all();
    }

    /// An eager worker.
    fn work(&self) {
        let mut state = self.lock();
        loop {
            state = match state.runnable() {
                Some(index) => self.run(state, index),
                None => self.rest(state),
            };
        }
    }

    fn rest<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        state.num_idle += 1;
        state = self.ready.wait(state).unwrap_or_else(|e| e.into_inner());
        state.num_idle -= 1;
        state.is_waking = false;
        state
    }

    /// Runs the first item of a stream, without the lock.
    fn run<'a>(&'a self, mut state: MutexGuard<'a, State>, index: usize) -> MutexGuard<'a, State> {
        let Some(item) = state.streams[index].queue.pop_front() else { return state };
        state.last = index;
        state.num_running += 1;
        state.streams[index].is_running = true;
        self.wake_worker(&mut state);
        let (failed, threads) = (state.error.is_some(), host_threads().div_ceil(state.num_running));
        drop(state);
        let found = if failed { None } else { self.execute(device(), index, &item, threads) };
        item.work.settle(device());
        let mut state = self.lock();
        state.num_running -= 1;
        (state.streams[index].is_running, state.streams[index].done) = (false, item.number);
        if let Some(event) = item.event.and_then(|handle| state.events.get_mut(&handle)) {
            event.time = Some(Instant::now());
        }
        if let Some(code) = found {
            state.error.get_or_insert(code);
        }
        // With lazy streams who waits for something else may now run what led to it.
        let is_reached = |goal: &Position| goal.stream == index && goal.number <= item.number;
        if state.goals.iter().any(|goal| self.mode == Mode::Lazy || is_reached(goal)) {
            self.changed.notify_all();
        }
        state
    }

    fn execute(&self, device: &Device, index: usize, item: &Item, threads: usize) -> Option<u32> {
        let stamp = stamp(index as u64, item.number);
        let by = Accessor { stamp, clock: Arc::clone(&item.clock), ..Accessor::default() };
        let fault = item.work.run(device, by, threads).err()?;
        report::set_message(&fault.to_string());
        Some(fault.kind.code())
    }

    /// Waits until a position is complete.
    fn wait_for<'a>(&'a self, mut state: MutexGuard<'a, State>, goal: Position) -> MutexGuard<'a, State> {
        while state.streams[goal.stream].done < goal.number {
            let next = if self.mode == Mode::Lazy { state.next_towards(goal, self.seed != 0) } else { None };
            state = match next {
                Some(index) => self.run(state, index),
                None => self.wait_for_change(state, goal),
            };
        }
        state
    }

    fn wait_for_change<'a>(&'a self, mut state: MutexGuard<'a, State>, goal: Position) -> MutexGuard<'a, State> {
        state.goals.push(goal);
        state = self.changed.wait(state).unwrap_or_else(|e| e.into_inner());
        if let Some(at) = state.goals.iter().position(|other| *other == goal) {
            state.goals.swap_remove(at);
        }
        state
    }

    /// `cuStreamSynchronize`.
    ///
    /// # Errors
    /// Not a stream, one that captures, or what a checker found.
    pub fn synchronize(&self, handle: usize) -> Outcome<()> {
        let mut state = self.lock();
        let index = state.index(handle)?;
        state.check_recording(index)?;
        let wanted = if index == 0 { state.blocking() } else { vec![index] };
        for stream in wanted {
            let number = state.streams[stream].issued;
            state = self.wait_for(state, Position { stream, number });
            let clock = state.streams[stream].clock.clone();
            join(&mut state.host_clock, &clock);
        }
        state.error.map_or(Ok(()), Err)
    }

    /// `cuCtxSynchronize`.
    ///
    /// # Errors
    /// A stream records, or what a checker found.
    pub fn synchronize_all(&self) -> Outcome<()> {
        self.lock().captures.check_wait()?;
        self.finish_all()
    }

    /// Waits for everything that runs; what records does not run.
    ///
    /// # Errors
    /// What a checker found.
    pub fn finish_all(&self) -> Outcome<()> {
        let mut state = self.lock();
        for stream in 0..state.streams.len() {
            let number = state.streams[stream].issued;
            if state.is_known_to_be_done(stream) {
                continue;
            }
            state = self.wait_for(state, Position { stream, number });
            let clock = state.streams[stream].clock.clone();
            join(&mut state.host_clock, &clock);
        }
        state.error.map_or(Ok(()), Err)
    }

    /// Queues work and waits for it.
    ///
    /// # Errors
    /// As [`Streams::push`], or what a checker found.
    pub fn push_and_wait(&self, handle: usize, work: Work) -> Outcome<()> {
        let position = self.push(handle, work)?;
        let mut state = self.lock();
        state.check_recording(position.stream)?;
        state = self.wait_for(state, position);
        let clock = state.streams[position.stream].clock.clone();
        join(&mut state.host_clock, &clock);
        state.error.map_or(Ok(()), Err)
    }

    /// `cuStreamQuery`.
    ///
    /// # Errors
    /// `NOT_READY`, a stream that captures, or what a checker found.
    pub fn query(&self, handle: usize) -> Outcome<()> {
        let mut state = self.lock();
        let stream = state.index(handle)?;
        state.check_recording(stream)?;
        let number = state.streams[stream].issued;
        if self.mode == Mode::Lazy && state.streams[stream].done < number {
            state = self.step_towards(state, Position { stream, number });
        }
        if state.streams[stream].done < number {
            return Err(NOT_READY);
        }
        let clock = state.streams[stream].clock.clone();
        join(&mut state.host_clock, &clock);
        state.error.map_or(Ok(()), Err)
    }

    /// Runs one item that the goal needs: a program that polls must come to an end.
    fn step_towards<'a>(&'a self, mut state: MutexGuard<'a, State>, goal: Position) -> MutexGuard<'a, State> {
        match state.next_towards(goal, false) {
            Some(index) => self.run(state, index),
            None => state,
        }
    }

    /// `cuEventCreate`.
    pub fn create_event(&self, handle: usize) {
        self.lock().events.insert(handle, Event::default());
    }

    /// `cuEventDestroy`.
    ///
    /// # Errors
    /// Not an event.
    pub fn destroy_event(&self, handle: usize) -> Outcome<()> {
        self.lock().events.remove(&handle).map(|_| ()).ok_or(INVALID_HANDLE)
    }

    /// `cuEventRecord`.
    ///
    /// # Errors
    /// Not an event or stream.
    pub fn record(&self, event: usize, stream: usize) -> Outcome<()> {
        let mut state = self.lock();
        let index = state.index(stream)?;
        if !state.events.contains_key(&event) {
            return Err(INVALID_HANDLE);
        }
        let capture = state.streams[index].capture;
        let mark = capture.map(|id| state.captures.mark(id, index)).transpose()?;
        let mut record = Event { mark, ..Event::default() };
        if mark.is_none() {
            record.at = Some(state.push(index, Work::Marker, &[], Some(event)));
            record.clock = state.streams[index].clock.clone();
        }
        state.events.insert(event, record);
        self.wake(&mut state);
        Ok(())
    }

    /// `cuStreamWaitEvent`.
    ///
    /// # Errors
    /// Not an event or stream.
    pub fn wait_event(&self, stream: usize, event: usize) -> Outcome<()> {
        let mut state = self.lock();
        let index = state.index(stream)?;
        let event = state.events.get(&event).ok_or(INVALID_HANDLE)?.clone();
        let own = state.streams[index].capture;
        if let Some(mark) = event.mark {
            state.streams[index].capture = Some(state.captures.join(mark, index, own)?);
            return Ok(());
        }
        if let Some(own) = own {
            if event.at.is_none() {
                return Ok(());
            }
            state.captures.spoil(own);
            return Err(CAPTURE_ISOLATION);
        }
        if let Some(at) = event.at {
            join(&mut state.streams[index].clock, &event.clock);
            state.push(index, Work::Marker, &[at], None);
            self.wake(&mut state);
        }
        Ok(())
    }

    /// `cuEventQuery`.
    ///
    /// # Errors
    /// `NOT_READY`, `CAPTURED_EVENT`, or what a checker found.
    pub fn query_event(&self, handle: usize) -> Outcome<()> {
        let mut state = self.lock();
        state.check_captured(handle)?;
        state.captures.check_unsafe_call()?;
        let event = state.events.get_mut(&handle).ok_or(INVALID_HANDLE)?;
        event.queries += 1;
        let (Some(at), clock, patience) = (event.at, event.clock.clone(), event.queries > 1) else { return Ok(()) };
        if self.mode == Mode::Lazy && patience && state.streams[at.stream].done < at.number {
            state = self.step_towards(state, at);
        }
        if state.streams[at.stream].done < at.number {
            return Err(NOT_READY);
        }
        join(&mut state.host_clock, &clock);
        state.error.map_or(Ok(()), Err)
    }

    /// `cuEventSynchronize`.
    ///
    /// # Errors
    /// Not an event, or what a checker found.
    pub fn synchronize_event(&self, handle: usize) -> Outcome<()> {
        let mut state = self.lock();
        state.check_captured(handle)?;
        let event = state.events.get(&handle).ok_or(INVALID_HANDLE)?.clone();
        let Some(at) = event.at else { return Ok(()) };
        let mut state = self.wait_for(state, at);
        join(&mut state.host_clock, &event.clock);
        state.error.map_or(Ok(()), Err)
    }

    /// `cuEventElapsedTime`, milliseconds of this machine: they say nothing about a GPU.
    ///
    /// # Errors
    /// Not an event, not recorded, or not complete.
    pub fn elapsed_ms(&self, start: usize, end: usize) -> Outcome<f32> {
        let state = self.lock();
        let time = |handle: usize| {
            let event = state.events.get(&handle).ok_or(INVALID_HANDLE)?;
            event.at.ok_or(INVALID_HANDLE)?;
            event.time.ok_or(NOT_READY)
        };
        let (start, end) = (time(start)?, time(end)?);
        let forward = end.saturating_duration_since(start).as_secs_f64();
        Ok(((forward - start.saturating_duration_since(end).as_secs_f64()) * 1e3) as f32)
    }

    /// Starts recording a stream, as the `CUstreamCaptureMode` says.
    ///
    /// # Errors
    /// Not a stream, the default stream, or one that records already; no mode.
    pub fn begin_capture(&self, handle: usize, mode: u32) -> Outcome<()> {
        let mut state = self.lock();
        let index = state.index(handle)?;
        if index == 0 || state.streams[index].capture.is_some() {
            return Err(UNSUPPORTED);
        }
        state.streams[index].capture = Some(state.captures.begin(index, mode)?);
        Ok(())
    }

    /// Ends recording and gives what was recorded, in program order.
    ///
    /// # Errors
    /// The stream does not record, or not since its own beginning, or not on this thread; a stream that joined was not
    /// waited for; a call came between that spoiled it all.
    pub fn end_capture(&self, handle: usize) -> Outcome<Graph> {
        let mut state = self.lock();
        let index = state.index(handle)?;
        let id = state.streams[index].capture.ok_or(CAPTURE_UNMATCHED)?;
        let recorded = state.captures.end(id, index);
        if !state.captures.is_under_way(id) {
            state.streams.iter_mut().filter(|s| s.capture == Some(id)).for_each(|s| s.capture = None);
        }
        recorded
    }

    /// The `CUstreamCaptureStatus` of a stream: 0 does not record, 1 records, 2 what it records is spoiled.
    ///
    /// # Errors
    /// Not a stream.
    pub fn capture_status(&self, handle: usize) -> Outcome<u32> {
        let state = self.lock();
        let index = state.index(handle)?;
        Ok(state.streams[index].capture.map_or(0, |id| 1 + u32::from(state.captures.is_spoiled(id))))
    }

    /// Whether a stream records.
    ///
    /// # Errors
    /// Not a stream.
    pub fn is_capturing(&self, handle: usize) -> Outcome<bool> {
        self.capture_status(handle).map(|status| status != 0)
    }

    /// For calls that may wait for what is recorded, such as allocating.
    ///
    /// # Errors
    /// A recording forbids them on this thread, and is spoiled.
    pub fn check_unsafe_call(&self) -> Outcome<()> {
        self.lock().captures.check_unsafe_call()
    }
}

impl State {
    fn index(&self, handle: usize) -> Outcome<usize> {
        // 0, CU_STREAM_LEGACY and CU_STREAM_PER_THREAD are the default stream.
        if handle <= 2 {
            return Ok(0);
        }
        let number = handle.checked_sub(FIRST_HANDLE).ok_or(INVALID_HANDLE)? / 16;
        let (generation, index) = (number / MAX_STREAMS, number % MAX_STREAMS);
        match self.streams.get(index) {
            Some(stream) if !stream.is_destroyed && stream.generation == generation => Ok(index),
            _ => Err(INVALID_HANDLE),
        }
    }

    /// Whether the host has seen all of a stream's work complete, so that all work to come is ordered behind it.
    fn is_known_to_be_done(&self, index: usize) -> bool {
        let Stream { issued, done, .. } = self.streams[index];
        done == issued && self.host_clock.get(index).copied().unwrap_or(0) >= issued
    }

    /// That of a stream that was destroyed, if all of its work is ordered before whatever a new one does: every operation
    /// carries a clock of all places.
    fn place_of_a_stream(&mut self) -> usize {
        let is_free = |index: &usize| {
            let stream = &self.streams[*index];
            stream.is_destroyed && stream.capture.is_none() && self.is_known_to_be_done(*index)
        };
        if let Some(index) = (0..self.streams.len()).find(is_free) {
            return index;
        }
        self.streams.push(Stream::default());
        self.streams.len() - 1
    }

    /// An error, and the recording spoiled, when a stream that is to be waited for records.
    fn check_recording(&mut self, index: usize) -> Outcome<()> {
        let Some(id) = self.streams[index].capture else { return Ok(()) };
        self.captures.spoil(id);
        Err(UNSUPPORTED)
    }

    /// An error, and the recording spoiled, when an event that is to be waited for lies in one.
    fn check_captured(&mut self, event: usize) -> Outcome<()> {
        let event = self.events.get(&event).ok_or(INVALID_HANDLE)?;
        let Some(mark) = event.mark else { return Ok(()) };
        self.captures.spoil(mark.id);
        Err(CAPTURED_EVENT)
    }

    /// Work of the default stream waits for the blocking streams, which cannot be while one of them records.
    fn check_default_stream(&mut self, index: usize) -> Outcome<()> {
        let mut blocking = self.streams.iter().filter(|stream| index == 0 && stream.is_blocking);
        let Some(id) = blocking.find_map(|stream| stream.capture) else { return Ok(()) };
        self.captures.spoil(id);
        Err(CAPTURE_IMPLICIT)
    }

    fn blocking(&self) -> Vec<usize> {
        (0..self.streams.len()).filter(|&i| self.streams[i].is_blocking).collect()
    }

    fn push(&mut self, index: usize, work: Work, after: &[Position], event: Option<usize>) -> Position {
        let mut after = after.to_vec();
        // The default stream and the blocking ones wait for each other.
        let others = match index {
            0 => self.blocking(),
            _ if self.streams[index].is_blocking => vec![0],
            _ => Vec::new(),
        };
        let is_launch = matches!(work, Work::Launch { .. } | Work::Product(_));
        self.num_launches += u64::from(is_launch);
        self.streams[index].has_launched |= is_launch;
        let mut clock = std::mem::take(&mut self.streams[index].clock);
        for stream in others.into_iter().filter(|&s| s != index) {
            after.push(Position { stream, number: self.streams[stream].issued });
            join(&mut clock, &self.streams[stream].clock);
        }
        join(&mut clock, &self.host_clock);
        let number = self.streams[index].issued + 1;
        clock.resize(clock.len().max(index + 1), 0);
        clock[index] = number;
        let stream = &mut self.streams[index];
        stream.issued = number;
        stream.queue.push_back(Item { work, number, after, clock: Arc::new(clock.clone()), event });
        stream.clock = clock;
        Position { stream: index, number }
    }

    fn is_done(&self, position: &Position) -> bool {
        self.streams[position.stream].done >= position.number
    }

    fn is_runnable(&self, index: usize) -> bool {
        let is_free = |item: &Item| item.after.iter().all(|p| self.is_done(p)) && !self.is_held(index, item);
        let stream = &self.streams[index];
        !stream.is_running && stream.queue.front().is_some_and(is_free)
    }

    fn has_room(&self) -> bool {
        self.num_running < host_threads()
    }

    fn is_held(&self, index: usize, item: &Item) -> bool {
        match item.work {
            Work::ToDevice(..) if self.num_launches < self.held_until => true,
            Work::ToDevice(..) | Work::ToHost(..) => self.is_stalled && !self.streams[index].has_launched,
            _ => false,
        }
    }

    /// A stream whose first item may run, each in turn.
    fn runnable(&self) -> Option<usize> {
        if !self.has_room() {
            return None;
        }
        let count = self.streams.len();
        (1..=count).map(|step| (self.last + step) % count).find(|&i| self.is_runnable(i))
    }

    /// A stream whose first item may run and brings the goal nearer; sometimes another one if `wander`.
    fn next_towards(&mut self, goal: Position, wander: bool) -> Option<usize> {
        if !self.has_room() {
            return None;
        }
        if wander && self.rng.below(4) == 0 {
            let ready: Vec<usize> = (0..self.streams.len()).filter(|&i| self.is_runnable(i)).collect();
            if !ready.is_empty() {
                return Some(ready[self.rng.below(ready.len())]);
            }
        }
        let mut at = goal.stream;
        for _ in 0..=self.streams.len() {
            if self.streams[at].is_running {
                return None;
            }
            let item = self.streams[at].queue.front()?;
            match item.after.iter().find(|p| !self.is_done(p)) {
                Some(blocker) => at = blocker.stream,
                None => return (!self.is_held(at, item)).then_some(at),
            }
        }
        None
    }
}
