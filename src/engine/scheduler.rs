//! Which sequences run in the next step, and on which blocks.
//!
//! Continuous batching with chunked prefill under a token budget: running sequences first, in order of priority and
//! arrival, then as many waiting ones as fit. When blocks run out the last running sequence is preempted: its blocks
//! are released and it is recomputed later, from whatever the prefix cache still has. A waiting sequence whose next
//! block is being computed by a running one is passed over until that block can be shared. So is one whose adapters are
//! on their way to the device.

#![allow(clippy::vec_box)] // sequences move between the queues, by pointer

mod adapters;
mod blocks;
mod copies;

use std::collections::{HashSet, VecDeque};
use std::time::{Duration, Instant};

use super::request::FinishReason;
use super::residency::Residency;
use super::sequence::{Sequence, SequenceStatus, Work};
use super::tiers::{Plan, Tiers};
use crate::adapters::AdapterDigest;
use crate::kv::{BlockHash, CachedPool};
use crate::paging::{DeviceLanding, Pager};
use crate::planted::{self, Bug};

/// Bounds of a step and of the queue.
#[derive(Debug, Clone, Copy)]
pub struct SchedulerLimits {
    /// Sequences that run at the same time.
    pub max_num_seqs: usize,
    /// Tokens in one step.
    pub max_num_batched_tokens: usize,
    /// Sequences that wait.
    pub max_num_waiting: usize,
    /// Prompt positions in one step whose logits are wanted.
    pub max_prompt_logits: usize,
    /// Prompt plus output of one sequence.
    pub max_model_len: usize,
    /// Tokens per block.
    pub block_size: usize,
    /// Blocks in the pool.
    pub num_blocks: usize,
    /// Whether blocks are shared between requests.
    pub prefix_caching: bool,
}

/// A running sequence's part in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ScheduledSequence {
    /// Index among the running sequences.
    pub(super) index: usize,
    /// New tokens to compute.
    pub(super) num_tokens: usize,
}

/// Owner of all sequences and of the block pool.
pub(super) struct Scheduler {
    limits: SchedulerLimits,
    /// In order of rank.
    waiting: VecDeque<Box<Sequence>>,
    /// In order of rank.
    running: Vec<Box<Sequence>>,
    scheduled: Vec<ScheduledSequence>,
    /// Composed prompts whose tokens go through the lowest layers in this step.
    probing: Vec<ScheduledSequence>,
    pool: CachedPool,
    tiers: Tiers,
    residency: Residency,
    /// Adapters that are held because they are being merged.
    merging: Vec<AdapterDigest>,
    /// Blocks that running sequences are about to fill, or that are on their way up.
    promised: HashSet<BlockHash>,
    num_preemptions: u64,
}

impl Scheduler {
    pub(super) fn new(
        limits: SchedulerLimits,
        pager: Pager,
        fetch_wait: Option<Duration>,
        residency: Residency,
    ) -> Self {
        Self {
            residency,
            merging: Vec::new(),
            waiting: VecDeque::with_capacity(limits.max_num_waiting + limits.max_num_seqs),
            running: Vec::with_capacity(limits.max_num_seqs),
            scheduled: Vec::with_capacity(limits.max_num_seqs),
            probing: Vec::with_capacity(limits.max_num_seqs),
            pool: CachedPool::new(limits.num_blocks, limits.block_size),
            tiers: Tiers::new(pager, fetch_wait, limits.num_blocks, limits.block_size),
            promised: HashSet::with_capacity(limits.num_blocks * 2),
            num_preemptions: 0,
            limits,
        }
    }

    /// Whether another sequence may be added.
    pub(super) fn has_room(&self) -> bool {
        self.waiting.len() < self.limits.max_num_waiting
    }

    /// Queues a sequence behind those of its priority.
    pub(super) fn add(&mut self, sequence: Box<Sequence>) {
        let at = self.waiting.partition_point(|other| other.rank() < sequence.rank());
        self.waiting.insert(at, sequence);
    }

    /// Whether there is anything to schedule.
    pub(super) fn has_queued(&self) -> bool {
        !self.waiting.is_empty() || !self.running.is_empty()
    }

    /// Whether nobody waits for anything, and no adapter is on its way.
    pub(super) fn is_idle(&self) -> bool {
        !self.has_queued() && self.tiers.num_sequences() == 0 && self.residency.num_loading() == 0
    }

    /// Whether nobody waits for anything, and nothing is to be copied or zeroed.
    pub(super) fn is_settled(&self) -> bool {
        self.is_idle() && self.tiers.is_settled() && self.pool.num_unwiped() == 0
    }

    /// Blocks that are held for a while by copies and by being zeroed.
    pub(super) fn num_under_way(&self) -> usize {
        self.tiers.num_held() + self.pool.num_unwiped()
    }

    pub(super) fn num_waiting(&self) -> usize {
        self.waiting.len()
    }

    pub(super) fn num_running(&self) -> usize {
        self.running.len()
    }

    pub(super) fn num_preemptions(&self) -> u64 {
        self.num_preemptions
    }

    pub(super) fn pool(&self) -> &CachedPool {
        &self.pool
    }

    pub(super) fn scheduled(&self) -> &[ScheduledSequence] {
        &self.scheduled
    }

    /// Blocks on their way up to sequences that are scheduled.
    pub(super) fn landings(&self) -> impl Iterator<Item = &DeviceLanding> {
        let is_scheduled = |number| self.scheduled.iter().any(|entry| self.running[entry.index].number == number);
        self.tiers.landings(is_scheduled)
    }

    pub(super) fn probing(&self) -> &[ScheduledSequence] {
        &self.probing
    }

    pub(super) fn running(&self) -> &[Box<Sequence>] {
        &self.running
    }

    pub(super) fn sequence_mut(&mut self, index: usize) -> &mut Sequence {
        &mut self.running[index]
    }

    /// Has the grammars of sequences that are about to get a token say which ones may come.
    pub(super) fn compute_masks(&mut self) {
        for entry in &self.scheduled {
            let sequence = &mut self.running[entry.index];
            let gets_token = entry.num_tokens == sequence.num_uncomputed_tokens();
            if let (true, Work::Generate(generation)) = (gets_token, &mut sequence.work) {
                generation.compute_mask();
            }
        }
    }

    /// Ends sequences whose callers have gone, and says how many.
    pub(super) fn drop_cancelled(&mut self) -> usize {
        let num_before = self.running.len() + self.waiting.len();
        for sequence in &mut self.running {
            if sequence.sink.is_cancelled() {
                sequence.finish(FinishReason::Abort);
            }
        }
        self.remove_finished();
        let cancelled = self.tiers.take_cancelled();
        let num_fetching = cancelled.len();
        cancelled.into_iter().for_each(|sequence| self.abort(sequence));
        let mut at = 0;
        while at < self.waiting.len() {
            match self.waiting[at].sink.is_cancelled().then(|| self.waiting.remove(at)).flatten() {
                Some(sequence) => self.abort(sequence),
                None => at += 1,
            }
        }
        num_before + num_fetching - self.running.len() - self.waiting.len()
    }

    fn abort(&mut self, mut sequence: Box<Sequence>) {
        self.release(&mut sequence);
        sequence.finish(FinishReason::Abort);
    }

    /// Has the blocks of a running sequence, which is computed, kept on disk.
    pub(super) fn begin_deposit(&mut self, index: usize) {
        let mut sequence = self.running.remove(index);
        self.withdraw_promises(&mut sequence);
        sequence.status = SequenceStatus::Depositing;
        if let Work::Deposit { kept_under: Some(root), .. } = sequence.work
            && !planted::is(Bug::KeptDomainIgnored)
        {
            sequence.chain = sequence.chain.under(root);
        }
        // Blocks go to disk by their hashes, also where none are shared on the device.
        sequence.chain.extend(&sequence.tokens, self.limits.block_size);
        self.running.insert(index, sequence);
    }

    /// Has a running sequence go on with its next piece.
    pub(super) fn finish_source(&mut self, index: usize) {
        self.running[index].status = SequenceStatus::Prepared;
    }

    /// Releases the blocks of finished sequences and forgets them.
    pub(super) fn remove_finished(&mut self) {
        let mut index = 0;
        while index < self.running.len() {
            match self.running[index].status {
                SequenceStatus::Finished => {
                    let mut sequence = self.running.remove(index);
                    self.release(&mut sequence);
                }
                SequenceStatus::Depositing => {
                    let sequence = self.running.remove(index);
                    self.tiers.start_deposit(sequence);
                }
                SequenceStatus::Prepared => {
                    let mut sequence = self.running.remove(index);
                    sequence.enter_next_stage();
                    sequence.status = SequenceStatus::Waiting;
                    self.add(sequence);
                }
                _ => index += 1,
            }
        }
    }

    /// Takes out everything, running or waiting; its blocks are free afterwards.
    pub(super) fn drain(&mut self) -> Vec<Box<Sequence>> {
        let mut sequences = std::mem::take(&mut self.running);
        sequences.extend(self.waiting.drain(..));
        sequences.extend(self.tiers.take_all());
        sequences.extend(self.tiers.take_deposits());
        sequences.iter_mut().for_each(|sequence| self.release(sequence));
        self.clear_scheduled();
        sequences
    }

    /// Decides the next step.
    pub(super) fn schedule(&mut self) {
        self.clear_scheduled();
        if self.has_foreground() {
            self.suspend_background();
        }
        let mut budget =
            Budget { tokens: self.limits.max_num_batched_tokens, prompt_logits: self.limits.max_prompt_logits };
        let is_short = self.schedule_running(&mut budget);
        if !is_short {
            self.schedule_waiting(&mut budget);
            self.prefetch_adapters();
        }
        self.group_by_form();
    }

    /// Whether there is anything that is not to run in the background.
    fn has_foreground(&self) -> bool {
        self.running.iter().chain(&self.waiting).any(|sequence| !sequence.is_background())
    }

    /// Puts what runs in the background back into the queue. What it has computed stays cached as long as nobody needs the
    /// room, so it goes on from there.
    fn suspend_background(&mut self) {
        while let Some(sequence) = self.running.pop_if(|sequence| sequence.is_background()) {
            self.put_back(sequence);
        }
    }

    /// Puts those whose adapters are merged behind the others: a step is divided at one row.
    fn group_by_form(&mut self) {
        if self.running.iter().any(|sequence| sequence.is_merged()) {
            let Self { running, scheduled, probing, .. } = self;
            for list in [scheduled, probing] {
                list.sort_unstable_by_key(|entry| (running[entry.index].is_merged(), entry.index));
            }
        }
    }

    fn clear_scheduled(&mut self) {
        self.scheduled.clear();
        self.probing.clear();
    }

    /// Gives a running sequence, which has the blocks for it, so many tokens of the step.
    fn give_tokens(&mut self, index: usize, num_tokens: usize, budget: &mut Budget) {
        let sequence = &self.running[index];
        budget.spend(sequence, num_tokens);
        let list = if sequence.unprobed().is_some() { &mut self.probing } else { &mut self.scheduled };
        list.push(ScheduledSequence { index, num_tokens });
    }

    /// Returns whether there were not enough blocks, so that nobody else is to begin.
    fn schedule_running(&mut self, budget: &mut Budget) -> bool {
        let mut is_short = false;
        let mut index = 0;
        while index < self.running.len() {
            let num_tokens = budget.grant(&self.running[index]);
            let has_blocks = self.obtain_blocks(index, num_tokens, &mut is_short);
            if has_blocks && num_tokens > 0 {
                self.give_tokens(index, num_tokens, budget);
            }
            index += 1;
        }
        is_short
    }

    /// Gives a running sequence the blocks for `num_tokens` more, at the cost of those of a later rank. `false` when it was
    /// preempted itself, or has to wait for blocks that are being zeroed: preempting it as well would have two sequences take
    /// each other's room for ever.
    fn obtain_blocks(&mut self, index: usize, num_tokens: usize, is_short: &mut bool) -> bool {
        while index < self.running.len() {
            if self.ensure_blocks(index, num_tokens) {
                return true;
            }
            if self.num_missing_for(index, num_tokens) <= self.num_available() {
                *is_short = true;
                return false;
            }
            if !self.reclaim(0) {
                self.preempt_last();
                *is_short = true;
            }
        }
        false
    }

    fn schedule_waiting(&mut self, budget: &mut Budget) {
        let mut at = 0;
        while at < self.waiting.len() && self.has_place() && budget.tokens > 0 {
            // Those in the background are the last ones.
            if self.waiting[at].is_background() && self.has_foreground() {
                break;
            }
            match self.try_admit(at, budget) {
                Admission::Admitted | Admission::Fetching | Admission::Prepared => {}
                Admission::Deferred => at += 1,
                Admission::NoRoom => break,
            }
        }
    }

    fn try_admit(&mut self, at: usize, budget: &mut Budget) -> Admission {
        if !self.hold_adapters(at) {
            return Admission::NoRoom;
        }
        if !self.residency.are_ready(self.waiting[at].added_adapters()) {
            return Admission::Deferred;
        }
        let use_cache = self.limits.prefix_caching && self.waiting[at].can_use_cached_blocks();
        if use_cache && self.is_promised(at) {
            return Admission::Deferred;
        }
        let Some(mut sequence) = self.waiting.remove(at) else { return Admission::NoRoom };
        if use_cache {
            self.attach_cached_blocks(&mut sequence);
        }
        if matches!(sequence.work, Work::Source) && sequence.num_uncomputed_tokens() == 0 {
            sequence.enter_next_stage();
            self.waiting.insert(at, sequence);
            return Admission::Prepared;
        }
        let num_missing = sequence.num_missing_blocks(self.limits.block_size);
        while self.num_available() < num_missing + self.num_reserved() && self.reclaim(at) {}
        let num_tokens = budget.grant(&sequence);
        let num_wanted = num_missing + self.num_reserved();
        if num_tokens == 0 || self.pool.num_free() < num_wanted {
            // What it has brought up and gave back to be zeroed it would have to bring up again.
            if num_tokens == 0 || self.num_available() < num_wanted {
                self.give_back(&mut sequence);
                sequence.reset();
            }
            self.waiting.insert(at, sequence);
            return Admission::NoRoom;
        }
        if use_cache && let Plan::Fetch(found) = self.plan_fetch(&mut sequence) {
            self.start_fetch(sequence, found);
            return Admission::Fetching;
        }
        self.promise_blocks(&mut sequence);
        sequence.scheduled_at.get_or_insert_with(Instant::now);
        sequence.status = SequenceStatus::Running;
        let index = self.running.partition_point(|other| other.rank() < sequence.rank());
        let scheduled = self.scheduled.iter_mut().chain(&mut self.probing);
        scheduled.filter(|scheduled| scheduled.index >= index).for_each(|scheduled| scheduled.index += 1);
        self.running.insert(index, sequence);
        assert!(self.ensure_blocks(index, num_tokens), "the blocks were just counted");
        self.give_tokens(index, num_tokens, budget);
        Admission::Admitted
    }

    /// Puts the running sequence of the last rank back into the queue.
    fn preempt_last(&mut self) {
        if let Some(sequence) = self.running.pop() {
            self.num_preemptions += 1;
            self.put_back(sequence);
        }
    }

    fn put_back(&mut self, mut sequence: Box<Sequence>) {
        self.release(&mut sequence);
        sequence.reset();
        sequence.status = SequenceStatus::Waiting;
        self.add(sequence);
    }

    /// Whether another sequence may begin, those that wait for blocks counted.
    fn has_place(&self) -> bool {
        self.running.len() + self.tiers.num_fetching() < self.limits.max_num_seqs
    }

    /// Takes the blocks and adapters of the waiting sequence of the last rank that has some, among those from place `first`
    /// on, and behind that those of a merge; `false` when there are none. What they hold stays cached for the time being.
    fn reclaim(&mut self, first: usize) -> bool {
        let has_some = |sequence: &Sequence| sequence.num_held_blocks() > 0 || sequence.holds_adapters;
        let last = self.waiting.iter().rposition(|sequence| has_some(sequence));
        let Some(at) = last.filter(|at| *at >= first) else {
            return self.release_merging();
        };
        let Some(mut sequence) = self.waiting.remove(at) else { return false };
        self.give_back(&mut sequence);
        self.release_adapters(&mut sequence);
        sequence.reset();
        self.waiting.insert(at, sequence);
        true
    }

    /// Panics where block tables, reference counts and promises disagree. For tests and debug builds.
    pub(super) fn check_integrity(&self) {
        let queued = self.running.iter().chain(&self.waiting);
        let num_held = queued.clone().map(|sequence| sequence.num_held_blocks()).sum::<usize>() + self.tiers.num_held();
        self.pool.check_integrity(num_held + self.residency.num_held());
        self.tiers.check_integrity();
        let holders = queued.map(Box::as_ref).chain(self.tiers.waiting());
        let num_holds = holders.map(|sequence| sequence.held_adapters().len()).sum::<usize>() + self.merging.len();
        self.residency.check_integrity(num_holds);
        let is_held = self.running.iter().all(|it| it.held_adapters().len() == it.added_adapters().len());
        assert!(is_held, "running sequences hold their adapters");
        assert!(self.running.is_sorted_by_key(|sequence| sequence.rank()), "running sequences are out of order");
        let is_anyone_active = !self.running.is_empty() || self.tiers.num_held() > 0;
        assert!(is_anyone_active || self.promised.is_empty(), "promises outlive their sequences");
    }
}

enum Admission {
    Admitted,
    /// Its blocks are on their way up.
    Fetching,
    /// Somebody is computing its next block, or its adapters have yet to arrive.
    Deferred,
    /// One of its pieces was all there; it waits for the next one, or for the rest.
    Prepared,
    /// It has to wait, and so have those behind it.
    NoRoom,
}

/// What is left of a step.
struct Budget {
    tokens: usize,
    prompt_logits: usize,
}

impl Budget {
    /// How many of its tokens a sequence may compute now.
    fn grant(&self, sequence: &Sequence) -> usize {
        let num_tokens = sequence.num_next_tokens().min(self.tokens);
        if sequence.wants_prompt_logits() { num_tokens.min(self.prompt_logits) } else { num_tokens }
    }

    fn spend(&mut self, sequence: &Sequence, num_tokens: usize) {
        self.tokens -= num_tokens;
        if sequence.wants_prompt_logits() {
            self.prompt_logits -= num_tokens;
        }
    }
}
