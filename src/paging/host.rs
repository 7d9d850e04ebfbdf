//! The bytes of the host tier: blocks in ordinary memory, each behind a lock of its own that is never contended.
//!
//! Which block lies in which slot is known on the engine's thread alone; a slot is written by one copy at a time, which
//! holds it in the pager's pool, or read by several.

use std::sync::{Mutex, MutexGuard};

use crate::kv::BlockId;

/// The bytes of all slots. A slot gets its memory when it is first written.
pub(super) struct HostArena(Vec<Mutex<Vec<u8>>>);

impl HostArena {
    pub(super) fn new(num_blocks: usize) -> Self {
        Self((0..num_blocks).map(|_| Mutex::default()).collect())
    }

    pub(super) fn lock(&self, slot: BlockId) -> MutexGuard<'_, Vec<u8>> {
        self.0[slot.index()].lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}
