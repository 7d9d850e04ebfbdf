//! The engine's view of the tiers below the device: what lies where, which copies are under way, what a copy costs.
//!
//! Plain data with one owner, the engine's thread, which never waits here: it asks for copies and takes note of
//! completions. Whoever asks for a copy keeps the device block to itself until the completion with its ticket arrives.

use std::collections::HashSet;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, bounded, select};

use super::host::{Growth, HostArena};
use super::io::{BlockCopy, Completions, DeviceLanding, Done, IoThread, Job, Place, SharedStore, Ticket, Wiped};
use super::rates::Rates;
use super::store::{BlockStore, PinnedBlocks};
use super::{PagingConfig, Tier};
use crate::backend::{Device, Transfer};
use crate::kv::{BlockHash, BlockId, CachedPool, Level};
use crate::planted::{self, Bug};
use crate::telemetry::{Degradation, Degradations};
use crate::{Error, Result};

/// Blocks on their way down at the same time; further ones are not saved for now.
const MAX_SAVES: usize = 64;

/// Requests to make things durable that are under way.
const MAX_SEALS: usize = 64;

/// The disk tier as a thread of its own opened it.
pub struct OpenedVault {
    /// Everything but the tokens that decides the bits of a block.
    pub identity: Vec<u8>,
    /// Where blocks are kept; `None` where nothing is to be kept on disk.
    pub store: Option<Arc<BlockStore>>,
}

/// Finds out the identity of the model, which may take reading all of it, and opens the vault.
pub type VaultOpener = Box<dyn FnOnce() -> Result<OpenedVault> + Send>;

/// What a copy that was asked for has come to.
#[derive(Debug)]
pub enum Completion {
    /// `block` may be touched again; whether a lower tier has its content now.
    Saved {
        /// As `save` returned it.
        ticket: Ticket,
        /// The device block.
        block: BlockId,
        /// Where to.
        tier: Tier,
        /// Whether the copy is there.
        is_there: bool,
    },
    /// The blocks that were asked for by `land` are on their way: who waits for `landing`, layer by layer, may use them. Of
    /// each a `Loaded` follows.
    Landing {
        /// As `land` was given it.
        ticket: Ticket,
        /// What steps wait for.
        landing: DeviceLanding,
    },
    /// `block` holds what was asked for, or anything.
    Loaded {
        /// As `load` was given it.
        ticket: Ticket,
        /// The device block.
        block: BlockId,
        /// Whether it holds what was asked for.
        is_whole: bool,
    },
    /// `block` holds zeros.
    Wiped {
        /// The device block.
        block: BlockId,
    },
    /// Everything saved before is durable, or not.
    Sealed {
        /// As `seal` returned it.
        ticket: Ticket,
        /// Whether it will survive a crash.
        is_durable: bool,
    },
    /// The model's identity is known: blocks are hashed under it from now on, and the disk tier answers.
    Opened {
        /// Root of block hashes.
        identity: Vec<u8>,
    },
}

/// Residency and copies of blocks below the device.
pub struct Pager {
    io: Option<Io>,
    /// What the slots of the host tier hold.
    host: CachedPool,
    disk: HashSet<BlockHash>,
    saving: HashSet<BlockHash>,
    rates: Rates,
    num_saves: usize,
    num_loads: usize,
    /// Of the copies under way, those that read or write a host slot: each holds it.
    num_host_copies: usize,
    num_seals: usize,
    /// Whether a copy came to nothing that nobody has looked into.
    has_failures: bool,
    next_ticket: u64,
    degradations: Degradations,
}

struct Io {
    loads: Sender<Job>,
    saves: Sender<Job>,
    done: Receiver<Done>,
    opened: Receiver<OpenedVault>,
    store: SharedStore,
    threads: Vec<JoinHandle<()>>,
    num_threads: usize,
    /// Of the host tier.
    growth: Arc<Growth>,
    /// Whether it is known where layers lie in a block.
    has_layers: bool,
}

impl Pager {
    /// A pager without lower tiers.
    pub fn disabled() -> Self {
        Self::new(None, CachedPool::new(0, 1), Degradations::default())
    }

    fn new(io: Option<Io>, host: CachedPool, degradations: Degradations) -> Self {
        Self {
            io,
            host,
            disk: HashSet::new(),
            saving: HashSet::new(),
            rates: Rates::default(),
            num_saves: 0,
            num_loads: 0,
            num_host_copies: 0,
            num_seals: 0,
            has_failures: false,
            next_ticket: 0,
            degradations,
        }
    }

    /// Starts the I/O threads over the `num_blocks` device blocks of `block_bytes` in `blocks`.
    ///
    /// # Errors
    /// When the device gives no way to its memory, or the system no thread.
    pub fn start<D: Device>(
        device: &D,
        blocks: &D::Buffer,
        num_blocks: usize,
        config: PagingConfig,
        waker: &Sender<()>,
    ) -> Result<Self> {
        let arena = HostArena::new(config.num_host_blocks, config.block_bytes, config.host_slab_bytes);
        Self::start_over(device, (blocks, num_blocks), Arc::new(arena), config, waker)
    }

    fn start_over<D: Device>(
        device: &D,
        (blocks, num_blocks): (&D::Buffer, usize),
        arena: Arc<HostArena<D::HostBuffer>>,
        config: PagingConfig,
        waker: &Sender<()>,
    ) -> Result<Self> {
        let PagingConfig { block_bytes, block_size, layout, num_host_blocks, num_threads, open, .. } = config;
        if num_host_blocks == 0 && open.is_none() {
            return Ok(Self::disabled());
        }
        // A block is loaded or zeroed, and a slot of the host is zeroed, once at a time.
        let max_loads = num_blocks + num_host_blocks;
        let (loads, load_jobs) = bounded(max_loads);
        let (saves, save_jobs) = bounded(MAX_SAVES + MAX_SEALS);
        // Blocks that land together have a completion of their own.
        let (done_sender, done) = bounded(2 * max_loads + MAX_SAVES + MAX_SEALS);
        let completions = Completions { done: done_sender, waker: waker.clone() };
        let (opened_sender, opened) = bounded(1);
        let store = SharedStore::default();
        let mut threads = Vec::with_capacity(num_threads + 1);
        for _ in 0..num_threads.max(1) {
            let thread = IoThread {
                transfer: device.create_transfer()?,
                blocks: blocks.clone(),
                block_bytes,
                layout,
                host: Arc::clone(&arena),
                store: Arc::clone(&store),
            };
            let (load_jobs, save_jobs, done) = (load_jobs.clone(), save_jobs.clone(), completions.clone());
            threads.push(spawn("mneme-io", move || serve(thread, &load_jobs, &save_jobs, &done))?);
        }
        if let Some(open) = open {
            let (store, waker, degradations) = (Arc::clone(&store), waker.clone(), device.degradations().clone());
            let open = move || open_vault(open, &store, &opened_sender, &waker, &degradations);
            threads.push(spawn("mneme-vault", open)?);
        }
        let (num_threads, growth, has_layers) = (num_threads.max(1), Arc::clone(arena.growth()), layout.is_some());
        let io = Io { loads, saves, done, opened, store, threads, num_threads, growth, has_layers };
        Ok(Self::new(Some(io), CachedPool::new(num_host_blocks, block_size), device.degradations().clone()))
    }

    /// Whether there is any tier below the device.
    pub fn is_enabled(&self) -> bool {
        self.io.is_some()
    }

    /// Copies under way.
    pub fn num_in_flight(&self) -> usize {
        self.num_saves + self.num_loads + self.num_seals
    }

    /// The fastest lower tier that holds `tokens` under `hash`.
    pub fn find(&self, hash: &BlockHash, tokens: &[u32]) -> Option<Tier> {
        self.place_of(hash, tokens).map(Place::tier)
    }

    /// Whether the disk holds `hash`.
    pub fn is_on_disk(&self, hash: &BlockHash) -> bool {
        self.disk.contains(hash)
    }

    /// A hold on blocks of the disk tier, when that is open. Those that are not there yet get room as if a cube held on to
    /// them as hard as `level` says.
    pub fn pins(&self, level: Level) -> Option<PinnedBlocks> {
        self.io.as_ref()?.store.get().map(|store| PinnedBlocks::new(Arc::clone(store)).at_level(level.priority()))
    }

    /// Takes note that a block is not on disk, whatever was believed.
    pub fn forget_on_disk(&mut self, hash: &BlockHash) {
        self.disk.remove(hash);
    }

    fn place_of(&self, hash: &BlockHash, tokens: &[u32]) -> Option<Place> {
        let host = self.host.find(hash, tokens).map(Place::Host);
        host.or_else(|| self.disk.contains(hash).then_some(Place::Disk))
    }

    /// Whether the disk tier is open.
    pub fn has_disk(&self) -> bool {
        self.io.as_ref().is_some_and(|io| io.store.get().is_some())
    }

    /// Whether there is a host tier.
    pub fn has_host(&self) -> bool {
        self.host.num_blocks() > 0
    }

    /// A name for copies that belong together.
    pub fn new_ticket(&mut self) -> Ticket {
        self.next_ticket += 1;
        Ticket(self.next_ticket)
    }

    /// Whether another copy down may begin.
    pub fn can_save(&self) -> bool {
        self.num_saves < MAX_SAVES
    }

    /// Starts copying `block`, which holds `tokens` under `hash`, down to `tier`. `None` when that is not possible now
    /// (no such tier, too many copies under way), or not needed: it is there or on its way.
    /// On the host it is held on to as hard as `level` says.
    pub fn save(
        &mut self,
        hash: BlockHash,
        tokens: &[u32],
        block: BlockId,
        tier: Tier,
        level: Level,
    ) -> Option<Ticket> {
        if !self.can_save() || self.saving.contains(&hash) {
            return None;
        }
        let place = match tier {
            Tier::Disk if self.has_disk() && !self.disk.contains(&hash) => Place::Disk,
            Tier::Host if self.host.find(&hash, tokens).is_none() => Place::Host(self.host.allocate()?),
            _ => return None,
        };
        if let Place::Host(slot) = place {
            self.host.set_level(slot, level);
        }
        let ticket = self.new_ticket();
        let copy = BlockCopy { ticket, hash, tokens: tokens.into(), block, place };
        if self.send(|io| &io.saves, Job::Save(copy)) {
            self.num_saves += 1;
            self.num_host_copies += usize::from(tier == Tier::Host);
            self.saving.insert(hash);
            return Some(ticket);
        }
        if let Place::Host(slot) = place {
            self.host.release(slot);
        }
        None
    }

    /// Starts filling `block` with what a lower tier holds under `hash`; `false` when none does.
    pub fn load(&mut self, ticket: Ticket, hash: BlockHash, tokens: &[u32], block: BlockId) -> bool {
        let Some(place) = self.place_of(&hash, tokens) else { return false };
        if let Place::Host(slot) = place {
            self.pin_slot(slot);
        }
        let copy = BlockCopy { ticket, hash, tokens: tokens.into(), block, place };
        let is_sent = self.send(|io| &io.loads, Job::Load(copy));
        match place {
            _ if is_sent => {
                self.num_loads += 1;
                self.num_host_copies += usize::from(place.tier() == Tier::Host);
            }
            Place::Host(slot) => self.unpin_slot(slot),
            Place::Disk => {}
        }
        is_sent
    }

    /// Whether blocks of the host can be used while they come up.
    pub fn can_land(&self) -> bool {
        self.io.as_ref().is_some_and(|io| io.has_layers && io.growth.is_pinned())
    }

    /// Starts bringing blocks up from the host, the lowest layers of all of them first; `false`, and none is under way, when
    /// the host does not hold them all.
    pub fn land<'a>(&mut self, ticket: Ticket, blocks: impl Iterator<Item = (BlockHash, &'a [u32], BlockId)>) -> bool {
        let copy = |(hash, tokens, block): (BlockHash, &[u32], BlockId)| {
            let place = self.place_of(&hash, tokens).filter(|place| place.tier() == Tier::Host)?;
            Some(BlockCopy { ticket, hash, tokens: tokens.into(), block, place })
        };
        let Some(copies) = blocks.map(copy).collect::<Option<Vec<_>>>() else { return false };
        let slots: Vec<BlockId> = copies.iter().filter_map(|copy| copy.place.slot()).collect();
        slots.iter().for_each(|slot| self.pin_slot(*slot));
        let is_sent = !slots.is_empty() && self.send(|io| &io.loads, Job::Land(copies));
        if is_sent {
            self.num_loads += slots.len();
            self.num_host_copies += slots.len();
        } else {
            slots.into_iter().for_each(|slot| self.unpin_slot(slot));
        }
        is_sent
    }

    /// Starts zeroing a device block; `false` where nobody could.
    pub fn wipe(&mut self, block: BlockId) -> bool {
        self.send(|io| &io.loads, Job::Wipe(Wiped::Device(block)))
    }

    /// Forgets a block of the lower tiers; its slot on the host is zeroed. What is on disk is the store's to erase. `false`
    /// as long as a copy of it is on its way down: ask again then.
    pub fn erase(&mut self, hash: &BlockHash) -> bool {
        self.host.erase(hash);
        self.disk.remove(hash);
        self.wipe_slots();
        !self.saving.contains(hash)
    }

    fn wipe_slots(&mut self) {
        while let Some(slot) = self.host.next_to_wipe() {
            let is_sent = self.send(|io| &io.loads, Job::Wipe(Wiped::Host(slot)));
            assert!(is_sent, "the queue has room for every slot");
        }
    }

    /// Slots of the host that are being zeroed.
    pub fn num_unwiped(&self) -> usize {
        self.host.num_unwiped()
    }

    /// Keeps a slot of the host tier from being overwritten while it is read.
    fn pin_slot(&mut self, slot: BlockId) {
        if !planted::is(Bug::HostSlotNotPinned) {
            self.host.share(slot);
        }
    }

    fn unpin_slot(&mut self, slot: BlockId) {
        if !planted::is(Bug::HostSlotNotPinned) {
            self.host.release(slot);
            self.wipe_slots();
        }
    }

    /// Starts making everything saved so far durable; `None` without a disk tier, or when too much is under way.
    pub fn seal(&mut self) -> Option<Ticket> {
        if !self.has_disk() || self.num_seals >= MAX_SEALS {
            return None;
        }
        let ticket = self.new_ticket();
        self.send(|io| &io.saves, Job::Seal(ticket)).then(|| {
            self.num_seals += 1;
            ticket
        })
    }

    fn send(&self, queue: impl FnOnce(&Io) -> &Sender<Job>, job: Job) -> bool {
        self.io.as_ref().is_some_and(|io| queue(io).try_send(job).is_ok())
    }

    /// What has come to pass since the last call, one at a time.
    pub fn poll(&mut self) -> Option<Completion> {
        let io = self.io.as_ref()?;
        if let Ok(opened) = io.opened.try_recv() {
            return Some(self.open(opened));
        }
        if let Some(store) = io.store.get() {
            self.disk.extend(store.take_announced());
        }
        loop {
            let done = self.io.as_ref()?.done.try_recv().ok()?;
            if let Some(completion) = self.absorb(done) {
                return Some(completion);
            }
        }
    }

    fn open(&mut self, opened: OpenedVault) -> Completion {
        self.disk = opened.store.map(|store| store.hashes().into_iter().collect()).unwrap_or_default();
        Completion::Opened { identity: opened.identity }
    }

    /// `None` for what is nobody's business but the pager's.
    fn absorb(&mut self, done: Done) -> Option<Completion> {
        Some(match done {
            Done::Saved { copy, is_there } => self.absorb_saved(&copy, is_there),
            Done::Landing { ticket, landing } => Completion::Landing { ticket, landing },
            Done::Loaded { copy, is_whole, took } => self.absorb_loaded(&copy, is_whole, took),
            Done::Wiped(Wiped::Device(block)) => Completion::Wiped { block },
            Done::Wiped(Wiped::Host(slot)) => {
                self.host.finish_wipe(slot);
                return None;
            }
            Done::Sealed { ticket, is_durable } => {
                self.num_seals -= 1;
                Completion::Sealed { ticket, is_durable }
            }
        })
    }

    fn absorb_saved(&mut self, copy: &BlockCopy, is_there: bool) -> Completion {
        self.num_saves -= 1;
        self.has_failures |= !is_there;
        self.saving.remove(&copy.hash);
        match copy.place {
            Place::Host(slot) => {
                self.num_host_copies -= 1;
                if is_there {
                    self.host.insert(copy.hash, &copy.tokens, slot);
                } else {
                    self.shrink_host();
                }
                self.host.release(slot);
            }
            Place::Disk => {
                self.forget_dropped();
                if is_there {
                    self.disk.insert(copy.hash);
                }
            }
        }
        Completion::Saved { ticket: copy.ticket, block: copy.block, tier: copy.place.tier(), is_there }
    }

    /// Takes note of the end of the host tier, where that comes before what was asked for.
    fn shrink_host(&mut self) {
        let (num_slots, wanted) = (self.io.as_ref().map_or(0, |io| io.growth.num_slots()), self.host.num_blocks());
        if num_slots < wanted {
            self.host.shrink(num_slots);
            let text = format!("the host tier has room for {num_slots} KV blocks, not {wanted}");
            self.degradations.report(Degradation::HostTier, text);
        }
    }

    fn absorb_loaded(&mut self, copy: &BlockCopy, is_whole: bool, took: Duration) -> Completion {
        self.num_loads -= 1;
        self.has_failures |= !is_whole;
        if is_whole {
            self.rates.observe_load(copy.place.tier(), took);
        }
        match copy.place {
            Place::Host(slot) => {
                self.num_host_copies -= 1;
                self.unpin_slot(slot);
            }
            Place::Disk if !is_whole => {
                self.disk.remove(&copy.hash);
            }
            Place::Disk => {}
        }
        Completion::Loaded { ticket: copy.ticket, block: copy.block, is_whole }
    }

    /// What the store gave up to make room, or found damaged, is not there any more.
    fn forget_dropped(&mut self) {
        if let Some(store) = self.io.as_ref().and_then(|io| io.store.get()) {
            for hash in store.take_dropped() {
                self.disk.remove(&hash);
            }
        }
    }

    /// What the tiers, and the device, go on without.
    pub fn degradations(&self) -> &Degradations {
        &self.degradations
    }

    /// Whether copies have come to nothing since the last call, perhaps because the device is lost.
    pub fn take_failures(&mut self) -> bool {
        std::mem::take(&mut self.has_failures)
    }

    /// Costs as measured so far.
    pub fn rates(&self) -> &Rates {
        &self.rates
    }

    /// Takes note of a step that computed `num_tokens` tokens.
    pub fn observe_step(&mut self, num_tokens: usize, took: Duration) {
        self.rates.observe_step(num_tokens, took);
    }

    /// Threads that copy.
    pub fn num_threads(&self) -> usize {
        self.io.as_ref().map_or(0, |io| io.num_threads)
    }

    /// Blocks on the host, and on disk.
    pub fn num_blocks(&self) -> (usize, usize) {
        (self.host.num_cached(), self.disk.len())
    }

    /// For tests and debug builds: every copy under way holds its host slot, and nothing else does.
    pub fn check_integrity(&self, num_saves: usize, num_loads: usize) {
        assert_eq!((self.num_saves, self.num_loads), (num_saves, num_loads), "copies under way are miscounted");
        self.host.check_integrity(self.num_host_copies);
    }

    /// Ends the threads once they have done what they were asked, and makes what they saved durable.
    pub fn shut_down(&mut self) {
        let Some(io) = self.io.take() else { return };
        let Io { loads, saves, done, opened, store, threads, .. } = io;
        drop((loads, saves));
        for thread in threads {
            // A panic has been reported by the panic hook, and the engine ends anyway.
            let _ = thread.join();
        }
        drop((done, opened));
        if let Some(Err(error)) = store.get().map(|store| store.seal()) {
            tracing::warn!(%error, "the last KV blocks could not be made durable");
        }
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        self.shut_down();
    }
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    let error = |source| Error::Io { context: format!("cannot start the thread {name}"), source };
    thread::Builder::new().name(name.into()).spawn(run).map_err(error)
}

/// Loads before saves: somebody waits for a load.
fn serve<T: Transfer>(mut thread: IoThread<T>, loads: &Receiver<Job>, saves: &Receiver<Job>, done: &Completions) {
    loop {
        let job = match loads.try_recv() {
            Ok(job) => Ok(job),
            Err(_) => select! { recv(loads) -> job => job, recv(saves) -> job => job },
        };
        match job {
            Ok(job) => thread.run(job, done),
            // One queue has ended, and with it the pager: what the other one still has is done, then it is over.
            Err(_) => break loads.iter().chain(saves.iter()).for_each(|job| thread.run(job, done)),
        }
    }
}

fn open_vault(
    open: VaultOpener,
    store: &SharedStore,
    opened: &Sender<OpenedVault>,
    waker: &Sender<()>,
    degradations: &Degradations,
) {
    match open() {
        Ok(vault) => {
            if let Some(opened) = &vault.store {
                let _ = store.set(Arc::clone(opened));
            }
            let _ = opened.send(vault);
            let _ = waker.try_send(());
        }
        Err(error) => {
            let text = format!("the vault stays closed, so KV blocks will not survive a restart: {error}");
            degradations.report(Degradation::Vault, text);
        }
    }
}

#[cfg(test)]
mod tests;
