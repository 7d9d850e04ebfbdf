//! SentencePiece BPE straight from scores.
//!
//! The `tokenizers` crate wants a list of merges, which a GGUF file does not have; rebuilding half a million of them
//! takes longer than loading the model. This encoder asks the vocabulary while it merges instead: of all neighbours that
//! join to a token, the pair whose token scores best is merged first; ties go by the ids of the parts, then by place.
//! That is the order Hugging Face's converter gives the merges, so the ids are the same (Kudo & Richardson 2018 for the
//! model, `SentencePieceExtractor` for the order).

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

use tokenizers::Model;
use tokenizers::models::bpe::BPE;

/// What the encoder knows beside the spelling of the tokens.
pub(super) struct ScoreBpe {
    /// Score of each token; `None` for tokens that no merge may make.
    pub(super) scores: Vec<Option<f32>>,
    /// Ids of `<0x00>` to `<0xFF>`, where the vocabulary has them.
    pub(super) byte_ids: Box<[Option<u32>; 256]>,
    /// Stands for runs of characters that cannot be spelled.
    pub(super) unk: Option<u32>,
}

/// A stretch of the text that is one token so far, in a doubly linked list.
struct Symbol {
    start: usize,
    end: usize,
    /// `None` for a character that is no token.
    id: Option<u32>,
    previous: Option<usize>,
    next: Option<usize>,
}

/// Two neighbours that could become one token.
#[derive(PartialEq, Eq)]
struct Candidate {
    score: Score,
    /// Ids of the parts, then the place.
    order: Reverse<(u32, u32, usize)>,
    merged: u32,
    right: usize,
    end: usize,
}

#[derive(PartialEq)]
struct Score(f32);

impl Eq for Score {}

impl Ord for Score {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.total_cmp(&other.0)
    }
}

impl PartialOrd for Score {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.cmp(&other.score).then_with(|| self.order.cmp(&other.order))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl ScoreBpe {
    /// Appends the ids of `text`, spaces already marked, to `target`.
    pub(super) fn encode(&self, vocab: &BPE, text: &str, target: &mut Vec<u32>) {
        let mut symbols = characters(vocab, text);
        let mut queue = BinaryHeap::with_capacity(symbols.len());
        for left in 0..symbols.len() {
            queue.extend(self.candidate(vocab, text, &symbols, left));
        }
        while let Some(best) = queue.pop() {
            let Reverse((_, _, left)) = best.order;
            if !is_current(&symbols, left, &best) {
                continue;
            }
            merge(&mut symbols, left, &best);
            queue.extend(self.candidate(vocab, text, &symbols, left));
            if let Some(previous) = symbols[left].previous {
                queue.extend(self.candidate(vocab, text, &symbols, previous));
            }
        }
        self.write(text, &symbols, target);
    }

    /// The merge of symbol `left` with its right neighbour, if there is one.
    fn candidate(&self, vocab: &BPE, text: &str, symbols: &[Symbol], left: usize) -> Option<Candidate> {
        let right = symbols[left].next?;
        let (left_id, right_id) = (symbols[left].id?, symbols[right].id?);
        let end = symbols[right].end;
        let merged = vocab.token_to_id(&text[symbols[left].start..end])?;
        let score = Score((*self.scores.get(merged as usize)?)?);
        Some(Candidate { score, order: Reverse((left_id, right_id, left)), merged, right, end })
    }

    fn write(&self, text: &str, symbols: &[Symbol], target: &mut Vec<u32>) {
        let mut after_unknown = false;
        let mut at = symbols.first().map(|_| 0);
        while let Some(symbol) = at.map(|index| &symbols[index]) {
            at = symbol.next;
            let start = target.len();
            match symbol.id {
                Some(id) => target.push(id),
                None => target.extend(self.byte_tokens(&text[symbol.start..symbol.end])),
            }
            let unknown = target.len() == start;
            target.extend(self.unk.filter(|_| unknown && !after_unknown));
            after_unknown = unknown;
        }
    }

    /// The tokens of the bytes of `character`; none unless all have one.
    fn byte_tokens(&self, character: &str) -> Vec<u32> {
        let ids: Option<Vec<u32>> = character.bytes().map(|byte| self.byte_ids[usize::from(byte)]).collect();
        ids.unwrap_or_default()
    }
}

fn characters(vocab: &BPE, text: &str) -> Vec<Symbol> {
    let mut symbols: Vec<Symbol> = Vec::with_capacity(text.len());
    for (index, (start, character)) in text.char_indices().enumerate() {
        let end = start + character.len_utf8();
        let next = (end < text.len()).then_some(index + 1);
        symbols.push(Symbol {
            start,
            end,
            id: vocab.token_to_id(&text[start..end]),
            previous: index.checked_sub(1),
            next,
        });
    }
    symbols
}

/// Whether both symbols are still what they were when the candidate was found.
fn is_current(symbols: &[Symbol], left: usize, candidate: &Candidate) -> bool {
    let Reverse((left_id, right_id, _)) = candidate.order;
    let (left, right) = (&symbols[left], &symbols[candidate.right]);
    left.next == Some(candidate.right)
        && left.id == Some(left_id)
        && right.id == Some(right_id)
        && right.end == candidate.end
}

fn merge(symbols: &mut [Symbol], left: usize, candidate: &Candidate) {
    let next = symbols[candidate.right].next;
    // The right symbol leaves the list; without an id no older candidate that names it is current.
    symbols[candidate.right].id = None;
    symbols[left].next = next;
    symbols[left].end = candidate.end;
    symbols[left].id = Some(candidate.merged);
    if let Some(next) = next {
        symbols[next].previous = Some(left);
    }
}
