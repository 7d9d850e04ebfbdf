//! A request while it runs: its tokens, its blocks, how far it has come.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use super::adapters::{AppliedAdapter, CompositionKey};
use super::composition::Composition;
use super::generation::Generation;
use super::handle::OutputSink;
use super::merge::MergedForm;
use super::request::{BACKGROUND, FinishReason, OutputEvent, Reuse};
use crate::kv::{BlockHash, BlockTable, Level};
use crate::paging::Tier;
use crate::planted::{self, Bug};

/// Where a sequence stands. A preempted one is waiting again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SequenceStatus {
    Waiting,
    Running,
    /// Computed; its blocks are on their way to disk.
    Depositing,
    /// One of its pieces is there; it waits for the next one.
    Prepared,
    Finished,
}

/// What a sequence is run for.
pub(super) enum Work {
    /// Sampling tokens.
    Generate(Box<Generation>),
    /// Computing its KV, to be kept on disk; durably or not, and under which root if not under its own.
    Deposit { is_durable: bool, kept_under: Option<BlockHash> },
    /// Computing what a piece of a composed prompt is taken from.
    Source,
    /// Summing final hidden states; `[hidden_size]`.
    Embed { sum: Vec<f32> },
}

/// One running request.
pub(super) struct Sequence {
    pub(super) priority: i32,
    /// Order of arrival.
    pub(super) number: u64,
    pub(super) status: SequenceStatus,
    /// Prompt, then output. Room for all that can come is reserved at the start.
    pub(super) tokens: Vec<u32>,
    pub(super) num_prompt_tokens: usize,
    /// Tokens `[0, num_computed_tokens)` have their KV in `blocks`; behind them only those that were copied there.
    pub(super) num_computed_tokens: usize,
    /// Prompt tokens that came from the prefix cache when it was first scheduled.
    pub(super) num_cached_tokens: Option<usize>,
    /// Where the KV of its prompt came from.
    pub(super) reuse: Reuse,
    /// Whether lower tiers may be asked: not again after they failed it.
    pub(super) may_fetch: bool,
    /// How hard blocks are held on to that others share with it on purpose: `[0, num_shared_blocks)` of its prompt.
    pub(super) level: Level,
    pub(super) num_shared_blocks: usize,
    /// Whether what it leaves in memory is zeroed, and goes nowhere by itself.
    pub(super) erase_on_free: bool,
    pub(super) blocks: BlockTable,
    /// The end of a shared beginning that fills no block: whoever holds one may copy it.
    pub(super) shared_tail: Option<SharedTail>,
    /// The copy of that which its last block begins with, until the block is full.
    pub(super) attached_tail: Option<AttachedTail>,
    pub(super) chain: HashChain,
    /// In order of digest.
    pub(super) adapters: Vec<AppliedAdapter>,
    /// Whether those that are added to what it computes are held on the device, or on their way there.
    pub(super) holds_adapters: bool,
    /// Which adapters these are, where there are any.
    pub(super) composition_key: Option<CompositionKey>,
    /// The copy they are merged into, for as long as it runs; without, they are added to what it computes.
    pub(super) merged: Option<Arc<MergedForm>>,
    pub(super) work: Work,
    /// What of its prompt is copied instead of computed.
    pub(super) composition: Option<Box<Composition>>,
    pub(super) sink: OutputSink,
    pub(super) arrived_at: Instant,
    /// When it was first given a place in a step.
    pub(super) scheduled_at: Option<Instant>,
    pub(super) last_token_at: Option<Instant>,
}

/// Tokens of a prompt that a shared beginning ends with, behind its last full block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SharedTail {
    /// Which block of the prompt they begin.
    pub(super) block: usize,
    pub(super) num_tokens: usize,
}

/// What of a shared tail was copied into a sequence's own block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct AttachedTail {
    pub(super) tier: Tier,
    pub(super) num_tokens: usize,
}

/// A partial block that a sequence could copy.
pub(super) struct WantedTail<'a> {
    pub(super) hash: BlockHash,
    pub(super) tokens: &'a [u32],
    /// How many of them are of use: the last token of a prompt is computed.
    pub(super) num_used: usize,
}

/// The hashes of a sequence's full blocks, computed as they fill.
pub(super) struct HashChain {
    root: BlockHash,
    /// Whether the model was not known yet when the chain began.
    is_provisional: bool,
    /// The block from which on the chain runs in a domain of its own, and that domain.
    own: Option<(usize, String)>,
    hashes: Vec<BlockHash>,
    /// Blocks from here on hold something else than their tokens say, and have no hash.
    max_blocks: usize,
    /// Blocks `[0, num_published)` can be found by others.
    pub(super) num_published: usize,
    /// Blocks `[num_published, num_promised)` are being computed here, so that others may wait for them.
    pub(super) num_promised: usize,
}

impl HashChain {
    /// An empty chain with room for `max_blocks`, which from the block given in `own` on runs in another domain.
    pub(super) fn new(root: BlockHash, own: Option<(usize, String)>, max_blocks: usize) -> Self {
        let hashes = Vec::with_capacity(max_blocks);
        Self { root, is_provisional: false, own, hashes, max_blocks, num_published: 0, num_promised: 0 }
    }

    /// The same, for as long as it is not known which model it is.
    pub(super) fn provisional(self, is_provisional: bool) -> Self {
        Self { is_provisional, ..self }
    }

    /// An empty chain over the same blocks under another root.
    pub(super) fn under(&self, root: BlockHash) -> Self {
        Self::new(root, None, self.max_blocks).provisional(self.is_provisional)
    }

    /// Whether these hashes say nothing about the model, so that they mean nothing to another process.
    pub(super) fn is_provisional(&self) -> bool {
        self.is_provisional
    }

    /// The same chain, which ends before block `max_blocks`.
    pub(super) fn cut_at(mut self, max_blocks: usize) -> Self {
        self.max_blocks = self.max_blocks.min(max_blocks);
        self
    }

    /// Extends the chain over all full blocks of `tokens`.
    pub(super) fn extend(&mut self, tokens: &[u32], block_size: usize) {
        let room = self.max_blocks - self.hashes.len();
        for block in tokens.chunks_exact(block_size).skip(self.hashes.len()).take(room) {
            self.hashes.push(self.parent().child(block));
        }
    }

    /// What the next block follows.
    fn parent(&self) -> BlockHash {
        let last = *self.hashes.last().unwrap_or(&self.root);
        match &self.own {
            Some((first, domain)) if *first == self.hashes.len() && !planted::is(Bug::OwnDomainIgnored) => {
                last.in_domain(domain.as_bytes())
            }
            _ => last,
        }
    }

    /// The hash of its own tokens behind the full blocks, when these are all hashed and `index` of them.
    pub(super) fn own_tail(&self, index: usize, tokens: &[u32]) -> Option<BlockHash> {
        (index == self.hashes.len()).then(|| self.parent().tail(tokens))
    }

    /// The hash of the tokens that a shared beginning ends with in block `index`: in the domain that it belongs to.
    fn shared_tail(&self, index: usize, tokens: &[u32]) -> Option<BlockHash> {
        let before = index.checked_sub(1).map_or(Some(&self.root), |last| self.hashes.get(last));
        before.map(|before| before.tail(tokens))
    }

    /// The hash of block `index`, if the chain reaches it.
    pub(super) fn get(&self, index: usize) -> Option<&BlockHash> {
        self.hashes.get(index)
    }

    /// Full blocks hashed so far.
    pub(super) fn len(&self) -> usize {
        self.hashes.len()
    }
}

impl Sequence {
    /// Tokens that still need to be computed before the next one can be sampled.
    pub(super) fn num_uncomputed_tokens(&self) -> usize {
        let first = self.num_computed_tokens;
        let behind = self.gathered_from(first).iter().map(|range| range.end - range.start.max(first));
        self.tokens.len() - first - behind.sum::<usize>()
    }

    /// Whether its adapters are merged into the weights it is computed with.
    pub(super) fn is_merged(&self) -> bool {
        self.merged.is_some()
    }

    /// Adapters that are added to what is computed for it.
    pub(super) fn added_adapters(&self) -> &[AppliedAdapter] {
        if self.is_merged() { &[] } else { &self.adapters }
    }

    /// Those of them that it holds on the device, or on their way there.
    pub(super) fn held_adapters(&self) -> &[AppliedAdapter] {
        if self.holds_adapters { self.added_adapters() } else { &[] }
    }

    /// Tokens of its next step, at the most. While it holds blocks of its pieces beside its own, the step ends with its
    /// prompt, because room for more was not promised.
    pub(super) fn num_next_tokens(&self) -> usize {
        match (self.unprobed(), &self.composition) {
            (Some(places), _) => places.len(),
            (None, Some(composition)) if composition.wants_gather() => {
                self.num_uncomputed_tokens() - self.num_output_tokens()
            }
            (None, _) => self.num_uncomputed_tokens(),
        }
    }

    /// From where on its next step takes tokens, and which places behind that it passes over.
    fn next_places(&self) -> (usize, &[Range<usize>]) {
        match self.unprobed() {
            Some(places) => (places.start, &[]),
            None => (self.num_computed_tokens, self.gathered_from(self.num_computed_tokens)),
        }
    }

    /// Positions of the tokens that its next step takes, ascending, endlessly.
    pub(super) fn next_positions(&self) -> impl Iterator<Item = usize> {
        let (mut next, gathered) = self.next_places();
        let mut gathered = gathered.iter().peekable();
        std::iter::from_fn(move || {
            while let Some(range) = gathered.next_if(|range| range.start <= next) {
                next = range.end;
            }
            next += 1;
            Some(next - 1)
        })
    }

    /// One past the position of the last of the next `num_tokens` tokens.
    pub(super) fn end_of_next(&self, num_tokens: usize) -> usize {
        let (first, gathered) = self.next_places();
        match num_tokens.checked_sub(1).filter(|_| !gathered.is_empty()) {
            Some(last) => self.next_positions().nth(last).map_or(first, |at| at + 1),
            None => first + num_tokens,
        }
    }

    /// The partial block that it could copy behind `num_blocks` full ones.
    pub(super) fn wanted_tail(&self, num_blocks: usize, block_size: usize) -> Option<WantedTail<'_>> {
        let SharedTail { block, num_tokens } = self.shared_tail.filter(|tail| tail.block == num_blocks)?;
        let start = block * block_size;
        let tokens = self.tokens.get(start..start + num_tokens)?;
        let num_used = num_tokens.min((self.tokens.len() - 1).saturating_sub(start));
        let hash = self.chain.shared_tail(block, tokens)?;
        (self.attached_tail.is_none() && num_used > 0).then_some(WantedTail { hash, tokens, num_used })
    }

    /// Takes note of the blocks that it has got before it runs.
    pub(super) fn note_attached(&mut self, block_size: usize) {
        let num_full = self.blocks.len() - usize::from(self.attached_tail.is_some());
        let num_behind = self.attached_tail.map_or(0, |tail| tail.num_tokens);
        self.num_computed_tokens = match planted::is(Bug::TailTakenForFull) {
            true => (self.blocks.len() * block_size).min(self.tokens.len() - 1),
            false => num_full * block_size + num_behind,
        };
        self.chain.num_published = num_full;
        self.chain.num_promised = num_full;
    }

    /// Takes note of block `index`, which was found in `tier` before it was first scheduled.
    pub(super) fn count_reuse(&mut self, tier: Tier, index: usize, block_size: usize) {
        if self.num_cached_tokens.is_some() {
            return;
        }
        let tokens: Range<usize> = index * block_size..(index + 1) * block_size;
        match (&self.work, &mut self.composition) {
            (Work::Source, Some(composition)) => composition.count_reuse(tier, tokens),
            _ => self.reuse.count(tier, block_size),
        }
    }

    /// Takes note of what it has when it is first scheduled, or when it is known which of it is used.
    pub(super) fn count_cached(&mut self) {
        if self.num_cached_tokens.is_some() || matches!(self.work, Work::Source) || self.unprobed().is_some() {
            return;
        }
        if let Some(AttachedTail { tier, num_tokens }) = self.attached_tail {
            self.reuse.count(tier, num_tokens);
        }
        let mut num_cached_tokens = self.num_computed_tokens;
        if let Some(composition) = &self.composition {
            for (tier, num_tokens) in composition.reused_tokens() {
                self.reuse.count(tier, num_tokens);
                num_cached_tokens += num_tokens;
            }
            self.reuse.linked_tokens = composition.num_gathered_tokens();
            self.reuse.chosen_tokens = composition.num_chosen_tokens();
        }
        self.num_cached_tokens = Some(num_cached_tokens);
    }

    /// Blocks that nobody else can take.
    pub(super) fn num_held_blocks(&self) -> usize {
        self.blocks.len() + self.composition.as_ref().map_or(0, |composition| composition.num_held_blocks())
    }

    /// The tokens of full block `index`.
    pub(super) fn block_tokens(&self, index: usize, block_size: usize) -> &[u32] {
        &self.tokens[index * block_size..(index + 1) * block_size]
    }

    /// Full blocks that others may share with it: its last token has to be computed, for its logits.
    pub(super) fn num_shareable_blocks(&self, block_size: usize) -> usize {
        match self.work {
            Work::Source => self.tokens.len() / block_size,
            _ => (self.tokens.len() - 1) / block_size,
        }
    }

    /// Tokens sampled so far.
    pub(super) fn num_output_tokens(&self) -> usize {
        self.tokens.len() - self.num_prompt_tokens
    }

    /// Whether its prompt's own logits are wanted and not yet there, so that every prompt token must be computed.
    pub(super) fn wants_prompt_logits(&self) -> bool {
        match &self.work {
            Work::Generate(generation) => generation.wants_prompt_logits(),
            Work::Embed { .. } | Work::Deposit { .. } | Work::Source => false,
        }
    }

    /// Whether the KV of cached blocks would be enough for its prompt.
    pub(super) fn can_use_cached_blocks(&self) -> bool {
        !matches!(self.work, Work::Embed { .. }) && !self.wants_prompt_logits()
    }

    /// How hard its block `index` is held on to; `None` for what is its own, which leaves that as it is.
    pub(super) fn level_of(&self, index: usize) -> Option<Level> {
        let is_kept = matches!(self.work, Work::Deposit { .. } | Work::Source) || index < self.num_shared_blocks;
        is_kept.then_some(self.level)
    }

    /// Whether it runs only while nothing else does.
    pub(super) fn is_background(&self) -> bool {
        self.priority == BACKGROUND
    }

    /// The order in which sequences are served.
    pub(super) fn rank(&self) -> (i32, u64) {
        (self.priority, self.number)
    }

    /// Starts over: its KV is gone. Tiers that failed it are not asked again, or it would wait for them for ever.
    pub(super) fn reset(&mut self) {
        self.reset_stage();
        if self.composition.is_some() {
            self.restart_composition();
            self.reset_stage();
        }
    }

    fn reset_stage(&mut self) {
        if !planted::is(Bug::PreemptedKeepsCount) {
            self.num_computed_tokens = 0;
        }
        if self.num_cached_tokens.is_none() {
            self.reuse = Reuse { fetch_ms: self.reuse.fetch_ms, decision: self.reuse.decision, ..Reuse::default() };
        }
        self.attached_tail = None;
        self.chain.num_published = 0;
        self.chain.num_promised = 0;
        match &mut self.work {
            Work::Generate(generation) => generation.prompt_logprobs.clear(),
            Work::Embed { sum } => sum.fill(0.0),
            Work::Deposit { .. } | Work::Source => {}
        }
    }

    /// Tells the caller that nothing follows.
    pub(super) fn finish(&mut self, reason: FinishReason) {
        self.status = SequenceStatus::Finished;
        self.sink.send(OutputEvent::Finished(reason));
    }
}
