//! When the tokens of one request came.

use std::time::{Duration, Instant};

/// One finished request.
#[derive(Debug, Clone, Default)]
pub(super) struct Timing {
    pub(super) num_input_tokens: usize,
    pub(super) num_output_tokens: usize,
    /// From the request to its first token.
    pub(super) ttft: Duration,
    /// Between arrivals that follow each other. A server may put several tokens into one arrival.
    pub(super) itl: Vec<Duration>,
    /// From the request to its last token.
    pub(super) e2el: Duration,
}

impl Timing {
    /// Time per token after the first; `None` for a single token.
    pub(super) fn tpot(&self) -> Option<Duration> {
        let rest = u32::try_from(self.num_output_tokens.checked_sub(1)?).ok().filter(|rest| *rest > 0)?;
        Some(self.e2el.saturating_sub(self.ttft) / rest)
    }
}

/// Takes the times of a request under way.
#[derive(Debug)]
pub(super) struct Stopwatch {
    started_at: Instant,
    first: Option<Duration>,
    last: Duration,
    itl: Vec<Duration>,
}

impl Stopwatch {
    /// Starts now.
    pub(super) fn start() -> Self {
        Self { started_at: Instant::now(), first: None, last: Duration::ZERO, itl: Vec::new() }
    }

    /// Tokens have come.
    pub(super) fn token_arrived(&mut self) {
        self.token_arrived_after(self.started_at.elapsed());
    }

    fn token_arrived_after(&mut self, elapsed: Duration) {
        match self.first {
            None => self.first = Some(elapsed),
            Some(_) => self.itl.push(elapsed.saturating_sub(self.last)),
        }
        self.last = elapsed;
    }

    /// How often tokens have come.
    pub(super) fn num_arrivals(&self) -> usize {
        self.itl.len() + usize::from(self.first.is_some())
    }

    /// The times, or `None` when no token came.
    pub(super) fn finish(self, num_input_tokens: usize, num_output_tokens: usize) -> Option<Timing> {
        let ttft = self.first?;
        Some(Timing { num_input_tokens, num_output_tokens, ttft, itl: self.itl, e2el: self.last })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_vllms() {
        let mut watch = Stopwatch::start();
        for at_ms in [100, 130, 190] {
            watch.token_arrived_after(Duration::from_millis(at_ms));
        }
        assert_eq!(watch.num_arrivals(), 3);
        let timing = watch.finish(5, 4).unwrap();
        assert_eq!(timing.ttft, Duration::from_millis(100));
        assert_eq!(timing.itl, [30, 60].map(Duration::from_millis));
        assert_eq!(timing.e2el, Duration::from_millis(190));
        assert_eq!(timing.tpot(), Some(Duration::from_millis(30)), "90 ms over the 3 tokens after the first");
    }

    #[test]
    fn a_single_token_has_no_time_per_token() {
        let mut watch = Stopwatch::start();
        watch.token_arrived();
        assert_eq!(watch.finish(1, 1).unwrap().tpot(), None);
        assert!(Stopwatch::start().finish(1, 0).is_none());
    }
}
