//! `mneme bench lora`: what an adapter costs, added and merged, in batches that alternate with batches of the model alone.

use std::io::Write;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use futures_util::future::try_join_all;
use mneme::engine::{AppliedAdapter, EngineHandle, LoadedAdapter, MergeRule};
use mneme::telemetry::MergeStage;
use serde::Serialize;

use super::in_process::InProcess;
use super::results::ResultArgs;
use super::statistics::Samples;
use super::timing::Timing;
use crate::cli::engine_args::{EngineArgs, WeightDtype};

/// How often the engine is asked whether the copy is whole.
const POLL: Duration = Duration::from_millis(5);
/// What the first request may take before its copy is begun.
const MAX_BEGIN: Duration = Duration::from_secs(60);
/// A copy that takes longer never comes.
const MAX_BUILD: Duration = Duration::from_secs(600);

/// Arguments of `mneme bench lora`.
#[derive(Debug, Args)]
#[command(after_help = "Example: mneme bench lora --adapter ./style --batch-size 1 --output-len 128 --rounds 7\n\n\
    Every round runs one batch of each kind, in another order than the round before; a ratio compares two batches of one\n\
    round. Where several adapters are added, request i of a batch has adapter i mod n; the first one is merged. Prompts are random tokens, another one for each request; answers are greedy and go on after EOS.")]
pub(super) struct LoraBenchArgs {
    #[command(flatten)]
    engine: EngineArgs,
    /// A folder with a LoRA adapter in PEFT's form, or a GGUF file of one; may be given again
    #[arg(long = "adapter", required = true)]
    adapters: Vec<PathBuf>,
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
    #[command(flatten)]
    result: ResultArgs,
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

/// Milliseconds between two tokens of requests of the model alone.
#[derive(Debug, Clone, Copy, Default, Serialize)]
struct Bystanders {
    median_itl_ms: f64,
    p99_itl_ms: f64,
    max_itl_ms: f64,
}

/// What the added adapters are of what a batch needs anyway.
#[derive(Debug, Clone, Copy, Default, Serialize)]
struct Shares {
    /// Bytes of all adapters, of the bytes of the weights: both are read once per step.
    bytes: f64,
    /// Products per token, of those with the weights, for adapters in the type of the weights.
    products: f64,
}

/// What bystanders see of loads.
struct Loading {
    while_loading: Bystanders,
    when_loaded: Bystanders,
    num_loads: u64,
}

#[derive(Debug, Serialize)]
struct LoraReport {
    shares: Shares,
    merged_bytes: i64,
    /// Spent on writing the copy, between steps.
    build_seconds: f64,
    /// While the copy was written.
    while_merging: Bystanders,
    /// As many batches behind that.
    when_merged: Bystanders,
    /// While an adapter is read and brought up for a request, once per batch.
    while_loading: Bystanders,
    /// Beside the same request, in as many batches, when the adapter is there.
    when_loaded: Bystanders,
    /// Times that the adapter was brought up.
    num_loads: u64,
    rounds: Vec<Round>,
}

/// A figure of a batch, and what it is called.
type Figure = (&'static str, fn(&Batch) -> f64);

/// Runs the measurement.
pub(super) fn run(args: &LoraBenchArgs) -> anyhow::Result<()> {
    let engine = InProcess::start(&args.engine, args.input_len.get(), args.output_len.get())?;
    let report = measure(args, &engine)?;
    engine.launched.shut_down()?;
    args.result.write(&report, |out| report.write_table(out))
}

fn measure(args: &LoraBenchArgs, engine: &InProcess) -> anyhow::Result<LoraReport> {
    let handle = &engine.launched.handle;
    let adapters = args.adapters.iter().map(|path| handle.load_adapter(path)).collect::<Result<Vec<_>, _>>()?;
    let mut bench = Bench { engine, batch_size: args.batch_size.get(), next_index: 0 };
    let merged = adapters.first().context("no adapter")?.clone().with_merge_rule(MergeRule::Always);
    let metrics = &handle.metrics().merges;
    let loading = bench.watch_loads(&args.adapters[0], args.rounds.get())?;
    let merged = [merged];
    let (while_merging, when_merged) = bench.watch_bystanders(&merged[0])?;
    wait_until_merged(engine)?;
    let (merged_bytes, build_seconds) = (metrics.merged_bytes.get(), metrics.build_seconds.get());
    let shares = Shares::new(&adapters, handle.info().num_multiplied, bytes_per_number(&args.engine));
    let added: Vec<_> = adapters.into_iter().map(|adapter| adapter.with_merge_rule(MergeRule::Never)).collect();
    let mut rounds = Vec::new();
    for number in 0..=args.rounds.get() {
        let mut round = Round::default();
        for kind in 0..3 {
            match (number + kind) % 3 {
                0 => round.base = bench.run(&[])?,
                1 => round.merged = bench.run(&merged)?,
                _ => round.added = bench.run(&added)?,
            }
        }
        if number > 0 {
            rounds.push(round);
        }
    }
    anyhow::ensure!(metrics.stage() == MergeStage::Merged, "the copy was given up during the measurement");
    let Loading { while_loading, when_loaded, num_loads } = loading;
    Ok(LoraReport {
        shares,
        merged_bytes,
        build_seconds,
        while_merging,
        when_merged,
        while_loading,
        when_loaded,
        num_loads,
        rounds,
    })
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
    /// Begins the copy, and has batches of the model alone run while it is written, and as many again.
    fn watch_bystanders(&mut self, adapter: &LoadedAdapter) -> anyhow::Result<(Bystanders, Bystanders)> {
        self.timings(&[])?;
        let metrics = &self.engine.launched.handle.metrics().merges;
        let adapters = vec![AppliedAdapter { adapter: adapter.clone(), scale: 1.0 }];
        let first = self.engine.submit_with(self.next_index, adapters)?;
        self.next_index += 1;
        let started_at = Instant::now();
        while metrics.stage() == MergeStage::None && started_at.elapsed() < MAX_BEGIN {
            std::thread::sleep(POLL);
        }
        drop(first);
        let (mut during, mut behind, mut num_batches) = (Vec::new(), Vec::new(), 0);
        while metrics.stage() == MergeStage::Building {
            during.extend(self.timings(&[])?.1);
            num_batches += 1;
        }
        for _ in 0..num_batches {
            behind.extend(self.timings(&[])?.1);
        }
        Ok((Bystanders::new(&during), Bystanders::new(&behind)))
    }

    /// Batches of the model alone beside one more request each, whose adapter is loaded for it in every second batch.
    fn watch_loads(&mut self, folder: &Path, num_rounds: usize) -> anyhow::Result<Loading> {
        let metrics = &self.engine.launched.handle.metrics().adapters;
        let loads = || metrics.num_loads(false) + metrics.num_loads(true);
        let (mut during, mut beside, mut num_loads) = (Vec::new(), Vec::new(), 0);
        for number in 0..=num_rounds {
            let before = loads();
            let while_loading = self.beside_adapter(|handle| handle.load_adapter(folder))?;
            let brought_up = loads() - before;
            let resident = self.engine.launched.handle.load_adapter(folder)?;
            self.timings(std::slice::from_ref(&resident))?;
            let when_loaded = self.beside_adapter(|_| Ok(resident.clone()))?;
            if number > 0 {
                during.extend(while_loading);
                beside.extend(when_loaded);
                num_loads += brought_up;
            }
        }
        let (while_loading, when_loaded) = (Bystanders::new(&during), Bystanders::new(&beside));
        Ok(Loading { while_loading, when_loaded, num_loads })
    }

    /// A batch of the model alone, beside a request under an adapter that comes while they run.
    fn beside_adapter(
        &mut self,
        adapter: impl FnOnce(&EngineHandle) -> mneme::Result<LoadedAdapter> + Send,
    ) -> anyhow::Result<Vec<Timing>> {
        let (engine, index) = (self.engine, self.next_index);
        self.next_index += 1;
        std::thread::scope(|scope| {
            let other = scope.spawn(move || -> anyhow::Result<()> {
                let adapter = adapter(&engine.launched.handle)?;
                let request = engine.submit_with(index, vec![AppliedAdapter { adapter, scale: 1.0 }])?;
                tokio::runtime::Builder::new_current_thread().build()?.block_on(request.finish())?;
                Ok(())
            });
            let timings = self.timings(&[])?.1;
            other.join().map_err(|_| anyhow::anyhow!("the thread of the adapter's request ended"))??;
            Ok(timings)
        })
    }

    fn run(&mut self, adapters: &[LoadedAdapter]) -> anyhow::Result<Batch> {
        let (seconds, timings) = self.timings(adapters)?;
        let mean_of = |times: Vec<Duration>| Samples::new(times.into_iter().map(millis).collect()).mean();
        let tpot_ms = mean_of(timings.iter().filter_map(Timing::tpot).collect());
        let ttft_ms = mean_of(timings.iter().map(|timing| timing.ttft).collect());
        Ok(Batch { seconds, tpot_ms, ttft_ms })
    }

    /// Seconds of one batch, and its requests, which take the adapters in turn.
    fn timings(&mut self, adapters: &[LoadedAdapter]) -> anyhow::Result<(f64, Vec<Timing>)> {
        let mut in_turn =
            adapters.iter().cycle().map(|adapter| AppliedAdapter { adapter: adapter.clone(), scale: 1.0 });
        let first = self.next_index;
        self.next_index += self.batch_size;
        let started_at = Instant::now();
        let requests = (first..self.next_index)
            .map(|index| self.engine.submit_with(index, in_turn.next().into_iter().collect()))
            .collect::<Result<Vec<_>, _>>()?;
        let timings =
            self.engine.runtime.block_on(try_join_all(requests.into_iter().map(|request| request.finish())))?;
        Ok((started_at.elapsed().as_secs_f64(), timings))
    }
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Of weights that adapters can be merged into: none that are quantised.
fn bytes_per_number(engine: &EngineArgs) -> usize {
    if engine.dtype == WeightDtype::F32 { 4 } else { 2 }
}

impl Shares {
    fn new(adapters: &[LoadedAdapter], num_multiplied: usize, bytes_per_number: usize) -> Self {
        let adapter_bytes: usize = adapters.iter().map(LoadedAdapter::num_bytes).sum();
        let bytes = adapter_bytes as f64 / (num_multiplied * bytes_per_number) as f64;
        Self { bytes, products: bytes / adapters.len().max(1) as f64 }
    }
}

impl Bystanders {
    fn new(timings: &[Timing]) -> Self {
        let itl = Samples::new(timings.iter().flat_map(|timing| &timing.itl).map(|time| millis(*time)).collect());
        Self { median_itl_ms: itl.median(), p99_itl_ms: itl.percentile(99.0), max_itl_ms: itl.percentile(100.0) }
    }
}

impl LoraReport {
    fn samples(&self, figure: impl Fn(&Round) -> f64) -> Samples {
        Samples::new(self.rounds.iter().map(figure).collect())
    }

    fn write_table(&self, out: &mut dyn Write) -> anyhow::Result<()> {
        let Self { shares, merged_bytes, build_seconds, rounds, .. } = self;
        writeln!(
            out,
            "Added: {:.1} % of the bytes of the weights per step, {:.1} % of their products per token",
            100.0 * shares.bytes,
            100.0 * shares.products
        )?;
        writeln!(out, "Copy: {merged_bytes} bytes, written in {build_seconds:.2} s; {} rounds", rounds.len())?;
        let loads = format!("beside {} loads", self.num_loads);
        let bystanders = [
            ("while merging", &self.while_merging),
            ("when merged", &self.when_merged),
            (&*loads, &self.while_loading),
            ("beside the same requests without loads", &self.when_loaded),
        ];
        for (what, found) in bystanders {
            let Bystanders { median_itl_ms, p99_itl_ms, max_itl_ms } = found;
            writeln!(
                out,
                "Inter-token latency of the model alone {what}: median {median_itl_ms:.3} ms, p99 {p99_itl_ms:.3} ms, \
                 largest {max_itl_ms:.3} ms"
            )?;
        }
        writeln!(
            out,
            "{:<22}{:>12}{:>12}{:>12}{:>22}{:>22}",
            "median", "base", "merged", "added", "merged/base", "added/base"
        )?;
        let figures: [Figure; 3] =
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
        let (while_merging, when_merged) = Default::default();
        let shares = Shares { bytes: 0.145, products: 0.036 };
        let (while_loading, when_loaded) = Default::default();
        let report = LoraReport {
            shares,
            merged_bytes: 7,
            build_seconds: 0.5,
            while_merging,
            when_merged,
            while_loading,
            when_loaded,
            num_loads: 3,
            rounds,
        };
        let mut text = Vec::new();
        report.write_table(&mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        assert!(text.contains("14.5 % of the bytes") && text.contains("3.6 % of their products"), "{text}");
        assert!(text.contains("1.010 [1.010, 1.100]") && text.contains("1.500 [1.500, 1.500]"), "{text}");
    }
}
