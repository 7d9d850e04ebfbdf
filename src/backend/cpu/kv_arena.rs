//! The memory of all KV blocks, as kernels see it: one run of bytes, a block after another.

#![allow(unsafe_code)]

use std::marker::PhantomData;

use super::super::KvLayout;

/// All blocks. Kernels read and write numbers of it through raw pointers, so no reference to its bytes may live
/// meanwhile; the borrow sees to that.
pub struct KvArena<'a> {
    start: *mut u8,
    num_blocks: usize,
    layout: KvLayout,
    _borrow: PhantomData<&'a mut [u8]>,
}

// SAFETY: it stands for a `&mut [u8]`; tasks that write take `&KvArena` and write numbers that do not overlap.
unsafe impl Sync for KvArena<'_> {}
// SAFETY: as for `Sync`.
unsafe impl Send for KvArena<'_> {}

impl<'a> KvArena<'a> {
    /// The blocks of `layout` that fit into `bytes`.
    pub fn new(bytes: &'a mut [u8], layout: KvLayout) -> Self {
        let num_blocks = bytes.len() / layout.block_bytes();
        Self { start: bytes.as_mut_ptr(), num_blocks, layout, _borrow: PhantomData }
    }

    /// The same over memory that others may touch meanwhile, as long as they keep to other blocks than the kernels.
    ///
    /// # Safety
    /// `num_bytes` bytes from `start` on are there for `'a`, and nobody else touches the blocks that kernels are given.
    pub(super) unsafe fn from_raw(start: *mut u8, num_bytes: usize, layout: KvLayout) -> Self {
        Self { start, num_blocks: num_bytes / layout.block_bytes(), layout, _borrow: PhantomData }
    }

    /// Blocks there are.
    pub fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    /// Where the numbers of a block lie.
    pub fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// The first byte of a block. Reading and writing follow the rules of raw pointers: `layout().block_bytes()` bytes
    /// belong to the block, and no two threads may touch the same number when one of them writes.
    pub(super) fn block(&self, block: usize) -> *mut u8 {
        assert!(block < self.num_blocks, "block {block} of {} does not exist", self.num_blocks);
        // SAFETY: the block lies inside the borrowed bytes.
        unsafe { self.start.add(block * self.layout.block_bytes()) }
    }
}
