//! Requests as they come in: what is refused, and the sequence that an accepted one becomes.

use std::time::Instant;

use super::Engine;
use crate::backend::Backend;
use crate::engine::adapters::{AppliedAdapter, CompositionKey, identity_under, in_order};
use crate::engine::composition::Composition;
use crate::engine::generation::Generation;
use crate::engine::handle::{OutputSink, Submission};
use crate::engine::request::{FinishReason, GenerateRequest, OutputEvent, Piece, Reuse, SamplingParams, Task};
use crate::engine::scheduler::SchedulerLimits;
use crate::engine::sequence::{HashChain, Sequence, SequenceStatus, SharedTail, Work};
use crate::kv::BlockHash;
use crate::planted::{self, Bug};
use crate::{Error, Result, invalid};

impl<B: Backend> Engine<B> {
    pub(super) fn accept_submissions(&mut self) {
        while self.scheduler.has_room() {
            match self.submissions.try_recv() {
                Ok(submission) => self.accept(submission),
                Err(_) => break,
            }
        }
    }

    pub(super) fn accept(&mut self, Submission { mut request, sink }: Submission) {
        if let Err(error) = self.check(&mut request) {
            self.metrics.count_finished("error");
            sink.send(OutputEvent::Finished(FinishReason::Error(error.to_string())));
            return;
        }
        self.num_arrived += 1;
        tracing::debug!(id = %request.id, num_tokens = request.prompt.len(), "request");
        self.metrics.request_prompt_tokens.observe(request.prompt.len() as f64);
        let sequence = self.make_sequence(request, sink);
        self.scheduler.add(Box::new(sequence));
    }

    /// Refuses what cannot run, and brings adapters into their order.
    fn check(&self, request: &mut GenerateRequest) -> Result<()> {
        request.adapters = in_order(std::mem::take(&mut request.adapters))?;
        if !request.adapters.iter().all(|applied| applied.adapter.store() == self.adapter_store) {
            return Err(invalid!("an adapter was loaded for another device; load it through this engine"));
        }
        self.check_room(request)?;
        let (len, most) = (request.prompt.len(), self.config.limits.max_model_len);
        let longest = if matches!(request.task, Task::Generate(_)) { most - 1 } else { most };
        if len == 0 || len > longest {
            return Err(invalid!("the prompt has {len} tokens, wanted 1 to {longest}"));
        }
        if matches!(request.task, Task::Deposit { is_durable: true, .. }) && !self.is_identified {
            return Err(Error::Exhausted("nothing can be kept: the vault is not open yet; try again".into()));
        }
        if request.erase_on_free && !self.scheduler.tiers().can_wipe() {
            return Err(invalid!("nothing can be zeroed by an engine without tiers; start it with one"));
        }
        check_pieces(request, most)?;
        let vocab_size = self.runner.model().config().vocab_size;
        let sources = request.pieces.iter().flat_map(|piece| &piece.source);
        match request.prompt.iter().chain(sources).find(|&&token| token as usize >= vocab_size) {
            Some(token) => Err(invalid!("prompt token {token} is outside the vocabulary of {vocab_size}")),
            None => Ok(()),
        }
    }

    /// Refuses what the pool can never hold together with its adapters.
    fn check_room(&self, request: &GenerateRequest) -> Result<()> {
        let SchedulerLimits { num_blocks, block_size, .. } = self.config.limits;
        let num_pages = num_pages_of(&request.adapters);
        let num_tokens = request.prompt.len() + usize::from(matches!(request.task, Task::Generate(_)));
        if num_pages > 0 && num_tokens.div_ceil(block_size) + num_pages > num_blocks {
            return Err(invalid!(
                "the adapters of this request take {num_pages} KV blocks and its {num_tokens} tokens {}; there are \
                 {num_blocks}; name fewer or smaller adapters, or give more --kv-cache-memory-bytes",
                num_tokens.div_ceil(block_size)
            ));
        }
        Ok(())
    }

    /// Tokens that a sequence under these adapters can come to: all of them have room at once.
    fn max_len_under(&self, adapters: &[AppliedAdapter]) -> usize {
        let SchedulerLimits { num_blocks, block_size, max_model_len, .. } = self.config.limits;
        max_model_len.min(num_blocks.saturating_sub(num_pages_of(adapters)) * block_size)
    }

    fn make_sequence(&self, request: GenerateRequest, sink: OutputSink) -> Sequence {
        let limits = &self.config.limits;
        let num_prompt_tokens = request.prompt.len();
        let merged = self.merger.form_of(&request.adapters);
        let identity = identity_under(&self.hash_identity, &request.adapters, merged.is_some());
        let (root, own) = self.chain_of(&request, &identity);
        let shared_tail = shared_tail(&request, limits.block_size);
        let max_len = self.max_len_under(&request.adapters);
        let num_blocks = limits.num_blocks.saturating_sub(num_pages_of(&request.adapters));
        let composition = self.compose(request.pieces, &identity, num_prompt_tokens, num_blocks);
        let (work, room) = match request.task {
            Task::Deposit { is_durable, kept_in } => {
                let kept_under = kept_in.map(|domain| BlockHash::root(&identity, domain.as_bytes()));
                (Work::Deposit { is_durable, kept_under }, 0)
            }
            Task::Embed => (Work::Embed { sum: vec![0.0; self.runner.model().config().hidden_size] }, 0),
            Task::Generate(mut params) => {
                params.max_tokens = params.max_tokens.min(max_len - num_prompt_tokens);
                let room = params.max_tokens;
                let fresh_seed = self.config.seed.wrapping_add(self.num_arrived);
                let eos_token_ids = &self.config.eos_token_ids;
                let generation = Generation::new(*params, &request.prompt, eos_token_ids, fresh_seed);
                (Work::Generate(Box::new(generation)), room)
            }
        };
        let mut tokens = request.prompt;
        tokens.reserve_exact(room);
        let max_blocks = (num_prompt_tokens + room).div_ceil(limits.block_size);
        let join = composition.as_ref().map_or(usize::MAX, |composition| composition.join());
        let mut sequence = Sequence {
            priority: request.priority,
            number: self.num_arrived,
            status: SequenceStatus::Waiting,
            tokens,
            num_prompt_tokens,
            num_computed_tokens: 0,
            num_cached_tokens: None,
            reuse: Reuse::default(),
            may_fetch: true,
            level: request.level,
            num_shared_blocks: request.shared_prefix.map_or(0, |shared| shared.num_tokens / limits.block_size),
            erase_on_free: request.erase_on_free,
            blocks: Vec::with_capacity(max_blocks),
            shared_tail,
            attached_tail: None,
            chain: HashChain::new(root, own, max_blocks)
                .provisional(!self.is_identified)
                .cut_at(join / limits.block_size),
            composition_key: (!request.adapters.is_empty()).then(|| CompositionKey::of(&request.adapters)),
            merged,
            adapters: request.adapters,
            holds_adapters: false,
            work,
            composition,
            sink,
            arrived_at: Instant::now(),
            scheduled_at: None,
            last_token_at: None,
        };
        sequence.begin_composition();
        sequence
    }

    /// What of a prompt is copied instead of computed, where so many blocks are there for it.
    fn compose(
        &self,
        pieces: Vec<Piece>,
        identity: &[u8],
        num_prompt_tokens: usize,
        num_blocks: usize,
    ) -> Option<Box<Composition>> {
        let block_size = self.config.limits.block_size;
        let chain_of = |domain: &str, max_blocks| {
            let root = BlockHash::root(identity, domain.as_bytes());
            HashChain::new(root, None, max_blocks).provisional(!self.is_identified)
        };
        Composition::new(pieces, num_prompt_tokens, block_size, num_blocks, chain_of)
    }

    /// Where the chain of a request's block hashes begins, and from which block on it leaves the domain of what it shares.
    fn chain_of(&self, request: &GenerateRequest, identity: &[u8]) -> (BlockHash, Option<(usize, String)>) {
        let shared = request.shared_prefix.as_ref().filter(|shared| shared.domain != request.domain);
        let first_domain = shared.map_or(&request.domain, |shared| &shared.domain);
        let round = if planted::is(Bug::SharedPrefixRoundedUp) { usize::div_ceil } else { usize::div_euclid };
        let num_shared = |num_tokens| round(num_tokens, self.config.limits.block_size);
        let own = shared.map(|shared| (num_shared(shared.num_tokens), request.domain.clone()));
        (BlockHash::root(identity, first_domain.as_bytes()), own)
    }
}

/// Blocks that adapters take beside tokens.
fn num_pages_of(adapters: &[AppliedAdapter]) -> usize {
    adapters.iter().map(|applied| applied.adapter.num_pages()).sum()
}

/// What a shared beginning has behind its last full block.
fn shared_tail(request: &GenerateRequest, block_size: usize) -> Option<SharedTail> {
    let num_shared = request.shared_prefix.as_ref()?.num_tokens;
    let (block, num_tokens) = (num_shared / block_size, num_shared % block_size);
    // What is moved into a prompt may lie in the same block.
    let is_plain = request.pieces.is_empty() && num_shared <= request.prompt.len();
    (num_tokens > 0 && is_plain).then_some(SharedTail { block, num_tokens })
}

/// Refuses pieces that are not parts of the prompt, in order.
fn check_pieces(request: &GenerateRequest, max_model_len: usize) -> Result<()> {
    let is_plain = |params: &SamplingParams| params.prompt_logprobs.is_none();
    if !request.pieces.is_empty() && !matches!(&request.task, Task::Generate(params) if is_plain(params)) {
        return Err(invalid!("a composed prompt can be continued; there are no prompt_logprobs or embeddings of it"));
    }
    let mut end = 0;
    for piece in &request.pieces {
        let Piece { start, num_tokens, source_start, .. } = *piece;
        let here = start.checked_add(num_tokens).and_then(|end| request.prompt.get(start..end));
        let there = source_start.checked_add(num_tokens).and_then(|end| piece.source.get(source_start..end));
        if start < end || here.is_none() || here != there || piece.source.len() > max_model_len {
            return Err(invalid!(
                "a piece of {num_tokens} tokens at {start} must follow the piece before it and have the tokens of its \
                 source, which are at most {max_model_len}"
            ));
        }
        end = start + num_tokens;
    }
    Ok(())
}
