//! How fast blocks go down and up: the pager alone, without an engine, beside a copy in memory and a read of the files.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{fs, hint};

use anyhow::Context;
use crossbeam::channel::{Receiver, bounded};
use mneme::backend::cpu::CpuBackend;
#[cfg(feature = "cuda")]
use mneme::backend::cuda::CudaBackend;
use mneme::backend::{Device, Transfer};
use mneme::kv::{BlockHash, BlockId, Level};
use mneme::paging::{
    BlockFormat, BlockStore, Completion, OpenedVault, Pager, PagingConfig, StoreConfig, SystemFiles, Tier,
};

use super::segments::{SegmentFiles, list_segments};
use crate::cli::bench::random::Random;
use crate::cli::device::Chosen;
use crate::cli::engine_args::EngineArgs;
use crate::cli::tiers::NUM_IO_THREADS;

/// Copies that do not end within this time never will.
const MAX_WAIT: Duration = Duration::from_secs(60);

/// Tokens that a block is said to hold; the pager compares them.
const BLOCK_TOKENS: usize = 16;

/// What is moved, and where to.
#[derive(Debug, Clone)]
pub(super) struct SwapPlan {
    pub(super) block_bytes: usize,
    pub(super) num_blocks: usize,
    /// A folder for files, made and removed here.
    pub(super) folder: PathBuf,
    /// Seeds the bytes.
    pub(super) seed: u64,
}

/// What was moved in one round: names and times, each for all blocks.
pub(super) type SwapRound = Vec<(&'static str, Duration)>;

impl SwapPlan {
    pub(super) fn num_bytes(&self) -> usize {
        self.block_bytes * self.num_blocks
    }

    /// Moves the blocks to and from each tier once, on the device that the engine would take.
    pub(super) fn measure(&self, args: &EngineArgs) -> anyhow::Result<SwapRound> {
        let result = match args.device.choose()? {
            Chosen::Cpu { .. } => self.measure_on(&CpuBackend::new(args.isa(), args.num_threads())?),
            #[cfg(feature = "cuda")]
            Chosen::Gpu(gpu) => self.measure_on(&CudaBackend::new(gpu.ordinal, args.dtype.on_gpu())?),
            #[cfg(not(feature = "cuda"))]
            Chosen::Gpu(gpu) => anyhow::bail!("{gpu} cannot be used: this build has no CUDA"),
        };
        // Whatever came of it, and if there is nothing to remove it has been reported.
        let _ = fs::remove_dir_all(&self.folder);
        result
    }

    fn measure_on<D: Device>(&self, device: &D) -> anyhow::Result<SwapRound> {
        let blocks = device.allocate(self.num_bytes())?;
        self.fill(device, &blocks)?;
        let mut mover = self.start(device, &blocks)?;
        // The host's memory is taken when it is first written.
        mover.save(self, 0, Tier::Host)?;
        let mut round = vec![
            ("device to host", mover.save(self, 1, Tier::Host)?),
            ("host to device", mover.load(self, 1)?),
            ("device to disk, durable", mover.save(self, 2, Tier::Disk)?),
        ];
        let paths = list_segments(&self.folder)?;
        let files = SegmentFiles::open(paths.iter(), self.num_blocks)?;
        let (mut buffer, source) = (vec![1; files.num_bytes()], vec![2; files.num_bytes()]);
        files.bring_in(&mut buffer)?;
        round.push(("disk to device, cached", mover.load(self, 2)?));
        round.push(("read of the files, cached", files.read(&mut buffer)?));
        round.push(("read and hashed, one thread, cached", files.read_and_hash(&mut buffer)?));
        round.push(("mapped and hashed, one thread, cached", files.map_and_hash()?));
        for name in ["disk to device, dropped", "read of the files, dropped"] {
            if let Some(fault) = files.drop_pages()? {
                tracing::warn!(%fault, "{name}: not measured");
            } else if name.starts_with("disk") {
                round.push((name, mover.load(self, 2)?));
            } else {
                round.push((name, files.read(&mut buffer)?));
            }
        }
        let started_at = Instant::now();
        buffer.copy_from_slice(hint::black_box(&source));
        hint::black_box(&buffer);
        round.push(("memcpy", started_at.elapsed()));
        Ok(round)
    }

    fn fill<D: Device>(&self, device: &D, blocks: &D::Buffer) -> mneme::Result<()> {
        let mut random = Random::new(self.seed, 0);
        let mut transfer = device.create_transfer()?;
        (0..self.num_blocks).try_for_each(|block| {
            transfer.fill(blocks, block * self.block_bytes, self.block_bytes, &mut |bytes| {
                bytes.chunks_mut(4).for_each(|chunk| chunk.fill(random.below(256) as u8));
                Ok(())
            })
        })
    }

    fn start<D: Device>(&self, device: &D, blocks: &D::Buffer) -> anyhow::Result<Mover> {
        let (waker, wake) = bounded(1);
        let (store, folder) = (self.store_config(), self.folder.clone());
        let config = PagingConfig {
            block_bytes: self.block_bytes,
            block_size: BLOCK_TOKENS,
            layout: None,
            num_host_blocks: self.num_blocks,
            host_slab_bytes: 0,
            num_threads: NUM_IO_THREADS,
            open: Some(Box::new(move || open_store(&folder, store))),
        };
        let pager = Pager::start(device, blocks, self.num_blocks, config, &waker)?;
        let mut mover = Mover { pager, wake };
        match mover.wait()? {
            Completion::Opened { .. } => Ok(mover),
            other => anyhow::bail!("the store did not open: {other:?}"),
        }
    }

    fn store_config(&self) -> StoreConfig {
        let format = BlockFormat { block_bytes: self.block_bytes, block_size: BLOCK_TOKENS, layout: "bench".into() };
        // Room for all blocks, the headers, and the part that the store keeps free.
        let max_bytes = (self.num_bytes() as u64).saturating_mul(3).max(256 << 20);
        StoreConfig { format, max_bytes, segment_bytes: max_bytes / 4 }
    }
}

fn open_store(folder: &Path, config: StoreConfig) -> mneme::Result<OpenedVault> {
    let (store, _) = BlockStore::open(Arc::new(SystemFiles), folder, config)?;
    Ok(OpenedVault { identity: Vec::new(), store: Some(Arc::new(store)) })
}

/// A pager that is driven by hand.
struct Mover {
    pager: Pager,
    wake: Receiver<()>,
}

impl Mover {
    fn wait(&mut self) -> anyhow::Result<Completion> {
        loop {
            if let Some(completion) = self.pager.poll() {
                return Ok(completion);
            }
            self.wake.recv_timeout(MAX_WAIT).context("no copy ended for a minute")?;
        }
    }

    /// Copies all blocks down under the hashes of `set`; on disk they are durable in the end.
    fn save(&mut self, plan: &SwapPlan, set: u32, tier: Tier) -> anyhow::Result<Duration> {
        let started_at = Instant::now();
        let (mut next, mut num_done) = (0, 0);
        while num_done < plan.num_blocks {
            while next < plan.num_blocks && self.pager.can_save() {
                let (hash, tokens) = name(set, next);
                let ticket = self.pager.save(hash, &tokens, BlockId(next as u32), tier, Level::default());
                ticket.with_context(|| format!("block {next} cannot be copied to {tier:?}"))?;
                next += 1;
            }
            match self.wait()? {
                Completion::Saved { is_there: true, .. } => num_done += 1,
                other => anyhow::bail!("a copy to {tier:?} failed: {other:?}"),
            }
        }
        if tier == Tier::Disk {
            self.pager.seal().context("the store cannot be sealed")?;
            let sealed = self.wait()?;
            anyhow::ensure!(matches!(sealed, Completion::Sealed { is_durable: true, .. }), "not durable: {sealed:?}");
        }
        Ok(started_at.elapsed())
    }

    /// Copies all blocks of `set` up.
    fn load(&mut self, plan: &SwapPlan, set: u32) -> anyhow::Result<Duration> {
        let started_at = Instant::now();
        let ticket = self.pager.new_ticket();
        for block in 0..plan.num_blocks {
            let (hash, tokens) = name(set, block);
            let is_started = self.pager.load(ticket, hash, &tokens, BlockId(block as u32));
            anyhow::ensure!(is_started, "block {block} is in no lower tier");
        }
        for _ in 0..plan.num_blocks {
            match self.wait()? {
                Completion::Loaded { is_whole: true, .. } => {}
                other => anyhow::bail!("a copy up failed: {other:?}"),
            }
        }
        Ok(started_at.elapsed())
    }
}

fn name(set: u32, block: usize) -> (BlockHash, [u32; BLOCK_TOKENS]) {
    (BlockHash::root(&set.to_le_bytes(), &block.to_le_bytes()), [block as u32; BLOCK_TOKENS])
}
