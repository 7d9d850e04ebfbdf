//! What has to come out, predicted from token ids and cache domains alone: no code of the engine, and of the double only
//! the two functions that say what a payload is.

use std::collections::HashMap;

use mneme::backend::sim::{mix, rotated};
use mneme::engine::SharedPrefix;

use crate::support::tiny_model::VOCAB;

pub const NUM_LAYERS: usize = 2;

/// The double's model, sequence by sequence: every layer keeps, per position, what came in rotated to the position, and
/// hands on the fold of all of them up to there.
#[derive(Clone, Default)]
pub struct Oracle {
    folds: [u64; NUM_LAYERS],
    num_tokens: i64,
    /// What lies in the KV cache: per token one payload a layer.
    stored: Vec<[u64; NUM_LAYERS]>,
}

impl Oracle {
    /// Takes a token in and tells the one that follows.
    fn feed(&mut self, token: u32) -> u32 {
        let mut payload = mix(0, u64::from(token));
        let mut stored = [0; NUM_LAYERS];
        for (fold, stored) in self.folds.iter_mut().zip(&mut stored) {
            *stored = rotated(payload, self.num_tokens);
            *fold = mix(*fold, *stored);
            payload = *fold;
        }
        self.stored.push(stored);
        self.num_tokens += 1;
        (payload % VOCAB as u64) as u32
    }

    /// The greedy continuation of `prompt`.
    pub fn continuation(prompt: &[u32], num_tokens: usize) -> Vec<u32> {
        let mut oracle = Self::default();
        let mut next = prompt.iter().fold(0, |_, token| oracle.feed(*token));
        let mut output = vec![next];
        while output.len() < num_tokens {
            next = oracle.feed(next);
            output.push(next);
        }
        output
    }

    /// The KV of `tokens`.
    pub fn stored(tokens: &[u32]) -> Vec<[u64; NUM_LAYERS]> {
        let mut oracle = Self::default();
        tokens.iter().for_each(|token| {
            oracle.feed(*token);
        });
        oracle.stored
    }
}

/// What somebody asked for, as far as it decides which blocks may be shared.
#[derive(Clone)]
pub struct Asked {
    /// The prompt, and behind it what is going to be generated.
    pub tokens: Vec<u32>,
    pub num_prompt: usize,
    pub domain: String,
    pub shared: Option<SharedPrefix>,
}

impl Asked {
    pub fn prompt(&self) -> &[u32] {
        &self.tokens[..self.num_prompt]
    }
}

/// A block by who may find it and by what it holds: the domain that it begins in, where it leaves that for which other
/// one, and all tokens up to its end.
type BlockKey = (String, Option<(usize, String)>, Vec<u32>);

/// The rule of cache domains: who has asked for which block so far. A request finds blocks that somebody in the same
/// domains asked for, and no others.
pub struct Sharing {
    block_size: usize,
    num_asked: HashMap<BlockKey, usize>,
}

impl Sharing {
    pub fn new(block_size: usize) -> Self {
        Self { block_size, num_asked: HashMap::new() }
    }

    fn key(&self, asked: &Asked, block: usize) -> BlockKey {
        let tokens = asked.tokens[..(block + 1) * self.block_size].to_vec();
        match asked.shared.as_ref().filter(|shared| shared.domain != asked.domain) {
            None => (asked.domain.clone(), None, tokens),
            Some(SharedPrefix { num_tokens, domain }) => {
                let num_shared = num_tokens / self.block_size;
                (domain.clone(), (block >= num_shared).then(|| (num_shared, asked.domain.clone())), tokens)
            }
        }
    }

    /// Takes note of a request.
    pub fn note(&mut self, asked: &Asked) {
        for block in 0..asked.tokens.len() / self.block_size {
            *self.num_asked.entry(self.key(asked, block)).or_default() += 1;
        }
    }

    /// Prompt tokens that a request which has been noted may find at most: one is left to compute.
    pub fn most_cached(&self, asked: &Asked) -> usize {
        let num_shareable = (asked.num_prompt - 1) / self.block_size;
        let is_found = |block: &usize| self.num_asked.get(&self.key(asked, *block)).is_some_and(|count| *count > 1);
        (0..num_shareable).take_while(is_found).count() * self.block_size
    }
}
