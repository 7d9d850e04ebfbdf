//! Points in time as files and answers spell them, and the clock they come from.
//!
//! The clock is a seam because it is not to be trusted: it jumps, and tests make it jump.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::{Error, Result, malformed};

/// The last millisecond that RFC 3339 can spell: the year 9999 ends.
const MAX_MILLIS: u64 = 253_402_300_799_999;

/// Milliseconds since 1970, UTC; at most the year 9999. Written as `2026-01-31T23:59:59.000Z`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Timestamp(u64);

/// Where the time of day comes from.
pub trait Clock: Send + Sync + 'static {
    /// Now. It may be earlier than what the last call said.
    fn now(&self) -> Timestamp;
}

/// The machine's clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        // A clock before 1970 is a clock that was never set.
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Timestamp::from_millis(u64::try_from(since.as_millis()).unwrap_or(MAX_MILLIS))
    }
}

impl Timestamp {
    /// From milliseconds since 1970; later than the year 9999 counts as its end.
    pub fn from_millis(millis: u64) -> Self {
        Self(millis.min(MAX_MILLIS))
    }

    /// Milliseconds since 1970.
    pub fn millis(self) -> u64 {
        self.0
    }

    /// This much later.
    pub fn after(self, duration: Duration) -> Self {
        Self::from_millis(self.0.saturating_add(u64::try_from(duration.as_millis()).unwrap_or(MAX_MILLIS)))
    }

    /// How long ago `earlier` was; zero when it lies ahead.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (seconds, millis) = (self.0 / 1000, self.0 % 1000);
        let (year, month, day) = civil(seconds / 86_400);
        let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
        write!(f, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z")
    }
}

impl From<Timestamp> for String {
    fn from(timestamp: Timestamp) -> Self {
        timestamp.to_string()
    }
}

impl TryFrom<String> for Timestamp {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl FromStr for Timestamp {
    type Err = Error;

    /// Reads what [`Display`](fmt::Display) writes, and nothing else.
    fn from_str(text: &str) -> Result<Self> {
        let fault = || malformed!("'{text:.40}' is no time like 2026-01-31T23:59:59.000Z");
        let fields = fields_of(text).ok_or_else(fault)?;
        let [year, month, day, hour, minute, second, millis] = fields;
        let days = days_since_1970(year, month, day).ok_or_else(fault)?;
        let timestamp = Self((((days * 24 + hour) * 60 + minute) * 60 + second) * 1000 + millis);
        // What was out of range (hour 24, day 31 of June) is spelled differently.
        if timestamp.0 <= MAX_MILLIS && timestamp.to_string() == text { Ok(timestamp) } else { Err(fault()) }
    }
}

/// The numbers of `YYYY-MM-DDThh:mm:ss.mmmZ`.
fn fields_of(text: &str) -> Option<[u64; 7]> {
    let places = [(0, 4), (5, 7), (8, 10), (11, 13), (14, 16), (17, 19), (20, 23)];
    let is_plain = text.len() == 24 && text.is_ascii();
    let mut fields = [0; 7];
    for (field, (start, end)) in fields.iter_mut().zip(places) {
        let digits =
            text.get(start..end).filter(|digits| is_plain && digits.bytes().all(|byte| byte.is_ascii_digit()))?;
        *field = digits.parse().ok()?;
    }
    Some(fields)
}

/// Days before the first of `month` in a year that is, or is not, a leap year.
fn days_before(month: u64, is_leap: bool) -> u64 {
    const STARTS: [u64; 12] = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334];
    STARTS[month as usize - 1] + u64::from(is_leap && month > 2)
}

fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

/// Days from the year 0 to the first of `year`, in the Gregorian calendar.
fn days_to_year(year: u64) -> u64 {
    let before = year.saturating_sub(1);
    year * 365 + before / 4 - before / 100 + before / 400 + u64::from(year > 0)
}

fn days_since_1970(year: u64, month: u64, day: u64) -> Option<u64> {
    let is_known = (1..=12).contains(&month) && (1..=31).contains(&day) && year >= 1970;
    is_known.then(|| days_to_year(year) - days_to_year(1970) + days_before(month, is_leap(year)) + day - 1)
}

/// Year, month and day of the Gregorian calendar, from days since 1970-01-01.
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + days_to_year(1970);
    // Never too late a year, and at most one too early.
    let mut year = days * 400 / 146_097;
    while days_to_year(year) > days {
        year -= 1;
    }
    while days_to_year(year + 1) <= days {
        year += 1;
    }
    let day_of_year = days - days_to_year(year);
    let month = (1..=12).rev().find(|month| days_before(*month, is_leap(year)) <= day_of_year).unwrap_or(1);
    (year, month, day_of_year - days_before(month, is_leap(year)) + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_times_are_spelled_and_read() {
        for (millis, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_399_999, "2000-02-28T23:59:59.999Z"),
            (951_782_400_000, "2000-02-29T00:00:00.000Z"),
            (1_735_689_599_001, "2024-12-31T23:59:59.001Z"),
            (4_107_542_400_000, "2100-03-01T00:00:00.000Z"),
            (MAX_MILLIS, "9999-12-31T23:59:59.999Z"),
        ] {
            assert_eq!(Timestamp(millis).to_string(), text);
            assert_eq!(text.parse::<Timestamp>().unwrap(), Timestamp(millis));
        }
        assert_eq!(Timestamp::from_millis(u64::MAX), Timestamp(MAX_MILLIS));
    }

    #[test]
    fn every_day_of_four_centuries_comes_back() {
        for day in 0..146_097 + 400 {
            let timestamp = Timestamp(day * 86_400_000);
            assert_eq!(timestamp.to_string().parse::<Timestamp>().unwrap(), timestamp);
        }
    }

    #[test]
    fn what_is_no_time_is_refused() {
        for text in [
            "",
            "2026-01-31",
            "2026-01-31T23:59:59Z",
            "2026-01-31T23:59:59.000+01",
            "2026-02-29T00:00:00.000Z",
            "2026-13-01T00:00:00.000Z",
            "2026-01-01T24:00:00.000Z",
            "2026-01-01T00:60:00.000Z",
            "1969-12-31T00:00:00.000Z",
            "+026-01-01T00:00:00.000Z",
            "2026/01/01T00:00:00.000Z",
            "2026-01-01T00:00:00.00\u{e9}",
        ] {
            assert!(text.parse::<Timestamp>().is_err(), "{text}");
        }
    }
}
