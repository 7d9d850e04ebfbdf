//! The blocks of one tier: which are free, how often each is shared, which go first.
//!
//! Plain data with one owner. A block with no references stays where it is, and with it whatever the prefix cache
//! knows about it, until it is the first of the free ones and somebody needs it.

use super::free_list::FreeList;
use super::{BlockId, Level};

/// Reference counts, and the unreferenced blocks.
pub struct BlockPool {
    num_references: Vec<u32>,
    free: FreeList,
}

impl BlockPool {
    /// A pool of `num_blocks` blocks, all free.
    pub fn new(num_blocks: usize) -> Self {
        Self { num_references: vec![0; num_blocks], free: FreeList::new(num_blocks) }
    }

    /// Blocks in the pool.
    pub fn num_blocks(&self) -> usize {
        self.num_references.len()
    }

    /// Blocks nobody references.
    pub fn num_free(&self) -> usize {
        self.free.len()
    }

    /// References to a block.
    pub fn num_references(&self, block: BlockId) -> u32 {
        self.num_references[block.index()]
    }

    /// Takes the block of the lowest level that has been free longest. What it held is lost: tell the prefix cache.
    pub fn allocate(&mut self) -> Option<BlockId> {
        let block = self.free.first()?;
        self.free.remove(block);
        self.num_references[block.index()] = 1;
        Some(block)
    }

    /// Adds a reference, taking the block off the free list if it was there.
    pub fn share(&mut self, block: BlockId) {
        if self.num_references[block.index()] == 0 {
            self.free.remove(block);
        }
        self.num_references[block.index()] += 1;
    }

    /// Drops a reference; the last one frees the block at `level`, and it keeps its content for the time being.
    pub fn release(&mut self, block: BlockId, level: Level) {
        let count = &mut self.num_references[block.index()];
        assert!(*count > 0, "{block:?} was released more often than taken");
        *count -= 1;
        if *count == 0 {
            self.free.push(block, level);
        }
    }

    /// Makes a free block the one that is taken first; does nothing to one that is not free.
    pub fn demote(&mut self, block: BlockId) {
        if self.num_references[block.index()] == 0 {
            self.free.remove(block);
            self.free.push_first(block);
        }
    }

    /// Counts references and walks the free blocks; panics where they disagree. For tests and debug builds.
    pub fn check_integrity(&self, num_held: usize) {
        self.free.check_integrity(|block| self.num_references(block) == 0);
        let num_references: usize = self.num_references.iter().map(|&count| count as usize).sum();
        let num_referenced = self.num_references.iter().filter(|&&count| count > 0).count();
        assert_eq!(num_referenced + self.num_free(), self.num_blocks(), "blocks are neither free nor referenced");
        assert_eq!(num_references, num_held, "references do not match the block tables");
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
        pool.release(BlockId(1), Level::default());
        pool.release(BlockId(0), Level::default());
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
                    2 if !held.is_empty() => pool.release(held.swap_remove(choice % held.len()), Level::of_priority(choice as u8)),
                    3 => {
                        let block = BlockId(choice as u32);
                        pool.demote(block);
                        if !held.contains(&block) {
                            prop_assert_eq!(pool.free.first(), Some(block));
                        }
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
