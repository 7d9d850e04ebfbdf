//! `mneme bench lora`: what an adapter costs, added and merged, in batches that alternate with batches of the model alone.

use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use futures_util::future::try_join_all;
use mneme::engine::{AppliedAdapter, LoadedAdapter, MergeRule};
use mneme::telemetry::MergeStage;
use serde::Serialize;

use super::in_process::InProcess;
use super::statistics::Samples;
use super::timing::Timing;
use crate::cli::engine_args::EngineArgs;

/// How often the engine is asked whether the copy is whole.
const POLL: Duration = Duration::from_millis(5);
/// A copy that takes longer never comes.
const MAX_BUILD: Duration = Duration::from_secs(600);

/// Arguments of `mneme bench lora`.
#[derive(Debug, Args)]
#[command(after_help = "Example: mneme bench lora --adapter ./style --batch-size 1 --output-len 128 --rounds 7\n\n\
    Every round runs one batch of each kind, in another order than the round before; a ratio compares two batches of one\n\
    round. Prompts are random tokens, another one for each request; answers are greedy and go on after EOS.")]
pub(super) struct LoraBenchArgs {
    #[command(flatten)]
    engine: EngineArgs,
    /// A folder with a LoRA adapter in PEFT's form
    #[arg(long)]
    adapter: PathBuf,
    /// Tokens of a prompt
    #[arg(long, default_value = "32")]
    input_len: NonZeroUsize,
    /// Tokens of an answer
    #[arg(long, default_value = "128")]
    output_len: NonZeroUsize,
    /// Requests that run together
    #[arg(long, default_value = "1")]
    batch_size: NonZeroUsize,
    /// Rounds that are measured, behind one that is not
    #[arg(long, default_value = "7")]
    rounds: NonZeroUsize,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Seconds per batch of one round, and milliseconds per output token behind the first.
#[derive(Debug, Clone, Copy, Default, Serialize)]
struct Batch {
    seconds: f64,
    tpot_ms: f64,
    ttft_ms: f64,
}

/// One batch of each kind.
#[derive(Debug, Clone, Copy, Default, Serialize)]
struct Round {
    base: Batch,
    merged: Batch,
    added: Batch,
}

#[derive(Debug, Serialize)]
struct LoraReport {
    merged_bytes: i64,
    /// From the first request to the copy's last row, requests of the same adapter between.
    build_seconds: f64,
    rounds: Vec<Round>,
}

/// Runs the measurement.
pub(super) fn run(args: &LoraBenchArgs) -> anyhow::Result<()> {
    let engine = InProcess::start(&args.engine, args.input_len.get(), args.output_len.get())?;
    let report = measure(args, &engine)?;
    engine.launched.shut_down()?;
    let mut out = io::stdout().lock();
    match args.json {
        true => writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?,
        false => report.write_table(&mut out)?,
    }
    Ok(())
}

fn measure(args: &LoraBenchArgs, engine: &InProcess) -> anyhow::Result<LoraReport> {
    let handle = &engine.launched.handle;
    let adapter = handle.load_adapter(&args.adapter)?;
    let mut bench = Bench { engine, batch_size: args.batch_size.get(), next_index: 0 };
    let merged = adapter.clone().with_merge_rule(MergeRule::Always);
    // The first request begins the copy.
    bench.run(Some(&merged))?;
    wait_until_merged(engine)?;
    let metrics = &handle.metrics().merges;
    let (merged_bytes, build_seconds) = (metrics.merged_bytes.get(), metrics.build_seconds.get());
    let added = adapter.with_merge_rule(MergeRule::Never);
    let mut rounds = Vec::new();
    for number in 0..=args.rounds.get() {
        let mut round = Round::default();
        for kind in 0..3 {
            match (number + kind) % 3 {
                0 => round.base = bench.run(None)?,
                1 => round.merged = bench.run(Some(&merged))?,
                _ => round.added = bench.run(Some(&added))?,
            }
        }
        if number > 0 {
            rounds.push(round);
        }
    }
    anyhow::ensure!(metrics.stage() == MergeStage::Merged, "the copy was given up during the measurement");
    Ok(LoraReport { merged_bytes, build_seconds, rounds })
}

fn wait_until_merged(engine: &InProcess) -> anyhow::Result<()> {
    let (metrics, started_at) = (&engine.launched.handle.metrics().merges, Instant::now());
    while metrics.stage() != MergeStage::Merged {
        let is_building = metrics.stage() == MergeStage::Building && started_at.elapsed() < MAX_BUILD;
        anyhow::ensure!(
            is_building,
            "the adapter is not merged: weights that are quantised or --deterministic do not allow it, or \
             --max-merged-bytes is too small"
        );
        std::thread::sleep(POLL);
    }
    Ok(())
}

struct Bench<'a> {
    engine: &'a InProcess,
    batch_size: usize,
    next_index: usize,
}

impl Bench<'_> {
    fn run(&mut self, adapter: Option<&LoadedAdapter>) -> anyhow::Result<Batch> {
        let adapters = || adapter.map(|adapter| AppliedAdapter { adapter: adapter.clone(), scale: 1.0 }).into_iter();
        let first = self.next_index;
        self.next_index += self.batch_size;
        let started_at = Instant::now();
        let requests = (first..self.next_index)
            .map(|index| self.engine.submit_with(index, adapters().collect()))
            .collect::<Result<Vec<_>, _>>()?;
        let timings =
            self.engine.runtime.block_on(try_join_all(requests.into_iter().map(|request| request.finish())))?;
        let seconds = started_at.elapsed().as_secs_f64();
        let millis = |times: Vec<Duration>| {
            Samples::new(times.into_iter().map(|time| time.as_secs_f64() * 1e3).collect()).mean()
        };
        let tpot_ms = millis(timings.iter().filter_map(Timing::tpot).collect());
        anyhow::ensure!(!timings.is_empty(), "nothing was measured");
        let ttft_ms = millis(timings.iter().map(|timing| timing.ttft).collect());
        Ok(Batch { seconds, tpot_ms, ttft_ms })
    }
}

impl LoraReport {
    fn samples(&self, figure: impl Fn(&Round) -> f64) -> Samples {
        Samples::new(self.rounds.iter().map(figure).collect())
    }

    fn write_table(&self, out: &mut dyn Write) -> anyhow::Result<()> {
        let Self { merged_bytes, build_seconds, rounds } = self;
        writeln!(out, "Copy: {merged_bytes} bytes, written in {build_seconds:.2} s; {} rounds", rounds.len())?;
        writeln!(
            out,
            "{:<22}{:>12}{:>12}{:>12}{:>22}{:>22}",
            "median", "base", "merged", "added", "merged/base", "added/base"
        )?;
        let figures: [(&str, fn(&Batch) -> f64); 3] =
            [("batch s", |it| it.seconds), ("TPOT ms", |it| it.tpot_ms), ("TTFT ms", |it| it.ttft_ms)];
        for (name, figure) in figures {
            let median = |of: fn(&Round) -> &Batch| self.samples(|round| figure(of(round))).median();
            let ratio = |of: fn(&Round) -> &Batch| -> anyhow::Result<String> {
                let ratios = self.samples(|round| figure(of(round)) / figure(&round.base));
                let (first, last) = ratios.as_slice().first().zip(ratios.as_slice().last()).context("no rounds")?;
                Ok(format!("{:.3} [{first:.3}, {last:.3}]", ratios.median()))
            };
            let (base, merged, added) =
                (median(|round| &round.base), median(|round| &round.merged), median(|round| &round.added));
            let (merged_ratio, added_ratio) = (ratio(|round| &round.merged)?, ratio(|round| &round.added)?);
            writeln!(out, "{name:<22}{base:>12.3}{merged:>12.3}{added:>12.3}{merged_ratio:>22}{added_ratio:>22}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_of_batches_of_one_round() {
        let batch = |seconds: f64| Batch { seconds, tpot_ms: seconds, ttft_ms: seconds };
        let round = |base: f64, merged: f64, added: f64| Round {
            base: batch(base),
            merged: batch(merged),
            added: batch(added),
        };
        let rounds = vec![round(1.0, 1.01, 1.5), round(2.0, 2.02, 3.0), round(4.0, 4.4, 6.0)];
        let report = LoraReport { merged_bytes: 7, build_seconds: 0.5, rounds };
        let mut text = Vec::new();
        report.write_table(&mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        assert!(text.contains("1.010 [1.010, 1.100]") && text.contains("1.500 [1.500, 1.500]"), "{text}");
    }
}
