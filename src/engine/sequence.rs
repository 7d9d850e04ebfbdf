//! A request while it runs: its tokens, its blocks, how far it has come.

use std::time::Instant;

use super::adapters::AppliedAdapter;
use super::generation::Generation;
use super::handle::OutputSink;
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
    Finished,
}

/// What a sequence is run for.
pub(super) enum Work {
    /// Sampling tokens.
    Generate(Box<Generation>),
    /// Computing its KV, to be kept on disk; durably or not.
    Deposit { is_durable: bool },
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
    /// Tokens `[0, num_computed_tokens)` have their KV in `blocks`.
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
    pub(super) work: Work,
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
    /// Blocks `[0, num_published)` can be found by others.
    pub(super) num_published: usize,
    /// Blocks `[num_published, num_promised)` are being computed here, so that others may wait for them.
    pub(super) num_promised: usize,
}

impl HashChain {
    /// An empty chain with room for `max_blocks`, which from the block given in `own` on runs in another domain.
    pub(super) fn new(root: BlockHash, own: Option<(usize, String)>, max_blocks: usize) -> Self {
        let hashes = Vec::with_capacity(max_blocks);
        Self { root, is_provisional: false, own, hashes, num_published: 0, num_promised: 0 }
    }

    /// The same, for as long as it is not known which model it is.
    pub(super) fn provisional(self, is_provisional: bool) -> Self {
        Self { is_provisional, ..self }
    }

    /// Whether these hashes say nothing about the model, so that they mean nothing to another process.
    pub(super) fn is_provisional(&self) -> bool {
        self.is_provisional
    }

    /// Extends the chain over all full blocks of `tokens`.
    pub(super) fn extend(&mut self, tokens: &[u32], block_size: usize) {
        for block in tokens.chunks_exact(block_size).skip(self.hashes.len()) {
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
        self.tokens.len() - self.num_computed_tokens
    }

    /// Takes note of `num_tokens` tokens that need not be computed before it is first scheduled.
    pub(super) fn count_reuse(&mut self, tier: Tier, num_tokens: usize) {
        if self.num_cached_tokens.is_none() {
            self.reuse.count(tier, num_tokens);
        }
    }

    /// The tokens of full block `index`.
    pub(super) fn block_tokens(&self, index: usize, block_size: usize) -> &[u32] {
        &self.tokens[index * block_size..(index + 1) * block_size]
    }

    /// Full blocks that others may share with it: its last token has to be computed, for its logits.
    pub(super) fn num_shareable_blocks(&self, block_size: usize) -> usize {
        (self.tokens.len() - 1) / block_size
    }

    /// Tokens sampled so far.
    pub(super) fn num_output_tokens(&self) -> usize {
        self.tokens.len() - self.num_prompt_tokens
    }

    /// Whether its prompt's own logits are wanted and not yet there, so that every prompt token must be computed.
    pub(super) fn wants_prompt_logits(&self) -> bool {
        match &self.work {
            Work::Generate(generation) => generation.wants_prompt_logits(),
            Work::Embed { .. } | Work::Deposit { .. } => false,
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
            Work::Deposit { .. } => {}
        }
    }

    /// Tells the caller that nothing follows.
    pub(super) fn finish(&mut self, reason: FinishReason) {
        self.status = SequenceStatus::Finished;
        self.sink.send(OutputEvent::Finished(reason));
    }
}
