//! How often a block was asked for lately: a count-min sketch with ageing, as TinyLFU has it (Einziger, Friedman,
//! Manes 2017). Knows hashes only; blocks that are not stored are counted too, which is what admission compares.

use crate::kv::BlockHash;

/// Counters per row at least and at most; four bytes of memory for each.
const MIN_COUNTERS: usize = 1 << 8;
const MAX_COUNTERS: usize = 1 << 20;

const NUM_ROWS: usize = 4;

/// A count says no more than this: what was asked for fifteen times is hot.
const MAX_COUNT: u8 = 15;

/// Counts are halved after so many increments per counter of a row.
const INCREMENTS_PER_COUNTER: u64 = 10;

/// Approximate counts, never too low within one age.
pub(super) struct FrequencySketch {
    counters: Vec<u8>,
    num_counters: usize,
    num_increments: u64,
}

impl FrequencySketch {
    /// A sketch for a store of about `num_blocks` blocks.
    pub(super) fn new(num_blocks: u64) -> Self {
        let wanted = usize::try_from(num_blocks).unwrap_or(MAX_COUNTERS).min(MAX_COUNTERS);
        let num_counters = wanted.max(MIN_COUNTERS).next_power_of_two();
        Self { counters: vec![0; num_counters * NUM_ROWS], num_counters, num_increments: 0 }
    }

    /// Counts one request for `hash`.
    pub(super) fn increment(&mut self, hash: &BlockHash) {
        for place in self.places(hash) {
            let counter = &mut self.counters[place];
            *counter = (*counter + 1).min(MAX_COUNT);
        }
        self.num_increments += 1;
        if self.num_increments >= self.num_counters as u64 * INCREMENTS_PER_COUNTER {
            self.age();
        }
    }

    /// Requests for `hash`, from 0 to 15.
    pub(super) fn estimate(&self, hash: &BlockHash) -> u8 {
        self.places(hash).into_iter().map(|place| self.counters[place]).min().unwrap_or(0)
    }

    /// What was hot long ago must not stay for ever.
    fn age(&mut self) {
        self.counters.iter_mut().for_each(|counter| *counter /= 2);
        self.num_increments /= 2;
    }

    /// A block hash is uniform already: each row takes eight bytes of it.
    fn places(&self, hash: &BlockHash) -> [usize; NUM_ROWS] {
        let mut places = [0; NUM_ROWS];
        for (row, word) in hash.as_bytes().chunks_exact(8).enumerate() {
            let word = u64::from_le_bytes(word.try_into().expect("chunks of eight bytes"));
            places[row] = row * self.num_counters + (word as usize & (self.num_counters - 1));
        }
        places
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(number: u32) -> BlockHash {
        BlockHash::root(b"frequency", b"").child(&[number])
    }

    #[test]
    fn counts_are_never_too_low_and_seldom_too_high() {
        let mut sketch = FrequencySketch::new(1000);
        for number in 0..300 {
            (0..number % 7).for_each(|_| sketch.increment(&hash(number)));
        }
        let estimates: Vec<u8> = (0..300).map(|number| sketch.estimate(&hash(number))).collect();
        assert!((0..300).all(|number| u32::from(estimates[number as usize]) >= number % 7));
        let exact = (0..300).filter(|&number| u32::from(estimates[number as usize]) == number % 7).count();
        assert!(exact > 280, "{exact} of 300 are exact");
    }

    #[test]
    fn counts_saturate_and_age() {
        let mut sketch = FrequencySketch::new(1);
        (0..100).for_each(|_| sketch.increment(&hash(1)));
        assert_eq!(sketch.estimate(&hash(1)), MAX_COUNT);
        (0..MIN_COUNTERS as u32 * 10).for_each(|number| sketch.increment(&hash(1000 + number)));
        assert!(sketch.estimate(&hash(1)) < MAX_COUNT, "ageing halves");
    }
}
