//! `mneme bench memory`: time to first token with a context's KV in each tier and without it, after the protocol of
//! MemOS's Table 5, and how fast blocks move between tiers.

mod cell;
mod prompts;
mod protocol;
mod report;
mod segments;
mod session;
mod swap;

use std::fs;
use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use uuid::Uuid;

use self::cell::Cell;
use self::protocol::Protocol;
use self::report::{CellRounds, Report, RunInfo};
use self::swap::{SwapPlan, SwapRound};
use super::results::ResultArgs;
use crate::cli::engine_args::{EngineArgs, parse_bytes};

/// Arguments of `mneme bench memory`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example: mneme bench memory --context-lens 6064 --query-lens 167 --rounds 7 --save-result memory.json\n\n\
    Prompts are random tokens. The pool of KV blocks is as large as each cell needs; --kv-cache-memory-bytes and \
    --max-model-len are not used."
)]
pub(super) struct MemoryBenchArgs {
    #[command(flatten)]
    engine: EngineArgs,
    /// Tokens of the contexts, comma-separated
    #[arg(long, value_delimiter = ',', default_value = "583,2773,6064")]
    context_lens: Vec<NonZeroUsize>,
    /// Tokens of the queries, comma-separated; each is asked behind each context
    #[arg(long, value_delimiter = ',', default_value = "167,303,953")]
    query_lens: Vec<NonZeroUsize>,
    /// How often each cell is measured; all cells take turns
    #[arg(long, default_value = "5")]
    rounds: NonZeroUsize,
    /// Folder of the vault, which the KV stays in [default: a folder for temporary files, removed at the end]
    #[arg(long, value_name = "DIR")]
    vault: Option<PathBuf>,
    /// Most bytes of KV blocks in the vault, with an optional suffix K, M or G
    #[arg(long, value_parser = parse_bytes, default_value = "8G")]
    vault_size_bytes: usize,
    #[command(flatten)]
    result: ResultArgs,
}

/// Runs the measurement. Answers that did not come from where they were to come from are an error, after the result.
pub(super) fn run(args: &MemoryBenchArgs) -> anyhow::Result<()> {
    anyhow::ensure!(args.engine.prefix_caching(), "without prefix caching there is nothing to compare");
    let shortest = args.context_lens.iter().min().map_or(0, |len| len.get());
    let block_size = args.engine.block_size;
    anyhow::ensure!(shortest >= block_size, "--context-lens has {shortest}; a KV block alone has {block_size} tokens");
    let run = Uuid::now_v7().to_string();
    let scratch = Scratch::create(&run)?;
    let report = measure(args, &run, &scratch.0)?;
    args.result.write(&report.json(), |out| Ok(report.write_table(out)?))?;
    report.check()
}

fn measure(args: &MemoryBenchArgs, run: &str, scratch: &Path) -> anyhow::Result<Report> {
    let vault = args.vault.clone().unwrap_or_else(|| scratch.join("vault"));
    let cells = args.cells();
    writeln!(io::stderr(), "computing the contexts; the vault is {}", vault.display())?;
    let mut protocol = Protocol::prepare(&args.engine, &cells, vault, args.vault_size_bytes, run)?;
    let mut measured: Vec<_> = cells.iter().map(|cell| CellRounds { cell: *cell, rounds: Vec::new() }).collect();
    let mut swaps = Vec::new();
    let plan = args.swap_plan(protocol.block_bytes(), scratch);
    for round in 0..args.rounds.get() {
        for entry in &mut measured {
            let Cell { context_len, query_len } = entry.cell;
            writeln!(io::stderr(), "round {} of {}: {context_len} + {query_len} tokens", round + 1, args.rounds)?;
            entry.rounds.push(protocol.measure(entry.cell, round)?);
        }
        swaps.push(plan.measure(&args.engine)?);
    }
    Ok(args.report(&plan, measured, swaps))
}

impl MemoryBenchArgs {
    fn cells(&self) -> Vec<Cell> {
        let queries = |context: NonZeroUsize| {
            let cell = move |query: &NonZeroUsize| Cell { context_len: context.get(), query_len: query.get() };
            self.query_lens.iter().map(cell)
        };
        self.context_lens.iter().flat_map(|context| queries(*context)).collect()
    }

    /// As many blocks as the longest context has.
    fn swap_plan(&self, block_bytes: usize, scratch: &Path) -> SwapPlan {
        let longest = self.context_lens.iter().max().map_or(0, |len| len.get());
        SwapPlan {
            block_bytes,
            num_blocks: longest / self.engine.block_size,
            folder: scratch.join("swap"),
            seed: self.engine.seed,
        }
    }

    fn report(&self, plan: &SwapPlan, cells: Vec<CellRounds>, swaps: Vec<SwapRound>) -> Report {
        let info = RunInfo {
            model: self.engine.model().to_owned(),
            seed: self.engine.seed,
            block_bytes: plan.block_bytes,
            swap_bytes: plan.num_bytes(),
        };
        Report::new(info, cells, swaps)
    }
}

/// A folder that goes away with this.
struct Scratch(PathBuf);

impl Scratch {
    fn create(run: &str) -> anyhow::Result<Self> {
        let folder = std::env::temp_dir().join(format!("mneme-bench-{run}"));
        fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        Ok(Self(folder))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            tracing::warn!(%error, folder = %self.0.display(), "the folder could not be removed");
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        args: MemoryBenchArgs,
    }

    fn parse(line: &str) -> Result<MemoryBenchArgs, clap::Error> {
        Program::try_parse_from(std::iter::once("bench").chain(line.split_whitespace())).map(|program| program.args)
    }

    #[test]
    fn the_cells_are_those_of_the_paper_unless_told_otherwise() {
        let cells = parse("").unwrap().cells();
        assert_eq!(cells.len(), 9);
        assert_eq!(cells[8], Cell { context_len: 6064, query_len: 953 });
        let args = parse("--context-lens 64 --query-lens 8,16 --output-json x.json").unwrap();
        let found: Vec<_> = args.cells().iter().map(|cell| (cell.context_len, cell.query_len)).collect();
        assert_eq!(found, [(64, 8), (64, 16)]);
        assert_eq!(args.swap_plan(4096, Path::new("/x")).num_blocks, 4);
        assert!(args.result.save_result.is_some());
    }

    #[test]
    fn nothing_to_compare_is_refused() {
        for line in ["--context-lens 15", "--no-enable-prefix-caching"] {
            assert!(run(&parse(line).unwrap()).is_err(), "{line}");
        }
        assert!(parse("--rounds 0").is_err());
    }
}
