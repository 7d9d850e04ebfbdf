//! `mneme bench throughput`: many requests at once, and how many tokens per second come of it.

use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use clap::Args;
use futures_util::stream::{FuturesUnordered, StreamExt};
use mneme::engine::SubmitError;
use serde::Serialize;

use super::in_process::InProcess;
use super::results::ResultArgs;
use super::timing::Timing;
use crate::cli::engine_args::EngineArgs;

/// Arguments of `mneme bench throughput`.
#[derive(Debug, Args)]
#[command(after_help = "Example: mneme bench throughput --input-len 128 --output-len 64 --num-prompts 32\n\n\
    Prompts are random tokens, another one for each request; answers are greedy and go on after EOS.")]
pub(super) struct ThroughputArgs {
    #[command(flatten)]
    engine: EngineArgs,
    /// Tokens of a prompt
    #[arg(long, default_value = "128")]
    input_len: NonZeroUsize,
    /// Tokens of an answer
    #[arg(long, default_value = "128")]
    output_len: NonZeroUsize,
    /// Requests
    #[arg(long, default_value = "100")]
    num_prompts: NonZeroUsize,
    #[command(flatten)]
    result: ResultArgs,
}

/// What was measured, under vLLM's names where it has them.
#[derive(Debug, Serialize)]
struct ThroughputReport {
    elapsed_time: f64,
    num_requests: usize,
    total_num_tokens: usize,
    total_output_tokens: usize,
    requests_per_second: f64,
    tokens_per_second: f64,
    output_tokens_per_second: f64,
}

/// Runs the measurement.
pub(super) fn run(args: &ThroughputArgs) -> anyhow::Result<()> {
    let engine = InProcess::start(&args.engine, args.input_len.get(), args.output_len.get())?;
    let started_at = Instant::now();
    let timings = engine.runtime.block_on(run_all(&engine, args.num_prompts.get()))?;
    let report = ThroughputReport::new(&timings, started_at.elapsed());
    engine.launched.shut_down()?;
    args.result.write(&report, |out| Ok(writeln!(out, "{report}")?))
}

/// Queues requests as long as the engine takes them; when its queue is full, each end makes room for another.
async fn run_all(engine: &InProcess, num_requests: usize) -> anyhow::Result<Vec<Timing>> {
    let mut timings = Vec::new();
    let mut running = FuturesUnordered::new();
    for index in 0..num_requests {
        let request = loop {
            match engine.submit(index) {
                Ok(request) => break request,
                Err(SubmitError::QueueFull) => match running.next().await {
                    Some(timing) => timings.push(timing?),
                    None => anyhow::bail!("the engine's queue is full although nothing runs"),
                },
                Err(error) => return Err(error.into()),
            }
        };
        running.push(request.finish());
    }
    while let Some(timing) = running.next().await {
        timings.push(timing?);
    }
    Ok(timings)
}

impl ThroughputReport {
    fn new(timings: &[Timing], elapsed: Duration) -> Self {
        let seconds = elapsed.as_secs_f64().max(f64::MIN_POSITIVE);
        let total_input_tokens: usize = timings.iter().map(|timing| timing.num_input_tokens).sum();
        let total_output_tokens: usize = timings.iter().map(|timing| timing.num_output_tokens).sum();
        let total_num_tokens = total_input_tokens + total_output_tokens;
        Self {
            elapsed_time: seconds,
            num_requests: timings.len(),
            total_num_tokens,
            total_output_tokens,
            requests_per_second: timings.len() as f64 / seconds,
            tokens_per_second: total_num_tokens as f64 / seconds,
            output_tokens_per_second: total_output_tokens as f64 / seconds,
        }
    }
}

impl std::fmt::Display for ThroughputReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "Throughput: {:.2} requests/s, {:.2} total tokens/s, {:.2} output tokens/s",
            self.requests_per_second, self.tokens_per_second, self.output_tokens_per_second
        )?;
        writeln!(f, "Total num prompt tokens:  {}", self.total_num_tokens - self.total_output_tokens)?;
        write!(f, "Total num output tokens:  {}", self.total_output_tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_counts_per_second() {
        let timing = Timing { num_input_tokens: 30, num_output_tokens: 10, ..Timing::default() };
        let report = ThroughputReport::new(&[timing.clone(), timing], Duration::from_secs(4));
        assert_eq!(report.requests_per_second, 0.5);
        assert_eq!(report.tokens_per_second, 20.0);
        assert_eq!(report.output_tokens_per_second, 5.0);
        let line = "Throughput: 0.50 requests/s, 20.00 total tokens/s, 5.00 output tokens/s";
        assert!(report.to_string().starts_with(line));
    }
}
