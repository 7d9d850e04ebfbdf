//! Which blocks of the pool hold what: the prefix cache.
//!
//! A block is found by its chained [`BlockHash`]; on a hit the token ids are compared as well, so not even a collision
//! could serve another prompt's KV. The cache holds no references: a found block is shared by the caller, and a block
//! that the pool gives away is forgotten first.

use std::collections::HashMap;

use super::{BlockHash, BlockId};

/// Blocks by content.
pub struct PrefixCache {
    blocks: HashMap<BlockHash, BlockId>,
    /// Per block what it holds and how many tokens that are, if it is in `blocks`.
    contents: Vec<Option<(BlockHash, u32)>>,
    tokens: Vec<u32>,
    block_size: usize,
}

impl PrefixCache {
    /// A cache over a pool of `num_blocks` blocks of `block_size` tokens.
    pub fn new(num_blocks: usize, block_size: usize) -> Self {
        Self {
            // Twice the blocks, so that inserting after removing never makes the table grow.
            blocks: HashMap::with_capacity(num_blocks * 2),
            contents: vec![None; num_blocks],
            tokens: vec![0; num_blocks * block_size],
            block_size,
        }
    }

    /// The block that holds `tokens` (one block's worth, or those of a partial block) under `hash`.
    pub fn find(&self, hash: &BlockHash, tokens: &[u32]) -> Option<BlockId> {
        self.blocks.get(hash).copied().filter(|&block| self.tokens_of(block) == tokens)
    }

    /// The block that holds something under `hash`.
    pub fn block_of(&self, hash: &BlockHash) -> Option<BlockId> {
        self.blocks.get(hash).copied()
    }

    /// Records that `block` now holds `tokens`. If another block already does, that one stays the one found.
    pub fn insert(&mut self, hash: BlockHash, tokens: &[u32], block: BlockId) {
        assert!((1..=self.block_size).contains(&tokens.len()), "a block holds 1 to {} tokens", self.block_size);
        if self.blocks.contains_key(&hash) || self.contents[block.index()].is_some() {
            return;
        }
        self.blocks.insert(hash, block);
        self.contents[block.index()] = Some((hash, tokens.len() as u32));
        let start = block.index() * self.block_size;
        self.tokens[start..start + tokens.len()].copy_from_slice(tokens);
    }

    /// Forgets what `block` holds, because it is about to be overwritten.
    pub fn forget(&mut self, block: BlockId) {
        if let Some((hash, _)) = self.contents[block.index()].take() {
            self.blocks.remove(&hash);
        }
    }

    /// What can be found in `block`.
    pub fn content(&self, block: BlockId) -> Option<(&BlockHash, &[u32])> {
        self.contents[block.index()].as_ref().map(|(hash, _)| (hash, self.tokens_of(block)))
    }

    /// Blocks that can be found.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether nothing can be found.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    fn tokens_of(&self, block: BlockId) -> &[u32] {
        let start = block.index() * self.block_size;
        let num_tokens = self.contents[block.index()].map_or(0, |(_, num_tokens)| num_tokens as usize);
        &self.tokens[start..start + num_tokens]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_found_by_hash_and_tokens_until_forgotten() {
        let root = BlockHash::root(b"model", b"");
        let hash = root.child(&[1, 2]);
        let mut cache = PrefixCache::new(4, 2);
        cache.insert(hash, &[1, 2], BlockId(3));
        assert_eq!(cache.find(&hash, &[1, 2]), Some(BlockId(3)));
        assert_eq!(cache.find(&hash, &[1, 3]), None, "a colliding hash must not be enough");
        cache.insert(hash, &[1, 2], BlockId(1));
        assert_eq!(cache.find(&hash, &[1, 2]), Some(BlockId(3)));
        cache.forget(BlockId(1));
        assert_eq!(cache.len(), 1);
        cache.forget(BlockId(3));
        assert!(cache.is_empty());
    }

    #[test]
    fn a_partial_block_is_found_by_its_own_tokens_alone() {
        let root = BlockHash::root(b"model", b"");
        let (full, tail) = (root.child(&[1, 2]), root.tail(&[1]));
        let mut cache = PrefixCache::new(4, 2);
        cache.insert(full, &[1, 2], BlockId(3));
        cache.insert(tail, &[1], BlockId(0));
        assert_eq!(cache.find(&tail, &[1]), Some(BlockId(0)));
        assert_eq!(cache.find(&tail, &[1, 0]), None);
        assert_eq!(cache.content(BlockId(0)), Some((&tail, &[1][..])));
        // The room of one that was full before.
        cache.forget(BlockId(3));
        cache.insert(root.tail(&[5]), &[5], BlockId(3));
        assert_eq!(cache.find(&root.tail(&[5]), &[5]), Some(BlockId(3)));
    }

    #[test]
    fn domains_and_orders_have_different_hashes() {
        let (a, b) = (BlockHash::root(b"model", b"a"), BlockHash::root(b"model", b"b"));
        assert_ne!(a, b);
        assert_ne!(BlockHash::root(b"mo", b"dela"), a);
        assert_ne!(a.child(&[1]).child(&[2]), a.child(&[2]).child(&[1]));
    }
}
