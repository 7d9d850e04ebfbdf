//! Shared memory of one block and its shadow.
//!
//! Each byte has a cell: the last writer (epoch, atomic or not, warp) and the last reader (epoch, warp). The epoch counts
//! barriers; it goes on from block to block and from launch to launch, so a cell from before the block is uninitialised. Two
//! warps that touch a byte in the same epoch, one of them writing and not both atomically, race.

use super::async_proxy::AsyncProxy;
use super::isa::Kernel;
use super::peer_reads::PeerReads;
use crate::fault::{Fault, FaultKind};

const WARP_BITS: u32 = 6;
const ATOMIC: u32 = 1 << WARP_BITS;
pub(super) const EPOCH_SHIFT: u32 = WARP_BITS + 1;
pub(super) const MANY: u32 = (1 << WARP_BITS) - 1;
const EPOCH_MAX: u32 = (1 << (32 - EPOCH_SHIFT)) - 2;
/// Epoch of bytes that a `cp.async` will write.
const PENDING: u32 = EPOCH_MAX + 1;
const UNOWNED: u64 = u64::MAX;
/// The end of a chain of words in one bank.
const NO_WORD: usize = usize::MAX;

/// Shared memory and its cells.
#[derive(Debug, Default)]
pub struct Shared {
    /// As many as any launch has wanted; this one has the first `bytes`.
    data: Vec<u8>,
    cells: Vec<u64>,
    bytes: usize,
    unowned: Vec<(u32, u32)>,
    epoch: u32,
    block_start: u32,
    /// The epoch that began with the block or with the last barrier of its cluster.
    cluster_start: u32,
    proxy: AsyncProxy,
    peers: PeerReads,
}

type Checked<T> = Result<T, Fault>;

impl Shared {
    /// Makes it memory of `bytes`, of which the ranges in `unowned` (start, end) belong to no variable, whatever it was
    /// before: what no launch has spoiled may serve the next one. `kernel` says who reads it besides the block's own threads.
    pub fn prepare(&mut self, bytes: u32, unowned: Vec<(u32, u32)>, kernel: &Kernel) {
        self.mark_unowned(0);
        self.bytes = bytes as usize;
        if self.bytes > self.cells.len() {
            self.data.resize(self.bytes, 0);
            self.cells.resize(self.bytes, 0);
        }
        self.unowned = unowned;
        self.mark_unowned(UNOWNED);
        self.proxy.prepare(self.bytes, kernel.has_wgmma);
        self.peers.prepare(self.bytes, kernel.has_peer_loads);
    }

    fn mark_unowned(&mut self, cell: u64) {
        for &(start, end) in &self.unowned {
            self.cells[start as usize..end as usize].fill(cell);
        }
    }

    fn clear(&mut self) {
        self.cells.fill(0);
        self.mark_unowned(UNOWNED);
        self.proxy.clear();
        (self.epoch, self.block_start, self.cluster_start) = (1, 1, 1);
    }

    /// Begins a block: everything is uninitialised again.
    pub fn begin_block(&mut self) {
        if self.epoch >= EPOCH_MAX / 2 {
            self.clear();
        }
        self.epoch += 1;
        (self.block_start, self.cluster_start) = (self.epoch, self.epoch);
        self.proxy.begin_block();
        self.peers.next_phase();
    }

    /// A barrier has completed.
    pub fn next_epoch(&mut self) {
        self.epoch += 1;
    }

    /// A barrier of the cluster has completed.
    pub fn next_phase(&mut self) {
        self.next_epoch();
        self.cluster_start = self.epoch;
        self.peers.next_phase();
    }

    /// Checks that nobody needs it any more once the block has exited.
    pub fn check_exit(&self) -> Checked<()> {
        self.peers.check_exit()
    }

    /// Size, bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    #[inline(always)]
    fn range(&self, address: u64, bytes: u64) -> Checked<std::ops::Range<usize>> {
        if address + bytes > self.bytes as u64 {
            return Err(explain_range(address, bytes, self.bytes));
        }
        Ok(address as usize..(address + bytes) as usize)
    }

    /// Reads for one lane of `warp`.
    #[inline(always)]
    pub fn read<const WIDTH: usize>(&mut self, address: u64, warp: u32) -> Checked<&[u8; WIDTH]> {
        let (start, epochs) = (self.range(address, WIDTH as u64)?.start, (self.block_start, self.epoch));
        let cells: &mut [u64; WIDTH] = chunk(&mut self.cells, start);
        // Nearly always the bytes have one history, and often this warp has read them before.
        match uniform(cells).and_then(|cell| Some((cell, after_read(cell, epochs, warp)?))) {
            Some((cell, cell_now)) if cell == cell_now => {}
            Some((_, cell_now)) => *cells = [cell_now; WIDTH],
            None => read_each(cells, address, epochs, warp)?,
        }
        Ok(chunk(&mut self.data, start))
    }

    /// Reads for block `by` of the cluster: what was written before the last barrier of the cluster.
    pub fn read_for_peer(&mut self, address: u64, bytes: u64, by: u32) -> Checked<&[u8]> {
        let range = self.range(address, bytes)?;
        for (&cell, at) in self.cells[range.clone()].iter().zip(address..) {
            let written = cell as u32 >> EPOCH_SHIFT;
            if written < self.block_start || written >= self.cluster_start {
                return Err(explain_peer_read(cell, at, self.block_start, by));
            }
        }
        self.peers.read(address as u32, bytes as u32, by);
        Ok(&self.data[range])
    }

    /// Reads 16 bytes for `wgmma` of `warp`, which may do so until [`Shared::end_read`].
    #[inline(always)]
    pub fn begin_read(&mut self, address: u32, warp: u32) -> Checked<&[u8; 16]> {
        let start = self.range(u64::from(address), 16)?.start;
        if !self.proxy.is_seen(address, self.epoch) {
            self.look(address, warp)?;
        }
        self.proxy.begin(address);
        Ok(chunk(&mut self.data, start))
    }

    /// The wait for a read has come: it may have happened as late as now.
    #[inline(always)]
    pub fn end_read(&mut self, address: u32, warp: u32) {
        self.proxy.end(address, self.epoch << EPOCH_SHIFT | warp);
    }

    /// Checks that `wgmma` of `warp` may read 16 bytes, and whether every warp may in this epoch.
    fn look(&mut self, address: u32, warp: u32) -> Checked<()> {
        let (first, epochs) = (address as usize, (self.block_start, self.epoch));
        let cells: &[u64; 16] = chunk(&mut self.cells, first);
        let mut is_old = true;
        let checked = if uniform(cells).is_some() { &cells[..1] } else { cells };
        for (&cell, at) in checked.iter().zip(u64::from(address)..) {
            if after_read(cell, epochs, warp).is_none() {
                return Err(explain_read(cell, at, epochs, warp));
            }
            is_old &= cell as u32 >> EPOCH_SHIFT != self.epoch;
        }
        is_old &= self.proxy.check_fences(address, warp, self.epoch)?;
        if is_old {
            self.proxy.see(address, self.epoch);
        }
        Ok(())
    }

    /// `lanes` of a warp make what they wrote visible to the async proxy.
    pub fn proxy_fence(&mut self, warp: u32, lanes: u32) {
        self.proxy.fence(warp, lanes, self.epoch);
    }

    /// Checks that no reader of another kind than the block's own threads is in the way of a write of `warp`.
    #[inline(always)]
    fn claim_from_others(&mut self, address: u64, bytes: u64, warp: u32) -> Checked<()> {
        self.peers.claim(address, bytes, warp)?;
        self.proxy.claim(address, bytes, self.epoch << EPOCH_SHIFT | warp)
    }

    /// Writes for a lane of a warp.
    #[inline(always)]
    pub fn write<const WIDTH: usize>(
        &mut self,
        address: u64,
        value: &[u8; WIDTH],
        (warp, lane): (u32, usize),
    ) -> Checked<()> {
        let start = self.range(address, WIDTH as u64)?.start;
        self.claim_from_others(address, WIDTH as u64, warp)?;
        let mine = self.epoch << EPOCH_SHIFT | warp;
        let cells: &mut [u64; WIDTH] = chunk(&mut self.cells, start);
        claim(cells, address, self.epoch, warp)?;
        *cells = [u64::from(mine); WIDTH];
        *chunk(&mut self.data, start) = *value;
        self.proxy.wrote(address, WIDTH as u64, (warp, lane));
        Ok(())
    }

    /// Bytes for an atomic operation of a lane of a warp; other atomics in the same epoch do not race with it.
    pub fn atomic(&mut self, address: u64, bytes: u64, (warp, lane): (u32, usize)) -> Checked<&mut [u8]> {
        let range = self.range(address, bytes)?;
        self.claim_from_others(address, bytes, warp)?;
        for (i, cell) in self.cells[range.clone()].iter_mut().enumerate() {
            let writer = *cell as u32;
            let written = writer >> EPOCH_SHIFT;
            let others = written == self.epoch && writer & MANY != warp;
            if written < self.block_start || written > self.epoch || (others && writer & ATOMIC == 0) {
                return Err(explain_read(*cell, address + i as u64, (self.block_start, self.epoch), warp));
            }
            let who = if others { MANY } else { warp };
            *cell = u64::from(self.epoch << EPOCH_SHIFT | ATOMIC | who);
        }
        self.proxy.wrote(address, bytes, (warp, lane));
        Ok(&mut self.data[range])
    }

    /// Takes the target of a `cp.async`: nobody may use it until [`Shared::land`].
    #[inline(always)]
    pub fn reserve<const WIDTH: usize>(&mut self, address: u64, warp: u32) -> Checked<()> {
        let start = self.range(address, WIDTH as u64)?.start;
        self.claim_from_others(address, WIDTH as u64, warp)?;
        let mine = self.epoch << EPOCH_SHIFT | warp;
        let cells: &mut [u64; WIDTH] = chunk(&mut self.cells, start);
        claim(cells, address, self.epoch, warp)?;
        // The other half keeps when it was issued.
        *cells = [u64::from(mine) << 32 | u64::from(PENDING << EPOCH_SHIFT | warp); WIDTH];
        Ok(())
    }

    /// A `cp.async` of a lane of a warp arrives at its wait.
    pub fn land(&mut self, address: u64, value: &[u8], (warp, lane): (u32, usize)) {
        let range = address as usize..address as usize + value.len();
        self.cells[range.clone()].fill(u64::from(self.epoch << EPOCH_SHIFT | warp));
        self.data[range].copy_from_slice(value);
        self.proxy.wrote(address, value.len() as u64, (warp, lane));
    }
}

/// The `WIDTH` things that begin at `start`, a range that was checked.
#[inline(always)]
fn chunk<T, const WIDTH: usize>(all: &mut [T], start: usize) -> &mut [T; WIDTH] {
    all[start..].first_chunk_mut().expect("shared memory has all bytes of a checked range")
}

/// The cell after a read by `warp`, or `None` if the read is wrong.
#[inline(always)]
fn after_read(cell: u64, (block_start, epoch): (u32, u32), warp: u32) -> Option<u64> {
    let (writer, reader) = (cell as u32, (cell >> 32) as u32);
    let (written, mine) = (writer >> EPOCH_SHIFT, epoch << EPOCH_SHIFT | warp);
    if written < block_start || written > epoch || (written == epoch && writer & MANY != warp) {
        return None;
    }
    let reader = if reader >> EPOCH_SHIFT == epoch && reader & MANY != warp { mine | MANY } else { mine };
    Some(u64::from(reader) << 32 | u64::from(writer))
}

/// A read of bytes with several histories.
fn read_each(cells: &mut [u64], address: u64, epochs: (u32, u32), warp: u32) -> Checked<()> {
    for (cell, at) in cells.iter_mut().zip(address..) {
        let Some(cell_now) = after_read(*cell, epochs, warp) else {
            return Err(explain_read(*cell, at, epochs, warp));
        };
        *cell = cell_now;
    }
    Ok(())
}

/// Checks that `warp` may write the bytes that begin at `address`.
#[inline(always)]
fn claim(cells: &[u64], address: u64, epoch: u32, warp: u32) -> Checked<()> {
    let checked = if uniform(cells).is_some() { &cells[..1] } else { cells };
    for (&cell, at) in checked.iter().zip(address..) {
        check_write(cell, epoch, warp, at)?;
    }
    Ok(())
}

#[inline(always)]
fn check_write(cell: u64, epoch: u32, warp: u32, address: u64) -> Checked<()> {
    let (writer, reader) = (cell as u32, (cell >> 32) as u32);
    let raced = |tag: u32| tag >> EPOCH_SHIFT == epoch && tag & MANY != warp;
    if writer >> EPOCH_SHIFT > epoch || raced(writer) || raced(reader) {
        return Err(explain_write(cell, epoch, address, warp));
    }
    Ok(())
}

/// The value that all cells have, or `None`.
#[inline(always)]
fn uniform(cells: &[u64]) -> Option<u64> {
    let first = *cells.first()?;
    (cells.iter().fold(0, |differ, cell| differ | (cell ^ first)) == 0).then_some(first)
}

pub(super) fn name(warp: u32) -> String {
    if warp == MANY { "several warps".to_owned() } else { format!("warp {warp}") }
}

#[cold]
fn explain_range(address: u64, bytes: u64, of: usize) -> Fault {
    let what = format!("{bytes} bytes at shared address {address:#x} of {of} bytes of shared memory");
    Fault::new(FaultKind::OutOfBounds, what)
}

#[cold]
fn explain_read(cell: u64, address: u64, (block_start, now): (u32, u32), warp: u32) -> Fault {
    let writer = cell as u32;
    let by = name(writer & MANY);
    if cell == UNOWNED {
        let what = format!("shared address {address:#x} lies between the shared variables, in none of them");
        return Fault::new(FaultKind::OutOfBounds, what);
    }
    let issued = (cell >> 32) as u32;
    match writer >> EPOCH_SHIFT {
        PENDING if issued >> EPOCH_SHIFT == now && issued & MANY != warp => Fault::new(
            FaultKind::Race,
            format!(
                "warp {warp} reads shared address {address:#x}, to which {by} has a cp.async in flight, with no barrier between"
            ),
        ),
        PENDING => Fault::new(
            FaultKind::AsyncCopy,
            format!("warp {warp} reads shared address {address:#x} before the cp.async of {by} to it was waited for"),
        ),
        epoch if epoch < block_start => Fault::new(
            FaultKind::Uninitialised,
            format!("warp {warp} reads shared address {address:#x}, which this block has not written"),
        ),
        _ => Fault::new(
            FaultKind::Race,
            format!("warp {warp} reads shared address {address:#x}, which {by} wrote with no barrier between"),
        ),
    }
}

#[cold]
fn explain_peer_read(cell: u64, address: u64, block_start: u32, by: u32) -> Fault {
    let reads = format!("block {by} of the cluster reads shared address {address:#x}");
    let writer = name(cell as u32 & MANY);
    if cell == UNOWNED {
        let what = format!("{reads}, which lies between the shared variables, in none of them");
        return Fault::new(FaultKind::OutOfBounds, what);
    }
    match cell as u32 >> EPOCH_SHIFT {
        PENDING => {
            Fault::new(FaultKind::AsyncCopy, format!("{reads} before the cp.async of {writer} to it was waited for"))
        }
        epoch if epoch < block_start => {
            Fault::new(FaultKind::Uninitialised, format!("{reads}, which the block that has it has not written"))
        }
        _ => {
            Fault::new(FaultKind::Race, format!("{reads}, which {writer} wrote with no barrier of the cluster between"))
        }
    }
}

#[cold]
fn explain_write(cell: u64, epoch: u32, address: u64, warp: u32) -> Fault {
    let (writer, reader) = (cell as u32, (cell >> 32) as u32);
    if cell == UNOWNED {
        let what = format!("shared address {address:#x} lies between the shared variables, in none of them");
        return Fault::new(FaultKind::OutOfBounds, what);
    }
    if writer >> EPOCH_SHIFT == PENDING {
        let by = name(writer & MANY);
        let what =
            format!("warp {warp} writes shared address {address:#x} while a cp.async of {by} to it is in flight");
        return Fault::new(FaultKind::AsyncCopy, what);
    }
    let wrote = writer >> EPOCH_SHIFT == epoch && writer & MANY != warp;
    let (by, did) = if wrote { (name(writer & MANY), "wrote") } else { (name(reader & MANY), "read") };
    let what = format!("warp {warp} writes shared address {address:#x}, which {by} {did} with no barrier between");
    Fault::new(FaultKind::Race, what)
}

/// Passes over the banks for one request: lanes go in groups of 128 bytes; in a group each pass serves one word per bank.
/// Returns (passes, passes without conflicts).
#[inline(always)]
pub fn wavefronts(addresses: &[u64; 32], mask: u32, width: u64) -> (u64, u64) {
    let group = (128 / width.max(4)).min(32) as usize;
    let (mut passes, mut ideal) = (0, 0);
    for first in (0..32).step_by(group) {
        let (more, least) = match distinct_banks(&addresses[first..first + group], mask >> first, width.max(4)) {
            Some(used) => (u64::from(used), u64::from(used)),
            None => conflicts(&addresses[first..first + group], mask >> first, width),
        };
        passes += more;
        ideal += least;
    }
    (passes, ideal)
}

/// The passes of lanes that share a bank, perhaps for the same word.
fn conflicts(addresses: &[u64], mask: u32, width: u64) -> (u64, u64) {
    // The words that are wanted, those of a bank in a chain.
    let (mut words, mut earlier, mut n) = ([0u64; 32], [NO_WORD; 32], 0);
    let (mut last, mut passes) = ([NO_WORD; 32], [0u64; 32]);
    for (_, address) in addresses.iter().enumerate().filter(|(lane, _)| mask >> lane & 1 == 1) {
        for word in address / 4..(address + width).div_ceil(4) {
            let bank = (word % 32) as usize;
            let mut at = last[bank];
            while at != NO_WORD && words[at] != word {
                at = earlier[at];
            }
            if at == NO_WORD && n < 32 {
                (words[n], earlier[n], last[bank]) = (word, last[bank], n);
                passes[bank] += 1;
                n += 1;
            }
        }
    }
    (passes.iter().max().copied().unwrap_or(0), u64::from(n > 0))
}

/// Whether the lanes of a group lie in different banks each: `Some(any lane active)` if so, `None` if it takes a closer look.
#[inline(always)]
fn distinct_banks(addresses: &[u64], mask: u32, width: u64) -> Option<bool> {
    let shift = width.trailing_zeros();
    let (mut seen, mut twice) = (0u32, 0u32);
    for (lane, address) in addresses.iter().enumerate() {
        let bank = u32::from(mask >> lane & 1 == 1) << (address >> shift & (128 / width - 1));
        twice |= seen & bank;
        seen |= bank;
    }
    (twice == 0).then_some(seen != 0)
}
