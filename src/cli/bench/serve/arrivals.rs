//! When requests are sent.

use std::str::FromStr;
use std::time::Duration;

use serde_json::Value;

use crate::cli::bench::random::Random;

/// Requests per second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct RequestRate(f64);

impl RequestRate {
    /// As vLLM writes it into results: a number, or the text "inf".
    pub(super) fn json(self) -> Value {
        if self.0.is_finite() { self.0.into() } else { "inf".into() }
    }

    /// The number; infinite for all at once.
    pub(super) fn per_second(self) -> f64 {
        self.0
    }
}

impl FromStr for RequestRate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let rate = text.parse().ok().filter(|rate: &f64| *rate >= 1e-3);
        rate.map(Self).ok_or_else(|| format!("{text:?} is not a rate: a number from 0.001 on, or inf"))
    }
}

/// The times of a Poisson process, from the first request on.
pub(super) struct Arrivals {
    rate: RequestRate,
    random: Random,
    elapsed: f64,
}

impl Arrivals {
    pub(super) fn new(rate: RequestRate, seed: u64) -> Self {
        // Prompts have the streams from 0 up.
        Self { rate, random: Random::new(seed, u64::MAX), elapsed: 0.0 }
    }
}

impl Iterator for Arrivals {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let now = Duration::from_secs_f64(self.elapsed);
        self.elapsed += self.random.exponential() / self.rate.0;
        Some(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_checked() {
        assert_eq!("inf".parse(), Ok(RequestRate(f64::INFINITY)));
        assert_eq!(RequestRate(f64::INFINITY).json(), "inf");
        assert_eq!("2.5".parse::<RequestRate>().unwrap().json(), 2.5);
        for bad in ["0", "-1", "nan", "fast", "1e-300"] {
            assert!(bad.parse::<RequestRate>().is_err(), "{bad}");
        }
    }

    #[test]
    fn arrivals_keep_their_rate_and_repeat() {
        let times = |seed| Arrivals::new(RequestRate(4.0), seed).take(4001).collect::<Vec<_>>();
        let first = times(9);
        assert_eq!(first[0], Duration::ZERO);
        assert!(first.is_sorted());
        assert!((first[4000].as_secs_f64() - 1000.0).abs() < 60.0);
        assert_eq!(first, times(9));
        assert_ne!(first, times(10));
    }

    #[test]
    fn infinite_rate_sends_all_at_once() {
        assert!(Arrivals::new(RequestRate(f64::INFINITY), 0).take(10).all(|time| time == Duration::ZERO));
    }
}
