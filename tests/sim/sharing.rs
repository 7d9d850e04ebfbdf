//! Who may find which block, predicted from what was asked so far: requests share blocks within a domain and under the
//! same adapters, and where a prompt is composed no longer than up to the first token that is moved there.

use std::collections::{HashMap, HashSet};

use mneme::engine::{Piece, SchedulerLimits, SharedPrefix};

use super::oracle::{Update, moves, num_source_blocks};

/// What somebody asked for, as far as it decides what comes out and which blocks may be shared.
#[derive(Clone, Default)]
pub struct Asked {
    /// The prompt, and behind it what is going to be generated.
    pub tokens: Vec<u32>,
    pub num_prompt: usize,
    pub domain: String,
    pub shared: Option<SharedPrefix>,
    /// In order of application.
    pub adapters: Vec<Update>,
    /// Blocks that they take.
    pub num_pages: usize,
    /// Whether the adapters are merged into the weights it is computed with.
    pub is_merged: bool,
    pub pieces: Vec<Piece>,
}

impl Asked {
    pub fn prompt(&self) -> &[u32] {
        &self.tokens[..self.num_prompt]
    }

    /// What the source of a piece is computed as: a prompt of its own.
    fn source(&self, piece: &Piece) -> Self {
        Self {
            tokens: piece.source.clone(),
            num_prompt: piece.source.len(),
            domain: piece.domain.clone(),
            adapters: self.adapters.clone(),
            is_merged: self.is_merged,
            ..Self::default()
        }
    }
}

/// A block by who may find it and by what it holds: the adapters it is computed under and their form, the domain that it begins in, where
/// it leaves that for which other one, and all tokens up to its end.
type BlockKey = ((Vec<Update>, bool), String, Option<(usize, String)>, Vec<u32>);

/// The rule of cache domains and adapters: who has asked for which block so far. A request finds blocks that somebody in
/// the same domains and under the same adapters asked for, and no others.
pub struct Sharing {
    limits: SchedulerLimits,
    num_asked: HashMap<BlockKey, usize>,
    /// Deposits that do not end with a full block, by domain: who names one may copy its end.
    tails: HashSet<(String, Vec<u32>)>,
}

impl Sharing {
    pub fn new(limits: SchedulerLimits) -> Self {
        Self { limits, num_asked: HashMap::new(), tails: HashSet::new() }
    }

    fn key(&self, asked: &Asked, block: usize) -> BlockKey {
        let block_size = self.limits.block_size;
        let tokens = asked.tokens[..(block + 1) * block_size].to_vec();
        let adapters = (asked.adapters.clone(), asked.is_merged);
        match asked.shared.as_ref().filter(|shared| shared.domain != asked.domain) {
            None => (adapters, asked.domain.clone(), None, tokens),
            Some(SharedPrefix { num_tokens, domain }) => {
                let num_shared = num_tokens / block_size;
                let own = (block >= num_shared).then(|| (num_shared, asked.domain.clone()));
                (adapters, domain.clone(), own, tokens)
            }
        }
    }

    fn note_blocks(&mut self, asked: &Asked, num_blocks: usize) {
        for block in 0..num_blocks {
            *self.num_asked.entry(self.key(asked, block)).or_default() += 1;
        }
    }

    /// Takes note of a request: of what its pieces are computed as, and of its prompt up to what is moved there.
    pub fn note(&mut self, asked: &Asked) {
        let block_size = self.limits.block_size;
        for (piece, moves) in asked.pieces.iter().zip(moves(asked, &self.limits)) {
            self.note_blocks(&asked.source(piece), num_source_blocks(&moves, block_size));
        }
        self.note_blocks(asked, self.join(asked).min(asked.tokens.len()) / block_size);
    }

    /// Takes note of what a deposit is kept as.
    pub fn note_kept(&mut self, kept: &Asked) {
        let is_of_one_domain = kept.shared.as_ref().is_none_or(|shared| shared.domain == kept.domain);
        if is_of_one_domain && !kept.num_prompt.is_multiple_of(self.limits.block_size) {
            self.tails.insert((kept.domain.clone(), kept.prompt().to_vec()));
        }
    }

    /// Tokens of a shared beginning behind its last full block that a request may copy, when it has found so many blocks.
    fn num_tail_tokens(&self, asked: &Asked, num_found: usize) -> usize {
        let Some(SharedPrefix { num_tokens, domain }) = &asked.shared else { return 0 };
        let is_alone = asked.adapters.is_empty() && asked.pieces.is_empty();
        let is_kept = is_alone && self.tails.contains(&(domain.clone(), asked.tokens[..*num_tokens].to_vec()));
        if !is_kept || num_tokens / self.limits.block_size != num_found {
            return 0;
        }
        let start = num_found * self.limits.block_size;
        (num_tokens - start).min(asked.num_prompt - 1 - start)
    }

    /// Where the first moved token goes; behind it nothing is what others compute.
    fn join(&self, asked: &Asked) -> usize {
        moves(asked, &self.limits).iter().flatten().map(|moved| moved.here).next().unwrap_or(usize::MAX)
    }

    /// Prompt tokens that a request has moved there, and that stay.
    pub fn num_moved(&self, asked: &Asked) -> usize {
        moves(asked, &self.limits).iter().map(Vec::len).sum::<usize>() - self.num_chosen(asked)
    }

    /// Prompt tokens that a request has moved there and computed all the same.
    pub fn num_chosen(&self, asked: &Asked) -> usize {
        let moves = moves(asked, &self.limits);
        let blended = asked.pieces.iter().zip(&moves).filter(|(_, moves)| !moves.is_empty());
        blended.map(|(piece, _)| piece.num_chosen).sum()
    }

    /// Prompt tokens that a request which has been noted may find at most: one is left to compute. What is moved may be
    /// found in any case: who begins again finds the sources that it computed itself.
    pub fn most_cached(&self, asked: &Asked) -> usize {
        let num_shareable = (asked.num_prompt - 1).min(self.join(asked)) / self.limits.block_size;
        let is_found = |block: &usize| self.num_asked.get(&self.key(asked, *block)).is_some_and(|count| *count > 1);
        let num_found = (0..num_shareable).take_while(is_found).count();
        let num_behind = self.num_tail_tokens(asked, num_found);
        num_found * self.limits.block_size + num_behind + self.num_moved(asked)
    }
}
