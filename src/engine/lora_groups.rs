//! Which rows of a step belong to which adapter: the groups of a [`LoraBatch`](crate::backend::LoraBatch).

use std::ops::Range;
use std::sync::{Arc, Weak};

use super::residency::Residency;
use super::scheduler::ScheduledSequence;
use super::sequence::Sequence;
use crate::adapters::AdapterDigest;
use crate::backend::{LoraAdapter, LoraGroup};

/// The adapters of one step, in order of digest, whatever order their sequences run in.
pub(super) struct LoraGroups<L> {
    active: Vec<(AdapterDigest, Arc<LoraAdapter<L>>)>,
    groups: Vec<LoraGroup<L>>,
    /// Those with an update of the output projection; their entries are rows of logits.
    head: Vec<LoraGroup<L>>,
    /// The groups that were numbered last. An adapter that comes back is another one, in other pages; that it does not get the
    /// address of the one before is what the reference is for.
    numbered: Vec<(Weak<LoraAdapter<L>>, Range<usize>)>,
    last_number: u64,
}

impl<L: Send + Sync + 'static> LoraGroups<L> {
    pub(super) fn new(max_adapters: usize) -> Self {
        Self {
            active: Vec::with_capacity(max_adapters),
            groups: Vec::with_capacity(max_adapters),
            head: Vec::with_capacity(max_adapters),
            numbered: Vec::with_capacity(max_adapters),
            last_number: 0,
        }
    }

    /// A number for the groups of the step: that of the last call if they are the same adapters with the same entries, one that
    /// no others had if not, and 0 if there are none. With so many rows in a step, equal entries are equal places of arrays.
    pub(super) fn number(&mut self) -> u64 {
        if self.groups.is_empty() {
            return 0;
        }
        let mut pairs = self.numbered.iter().zip(&self.groups);
        let is_same = self.numbered.len() == self.groups.len()
            && pairs.all(|((adapter, entries), group)| {
                adapter.as_ptr() == Arc::as_ptr(&group.adapter) && *entries == group.entries
            });
        if !is_same {
            self.last_number += 1;
            self.numbered.clear();
            let groups = self.groups.iter();
            self.numbered.extend(groups.map(|group| (Arc::downgrade(&group.adapter), group.entries.clone())));
        }
        self.last_number
    }

    pub(super) fn groups(&self) -> &[LoraGroup<L>] {
        &self.groups
    }

    pub(super) fn head_groups(&self) -> &[LoraGroup<L>] {
        &self.head
    }

    /// Whether an adapter of the step updates the output projection.
    pub(super) fn has_head(&self) -> bool {
        self.active.iter().any(|(_, adapter)| adapter.head().is_some())
    }

    /// Lets go of the adapters.
    pub(super) fn clear(&mut self) {
        self.active.clear();
        self.groups.clear();
        self.head.clear();
    }

    /// Takes note of the step's adapters and says how many entries [`fill`](Self::fill) will write.
    pub(super) fn collect(
        &mut self,
        running: &[Box<Sequence>],
        scheduled: &[ScheduledSequence],
        residency: &Residency,
    ) -> usize {
        self.clear();
        let mut num_entries = 0;
        for entry in scheduled {
            for applied in running[entry.index].added_adapters() {
                num_entries += entry.num_tokens;
                let digest = applied.adapter.digest();
                if let Err(at) = self.active.binary_search_by_key(&digest, |(known, _)| *known) {
                    self.active.insert(at, (digest, residency.on_device(digest)));
                }
            }
        }
        num_entries
    }

    /// Writes each group's rows and the bits of their scales.
    pub(super) fn fill(
        &mut self,
        running: &[Box<Sequence>],
        scheduled: &[ScheduledSequence],
        mut write: impl FnMut(usize, i32, u32),
    ) {
        let mut at = 0;
        for (digest, adapter) in &self.active {
            let start = at;
            let mut first_row = 0;
            for entry in scheduled {
                let mut adapters = running[entry.index].added_adapters().iter();
                if let Some(applied) = adapters.find(|applied| applied.adapter.digest() == *digest) {
                    for row in first_row..first_row + entry.num_tokens {
                        write(at, row as i32, applied.scale.to_bits());
                        at += 1;
                    }
                }
                first_row += entry.num_tokens;
            }
            self.groups.push(LoraGroup { adapter: Arc::clone(adapter), entries: start..at });
        }
    }

    /// Writes the rows of logits that adapters are added to, as [`fill`](Self::fill) does those of the step, and says how many
    /// they are. `num_logits` says how many a scheduled sequence has.
    pub(super) fn fill_head(
        &mut self,
        running: &[Box<Sequence>],
        scheduled: &[ScheduledSequence],
        num_logits: impl Fn(&ScheduledSequence) -> usize,
        mut write: impl FnMut(usize, i32, u32),
    ) -> usize {
        let mut at = 0;
        for (digest, adapter) in self.active.iter().filter(|(_, adapter)| adapter.head().is_some()) {
            let (start, mut first_row) = (at, 0);
            for entry in scheduled {
                let num_rows = num_logits(entry);
                let mut adapters = running[entry.index].added_adapters().iter();
                if let Some(applied) = adapters.find(|applied| applied.adapter.digest() == *digest) {
                    for row in first_row..first_row + num_rows {
                        write(at, row as i32, applied.scale.to_bits());
                        at += 1;
                    }
                }
                first_row += num_rows;
            }
            self.head.push(LoraGroup { adapter: Arc::clone(adapter), entries: start..at });
        }
        at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_have_a_number_while_they_stay_the_same() {
        let adapter = || Arc::new(LoraAdapter::<()>::new(1));
        let (first, second) = (adapter(), adapter());
        let mut groups = LoraGroups::new(2);
        let mut number = |of: &[(&Arc<LoraAdapter<()>>, Range<usize>)]| {
            groups.clear();
            let group = |(adapter, entries): &(&Arc<_>, Range<usize>)| LoraGroup {
                adapter: Arc::clone(adapter),
                entries: entries.clone(),
            };
            groups.groups.extend(of.iter().map(group));
            groups.number()
        };
        assert_eq!([number(&[]), number(&[(&first, 0..2)]), number(&[(&first, 0..2)])], [0, 1, 1]);
        assert_eq!([number(&[(&first, 0..1)]), number(&[(&first, 0..1), (&second, 1..2)])], [2, 3]);
        // Steps without adapters in between change nothing, others do.
        assert_eq!([number(&[]), number(&[(&first, 0..1), (&second, 1..2)])], [0, 3]);
        assert_eq!([number(&[(&second, 0..2)]), number(&[(&first, 0..2)])], [4, 5]);
        drop(first);
        assert_eq!(number(&[(&adapter(), 0..2)]), 6);
    }
}
