//! What has to come out, predicted from token ids, adapters and pieces alone: no code of the engine, and of the double
//! only the functions that say what a payload is and how far one is from another. Who may find which block is
//! `sharing.rs`'s.

use mneme::backend::sim::{MERGED, deviation, mix, rotated};
use mneme::engine::{Piece, SchedulerLimits};

use super::sharing::Asked;
use crate::support::tiny_model::VOCAB;

pub const NUM_LAYERS: usize = 2;

/// Where moved tokens are compared with those of the whole prompt.
const PROBE_LAYER: usize = 1;

/// Products of a layer that adapters change.
pub const NUM_PRODUCTS: usize = 4;

/// What an adapter is to the double: a tag per layer and product.
pub type Tags = [[Option<u64>; NUM_PRODUCTS]; NUM_LAYERS];

/// An adapter, and the bits of its scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Update {
    pub tags: Tags,
    pub scale: u32,
}

/// The double's model, sequence by sequence: every layer keeps, per position, what came in rotated to the position, and
/// hands on the fold of all of them up to there. Adapters leave their tags on the way.
#[derive(Clone, Default)]
pub struct Oracle {
    /// In order of application.
    adapters: Vec<Update>,
    /// Whether they are merged into the weights.
    is_merged: bool,
    folds: [u64; NUM_LAYERS],
    num_tokens: i64,
    /// What lies in the KV cache: per token one payload a layer.
    stored: Vec<[u64; NUM_LAYERS]>,
}

impl Oracle {
    fn under(asked: &Asked) -> Self {
        Self { adapters: asked.adapters.clone(), is_merged: asked.is_merged, ..Self::default() }
    }

    fn adapted(&self, payload: u64, layer: usize, product: usize) -> u64 {
        let updates = self.adapters.iter().filter_map(|update| Some((update.tags[layer][product]?, update.scale)));
        let mut updates = updates.peekable();
        let is_copied = self.is_merged && updates.peek().is_some();
        let added = updates.fold(payload, |payload, (tag, scale)| mix(payload, mix(tag, u64::from(scale))));
        if is_copied { mix(added, MERGED) } else { added }
    }

    /// Takes a token in and tells the one that follows.
    fn feed(&mut self, token: u32) -> u32 {
        let mut payload = mix(0, u64::from(token));
        let mut stored = [0; NUM_LAYERS];
        for (layer, stored) in stored.iter_mut().enumerate() {
            *stored = rotated(self.adapted(payload, layer, 0), self.num_tokens);
            self.folds[layer] = mix(self.folds[layer], *stored);
            payload =
                (1..NUM_PRODUCTS).fold(self.folds[layer], |payload, product| self.adapted(payload, layer, product));
        }
        self.stored.push(stored);
        self.num_tokens += 1;
        (payload % VOCAB as u64) as u32
    }

    /// Takes in what is stored of a token so many positions before here; nothing is said about what follows it.
    fn take(&mut self, stored: [u64; NUM_LAYERS], distance: i64) {
        let stored = stored.map(|stored| rotated(stored, distance));
        for (fold, stored) in self.folds.iter_mut().zip(stored) {
            *fold = mix(*fold, stored);
        }
        self.stored.push(stored);
        self.num_tokens += 1;
    }

    fn feed_all(&mut self, tokens: &[u32]) -> u32 {
        tokens.iter().fold(0, |_, token| self.feed(*token))
    }

    /// The greedy continuation of what somebody asked. What is kept of the sources of pieces is as if they had been
    /// computed alone, under the same adapters.
    pub fn answer(asked: &Asked, limits: &SchedulerLimits, num_tokens: usize) -> Vec<u32> {
        let mut moved = vec![None; asked.num_prompt];
        let mut whole = Self::under(asked);
        whole.feed_all(asked.prompt());
        for (piece, mut places) in asked.pieces.iter().zip(moves(asked, limits)) {
            let mut source = Self::under(asked);
            source.feed_all(&piece.source);
            let kept = |moved: &Moved| (source.stored[moved.there], moved.here as i64 - moved.there as i64);
            let deviates = |moved: &Moved| {
                let (stored, distance) = kept(moved);
                deviation(whole.stored[moved.here][PROBE_LAYER], rotated(stored[PROBE_LAYER], distance))
            };
            places.sort_by(|a, b| deviates(b).total_cmp(&deviates(a)).then(a.here.cmp(&b.here)));
            for found in places.iter().skip(piece.num_chosen) {
                moved[found.here] = Some(kept(found));
            }
        }
        let mut oracle = Self::under(asked);
        let mut next = 0;
        for (token, moved) in asked.prompt().iter().zip(moved) {
            match moved {
                Some((stored, distance)) => oracle.take(stored, distance),
                None => next = oracle.feed(*token),
            }
        }
        oracle.go_on(next, num_tokens)
    }

    /// The greedy continuation of `prompt`, without adapters and pieces.
    pub fn continuation(prompt: &[u32], num_tokens: usize) -> Vec<u32> {
        let mut oracle = Self::default();
        let next = oracle.feed_all(prompt);
        oracle.go_on(next, num_tokens)
    }

    fn go_on(mut self, mut next: u32, num_tokens: usize) -> Vec<u32> {
        let mut output = vec![next];
        while output.len() < num_tokens {
            next = self.feed(next);
            output.push(next);
        }
        output
    }

    /// The KV of `tokens`, without adapters.
    pub fn stored(tokens: &[u32]) -> Vec<[u64; NUM_LAYERS]> {
        let mut oracle = Self::default();
        oracle.feed_all(tokens);
        oracle.stored
    }
}

/// A token's way from its piece's source into a prompt.
pub struct Moved {
    pub here: usize,
    pub there: usize,
}

/// What of each piece is moved: all that lies in full blocks, but for the first tokens of the piece, the prompt's last one,
/// pieces of which all that would be moved is computed after all, and pieces whose blocks have no room beside the prompt's
/// and adapters.
/// Chosen tokens are moved first, and then computed.
pub fn moves(asked: &Asked, limits: &SchedulerLimits) -> Vec<Vec<Moved>> {
    let mut num_blocks = asked.num_prompt.div_ceil(limits.block_size);
    let fitting = |piece: &Piece| {
        let moves = wanted_moves(piece, asked.num_prompt, limits.block_size);
        let num_wanted = num_source_blocks(&moves, limits.block_size);
        if num_blocks + num_wanted + asked.num_pages > limits.num_blocks {
            return vec![];
        }
        num_blocks += num_wanted;
        moves
    };
    asked.pieces.iter().map(fitting).collect()
}

fn wanted_moves(piece: &Piece, num_prompt: usize, block_size: usize) -> Vec<Moved> {
    let num_stored = piece.source.len() / block_size * block_size;
    let moves: Vec<Moved> = (piece.num_recomputed..piece.num_tokens)
        .map(|at| Moved { here: piece.start + at, there: piece.source_start + at })
        .filter(|moved| moved.here + 1 < num_prompt && moved.there < num_stored)
        .collect();
    if piece.num_chosen < moves.len() { moves } else { vec![] }
}

/// Blocks of a source up to the last one that something is moved from.
pub fn num_source_blocks(moves: &[Moved], block_size: usize) -> usize {
    moves.last().map_or(0, |moved| moved.there / block_size + 1)
}
