//! The course of the measurement: what is put where before a query comes, in which engine, and what is read beside it.
//!
//! A round has three engines for each cell, with a pool of just the blocks that the cell fills, so that asking for the
//! filler leaves nothing else on the device; the filler lies in the vault, so that it comes without being computed.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context;

use super::cell::{Arm, Cell, Sample};
use super::prompts::PromptSource;
use super::segments::{SegmentFiles, list_segments};
use super::session::Session;
use crate::cli::bench::in_process::ordinary_token_ids;
use crate::cli::engine_args::EngineArgs;
use crate::cli::tiers::TierArgs;

/// Host blocks beyond context and filler.
const SPARE_HOST_BLOCKS: usize = 256;

/// Everything that stays the same from round to round.
pub(super) struct Protocol<'a> {
    engine: &'a EngineArgs,
    vault: PathBuf,
    vault_bytes: usize,
    block_size: usize,
    prompts: PromptSource,
    /// Each context's length, and where its blocks are.
    contexts: Vec<(usize, SegmentFiles)>,
    /// As long as the longest context's blocks; written once, so that its pages are there.
    buffer: Vec<u8>,
}

/// All arms of one cell, once.
#[derive(Debug, Clone)]
pub(super) struct Round {
    /// What a full computation of context and query says comes next.
    pub(super) reference: u32,
    /// In the order of [`Arm::ALL`].
    pub(super) samples: Vec<Sample>,
}

impl<'a> Protocol<'a> {
    /// Computes the contexts and the filler, and has them kept in the vault.
    pub(super) fn prepare(
        engine: &'a EngineArgs,
        cells: &[Cell],
        vault: PathBuf,
        vault_bytes: usize,
        run: &str,
    ) -> anyhow::Result<Self> {
        let block_size = engine.block_size;
        let num_blocks = cells.iter().map(|cell| cell.num_blocks(block_size)).max().context("no cell to measure")?;
        let tiers = TierArgs::new(vault.clone(), vault_bytes, 0);
        let session = Session::start(engine, num_blocks, Some(&tiers))?;
        let prompts = PromptSource::new(ordinary_token_ids(&session.launched)?, engine.seed, block_size, run);
        let mut contexts = Vec::new();
        for cell in cells {
            if !contexts.iter().any(|(len, _)| *len == cell.context_len) {
                contexts.push((cell.context_len, keep_context(&session, &prompts, *cell, block_size)?));
            }
        }
        session.deposit(prompts.filler(num_blocks * block_size), prompts.domain())?;
        session.shut_down()?;
        let num_bytes = contexts.iter().map(|(_, files)| files.num_bytes()).max().unwrap_or(0);
        let buffer = vec![1; num_bytes];
        Ok(Self { engine, vault, vault_bytes, block_size, prompts, contexts, buffer })
    }

    /// Bytes of a block on disk.
    pub(super) fn block_bytes(&self) -> usize {
        self.contexts.first().map_or(0, |(_, files)| files.block_bytes())
    }

    /// Measures every arm of a cell once.
    pub(super) fn measure(&mut self, cell: Cell, round: usize) -> anyhow::Result<Round> {
        let (reference, control) = self.measure_control(cell, round)?;
        let mut samples = vec![control, self.measure_host(cell)?];
        samples.extend(self.measure_disk(cell)?);
        samples.sort_by_key(|sample| Arm::ALL.iter().position(|arm| *arm == sample.arm));
        for sample in &mut samples {
            sample.check_tier(if sample.arm == Arm::Control { 0 } else { cell.num_shared(self.block_size) });
            sample.check_token(reference);
        }
        Ok(Round { reference, samples })
    }

    fn start(&self, cell: Cell, tiers: Option<&TierArgs>) -> anyhow::Result<Session> {
        Session::start(self.engine, cell.num_blocks(self.block_size), tiers)
    }

    /// An engine without lower tiers. The reference goes first, unmeasured: it touches all memory that the control uses.
    fn measure_control(&mut self, cell: Cell, round: usize) -> anyhow::Result<(u32, Sample)> {
        let session = self.start(cell, None)?;
        let reference = session.ask(self.prompts.reference(cell))?.token;
        let control = session.ask(self.prompts.control(cell, round))?;
        session.shut_down()?;
        Ok((reference, Sample::new(Arm::Control, control, None)))
    }

    /// An engine with a host tier, into which the context goes from disk by way of the device.
    fn measure_host(&mut self, cell: Cell) -> anyhow::Result<Sample> {
        let num_blocks = cell.context_len / self.block_size + cell.num_blocks(self.block_size) + SPARE_HOST_BLOCKS;
        let tiers = TierArgs::new(self.vault.clone(), self.vault_bytes, num_blocks * self.block_bytes());
        let session = self.start(cell, Some(&tiers))?;
        session.ask(self.prompts.context_prompt(cell))?;
        session.ask(self.prompts.flush(cell))?;
        // Once unmeasured, as the other tiers have been read once before.
        session.ask(self.prompts.question(cell))?;
        session.ask(self.prompts.flush(cell))?;
        let bare = self.copy_in_memory(cell);
        let answer = session.ask(self.prompts.question(cell))?;
        session.shut_down()?;
        Ok(Sample::new(Arm::Host, answer, Some(bare)))
    }

    /// An engine with the vault alone. Its first request is the one after a restart; when the last has come from disk,
    /// the context is on the device.
    fn measure_disk(&mut self, cell: Cell) -> anyhow::Result<Vec<Sample>> {
        let tiers = TierArgs::new(self.vault.clone(), self.vault_bytes, 0);
        let session = self.start(cell, Some(&tiers))?;
        let mut samples = vec![self.ask_cached(&session, cell, Arm::Restart)?];
        session.ask(self.prompts.flush(cell))?;
        samples.push(self.ask_cached(&session, cell, Arm::DiskCached)?);
        session.ask(self.prompts.flush(cell))?;
        samples.push(self.ask_dropped(&session, cell)?);
        samples.push(Sample::new(Arm::Device, session.ask(self.prompts.question(cell))?, None));
        session.shut_down()?;
        Ok(samples)
    }

    /// With the context's pages in the page cache.
    fn ask_cached(&mut self, session: &Session, cell: Cell, arm: Arm) -> anyhow::Result<Sample> {
        let files = files_of(&self.contexts, cell)?;
        let fault = files.bring_in(&mut self.buffer)?;
        let bare = files.read(&mut self.buffer)?;
        let answer = session.ask(self.prompts.question(cell))?;
        let mut sample = Sample::new(arm, answer, Some(bare));
        sample.faults.extend(fault);
        Ok(sample)
    }

    /// With none of the context's pages in the page cache, neither for the engine nor for the bare read.
    fn ask_dropped(&mut self, session: &Session, cell: Cell) -> anyhow::Result<Sample> {
        let files = files_of(&self.contexts, cell)?;
        let first_fault = files.drop_pages()?;
        let bare = files.read(&mut self.buffer)?;
        let fault = files.drop_pages()?.or(first_fault);
        let answer = session.ask(self.prompts.question(cell))?;
        let mut sample = Sample::new(Arm::DiskDropped, answer, Some(bare));
        sample.faults.extend(fault);
        Ok(sample)
    }

    /// The context's bytes, from memory to memory.
    fn copy_in_memory(&mut self, cell: Cell) -> Duration {
        let num_bytes = cell.context_len / self.block_size * self.block_bytes();
        let source = vec![2; num_bytes];
        let started_at = Instant::now();
        self.buffer[..num_bytes].copy_from_slice(std::hint::black_box(&source));
        std::hint::black_box(&self.buffer);
        started_at.elapsed()
    }
}

/// Has a cell's context kept in segments of its own.
fn keep_context(
    session: &Session,
    prompts: &PromptSource,
    cell: Cell,
    block_size: usize,
) -> anyhow::Result<SegmentFiles> {
    let vault = session.launched.vault.as_ref().context("the measurement has no vault")?;
    let before = list_segments(&vault.vault.segments_folder())?;
    let mut tokens = prompts.context(cell.context_len);
    tokens.truncate(cell.num_shared(block_size));
    session.deposit(tokens, prompts.domain())?;
    let after = list_segments(&vault.vault.segments_folder())?;
    SegmentFiles::open(after.difference(&before), cell.context_len / block_size)
}

fn files_of(contexts: &[(usize, SegmentFiles)], cell: Cell) -> anyhow::Result<&SegmentFiles> {
    let found = contexts.iter().find(|(len, _)| *len == cell.context_len);
    Ok(&found.context("the cell's context was not prepared")?.1)
}
