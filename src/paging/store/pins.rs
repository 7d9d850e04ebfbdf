//! Blocks that stay as long as somebody holds on to them, without a cube that names them yet.

use std::fmt;
use std::sync::Arc;

use super::BlockStore;
use crate::kv::BlockHash;

/// Keeps blocks of a store from being evicted while it lives.
pub struct PinnedBlocks {
    store: Arc<BlockStore>,
    hashes: Vec<BlockHash>,
    level: Option<u8>,
}

impl PinnedBlocks {
    /// A hold on nothing yet.
    pub fn new(store: Arc<BlockStore>) -> Self {
        Self { store, hashes: Vec::new(), level: None }
    }

    /// The same, whose blocks get room as those of a cube of this level; otherwise of level 5.
    pub fn at_level(mut self, level: u8) -> Self {
        self.level = Some(level);
        self
    }

    /// Holds on to a block as number `number`, unless it does already, and says whether it is there now.
    ///
    /// # Panics
    /// When the number is neither known nor the next one.
    pub fn hold(&mut self, number: usize, hash: BlockHash) -> bool {
        if number == self.hashes.len() {
            self.add(hash);
        }
        assert_eq!(self.hashes[number], hash, "a number has one block");
        self.store.contains(&hash)
    }

    /// Holds on to one more block, whether it is there yet or not.
    pub fn add(&mut self, hash: BlockHash) {
        self.store.pin_at(hash, self.level);
        self.hashes.push(hash);
    }

    /// What is held, in the order in which it was added.
    pub fn hashes(&self) -> &[BlockHash] {
        &self.hashes
    }
}

impl Drop for PinnedBlocks {
    fn drop(&mut self) {
        self.store.unpin(&self.hashes);
    }
}

impl fmt::Debug for PinnedBlocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PinnedBlocks({})", self.hashes.len())
    }
}

impl PartialEq for PinnedBlocks {
    fn eq(&self, other: &Self) -> bool {
        self.hashes == other.hashes
    }
}

impl Eq for PinnedBlocks {}
