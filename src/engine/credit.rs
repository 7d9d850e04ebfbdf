//! Who carries the traffic: recent tokens by composition of adapters, as dLoRA (OSDI '24) keeps credits to decide when
//! merging pays.
//!
//! A credit is a sum of tokens that fades: what was computed `window` tokens ago counts 1/e. Memory is bounded; the
//! composition with the least credit makes room for a new one.

use super::adapters::CompositionKey;

/// Compositions that are remembered.
const MAX_ENTRIES: usize = 32;

/// Credits that have faded to less are nothing.
const MIN_TOKENS: f64 = 0.5;

/// Recent tokens of one composition.
#[derive(Debug, Clone, Copy)]
struct Credit {
    key: CompositionKey,
    tokens: f64,
    /// Whether it is to be merged whatever its share.
    is_forced: bool,
    /// Whether merging it was tried and refused.
    is_refused: bool,
}

/// All credits.
pub(super) struct CreditTable {
    credits: Vec<Credit>,
    /// Recent tokens of everybody, also of those who are merged under no circumstances.
    total: f64,
    window: f64,
}

impl CreditTable {
    /// No credits; those to come fade over `window_tokens`.
    pub(super) fn new(window_tokens: usize) -> Self {
        Self { credits: Vec::with_capacity(MAX_ENTRIES), total: 0.0, window: window_tokens.max(1) as f64 }
    }

    /// Has all credits fade by a step of `num_tokens`, which are then added.
    pub(super) fn fade(&mut self, num_tokens: usize) {
        let factor = (-(num_tokens as f64) / self.window).exp();
        self.total *= factor;
        self.credits.iter_mut().for_each(|credit| credit.tokens *= factor);
    }

    /// Adds tokens of a composition; of `None` those that no merge could carry.
    pub(super) fn add(&mut self, key: Option<CompositionKey>, is_forced: bool, num_tokens: usize) {
        self.total += num_tokens as f64;
        let Some(key) = key else { return };
        match self.credits.iter_mut().find(|credit| credit.key == key) {
            Some(credit) => {
                credit.tokens += num_tokens as f64;
                credit.is_forced = is_forced;
            }
            None => self.insert(Credit { key, tokens: num_tokens as f64, is_forced, is_refused: false }),
        }
    }

    fn insert(&mut self, credit: Credit) {
        if self.credits.len() < MAX_ENTRIES {
            return self.credits.push(credit);
        }
        if let Some(least) = self.credits.iter_mut().min_by(|a, b| a.tokens.total_cmp(&b.tokens)) {
            *least = credit;
        }
    }

    /// Its part of all recent tokens.
    pub(super) fn share(&self, key: CompositionKey) -> f64 {
        let tokens = self.credits.iter().find(|credit| credit.key == key).map_or(0.0, |credit| credit.tokens);
        if self.total > 0.0 { tokens / self.total } else { 0.0 }
    }

    /// The composition to merge: one that has to be, else one with at least `share` of what has been seen, once that is
    /// enough to tell by.
    pub(super) fn candidate(&self, share: f64) -> Option<CompositionKey> {
        let leader = |is_forced: bool| {
            let open = self.credits.iter().filter(|credit| !credit.is_refused && credit.is_forced == is_forced);
            open.max_by(|a, b| a.tokens.total_cmp(&b.tokens))
        };
        if let Some(forced) = leader(true).filter(|credit| credit.tokens >= MIN_TOKENS) {
            return Some(forced.key);
        }
        let is_told = self.total >= self.window / 2.0;
        leader(false).filter(|credit| is_told && credit.tokens >= share * self.total).map(|credit| credit.key)
    }

    /// Whether it has to be merged.
    pub(super) fn is_forced(&self, key: CompositionKey) -> bool {
        self.credits.iter().any(|credit| credit.key == key && credit.is_forced)
    }

    /// Takes note that it cannot be merged.
    pub(super) fn refuse(&mut self, key: CompositionKey) {
        self.credits.iter_mut().filter(|credit| credit.key == key).for_each(|credit| credit.is_refused = true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: CompositionKey = CompositionKey([1; 32]);
    const B: CompositionKey = CompositionKey([2; 32]);

    fn step(table: &mut CreditTable, parts: &[(Option<CompositionKey>, bool, usize)]) {
        table.fade(parts.iter().map(|part| part.2).sum());
        parts.iter().for_each(|(key, is_forced, num_tokens)| table.add(*key, *is_forced, *num_tokens));
    }

    #[test]
    fn whoever_carries_nearly_all_tokens_is_merged_once_enough_was_seen() {
        let mut table = CreditTable::new(100);
        step(&mut table, &[(Some(A), false, 19), (None, false, 1)]);
        assert_eq!(table.candidate(0.9), None, "20 tokens say nothing");
        for _ in 0..3 {
            step(&mut table, &[(Some(A), false, 19), (None, false, 1)]);
        }
        assert_eq!(table.candidate(0.9), Some(A));
        assert_eq!(table.candidate(0.96), None);
        assert!((table.share(A) - 0.95).abs() < 1e-9);
        // It turns to somebody else.
        for _ in 0..3 {
            step(&mut table, &[(Some(B), false, 20)]);
        }
        assert!(table.share(A) < 0.6 && table.candidate(0.9).is_none());
        for _ in 0..20 {
            step(&mut table, &[(Some(B), false, 20)]);
        }
        assert_eq!(table.candidate(0.9), Some(B));
    }

    #[test]
    fn those_that_must_go_first_and_those_that_cannot_are_left() {
        let mut table = CreditTable::new(100);
        for _ in 0..10 {
            step(&mut table, &[(Some(A), false, 20), (Some(B), true, 1)]);
        }
        assert_eq!(table.candidate(0.9), Some(B));
        assert!(table.is_forced(B) && !table.is_forced(A));
        table.refuse(B);
        assert_eq!(table.candidate(0.9), Some(A));
        table.refuse(A);
        assert_eq!(table.candidate(0.0), None);
    }

    #[test]
    fn the_least_is_forgotten_first() {
        let mut table = CreditTable::new(1_000_000);
        for number in 0..100 {
            step(&mut table, &[(Some(A), false, 50), (Some(CompositionKey([number + 3; 32])), false, 1)]);
        }
        assert_eq!(table.credits.len(), MAX_ENTRIES);
        assert!(table.share(A) > 0.9);
    }
}
