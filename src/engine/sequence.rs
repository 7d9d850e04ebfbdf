//! A request while it runs: its tokens, its blocks, how far it has come.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use super::adapters::{AppliedAdapter, CompositionKey};
use super::composition::Composition;
use super::generation::Generation;
use super::handle::OutputSink;
use super::merge::MergedForm;
use super::request::{FinishReason, OutputEvent, Reuse};
use crate::kv::{BlockHash, BlockTable};
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
    /// Computing its KV, to be kept on disk; durably or not.
    Deposit { is_durable: bool },
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
    pub(super) blocks: BlockTable,
    pub(super) chain: HashChain,
    /// In order of digest.
    pub(super) adapters: Vec<AppliedAdapter>,
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

    /// What block `index` follows, when that is the last one hashed. Partial blocks belong to the domain before them.
    pub(super) fn before(&self, index: usize) -> Option<&BlockHash> {
        (index == self.hashes.len()).then(|| self.hashes.last().unwrap_or(&self.root))
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
        let behind = self.gathered().iter().map(|range| range.end.saturating_sub(range.start.max(first)));
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

    /// Where its next step ends at the latest: while it holds blocks of its pieces beside its own, with its prompt, because
    /// room for more was not promised.
    pub(super) fn next_limit(&self) -> usize {
        match &self.composition {
            Some(composition) if composition.wants_gather() => self.num_prompt_tokens,
            _ => self.tokens.len(),
        }
    }

    /// Positions of the tokens to compute next, ascending, endlessly.
    pub(super) fn next_positions(&self) -> impl Iterator<Item = usize> {
        let mut gathered = self.gathered().iter().skip_while(|range| range.end <= self.num_computed_tokens).peekable();
        let mut next = self.num_computed_tokens;
        std::iter::from_fn(move || {
            while let Some(range) = gathered.next_if(|range| range.start <= next) {
                next = range.end;
            }
            next += 1;
            Some(next - 1)
        })
    }

    /// One past the position of the last of the next `num_tokens` tokens to compute.
    pub(super) fn end_of_next(&self, num_tokens: usize) -> usize {
        match num_tokens.checked_sub(1).filter(|_| !self.gathered().is_empty()) {
            Some(last) => self.next_positions().nth(last).map_or(self.num_computed_tokens, |at| at + 1),
            None => self.num_computed_tokens + num_tokens,
        }
    }

    /// Takes note of block `index`, which was found in `tier` before it was first scheduled.
    pub(super) fn count_reuse(&mut self, tier: Tier, index: usize, block_size: usize) {
        if self.num_cached_tokens.is_some() {
            return;
        }
        let tokens: Range<usize> = index * block_size..(index + 1) * block_size;
        let num_tokens = match (&self.work, &mut self.composition) {
            (Work::Source, Some(composition)) => composition.count_reuse(tokens),
            _ => block_size,
        };
        self.reuse.count(tier, num_tokens);
    }

    /// Takes note of what it has when it is first scheduled.
    pub(super) fn count_cached(&mut self) {
        if self.num_cached_tokens.is_some() || matches!(self.work, Work::Source) {
            return;
        }
        let composition = self.composition.as_deref();
        self.num_cached_tokens = Some(self.num_computed_tokens + composition.map_or(0, Composition::num_reused_tokens));
        self.reuse.linked_tokens = composition.map_or(0, Composition::num_gathered_tokens);
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
