//! `mneme bench latency`: batches of equal requests, one after the other.

use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::time::Instant;

use clap::Args;
use futures_util::future::try_join_all;
use serde_json::{Map, Value, json};

use super::in_process::InProcess;
use super::metrics::LatencyMetrics;
use super::results::ResultArgs;
use super::statistics::Samples;
use super::table;
use super::timing::Timing;
use crate::cli::engine_args::EngineArgs;

/// The percentiles vLLM reports here.
const PERCENTS: [f64; 6] = [10.0, 25.0, 50.0, 75.0, 90.0, 99.0];

/// Arguments of `mneme bench latency`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example: mneme bench latency --input-len 512 --output-len 128 --batch-size 4 --num-iters 5\n\n\
    Prompts are random tokens, another one for each request; answers are greedy and go on after EOS."
)]
pub(super) struct LatencyArgs {
    #[command(flatten)]
    engine: EngineArgs,
    /// Tokens of a prompt
    #[arg(long, default_value = "32")]
    input_len: NonZeroUsize,
    /// Tokens of an answer
    #[arg(long, default_value = "128")]
    output_len: NonZeroUsize,
    /// Requests that run together
    #[arg(long, default_value = "8")]
    batch_size: NonZeroUsize,
    /// Batches that are measured
    #[arg(long, default_value = "30")]
    num_iters: NonZeroUsize,
    /// Batches that run before the measurement
    #[arg(long, default_value_t = 2)]
    num_iters_warmup: usize,
    #[command(flatten)]
    result: ResultArgs,
}

/// What was measured.
struct LatencyReport {
    /// Seconds per batch.
    batches: Samples,
    requests: LatencyMetrics,
}

/// Runs the measurement.
pub(super) fn run(args: &LatencyArgs) -> anyhow::Result<()> {
    let engine = InProcess::start(&args.engine, args.input_len.get(), args.output_len.get())?;
    let report = measure(args, &engine)?;
    engine.launched.shut_down()?;
    args.result.write(&report.json(), |out| Ok(report.write_table(out)?))
}

fn measure(args: &LatencyArgs, engine: &InProcess) -> anyhow::Result<LatencyReport> {
    let batch_size = args.batch_size.get();
    for iteration in 0..args.num_iters_warmup {
        run_batch(engine, iteration * batch_size, batch_size)?;
    }
    let (mut seconds, mut timings) = (Vec::new(), Vec::new());
    for iteration in 0..args.num_iters.get() {
        let started_at = Instant::now();
        timings.extend(run_batch(engine, (args.num_iters_warmup + iteration) * batch_size, batch_size)?);
        seconds.push(started_at.elapsed().as_secs_f64());
    }
    Ok(LatencyReport { batches: Samples::new(seconds), requests: LatencyMetrics::new(&timings) })
}

fn run_batch(engine: &InProcess, first_index: usize, batch_size: usize) -> anyhow::Result<Vec<Timing>> {
    let requests = (0..batch_size).map(|offset| engine.submit(first_index + offset)).collect::<Result<Vec<_>, _>>()?;
    engine.runtime.block_on(try_join_all(requests.into_iter().map(|request| request.finish())))
}

impl LatencyReport {
    fn json(&self) -> Value {
        let percentile = |percent: f64| (percent.to_string(), self.batches.percentile(percent).into());
        let mut object = Map::new();
        object.insert("avg_latency".into(), self.batches.mean().into());
        object.insert("latencies".into(), json!(self.batches.as_slice()));
        object.insert("percentiles".into(), Value::Object(PERCENTS.into_iter().map(percentile).collect()));
        self.requests.add_json(&mut object, &PERCENTS);
        Value::Object(object)
    }

    fn write_table(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "Avg latency: {} seconds", self.batches.mean())?;
        for percent in PERCENTS {
            writeln!(out, "{percent}% percentile latency: {} seconds", self.batches.percentile(percent))?;
        }
        self.requests.write_table(out, &[99.0])?;
        table::title(out, "", '=')
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_json_has_vllms_keys() {
        let report = LatencyReport { batches: Samples::new(vec![2.0, 1.0]), requests: LatencyMetrics::default() };
        let json = report.json();
        assert_eq!(json["avg_latency"], 1.5);
        assert_eq!(json["percentiles"]["50"], 1.5);
        assert_eq!(json["latencies"], json!([1.0, 2.0]));
        let mut text = Vec::new();
        report.write_table(&mut text).unwrap();
        assert!(String::from_utf8(text).unwrap().starts_with("Avg latency: 1.5 seconds\n10% percentile"));
    }
}
