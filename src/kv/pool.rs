//! The blocks of one tier: which are free, how often each is shared, which were used least recently.
//!
//! Plain data with one owner. A block with no references stays where it is, and with it whatever the prefix cache
//! knows about it, until it is the least recently freed one and somebody needs it. All operations take O(1).

use super::BlockId;

/// Marks the ends of the list.
const NIL: u32 = u32::MAX;

/// Reference counts, and the unreferenced blocks as a list from least to most recently freed.
pub struct BlockPool {
    num_references: Vec<u32>,
    links: Vec<Link>,
    first: u32,
    last: u32,
    num_free: usize,
}

#[derive(Clone, Copy)]
struct Link {
    previous: u32,
    next: u32,
}

impl BlockPool {
    /// A pool of `num_blocks` blocks, all free.
    pub fn new(num_blocks: usize) -> Self {
        assert!(num_blocks < NIL as usize, "block ids are 32 bits wide");
        let mut pool = Self {
            num_references: vec![0; num_blocks],
            links: vec![Link { previous: NIL, next: NIL }; num_blocks],
            first: NIL,
            last: NIL,
            num_free: 0,
        };
        (0..num_blocks).for_each(|index| pool.push_last(index as u32));
        pool
    }

    /// Blocks in the pool.
    pub fn num_blocks(&self) -> usize {
        self.links.len()
    }

    /// Blocks nobody references.
    pub fn num_free(&self) -> usize {
        self.num_free
    }

    /// References to a block.
    pub fn num_references(&self, block: BlockId) -> u32 {
        self.num_references[block.index()]
    }

    /// Takes the block that has been free longest. What it held is lost: tell the prefix cache.
    pub fn allocate(&mut self) -> Option<BlockId> {
        if self.first == NIL {
            return None;
        }
        let block = BlockId(self.first);
        self.unlink(block);
        self.num_references[block.index()] = 1;
        Some(block)
    }

    /// Adds a reference, taking the block off the free list if it was there.
    pub fn share(&mut self, block: BlockId) {
        if self.num_references[block.index()] == 0 {
            self.unlink(block);
        }
        self.num_references[block.index()] += 1;
    }

    /// Drops a reference; the last one frees the block, which keeps its content for the time being.
    pub fn release(&mut self, block: BlockId) {
        let count = &mut self.num_references[block.index()];
        assert!(*count > 0, "{block:?} was released more often than taken");
        *count -= 1;
        if *count == 0 {
            self.push_last(block.0);
        }
    }

    /// Makes a free block the one that is taken first; does nothing to one that is not free.
    pub fn demote(&mut self, block: BlockId) {
        if self.num_references[block.index()] == 0 {
            self.unlink(block);
            self.push_first(block.0);
        }
    }

    /// Counts references and walks the list; panics where they disagree. For tests and debug builds.
    pub fn check_integrity(&self, num_held: usize) {
        let mut num_listed = 0;
        let (mut at, mut previous) = (self.first, NIL);
        while at != NIL {
            assert_eq!(self.num_references[at as usize], 0, "block {at} is free and referenced");
            assert_eq!(self.links[at as usize].previous, previous, "block {at} has a wrong back link");
            num_listed += 1;
            assert!(num_listed <= self.num_free, "the free list has a cycle");
            (previous, at) = (at, self.links[at as usize].next);
        }
        let num_references: usize = self.num_references.iter().map(|&count| count as usize).sum();
        let num_referenced = self.num_references.iter().filter(|&&count| count > 0).count();
        assert_eq!((self.last, num_listed), (previous, self.num_free));
        assert_eq!(num_referenced + self.num_free, self.num_blocks(), "blocks are neither free nor referenced");
        assert_eq!(num_references, num_held, "references do not match the block tables");
    }

    fn push_last(&mut self, block: u32) {
        self.links[block as usize] = Link { previous: self.last, next: NIL };
        match self.last {
            NIL => self.first = block,
            last => self.links[last as usize].next = block,
        }
        self.last = block;
        self.num_free += 1;
    }

    fn push_first(&mut self, block: u32) {
        self.links[block as usize] = Link { previous: NIL, next: self.first };
        match self.first {
            NIL => self.last = block,
            first => self.links[first as usize].previous = block,
        }
        self.first = block;
        self.num_free += 1;
    }

    fn unlink(&mut self, block: BlockId) {
        let Link { previous, next } = self.links[block.index()];
        match previous {
            NIL => self.first = next,
            previous => self.links[previous as usize].next = next,
        }
        match next {
            NIL => self.last = previous,
            next => self.links[next as usize].previous = previous,
        }
        self.num_free -= 1;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_longest_free_block_is_taken_first() {
        let mut pool = BlockPool::new(3);
        let blocks: Vec<BlockId> = std::iter::from_fn(|| pool.allocate()).collect();
        assert_eq!(blocks, [BlockId(0), BlockId(1), BlockId(2)]);
        pool.release(BlockId(1));
        pool.release(BlockId(0));
        pool.share(BlockId(1));
        assert_eq!(pool.allocate(), Some(BlockId(0)));
        assert_eq!(pool.allocate(), None);
        pool.check_integrity(3);
    }

    proptest! {
        #[test]
        fn any_sequence_of_operations_keeps_the_counts(operations in prop::collection::vec((0..4u8, 0..8usize), 0..200)) {
            let mut pool = BlockPool::new(8);
            let mut held: Vec<BlockId> = Vec::new();
            for (operation, choice) in operations {
                match operation {
                    0 => held.extend(pool.allocate()),
                    1 if !held.is_empty() => {
                        let block = held[choice % held.len()];
                        pool.share(block);
                        held.push(block);
                    }
                    2 if !held.is_empty() => pool.release(held.swap_remove(choice % held.len())),
                    3 => {
                        let block = BlockId(choice as u32);
                        pool.demote(block);
                        prop_assert!(held.contains(&block) || pool.first == block.0);
                    }
                    _ => {}
                }
                pool.check_integrity(held.len());
                let mut distinct = held.clone();
                distinct.sort();
                distinct.dedup();
                prop_assert_eq!(pool.num_free(), 8 - distinct.len());
            }
        }
    }
}
