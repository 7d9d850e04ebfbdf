//! What the engine is asked, and what it answers: plain data, no JSON and no blocks.

use std::sync::Arc;

use super::adapters::AppliedAdapter;
use crate::kv::{BlockHash, Level};
use crate::paging::{PinnedBlocks, Tier};
use crate::text::grammar::GrammarState;

/// The priority of what runs only while nothing else is there to be run.
pub const BACKGROUND: i32 = i32::MAX;

/// One sequence to run. A call that wants `n` completions submits `n` of these; they share their prompt's blocks.
pub struct GenerateRequest {
    /// The caller's name for it, for logs.
    pub id: String,
    /// Prompt tokens; never empty, shorter than the model's context.
    pub prompt: Vec<u32>,
    /// What to produce.
    pub task: Task,
    /// Lower runs first; equal priorities run in order of arrival. What has [`BACKGROUND`] waits for all others, and steps
    /// aside when one comes.
    pub priority: i32,
    /// The cache domain: only requests of the same one share blocks.
    pub domain: String,
    /// A beginning of the prompt whose blocks belong to another domain, which the caller may read.
    pub shared_prefix: Option<SharedPrefix>,
    /// How hard the blocks of its shared beginning, of the sources of its pieces, and all of a [`Task::Deposit`], are held on
    /// to in memory once nobody uses them; a deposit gets room on disk accordingly.
    pub level: Level,
    /// Whether its blocks, those that it shares included, are zeroed in memory as soon as nobody uses them; none is copied to
    /// a lower tier except by [`Task::Deposit`]. Only where there are tiers.
    pub erase_on_free: bool,
    /// Adapters that are added to the model, at most [`MAX_APPLIED`](super::MAX_APPLIED); none means the model alone.
    pub adapters: Vec<AppliedAdapter>,
    /// Parts of the prompt whose KV is taken from elsewhere, which changes the answer; in order, none over another. Only
    /// for [`Task::Generate`] without `prompt_logprobs`.
    pub pieces: Vec<Piece>,
}

/// A part of a prompt whose KV is not computed at its place: it is that of the same tokens in another context, with keys
/// rotated from there to here.
///
/// It is as if the source had been computed alone: where its blocks are not cached, they are computed and kept. What
/// follows the source's last full block is computed in the prompt.
///
/// Where some tokens are chosen, the layers below [`ModelConfig::probe_layer`](crate::models::ModelConfig::probe_layer) are
/// computed for all of the prompt up to the last piece with such tokens, and there the stored keys and values compared with
/// those of the whole prompt. A piece of which nothing is left to move is not asked for at all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Index in the prompt of its first token.
    pub start: usize,
    /// Tokens of it.
    pub num_tokens: usize,
    /// The tokens its KV is computed as, from position 0 on.
    pub source: Vec<u32>,
    /// Index in `source` of its first token.
    pub source_start: usize,
    /// The cache domain of the source's blocks, which the caller may read.
    pub domain: String,
    /// So many of its first tokens are computed in the prompt.
    pub num_recomputed: usize,
    /// Of the others, so many are computed in the prompt as well: those whose stored KV deviates most from what it would
    /// be there.
    pub num_chosen: usize,
}

/// A beginning of a prompt that others share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SharedPrefix {
    /// Tokens of it.
    pub num_tokens: usize,
    /// The domain of its full blocks.
    pub domain: String,
}

/// What has been kept for a [`Task::Deposit`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Deposited {
    /// Full blocks, in order of position.
    pub blocks: Vec<BlockHash>,
    /// The partial block behind them.
    pub tail: Option<BlockHash>,
    /// Tokens whose blocks were there before.
    pub restored_tokens: usize,
    /// Tokens that were computed.
    pub computed_tokens: usize,
    /// Keeps all of them on disk as long as somebody has it.
    pub pins: Option<Arc<PinnedBlocks>>,
}

/// What a request wants from the model.
pub enum Task {
    /// Sample tokens after the prompt.
    Generate(Box<SamplingParams>),
    /// The mean of the final hidden states of all prompt tokens.
    Embed,
    /// The prompt's KV on disk.
    Deposit {
        /// Whether it has to survive a crash before the answer comes.
        is_durable: bool,
        /// The cache domain under which it is kept, where that is not the request's own: found is what the request may
        /// find, and what is kept is found by those of this domain.
        kept_in: Option<String>,
    },
}

/// How to choose tokens. The defaults are greedy-free OpenAI defaults: temperature 1, nothing cut off.
#[derive(Clone)]
pub struct SamplingParams {
    /// 0 means greedy.
    pub temperature: f32,
    /// Keep the smallest set of tokens whose probabilities reach this; 1 keeps all.
    pub top_p: f32,
    /// Keep this many of the likeliest tokens; 0 keeps all.
    pub top_k: usize,
    /// Drop tokens less likely than this times the likeliest; 0 keeps all.
    pub min_p: f32,
    /// Locally typical sampling (arXiv 2202.00666): keep tokens whose information is nearest the entropy; 1 keeps all.
    pub typical_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or output (CTRL); 1 does nothing.
    pub repetition_penalty: f32,
    /// Subtracted once per occurrence in the output.
    pub frequency_penalty: f32,
    /// Subtracted once when the token occurs in the output.
    pub presence_penalty: f32,
    /// Added to logits; those of one token add up.
    pub logit_bias: Vec<(u32, f32)>,
    /// Makes sampling reproducible whatever else runs; `None` takes a fresh one.
    pub seed: Option<u64>,
    /// End the output; the token itself is not part of the text.
    pub stop_token_ids: Vec<u32>,
    /// Neither EOS nor a stop token may come before this many tokens.
    pub min_tokens: usize,
    /// Do not stop at EOS.
    pub ignore_eos: bool,
    /// At most this many tokens; the engine clamps it to the context.
    pub max_tokens: usize,
    /// Report log-probabilities of the chosen token and of this many best ones.
    pub logprobs: Option<usize>,
    /// The same for prompt tokens.
    pub prompt_logprobs: Option<usize>,
    /// When given, only these can be sampled.
    pub allowed_token_ids: Option<Vec<u32>>,
    /// Token runs that must not appear.
    pub bad_words: Vec<Vec<u32>>,
    /// Constrains the output; cloned per sequence.
    pub grammar: Option<GrammarState>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            typical_p: 1.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: None,
            stop_token_ids: Vec::new(),
            min_tokens: 0,
            ignore_eos: false,
            max_tokens: usize::MAX,
            logprobs: None,
            prompt_logprobs: None,
            allowed_token_ids: None,
            bad_words: Vec::new(),
            grammar: None,
        }
    }
}

/// What comes back, in order: `Started`, any number of `Token`s, one `Finished`; or `Embedding` or `Deposited`, `Finished`.
#[derive(Debug, Clone)]
pub enum OutputEvent {
    /// The prompt has been computed.
    Started {
        /// Prompt tokens whose KV was not computed for this request.
        cached_tokens: usize,
        /// Where it came from.
        reuse: Reuse,
        /// One entry per prompt token, the first `None`; empty unless asked for.
        prompt_logprobs: Vec<Option<TokenLogprobs>>,
    },
    /// The next output token.
    Token {
        /// Its id.
        id: u32,
        /// Present when asked for.
        logprobs: Option<Box<TokenLogprobs>>,
    },
    /// Mean-pooled hidden state, not normalised; `[hidden_size]`.
    Embedding(Vec<f32>),
    /// The blocks of a prompt are kept.
    Deposited(Box<Deposited>),
    /// Nothing follows.
    Finished(FinishReason),
}

/// Where the KV of a request's prompt came from, and what was decided about lower tiers.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Reuse {
    /// Tokens found on the device.
    pub device_tokens: usize,
    /// Tokens brought up from the host's memory.
    pub host_tokens: usize,
    /// Tokens brought up from disk.
    pub disk_tokens: usize,
    /// Of the prompt's tokens, those whose KV was computed in another context and moved here.
    pub linked_tokens: usize,
    /// Of the prompt's tokens, those that were moved here too and computed because they deviated most.
    pub chosen_tokens: usize,
    /// Milliseconds the request waited for them.
    pub fetch_ms: f64,
    /// What became of the question.
    pub decision: FetchDecision,
    /// Whether all of it, and what follows, is computed with the request's adapters merged into the weights.
    pub is_merged: bool,
}

/// Whether blocks in lower tiers were taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum FetchDecision {
    /// There was nothing to take there.
    #[default]
    NothingBelow,
    /// They were brought up.
    Fetched,
    /// They were used layer by layer while they came up.
    Attached,
    /// They would have taken longer than computing, by the rates measured so far.
    RecomputeIsCheaper,
    /// They did not arrive in time.
    Late,
    /// Some were damaged or gone.
    Lost,
}

impl Reuse {
    /// Adds what another prompt of the same call reused; the decision is the last one that was one.
    pub fn add(&mut self, other: &Self) {
        self.device_tokens += other.device_tokens;
        self.host_tokens += other.host_tokens;
        self.disk_tokens += other.disk_tokens;
        self.linked_tokens += other.linked_tokens;
        self.chosen_tokens += other.chosen_tokens;
        self.fetch_ms += other.fetch_ms;
        self.is_merged |= other.is_merged;
        if other.decision != FetchDecision::NothingBelow {
            self.decision = other.decision;
        }
    }

    /// Takes note of `num_tokens` tokens that were found in `tier`.
    pub(super) fn count(&mut self, tier: Tier, num_tokens: usize) {
        match tier {
            Tier::Device => self.device_tokens += num_tokens,
            Tier::Host => self.host_tokens += num_tokens,
            Tier::Disk => self.disk_tokens += num_tokens,
        }
    }
}

/// Log-probabilities at one position, from the model's own logits (before penalties and temperature).
#[derive(Debug, Clone)]
pub struct TokenLogprobs {
    /// Of the token that is there.
    pub chosen: TokenLogprob,
    /// The likeliest tokens, best first.
    pub top: Vec<TokenLogprob>,
}

/// A token, its natural-log probability and its place in the order (1 is the likeliest).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenLogprob {
    /// Token id.
    pub id: u32,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// 1 + the number of likelier tokens.
    pub rank: u32,
}

/// Why an output ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FinishReason {
    /// EOS, a finished grammar, or the stop token given.
    Stop {
        /// The token of `stop_token_ids` that ended it; `None` for EOS and grammars.
        token: Option<u32>,
    },
    /// `max_tokens` or the context is used up.
    Length,
    /// The caller went away or the engine is shutting down.
    Abort,
    /// The engine could not go on with it.
    Error(String),
}
