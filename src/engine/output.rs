//! The way of a request's events from the engine thread to its caller: lock-free, with room for every event from the
//! start, so that the engine neither waits for a reader nor allocates.
//!
//! A token is one word in an array that is written once, from its beginning on. Such an array is zeroed memory that the
//! system hands out page by page as it is written, so a call that could produce much and produces little costs little.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::Poll;

use crossbeam::queue::{ArrayQueue, SegQueue};
use tokio::sync::Notify;

use super::request::{FinishReason, OutputEvent, TokenLogprobs};

/// `Started` and `Embedding`: what comes before tokens, or instead of them.
const MAX_OPENING_EVENTS: usize = 2;

/// Set in a token's word when its log-probabilities were sent along.
const HAS_LOGPROBS: u64 = 1 << 32;

struct Shared {
    opening: ArrayQueue<OutputEvent>,
    /// Ids with [`HAS_LOGPROBS`]; the first `num_tokens` are there.
    tokens: Box<[AtomicU64]>,
    num_tokens: AtomicUsize,
    /// Of the tokens that have some, in order. It grows: so does the step that makes them.
    logprobs: SegQueue<Box<TokenLogprobs>>,
    finish: OnceLock<FinishReason>,
    arrived: Notify,
    cancelled: AtomicBool,
    closed: AtomicBool,
}

/// The engine's end of a request. One thread sends.
pub struct OutputSink {
    shared: Arc<Shared>,
}

/// The caller's end of a request.
pub struct OutputStream {
    shared: Arc<Shared>,
    num_tokens_read: usize,
    has_ended: bool,
}

/// The two ends for a request of at most `max_tokens` output tokens.
pub(super) fn output_channel(max_tokens: usize) -> (OutputSink, OutputStream) {
    let shared = Arc::new(Shared {
        opening: ArrayQueue::new(MAX_OPENING_EVENTS),
        tokens: zeroed_words(max_tokens),
        num_tokens: AtomicUsize::new(0),
        logprobs: SegQueue::new(),
        finish: OnceLock::new(),
        arrived: Notify::new(),
        cancelled: AtomicBool::new(false),
        closed: AtomicBool::new(false),
    });
    (OutputSink { shared: Arc::clone(&shared) }, OutputStream { shared, num_tokens_read: 0, has_ended: false })
}

/// Zeros that nobody has written: `vec!` asks the allocator for zeroed memory, and the conversion, in place, is none.
fn zeroed_words(len: usize) -> Box<[AtomicU64]> {
    vec![0u64; len].into_iter().map(AtomicU64::new).collect()
}

impl OutputSink {
    /// Hands an event over. The stream has room for all a request can produce.
    pub fn send(&self, event: OutputEvent) {
        let shared = &*self.shared;
        match event {
            OutputEvent::Token { id, logprobs } => shared.add_token(id, logprobs),
            OutputEvent::Finished(reason) => assert!(shared.finish.set(reason).is_ok(), "a request ends once"),
            opening => assert!(shared.opening.push(opening).is_ok(), "a request starts once"),
        }
        shared.arrived.notify_one();
    }

    /// Whether the caller dropped its stream.
    pub fn is_cancelled(&self) -> bool {
        self.shared.cancelled.load(Ordering::Acquire)
    }
}

impl Shared {
    fn add_token(&self, id: u32, logprobs: Option<Box<TokenLogprobs>>) {
        let at = self.num_tokens.load(Ordering::Relaxed);
        let slot = self.tokens.get(at).expect("a request produced no more tokens than its limits allow");
        let flag = if logprobs.is_some() { HAS_LOGPROBS } else { 0 };
        logprobs.into_iter().for_each(|logprobs| self.logprobs.push(logprobs));
        slot.store(u64::from(id) | flag, Ordering::Relaxed);
        self.num_tokens.store(at + 1, Ordering::Release);
    }
}

impl Drop for OutputSink {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Release);
        self.shared.arrived.notify_one();
    }
}

impl OutputStream {
    /// The next event; `None` after `Finished`, or when the engine ended without one.
    pub async fn next(&mut self) -> Option<OutputEvent> {
        loop {
            if let Some(event) = self.try_next() {
                return Some(event);
            }
            if self.shared.closed.load(Ordering::Acquire) {
                return self.try_next();
            }
            let shared = Arc::clone(&self.shared);
            shared.arrived.notified().await;
        }
    }

    /// An event that is already here, without waiting.
    pub fn try_next(&mut self) -> Option<OutputEvent> {
        // Looked at first: whatever was sent before it is then seen below.
        let has_finished = self.shared.finish.get().is_some();
        if let Some(opening) = self.shared.opening.pop() {
            return Some(opening);
        }
        if let Some(token) = self.next_token() {
            return Some(token);
        }
        if !has_finished || std::mem::replace(&mut self.has_ended, true) {
            return None;
        }
        self.shared.finish.get().cloned().map(OutputEvent::Finished)
    }

    fn next_token(&mut self) -> Option<OutputEvent> {
        if self.num_tokens_read == self.shared.num_tokens.load(Ordering::Acquire) {
            return None;
        }
        let word = self.shared.tokens[self.num_tokens_read].load(Ordering::Relaxed);
        self.num_tokens_read += 1;
        let logprobs = if word & HAS_LOGPROBS != 0 { self.shared.logprobs.pop() } else { None };
        Some(OutputEvent::Token { id: word as u32, logprobs })
    }

    /// Waits on the calling thread, for programs without an async runtime.
    pub fn blocking_next(&mut self) -> Option<OutputEvent> {
        let waker = Arc::new(ThreadWaker(std::thread::current())).into();
        let mut context = std::task::Context::from_waker(&waker);
        let mut next = std::pin::pin!(self.next());
        loop {
            match next.as_mut().poll(&mut context) {
                Poll::Ready(event) => return event,
                Poll::Pending => std::thread::park(),
            }
        }
    }
}

impl Drop for OutputStream {
    fn drop(&mut self) {
        self.shared.cancelled.store(true, Ordering::Release);
    }
}

struct ThreadWaker(std::thread::Thread);

impl std::task::Wake for ThreadWaker {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::request::{Reuse, TokenLogprob};

    fn logprobs(id: u32) -> Box<TokenLogprobs> {
        Box::new(TokenLogprobs { chosen: TokenLogprob { id, logprob: -1.0, rank: 1 }, top: Vec::new() })
    }

    /// What a reader checks: the id, and whose log-probabilities came with it.
    fn token(event: &OutputEvent) -> (u32, Option<u32>) {
        match event {
            OutputEvent::Token { id, logprobs } => (*id, logprobs.as_ref().map(|logprobs| logprobs.chosen.id)),
            other => panic!("not a token: {other:?}"),
        }
    }

    #[test]
    fn events_arrive_in_order_while_they_are_sent() {
        const NUM_TOKENS: u32 = 20_000;
        let (sink, mut stream) = output_channel(NUM_TOKENS as usize);
        let sender = std::thread::spawn(move || {
            sink.send(OutputEvent::Started { cached_tokens: 3, reuse: Reuse::default(), prompt_logprobs: Vec::new() });
            for id in 0..NUM_TOKENS {
                let logprobs = (id % 3 == 0).then(|| logprobs(id));
                sink.send(OutputEvent::Token { id: u32::MAX - id, logprobs });
            }
            sink.send(OutputEvent::Finished(FinishReason::Length));
        });
        assert!(matches!(stream.blocking_next(), Some(OutputEvent::Started { cached_tokens: 3, .. })));
        for id in 0..NUM_TOKENS {
            let event = stream.blocking_next().unwrap();
            assert_eq!(token(&event), (u32::MAX - id, (id % 3 == 0).then_some(id)));
        }
        assert!(matches!(stream.blocking_next(), Some(OutputEvent::Finished(FinishReason::Length))));
        assert!(stream.blocking_next().is_none() && stream.try_next().is_none());
        sender.join().unwrap();
    }

    #[test]
    fn a_slow_reader_gets_everything_and_holds_up_nobody() {
        let (sink, mut stream) = output_channel(100);
        sink.send(OutputEvent::Started { cached_tokens: 0, reuse: Reuse::default(), prompt_logprobs: Vec::new() });
        (0..100).for_each(|id| sink.send(OutputEvent::Token { id, logprobs: None }));
        sink.send(OutputEvent::Finished(FinishReason::Abort));
        drop(sink);
        assert!(matches!(stream.try_next(), Some(OutputEvent::Started { .. })));
        for id in 0..100 {
            assert_eq!(token(&stream.try_next().unwrap()), (id, None));
        }
        assert!(matches!(stream.try_next(), Some(OutputEvent::Finished(FinishReason::Abort))));
        assert!(stream.blocking_next().is_none());
    }

    #[test]
    fn a_request_that_is_dropped_ends_without_a_reason() {
        let (sink, mut stream) = output_channel(2);
        sink.send(OutputEvent::Token { id: 7, logprobs: None });
        drop(sink);
        assert_eq!(token(&stream.blocking_next().unwrap()), (7, None));
        assert!(stream.blocking_next().is_none());
    }

    #[test]
    fn a_caller_that_leaves_is_noticed() {
        let (sink, stream) = output_channel(0);
        assert!(!sink.is_cancelled());
        drop(stream);
        assert!(sink.is_cancelled());
        sink.send(OutputEvent::Finished(FinishReason::Abort));
    }
}
