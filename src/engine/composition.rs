//! Prompts composed of texts whose KV was computed elsewhere: what is moved into a prompt, and how a sequence gets there.
//!
//! A composed sequence runs in stages. In all but the last one it is an ordinary sequence over the tokens that a piece's
//! KV is computed as: it takes their blocks from whatever tier has them, or computes and publishes them, and holds them.
//! In the last one it is over its prompt: all that is kept of its pieces is copied to its new place before the first
//! step, the pieces' blocks are given back, and the rest is computed. Where some of what was copied is to be computed too,
//! because it deviates, the tokens go through the lowest layers before (`probe.rs`). So its answer is a function of the
//! request: it does not depend on what was cached, on how steps were cut, or on preemption, after which it begins again.

use std::ops::Range;

use super::probe::{Candidates, Probe};
use super::request::Piece;
use super::sequence::{HashChain, Sequence, Work};
use crate::kv::{BlockId, BlockTable};
use crate::paging::Tier;

/// What a sequence is about in one stage.
pub(super) struct Stage {
    pub(super) tokens: Vec<u32>,
    pub(super) num_prompt_tokens: usize,
    pub(super) num_computed_tokens: usize,
    pub(super) blocks: BlockTable,
    pub(super) chain: HashChain,
    pub(super) work: Work,
}

/// The stored tokens of a piece that are used.
struct Source {
    /// The piece's own stage; while it is the current one, the prompt's.
    stage: Stage,
    /// Their places where they are stored.
    stored: Range<usize>,
    /// Where the first of them goes.
    target: usize,
    /// How many of them are computed, once it is known which.
    num_chosen: usize,
}

/// Stored tokens that were not computed for this request, by their places in the prompt.
struct Found {
    places: Range<usize>,
    tier: Tier,
}

/// One token's way to its new place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Move {
    pub(super) source_slot: usize,
    pub(super) target_slot: usize,
    pub(super) position_delta: i64,
}

/// What is moved into a prompt.
pub(super) struct Composition {
    sources: Vec<Source>,
    /// Which source is being prepared; behind the last one comes the prompt.
    current: usize,
    /// Places in the prompt that stored tokens fill, ascending, never next to the prompt's end.
    gathered: Vec<Range<usize>>,
    is_gathered: bool,
    /// Which of these are computed after all, where some are.
    probe: Option<Probe>,
    /// Whether they have been taken out of `gathered`.
    is_decided: bool,
    /// Those of all sources and of the prompt.
    num_wanted_blocks: usize,
    /// Whether it had to start again after its first source.
    is_restarted: bool,
    /// A block each.
    found: Vec<Found>,
}

impl Composition {
    /// What `pieces` give a prompt of `prompt_len` tokens, and nothing if that is nothing. The prompt and the blocks of
    /// all pieces are held at once, so pieces that `num_blocks` have no room for are left out: they are computed.
    /// `chain_of` begins the chain of a domain, with room for so many blocks.
    pub(super) fn new(
        pieces: Vec<Piece>,
        prompt_len: usize,
        block_size: usize,
        num_blocks: usize,
        chain_of: impl Fn(&str, usize) -> HashChain,
    ) -> Option<Box<Self>> {
        let mut num_held = prompt_len.div_ceil(block_size);
        let mut sources = Vec::with_capacity(pieces.len());
        for mut piece in pieces {
            let (num_kept, stored) = kept(&piece, prompt_len, block_size);
            if stored.is_empty() || num_held + num_kept > num_blocks {
                continue;
            }
            num_held += num_kept;
            piece.source.truncate(num_kept * block_size);
            let target = piece.start + (stored.start - piece.source_start);
            sources.push(Source {
                stage: Stage {
                    num_prompt_tokens: piece.source.len(),
                    tokens: piece.source,
                    num_computed_tokens: 0,
                    blocks: Vec::with_capacity(num_kept),
                    chain: chain_of(&piece.domain, num_kept),
                    work: Work::Source,
                },
                stored,
                target,
                num_chosen: piece.num_chosen,
            });
        }
        if sources.is_empty() {
            return None;
        }
        let probe = Probe::new(sources.iter().map(Source::candidates).collect());
        Some(Box::new(Self {
            current: 0,
            gathered: sources.iter().map(Source::places).collect(),
            is_gathered: false,
            is_decided: probe.is_none(),
            probe,
            num_wanted_blocks: num_held,
            is_restarted: false,
            found: Vec::with_capacity(num_held - prompt_len.div_ceil(block_size)),
            sources,
        }))
    }

    /// Where the first stored token goes: from there on nothing is what computing every token would give.
    pub(super) fn join(&self) -> usize {
        self.gathered.first().map_or(usize::MAX, |range| range.start)
    }

    /// Blocks that are held beside those of the current stage.
    pub(super) fn num_held_blocks(&self) -> usize {
        self.sources.iter().map(|source| source.stage.blocks.len()).sum()
    }

    /// Blocks that all sources and the prompt take together, until the stored tokens are copied.
    fn num_wanted_blocks(&self) -> Option<usize> {
        (!self.is_gathered).then_some(self.num_wanted_blocks)
    }

    /// Takes one of these blocks out, the first of the last piece first, so that it is the last one to be forgotten.
    pub(super) fn pop_held_block(&mut self) -> Option<BlockId> {
        self.sources.iter_mut().rev().find_map(|source| source.stage.blocks.pop())
    }

    /// Whether the prompt is the current stage, and its stored tokens have yet to be copied.
    pub(super) fn wants_gather(&self) -> bool {
        self.current == self.sources.len() && !self.is_gathered
    }

    /// Takes note that they have been; the blocks they came from are not needed any more.
    pub(super) fn set_gathered(&mut self) {
        self.is_gathered = true;
    }

    /// Whether blocks that are given back are to be saved: once. The copies hold blocks for a while, and the want of
    /// these could make it start again, for ever.
    pub(super) fn wants_saves(&self) -> bool {
        !self.is_restarted
    }

    /// Places in the prompt that are not computed.
    fn gathered(&self) -> &[Range<usize>] {
        if self.current == self.sources.len() { &self.gathered } else { &[] }
    }

    pub(super) fn num_gathered_tokens(&self) -> usize {
        self.gathered.iter().map(Range::len).sum()
    }

    /// Tokens that were moved, and are computed because they deviated most.
    pub(super) fn num_chosen_tokens(&self) -> usize {
        self.sources.iter().map(|source| source.stored.len()).sum::<usize>() - self.num_gathered_tokens()
    }

    /// Takes note that the tokens at `stored` in the current source were found in `tier`.
    pub(super) fn count_reuse(&mut self, tier: Tier, stored: Range<usize>) {
        let Some(source) = self.sources.get(self.current) else { return };
        let used = stored.start.max(source.stored.start)..stored.end.min(source.stored.end);
        if !used.is_empty() {
            let place = |at: usize| at - source.stored.start + source.target;
            self.found.push(Found { places: place(used.start)..place(used.end), tier });
        }
    }

    /// Of the gathered tokens, those whose KV was found somewhere.
    pub(super) fn reused_tokens(&self) -> impl Iterator<Item = (Tier, usize)> {
        self.found.iter().map(|found| {
            let gathered = following(&self.gathered, found.places.start).iter();
            let gathered = gathered.take_while(|range| range.start < found.places.end);
            (found.tier, gathered.map(|range| overlap(range, &found.places)).sum())
        })
    }

    /// What the lowest layers have to be asked before it is known what is computed; nothing before the prompt is the
    /// current stage.
    fn pending_probe(&self) -> Option<&Probe> {
        self.probe.as_ref().filter(|_| self.current == self.sources.len() && !self.is_decided)
    }

    /// Takes note of how far the tokens from place `first` on are from the moved ones. Behind the last of them the places
    /// to compute are known.
    fn take_deviations(&mut self, first: usize, deviations: &[f32]) {
        if let Some(probe) = &mut self.probe
            && probe.take(first, deviations)
        {
            self.gathered = probe.kept();
            self.is_decided = true;
        }
    }

    /// The ways of all stored tokens into the blocks of the prompt.
    fn moves<'a>(&'a self, blocks: &'a [BlockId], block_size: usize) -> impl Iterator<Item = Move> + 'a {
        let slot = move |blocks: &[BlockId], at: usize| blocks[at / block_size].index() * block_size + at % block_size;
        self.sources.iter().flat_map(move |source| {
            source.stored.clone().zip(source.target..).map(move |(stored, target)| Move {
                source_slot: slot(&source.stage.blocks, stored),
                target_slot: slot(blocks, target),
                position_delta: target as i64 - stored as i64,
            })
        })
    }
}

impl Source {
    /// Where its stored tokens go.
    fn places(&self) -> Range<usize> {
        self.target..self.target + self.stored.len()
    }

    fn candidates(&self) -> Candidates {
        Candidates { places: self.places(), num_chosen: self.num_chosen }
    }
}

/// The ranges from the first one on that ends behind `place`.
fn following(ranges: &[Range<usize>], place: usize) -> &[Range<usize>] {
    &ranges[ranges.partition_point(|range| range.end <= place)..]
}

/// How many blocks of a piece's source are wanted, and which of their tokens: none when all of them are to be computed. The
/// last token of a prompt is computed in any case, for its logits; what follows the source's last full block is as well.
fn kept(piece: &Piece, prompt_len: usize, block_size: usize) -> (usize, Range<usize>) {
    let first = piece.source_start + piece.num_recomputed.min(piece.num_tokens);
    let num_tokens = piece.num_tokens.min((prompt_len - 1).saturating_sub(piece.start));
    let end = piece.source_start + num_tokens;
    let num_blocks = end.div_ceil(block_size).min(piece.source.len() / block_size);
    let stored = first..end.min(num_blocks * block_size);
    (num_blocks, if piece.num_chosen < stored.len() { stored } else { first..first })
}

fn overlap(a: &Range<usize>, b: &Range<usize>) -> usize {
    a.end.min(b.end).saturating_sub(a.start.max(b.start))
}

impl Sequence {
    /// Begins with the first piece, when there is one.
    pub(super) fn begin_composition(&mut self) {
        if self.composition.is_some() {
            self.exchange_stage();
        }
    }

    /// Goes on with the next piece, and behind the last one with the prompt. Blocks of this stage stay held.
    pub(super) fn enter_next_stage(&mut self) {
        self.exchange_stage();
        if let Some(composition) = &mut self.composition {
            composition.current += 1;
        }
        self.exchange_stage();
    }

    /// Goes back to the first piece; no block is held.
    pub(super) fn restart_composition(&mut self) {
        self.exchange_stage();
        if let Some(composition) = &mut self.composition {
            composition.is_restarted |= composition.current > 0;
            composition.current = 0;
            composition.is_gathered = false;
            composition.found.clear();
            if let Some(probe) = &mut composition.probe {
                probe.reset();
                composition.is_decided = false;
                composition.gathered.clear();
                composition.gathered.extend(composition.sources.iter().map(Source::places));
            }
            for Source { stage, .. } in &mut composition.sources {
                stage.num_computed_tokens = 0;
                stage.chain.num_published = 0;
                stage.chain.num_promised = 0;
            }
        }
        self.num_computed_tokens = 0;
        self.exchange_stage();
    }

    /// The current stage and the prompt change places, unless they are the same.
    fn exchange_stage(&mut self) {
        let Some(composition) = &mut self.composition else { return };
        let Some(Source { stage, .. }) = composition.sources.get_mut(composition.current) else { return };
        std::mem::swap(&mut self.tokens, &mut stage.tokens);
        std::mem::swap(&mut self.num_prompt_tokens, &mut stage.num_prompt_tokens);
        std::mem::swap(&mut self.num_computed_tokens, &mut stage.num_computed_tokens);
        std::mem::swap(&mut self.blocks, &mut stage.blocks);
        std::mem::swap(&mut self.chain, &mut stage.chain);
        std::mem::swap(&mut self.work, &mut stage.work);
    }

    /// Blocks that it takes, at the most, before it gives some back or outgrows what it was admitted with.
    pub(super) fn num_missing_blocks(&self, block_size: usize) -> usize {
        match self.composition.as_ref().and_then(|composition| composition.num_wanted_blocks()) {
            Some(num_wanted) => num_wanted.saturating_sub(self.num_held_blocks()),
            None => self.tokens.len().div_ceil(block_size) - self.blocks.len(),
        }
    }

    /// Blocks that are kept free for it, because it has some already and cannot go on without the others.
    pub(super) fn num_reserved_blocks(&self, block_size: usize) -> usize {
        let is_composing = self.composition.as_ref().is_some_and(|composition| !composition.is_gathered);
        if is_composing && self.num_held_blocks() > 0 { self.num_missing_blocks(block_size) } else { 0 }
    }

    /// Places from `first` on among its tokens that stored ones fill, the first range possibly from before.
    pub(super) fn gathered_from(&self, first: usize) -> &[Range<usize>] {
        self.composition.as_ref().map_or(&[], |composition| following(composition.gathered(), first))
    }

    /// Whether a stored token fills place `at`.
    pub(super) fn is_gathered(&self, at: usize) -> bool {
        self.gathered_from(at).first().is_some_and(|range| range.start <= at)
    }

    /// The places that the lowest layers have to be asked about before its next tokens are computed, in any number of
    /// steps. What was computed before deviates by nothing.
    pub(super) fn unprobed(&self) -> Option<Range<usize>> {
        let probe = self.composition.as_ref()?.pending_probe()?;
        Some(probe.unknown(self.num_computed_tokens))
    }

    /// Takes note of the deviations of the first places of these.
    pub(super) fn take_deviations(&mut self, deviations: &[f32]) {
        let first = self.unprobed().map_or(0, |places| places.start);
        if let Some(composition) = &mut self.composition {
            composition.take_deviations(first, deviations);
        }
        self.count_cached();
    }

    /// What has to be copied before its next step.
    pub(super) fn pending_moves(&self, block_size: usize) -> Option<impl Iterator<Item = Move>> {
        let composition = self.composition.as_ref().filter(|composition| composition.wants_gather())?;
        Some(composition.moves(&self.blocks, block_size))
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // one range is what is wanted
mod tests {
    use super::*;
    use crate::kv::BlockHash;

    fn piece(start: usize, num_tokens: usize, head: usize, num_recomputed: usize) -> Piece {
        let source = vec![7; head + num_tokens];
        Piece { start, num_tokens, source, source_start: head, domain: String::new(), num_recomputed, num_chosen: 0 }
    }

    fn blended(piece: Piece, num_chosen: usize) -> Piece {
        Piece { num_chosen, ..piece }
    }

    fn compose(pieces: Vec<Piece>, prompt_len: usize, num_blocks: usize) -> Option<Box<Composition>> {
        let chain_of =
            |domain: &str, max_blocks| HashChain::new(BlockHash::root(b"model", domain.as_bytes()), None, max_blocks);
        Composition::new(pieces, prompt_len, 16, num_blocks, chain_of)
    }

    #[test]
    fn full_blocks_behind_the_recomputed_tokens_are_moved() {
        // 33 stored tokens: two full blocks, one token behind them.
        let composition = compose(vec![piece(10, 32, 1, 4)], 100, 100).unwrap();
        assert_eq!(composition.gathered, [14..41]);
        assert_eq!(composition.sources[0].stored, 5..32);
        assert_eq!(composition.join(), 14);
        // A source that goes on behind the piece has its last block full.
        let longer = Piece { source: vec![7; 48], ..piece(10, 32, 1, 4) };
        assert_eq!(compose(vec![longer], 100, 100).unwrap().gathered, [14..42]);
        // The last token of the prompt is computed.
        assert_eq!(compose(vec![piece(10, 47, 1, 0)], 57, 100).unwrap().gathered, [10..56]);
    }

    #[test]
    fn what_deviates_most_is_not_kept() {
        // 32 stored tokens of each, the first at places 10 and 50.
        let pieces = vec![blended(piece(10, 32, 0, 0), 2), piece(50, 32, 0, 0)];
        let mut composition = compose(pieces, 100, 100).unwrap();
        for (tier, stored) in [(Tier::Device, 0..16), (Tier::Disk, 16..32)] {
            composition.count_reuse(tier, stored);
        }
        composition.current = 2;
        assert_eq!(composition.pending_probe().unwrap().unknown(0), 0..42);
        let deviations: Vec<f32> = (0..42).map(|at| if at == 12 || at == 30 { 2.0 } else { 1.0 }).collect();
        composition.take_deviations(0, &deviations[..20]);
        assert_eq!(composition.gathered(), [10..42, 50..82], "it is not known yet");
        composition.take_deviations(20, &deviations[20..]);
        assert_eq!(composition.gathered(), [10..12, 13..30, 31..42, 50..82]);
        assert!(composition.pending_probe().is_none());
        assert_eq!((composition.num_gathered_tokens(), composition.num_chosen_tokens()), (62, 2));
        assert_eq!(composition.reused_tokens().collect::<Vec<_>>(), [(Tier::Device, 15), (Tier::Disk, 15)]);
    }

    #[test]
    fn a_piece_of_which_everything_is_chosen_is_left_out() {
        assert!(compose(vec![blended(piece(10, 32, 0, 0), 32)], 100, 100).is_none());
        assert!(compose(vec![blended(piece(10, 32, 0, 0), 31)], 100, 100).is_some());
        // None chosen: nobody has to be asked.
        let mut composition = compose(vec![piece(10, 32, 0, 0)], 100, 100).unwrap();
        composition.current = 1;
        assert!(composition.pending_probe().is_none());
    }

    #[test]
    fn pieces_that_give_nothing_or_have_no_room_are_left_out() {
        assert!(compose(vec![], 100, 100).is_none());
        assert!(compose(vec![piece(0, 32, 0, 32)], 100, 100).is_none(), "all recomputed");
        assert!(compose(vec![piece(0, 14, 1, 0)], 100, 100).is_none(), "no full block");
        // The prompt takes seven blocks, each piece two.
        let two = || vec![piece(1, 31, 1, 0), piece(40, 31, 1, 0)];
        assert_eq!(compose(two(), 100, 11).unwrap().gathered, [1..32, 40..71]);
        assert_eq!(compose(two(), 100, 10).unwrap().gathered, [1..32]);
        assert!(compose(two(), 100, 8).is_none());
    }
}
