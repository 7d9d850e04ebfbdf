//! Blocks on their way up from lower tiers for one sequence, which waits for them or goes on with them meanwhile. When that
//! is asked for, and what becomes of the sequence, is `tiers.rs`'s to say.

use std::time::Instant;

use super::sequence::{AttachedTail, Sequence};
use crate::kv::{BlockHash, BlockId, CachedPool};
use crate::paging::{DeviceLanding, Ticket, Tier};
use crate::planted::{self, Bug};

/// Blocks on their way up for one sequence.
pub(super) struct Fetch {
    pub(super) ticket: Ticket,
    /// `None` when it has gone away or waits no longer.
    pub(super) sequence: Option<Box<Sequence>>,
    pub(super) blocks: Vec<FetchedBlock>,
    /// What others wait for as long as this sequence does.
    pub(super) promised: Vec<BlockHash>,
    pub(super) num_pending: usize,
    pub(super) started_at: Instant,
    pub(super) deadline: Instant,
    /// What the steps of the sequence that goes on with these blocks wait for, and its number.
    pub(super) landing: Option<(u64, DeviceLanding)>,
}

pub(super) struct FetchedBlock {
    pub(super) block: BlockId,
    pub(super) hash: BlockHash,
    pub(super) tokens: Box<[u32]>,
    pub(super) tier: Tier,
    pub(super) is_whole: bool,
    /// Of a partial block, how many of its tokens are of use.
    pub(super) num_tail_tokens: Option<usize>,
}

impl FetchedBlock {
    /// Gives a sequence the block behind those it has.
    pub(super) fn attach_to(&self, sequence: &mut Sequence, block_size: usize) {
        let index = sequence.blocks.len();
        sequence.blocks.push(self.block);
        match self.num_tail_tokens {
            Some(num_tokens) => sequence.attached_tail = Some(AttachedTail { tier: self.tier, num_tokens }),
            None => sequence.count_reuse(self.tier, index, block_size),
        }
    }

    /// Has others find a full block.
    pub(super) fn publish(&self, pool: &mut CachedPool) {
        if self.num_tail_tokens.is_none() {
            pool.insert(self.hash, &self.tokens, self.block);
        }
    }
}

/// The copies of blocks that a sequence was given while they came up have ended: others may find them. `false` when they did
/// not arrive.
pub(super) fn finish_landing(pool: &mut CachedPool, blocks: Vec<FetchedBlock>) -> bool {
    let is_whole = blocks.iter().all(|fetched| fetched.is_whole);
    // The last one first, so that the beginning of the prompt stays cached longest.
    for fetched in blocks.into_iter().rev().filter(|_| !planted::is(Bug::LandingNotHeld)) {
        if is_whole {
            fetched.publish(pool);
        }
        pool.release(fetched.block);
    }
    is_whole
}
