//! Service level objectives: bounds that a request must keep to count as good (DistServe, arXiv 2401.09670).

use std::str::FromStr;
use std::time::Duration;

use crate::cli::bench::timing::Timing;

/// A bound on one latency.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Objective {
    metric: Metric,
    most: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Metric {
    Ttft,
    Tpot,
    E2el,
}

impl Objective {
    /// Whether a request kept it. A single token has no time per token, which is within any bound.
    pub(super) fn is_met(&self, timing: &Timing) -> bool {
        let found = match self.metric {
            Metric::Ttft => timing.ttft,
            Metric::Tpot => timing.tpot().unwrap_or_default(),
            Metric::E2el => timing.e2el,
        };
        found <= self.most
    }
}

impl FromStr for Objective {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wanted = || format!("{text:?} is not ttft:MS, tpot:MS or e2el:MS");
        let (name, bound) = text.split_once(':').ok_or_else(wanted)?;
        let metric = match name {
            "ttft" => Metric::Ttft,
            "tpot" => Metric::Tpot,
            "e2el" => Metric::E2el,
            _ => return Err(wanted()),
        };
        let bound_ms: f64 = bound.parse().map_err(|_| wanted())?;
        let most = Duration::try_from_secs_f64(bound_ms / 1e3).map_err(|_| wanted())?;
        Ok(Self { metric, most })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_read_and_kept() {
        let timing = Timing {
            num_output_tokens: 3,
            ttft: Duration::from_millis(100),
            e2el: Duration::from_millis(140),
            ..Timing::default()
        };
        for (text, is_met) in [
            ("ttft:100", true),
            ("ttft:99.9", false),
            ("tpot:20", true),
            ("tpot:19", false),
            ("e2el:140", true),
            ("e2el:1", false),
        ] {
            assert_eq!(text.parse::<Objective>().unwrap().is_met(&timing), is_met, "{text}");
        }
        for bad in ["ttft", "itl:5", "tpot:-1", "tpot:nan", "e2el:soon", "e2el:1e300"] {
            assert!(bad.parse::<Objective>().is_err(), "{bad}");
        }
    }
}
