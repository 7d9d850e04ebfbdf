//! The unreferenced blocks of a pool, by how hard they are held on to, and among equals from least to most recently freed. Plain
//! data; every operation takes O(1), or as many steps as there are levels.

use super::BlockId;

/// Marks the ends of a list.
const NIL: u32 = u32::MAX;

/// How hard a block is held on to while nobody uses it. Who needs room takes from the lowest level first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Level(u8);

const NUM_LEVELS: usize = Level::PINNED.0 as usize + 1;

/// One part in so many of a pool may be held on to harder than usual at the cost of the rest.
const PROTECTED_PART: usize = 2;

impl Level {
    /// Of a block that holds nothing anybody could find.
    pub(super) const EMPTY: Self = Self(0);
    /// Of the blocks of a pinned cube.
    pub const PINNED: Self = Self(11);

    /// Of the blocks of a cube with this priority, 0 to 9.
    pub const fn of_priority(priority: u8) -> Self {
        Self(if priority > 9 { 10 } else { priority + 1 })
    }

    /// The priority it stands for; that of a pinned cube is above all others.
    pub fn priority(self) -> u8 {
        self.0.saturating_sub(1)
    }
}

impl Default for Level {
    /// Of what no cube names: that of a cube with the usual priority.
    fn default() -> Self {
        Self::of_priority(5)
    }
}

/// The lists.
pub(super) struct FreeList {
    links: Vec<Link>,
    lists: [List; NUM_LEVELS],
    num_free: usize,
}

#[derive(Clone, Copy)]
struct Link {
    previous: u32,
    next: u32,
    level: Level,
}

#[derive(Clone, Copy)]
struct List {
    first: u32,
    last: u32,
    len: usize,
}

impl FreeList {
    /// Lists over `num_blocks` blocks, all of them free and empty.
    pub(super) fn new(num_blocks: usize) -> Self {
        assert!(num_blocks < NIL as usize, "block ids are 32 bits wide");
        let mut free = Self {
            links: vec![Link { previous: NIL, next: NIL, level: Level::EMPTY }; num_blocks],
            lists: [List { first: NIL, last: NIL, len: 0 }; NUM_LEVELS],
            num_free: 0,
        };
        (0..num_blocks).for_each(|index| free.push(BlockId(index as u32), Level::EMPTY));
        free
    }

    pub(super) fn len(&self) -> usize {
        self.num_free
    }

    /// The block to take next. Those that are held on to harder than usual are kept for last, but for what they have beyond
    /// their part of the pool: what was important once does not keep everything else out for ever.
    pub(super) fn first(&self) -> Option<BlockId> {
        let usual = usize::from(Level::default().0);
        let first_of = |levels: std::ops::Range<usize>| self.lists[levels].iter().find(|list| list.len > 0);
        let num_protected: usize = self.lists[usual + 1..].iter().map(|list| list.len).sum();
        let has_too_many = num_protected > self.links.len() / PROTECTED_PART;
        let protected = first_of(usual + 1..NUM_LEVELS);
        let list = first_of(0..usual)
            .or_else(|| protected.filter(|_| has_too_many))
            .or_else(|| first_of(usual..usual + 1))
            .or(protected)?;
        Some(BlockId(list.first))
    }

    /// Adds a block as the most recently freed one of its level.
    pub(super) fn push(&mut self, block: BlockId, level: Level) {
        let last = self.lists[usize::from(level.0)].last;
        self.insert(block, Link { previous: last, next: NIL, level });
    }

    /// Adds a block as the one that is taken next.
    pub(super) fn push_first(&mut self, block: BlockId) {
        let (level, first) = (Level::EMPTY, self.lists[usize::from(Level::EMPTY.0)].first);
        self.insert(block, Link { previous: NIL, next: first, level });
    }

    fn insert(&mut self, block: BlockId, link: Link) {
        let list = &mut self.lists[usize::from(link.level.0)];
        match link.previous {
            NIL => list.first = block.0,
            previous => self.links[previous as usize].next = block.0,
        }
        match link.next {
            NIL => list.last = block.0,
            next => self.links[next as usize].previous = block.0,
        }
        self.links[block.index()] = link;
        list.len += 1;
        self.num_free += 1;
    }

    /// Takes a free block out, wherever it stands.
    pub(super) fn remove(&mut self, block: BlockId) {
        let Link { previous, next, level } = self.links[block.index()];
        let list = &mut self.lists[usize::from(level.0)];
        match previous {
            NIL => list.first = next,
            previous => self.links[previous as usize].next = next,
        }
        match next {
            NIL => list.last = previous,
            next => self.links[next as usize].previous = previous,
        }
        list.len -= 1;
        self.num_free -= 1;
    }

    /// Walks the lists; panics where they disagree with themselves or with `is_free`.
    pub(super) fn check_integrity(&self, is_free: impl Fn(BlockId) -> bool) {
        for (level, list) in self.lists.iter().enumerate() {
            let (mut at, mut previous, mut num_listed) = (list.first, NIL, 0);
            while at != NIL {
                let link = self.links[at as usize];
                assert!(is_free(BlockId(at)), "block {at} is free and referenced");
                assert_eq!(link.previous, previous, "block {at} has a wrong back link");
                assert_eq!(usize::from(link.level.0), level, "block {at} is in another list than it believes");
                num_listed += 1;
                assert!(num_listed <= list.len, "a free list has a cycle");
                (previous, at) = (at, link.next);
            }
            assert_eq!((list.last, num_listed), (previous, list.len));
        }
        assert_eq!(self.lists.iter().map(|list| list.len).sum::<usize>(), self.num_free);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn emptied(free: &mut FreeList) -> Vec<u32> {
        std::iter::from_fn(|| {
            let block = free.first()?;
            free.remove(block);
            Some(block.0)
        })
        .collect()
    }

    fn filled(levels: &[u8]) -> FreeList {
        let mut free = FreeList::new(levels.len());
        let _ = emptied(&mut free);
        for (block, level) in levels.iter().enumerate() {
            let level = if *level == 99 { Level::EMPTY } else { Level::of_priority(*level) };
            free.push(BlockId(block as u32), level);
        }
        free
    }

    #[test]
    fn the_lowest_level_goes_first_and_among_equals_the_longest_free() {
        let mut free = filled(&[5, 9, 0, 5, 99, 3, 7, 0]);
        assert_eq!(emptied(&mut free), [4, 2, 7, 5, 0, 3, 6, 1]);
        assert_eq!((free.len(), free.first()), (0, None));
    }

    #[test]
    fn what_is_protected_keeps_half_of_the_pool_and_no_more() {
        let mut free = filled(&[9, 8, 9, 8, 5, 5]);
        // Four of six are too many: the lowest of them go before the usual ones until half is left.
        assert_eq!(emptied(&mut free), [1, 4, 5, 3, 0, 2]);
        assert_eq!(emptied(&mut filled(&[9, 1, 9, 9])), [1, 0, 2, 3]);
    }

    #[test]
    fn levels_stand_for_priorities() {
        assert_eq!(Level::default(), Level::of_priority(5));
        assert!(Level::EMPTY < Level::of_priority(0) && Level::of_priority(9) < Level::PINNED);
        assert_eq!((Level::of_priority(9).priority(), Level::PINNED.priority()), (9, 10));
    }
}
