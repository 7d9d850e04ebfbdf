//! Where a cube is in its life, and how much it is used. Neither is written down: the state follows from other things,
//! and use is counted anew in every process.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::timestamp::Timestamp;

/// Half-life of the heat of a cube that has none of its own.
const DEFAULT_HALF_LIFE: Duration = Duration::from_secs(7 * 24 * 3600);

/// Where a cube is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Made by this process and not used yet.
    Generated,
    /// In use: its blocks are in memory.
    Activated,
    /// At rest on disk.
    Archived,
    /// Immutable.
    Frozen,
    /// Past its lifetime: nobody finds it.
    Expired,
}

/// How much a cube was used since the process started.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Usage {
    /// Requests that used it.
    pub num_hits: u64,
    /// When the last one did.
    pub last_used_at: Option<Timestamp>,
    heat: f64,
}

impl Usage {
    /// Counts one use.
    pub(super) fn note(&mut self, now: Timestamp, half_life_s: Option<u64>) {
        self.heat = self.heat(now, half_life_s) + 1.0;
        self.num_hits += 1;
        self.last_used_at = Some(now);
    }

    /// Uses, each counting half after every half-life. A clock that went back lets nothing decay.
    pub fn heat(&self, now: Timestamp, half_life_s: Option<u64>) -> f64 {
        let half_life = half_life_s.map_or(DEFAULT_HALF_LIFE, Duration::from_secs);
        let elapsed = self.last_used_at.map_or(Duration::ZERO, |last| now.since(last));
        self.heat * 0.5f64.powf(elapsed.as_secs_f64() / half_life.as_secs_f64().max(1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heat_halves_with_every_half_life_and_never_grows_by_itself() {
        let at = |seconds: u64| Timestamp::from_millis(seconds * 1000);
        let mut usage = Usage::default();
        assert_eq!(usage.heat(at(5), None), 0.0);
        usage.note(at(100), Some(10));
        usage.note(at(110), Some(10));
        assert_eq!(usage.heat(at(110), Some(10)), 1.5);
        assert_eq!(usage.heat(at(120), Some(10)), 0.75);
        assert_eq!(usage.heat(at(0), Some(10)), 1.5);
        assert_eq!((usage.num_hits, usage.last_used_at), (2, Some(at(110))));
        assert!(usage.heat(at(120), Some(0)).is_finite());
    }
}
