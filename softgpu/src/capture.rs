//! Streams that record instead of running: what a recording holds, what spoils it, and the graph it ends in.

use crate::work::Work;
use std::collections::HashMap;
use std::thread::{self, ThreadId};

/// A recorded list of operations, in program order.
pub type Graph = Vec<Work>;

/// A call that a recording does not allow, as its `CUresult`.
type Outcome<T> = Result<T, u32>;

const INVALID_VALUE: u32 = 1;
pub(crate) const UNSUPPORTED: u32 = 900;
const INVALIDATED: u32 = 901;
const MERGE: u32 = 902;
const UNMATCHED: u32 = 903;
const UNJOINED: u32 = 904;
const WRONG_THREAD: u32 = 908;

/// Whose unsafe calls spoil a recording: those that may wait for it, such as allocating. `CUstreamCaptureMode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Global,
    ThreadLocal,
    Relaxed,
}

/// Where an event lies in a recording.
#[derive(Clone, Copy, Debug)]
pub struct Mark {
    /// Which recording.
    pub id: u64,
    stream: usize,
    number: u64,
}

/// What a stream beside the first has recorded, and up to where another stream has waited for it.
#[derive(Clone, Copy, Default)]
struct Branch {
    recorded: u64,
    joined: u64,
}

struct Capture {
    work: Graph,
    /// The stream that it began with.
    origin: usize,
    branches: HashMap<usize, Branch>,
    mode: Mode,
    thread: ThreadId,
    is_spoiled: bool,
}

/// All recordings under way.
#[derive(Default)]
pub struct Captures {
    under_way: HashMap<u64, Capture>,
    last: u64,
}

impl Captures {
    /// A recording that begins with this stream, on this thread.
    ///
    /// # Errors
    /// `mode` is none.
    pub fn begin(&mut self, origin: usize, mode: u32) -> Outcome<u64> {
        let mode = *[Mode::Global, Mode::ThreadLocal, Mode::Relaxed].get(mode as usize).ok_or(INVALID_VALUE)?;
        self.last += 1;
        let (branches, thread) = (HashMap::new(), thread::current().id());
        let capture = Capture { work: Graph::new(), origin, branches, mode, thread, is_spoiled: false };
        self.under_way.insert(self.last, capture);
        Ok(self.last)
    }

    fn get(&mut self, id: u64) -> Outcome<&mut Capture> {
        match self.under_way.get_mut(&id) {
            Some(capture) if !capture.is_spoiled => Ok(capture),
            Some(_) => Err(INVALIDATED),
            None => Err(UNMATCHED),
        }
    }

    /// Records an operation of a stream.
    ///
    /// # Errors
    /// The recording is spoiled.
    pub fn record(&mut self, id: u64, stream: usize, work: Work) -> Outcome<()> {
        let capture = self.get(id)?;
        capture.work.push(work);
        capture.advance(stream);
        Ok(())
    }

    /// Where an event of this stream lies.
    ///
    /// # Errors
    /// The recording is spoiled.
    pub fn mark(&mut self, id: u64, stream: usize) -> Outcome<Mark> {
        let number = self.get(id)?.branches.get(&stream).map_or(0, |branch| branch.recorded);
        Ok(Mark { id, stream, number })
    }

    /// Has a stream wait for an event of a recording, to which it then belongs.
    ///
    /// # Errors
    /// The stream belongs to another recording, which spoils both; or the recording is spoiled or has ended.
    pub fn join(&mut self, mark: Mark, stream: usize, own: Option<u64>) -> Outcome<u64> {
        if let Some(own) = own.filter(|own| *own != mark.id) {
            [own, mark.id].into_iter().for_each(|id| self.spoil(id));
            return Err(MERGE);
        }
        let capture = self.get(mark.id)?;
        if let Some(branch) = capture.branches.get_mut(&mark.stream) {
            branch.joined = branch.joined.max(mark.number);
        }
        capture.advance(stream);
        Ok(mark.id)
    }

    /// Makes a recording worthless: a call came between that it cannot hold.
    pub fn spoil(&mut self, id: u64) {
        if let Some(capture) = self.under_way.get_mut(&id) {
            capture.is_spoiled = true;
        }
    }

    /// Spoils all recordings that forbid this thread what may wait for them.
    ///
    /// # Errors
    /// There is one.
    pub fn check_unsafe_call(&mut self) -> Outcome<()> {
        let thread = thread::current().id();
        self.spoil_if(|capture| match capture.mode {
            Mode::Global => true,
            Mode::ThreadLocal => capture.thread == thread,
            Mode::Relaxed => false,
        })
    }

    /// Spoils all recordings, because somebody waits for the whole device.
    ///
    /// # Errors
    /// There is one.
    pub fn check_wait(&mut self) -> Outcome<()> {
        self.spoil_if(|_| true)
    }

    fn spoil_if(&mut self, is_broken: impl Fn(&Capture) -> bool) -> Outcome<()> {
        let mut outcome = Ok(());
        for capture in self.under_way.values_mut().filter(|capture| is_broken(capture)) {
            capture.is_spoiled = true;
            outcome = Err(UNSUPPORTED);
        }
        outcome
    }

    /// Whether a recording is spoiled.
    pub fn is_spoiled(&self, id: u64) -> bool {
        self.under_way.get(&id).is_none_or(|capture| capture.is_spoiled)
    }

    /// Ends a recording and gives what was recorded. It has ended after most errors, too.
    ///
    /// # Errors
    /// The stream is not the first, or the thread not the one that began, and it goes on; a stream's operations were not
    /// waited for; it is spoiled.
    pub fn end(&mut self, id: u64, stream: usize) -> Outcome<Graph> {
        let capture = self.under_way.get(&id).ok_or(UNMATCHED)?;
        if capture.origin != stream {
            return Err(UNMATCHED);
        }
        if capture.mode != Mode::Relaxed && capture.thread != thread::current().id() {
            return Err(WRONG_THREAD);
        }
        let Some(capture) = self.under_way.remove(&id) else { return Err(UNMATCHED) };
        let is_joined = capture.branches.values().all(|branch| branch.joined == branch.recorded);
        match (capture.is_spoiled, is_joined) {
            (true, _) => Err(INVALIDATED),
            (false, false) => Err(UNJOINED),
            (false, true) => Ok(capture.work),
        }
    }

    /// Whether it goes on.
    pub fn is_under_way(&self, id: u64) -> bool {
        self.under_way.contains_key(&id)
    }
}

impl Capture {
    /// A stream has something more that another has to wait for, unless it is the first.
    fn advance(&mut self, stream: usize) {
        if stream != self.origin {
            self.branches.entry(stream).or_default().recorded += 1;
        }
    }
}
