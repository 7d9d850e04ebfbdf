//! The bytes of the host tier: blocks behind a lock each that is hardly ever contended, in memory that the device can reach
//! where it brings blocks up layer by layer, else in ordinary memory.
//!
//! Which block lies in which slot is known on the engine's thread alone; a slot is written by one copy at a time, which
//! holds it in the pager's pool, or read by several. Memory that the device can reach takes its time to be had, so the tier
//! grows by slabs of it, when a copy wants to fill a slot that has none. What the system does not give ends that for good.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use crate::Result;
use crate::kv::BlockId;

/// Bytes of a slab, unless others were asked for.
const SLAB_BYTES: usize = 64 << 20;

/// The bytes of all slots.
pub(super) struct HostArena<H> {
    slots: Vec<Mutex<Slot<H>>>,
    /// Slots of a slab.
    slab_len: usize,
    growth: Arc<Growth>,
    /// Held by who grows the tier.
    turn: Mutex<()>,
}

/// How far the tier has grown.
pub(super) struct Growth {
    /// Slots with memory: the first so many.
    num_ready: AtomicUsize,
    /// Slots that there can be, as far as is known.
    num_slots: AtomicUsize,
    is_pinned: AtomicBool,
}

/// The bytes of a block.
pub(super) enum Slot<H> {
    /// Gets its memory when it is first written.
    Ordinary(Vec<u8>),
    /// Copies to the device may read it after the call that asked for them.
    Pinned(H),
}

impl Growth {
    /// Slots that there can be: all that were wanted, or those for which there was memory.
    pub(super) fn num_slots(&self) -> usize {
        self.num_slots.load(Ordering::Acquire)
    }

    /// Whether copies to the device may read slots later; not known before one is filled.
    pub(super) fn is_pinned(&self) -> bool {
        self.is_pinned.load(Ordering::Acquire)
    }

    fn num_ready(&self) -> usize {
        self.num_ready.load(Ordering::Acquire)
    }
}

impl<H: AsRef<[u8]> + AsMut<[u8]>> HostArena<H> {
    /// Room for so many blocks, as far as there is memory. `slab_bytes` of it are taken at a time, 0 for the usual.
    pub(super) fn new(num_blocks: usize, block_bytes: usize, slab_bytes: usize) -> Self {
        let slab_bytes = if slab_bytes == 0 { SLAB_BYTES } else { slab_bytes };
        Self {
            slots: (0..num_blocks).map(|_| Mutex::new(Slot::Ordinary(Vec::new()))).collect(),
            slab_len: (slab_bytes / block_bytes.max(1)).max(1),
            growth: Arc::new(Growth {
                num_ready: AtomicUsize::new(0),
                num_slots: AtomicUsize::new(num_blocks),
                is_pinned: AtomicBool::new(false),
            }),
            turn: Mutex::default(),
        }
    }

    pub(super) fn growth(&self) -> &Arc<Growth> {
        &self.growth
    }

    pub(super) fn lock(&self, slot: BlockId) -> MutexGuard<'_, Slot<H>> {
        self.slots[slot.index()].lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Has the tier grow until it has memory for `slot`; `false` when there is none. `allocate(n)` gives buffers for `n`
    /// blocks or fewer, or none: at first that means ordinary memory for all, later the end.
    pub(super) fn grow_to(
        &self,
        slot: BlockId,
        mut allocate: impl FnMut(usize) -> Result<Option<Vec<H>>>,
    ) -> Result<bool> {
        let growth = &self.growth;
        if slot.index() < growth.num_ready() {
            return Ok(true);
        }
        let _turn = self.turn.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        loop {
            let (first, num_slots) = (growth.num_ready(), growth.num_slots());
            if slot.index() < first || first == num_slots {
                return Ok(slot.index() < first);
            }
            let wanted = self.slab_len.min(num_slots - first);
            match allocate(wanted)? {
                None if first == 0 => growth.num_ready.store(num_slots, Ordering::Release),
                None => growth.num_slots.store(first, Ordering::Release),
                Some(buffers) => self.add(first, buffers, wanted),
            }
        }
    }

    /// Adds memory for the slots from `first` on; where there is less than was wanted, it is the last.
    fn add(&self, first: usize, buffers: Vec<H>, wanted: usize) {
        let end = first + buffers.len().min(wanted);
        if end < first + wanted {
            self.growth.num_slots.store(end, Ordering::Release);
        }
        for (index, buffer) in (first..end).zip(buffers) {
            *self.lock(BlockId(index as u32)) = Slot::Pinned(buffer);
        }
        self.growth.is_pinned.store(true, Ordering::Release);
        self.growth.num_ready.store(end, Ordering::Release);
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Has an arena of ten slots, three to a slab, grow to each of `slots` with memory for `most` blocks. Whether it could,
    /// and what was asked for.
    fn grow(slots: &[u32], mut most: usize) -> (HostArena<Vec<u8>>, Vec<bool>, Vec<usize>) {
        let (arena, mut asked) = (HostArena::new(10, 4, 12), Vec::new());
        let allocate = |wanted: usize| {
            asked.push(wanted);
            let given = wanted.min(most);
            most -= given;
            Ok((given > 0).then(|| vec![vec![0; 4]; given]))
        };
        let grown = slots
            .iter()
            .map(|slot| BlockId(*slot))
            .scan(allocate, |allocate, slot| arena.grow_to(slot, &mut *allocate).ok());
        let grown = grown.collect();
        (arena, grown, asked)
    }

    #[test]
    fn memory_is_taken_by_the_slab_when_it_is_wanted() {
        let (arena, grown, asked) = grow(&[0, 2, 1], 100);
        assert_eq!((grown, asked), (vec![true; 3], vec![3]));
        assert!(arena.growth().is_pinned() && arena.growth().num_slots() == 10);
        assert!(matches!(&*arena.lock(BlockId(2)), Slot::Pinned(_)));
        assert!(matches!(&*arena.lock(BlockId(3)), Slot::Ordinary(_)));
        // A slot of a later slab wants those before it.
        let (_, grown, asked) = grow(&[9, 4], 100);
        assert_eq!((grown, asked), (vec![true; 2], vec![3, 3, 3, 1]));
    }

    #[test]
    fn what_cannot_be_had_ends_the_tier() {
        for (most, num_asked) in [(6, 3), (7, 3), (3, 2), (1, 1)] {
            let (arena, grown, asked) = grow(&[0, 9, 8, 0], most);
            assert_eq!(grown, [true, false, false, true]);
            assert_eq!((asked.len(), arena.growth().num_slots()), (num_asked, most));
        }
    }

    #[test]
    fn without_any_all_of_it_is_ordinary() {
        let (arena, grown, asked) = grow(&[1, 9], 0);
        assert_eq!((grown, asked), (vec![true; 2], vec![3]));
        assert!(!arena.growth().is_pinned() && arena.growth().num_slots() == 10);
    }
}
