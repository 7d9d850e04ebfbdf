//! Blocks that hold one thing together, and blocks whose content is of little use without it.
//!
//! A group is whole or gone: who takes one of its blocks for something else takes its content. What it holds is for
//! others to know.

use std::collections::HashMap;
use std::sync::Arc;

use super::BlockId;

/// A group, for as long as there is one; never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GroupId(u64);

/// Which blocks form groups.
pub(super) struct BlockGroups {
    blocks: HashMap<GroupId, Box<[BlockId]>>,
    /// By block, the group it is of.
    owners: Vec<Option<GroupId>>,
    /// By block, the groups without which its content is of little use.
    needs: Vec<Option<Arc<[GroupId]>>>,
    num_made: u64,
}

impl BlockGroups {
    /// No groups among `num_blocks` blocks.
    pub(super) fn new(num_blocks: usize) -> Self {
        Self { blocks: HashMap::new(), owners: vec![None; num_blocks], needs: vec![None; num_blocks], num_made: 0 }
    }

    /// Makes a group of blocks that are in none.
    pub(super) fn add(&mut self, blocks: Box<[BlockId]>) -> GroupId {
        self.num_made += 1;
        let group = GroupId(self.num_made);
        blocks.iter().for_each(|block| self.owners[block.index()] = Some(group));
        self.blocks.insert(group, blocks);
        group
    }

    /// The blocks of a group, in the order in which it was given them; `None` when it is gone.
    pub(super) fn blocks(&self, group: GroupId) -> Option<&[BlockId]> {
        self.blocks.get(&group).map(|blocks| &**blocks)
    }

    /// Records that a block's content is of little use without these groups.
    pub(super) fn set_needs(&mut self, block: BlockId, groups: &Arc<[GroupId]>) {
        self.needs[block.index()] = Some(Arc::clone(groups));
    }

    /// Takes note that a block is taken for something else, and says which group is gone for that.
    pub(super) fn take(&mut self, block: BlockId) -> Option<GroupId> {
        self.needs[block.index()] = None;
        self.owners[block.index()]
    }

    /// Forgets a group. Its blocks, and those whose content needed it.
    pub(super) fn remove(&mut self, group: GroupId) -> (Box<[BlockId]>, Vec<BlockId>) {
        let blocks = self.blocks.remove(&group).unwrap_or_default();
        blocks.iter().for_each(|block| self.owners[block.index()] = None);
        let needs_it = |needs: &Option<Arc<[GroupId]>>| needs.as_ref().is_some_and(|groups| groups.contains(&group));
        let dependents = self.needs.iter().enumerate().filter(|(_, needs)| needs_it(needs));
        (blocks, dependents.map(|(index, _)| BlockId(index as u32)).collect())
    }
}
