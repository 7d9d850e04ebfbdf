//! One launch: a kernel over a grid, its blocks on the threads of the host.

use super::cluster::Worker;
use super::isa::{Kernel, LOCAL_WINDOW};
use super::lanes::LANES;
use super::shared::Shared;
use super::simd::Simd;
use crate::counters::Counters;
use crate::fault::Fault;
use crate::memory::{Accessor, InUse, Memory};
use crate::rng::Rng;
use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// For each atomic's address, the fences of each block that were published there.
pub type Released = Mutex<HashMap<u64, HashMap<u32, u32>>>;

/// Other threads join only if the blocks so far suggest that this much work is left.
const WORTH_A_THREAD: Duration = Duration::from_millis(2);
/// Tags per block of kernels with fences, as a shift: 15 fences are told apart.
const FENCE_SHIFT: u32 = 4;

/// Everything the blocks of a launch share.
pub struct Launch<'a> {
    /// The kernel.
    pub kernel: &'a Kernel,
    /// Device memory.
    pub memory: &'a Memory,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Dynamic shared memory, bytes.
    pub dynamic_shared: u32,
    /// Parameter buffer.
    pub params: &'a [u8],
    /// How accesses are signed.
    pub by: Accessor,
    /// Order of blocks and warps; 0 is the natural order.
    pub seed: u64,
    /// Lane loops.
    pub simd: &'a Simd,
    /// Publications between blocks.
    pub released: Released,
    stop: AtomicBool,
    /// Nothing is freed meanwhile.
    _in_use: InUse<'a>,
}

impl<'a> Launch<'a> {
    /// A launch over `memory`; `by` carries the stream operation.
    pub fn new(
        kernel: &'a Kernel,
        memory: &'a Memory,
        (grid, block, dynamic_shared): ([u32; 3], [u32; 3], u32),
        params: &'a [u8],
        mut by: Accessor,
        seed: u64,
        simd: &'a Simd,
    ) -> Self {
        by.tag_shift = if kernel.has_fence { FENCE_SHIFT } else { 0 };
        let blocks: u64 = grid.iter().map(|&n| u64::from(n)).product();
        let (tag_base, _in_use) = memory.take_tags(blocks << by.tag_shift);
        (by.tag_base, by.tag) = (tag_base, tag_base);
        let (released, stop) = (Mutex::default(), AtomicBool::new(false));
        Self { kernel, memory, grid, block, dynamic_shared, params, by, seed, simd, released, stop, _in_use }
    }

    /// Threads of a block.
    pub fn threads(&self) -> u32 {
        self.block.iter().product()
    }

    /// The thread index of a linear thread number.
    pub fn thread(&self, linear: u32) -> [u32; 3] {
        let [x, y, _] = self.block;
        [linear % x, linear / x % y, linear / x / y]
    }

    /// Where in the grid a block of a cluster lies.
    pub(super) fn block_of(&self, cluster: u32, rank: u32) -> [u32; 3] {
        let sizes = self.kernel.cluster;
        let [x, y, _] = std::array::from_fn(|axis| self.grid[axis] / sizes[axis]);
        let first = [cluster % x, cluster / x % y, cluster / x / y];
        let inside = [rank % sizes[0], rank / sizes[0] % sizes[1], rank / sizes[0] / sizes[1]];
        std::array::from_fn(|axis| first[axis] * sizes[axis] + inside[axis])
    }

    /// Whether another block has found an error.
    pub fn is_stopped(&self) -> bool {
        self.stop.load(Relaxed)
    }

    /// Makes shared memory for a worker of some that it may have had before.
    pub(super) fn prepare(&self, shared: &mut Shared) {
        let kernel = self.kernel;
        let first = kernel.shared.first().map_or(kernel.dynamic_offset, |v| v.offset);
        let mut unowned = vec![(0, first)];
        for (i, var) in kernel.shared.iter().enumerate() {
            let next = kernel.shared.get(i + 1).map_or(kernel.dynamic_offset, |v| v.offset);
            unowned.push((var.offset + var.bytes, next));
        }
        let end = kernel.dynamic_offset + self.dynamic_shared;
        unowned.retain(|(start, end)| start < end);
        shared.prepare(end, unowned, kernel);
    }

    /// The zero-terminated text at a device address, for assertion messages.
    pub fn text(&self, address: u64) -> String {
        let mut bytes = Vec::new();
        for at in address..address.saturating_add(200).min(LOCAL_WINDOW) {
            match self.memory.resolve(at, 1) {
                // SAFETY: `resolve` found the byte in a live allocation.
                Ok(a) => match unsafe { *a.data(at - a.base) } {
                    0 => break,
                    byte => bytes.push(byte),
                },
                Err(_) => break,
            }
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Runs every cluster of blocks, on so many threads at most.
    ///
    /// # Errors
    /// The first finding of any block.
    pub fn run(&self, threads: usize) -> Result<Counters, Fault> {
        let clusters = self.grid.iter().product::<u32>() / self.kernel.cluster_size();
        let mut order: Vec<u32> = (0..clusters).collect();
        Rng::new(self.seed).shuffle(&mut order, self.seed != 0);
        let next = AtomicU32::new(0);
        let threads = threads.min(clusters as usize);
        let start = Instant::now();
        let mut counters = Counters { launches: 1, ..Counters::default() };
        let mut first = Worker::new(self);
        let mut outcome = self.take_one(&mut first, &order, &next).map(|_| ());
        if outcome.is_ok() && threads > 1 && start.elapsed() * (clusters - 1) > WORTH_A_THREAD {
            let others: Result<Vec<Counters>, Fault> = std::thread::scope(|scope| {
                let help = || {
                    let mut worker = Worker::new(self);
                    self.take_all(&mut worker, &order, &next).map(|()| worker.counters())
                };
                let handles: Vec<_> = (1..threads).map(|_| scope.spawn(help)).collect();
                outcome = self.take_all(&mut first, &order, &next);
                handles.into_iter().map(|h| h.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
            });
            outcome?;
            others?.into_iter().for_each(|other| counters += other);
        } else {
            outcome?;
            self.take_all(&mut first, &order, &next)?;
        }
        counters += first.counters();
        Ok(counters)
    }

    fn take_one<'b>(&'b self, worker: &mut Worker<'b>, order: &[u32], next: &AtomicU32) -> Result<bool, Fault> {
        let Some(&linear) = order.get(next.fetch_add(1, Relaxed) as usize) else { return Ok(false) };
        if self.is_stopped() {
            return Ok(false);
        }
        worker.run(linear).inspect_err(|_| self.stop.store(true, Relaxed))?;
        Ok(true)
    }

    fn take_all<'b>(&'b self, worker: &mut Worker<'b>, order: &[u32], next: &AtomicU32) -> Result<(), Fault> {
        while self.take_one(worker, order, next)? {}
        Ok(())
    }
}

/// Threads of the host for all that runs: `SOFTGPU_THREADS` or all.
pub fn host_threads() -> usize {
    static COUNT: std::sync::OnceLock<usize> = std::sync::OnceLock::new();
    *COUNT.get_or_init(|| {
        let wanted = std::env::var("SOFTGPU_THREADS").ok().and_then(|n| n.parse().ok());
        wanted.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from)).clamp(1, 64)
    })
}

/// Warps of a launch shape, for messages and limits.
pub fn warps(threads: u32) -> u32 {
    threads.div_ceil(LANES as u32)
}
