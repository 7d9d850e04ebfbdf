//! Memory of packed weights: many matrices in one mapping, so that small ones too lie in huge pages.
//!
//! A matrix of its own mapping gets huge pages only for the part that fills them, which for a small model is none of most
//! matrices; decoding reads all weights once a token and feels every page it has to look up.

#![allow(unsafe_code)]

use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::slice;
use std::sync::Arc;

use memmap2::MmapMut;

use super::memory::map_memory;
use crate::Result;

const HUGE_PAGE: usize = 2 << 20;
/// Of a mapping that matrices share. What is not yet used of it takes no memory.
const CHUNK_BYTES: usize = 32 * HUGE_PAGE;
/// Matrices begin at a page.
const ALIGNMENT: usize = 4096;

/// Hands out memory for matrices, one behind the other.
#[derive(Default)]
pub(super) struct WeightArena {
    chunk: Option<Arc<Chunk>>,
    used: usize,
}

/// Zeroed memory of one matrix. Nobody else has this part of its mapping, which goes when its last matrix goes.
pub(super) struct WeightMemory {
    chunk: Arc<Chunk>,
    offset: usize,
    len: usize,
}

/// A mapping that begins at a huge page.
struct Chunk {
    start: NonNull<u8>,
    len: usize,
    /// Owns what `start` points to; never dereferenced while the chunk lives.
    _mapping: MmapMut,
}

// SAFETY: plain memory, whose parts belong to one `WeightMemory` each.
unsafe impl Send for Chunk {}
// SAFETY: as for `Send`.
unsafe impl Sync for Chunk {}

impl Chunk {
    fn map(len: usize) -> Result<Self> {
        let mut mapping = map_memory(len.saturating_add(HUGE_PAGE), "weights")?;
        let slack = mapping.as_ptr().align_offset(HUGE_PAGE);
        let start = NonNull::from(&mut mapping[slack..]).cast();
        Ok(Self { start, len, _mapping: mapping })
    }
}

impl WeightArena {
    /// Memory of `bytes` for one matrix.
    pub(super) fn take(&mut self, bytes: usize) -> Result<WeightMemory> {
        let (chunk, offset) = match &self.chunk {
            Some(chunk) if bytes <= chunk.len - self.used => (Arc::clone(chunk), self.used),
            _ => (Arc::new(Chunk::map(bytes.max(CHUNK_BYTES))?), 0),
        };
        self.used = (offset + bytes).next_multiple_of(ALIGNMENT).min(chunk.len);
        self.chunk = Some(Arc::clone(&chunk));
        Ok(WeightMemory { chunk, offset, len: bytes })
    }
}

impl WeightMemory {
    /// Memory that shares its mapping with nobody.
    pub(super) fn alone(bytes: usize) -> Result<Self> {
        Ok(Self { chunk: Arc::new(Chunk::map(bytes)?), offset: 0, len: bytes })
    }
}

impl Deref for WeightMemory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: inside the chunk, and this part of it is reachable only through `self`.
        unsafe { slice::from_raw_parts(self.chunk.start.as_ptr().add(self.offset), self.len) }
    }
}

impl DerefMut for WeightMemory {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed alone.
        unsafe { slice::from_raw_parts_mut(self.chunk.start.as_ptr().add(self.offset), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matrices_lie_apart_and_start_as_zeros() {
        let mut arena = WeightArena::default();
        let sizes = [1, ALIGNMENT, CHUNK_BYTES - 3 * ALIGNMENT, ALIGNMENT + 1, CHUNK_BYTES + 1, 0, 7];
        let mut taken: Vec<_> = sizes.iter().map(|&bytes| arena.take(bytes).unwrap()).collect();
        for (number, memory) in taken.iter_mut().enumerate() {
            assert_eq!(memory.len(), sizes[number]);
            assert!(memory.iter().all(|&byte| byte == 0), "matrix {number}");
            memory.fill(number as u8 + 1);
        }
        for (number, memory) in taken.iter().enumerate() {
            assert!(memory.iter().all(|&byte| byte == number as u8 + 1), "matrix {number} was written by another");
        }
    }

    #[test]
    fn a_mapping_goes_with_its_last_matrix() {
        let mut arena = WeightArena::default();
        let (first, second) = (arena.take(8).unwrap(), arena.take(8).unwrap());
        let chunk = Arc::downgrade(&first.chunk);
        drop(first);
        drop(arena);
        assert_eq!(chunk.strong_count(), 1);
        drop(second);
        assert_eq!(chunk.strong_count(), 0);
    }
}
