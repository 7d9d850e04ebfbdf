//! The bytes of the host tier: blocks behind a lock each that is hardly ever contended, in memory that the device can reach
//! where it brings blocks up layer by layer, else in ordinary memory.
//!
//! Which block lies in which slot is known on the engine's thread alone; a slot is written by one copy at a time, which
//! holds it in the pager's pool, or read by several.

use std::sync::{Mutex, MutexGuard};

use crate::Result;
use crate::backend::Device;
use crate::kv::BlockId;

/// The bytes of all slots.
pub(super) struct HostArena<H> {
    slots: Vec<Mutex<Slot<H>>>,
    is_pinned: bool,
}

/// The bytes of a block.
pub(super) enum Slot<H> {
    /// Gets its memory when it is first written.
    Ordinary(Vec<u8>),
    /// Copies to the device may read it after the call that asked for them.
    Pinned(H),
}

impl<H: AsRef<[u8]> + AsMut<[u8]>> HostArena<H> {
    /// Room for so many blocks, or for as many as can be page-locked.
    pub(super) fn new<D: Device<HostBuffer = H>>(device: &D, num_blocks: usize, block_bytes: usize) -> Result<Self> {
        let pinned = match num_blocks {
            0 => None,
            _ => device.allocate_host_blocks(num_blocks, block_bytes)?,
        };
        let is_pinned = pinned.is_some();
        let slots = match pinned {
            Some(buffers) => buffers.into_iter().map(|buffer| Mutex::new(Slot::Pinned(buffer))).collect(),
            None => (0..num_blocks).map(|_| Mutex::new(Slot::Ordinary(Vec::new()))).collect(),
        };
        Ok(Self { slots, is_pinned })
    }

    /// Blocks that there is room for.
    pub(super) fn num_slots(&self) -> usize {
        self.slots.len()
    }

    /// Whether copies to the device may read slots later.
    pub(super) fn is_pinned(&self) -> bool {
        self.is_pinned
    }

    pub(super) fn lock(&self, slot: BlockId) -> MutexGuard<'_, Slot<H>> {
        self.slots[slot.index()].lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl<H: AsRef<[u8]> + AsMut<[u8]>> Slot<H> {
    /// What it holds; nothing before it was first written, if it is ordinary.
    pub(super) fn bytes(&self) -> &[u8] {
        match self {
            Self::Ordinary(bytes) => bytes,
            Self::Pinned(buffer) => buffer.as_ref(),
        }
    }

    /// Puts a block there.
    pub(super) fn write(&mut self, block: &[u8]) {
        match self {
            Self::Ordinary(bytes) => {
                bytes.clear();
                bytes.extend_from_slice(block);
            }
            Self::Pinned(buffer) => buffer.as_mut().copy_from_slice(block),
        }
    }

    /// Zeroes it.
    pub(super) fn clear(&mut self) {
        match self {
            Self::Ordinary(bytes) => bytes.fill(0),
            Self::Pinned(buffer) => buffer.as_mut().fill(0),
        }
    }
}
