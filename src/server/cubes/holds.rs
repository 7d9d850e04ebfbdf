//! How hard the disk tier holds on to the blocks of cubes: those whose cube is being written down are pinned for a while,
//! those that cubes name as hard as the hardest of these says.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::kv::{BlockHash, Level};
use crate::memory::{Catalog, Priority};
use crate::paging::BlockStore;

/// Blocks that no cube names are kept for so long after they were asked for: somebody is writing the cube down.
const GRACE: Duration = Duration::from_secs(60);

/// How a block is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hold {
    /// Until it is named, or the time is over.
    Since(Instant),
    Level(u8),
    Pinned,
}

/// All blocks that are held.
#[derive(Default)]
pub(super) struct Holds(HashMap<BlockHash, Hold>);

impl Holds {
    /// Holds on to all that the catalog names, as [`hold_all`] has told the store.
    pub(super) fn of(catalog: &Catalog) -> Self {
        let named = catalog.block_references().into_iter();
        Self(named.filter_map(|hash| Some((hash, Hold::from(catalog.priority_of(&hash)?)))).collect())
    }

    /// Keeps blocks until the catalog names them, and lets go of those that it never came to name.
    pub(super) fn keep(&mut self, store: &BlockStore, catalog: &Catalog, blocks: impl Iterator<Item = BlockHash>) {
        let now = Instant::now();
        for hash in blocks {
            self.set(Some(store), hash, Some(Hold::Since(now)));
        }
        let is_over = |hold: &Hold| matches!(hold, Hold::Since(since) if now - *since > GRACE);
        let over: Vec<BlockHash> = self.0.iter().filter(|(_, hold)| is_over(hold)).map(|(hash, _)| *hash).collect();
        over.into_iter().for_each(|hash| self.set(Some(store), hash, catalog.priority_of(&hash).map(Hold::from)));
    }

    /// Takes note that cubes which name these blocks were made, changed or deleted. A store that is not open yet is told when
    /// it is.
    pub(super) fn settle(
        &mut self,
        store: Option<&BlockStore>,
        catalog: &Catalog,
        blocks: impl Iterator<Item = BlockHash>,
    ) {
        for hash in blocks {
            let named = catalog.priority_of(&hash).map(Hold::from);
            // One that nobody names any more somebody else may be about to.
            if named.is_some() || !matches!(self.0.get(&hash), Some(Hold::Since(_))) {
                self.set(store, hash, named);
            }
        }
    }

    /// Whether anybody holds on to a block.
    pub(super) fn has(&self, hash: &BlockHash) -> bool {
        self.0.contains_key(hash)
    }

    /// The new hold begins before the old one ends.
    fn set(&mut self, store: Option<&BlockStore>, hash: BlockHash, hold: Option<Hold>) {
        let before = match hold {
            Some(hold) => self.0.insert(hash, hold),
            None => self.0.remove(&hash),
        };
        let Some(store) = store else { return };
        let is_pin = |hold: Option<Hold>| matches!(hold, Some(Hold::Since(_) | Hold::Pinned));
        if is_pin(hold) && !is_pin(before) {
            store.pin(&[hash]);
        }
        let level = if let Some(Hold::Level(level)) = hold { Some(level) } else { None };
        store.set_level(&[hash], level);
        if is_pin(before) && !is_pin(hold) {
            store.unpin(&[hash]);
        }
    }
}

impl From<Priority> for Hold {
    fn from(priority: Priority) -> Self {
        match priority {
            Priority::Pinned => Self::Pinned,
            Priority::Level(level) => Self::Level(level.get()),
        }
    }
}

/// How hard memory holds on to blocks of a cube with this priority.
pub(in crate::server) fn level_of(priority: Priority) -> Level {
    match priority {
        Priority::Pinned => Level::PINNED,
        Priority::Level(level) => Level::of_priority(level.get()),
    }
}

/// Has a store that was just opened hold on to all that the catalog names.
pub fn hold_all(store: &BlockStore, catalog: &Catalog) {
    for hash in catalog.block_references() {
        match catalog.priority_of(&hash) {
            Some(Priority::Level(level)) => store.set_level(&[hash], Some(level.get())),
            Some(Priority::Pinned) => store.pin(&[hash]),
            None => {}
        }
    }
}
