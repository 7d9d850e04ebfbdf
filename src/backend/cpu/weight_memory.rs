//! Memory of packed weights: many matrices in one mapping, so that small ones too lie in huge pages.
//!
//! A matrix of its own mapping gets huge pages only for the part that fills them, which for a small model is none of most
//! matrices; decoding reads all weights once a token and feels every page it has to look up.

#![allow(unsafe_code)]

use std::ops::{Deref, DerefMut};

use super::memory::CpuBuffer;
use crate::Result;

const HUGE_PAGE: usize = 2 << 20;
/// Of a mapping that matrices share. What is not yet used of it takes no memory.
const CHUNK_BYTES: usize = 16 * HUGE_PAGE;
/// Matrices begin at a page.
const ALIGNMENT: usize = 4096;

/// Hands out memory for matrices, one behind the other.
#[derive(Default)]
pub(super) struct WeightArena {
    chunk: Option<CpuBuffer>,
    used: usize,
}

/// Zeroed memory of one matrix. Nobody else has this part of its mapping, which goes when its last matrix goes.
pub(super) struct WeightMemory {
    chunk: CpuBuffer,
    offset: usize,
    len: usize,
}

/// A mapping with room for `bytes` from a huge page on, and where that begins.
fn map_chunk(bytes: usize) -> Result<(CpuBuffer, usize)> {
    let chunk = CpuBuffer::allocate(bytes.saturating_add(HUGE_PAGE))?;
    let offset = chunk.start().align_offset(HUGE_PAGE);
    Ok((chunk, offset))
}

impl WeightArena {
    /// Memory of `bytes` for one matrix.
    pub(super) fn take(&mut self, bytes: usize) -> Result<WeightMemory> {
        let (chunk, offset) = match &self.chunk {
            Some(chunk) if bytes <= chunk.len() - self.used => (chunk.clone(), self.used),
            _ => map_chunk(bytes.max(CHUNK_BYTES))?,
        };
        self.used = (offset + bytes).next_multiple_of(ALIGNMENT).min(chunk.len());
        self.chunk = Some(chunk.clone());
        Ok(WeightMemory { chunk, offset, len: bytes })
    }
}

impl Deref for WeightMemory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: this part of the mapping is reachable only through `self`.
        unsafe { self.chunk.bytes(self.offset, self.len) }
    }
}

impl DerefMut for WeightMemory {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed alone.
        unsafe { self.chunk.bytes_mut(self.offset, self.len) }
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
}
