//! The engine's side of paging: which sequences wait for blocks from lower tiers, which blocks are on their way down.
//!
//! A block under way is held: nobody else gets it before its copy has ended. A sequence whose blocks come up is not
//! scheduled; when they are there, late or lost it goes back into the queue with what has arrived, and computes the
//! rest. Only full, published blocks move, found again by content, so a preempted sequence needs no record of its own.
//!
//! Where the device can bring up blocks of the host layer by layer, the sequence goes back as soon as the copies are queued,
//! and its steps wait for them on the device. Until they have ended the blocks are held here as well, whatever becomes of
//! the sequence, and nobody else finds them.

#![allow(clippy::vec_box)] // sequences move between the queues, by pointer

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use super::deposit::Deposit;
use super::erasure::Erasure;
use super::fetch::{self, Fetch, FetchedBlock};
use super::request::FetchDecision;
use super::sequence::{Sequence, WantedTail, Work};
use crate::kv::{BlockHash, BlockId, CachedPool};
use crate::paging::{Completion, DeviceLanding, Pager, Ticket, Tier, VaultOpener};
use crate::planted::{self, Bug};
use crate::telemetry::Degradation;

/// A fetch that takes longer than this is not waited for, whatever it was expected to take.
const MAX_WAIT: Duration = Duration::from_secs(10);

/// A fetch may take this long in any case.
const MIN_WAIT: Duration = Duration::from_millis(250);

/// A fetch that would take longer than computing is tried all the same every so often: what it costs may have changed.
const DECLINED_BEFORE_RETRY: usize = 16;

/// What has gone to disk is made durable this long after the first of it did.
const SEAL_AFTER: Duration = Duration::from_secs(10);

/// One block in so many may be on its way down at a time, lest sequences find none.
const POOL_SHARE_OF_SAVES: usize = 8;

/// The tiers below the device.
#[derive(Default)]
pub struct TierConfig {
    /// Bytes of the host's memory for blocks that the device has no room for; 0 for none.
    pub host_bytes: usize,
    /// Bytes of it that are page-locked at a time, where they are; 0 for 64 MiB.
    pub host_slab_bytes: usize,
    /// Threads that copy between tiers; 0 takes one.
    pub num_io_threads: usize,
    /// Opens the disk tier; none without it.
    pub open_vault: Option<VaultOpener>,
    /// So long requests wait for blocks from below, whatever it would take to compute them; `None` to go by that, within ten
    /// seconds.
    pub fetch_wait: Option<Duration>,
}

/// Blocks under way, and who waits for them.
pub(super) struct Tiers {
    pager: Pager,
    fetches: Vec<Fetch>,
    deposits: Vec<Deposit>,
    /// Device blocks held while they are copied down.
    saves: HashMap<Ticket, BlockId>,
    /// What is being erased.
    erasures: Vec<Erasure>,
    /// Blocks to copy down as soon as there is room, if they still hold something then, and where to.
    backlog: VecDeque<(BlockId, Tier)>,
    in_backlog: Vec<bool>,
    max_saves: usize,
    /// When something went to disk that would not survive a crash yet.
    unsealed_since: Option<Instant>,
    fetch_wait: Option<Duration>,
    num_declined: usize,
    block_size: usize,
}

/// What a lower tier could give a sequence, and whether to take it.
pub(super) enum Plan {
    Compute,
    /// Fetch these behind those it has.
    Fetch(Fetchable),
}

/// What a lower tier has of what follows a sequence's blocks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fetchable {
    num_blocks: usize,
    /// Whether the partial block behind them is there as well.
    has_tail: bool,
    /// Whether they come up layer by layer.
    by_layer: bool,
}

/// What has come to pass.
pub(super) enum Arrival {
    /// The blocks of a sequence are there, or are not waited for any longer; those it waited for.
    Ready(Box<Sequence>, Vec<BlockHash>),
    /// The blocks of a sequence are on their way, and its steps wait for them by themselves.
    Attached(Box<Sequence>),
    /// Such blocks are there.
    Landed(Vec<BlockHash>),
    /// Such blocks did not come up, and steps may have used what lay there.
    NeverLanded,
    /// The blocks of a sequence are kept, or cannot be, and its caller knows.
    Ended(Box<Sequence>),
    /// Nobody computes or fetches these any more.
    Abandoned(Vec<BlockHash>),
    /// The identity of the model is known.
    Opened(Vec<u8>),
}

impl Tiers {
    pub(super) fn new(pager: Pager, fetch_wait: Option<Duration>, num_blocks: usize, block_size: usize) -> Self {
        let is_enabled = pager.is_enabled();
        Self {
            pager,
            fetches: Vec::new(),
            deposits: Vec::new(),
            saves: HashMap::new(),
            erasures: Vec::new(),
            backlog: VecDeque::with_capacity(if is_enabled { num_blocks } else { 0 }),
            in_backlog: vec![false; if is_enabled { num_blocks } else { 0 }],
            max_saves: (num_blocks / POOL_SHARE_OF_SAVES).max(1),
            unsealed_since: None,
            fetch_wait,
            num_declined: 0,
            block_size,
        }
    }

    pub(super) fn pager_mut(&mut self) -> &mut Pager {
        &mut self.pager
    }

    /// Whether there is somebody who can zero blocks.
    pub(super) fn can_wipe(&self) -> bool {
        self.pager.is_enabled()
    }

    /// Sequences that wait for blocks.
    pub(super) fn fetching(&self) -> impl Iterator<Item = &Sequence> {
        self.fetches.iter().filter_map(|fetch| fetch.sequence.as_deref())
    }

    /// How many these are.
    pub(super) fn num_fetching(&self) -> usize {
        self.fetching().count()
    }

    /// Sequences that wait for copies of any kind.
    pub(super) fn num_sequences(&self) -> usize {
        self.num_fetching() + self.deposits.len()
    }

    /// Whether everything that is to go down has gone.
    pub(super) fn is_settled(&self) -> bool {
        let is_idle = self.fetches.is_empty() && self.deposits.is_empty() && self.erasures.is_empty();
        is_idle && self.saves.is_empty() && self.backlog.is_empty()
    }

    /// Blocks that copies hold.
    pub(super) fn num_held(&self) -> usize {
        let fetched = self.fetches.iter().map(|fetch| fetch.blocks.len()).sum::<usize>();
        self.saves.len() + fetched + self.waiting().map(Sequence::num_held_blocks).sum::<usize>()
    }

    /// Sequences that wait here for copies.
    pub(super) fn waiting(&self) -> impl Iterator<Item = &Sequence> {
        let fetching = self.fetches.iter().filter_map(|fetch| fetch.sequence.as_deref());
        fetching.chain(self.deposits.iter().map(Deposit::sequence))
    }

    /// When to look again if nothing happens.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let fetches = self.fetches.iter().filter(|fetch| fetch.sequence.is_some()).map(|fetch| fetch.deadline);
        fetches.chain(self.unsealed_since.map(|since| since + SEAL_AFTER)).min()
    }

    /// Makes what has gone to disk durable once in a while, without being asked.
    fn seal_when_due(&mut self) {
        if self.unsealed_since.is_some_and(|since| since.elapsed() >= SEAL_AFTER) {
            self.unsealed_since = self.pager.seal().is_none().then(Instant::now);
        }
    }

    /// Whether lower tiers hold what follows a sequence's blocks, up to block `num_shareable`, and are worth asking.
    pub(super) fn plan(&mut self, sequence: &mut Sequence, num_shareable: usize) -> Plan {
        if !sequence.may_fetch || !self.pager.is_enabled() || sequence.attached_tail.is_some() {
            return Plan::Compute;
        }
        let (mut num_host, mut num_disk) = (0, 0);
        for index in sequence.blocks.len()..num_shareable {
            let Some(hash) = sequence.chain.get(index) else { break };
            match self.pager.find(hash, sequence.block_tokens(index, self.block_size)) {
                Some(Tier::Host) => num_host += 1,
                Some(_) => num_disk += 1,
                None => break,
            }
        }
        let num_blocks = num_host + num_disk;
        let tail = self.find_tail(sequence, sequence.blocks.len() + num_blocks);
        match tail {
            Some((Tier::Host, _)) => num_host += 1,
            Some(_) => num_disk += 1,
            None if num_blocks == 0 => return Plan::Compute,
            None => {}
        }
        let num_tokens = num_blocks * self.block_size + tail.map_or(0, |(_, num_tokens)| num_tokens);
        // The tokens of a composed prompt's pieces are moved, by all layers, before any step.
        let by_layer = num_disk == 0 && self.pager.can_land() && sequence.composition.is_none();
        let rates = self.pager.rates();
        let num_threads = if by_layer { 1 } else { self.pager.num_threads() };
        let fetch_ms = rates.fetch_ms(num_host, num_disk, num_threads);
        let recompute_ms = rates.recompute_ms(num_tokens);
        let is_dear = matches!((fetch_ms, recompute_ms), (Some(fetch), Some(compute)) if fetch > compute);
        if is_dear && self.fetch_wait.is_none() && self.num_declined < DECLINED_BEFORE_RETRY {
            self.num_declined += 1;
            sequence.reuse.decision = FetchDecision::RecomputeIsCheaper;
            return Plan::Compute;
        }
        self.num_declined = 0;
        Plan::Fetch(Fetchable { num_blocks, has_tail: tail.is_some(), by_layer })
    }

    /// Where the partial block lies that follows `num_blocks` full ones, and how many of its tokens are of use.
    fn find_tail(&self, sequence: &Sequence, num_blocks: usize) -> Option<(Tier, usize)> {
        let WantedTail { hash, tokens, num_used } = sequence.wanted_tail(num_blocks, self.block_size)?;
        Some((self.pager.find(&hash, tokens)?, num_used))
    }

    /// Starts bringing up what follows the blocks of a sequence, which waits here until then.
    pub(super) fn start_fetch(&mut self, pool: &mut CachedPool, sequence: Box<Sequence>, found: Fetchable) {
        let ticket = self.pager.new_ticket();
        let mut blocks = self.reserve(pool, &sequence, found);
        let num_started = self.start_copies(ticket, &blocks, found.by_layer);
        blocks.drain(num_started..).for_each(|fetched| pool.release(fetched.block));
        let full = blocks.iter().filter(|fetched| fetched.num_tail_tokens.is_none());
        let promised = full.map(|fetched| fetched.hash).collect();
        let started_at = Instant::now();
        let wait = self.fetch_wait.unwrap_or_else(|| self.sensible_wait(blocks.len()));
        let num_pending = blocks.len();
        let deadline = started_at + wait;
        let sequence = Some(sequence);
        let landing = None;
        self.fetches.push(Fetch { ticket, sequence, blocks, promised, num_pending, started_at, deadline, landing });
    }

    /// Twice what it takes to compute so many blocks.
    fn sensible_wait(&self, num_blocks: usize) -> Duration {
        let expected_ms = self.pager.rates().recompute_ms(num_blocks * self.block_size);
        expected_ms.map_or(MAX_WAIT, |ms| Duration::from_secs_f64(ms * 2e-3).clamp(MIN_WAIT, MAX_WAIT))
    }

    /// Takes blocks for what a sequence is to be brought, the last perhaps for a partial block: it goes on in its own copy.
    fn reserve(&self, pool: &mut CachedPool, sequence: &Sequence, found: Fetchable) -> Vec<FetchedBlock> {
        let first = sequence.blocks.len();
        let mut blocks = Vec::with_capacity(found.num_blocks + 1);
        for index in first..first + found.num_blocks {
            let tokens = sequence.block_tokens(index, self.block_size);
            let Some(&hash) = sequence.chain.get(index) else { return blocks };
            let Some(fetched) = self.reserve_one(pool, sequence, index, (hash, tokens)) else { return blocks };
            if planted::is(Bug::FetchPublishedEarly) {
                pool.insert(hash, tokens, fetched.block);
            }
            blocks.push(fetched);
        }
        let index = first + found.num_blocks;
        if let Some(tail) = sequence.wanted_tail(index, self.block_size).filter(|_| found.has_tail)
            && let Some(fetched) = self.reserve_one(pool, sequence, index, (tail.hash, tail.tokens))
        {
            blocks.push(FetchedBlock { num_tail_tokens: Some(tail.num_used), ..fetched });
        }
        blocks
    }

    fn reserve_one(
        &self,
        pool: &mut CachedPool,
        sequence: &Sequence,
        index: usize,
        (hash, tokens): (BlockHash, &[u32]),
    ) -> Option<FetchedBlock> {
        let tier = self.pager.find(&hash, tokens)?;
        let block = allocate_for(pool, sequence, index)?;
        Some(FetchedBlock { block, hash, tokens: tokens.into(), tier, is_whole: false, num_tail_tokens: None })
    }

    /// How many of the copies into these blocks could be started.
    fn start_copies(&mut self, ticket: Ticket, blocks: &[FetchedBlock], by_layer: bool) -> usize {
        if by_layer {
            let wanted = blocks.iter().map(|fetched| (fetched.hash, &*fetched.tokens, fetched.block));
            return if self.pager.land(ticket, wanted) { blocks.len() } else { 0 };
        }
        let mut start = |fetched: &FetchedBlock| self.pager.load(ticket, fetched.hash, &fetched.tokens, fetched.block);
        blocks.iter().take_while(|fetched| start(fetched)).count()
    }

    /// Blocks that the fetch which was started last will bring.
    pub(super) fn last_promised(&self) -> &[BlockHash] {
        self.fetches.last().map_or(&[], |fetch| &fetch.promised)
    }

    /// Has the blocks of a computed sequence kept on disk.
    pub(super) fn start_deposit(&mut self, sequence: Box<Sequence>) {
        let is_durable = matches!(sequence.work, Work::Deposit { is_durable: true, .. });
        self.deposits.push(Deposit::new(sequence, is_durable));
    }

    /// A deposit that has ended, after everything that could be started was.
    fn poll_deposits(&mut self) -> Option<Arrival> {
        let mut at = 0;
        while at < self.deposits.len() {
            match self.deposits.swap_remove(at).advance(&mut self.pager, self.block_size) {
                Ok(sequence) => return Some(Arrival::Ended(sequence)),
                Err(deposit) => {
                    self.deposits.push(deposit);
                    let last = self.deposits.len() - 1;
                    self.deposits.swap(at, last);
                    at += 1;
                }
            }
        }
        None
    }

    /// Wants a block copied down when there is room for that: to the host, and from there on to disk.
    pub(super) fn queue_save(&mut self, block: BlockId) {
        self.queue_save_to(block, if self.pager.has_host() { Tier::Host } else { Tier::Disk });
    }

    fn queue_save_to(&mut self, block: BlockId, tier: Tier) {
        if let Some(is_queued) = self.in_backlog.get_mut(block.index()).filter(|is_queued| !**is_queued) {
            *is_queued = true;
            self.backlog.push_back((block, tier));
        }
    }

    /// Starts as many copies down as may be under way.
    pub(super) fn pump_saves(&mut self, pool: &mut CachedPool) {
        while self.saves.len() < self.max_saves && self.pager.can_save() {
            let Some((block, tier)) = self.backlog.pop_front() else { break };
            self.in_backlog[block.index()] = false;
            // What is to be zeroed here leaves no copies elsewhere.
            let Some((hash, tokens)) = pool.content(block).filter(|_| !pool.is_marked(block)) else { continue };
            match self.pager.save(*hash, tokens, block, tier, pool.level(block)) {
                Some(ticket) => {
                    if !planted::is(Bug::SavedBlockFreed) {
                        pool.share(block);
                    }
                    self.saves.insert(ticket, block);
                }
                None if tier == Tier::Host => self.queue_save_to(block, Tier::Disk),
                None => {}
            }
        }
    }

    /// Begins to erase something.
    pub(super) fn start_erasure(&mut self, erasure: Erasure) {
        self.erasures.push(erasure);
    }

    /// Starts zeroing the blocks that wait for it, and ends what erasures have come to their end.
    pub(super) fn pump_wipes(&mut self, pool: &mut CachedPool) {
        let Self { erasures, pager, fetches, .. } = self;
        let is_coming = |hash: &BlockHash| fetches.iter().any(|fetch| fetch.promised.contains(hash));
        erasures.retain_mut(|erasure| !erasure.advance(pool, pager, is_coming));
        while let Some(block) = pool.next_to_wipe() {
            assert!(self.pager.wipe(block), "the queue has room for every block, and nothing is marked without one");
        }
    }

    /// The next thing that has come to pass, copies and deadlines alike.
    pub(super) fn poll(&mut self, pool: &mut CachedPool) -> Option<Arrival> {
        while let Some(completion) = self.pager.poll() {
            match completion {
                Completion::Saved { ticket, block, tier, is_there } => {
                    if self.saves.remove(&ticket).is_some() {
                        if !planted::is(Bug::SavedBlockFreed) {
                            pool.release(block);
                        }
                    } else {
                        self.deposits.iter_mut().any(|deposit| deposit.absorb_saved(ticket, tier, is_there));
                    }
                    match tier {
                        Tier::Host => self.queue_save_to(block, Tier::Disk),
                        _ if is_there => drop(self.unsealed_since.get_or_insert_with(Instant::now)),
                        _ => {}
                    }
                }
                Completion::Landing { ticket, landing } => {
                    if let Some(arrival) = self.attach(pool, ticket, landing) {
                        return Some(arrival);
                    }
                }
                Completion::Loaded { ticket, block, is_whole } => {
                    if let Some(arrival) = self.absorb_loaded(pool, ticket, block, is_whole) {
                        return Some(arrival);
                    }
                }
                Completion::Wiped { block } => pool.finish_wipe(block),
                Completion::Sealed { ticket, is_durable } => {
                    self.deposits.iter_mut().for_each(|deposit| deposit.absorb_sealed(ticket, is_durable));
                }
                Completion::Opened { identity } => return Some(Arrival::Opened(identity)),
            }
        }
        self.seal_when_due();
        self.poll_empty_fetch(pool).or_else(|| self.poll_deposits()).or_else(|| self.poll_late(Instant::now()))
    }

    /// The copies of a fetch are queued: its sequence, if it still waits, goes on with blocks that arrive while it is computed.
    fn attach(&mut self, pool: &mut CachedPool, ticket: Ticket, landing: DeviceLanding) -> Option<Arrival> {
        let fetch = self.fetches.iter_mut().find(|fetch| fetch.ticket == ticket)?;
        let mut sequence = fetch.sequence.take()?;
        fetch.landing = Some((sequence.number, landing));
        for fetched in &fetch.blocks {
            if !planted::is(Bug::LandingNotHeld) {
                pool.share(fetched.block);
            }
            fetched.attach_to(&mut sequence, self.block_size);
        }
        sequence.reuse.decision = FetchDecision::Attached;
        sequence.reuse.fetch_ms += fetch.started_at.elapsed().as_secs_f64() * 1e3;
        Some(Arrival::Attached(sequence))
    }

    /// What steps of sequences whose numbers are `wanted` have to wait for.
    pub(super) fn landings(&self, wanted: impl Fn(u64) -> bool) -> impl Iterator<Item = &DeviceLanding> {
        let landings = self.fetches.iter().filter_map(|fetch| fetch.landing.as_ref());
        landings.filter(move |(number, _)| wanted(*number)).map(|(_, landing)| landing)
    }

    fn absorb_loaded(
        &mut self,
        pool: &mut CachedPool,
        ticket: Ticket,
        block: BlockId,
        is_whole: bool,
    ) -> Option<Arrival> {
        let at = self.fetches.iter().position(|fetch| fetch.ticket == ticket)?;
        let fetch = &mut self.fetches[at];
        if let Some(fetched) = fetch.blocks.iter_mut().find(|fetched| fetched.block == block) {
            fetched.is_whole = is_whole || planted::is(Bug::LossIgnored);
        }
        fetch.num_pending -= 1;
        let is_over = fetch.num_pending == 0 || planted::is(Bug::CopyNotAwaited);
        is_over.then(|| self.finish(pool, at))
    }

    /// A fetch that could not even begin.
    fn poll_empty_fetch(&mut self, pool: &mut CachedPool) -> Option<Arrival> {
        let at = self.fetches.iter().position(|fetch| fetch.num_pending == 0)?;
        Some(self.finish(pool, at))
    }

    /// All copies of a fetch have ended: its sequence gets what is whole up to the first block that is not.
    fn finish(&mut self, pool: &mut CachedPool, at: usize) -> Arrival {
        let Fetch { sequence, blocks, promised, started_at, landing, .. } = self.fetches.swap_remove(at);
        if landing.is_some() {
            let is_whole = fetch::finish_landing(pool, blocks);
            self.judge_copies(if is_whole { FetchDecision::Fetched } else { FetchDecision::Lost });
            return if is_whole { Arrival::Landed(promised) } else { Arrival::NeverLanded };
        }
        let Some(mut sequence) = sequence else {
            if !planted::is(Bug::AbandonedFetchLeaks) {
                blocks.iter().for_each(|fetched| pool.release(fetched.block));
            }
            return Arrival::Abandoned(promised);
        };
        let num_whole = blocks.iter().take_while(|fetched| fetched.is_whole).count();
        for (number, fetched) in blocks.iter().enumerate() {
            if number >= num_whole {
                pool.release(fetched.block);
            } else {
                fetched.publish(pool);
                fetched.attach_to(&mut sequence, self.block_size);
            }
        }
        let is_complete = num_whole == blocks.len() && num_whole > 0;
        sequence.may_fetch = is_complete;
        sequence.reuse.decision = if is_complete { FetchDecision::Fetched } else { FetchDecision::Lost };
        self.judge_copies(sequence.reuse.decision);
        sequence.reuse.fetch_ms += started_at.elapsed().as_secs_f64() * 1e3;
        Arrival::Ready(sequence, promised)
    }

    /// A sequence that has waited long enough computes what it waited for.
    fn poll_late(&mut self, now: Instant) -> Option<Arrival> {
        let late = |fetch: &&mut Fetch| fetch.sequence.is_some() && fetch.deadline <= now;
        let fetch = self.fetches.iter_mut().find(late)?;
        let mut sequence = fetch.sequence.take()?;
        if planted::is(Bug::LateBlocksTaken) {
            sequence.blocks.extend(fetch.blocks.drain(..).map(|fetched| fetched.block));
        }
        sequence.may_fetch = false;
        sequence.reuse.decision = FetchDecision::Late;
        sequence.reuse.fetch_ms += fetch.started_at.elapsed().as_secs_f64() * 1e3;
        let promised = std::mem::take(&mut fetch.promised);
        self.judge_copies(FetchDecision::Late);
        Some(Arrival::Ready(sequence, promised))
    }

    /// Says whether blocks of lower tiers come up as they should, by what became of the last that did or did not.
    fn judge_copies(&self, decision: FetchDecision) {
        let degradations = self.pager.degradations();
        match decision {
            FetchDecision::Fetched => degradations.clear(Degradation::Copies),
            _ => degradations
                .report(Degradation::Copies, "KV blocks of lower tiers were late or lost, and were computed"),
        }
    }

    /// Sequences whose callers have gone; their copies go on without them.
    pub(super) fn take_cancelled(&mut self) -> Vec<Box<Sequence>> {
        self.take_if(|sequence| sequence.sink.is_cancelled())
    }

    /// All sequences that wait for blocks.
    pub(super) fn take_all(&mut self) -> Vec<Box<Sequence>> {
        self.take_if(|_| true)
    }

    /// All sequences whose blocks are on their way to disk; nobody waits for that any more.
    pub(super) fn take_deposits(&mut self) -> impl Iterator<Item = Box<Sequence>> + '_ {
        self.deposits.drain(..).map(Deposit::into_sequence)
    }

    fn take_if(&mut self, wanted: impl Fn(&Sequence) -> bool) -> Vec<Box<Sequence>> {
        let waiting = self.fetches.iter_mut().map(|fetch| &mut fetch.sequence);
        waiting.filter_map(|sequence| sequence.take_if(|sequence| wanted(sequence))).collect()
    }

    /// For tests and debug builds.
    pub(super) fn check_integrity(&self) {
        let num_loads = self.fetches.iter().map(|fetch| fetch.num_pending).sum();
        let num_saves = self.saves.len() + self.deposits.iter().map(Deposit::num_saves).sum::<usize>();
        self.pager.check_integrity(num_saves, num_loads);
        let num_queued = self.in_backlog.iter().filter(|is_queued| **is_queued).count();
        assert_eq!(self.backlog.len(), num_queued, "the backlog and its flags disagree");
    }
}

/// A block for number `index` of a sequence's.
pub(super) fn allocate_for(pool: &mut CachedPool, sequence: &Sequence, index: usize) -> Option<BlockId> {
    let block = pool.allocate()?;
    claim(pool, sequence, index, block);
    Some(block)
}

/// Has a block treated as its sequence wants once nobody uses it.
pub(super) fn claim(pool: &mut CachedPool, sequence: &Sequence, index: usize, block: BlockId) {
    if sequence.erase_on_free {
        pool.mark(block);
    }
    if let Some(level) = sequence.level_of(index) {
        pool.set_level(block, level);
    }
}
