//! The four latencies of a set of requests, as table and as JSON under vLLM's names.

use std::io::{self, Write};
use std::time::Duration;

use serde_json::{Map, Value};

use super::statistics::Samples;
use super::table;
use super::timing::Timing;

/// Latencies in milliseconds.
#[derive(Debug, Default)]
pub(super) struct LatencyMetrics {
    /// To the first token.
    ttft: Samples,
    /// Per token after the first, one sample per request.
    tpot: Samples,
    /// Between arrivals, one sample per pair.
    itl: Samples,
    /// To the last token.
    e2el: Samples,
}

impl LatencyMetrics {
    pub(super) fn new(timings: &[Timing]) -> Self {
        let samples = |values: Vec<Duration>| Samples::new(values.into_iter().map(milliseconds).collect());
        Self {
            ttft: samples(timings.iter().map(|timing| timing.ttft).collect()),
            tpot: samples(timings.iter().filter_map(Timing::tpot).collect()),
            itl: samples(timings.iter().flat_map(|timing| timing.itl.iter().copied()).collect()),
            e2el: samples(timings.iter().map(|timing| timing.e2el).collect()),
        }
    }

    /// The four parts of the table.
    pub(super) fn write_table(&self, out: &mut dyn Write, percents: &[f64]) -> io::Result<()> {
        let parts = [
            ("Time to First Token", "TTFT", &self.ttft),
            ("Time per Output Token (excl. 1st token)", "TPOT", &self.tpot),
            ("Inter-token Latency", "ITL", &self.itl),
            ("End-to-end Latency", "E2EL", &self.e2el),
        ];
        for (title, name, samples) in parts {
            table::title(out, title, '-')?;
            table::value(out, &format!("Mean {name} (ms):"), samples.mean())?;
            table::value(out, &format!("Median {name} (ms):"), samples.median())?;
            for &percent in percents {
                table::value(out, &format!("P{percent} {name} (ms):"), samples.percentile(percent))?;
            }
        }
        Ok(())
    }

    /// Adds `mean_ttft_ms`, `p99_ttft_ms` and so on.
    pub(super) fn add_json(&self, object: &mut Map<String, Value>, percents: &[f64]) {
        let parts = [("ttft", &self.ttft), ("tpot", &self.tpot), ("itl", &self.itl), ("e2el", &self.e2el)];
        for (name, samples) in parts {
            object.insert(format!("mean_{name}_ms"), samples.mean().into());
            object.insert(format!("median_{name}_ms"), samples.median().into());
            object.insert(format!("std_{name}_ms"), samples.std().into());
            for &percent in percents {
                object.insert(format!("p{percent}_{name}_ms"), samples.percentile(percent).into());
            }
        }
    }
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// A percentile on the command line.
pub(super) fn parse_percent(text: &str) -> Result<f64, String> {
    let percent = text.parse().ok().filter(|percent| (0.0..=100.0).contains(percent));
    percent.ok_or_else(|| format!("{text:?} is not a percentile between 0 and 100"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_vllms() {
        let timing = Timing {
            num_input_tokens: 1,
            num_output_tokens: 3,
            ttft: Duration::from_millis(10),
            itl: vec![Duration::from_millis(4), Duration::from_millis(6)],
            e2el: Duration::from_millis(20),
        };
        let metrics = LatencyMetrics::new(&[timing]);
        let mut object = Map::new();
        metrics.add_json(&mut object, &[99.0, 99.9]);
        assert_eq!(object["mean_ttft_ms"], 10.0);
        assert_eq!(object["median_tpot_ms"], 5.0);
        assert_eq!(object["std_itl_ms"], 1.0);
        assert_eq!(object["p99_e2el_ms"], 20.0);
        assert!(object.contains_key("p99.9_ttft_ms"));
        let mut text = Vec::new();
        metrics.write_table(&mut text, &[99.0]).unwrap();
        let text = String::from_utf8(text).unwrap();
        for line in ["---------------Time to First Token", "Mean TTFT (ms):", "Median TPOT (ms):", "P99 ITL (ms):"] {
            assert!(text.contains(line), "{text}");
        }
    }

    #[test]
    fn percentiles_are_checked() {
        assert_eq!(parse_percent("99.9"), Ok(99.9));
        for bad in ["101", "-1", "nan", "many"] {
            assert!(parse_percent(bad).is_err(), "{bad}");
        }
    }
}
