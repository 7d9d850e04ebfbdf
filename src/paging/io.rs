//! The I/O threads: they alone touch files and copy between tiers. Jobs come in over a bounded queue, what became of
//! them goes back over another one that has room for every job in flight.

use std::any::Any;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crossbeam::channel::Sender;

use super::Tier;
use super::host::{HostArena, Slot};
use super::store::{BlockStore, Found, Stored};
use crate::backend::{KvLayout, Landing, LandingBlock, Transfer};
use crate::kv::{BlockHash, BlockId};
use crate::planted::{self, Bug};
use crate::{Error, Result, invalid};

/// Which copy a job belongs to, for whoever asked for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(pub u64);

/// A [`Landing`] with the events of the device, which only who has that device knows.
pub type DeviceLanding = Box<dyn Any + Send>;

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

    /// Where it is on the host.
    pub(super) fn slot(self) -> Option<BlockId> {
        match self {
            Place::Host(slot) => Some(slot),
            Place::Disk => None,
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
    /// All of them, of one ticket, up from the host layer by layer.
    Land(Vec<BlockCopy>),
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
    Saved {
        copy: BlockCopy,
        is_there: bool,
    },
    /// Queued; a `Loaded` of each block follows.
    Landing {
        ticket: Ticket,
        landing: DeviceLanding,
    },
    Loaded {
        copy: BlockCopy,
        is_whole: bool,
        took: Duration,
    },
    Wiped(Wiped),
    Sealed {
        ticket: Ticket,
        is_durable: bool,
    },
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
    pub(super) host: Arc<HostArena<T::HostBuffer>>,
    pub(super) store: SharedStore,
}

impl<T: Transfer> IoThread<T> {
    /// Where a block begins in device memory, and its length.
    fn place(&self, block: BlockId) -> (usize, usize) {
        (block.index() * self.block_bytes, self.block_bytes)
    }

    /// Does what it is asked, and tells what came of it.
    pub(super) fn run(&mut self, job: Job, done: &Completions) {
        done.send(match job {
            Job::Save(copy) => self.save(copy),
            Job::Load(copy) => self.load(copy),
            Job::Land(copies) => return self.land(copies, done),
            Job::Wipe(place) => self.wipe(place),
            Job::Seal(ticket) => self.seal(ticket),
        });
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
        let (offset, num_bytes) = self.place(copy.block);
        if !self.host.grow_to(slot, |num_blocks| self.transfer.allocate_host_blocks(num_blocks, num_bytes))? {
            return Ok(false);
        }
        let mut target = self.host.lock(slot);
        self.transfer.show(&self.blocks, offset, num_bytes, &mut |bytes| {
            target.write(bytes);
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
                copy_whole(self.host.lock(BlockId(slot.saturating_sub(1))).bytes(), target)
            }
            Place::Host(slot) => copy_whole(self.host.lock(slot).bytes(), target),
            Place::Disk => read_whole(&self.store, &copy, target),
        });
        if let Err(error) = &result {
            tracing::warn!(%error, tier = ?copy.place.tier(), "a KV block is lost and will be computed again");
        }
        Done::Loaded { copy, is_whole: result.is_ok(), took: started_at.elapsed() }
    }

    /// Has blocks of the host come up layer by layer, and tells when that is queued and when it is done.
    fn land(&mut self, mut copies: Vec<BlockCopy>, done: &Completions) {
        let started_at = Instant::now();
        // In the order of their slots: blocks that lie one behind the other move together, and threads lock in one order.
        copies.sort_unstable_by_key(|copy| copy.place.slot().map(BlockId::index));
        let queued = self.queue_landing(&copies).map_err(|error| tracing::warn!(%error, "KV blocks cannot come up"));
        let is_queued = queued.is_ok();
        if let (Ok(landing), Some(BlockCopy { ticket, .. })) = (queued, copies.first()) {
            done.send(Done::Landing { ticket: *ticket, landing });
        }
        // Whatever was queued runs, and nobody is to touch the blocks meanwhile.
        let result = self.transfer.finish();
        if let Err(error) = &result {
            tracing::error!(%error, "KV blocks did not come up");
        }
        let took = started_at.elapsed().div_f64(copies.len().max(1) as f64);
        for copy in copies {
            done.send(Done::Loaded { copy, is_whole: is_queued && result.is_ok(), took });
        }
    }

    fn queue_landing(&mut self, copies: &[BlockCopy]) -> Result<DeviceLanding> {
        let layout = self.layout.ok_or_else(|| invalid!("where layers lie in a block is not known here"))?;
        let mut slots: Vec<BlockId> = copies.iter().filter_map(|copy| copy.place.slot()).collect();
        if planted::is(Bug::WrongHostSlot) {
            slots.reverse();
        }
        let locked: Vec<_> = slots.into_iter().map(|slot| self.host.lock(slot)).collect();
        let mut blocks = Vec::with_capacity(copies.len());
        for (slot, copy) in locked.iter().zip(copies) {
            let Slot::Pinned(source) = &**slot else {
                return Err(invalid!("the host tier lies where the device cannot reach it"));
            };
            blocks.push(LandingBlock { source, target_offset: self.place(copy.block).0 });
        }
        let landing: Landing<T::Event> = self.transfer.land(&self.blocks, &layout, &blocks)?;
        Ok(Box::new(landing))
    }

    fn wipe(&mut self, wiped: Wiped) -> Done {
        match wiped {
            Wiped::Host(slot) => self.host.lock(slot).clear(),
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
