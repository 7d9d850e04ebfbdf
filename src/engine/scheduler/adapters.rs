//! The adapters of sequences: held while they run, brought up ahead of their turn, given back for those before them.

use super::super::residency::{FailedLoad, Residency};
use super::super::sequence::Sequence;
use super::Scheduler;
use crate::adapters::AdapterDigest;

/// Waiting sequences whose adapters are brought to the device before there is a place for them.
const MAX_PREFETCHING: usize = 16;

/// Of the pool, one block in so many is left to running sequences when adapters are brought up ahead of their time.
const POOL_SHARE_KEPT_FREE: usize = 8;

impl Scheduler {
    /// Holds the adapters of a waiting sequence on the device, or has them brought there, at the cost of those behind it;
    /// `false` while there is no room for them.
    pub(super) fn hold_adapters(&mut self, at: usize) -> bool {
        let sequence = &self.waiting[at];
        if sequence.holds_adapters || sequence.added_adapters().is_empty() {
            return true;
        }
        // A block for each that runs, lest they are preempted for what is only beginning.
        while !self.try_hold_adapters(at, self.running.len()) {
            if !self.reclaim(at + 1) {
                return false;
            }
        }
        true
    }

    fn try_hold_adapters(&mut self, at: usize, num_kept_free: usize) -> bool {
        let num_reserved = self.num_reserved() + num_kept_free;
        let Self { waiting, residency, pool, .. } = self;
        let sequence = &mut waiting[at];
        sequence.holds_adapters = residency.hold(pool, sequence.added_adapters(), num_reserved);
        sequence.holds_adapters
    }

    /// Brings up the adapters of the next waiting sequences, as far as there is room that nobody needs now.
    pub(super) fn prefetch_adapters(&mut self) {
        let num_kept_free = self.limits.num_blocks / POOL_SHARE_KEPT_FREE;
        for at in 0..self.waiting.len().min(MAX_PREFETCHING) {
            let sequence = &self.waiting[at];
            let wants_some = !sequence.holds_adapters && !sequence.added_adapters().is_empty();
            if wants_some && !self.try_hold_adapters(at, num_kept_free) {
                break;
            }
        }
    }

    /// Lets go of a sequence's adapters.
    pub(super) fn release_adapters(&mut self, sequence: &mut Sequence) {
        let held = sequence.held_adapters().iter();
        held.for_each(|applied| self.residency.release(&mut self.pool, applied.adapter.digest()));
        sequence.holds_adapters = false;
    }

    /// Takes note of adapters that have arrived. Sequences whose adapters could not be brought up, and why.
    pub(in super::super) fn absorb_adapters(&mut self) -> Vec<(Box<Sequence>, String)> {
        let mut failed = Vec::new();
        while let Some(FailedLoad { adapter, why }) = self.residency.poll(&mut self.pool) {
            let mut at = 0;
            while at < self.waiting.len() {
                let Some(mut sequence) = self.waiting.remove(at) else { break };
                let its_own = sequence.held_adapters().iter().find(|it| it.adapter.digest() == adapter.digest());
                let is_same = its_own.map(|it| it.adapter.path() == adapter.path());
                match is_same {
                    Some(true) => {
                        self.release(&mut sequence);
                        failed.push((sequence, why.clone()));
                        continue;
                    }
                    // The same adapter may lie elsewhere, unharmed: it is asked for again.
                    Some(false) => self.release_adapters(&mut sequence),
                    None => {}
                }
                self.waiting.insert(at, sequence);
                at += 1;
            }
        }
        failed
    }

    /// Where adapters are.
    pub(in super::super) fn residency(&self) -> &Residency {
        &self.residency
    }

    /// Holds adapters that running sequences hold as well, and none of those that were held for a merge before.
    pub(in super::super) fn hold_for_merge(&mut self, adapters: &[AdapterDigest]) {
        if self.merging != adapters {
            self.release_merging();
            adapters.iter().for_each(|digest| self.residency.hold_again(*digest));
            self.merging.extend_from_slice(adapters);
        }
    }

    /// Whether adapters are held for a merge: not any more when sequences needed the room.
    pub(in super::super) fn holds_for_merge(&self) -> bool {
        !self.merging.is_empty()
    }

    /// Lets go of adapters that were held for a merge; `false` when none was.
    pub(in super::super) fn release_merging(&mut self) -> bool {
        let held = std::mem::take(&mut self.merging);
        held.iter().for_each(|digest| self.residency.release(&mut self.pool, *digest));
        !held.is_empty()
    }
}
