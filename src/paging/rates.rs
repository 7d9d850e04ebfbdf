//! What moving a block costs, and what computing it again would: measured while the engine runs, never configured.

use std::time::Duration;

use super::Tier;

/// Weight of the newest measurement: the last dozen decide.
const NEWEST: f64 = 0.15;

/// Steps with fewer new tokens say what a step costs, not what a token costs.
const MIN_PREFILL_TOKENS: usize = 32;

/// Moving averages of what has been seen so far.
#[derive(Debug, Clone, Default)]
pub struct Rates {
    prefill_seconds_per_token: Average,
    host_seconds_per_block: Average,
    disk_seconds_per_block: Average,
}

#[derive(Debug, Clone, Copy, Default)]
struct Average(Option<f64>);

impl Average {
    fn observe(&mut self, value: f64) {
        self.0 = Some(self.0.map_or(value, |mean| mean + NEWEST * (value - mean)));
    }
}

impl Rates {
    /// Takes note of a step that computed `num_tokens` tokens.
    pub fn observe_step(&mut self, num_tokens: usize, took: Duration) {
        if num_tokens >= MIN_PREFILL_TOKENS {
            self.prefill_seconds_per_token.observe(took.as_secs_f64() / num_tokens as f64);
        }
    }

    /// Takes note of a block that came from `tier`.
    pub fn observe_load(&mut self, tier: Tier, took: Duration) {
        match tier {
            Tier::Device => {}
            Tier::Host => self.host_seconds_per_block.observe(took.as_secs_f64()),
            Tier::Disk => self.disk_seconds_per_block.observe(took.as_secs_f64()),
        }
    }

    /// Milliseconds to compute `num_tokens` tokens; `None` before the first long step.
    pub fn recompute_ms(&self, num_tokens: usize) -> Option<f64> {
        self.prefill_seconds_per_token.0.map(|seconds| seconds * num_tokens as f64 * 1e3)
    }

    /// Milliseconds to bring blocks up when `num_threads` do it; `None` before the first of each kind that is wanted.
    pub fn fetch_ms(&self, num_host_blocks: usize, num_disk_blocks: usize, num_threads: usize) -> Option<f64> {
        let part =
            |average: Average, count: usize| if count == 0 { Some(0.0) } else { Some(average.0? * count as f64) };
        let seconds =
            part(self.host_seconds_per_block, num_host_blocks)? + part(self.disk_seconds_per_block, num_disk_blocks)?;
        Some(seconds * 1e3 / num_threads.max(1) as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn costs_are_unknown_until_measured_and_then_follow_what_is_seen() {
        let mut rates = Rates::default();
        assert_eq!((rates.recompute_ms(100), rates.fetch_ms(0, 1, 2)), (None, None));
        rates.observe_step(1, Duration::from_secs(9));
        assert_eq!(rates.recompute_ms(100), None, "a decode step says nothing about prefill");
        rates.observe_step(100, Duration::from_millis(50));
        rates.observe_load(Tier::Disk, Duration::from_millis(2));
        assert_eq!(rates.recompute_ms(200), Some(100.0));
        assert_eq!(rates.fetch_ms(0, 10, 2), Some(10.0));
        assert_eq!(rates.fetch_ms(1, 10, 2), None, "nothing is known about the host");
        (0..200).for_each(|_| rates.observe_load(Tier::Disk, Duration::from_millis(8)));
        assert!(rates.fetch_ms(0, 10, 2).is_some_and(|found| (found - 40.0).abs() < 0.1));
    }
}
