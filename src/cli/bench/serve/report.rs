//! The result of a load: vLLM's table and vLLM's JSON keys.

use std::io::{self, Write};

use serde_json::{Map, Value, json};

use super::Endpoint;
use super::arrivals::RequestRate;
use super::goodput::Objective;
use super::load::Outcome;
use crate::cli::bench::metrics::LatencyMetrics;
use crate::cli::bench::{table, timestamp};

/// What was run.
pub(super) struct RunInfo {
    pub(super) endpoint: Endpoint,
    pub(super) model: String,
    pub(super) num_prompts: usize,
    pub(super) rate: RequestRate,
    pub(super) max_concurrency: u32,
    pub(super) percents: Vec<f64>,
    pub(super) objectives: Vec<Objective>,
}

/// What came of it.
pub(super) struct Report {
    info: RunInfo,
    outcome: Outcome,
    latencies: LatencyMetrics,
    /// When the run ended.
    date: String,
}

impl Report {
    pub(super) fn new(outcome: Outcome, info: RunInfo) -> Self {
        Self { latencies: LatencyMetrics::new(&outcome.timings), outcome, info, date: timestamp::now() }
    }

    /// An error when no request succeeded; a remark about the first one that failed otherwise.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        let (num_failed, error) = (self.outcome.num_failed, self.outcome.first_error.as_deref().unwrap_or_default());
        anyhow::ensure!(!self.outcome.timings.is_empty(), "all {num_failed} requests failed; the first: {error}");
        if num_failed > 0 {
            writeln!(io::stderr(), "{num_failed} requests failed; the first: {error}")?;
        }
        Ok(())
    }

    pub(super) fn write_table(&self, out: &mut dyn Write) -> io::Result<()> {
        table::title(out, " Serving Benchmark Result ", '=')?;
        table::count(out, "Successful requests:", self.outcome.timings.len())?;
        table::count(out, "Failed requests:", self.outcome.num_failed)?;
        table::count(out, "Maximum request concurrency:", self.info.max_concurrency as usize)?;
        if self.info.rate.per_second().is_finite() {
            table::value(out, "Request rate configured (RPS):", self.info.rate.per_second())?;
        }
        table::value(out, "Benchmark duration (s):", self.outcome.duration.as_secs_f64())?;
        table::count(out, "Total input tokens:", self.num_input_tokens())?;
        table::count(out, "Total generated tokens:", self.num_output_tokens())?;
        table::value(out, "Request throughput (req/s):", self.per_second(self.outcome.timings.len()))?;
        if let Some(goodput) = self.goodput() {
            table::value(out, "Request goodput (req/s):", goodput)?;
        }
        table::value(out, "Output token throughput (tok/s):", self.per_second(self.num_output_tokens()))?;
        table::value(out, "Total Token throughput (tok/s):", self.per_second(self.num_tokens()))?;
        self.latencies.write_table(out, &self.info.percents)?;
        table::title(out, "", '=')
    }

    pub(super) fn json(&self) -> Value {
        let mut object = self.settings();
        let results = json!({
            "duration": self.outcome.duration.as_secs_f64(),
            "completed": self.outcome.timings.len(),
            "failed": self.outcome.num_failed,
            "total_input_tokens": self.num_input_tokens(),
            "total_output_tokens": self.num_output_tokens(),
            "request_throughput": self.per_second(self.outcome.timings.len()),
            "request_goodput": self.goodput(),
            "output_throughput": self.per_second(self.num_output_tokens()),
            "total_token_throughput": self.per_second(self.num_tokens()),
            "first_error": self.outcome.first_error,
        });
        if let Value::Object(results) = results {
            object.extend(results);
        }
        self.latencies.add_json(&mut object, &self.info.percents);
        Value::Object(object)
    }

    fn settings(&self) -> Map<String, Value> {
        let pairs = [
            ("date", json!(self.date)),
            ("endpoint_type", json!(self.info.endpoint.backend())),
            ("backend", json!(self.info.endpoint.backend())),
            ("model_id", json!(self.info.model)),
            ("tokenizer_id", json!(self.info.model)),
            ("num_prompts", json!(self.info.num_prompts)),
            ("request_rate", self.info.rate.json()),
            ("burstiness", json!(1.0)),
            ("max_concurrency", json!(self.info.max_concurrency)),
        ];
        pairs.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }

    fn num_input_tokens(&self) -> usize {
        self.outcome.timings.iter().map(|timing| timing.num_input_tokens).sum()
    }

    fn num_output_tokens(&self) -> usize {
        self.outcome.timings.iter().map(|timing| timing.num_output_tokens).sum()
    }

    fn num_tokens(&self) -> usize {
        self.num_input_tokens() + self.num_output_tokens()
    }

    fn per_second(&self, count: usize) -> f64 {
        count as f64 / self.outcome.duration.as_secs_f64().max(1e-9)
    }

    /// Requests per second that kept all objectives; `None` without objectives.
    fn goodput(&self) -> Option<f64> {
        let objectives = &self.info.objectives;
        let good = |timing: &&_| objectives.iter().all(|objective| objective.is_met(timing));
        (!objectives.is_empty()).then(|| self.per_second(self.outcome.timings.iter().filter(good).count()))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::cli::bench::timing::Timing;

    fn report(timings: Vec<Timing>) -> Report {
        let info = RunInfo {
            endpoint: Endpoint::Completions,
            model: "m".into(),
            num_prompts: 3,
            rate: "inf".parse().unwrap(),
            max_concurrency: 8,
            percents: vec![99.0],
            objectives: vec!["ttft:15".parse().unwrap()],
        };
        let first_error = Some("HTTP 503".to_owned());
        Report::new(Outcome { timings, num_failed: 1, first_error, duration: Duration::from_secs(2) }, info)
    }

    fn timing(ttft_ms: u64) -> Timing {
        let ttft = Duration::from_millis(ttft_ms);
        Timing { num_input_tokens: 10, num_output_tokens: 5, ttft, e2el: ttft * 2, itl: Vec::new() }
    }

    #[test]
    fn json_has_vllms_keys() {
        let json = report(vec![timing(10), timing(20)]).json();
        let known = [
            ("duration", 2.0),
            ("request_throughput", 1.0),
            ("request_goodput", 0.5),
            ("output_throughput", 5.0),
            ("total_token_throughput", 15.0),
            ("mean_ttft_ms", 15.0),
            ("median_e2el_ms", 30.0),
            ("std_ttft_ms", 5.0),
        ];
        for (name, wanted) in known {
            assert_eq!(json[name], wanted, "{name}");
        }
        assert_eq!((&json["completed"], &json["total_input_tokens"]), (&json!(2), &json!(20)));
        assert_eq!((&json["request_rate"], &json["endpoint_type"]), (&json!("inf"), &json!("openai")));
    }

    #[test]
    fn the_table_has_vllms_lines() {
        let report = report(vec![timing(10)]);
        let mut text = Vec::new();
        report.write_table(&mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        for line in [
            "Successful requests:                     1         ",
            "Failed requests:                         1         ",
            "Benchmark duration (s):                  2.00      ",
            "Request goodput (req/s):                 0.50      ",
            "P99 TTFT (ms):                           10.00     ",
        ] {
            assert!(text.lines().any(|found| found == line), "{line:?} in\n{text}");
        }
        assert!(report.check().is_ok());
    }

    #[test]
    fn a_run_without_success_is_an_error() {
        let error = report(Vec::new()).check().unwrap_err().to_string();
        assert!(error.contains("HTTP 503"), "{error}");
    }
}
