//! Blocks that somebody wants kept: the full blocks of a computed sequence and the partial one behind them go to disk, and
//! who asked is told when they are there.

use std::collections::HashSet;
use std::sync::Arc;

use super::request::{Deposited, FinishReason, OutputEvent};
use super::sequence::Sequence;
use crate::kv::BlockHash;
use crate::paging::{Pager, PinnedBlocks, Ticket, Tier};
use crate::planted::{self, Bug};

const CLOSED: &str = "nothing can be kept: the vault is not open";
const FULL: &str = "the vault has no room for these blocks; delete cubes, or give it more with --vault-size-bytes";
const NOT_DURABLE: &str = "the blocks could not be made durable; the server's log says why";

/// One sequence, all of it computed, which holds its blocks until they are on disk.
pub(super) struct Deposit {
    sequence: Box<Sequence>,
    /// Whether they have to survive a crash before the caller is told.
    is_durable: bool,
    /// Blocks `[0, next)` are on disk or on their way.
    next: usize,
    /// Whether the partial block went to the host tier, which gets no other way to it.
    is_tail_on_host: bool,
    under_way: HashSet<Ticket>,
    /// Keeps them from being evicted; the caller takes it over.
    pins: Option<PinnedBlocks>,
    seal: Option<Ticket>,
    is_sealed: bool,
    failure: Option<&'static str>,
}

/// How far a deposit has come.
enum Progress {
    Waiting,
    Complete,
    Failed(&'static str),
}

impl Deposit {
    pub(super) fn new(sequence: Box<Sequence>, is_durable: bool) -> Self {
        let under_way = HashSet::new();
        Self {
            sequence,
            is_durable,
            next: 0,
            is_tail_on_host: false,
            under_way,
            pins: None,
            seal: None,
            is_sealed: false,
            failure: None,
        }
    }

    pub(super) fn sequence(&self) -> &Sequence {
        &self.sequence
    }

    /// Gives it up.
    pub(super) fn into_sequence(self) -> Box<Sequence> {
        self.sequence
    }

    /// Copies under way that it waits for.
    pub(super) fn num_saves(&self) -> usize {
        self.under_way.len()
    }

    /// Starts what can be started. When it has ended, its caller has been told, and the sequence comes back with its
    /// blocks.
    #[allow(clippy::result_large_err)] // it is no error, and goes back where it came from
    pub(super) fn advance(mut self, pager: &mut Pager, block_size: usize) -> Result<Box<Sequence>, Self> {
        match self.progress(pager, block_size) {
            Progress::Waiting => Err(self),
            Progress::Complete => {
                let mut deposited = deposited(&self.sequence, block_size);
                deposited.pins = self.pins.take().map(Arc::new);
                self.sequence.sink.send(OutputEvent::Deposited(Box::new(deposited)));
                self.sequence.finish(FinishReason::Stop { token: None });
                Ok(self.sequence)
            }
            Progress::Failed(why) => {
                self.sequence.finish(FinishReason::Error(why.into()));
                Ok(self.sequence)
            }
        }
    }

    fn progress(&mut self, pager: &mut Pager, block_size: usize) -> Progress {
        // Under the hashes of a model that was not known yet nobody would find anything after a restart.
        let is_open = pager.has_disk() && !self.sequence.chain.is_provisional();
        match self.seal {
            _ if !is_open && self.is_durable => Progress::Failed(CLOSED),
            _ if !is_open || self.is_sealed => Progress::Complete,
            _ if !self.under_way.is_empty() && self.failure.is_some() => Progress::Waiting,
            _ if let Some(why) = self.failure => Progress::Failed(why),
            Some(_) => Progress::Waiting,
            None => {
                self.save_more(pager, block_size);
                let is_written = self.under_way.is_empty() || planted::is(Bug::SealBeforeSaves);
                match self.next == self.sequence.blocks.len()
                    && is_written
                    && !self.save_tail_to_host(pager, block_size)
                {
                    true if !self.is_durable || planted::is(Bug::AckBeforeSeal) => Progress::Complete,
                    true => {
                        self.seal = pager.seal();
                        Progress::Waiting
                    }
                    false => Progress::Waiting,
                }
            }
        }
    }

    fn save_more(&mut self, pager: &mut Pager, block_size: usize) {
        let num_computed = self.sequence.num_computed_tokens;
        while self.next < self.sequence.blocks.len() && self.next * block_size < num_computed {
            let Some((hash, tokens)) = block_of(&self.sequence, self.next, block_size) else { break };
            if self.pins.is_none() {
                self.pins = pager.pins(self.sequence.level);
            }
            // What is pinned and there stays; what the pager believes may be older than an eviction.
            let is_there = self.pins.as_mut().is_some_and(|pins| pins.hold(self.next, hash));
            if !is_there {
                pager.forget_on_disk(&hash);
                let (block, level) = (self.sequence.blocks[self.next], self.sequence.level);
                let Some(ticket) = pager.save(hash, tokens, block, Tier::Disk, level) else { return };
                self.under_way.insert(ticket);
            }
            self.next += 1;
        }
        if self.next * block_size >= num_computed {
            self.next = self.sequence.blocks.len();
        }
    }

    /// Has the partial block copied to the host tier, once; whether that is under way now. Full blocks get there when the
    /// sequence gives them back, found by what they hold, as a partial one on the device is not.
    fn save_tail_to_host(&mut self, pager: &mut Pager, block_size: usize) -> bool {
        if std::mem::replace(&mut self.is_tail_on_host, true) || !pager.has_host() || self.sequence.erase_on_free {
            return false;
        }
        let index = self.sequence.tokens.len() / block_size;
        let Some(block) = self.sequence.blocks.get(index) else { return false };
        let Some((hash, tokens)) = block_of(&self.sequence, index, block_size) else { return false };
        let ticket = pager.save(hash, tokens, *block, Tier::Host, self.sequence.level);
        self.under_way.extend(ticket);
        ticket.is_some()
    }

    /// Whether the copy was one of its own.
    pub(super) fn absorb_saved(&mut self, ticket: Ticket, tier: Tier, is_there: bool) -> bool {
        let is_own = self.under_way.remove(&ticket);
        if is_own && tier == Tier::Disk && !is_there && !planted::is(Bug::SaveFailureIgnored) {
            self.failure = Some(FULL);
        }
        is_own
    }

    /// Takes note of what has become durable.
    pub(super) fn absorb_sealed(&mut self, ticket: Ticket, is_durable: bool) {
        if self.seal == Some(ticket) {
            self.is_sealed = is_durable;
            self.failure = (!is_durable).then_some(NOT_DURABLE);
        }
    }
}

/// What has been kept of a sequence.
pub(super) fn deposited(sequence: &Sequence, block_size: usize) -> Deposited {
    let num_blocks = sequence.tokens.len().div_ceil(block_size);
    let num_full = sequence.tokens.len() / block_size;
    let hashes = (0..num_blocks).filter_map(|index| block_of(sequence, index, block_size).map(|(hash, _)| hash));
    let mut blocks: Vec<BlockHash> = hashes.collect();
    let tail = (num_blocks > num_full).then(|| blocks.pop()).flatten();
    let restored_tokens = sequence.num_cached_tokens.unwrap_or(0);
    let computed_tokens = sequence.tokens.len() - restored_tokens;
    Deposited { blocks, tail, restored_tokens, computed_tokens, pins: None }
}

/// The hash and the tokens of a block, the partial last one included.
pub(super) fn block_of(sequence: &Sequence, index: usize, block_size: usize) -> Option<(BlockHash, &[u32])> {
    let tokens = &sequence.tokens[index * block_size..sequence.tokens.len().min((index + 1) * block_size)];
    match sequence.chain.get(index) {
        Some(hash) => Some((*hash, tokens)),
        None if tokens.len() < block_size => Some((sequence.chain.own_tail(index, tokens)?, tokens)),
        None => None,
    }
}
