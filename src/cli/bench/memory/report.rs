//! The result: one table of first tokens, one of bytes per second, and both as JSON with every sample.

use std::io::{self, Write};

use serde_json::{Map, Value, json};

use super::cell::{Arm, Cell, Sample};
use super::protocol::Round;
use super::swap::SwapRound;
use crate::cli::bench::statistics::Samples;
use crate::cli::bench::timestamp;

/// What was run.
#[derive(Debug, Clone)]
pub(super) struct RunInfo {
    pub(super) model: String,
    pub(super) seed: u64,
    pub(super) block_bytes: usize,
    pub(super) swap_bytes: usize,
}

/// What came of it.
pub(super) struct Report {
    info: RunInfo,
    cells: Vec<CellRounds>,
    swaps: Vec<SwapRound>,
    /// When the run ended.
    date: String,
}

/// All rounds of a cell.
#[derive(Debug, Clone)]
pub(super) struct CellRounds {
    pub(super) cell: Cell,
    pub(super) rounds: Vec<Round>,
}

impl Round {
    fn sample(&self, arm: Arm) -> Option<&Sample> {
        self.samples.iter().find(|sample| sample.arm == arm)
    }

    /// Time to the first token over that of moving the bytes and computing the query: 1 is an engine that costs nothing.
    fn ratio(&self, arm: Arm) -> Option<f64> {
        let sample = self.sample(arm)?;
        Some(sample.ttft_ms() / (sample.bare_ms()? + self.sample(Arm::Device)?.ttft_ms()))
    }

    /// Percent of the control arm's time that is saved.
    fn saved(&self, arm: Arm) -> Option<f64> {
        let control = self.sample(Arm::Control)?.ttft_ms();
        (arm != Arm::Control).then_some(())?;
        Some((1.0 - self.sample(arm)?.ttft_ms() / control) * 100.0)
    }
}

impl CellRounds {
    fn samples(&self, arm: Arm) -> impl Iterator<Item = &Sample> {
        self.rounds.iter().filter_map(move |round| round.sample(arm))
    }

    fn ttft(&self, arm: Arm) -> Samples {
        Samples::new(self.samples(arm).map(Sample::ttft_ms).collect())
    }

    fn bare(&self, arm: Arm) -> Samples {
        Samples::new(self.samples(arm).filter_map(Sample::bare_ms).collect())
    }

    fn of_rounds(&self, value: impl Fn(&Round) -> Option<f64>) -> Samples {
        Samples::new(self.rounds.iter().filter_map(value).collect())
    }

    /// Tokens from device, host and disk, when they are the same in all rounds.
    fn cached(&self, arm: Arm) -> String {
        let mut found: Vec<_> = self.samples(arm).map(Sample::cached_tokens).collect();
        found.dedup();
        match found[..] {
            [[device, host, disk]] => format!("{device}/{host}/{disk}"),
            _ => "vary".to_owned(),
        }
    }

    fn num_faulty(&self, arm: Arm) -> usize {
        self.samples(arm).filter(|sample| !sample.faults.is_empty()).count()
    }

    fn json(&self) -> Value {
        let arms = Arm::ALL.into_iter().map(|arm| (arm.name().replace(' ', "_"), self.arm_json(arm)));
        let rounds = self.rounds.iter().map(|round| {
            let samples: Vec<Value> = round.samples.iter().map(Sample::json).collect();
            json!({"reference_token": round.reference, "samples": samples})
        });
        json!({
            "context_len": self.cell.context_len,
            "query_len": self.cell.query_len,
            "arms": arms.collect::<Map<_, _>>(),
            "rounds": rounds.collect::<Vec<_>>(),
        })
    }

    fn arm_json(&self, arm: Arm) -> Value {
        json!({
            "ttft_ms": summary_json(&self.ttft(arm)),
            "bare_ms": summary_json(&self.bare(arm)),
            "ratio": summary_json(&self.of_rounds(|round| round.ratio(arm))),
            "saved_percent": summary_json(&self.of_rounds(|round| round.saved(arm))),
            "failed": self.num_faulty(arm),
        })
    }

    fn write_rows(&self, out: &mut dyn Write) -> io::Result<()> {
        let Cell { context_len, query_len } = self.cell;
        for arm in Arm::ALL {
            let (ttft, bare) = (self.ttft(arm), self.bare(arm));
            let (ratio, saved) = (self.of_rounds(|round| round.ratio(arm)), self.of_rounds(|round| round.saved(arm)));
            let num_faulty = self.num_faulty(arm);
            let mark = if num_faulty > 0 { format!("FAILED {num_faulty}/{}", self.rounds.len()) } else { "ok".into() };
            writeln!(
                out,
                "{context_len:>7} {query_len:>5}  {:<12} {:>28} {:>6} {:>26} {:>18} {:>14}  {mark}",
                arm.name(),
                spread(&ttft, 1),
                median(&saved, 1),
                spread(&bare, 1),
                spread(&ratio, 2),
                self.cached(arm),
            )?;
        }
        Ok(())
    }
}

impl Report {
    pub(super) fn new(info: RunInfo, cells: Vec<CellRounds>, swaps: Vec<SwapRound>) -> Self {
        Self { info, cells, swaps, date: timestamp::now() }
    }

    pub(super) fn write_table(&self, out: &mut dyn Write) -> io::Result<()> {
        let num_rounds = self.cells.first().map_or(0, |cell| cell.rounds.len());
        writeln!(out, "{}: medians of {num_rounds} rounds, lowest and highest in brackets", self.info.model)?;
        writeln!(
            out,
            "{:>7} {:>5}  {:<12} {:>28} {:>6} {:>26} {:>18} {:>14}  result",
            "context", "query", "context from", "TTFT ms", "saved%", "bare ms", "TTFT/(bare+query)", "dev/host/disk"
        )?;
        self.cells.iter().try_for_each(|cell| cell.write_rows(out))?;
        self.write_equality(out)?;
        let mebibytes = self.info.swap_bytes as f64 / f64::from(1 << 20);
        writeln!(out, "\nblocks of {} bytes, {mebibytes:.1} MiB in all: {:>28}", self.info.block_bytes, "GB/s")?;
        for name in self.swap_names() {
            writeln!(out, "{name:<40} {:>24}", spread(&self.swap_rate(name), 2))?;
        }
        Ok(())
    }

    fn write_equality(&self, out: &mut dyn Write) -> io::Result<()> {
        let rounds = self.cells.iter().flat_map(|cell| &cell.rounds);
        let pairs = rounds.flat_map(|round| round.samples.iter().map(move |sample| (round.reference, sample)));
        let compared: Vec<_> = pairs.filter(|(_, sample)| sample.arm != Arm::Control).collect();
        let num_equal = compared.iter().filter(|(reference, sample)| sample.answer.token == *reference).count();
        writeln!(out, "next token as computed in full: {num_equal} of {} answers", compared.len())
    }

    pub(super) fn json(&self) -> Value {
        let swap = |name: &&'static str| ((*name).to_owned(), summary_json(&self.swap_rate(name)));
        json!({
            "date": self.date,
            "model_id": self.info.model,
            "seed": self.info.seed,
            "block_bytes": self.info.block_bytes,
            "failed": self.faults().count(),
            "cells": self.cells.iter().map(CellRounds::json).collect::<Vec<_>>(),
            "swap_bytes": self.info.swap_bytes,
            "swap_gb_per_second": self.swap_names().iter().map(swap).collect::<Map<_, _>>(),
        })
    }

    /// An error when an answer came from elsewhere than it was to come from, or is another one.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        let num_samples: usize = self.cells.iter().flat_map(|cell| &cell.rounds).map(|round| round.samples.len()).sum();
        let num_faulty = self.faults().count();
        match self.faults().next() {
            None => Ok(()),
            Some((cell, sample)) => anyhow::bail!(
                "{num_faulty} of {num_samples} measurements failed; the first: {} + {} tokens, {}: {}",
                cell.context_len,
                cell.query_len,
                sample.arm.name(),
                sample.faults.join("; ")
            ),
        }
    }

    fn faults(&self) -> impl Iterator<Item = (Cell, &Sample)> {
        let samples = self.cells.iter().flat_map(|cell| {
            cell.rounds.iter().flat_map(move |round| round.samples.iter().map(move |sample| (cell.cell, sample)))
        });
        samples.filter(|(_, sample)| !sample.faults.is_empty())
    }

    fn swap_names(&self) -> Vec<&'static str> {
        let mut names = Vec::new();
        for (name, _) in self.swaps.iter().flatten() {
            if !names.contains(name) {
                names.push(*name);
            }
        }
        names
    }

    /// Gigabytes (10^9) per second.
    fn swap_rate(&self, name: &str) -> Samples {
        let times = self.swaps.iter().flatten().filter(|(other, _)| *other == name);
        let gigabytes = self.info.swap_bytes as f64 / 1e9;
        Samples::new(times.map(|(_, took)| gigabytes / took.as_secs_f64().max(1e-9)).collect())
    }
}

fn spread(samples: &Samples, digits: usize) -> String {
    match samples.as_slice() {
        [] => "-".to_owned(),
        [first, .., last] => format!("{:.digits$} [{first:.digits$}, {last:.digits$}]", samples.median()),
        [only] => format!("{only:.digits$}"),
    }
}

fn median(samples: &Samples, digits: usize) -> String {
    if samples.as_slice().is_empty() { "-".to_owned() } else { format!("{:.digits$}", samples.median()) }
}

/// `null` of no samples.
fn summary_json(samples: &Samples) -> Value {
    match samples.as_slice() {
        [] => Value::Null,
        values => json!({"median": samples.median(), "lowest": values[0], "highest": values[values.len() - 1]}),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use mneme::engine::Reuse;

    use super::super::cell::Answer;
    use super::*;

    fn sample(arm: Arm, ttft_ms: u64, bare_ms: Option<u64>) -> Sample {
        let answer = Answer { ttft: Duration::from_millis(ttft_ms), token: 5, reuse: Reuse::default() };
        Sample::new(arm, answer, bare_ms.map(Duration::from_millis))
    }

    fn round(restart_ms: u64) -> Round {
        let samples = vec![
            sample(Arm::Control, 200, None),
            sample(Arm::Device, 30, None),
            sample(Arm::Host, 40, Some(5)),
            sample(Arm::DiskCached, 50, Some(10)),
            sample(Arm::DiskDropped, 80, Some(20)),
            sample(Arm::Restart, restart_ms, Some(10)),
        ];
        Round { reference: 5, samples }
    }

    fn report(rounds: Vec<Round>) -> Report {
        let info = RunInfo { model: "m".into(), seed: 0, block_bytes: 4096, swap_bytes: 1_000_000 };
        let cell = Cell { context_len: 64, query_len: 16 };
        let swaps = vec![vec![("memcpy", Duration::from_millis(1))]];
        Report::new(info, vec![CellRounds { cell, rounds }], swaps)
    }

    #[test]
    fn ratios_are_taken_round_by_round() {
        let json = report(vec![round(60), round(40), round(80)]).json();
        let restart = &json["cells"][0]["arms"]["restart"];
        assert_eq!(restart["ratio"], json!({"median": 1.5, "lowest": 1.0, "highest": 2.0}));
        assert_eq!(restart["saved_percent"]["median"], 70.0);
        assert_eq!(json["cells"][0]["arms"]["control"]["ratio"], Value::Null);
        assert_eq!(json["swap_gb_per_second"]["memcpy"]["median"], 1.0);
        assert_eq!(json["cells"][0]["rounds"][2]["samples"][5]["ttft_ms"], 80.0);
    }

    #[test]
    fn a_fault_marks_its_row_and_is_an_error() {
        let good = report(vec![round(60)]);
        assert!(good.check().is_ok());
        let mut bad = round(60);
        bad.samples[2].faults.push("from nowhere".into());
        let report = report(vec![round(60), bad]);
        let error = report.check().unwrap_err().to_string();
        assert!(error.contains("1 of 12") && error.contains("64 + 16 tokens, host: from nowhere"), "{error}");
        let mut text = Vec::new();
        report.write_table(&mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        let marked: Vec<&str> = text.lines().filter(|line| line.ends_with("FAILED 1/2")).collect();
        assert!(marked.len() == 1 && marked[0].contains("host"), "{text}");
        assert!(text.contains("computed in full: 10 of 10"), "{text}");
    }
}
