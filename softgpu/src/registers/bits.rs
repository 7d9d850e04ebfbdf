//! A set of small numbers.

use std::ops::Range;

/// A set of numbers below a limit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bits(Vec<u64>);

impl Bits {
    /// Empty, for numbers below `limit`.
    pub fn new(limit: usize) -> Self {
        Self(vec![0; limit.div_ceil(64)])
    }

    /// Whether a number is in the set.
    pub fn contains(&self, number: u32) -> bool {
        self.0[number as usize / 64] >> (number % 64) & 1 == 1
    }

    /// Puts a number in; whether it was not there before.
    pub fn insert(&mut self, number: u32) -> bool {
        let is_new = !self.contains(number);
        self.0[number as usize / 64] |= 1 << (number % 64);
        is_new
    }

    /// Takes a number out.
    pub fn remove(&mut self, number: u32) {
        self.0[number as usize / 64] &= !(1 << (number % 64));
    }

    /// Adds what `other` has and `without` does not have; whether that changed anything.
    pub fn add(&mut self, other: &Self, without: &Self) -> bool {
        let mut is_new = 0;
        for ((mine, other), without) in self.0.iter_mut().zip(&other.0).zip(&without.0) {
            let more = other & !without & !*mine;
            *mine |= more;
            is_new |= more;
        }
        is_new != 0
    }

    /// The numbers in order.
    pub fn iter(&self) -> impl Iterator<Item = u32> {
        self.0.iter().enumerate().flat_map(|(at, &word)| {
            std::iter::successors(Some(word), |word| Some(word & word.wrapping_sub(1)))
                .take_while(|&word| word != 0)
                .map(move |word| at as u32 * 64 + word.trailing_zeros())
        })
    }

    /// Whether any number of a range that is not empty is in the set.
    pub fn has_any_of(&self, range: &Range<u32>) -> bool {
        words(range).any(|(at, mask)| self.0[at] & mask != 0)
    }

    /// Puts all numbers of a range that is not empty in.
    pub fn insert_all(&mut self, range: &Range<u32>) {
        words(range).for_each(|(at, mask)| self.0[at] |= mask);
    }
}

/// The words of a range that is not empty, and their bits in it.
fn words(range: &Range<u32>) -> impl Iterator<Item = (usize, u64)> {
    let (first, last) = (range.start / 64, (range.end - 1) / 64);
    let (start, end) = (u64::MAX << (range.start % 64), u64::MAX >> (63 - (range.end - 1) % 64));
    (first..=last).map(move |at| {
        let mask = if at == first { start } else { u64::MAX } & if at == last { end } else { u64::MAX };
        (at as usize, mask)
    })
}
