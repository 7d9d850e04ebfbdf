//! The I/O threads: they alone touch files and copy between tiers. Jobs come in over a bounded queue, what became of
//! them goes back over another one that has room for every job in flight.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crossbeam::channel::Sender;

use super::Tier;
use super::host::HostArena;
use super::store::{BlockStore, Found, Stored};
use crate::backend::{KvLayout, Transfer};
use crate::kv::{BlockHash, BlockId};
use crate::planted::{self, Bug};
use crate::{Error, Result};

/// Which copy a job belongs to, for whoever asked for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(pub u64);

/// The disk tier, once it is open.
pub(super) type SharedStore = Arc<OnceLock<Arc<BlockStore>>>;

/// Where the other end of a copy lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Host(BlockId),
    Disk,
}

impl Place {
    pub(super) fn tier(self) -> Tier {
        match self {
            Place::Host(_) => Tier::Host,
            Place::Disk => Tier::Disk,
        }
    }
}

/// One block to copy.
#[derive(Debug)]
pub(super) struct BlockCopy {
    pub(super) ticket: Ticket,
    pub(super) hash: BlockHash,
    pub(super) tokens: Box<[u32]>,
    /// On the device.
    pub(super) block: BlockId,
    /// In the other tier.
    pub(super) place: Place,
}

/// What an I/O thread is asked.
#[derive(Debug)]
pub(super) enum Job {
    /// From the device down.
    Save(BlockCopy),
    /// Up to the device.
    Load(BlockCopy),
    /// Zero what lies there.
    Wipe(Wiped),
    /// Make what was saved before durable.
    Seal(Ticket),
}

/// Where zeros go: a block of the device, or a slot of the host tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wiped {
    Device(BlockId),
    Host(BlockId),
}

/// What became of a job.
#[derive(Debug)]
pub(super) enum Done {
    Saved { copy: BlockCopy, is_there: bool },
    Loaded { copy: BlockCopy, is_whole: bool, took: Duration },
    Wiped(Wiped),
    Sealed { ticket: Ticket, is_durable: bool },
}

/// The way back to the engine.
#[derive(Clone)]
pub(super) struct Completions {
    pub(super) done: Sender<Done>,
    /// Ends the engine's wait.
    pub(super) waker: Sender<()>,
}

impl Completions {
    /// There is room for every job in flight; nobody listens any more while the engine ends.
    pub(super) fn send(&self, done: Done) {
        let _ = self.done.send(done);
        let _ = self.waker.try_send(());
    }
}

/// What one I/O thread works with.
pub(super) struct IoThread<T: Transfer> {
    pub(super) transfer: T,
    pub(super) blocks: T::Buffer,
    pub(super) block_bytes: usize,
    pub(super) layout: Option<KvLayout>,
    pub(super) host: Arc<HostArena>,
    pub(super) store: SharedStore,
}

impl<T: Transfer> IoThread<T> {
    /// Where a block begins in device memory, and its length.
    fn place(&self, block: BlockId) -> (usize, usize) {
        (block.index() * self.block_bytes, self.block_bytes)
    }

    /// Does what it is asked, and tells what came of it.
    pub(super) fn run(&mut self, job: Job) -> Done {
        match job {
            Job::Save(copy) => self.save(copy),
            Job::Load(copy) => self.load(copy),
            Job::Wipe(place) => self.wipe(place),
            Job::Seal(ticket) => self.seal(ticket),
        }
    }

    fn save(&mut self, copy: BlockCopy) -> Done {
        let result = match copy.place {
            Place::Host(slot) => self.save_to_host(&copy, slot),
            Place::Disk => self.save_to_disk(&copy),
        };
        let is_there = result.unwrap_or_else(|error| {
            tracing::warn!(%error, "a KV block could not be moved down a tier; it stays where it is");
            false
        });
        Done::Saved { copy, is_there }
    }

    fn save_to_host(&mut self, copy: &BlockCopy, slot: BlockId) -> Result<bool> {
        let mut target = self.host.lock(slot);
        let (offset, num_bytes) = self.place(copy.block);
        self.transfer.show(&self.blocks, offset, num_bytes, &mut |bytes| {
            target.clear();
            target.extend_from_slice(bytes);
            Ok(())
        })?;
        Ok(true)
    }

    fn save_to_disk(&mut self, copy: &BlockCopy) -> Result<bool> {
        let Some(store) = self.store.get() else { return Ok(false) };
        if store.contains(&copy.hash) {
            return Ok(true);
        }
        let mut is_there = false;
        let (offset, num_bytes) = self.place(copy.block);
        let layout = self.layout.filter(|layout| copy.tokens.len() < layout.block_size());
        self.transfer.show(&self.blocks, offset, num_bytes, &mut |bytes| {
            let mut cleared = Vec::new();
            let mut bytes = bytes;
            // Behind the tokens of a partial block lies what somebody else left there, and files go places.
            if let Some(layout) = &layout {
                cleared.extend_from_slice(bytes);
                T::clear_behind(layout, &mut cleared, copy.tokens.len());
                bytes = &cleared;
            }
            is_there = matches!(store.write(copy.hash, &copy.tokens, bytes)?, Stored::New | Stored::Present);
            Ok(())
        })?;
        Ok(is_there)
    }

    fn load(&mut self, copy: BlockCopy) -> Done {
        let started_at = Instant::now();
        let (offset, num_bytes) = self.place(copy.block);
        let result = self.transfer.fill(&self.blocks, offset, num_bytes, &mut |target| match copy.place {
            Place::Host(BlockId(slot)) if planted::is(Bug::WrongHostSlot) => {
                copy_whole(&self.host.lock(BlockId(slot.saturating_sub(1))), target)
            }
            Place::Host(slot) => copy_whole(&self.host.lock(slot), target),
            Place::Disk => read_whole(&self.store, &copy, target),
        });
        if let Err(error) = &result {
            tracing::warn!(%error, tier = ?copy.place.tier(), "a KV block is lost and will be computed again");
        }
        Done::Loaded { copy, is_whole: result.is_ok(), took: started_at.elapsed() }
    }

    fn wipe(&mut self, wiped: Wiped) -> Done {
        match wiped {
            Wiped::Host(slot) => self.host.lock(slot).fill(0),
            Wiped::Device(block) => {
                let (offset, num_bytes) = self.place(block);
                let zero = &mut |target: &mut [u8]| {
                    target.fill(0);
                    Ok(())
                };
                if let Err(error) = self.transfer.fill(&self.blocks, offset, num_bytes, zero) {
                    tracing::error!(%error, "a KV block could not be zeroed; nobody finds it, and it will be overwritten");
                }
            }
        }
        Done::Wiped(wiped)
    }

    fn seal(&self, ticket: Ticket) -> Done {
        let result = self.store.get().map(|store| store.seal());
        if let Some(Err(error)) = &result {
            tracing::warn!(%error, "KV blocks could not be made durable");
        }
        Done::Sealed { ticket, is_durable: matches!(result, Some(Ok(()))) }
    }
}

fn copy_whole(source: &[u8], target: &mut [u8]) -> Result<()> {
    if source.len() != target.len() {
        return Err(Error::Device(format!("a host slot holds {} bytes, a block has {}", source.len(), target.len())));
    }
    target.copy_from_slice(source);
    Ok(())
}

fn read_whole(store: &SharedStore, copy: &BlockCopy, target: &mut [u8]) -> Result<()> {
    let store = store.get().ok_or_else(|| Error::NotFound("the vault is not open".into()))?;
    match store.read(&copy.hash, &copy.tokens, target) {
        Found::Whole => Ok(()),
        Found::Missing => Err(Error::NotFound(format!("{:?} is not in the vault any more", copy.hash))),
        Found::Damaged(why) => Err(Error::Format(why)),
    }
}
