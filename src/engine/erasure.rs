//! Erasing what memory has of some blocks: nobody finds them from the moment that is asked for, and each is zeroed as soon as
//! nobody uses it. The engine's thread only says which; I/O threads write the zeros.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded};

use crate::kv::{BlockHash, BlockId, CachedPool};
use crate::paging::Pager;

/// Orders that wait for the engine's thread; who has a further one waits for that.
const MAX_ORDERS: usize = 16;

/// How often somebody who waits for the engine looks whether it is still there.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// The way of erasures to the engine's thread.
#[derive(Clone)]
pub(super) struct ErasureQueue {
    orders: Sender<Erasure>,
    /// Wakes an idle engine.
    waker: Sender<()>,
    /// The engine has looked at its queues for the last time.
    stopped: Arc<AtomicBool>,
}

/// Blocks that are to go.
pub(super) struct Erasure {
    hashes: Vec<BlockHash>,
    /// Device blocks that held them.
    blocks: Vec<BlockId>,
    /// Dropped when what can be done at once is done.
    _ended: Sender<()>,
}

impl ErasureQueue {
    pub(super) fn new(waker: Sender<()>, stopped: Arc<AtomicBool>) -> (Self, Receiver<Erasure>) {
        let (orders, receiver) = bounded(MAX_ORDERS);
        (Self { orders, waker, stopped }, receiver)
    }

    /// Returns when nobody finds the blocks in memory, none is on its way down any more, and those that nobody uses are
    /// zeroed; or when there is no engine.
    pub(super) fn erase(&self, hashes: Vec<BlockHash>) {
        let (ended_sender, ended) = bounded(0);
        if self.orders.send(Erasure { hashes, blocks: Vec::new(), _ended: ended_sender }).is_err() {
            return;
        }
        // A full channel means that a wake-up is already under way.
        let _ = self.waker.try_send(());
        while ended.recv_timeout(LOOK_AGAIN) == Err(RecvTimeoutError::Timeout) && !self.stopped.load(Ordering::SeqCst) {
        }
    }
}

impl Erasure {
    /// Does what can be done now; whether there is nothing left to wait for. Blocks in use are zeroed by who uses them last;
    /// those that are on their way up can be found, and erased, when they are there.
    pub(super) fn advance(
        &mut self,
        pool: &mut CachedPool,
        pager: &mut Pager,
        is_coming: impl Fn(&BlockHash) -> bool,
    ) -> bool {
        let mut is_settled = !self.hashes.iter().any(is_coming);
        for hash in &self.hashes {
            self.blocks.extend(pool.erase(hash));
            is_settled &= pager.erase(hash);
        }
        is_settled && pager.num_unwiped() == 0 && !self.blocks.iter().any(|block| pool.is_wiping(*block))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Device;
    use crate::backend::sim::SimBackend;
    use crate::paging::PagingConfig;

    #[test]
    fn blocks_on_their_way_up_are_erased_when_they_are_there() {
        const BLOCK_BYTES: usize = 64;
        let device = SimBackend::default();
        let blocks = device.allocate(2 * BLOCK_BYTES).unwrap();
        let (wake, _waker) = bounded(1);
        let config = PagingConfig {
            block_bytes: BLOCK_BYTES,
            block_size: 1,
            layout: None,
            num_host_blocks: 0,
            host_slab_bytes: 0,
            num_threads: 1,
            open: None,
        };
        let mut pager = Pager::start(&device, &blocks, 2, config, &wake).unwrap();
        let mut pool = CachedPool::new(2, 1);
        let hash = BlockHash::root(b"model", b"").child(&[1]);
        let mut erasure = Erasure { hashes: vec![hash], blocks: vec![], _ended: bounded(0).0 };
        assert!(!erasure.advance(&mut pool, &mut pager, |coming| *coming == hash), "it waits for what is on its way");
        let block = pool.allocate().unwrap();
        pool.insert(hash, &[1], block);
        assert!(erasure.advance(&mut pool, &mut pager, |_| false));
        assert_eq!(pool.find(&hash, &[1]), None, "and finds it when it is there");
    }
}
