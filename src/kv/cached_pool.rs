//! The blocks of one tier together with what they hold: a pool that finds blocks by content, alone or in groups.
//!
//! There is one order in which free blocks are taken, whatever they hold: that in which they were given back. A group
//! that loses a block is gone, so its others are taken next, and then what is of little use without it.
//!
//! Some blocks hold what must not lie about: they are *marked*. When the last one gives a marked block back it is not
//! free: nobody finds what it holds, and the pool keeps it to itself until its owner has zeroed it.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use super::groups::{BlockGroups, GroupId};
use super::{BlockHash, BlockId, BlockPool, Level, PrefixCache};
use crate::planted::{self, Bug};

/// A [`BlockPool`] whose free blocks can still be found by what they hold, until somebody takes them.
pub struct CachedPool {
    pool: BlockPool,
    contents: PrefixCache,
    /// By block: how hard it is held on to once it is free.
    levels: Vec<Level>,
    /// By block: whether it is to be zeroed before anybody else gets it.
    is_marked: Vec<bool>,
    /// Marked blocks that nobody uses any more; each has one reference, the pool's own.
    to_wipe: VecDeque<BlockId>,
    /// Those that are being zeroed; the same.
    wiping: HashSet<BlockId>,
    /// Blocks of the tier: the first so many. There is no memory for the others, so each is left one reference.
    num_usable: usize,
    num_retired: usize,
    groups: BlockGroups,
}

impl CachedPool {
    /// `num_blocks` free blocks of `block_size` tokens that hold nothing.
    pub fn new(num_blocks: usize, block_size: usize) -> Self {
        Self {
            pool: BlockPool::new(num_blocks),
            contents: PrefixCache::new(num_blocks, block_size),
            levels: vec![Level::default(); num_blocks],
            is_marked: vec![false; num_blocks],
            to_wipe: VecDeque::new(),
            wiping: HashSet::new(),
            num_usable: num_blocks,
            num_retired: 0,
            groups: BlockGroups::new(num_blocks),
        }
    }

    /// Blocks there are.
    pub fn num_blocks(&self) -> usize {
        self.num_usable
    }

    /// Takes note that there are only so many blocks. The others hold nothing; nobody gets them any more, and those that
    /// somebody holds are gone when they are given back.
    pub fn shrink(&mut self, num_blocks: usize) {
        for index in num_blocks..self.num_usable {
            let block = BlockId(index as u32);
            if self.pool.num_references(block) == 0 {
                self.pool.share(block);
                self.num_retired += 1;
            }
        }
        self.num_usable = self.num_usable.min(num_blocks);
    }

    /// Blocks nobody holds.
    pub fn num_free(&self) -> usize {
        self.pool.num_free()
    }

    /// Blocks that can be found.
    pub fn num_cached(&self) -> usize {
        self.contents.len()
    }

    /// Takes a block that holds nothing or, of those that are held on to least, the one that has been free longest; what it
    /// held cannot be found any more.
    pub fn allocate(&mut self) -> Option<BlockId> {
        let block = self.pool.allocate()?;
        if !planted::is(Bug::OldContentKept) {
            self.contents.forget(block);
        }
        if let Some(group) = self.groups.take(block) {
            self.dissolve(group);
        }
        self.levels[block.index()] = Level::default();
        Some(block)
    }

    /// Takes blocks that hold one thing together; `None` when there are not so many.
    pub fn allocate_group(&mut self, num_blocks: usize) -> Option<GroupId> {
        if num_blocks > self.num_free() {
            return None;
        }
        let blocks: Box<[BlockId]> = (0..num_blocks).map_while(|_| self.allocate()).collect();
        Some(self.groups.add(blocks))
    }

    /// The blocks of a group in the order in which they were taken; `None` once it is gone.
    pub fn group_blocks(&self, group: GroupId) -> Option<&[BlockId]> {
        self.groups.blocks(group)
    }

    /// Holds the blocks of a group once more; `false` when it is gone.
    pub fn hold_group(&mut self, group: GroupId) -> bool {
        let Some(blocks) = self.groups.blocks(group) else { return false };
        blocks.iter().for_each(|block| self.pool.share(*block));
        true
    }

    /// Gives the blocks of a group back, which stays whole until one of them is taken.
    pub fn release_group(&mut self, group: GroupId) {
        let blocks = self.groups.blocks(group).unwrap_or_default();
        blocks.iter().for_each(|block| self.pool.release(*block, Level::default()));
    }

    /// Ends a group that is free: its blocks are taken next.
    pub fn end_group(&mut self, group: GroupId) {
        self.dissolve(group);
    }

    /// Records that what a block holds is of little use without these groups.
    pub fn set_needs(&mut self, block: BlockId, groups: &Arc<[GroupId]>) {
        self.groups.set_needs(block, groups);
    }

    fn dissolve(&mut self, group: GroupId) {
        let (blocks, dependents) = self.groups.remove(group);
        dependents.into_iter().for_each(|block| self.pool.demote(block));
        blocks.iter().rev().for_each(|block| self.pool.demote(*block));
    }

    /// Has a held block held on to this hard once it is free.
    pub fn set_level(&mut self, block: BlockId, level: Level) {
        self.levels[block.index()] = level;
    }

    /// How hard a block is held on to once it is free.
    pub fn level(&self, block: BlockId) -> Level {
        self.levels[block.index()]
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

    /// Gives a block back. The last one to do so frees it as the most recently used one, or has it zeroed first.
    pub fn release(&mut self, block: BlockId) {
        let is_last = self.pool.num_references(block) == 1;
        if is_last && block.index() >= self.num_usable {
            self.num_retired += 1;
        } else if is_last && self.is_marked(block) {
            self.contents.forget(block);
            self.to_wipe.push_back(block);
        } else {
            let level = if self.content(block).is_some() { self.level(block) } else { Level::EMPTY };
            self.pool.release(block, level);
        }
    }

    /// Has a held block zeroed once nobody uses it.
    pub fn mark(&mut self, block: BlockId) {
        self.is_marked[block.index()] = true;
    }

    /// Whether that is so.
    pub fn is_marked(&self, block: BlockId) -> bool {
        self.is_marked[block.index()]
    }

    /// Has the block that holds `hash` zeroed, now or once nobody uses it; from now on nobody finds it. Returns that block.
    pub fn erase(&mut self, hash: &BlockHash) -> Option<BlockId> {
        let block = self.contents.block_of(hash)?;
        self.contents.forget(block);
        self.mark(block);
        if self.pool.num_references(block) == 0 {
            self.pool.share(block);
            self.to_wipe.push_back(block);
        }
        Some(block)
    }

    /// A block to be zeroed now; [`CachedPool::finish_wipe`] tells when it is.
    pub fn next_to_wipe(&mut self) -> Option<BlockId> {
        let block = self.to_wipe.pop_front()?;
        self.wiping.insert(block);
        Some(block)
    }

    /// Takes note that a block holds nothing any more, and frees it.
    pub fn finish_wipe(&mut self, block: BlockId) {
        assert!(self.wiping.remove(&block), "{block:?} was not being zeroed");
        self.is_marked[block.index()] = false;
        self.pool.release(block, Level::EMPTY);
    }

    /// Blocks that nobody uses and that are not zeroed yet.
    pub fn num_unwiped(&self) -> usize {
        self.to_wipe.len() + self.wiping.len()
    }

    /// Whether a block is one of those.
    pub fn is_wiping(&self, block: BlockId) -> bool {
        self.wiping.contains(&block) || self.to_wipe.contains(&block)
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

    /// Panics unless `num_held` blocks are held beside those that are being zeroed, each as often as counted. For tests and
    /// debug builds.
    pub fn check_integrity(&self, num_held: usize) {
        self.pool.check_integrity(num_held + self.num_unwiped() + self.num_retired);
        let is_hidden = |block: &BlockId| self.is_marked(*block) && self.content(*block).is_none();
        assert!(self.to_wipe.iter().all(is_hidden), "a block that is to be zeroed can be found");
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hash(number: usize) -> BlockHash {
        BlockHash::root(b"model", b"").child(&[number as u32])
    }

    #[test]
    fn a_marked_block_is_free_when_it_has_been_zeroed() {
        let mut pool = CachedPool::new(1, 1);
        let block = pool.allocate().unwrap();
        pool.insert(hash(1), &[1], block);
        pool.mark(block);
        pool.share(block);
        pool.release(block);
        assert_eq!((pool.find(&hash(1), &[1]), pool.next_to_wipe()), (Some(block), None), "somebody uses it");
        pool.release(block);
        assert_eq!((pool.find(&hash(1), &[1]), pool.allocate(), pool.num_unwiped()), (None, None, 1));
        assert_eq!(pool.next_to_wipe(), Some(block));
        pool.check_integrity(0);
        assert_eq!((pool.allocate(), pool.num_unwiped()), (None, 1), "it is being zeroed");
        pool.finish_wipe(block);
        assert_eq!((pool.allocate(), pool.is_marked(block), pool.num_unwiped()), (Some(block), false, 0));
    }

    #[test]
    fn blocks_that_are_not_there_are_given_to_nobody() {
        let mut pool = CachedPool::new(6, 1);
        let blocks: Vec<BlockId> = (0..4).filter_map(|_| pool.allocate()).collect();
        pool.release(blocks[2]);
        pool.shrink(2);
        pool.check_integrity(3);
        assert_eq!((pool.num_blocks(), pool.allocate()), (2, None));
        for block in [1, 3, 0] {
            pool.release(blocks[block]);
        }
        pool.check_integrity(0);
        assert_eq!(take_all(&mut pool), [blocks[1], blocks[0]]);
        pool.shrink(4);
        assert_eq!(pool.num_blocks(), 2);
    }

    #[test]
    fn what_is_erased_is_found_by_nobody_and_zeroed_when_nobody_uses_it() {
        let mut pool = CachedPool::new(2, 1);
        let [free, used] = [1, 2].map(|number| {
            let block = pool.allocate().unwrap();
            pool.insert(hash(number), &[number as u32], block);
            block
        });
        pool.release(free);
        assert_eq!((pool.erase(&hash(1)), pool.erase(&hash(2)), pool.erase(&hash(3))), (Some(free), Some(used), None));
        assert_eq!((pool.erase(&hash(1)), pool.num_cached()), (None, 0));
        assert_eq!((pool.next_to_wipe(), pool.next_to_wipe()), (Some(free), None));
        pool.release(used);
        assert_eq!(pool.next_to_wipe(), Some(used));
        pool.check_integrity(0);
    }

    #[test]
    fn what_is_held_on_to_least_goes_first_and_a_block_begins_anew_with_its_owner() {
        let mut pool = CachedPool::new(4, 1);
        let blocks: Vec<BlockId> = (0..4).filter_map(|_| pool.allocate()).collect();
        for (number, priority) in [(0, 9), (1, 2), (2, 5)] {
            pool.insert(hash(number), &[number as u32], blocks[number]);
            pool.set_level(blocks[number], Level::of_priority(priority));
        }
        blocks.iter().for_each(|block| pool.release(*block));
        assert_eq!(pool.allocate(), Some(blocks[3]), "it holds nothing");
        assert_eq!(pool.allocate(), Some(blocks[1]));
        assert_eq!(pool.level(blocks[1]), Level::default());
        assert_eq!((pool.allocate(), pool.allocate()), (Some(blocks[2]), Some(blocks[0])));
    }

    proptest! {
        #[test]
        fn no_block_is_handed_out_before_it_is_zeroed(operations in prop::collection::vec((0..6u8, 0..4usize), 0..200)) {
            let mut pool = CachedPool::new(4, 1);
            let (mut held, mut wiping, mut is_secret): (Vec<BlockId>, Vec<BlockId>, _) = (vec![], vec![], [false; 4]);
            for (operation, choice) in operations {
                match operation {
                    0 => if let Some(block) = pool.allocate() {
                        prop_assert!(!is_secret[block.index()]);
                        pool.insert(hash(choice), &[choice as u32], block);
                        held.push(block);
                    }
                    1 if !held.is_empty() => {
                        let block = held[choice % held.len()];
                        pool.mark(block);
                        is_secret[block.index()] = true;
                    }
                    2 if !held.is_empty() => pool.release(held.swap_remove(choice % held.len())),
                    3 => held.extend(pool.share_found(&hash(choice), &[choice as u32])),
                    4 => if let Some(block) = pool.erase(&hash(choice)) {
                        is_secret[block.index()] = true;
                    }
                    _ => match pool.next_to_wipe() {
                        Some(block) => wiping.push(block),
                        None => if let Some(block) = wiping.pop() {
                            is_secret[block.index()] = false;
                            pool.finish_wipe(block);
                        }
                    }
                }
                pool.check_integrity(held.len());
            }
        }
    }

    fn ids(blocks: &[u32]) -> Vec<BlockId> {
        blocks.iter().copied().map(BlockId).collect()
    }

    fn take_all(pool: &mut CachedPool) -> Vec<BlockId> {
        std::iter::from_fn(|| pool.allocate()).collect()
    }

    #[test]
    fn a_group_that_loses_a_block_is_gone_and_its_others_are_next() {
        let mut pool = CachedPool::new(6, 1);
        let group = pool.allocate_group(3).unwrap();
        assert_eq!(pool.group_blocks(group), Some(&ids(&[0, 1, 2])[..]));
        assert!(pool.allocate_group(4).is_none());
        pool.release_group(group);
        pool.check_integrity(0);
        // It was used last, so the others go first.
        assert_eq!((0..4).map(|_| pool.allocate().unwrap()).collect::<Vec<_>>(), ids(&[3, 4, 5, 0]));
        assert_eq!(pool.group_blocks(group), None);
        assert!(!pool.hold_group(group));
        pool.release(BlockId(5));
        assert_eq!(take_all(&mut pool), ids(&[1, 2, 5]));
        pool.check_integrity(6);
    }

    #[test]
    fn a_group_that_is_held_is_not_taken() {
        let mut pool = CachedPool::new(4, 1);
        let group = pool.allocate_group(2).unwrap();
        pool.release_group(group);
        assert!(pool.hold_group(group));
        assert_eq!(take_all(&mut pool), ids(&[2, 3]));
        assert!(pool.group_blocks(group).is_some());
        pool.check_integrity(4);
    }

    #[test]
    fn what_needs_a_group_that_is_gone_is_taken_before_what_does_not() {
        let mut pool = CachedPool::new(5, 1);
        let root = BlockHash::root(b"model", b"");
        let group = pool.allocate_group(1).unwrap();
        let needs: Arc<[GroupId]> = [group].into();
        for token in 1..5 {
            let block = pool.allocate().unwrap();
            pool.insert(root.child(&[token]), &[token], block);
            if token >= 3 {
                pool.set_needs(block, &needs);
            }
        }
        (1..4).for_each(|block| pool.release(BlockId(block)));
        pool.release_group(group);
        pool.end_group(group);
        // Block 4 needs it, too, but is held.
        assert_eq!(take_all(&mut pool), ids(&[0, 3, 1, 2]));
        // What is taken does not need anything any more.
        let again = pool.allocate_group(0).unwrap();
        pool.end_group(again);
        pool.check_integrity(5);
    }
}
