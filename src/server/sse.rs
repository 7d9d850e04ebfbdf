//! Server-sent events: a stream of events becomes an HTTP body, one `data:` line per chunk, `data: [DONE]` at the end.
//!
//! Chunks that are ready at the same time leave in one write. Dropping the body (the client went away) drops the
//! source, which cancels the work behind it.

use std::convert::Infallible;
use std::ops::ControlFlow;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use futures_core::Stream;
use serde::Serialize;
use tokio::time::{Interval, MissedTickBehavior};

use super::error::ApiError;

/// A write is not grown beyond this many bytes.
const MAX_WRITE_BYTES: usize = 16 << 10;

/// An interval of nothing would never end.
const MIN_KEEP_ALIVE: Duration = Duration::from_millis(1);

/// Turns events into chunks.
pub(super) trait ChunkWriter {
    /// What the source yields.
    type Event;

    /// Writes the chunks of one event; `Break` ends the stream early.
    fn write(&mut self, event: Self::Event, chunks: &mut Chunks) -> ControlFlow<()>;

    /// Writes what follows the last event, before `[DONE]`.
    fn end(&mut self, chunks: &mut Chunks);
}

/// Chunks on their way into one write.
#[derive(Default)]
pub(super) struct Chunks(Vec<u8>);

impl Chunks {
    /// Adds `data: {chunk}`. JSON text has no line breaks of its own.
    pub(super) fn push(&mut self, chunk: &impl Serialize) {
        self.0.extend_from_slice(b"data: ");
        serde_json::to_writer(&mut self.0, chunk).expect("chunks have string keys and finite numbers");
        self.0.extend_from_slice(b"\n\n");
    }

    /// Tells the client of a failure; nothing but `[DONE]` should follow.
    pub(super) fn push_error(&mut self, error: &ApiError) {
        self.push(&super::ErrorBody { error: error.object() });
    }
}

/// The answer that streams `source` through `writer`.
pub(super) fn response<S, W>(source: S, writer: W, keep_alive: Duration) -> Response
where
    S: Stream<Item = W::Event> + Unpin + Send + 'static,
    W: ChunkWriter + Unpin + Send + 'static,
{
    let mut silence = tokio::time::interval(keep_alive.max(MIN_KEEP_ALIVE));
    silence.set_missed_tick_behavior(MissedTickBehavior::Delay);
    silence.reset();
    let stream = SseStream { source: Some(source), writer, silence, wrote: false };
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
        (header::CACHE_CONTROL, "no-cache"),
        // nginx holds streams back unless told not to.
        (header::HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    (headers, Body::from_stream(stream)).into_response()
}

struct SseStream<S, W> {
    /// `None` once the end has been written.
    source: Option<S>,
    writer: W,
    silence: Interval,
    /// Whether anything was written since the interval's last tick.
    wrote: bool,
}

impl<S, W> SseStream<S, W>
where
    S: Stream<Item = W::Event> + Unpin,
    W: ChunkWriter,
{
    /// Writes what is ready now.
    fn fill(&mut self, context: &mut Context<'_>) -> Chunks {
        let mut chunks = Chunks::default();
        while chunks.0.len() < MAX_WRITE_BYTES {
            let Some(source) = &mut self.source else { break };
            match Pin::new(source).poll_next(context) {
                Poll::Pending => break,
                Poll::Ready(Some(event)) => {
                    if self.writer.write(event, &mut chunks).is_break() {
                        self.finish(&mut chunks);
                    }
                }
                Poll::Ready(None) => {
                    self.writer.end(&mut chunks);
                    self.finish(&mut chunks);
                }
            }
        }
        chunks
    }

    fn finish(&mut self, chunks: &mut Chunks) {
        self.source = None;
        chunks.0.extend_from_slice(b"data: [DONE]\n\n");
    }

    fn poll_keep_alive(&mut self, context: &mut Context<'_>) -> Poll<Bytes> {
        while self.silence.poll_tick(context).is_ready() {
            if !std::mem::replace(&mut self.wrote, false) {
                return Poll::Ready(Bytes::from_static(b": keep-alive\n\n"));
            }
        }
        Poll::Pending
    }
}

impl<S, W> Stream for SseStream<S, W>
where
    S: Stream<Item = W::Event> + Unpin,
    W: ChunkWriter + Unpin,
{
    type Item = Result<Bytes, Infallible>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        let chunks = this.fill(context);
        if !chunks.0.is_empty() {
            this.wrote = true;
            return Poll::Ready(Some(Ok(chunks.0.into())));
        }
        if this.source.is_none() {
            return Poll::Ready(None);
        }
        this.poll_keep_alive(context).map(|comment| Some(Ok(comment)))
    }
}
