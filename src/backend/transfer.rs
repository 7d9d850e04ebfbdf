//! The way bytes of device memory take to and from the host's files and tiers, beside the engine's thread.

use super::KvLayout;
use crate::Result;

/// Moves runs of bytes between device memory and code on the host, on the thread that calls it. Each I/O thread has one
/// of its own. Nobody else touches the run meanwhile: who owns the blocks sees to that.
pub trait Transfer: Send + 'static {
    /// Device memory.
    type Buffer;

    /// Lets `write` fill `bytes` of host memory, which then are bytes `[offset, offset + bytes)` of `target`. Returns
    /// when they are there; after an error, the target's or `write`'s own, the run holds anything.
    fn fill(
        &mut self,
        target: &Self::Buffer,
        offset: usize,
        bytes: usize,
        write: &mut dyn FnMut(&mut [u8]) -> Result<()>,
    ) -> Result<()>;

    /// Zeroes what a block holds behind its first `num_tokens` tokens, in host memory.
    fn clear_behind(layout: &KvLayout, block: &mut [u8], num_tokens: usize) {
        layout.clear_behind(block, num_tokens);
    }

    /// Shows bytes `[offset, offset + bytes)` of `source` to `read`.
    fn show(
        &mut self,
        source: &Self::Buffer,
        offset: usize,
        bytes: usize,
        read: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()>;
}
