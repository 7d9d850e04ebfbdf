//! The blocks of sequences: shared where the cache has them, taken where it has not, published when they are full, given back.

use super::super::composition::Composition;
use super::super::sequence::Sequence;
use super::super::tiers::{Tiers, allocate_for, claim};
use super::Scheduler;
use crate::kv::CachedPool;
use crate::paging::Tier;
use crate::planted::{self, Bug};

impl Scheduler {
    /// Whether the first block that the cache lacks is being computed by somebody.
    pub(super) fn is_promised(&mut self, at: usize) -> bool {
        let block_size = self.limits.block_size;
        let sequence = &mut self.waiting[at];
        sequence.chain.extend(&sequence.tokens, block_size);
        // Those that it has may be on their way up, and then nobody finds them.
        let num_full = sequence.blocks.len() - usize::from(sequence.attached_tail.is_some());
        (num_full..sequence.num_shareable_blocks(block_size))
            .filter_map(|index| Some((index, sequence.chain.get(index)?)))
            .find(|(index, hash)| self.pool.find(hash, sequence.block_tokens(*index, block_size)).is_none())
            .is_some_and(|(_, hash)| self.promised.contains(hash))
    }

    /// Shares the blocks of the longest cached prefix. One token at least is left to compute, for its logits.
    pub(super) fn attach_cached_blocks(&mut self, sequence: &mut Sequence) {
        let block_size = self.limits.block_size;
        sequence.chain.extend(&sequence.tokens, block_size);
        self.replace_tail(sequence);
        let num_shareable =
            if sequence.attached_tail.is_some() { 0 } else { sequence.num_shareable_blocks(block_size) };
        for index in sequence.blocks.len()..num_shareable {
            let Some(hash) = sequence.chain.get(index) else { break };
            let Some(block) = self.pool.share_found(hash, sequence.block_tokens(index, block_size)) else { break };
            claim(&mut self.pool, sequence, index, block);
            sequence.blocks.push(block);
            sequence.count_reuse(Tier::Device, index, block_size);
        }
        sequence.note_attached(block_size);
    }

    /// Gives the copy of a partial block back when the full block that begins like it can be shared by now.
    fn replace_tail(&mut self, sequence: &mut Sequence) {
        let block_size = self.limits.block_size;
        let Some(index) = sequence.attached_tail.and(sequence.blocks.len().checked_sub(1)) else { return };
        let is_full = index < sequence.num_shareable_blocks(block_size)
            && sequence
                .chain
                .get(index)
                .is_some_and(|hash| self.pool.find(hash, sequence.block_tokens(index, block_size)).is_some());
        if is_full && let Some(block) = sequence.blocks.pop() {
            self.pool.release(block);
            sequence.attached_tail = None;
        }
    }

    pub(super) fn promise_blocks(&mut self, sequence: &mut Sequence) {
        sequence.count_cached();
        if !self.limits.prefix_caching {
            return;
        }
        for index in sequence.chain.num_published..sequence.chain.len() {
            if let Some(hash) = sequence.chain.get(index) {
                self.promised.insert(*hash);
            }
        }
        sequence.chain.num_promised = sequence.chain.len();
    }

    /// Takes note that `num_tokens` more of a running sequence are computed; full blocks can be found from now on.
    pub(in super::super) fn advance(&mut self, index: usize, num_tokens: usize) {
        let block_size = self.limits.block_size;
        self.release_sources(index);
        let sequence = &mut self.running[index];
        sequence.num_computed_tokens = sequence.end_of_next(num_tokens);
        if !self.limits.prefix_caching {
            return;
        }
        let num_early = if planted::is(Bug::PublishedEarly) { block_size / 2 } else { 0 };
        let num_full = (sequence.num_computed_tokens + num_early).min(sequence.tokens.len()) / block_size;
        sequence.chain.extend(&sequence.tokens[..num_full * block_size], block_size);
        for at in sequence.chain.num_published..num_full {
            if let Some(hash) = sequence.chain.get(at) {
                self.pool.insert(*hash, sequence.block_tokens(at, block_size), sequence.blocks[at]);
                self.promised.remove(hash);
            }
        }
        sequence.chain.num_published = sequence.chain.num_published.max(num_full);
    }

    /// Takes note of the deviations of the next tokens of a composed prompt. Its pieces' blocks are not needed any more.
    pub(in super::super) fn take_deviations(&mut self, index: usize, deviations: &[f32]) {
        self.release_sources(index);
        self.running[index].take_deviations(deviations);
    }

    /// Blocks that a running sequence lacks for `num_tokens` more.
    pub(super) fn num_missing_for(&self, index: usize, num_tokens: usize) -> usize {
        let sequence = &self.running[index];
        // What is copied into a prompt may lie anywhere in it.
        let least = if sequence.composition.is_some() { sequence.num_prompt_tokens } else { 0 };
        let wanted = sequence.end_of_next(num_tokens).max(least).div_ceil(self.limits.block_size);
        wanted.saturating_sub(sequence.blocks.len())
    }

    /// Gives a running sequence the blocks for `num_tokens` more; `false` when there are not enough, and then none.
    pub(super) fn ensure_blocks(&mut self, index: usize, num_tokens: usize) -> bool {
        let num_missing = self.num_missing_for(index, num_tokens);
        let sequence = &mut self.running[index];
        if num_missing > self.pool.num_free() {
            return false;
        }
        for _ in 0..num_missing {
            let index = sequence.blocks.len();
            let block = allocate_for(&mut self.pool, sequence, index).expect("free blocks were counted");
            sequence.blocks.push(block);
        }
        true
    }

    /// Free blocks that sequences need which hold those of some pieces. Without that two of them could take each other's
    /// room again and again.
    pub(super) fn num_reserved(&self) -> usize {
        let queued = self.running.iter().chain(&self.waiting).map(Box::as_ref).chain(self.tiers.fetching());
        queued.map(|sequence| sequence.num_reserved_blocks(self.limits.block_size)).sum()
    }

    /// Blocks that are free, now or once they are zeroed.
    pub(super) fn num_available(&self) -> usize {
        self.pool.num_free() + self.pool.num_unwiped()
    }

    /// What it has not computed by now others need not wait for.
    pub(super) fn withdraw_promises(&mut self, sequence: &mut Sequence) {
        if planted::is(Bug::PromiseKept) {
            return;
        }
        for index in sequence.chain.num_published..sequence.chain.num_promised {
            if let Some(hash) = sequence.chain.get(index) {
                self.promised.remove(hash);
            }
        }
        sequence.chain.num_promised = sequence.chain.num_promised.min(sequence.chain.num_published);
    }

    /// Gives back all blocks, the last first, so that the beginnings of prompts stay cached longest, and has them copied
    /// down.
    pub(super) fn release(&mut self, sequence: &mut Sequence) {
        self.withdraw_promises(sequence);
        let wants_saves = sequence.composition.as_ref().is_none_or(|composition| composition.wants_saves());
        let needs = sequence.holds_adapters.then(|| self.residency.groups_of(sequence.added_adapters()));
        while let Some(block) = sequence.blocks.pop() {
            if let Some(groups) = &needs {
                self.pool.set_needs(block, groups);
            }
            self.pool.release(block);
            if wants_saves {
                self.tiers.queue_save(block);
            }
        }
        if let Some(composition) = &mut sequence.composition {
            release_held(&mut self.pool, &mut self.tiers, composition);
        }
        // Behind its blocks, so that these are taken first.
        self.release_adapters(sequence);
    }

    /// Gives back the blocks of a sequence that has not run since it got them. They are not copied down: the copies would
    /// hold them, and a sequence that needs every block would find one missing whenever it looks.
    pub(super) fn give_back(&mut self, sequence: &mut Sequence) {
        self.withdraw_promises(sequence);
        while let Some(block) = sequence.blocks.pop() {
            self.pool.release(block);
        }
        if let Some(composition) = &mut sequence.composition {
            while let Some(block) = composition.pop_held_block() {
                self.pool.release(block);
            }
        }
    }

    /// What a running sequence takes from its pieces has been copied, so their blocks are not needed any more.
    fn release_sources(&mut self, index: usize) {
        let composition = self.running[index].composition.as_mut();
        if let Some(composition) = composition.filter(|composition| composition.wants_gather()) {
            composition.set_gathered();
            release_held(&mut self.pool, &mut self.tiers, composition);
        }
    }
}

/// Gives back the blocks that are held of pieces.
fn release_held(pool: &mut CachedPool, tiers: &mut Tiers, composition: &mut Composition) {
    while let Some(block) = composition.pop_held_block() {
        pool.release(block);
        if composition.wants_saves() {
            tiers.queue_save(block);
        }
    }
}
