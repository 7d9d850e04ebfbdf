//! Which moved tokens are computed all the same: those whose keys and values are farthest from what computing every token
//! would give (CacheBlend, arXiv 2405.16444). How far they are the model tells, in the layers below which it is cheap to
//! know; that these passes are cut into steps is the sequence's.

use std::ops::Range;

/// Moved tokens, of which so many are chosen.
pub(super) struct Candidates {
    /// Their places in the prompt.
    pub(super) places: Range<usize>,
    /// At most as many as there are.
    pub(super) num_chosen: usize,
}

/// What is known of the deviations of a prompt's tokens.
pub(super) struct Probe {
    /// All that is moved, in order.
    candidates: Vec<Candidates>,
    /// Of each place up to the last one that may be chosen; only those of candidates mean something.
    deviations: Vec<f32>,
    /// Places before this one are known, or were never asked for.
    num_probed: usize,
}

impl Probe {
    /// Nothing when there is nothing to choose.
    pub(super) fn new(candidates: Vec<Candidates>) -> Option<Self> {
        let last = candidates.iter().rfind(|found| found.num_chosen > 0)?;
        Some(Self { deviations: vec![0.0; last.places.end], num_probed: 0, candidates })
    }

    /// The places from `first` on whose deviations are not known.
    pub(super) fn unknown(&self, first: usize) -> Range<usize> {
        self.num_probed.max(first)..self.deviations.len()
    }

    /// Takes note of the deviations of the places from `first` on. Whether none is missing.
    pub(super) fn take(&mut self, first: usize, deviations: &[f32]) -> bool {
        self.num_probed = first + deviations.len();
        self.deviations[first..self.num_probed].copy_from_slice(deviations);
        self.num_probed == self.deviations.len()
    }

    /// Forgets what is known.
    pub(super) fn reset(&mut self) {
        self.num_probed = 0;
    }

    /// The places that stay as they were moved: all but the chosen ones.
    pub(super) fn kept(&self) -> Vec<Range<usize>> {
        let mut kept = vec![];
        for candidates in &self.candidates {
            let mut start = candidates.places.start;
            for place in self.chosen(candidates).into_iter().chain([candidates.places.end]) {
                if start < place {
                    kept.push(start..place);
                }
                start = place + 1;
            }
        }
        kept
    }

    /// Those that deviate most, in order of place; of equals the first ones.
    fn chosen(&self, candidates: &Candidates) -> Vec<usize> {
        if candidates.num_chosen == 0 {
            return vec![];
        }
        let mut places: Vec<usize> = candidates.places.clone().collect();
        places.sort_by(|a, b| self.deviations[*b].total_cmp(&self.deviations[*a]));
        places.truncate(candidates.num_chosen);
        places.sort_unstable();
        places
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // one range is what is wanted
mod tests {
    use super::*;

    fn probe(candidates: &[(Range<usize>, usize)]) -> Option<Probe> {
        let candidates = candidates.iter().cloned();
        Probe::new(candidates.map(|(places, num_chosen)| Candidates { places, num_chosen }).collect())
    }

    #[test]
    fn the_most_deviating_of_every_run_are_chosen() {
        let mut probe = probe(&[(2..6, 2), (8..12, 1), (20..30, 0)]).unwrap();
        assert_eq!(probe.unknown(0), 0..12);
        assert!(!probe.take(0, &[9.0, 9.0, 1.0, 3.0, 2.0, 4.0, 9.0]));
        assert_eq!(probe.unknown(0), 7..12);
        assert!(probe.take(7, &[9.0, 0.1, 0.2, 0.3, 0.1]));
        assert_eq!(probe.kept(), [2..3, 4..5, 8..10, 11..12, 20..30]);
        probe.reset();
        // What is there before the first place needs no passes.
        assert_eq!(probe.unknown(1), 1..12);
    }

    #[test]
    fn of_equals_the_first_are_chosen() {
        let mut probe = probe(&[(1..5, 2)]).unwrap();
        assert!(probe.take(0, &[0.0, 1.0, 2.0, 1.0, 1.0]));
        assert_eq!(probe.kept(), [3..5]);
        // Not a number is as far as can be.
        assert!(probe.take(0, &[0.0, 1.0, f32::INFINITY, 3.0, f32::NAN]));
        assert_eq!(probe.kept(), [1..2, 3..4]);
    }

    #[test]
    fn where_nothing_is_chosen_there_is_no_probe() {
        assert!(probe(&[]).is_none());
        assert!(probe(&[(3..9, 0)]).is_none());
    }
}
