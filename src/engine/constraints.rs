//! Which tokens may come next, a bit for each: what a request allows, what its grammar takes, the words that it must not
//! say, and that it may not end yet.

use super::generation::Generation;

/// Tokens of a word of a mask.
const WORD_BITS: usize = u32::BITS as usize;

impl Generation {
    /// Has the grammar say what may come next. It is there from then on, unless it fails: that is said by whoever samples.
    pub(super) fn compute_mask(&mut self) {
        if let Some(grammar) = &mut self.grammar
            && self.mask_error.is_none()
        {
            self.mask_error = grammar.allowed().err();
        }
    }

    /// Whether some token may not come behind `output`.
    pub(super) fn is_constrained(&self, output: &[u32]) -> bool {
        let is_limited = self.params.allowed_token_ids.is_some() || self.grammar.is_some();
        is_limited || self.forbidden(output).next().is_some()
    }

    /// Writes which tokens may come behind `output`, the lowest in the lowest bit of the first word. A grammar has computed
    /// its mask.
    pub(super) fn write_mask(&self, output: &[u32], words: &mut [u32]) {
        let mask = self.grammar.as_ref().map(|grammar| grammar.mask().expect("the mask is computed first"));
        match (&self.params.allowed_token_ids, mask) {
            (None, None) => words.fill(u32::MAX),
            (None, Some(mask)) => mask.write(words),
            (Some(allowed), mask) => {
                words.fill(0);
                for &id in allowed.iter().filter(|id| mask.is_none_or(|mask| mask.is_allowed(**id))) {
                    if let Some(word) = words.get_mut(id as usize / WORD_BITS) {
                        *word |= bit(id);
                    }
                }
            }
        }
        for id in self.forbidden(output) {
            if let Some(word) = words.get_mut(id as usize / WORD_BITS) {
                *word &= !bit(id);
            }
        }
    }

    /// Tokens that may not come behind `output` whatever else is said.
    fn forbidden(&self, output: &[u32]) -> impl Iterator<Item = u32> {
        let completes = move |word: &&Vec<u32>| word.split_last().is_some_and(|(_, before)| output.ends_with(before));
        let words = self.params.bad_words.iter().filter(completes).filter_map(|word| word.last());
        let ends = if output.len() < self.params.min_tokens { &self.early_ends[..] } else { &[] };
        words.chain(ends).copied()
    }
}

fn bit(id: u32) -> u32 {
    1 << (id as usize % WORD_BITS)
}

/// Sets the logits of tokens without a bit to minus infinity.
pub(super) fn apply_mask(logits: &mut [f32], words: &[u32]) {
    for (logits, &word) in logits.chunks_mut(WORD_BITS).zip(words) {
        match word {
            u32::MAX => {}
            0 => logits.fill(f32::NEG_INFINITY),
            _ => {
                let forbidden = logits.iter_mut().enumerate().filter(|(at, _)| word >> at & 1 == 0);
                forbidden.for_each(|(_, logit)| *logit = f32::NEG_INFINITY);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::request::SamplingParams;

    fn allowed(params: SamplingParams, output: &[u32]) -> Vec<usize> {
        let generation = Generation::new(params, &[], &[40], 0);
        let mut words = [7; 2];
        generation.write_mask(output, &mut words);
        let ids: Vec<usize> = (0..64).filter(|id| words[id / 32] >> (id % 32) & 1 == 1).collect();
        assert_eq!(generation.is_constrained(output), ids.len() < 64);
        ids
    }

    #[test]
    fn a_mask_is_all_that_is_said() {
        let all: Vec<usize> = (0..64).collect();
        assert_eq!(allowed(SamplingParams::default(), &[]), all);
        let few = Some(vec![3, 31, 32, 40, 63, 64, 5000]);
        let params = SamplingParams { allowed_token_ids: few.clone(), ..Default::default() };
        assert_eq!(allowed(params, &[]), [3, 31, 32, 40, 63]);
        let bad_words = vec![vec![7, 8, 32], vec![3], vec![], vec![9, 9]];
        let params = SamplingParams { allowed_token_ids: few.clone(), bad_words, ..Default::default() };
        assert_eq!(allowed(params.clone(), &[1, 7, 8]), [31, 40, 63]);
        assert_eq!(allowed(params, &[7, 7]), [31, 32, 40, 63]);
        let params = SamplingParams { min_tokens: 2, stop_token_ids: vec![63, 900], ..Default::default() };
        let without: Vec<usize> = all.iter().copied().filter(|id| ![40, 63].contains(id)).collect();
        assert_eq!(allowed(params.clone(), &[5]), without);
        assert_eq!(allowed(params, &[5, 5]), all);
    }

    #[test]
    fn logits_without_a_bit_are_minus_infinity() {
        let mut logits = vec![1.0; 70];
        logits[2] = f32::NAN;
        apply_mask(&mut logits, &[u32::MAX << 3, 0, u32::MAX]);
        let kept: Vec<usize> = (0..70).filter(|id| logits[*id] == 1.0).collect();
        assert_eq!(kept, (3..32).chain(64..70).collect::<Vec<_>>());
        assert!((0..70).filter(|id| !kept.contains(id)).all(|id| logits[id] == f32::NEG_INFINITY));
    }
}
