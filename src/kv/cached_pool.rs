//! The blocks of one tier together with what they hold: a pool that finds blocks by content.

use super::{BlockHash, BlockId, BlockPool, PrefixCache};
use crate::planted::{self, Bug};

/// A [`BlockPool`] whose free blocks can still be found by what they hold, until somebody takes them.
pub struct CachedPool {
    pool: BlockPool,
    contents: PrefixCache,
}

impl CachedPool {
    /// `num_blocks` free blocks of `block_size` tokens that hold nothing.
    pub fn new(num_blocks: usize, block_size: usize) -> Self {
        Self { pool: BlockPool::new(num_blocks), contents: PrefixCache::new(num_blocks, block_size) }
    }

    /// Blocks there are.
    pub fn num_blocks(&self) -> usize {
        self.pool.num_blocks()
    }

    /// Blocks nobody holds.
    pub fn num_free(&self) -> usize {
        self.pool.num_free()
    }

    /// Blocks that can be found.
    pub fn num_cached(&self) -> usize {
        self.contents.len()
    }

    /// Takes the block that has been free longest; what it held cannot be found any more.
    pub fn allocate(&mut self) -> Option<BlockId> {
        let block = self.pool.allocate()?;
        if !planted::is(Bug::OldContentKept) {
            self.contents.forget(block);
        }
        Some(block)
    }

    /// Takes the block that holds `tokens` under `hash`, beside others who hold it.
    pub fn share_found(&mut self, hash: &BlockHash, tokens: &[u32]) -> Option<BlockId> {
        let block = self.find(hash, tokens)?;
        self.pool.share(block);
        Some(block)
    }

    /// Holds a block once more.
    pub fn share(&mut self, block: BlockId) {
        self.pool.share(block);
    }

    /// Gives a block back. The last one to do so frees it as the most recently used one.
    pub fn release(&mut self, block: BlockId) {
        self.pool.release(block);
    }

    /// The block that holds `tokens` under `hash`.
    pub fn find(&self, hash: &BlockHash, tokens: &[u32]) -> Option<BlockId> {
        self.contents.find(hash, tokens)
    }

    /// Records what a held block holds, so that it can be found.
    pub fn insert(&mut self, hash: BlockHash, tokens: &[u32], block: BlockId) {
        self.contents.insert(hash, tokens, block);
    }

    /// What can be found in `block`.
    pub fn content(&self, block: BlockId) -> Option<(&BlockHash, &[u32])> {
        self.contents.content(block)
    }

    /// Panics unless `num_held` blocks are held, each as often as counted. For tests and debug builds.
    pub fn check_integrity(&self, num_held: usize) {
        self.pool.check_integrity(num_held);
    }
}
