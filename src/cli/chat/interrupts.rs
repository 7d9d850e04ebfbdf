//! Ctrl-C: stops the answer under way; ends the program when there is none.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::Context;
use futures_util::FutureExt;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;

/// What shells report for a program that SIGINT ended.
const EXIT_CODE: i32 = 130;

/// The program's handling of SIGINT.
#[derive(Clone)]
pub(super) struct Interrupts {
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    /// Whether there is an answer to stop. The signal takes it back, so that the next one ends the program.
    is_answering: AtomicBool,
    stop: Notify,
}

/// An answer under way.
pub(super) struct Answering<'a> {
    state: &'a State,
}

impl Interrupts {
    /// Takes SIGINT over. Waiting for a line cannot be interrupted, hence a thread of its own.
    pub(super) fn install() -> anyhow::Result<Self> {
        let interrupts = Self { state: Arc::default() };
        let state = Arc::clone(&interrupts.state);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let mut signals = {
            let _context = runtime.enter();
            signal(SignalKind::interrupt()).context("cannot take over Ctrl-C")?
        };
        let watch = move || {
            while runtime.block_on(signals.recv()).is_some() {
                if !state.interrupt() {
                    // The terminal has just shown "^C".
                    let _ = writeln!(std::io::stderr());
                    std::process::exit(EXIT_CODE);
                }
            }
        };
        thread::Builder::new().name("interrupts".into()).spawn(watch).context("cannot start a thread")?;
        Ok(interrupts)
    }

    /// From now on until the guard is dropped, Ctrl-C stops the answer.
    pub(super) fn begin_answer(&self) -> Answering<'_> {
        self.state.is_answering.store(true, Ordering::Release);
        Answering { state: &self.state }
    }
}

impl State {
    /// Stops the answer under way; `false` when there is none or it was already told to stop.
    fn interrupt(&self) -> bool {
        let is_answering = self.is_answering.swap(false, Ordering::AcqRel);
        if is_answering {
            self.stop.notify_one();
        }
        is_answering
    }
}

impl Answering<'_> {
    /// Returns once Ctrl-C was pressed.
    pub(super) async fn interrupted(&self) {
        self.state.stop.notified().await;
    }
}

impl Drop for Answering<'_> {
    fn drop(&mut self) {
        if !self.state.is_answering.swap(false, Ordering::AcqRel) {
            // The answer may have ended by itself just then; the signal must not stop the next one.
            let _ = self.state.stop.notified().now_or_never();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_stops_the_answer_and_the_second_the_program() {
        let interrupts = Interrupts { state: Arc::default() };
        assert!(!interrupts.state.interrupt(), "nothing to stop at the prompt");
        let answering = interrupts.begin_answer();
        assert!(answering.interrupted().now_or_never().is_none());
        assert!(interrupts.state.interrupt());
        assert!(answering.interrupted().now_or_never().is_some());
        assert!(!interrupts.state.interrupt());
    }

    #[test]
    fn a_late_signal_does_not_stop_the_next_answer() {
        let interrupts = Interrupts { state: Arc::default() };
        let answering = interrupts.begin_answer();
        assert!(interrupts.state.interrupt());
        drop(answering);
        assert!(interrupts.begin_answer().interrupted().now_or_never().is_none());
    }
}
