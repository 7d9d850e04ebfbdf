//! The way bytes of device memory take to and from the host's files and tiers, beside the engine's thread.

use super::{KvLayout, Landing, LandingBlock};
use crate::{Result, unsupported};

/// Moves runs of bytes between device memory and code on the host, on the thread that calls it. Each I/O thread has one
/// of its own. Nobody else touches the run meanwhile: who owns the blocks sees to that.
pub trait Transfer: Send + 'static {
    /// Device memory.
    type Buffer;
    /// Host memory that copies can reach.
    type HostBuffer: AsRef<[u8]> + AsMut<[u8]>;
    /// A point in this thread's copies.
    type Event: Send + 'static;

    /// Zeroed host memory of so many blocks of `block_bytes` that lie one behind the other, or of fewer where the system gives
    /// no more, from which they can be brought up layer by layer ([`land`](Self::land)); `None` where that has no advantage
    /// or cannot be. That takes its time: page-locking some 64 MiB, milliseconds.
    fn allocate_host_blocks(&self, _num_blocks: usize, _block_bytes: usize) -> Result<Option<Vec<Self::HostBuffer>>> {
        Ok(None)
    }

    /// Lets `write` fill `bytes` of host memory, which then are bytes `[offset, offset + bytes)` of `target`. Returns
    /// when they are there; after an error, the target's or `write`'s own, the run holds anything.
    fn fill(
        &mut self,
        target: &Self::Buffer,
        offset: usize,
        bytes: usize,
        write: &mut dyn FnMut(&mut [u8]) -> Result<()>,
    ) -> Result<()>;

    /// Queues copies of whole blocks, the lowest layers of all of them first, and returns before they are done: a step that
    /// waits for an event may use the layers up to it. Nobody touches the sources before [`finish`](Self::finish) has
    /// returned, also after an error.
    ///
    /// # Errors
    /// `Unsupported` on devices without [`allocate_host_blocks`](Self::allocate_host_blocks); otherwise the blocks hold
    ///  anything once `finish` has returned.
    fn land(
        &mut self,
        _target: &Self::Buffer,
        _layout: &KvLayout,
        _blocks: &[LandingBlock<'_, Self::HostBuffer>],
    ) -> Result<Landing<Self::Event>> {
        Err(unsupported!("this device does not bring up blocks layer by layer; fill them"))
    }

    /// Returns when everything that was queued is there.
    ///
    /// # Errors
    /// When it is not, which is the device's own failure: steps may have used what is there instead.
    fn finish(&mut self) -> Result<()> {
        Ok(())
    }

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
