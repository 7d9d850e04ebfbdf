//! The sequences of a step in runs of those that attention may treat alike.

use std::ops::Range;
use std::sync::Arc;

/// Sequences of a step that follow each other and either all have their whole context among its new tokens, or none has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SequenceRun {
    /// Which sequences of the step.
    pub sequences: Range<usize>,
    /// Their token rows.
    pub tokens: Range<usize>,
    /// The longest run of new tokens of one of them.
    pub max_query_len: usize,
    /// The longest context among them, new tokens included.
    pub max_context_len: usize,
    /// Whether the new tokens of each, several, are its whole context: their positions are `0..n` without gaps, and nothing
    /// they see was in the cache before the step.
    pub is_uncached: bool,
}

/// All sequences of a step, in order, in as few runs as there can be. Clones share them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SequenceRuns(Arc<Vec<SequenceRun>>);

impl SequenceRuns {
    /// None, with memory for so many.
    pub fn with_capacity(num_runs: usize) -> Self {
        Self(Arc::new(Vec::with_capacity(num_runs)))
    }

    /// Begins another step: in the same memory, unless the last one still has its runs.
    pub fn clear(&mut self) {
        match Arc::get_mut(&mut self.0) {
            Some(runs) => runs.clear(),
            None => *self = Self::with_capacity(self.0.capacity()),
        }
    }

    /// The runs of sequences with these numbers of new tokens and lengths of context, the new tokens included.
    pub fn of(lens: impl IntoIterator<Item = (usize, usize)>) -> Self {
        let mut runs = Self::default();
        lens.into_iter().for_each(|(query_len, context_len)| runs.push(query_len, context_len));
        runs
    }

    /// Adds the step's next sequence: `query_len` new tokens in a context of `context_len`, one past the position of the
    /// last of them. As positions ascend, equal numbers mean that there are no gaps.
    pub fn push(&mut self, query_len: usize, context_len: usize) {
        let (num_seqs, num_tokens) = (self.num_seqs(), self.num_tokens());
        let runs = Arc::make_mut(&mut self.0);
        // A single token is a decode, whatever it follows: steps of these may be recorded, so they are always the same.
        let is_uncached = query_len > 1 && query_len == context_len;
        if runs.last().is_none_or(|last| last.is_uncached != is_uncached) {
            let (sequences, tokens) = (num_seqs..num_seqs, num_tokens..num_tokens);
            runs.push(SequenceRun { sequences, tokens, max_query_len: 0, max_context_len: 0, is_uncached });
        }
        let run = runs.last_mut().expect("there is a run now");
        run.sequences.end += 1;
        run.tokens.end += query_len;
        run.max_query_len = run.max_query_len.max(query_len);
        run.max_context_len = run.max_context_len.max(context_len);
    }

    /// In order of their sequences.
    pub fn iter(&self) -> impl Iterator<Item = &SequenceRun> {
        self.0.iter()
    }

    /// Whether any sequence has its whole context in the step.
    pub fn has_uncached(&self) -> bool {
        self.0.iter().any(|run| run.is_uncached)
    }

    /// Number of sequences.
    pub fn num_seqs(&self) -> usize {
        self.0.last().map_or(0, |last| last.sequences.end)
    }

    /// Number of tokens.
    pub fn num_tokens(&self) -> usize {
        self.0.last().map_or(0, |last| last.tokens.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(sequences: Range<usize>, tokens: Range<usize>, longest: (usize, usize), is_uncached: bool) -> SequenceRun {
        SequenceRun { sequences, tokens, max_query_len: longest.0, max_context_len: longest.1, is_uncached }
    }

    #[test]
    fn steps_have_their_own_in_the_same_memory() {
        let mut runs = SequenceRuns::with_capacity(2);
        let mut place = None;
        for query_len in 2..5 {
            runs.clear();
            runs.push(query_len, query_len);
            runs.push(1, 9);
            let step = runs.clone();
            assert_eq!(step, SequenceRuns::of([(query_len, query_len), (1, 9)]));
            assert_eq!(*place.get_or_insert(step.0.as_ptr()), step.0.as_ptr());
        }
        let kept = runs.clone();
        runs.clear();
        assert_eq!((kept.num_seqs(), runs.num_seqs()), (2, 0));
    }

    #[test]
    fn prompts_without_cached_context_stand_apart() {
        let runs = SequenceRuns::of([(1, 40), (30, 70), (7, 7), (9, 9), (5, 21), (2, 2)]);
        let wanted = [
            run(0..2, 0..31, (30, 70), false),
            run(2..4, 31..47, (9, 9), true),
            run(4..5, 47..52, (5, 21), false),
            run(5..6, 52..54, (2, 2), true),
        ];
        assert_eq!(runs.iter().cloned().collect::<Vec<_>>(), wanted);
        assert_eq!((runs.num_seqs(), runs.num_tokens(), runs.has_uncached()), (6, 54, true));
    }

    #[test]
    fn what_is_alike_is_one_run() {
        let prompts = SequenceRuns::of([(3, 3), (8, 8), (2, 2)]);
        assert_eq!(prompts, SequenceRuns(Arc::new(vec![run(0..3, 0..13, (8, 8), true)])));
        let decodes = SequenceRuns::of([(1, 9), (1, 300), (1, 1)]);
        assert_eq!(decodes, SequenceRuns(Arc::new(vec![run(0..3, 0..3, (1, 300), false)])));
        assert!(!decodes.has_uncached());
    }

    /// Positions 0, 1, 4 end a context of five.
    #[test]
    fn gaps_are_cached_context() {
        assert!(!SequenceRuns::of([(3, 5)]).has_uncached());
    }

    #[test]
    fn no_sequences_are_no_run() {
        let none = SequenceRuns::of([]);
        assert_eq!((none.iter().count(), none.num_seqs(), none.num_tokens()), (0, 0, 0));
    }
}
