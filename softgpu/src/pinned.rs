//! Page-locked host memory, and which copies still need it.

use crate::fault::{Fault, FaultKind};
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard};

/// What the host sees in the target of a copy that has not run yet.
const POISON: u8 = 0xdb;
const PAGE: usize = 4096;

#[derive(Debug, Default)]
struct Region {
    bytes: usize,
    /// Registered rather than allocated: not ours to free.
    is_foreign: bool,
    /// Ranges that queued copies read (`false`) or write (`true`).
    in_flight: Vec<(usize, usize, bool)>,
}

/// All page-locked memory.
#[derive(Debug)]
pub struct Pinned {
    regions: Mutex<BTreeMap<usize, Region>>,
    /// Bytes that there may be in all.
    most: AtomicU64,
}

impl Pinned {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<usize, Region>> {
        self.regions.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// None yet, and no more than so many bytes later.
    pub fn new(most: u64) -> Self {
        Self { regions: Mutex::default(), most: AtomicU64::new(most) }
    }

    /// Lets there be no more than so many bytes from now on.
    pub fn limit(&self, most: u64) {
        self.most.store(most, Relaxed);
    }

    /// Bytes of all of it.
    pub fn num_bytes(&self) -> u64 {
        self.lock().values().map(|region| region.bytes as u64).sum()
    }

    /// Allocates zeroed page-aligned memory; `None` if the host has none, or there may be no more.
    pub fn allocate(&self, bytes: usize) -> Option<*mut u8> {
        let layout = Layout::from_size_align(bytes.max(1), PAGE).ok()?;
        if self.num_bytes() + bytes as u64 > self.most.load(Relaxed) {
            return None;
        }
        // SAFETY: the layout has a size above zero.
        let pointer = unsafe { alloc_zeroed(layout) };
        if pointer.is_null() {
            return None;
        }
        self.lock().insert(pointer as usize, Region { bytes, ..Region::default() });
        Some(pointer)
    }

    /// Registers memory of the program as page-locked.
    pub fn register(&self, start: usize, bytes: usize) {
        self.lock().insert(start, Region { bytes, is_foreign: true, in_flight: Vec::new() });
    }

    /// Frees (or unregisters) the region that starts here.
    ///
    /// # Errors
    /// Not the start of a region, or a copy still needs it.
    pub fn free(&self, start: usize) -> Result<(), Fault> {
        let mut regions = self.lock();
        let Some(region) = regions.get(&start) else {
            return Err(Fault::new(FaultKind::BadFree, format!("{start:#x} is not page-locked memory")));
        };
        if let Some((from, to, _)) = region.in_flight.first() {
            let what = format!("page-locked memory {start:#x} freed while a copy of {from:#x}..{to:#x} is queued");
            return Err(Fault::new(FaultKind::HostBuffer, what));
        }
        let bytes = region.bytes.max(1);
        if regions.remove(&start).is_some_and(|region| !region.is_foreign) {
            // SAFETY: allocated in `allocate` with this size and alignment; nobody uses it any more.
            unsafe { dealloc(start as *mut u8, Layout::from_size_align_unchecked(bytes, PAGE)) };
        }
        Ok(())
    }

    /// Whether the whole range is page-locked.
    pub fn contains(&self, start: usize, bytes: usize) -> bool {
        self.lock().range(..=start).next_back().is_some_and(|(&at, region)| start + bytes <= at + region.bytes)
    }

    /// Notes that a queued copy reads the range. Returns a digest of it, or `None` if a queued copy will still write it.
    pub fn begin_read(&self, start: usize, bytes: usize) -> Option<u64> {
        let mut regions = self.lock();
        let region = regions.range_mut(..=start).next_back()?.1;
        let is_written = region.in_flight.iter().any(|&(a, b, writes)| writes && a < start + bytes && start < b);
        region.in_flight.push((start, start + bytes, false));
        // SAFETY: the range lies in a region that is not freed while copies are in flight.
        (!is_written).then(|| digest(unsafe { std::slice::from_raw_parts(start as *const u8, bytes) }))
    }

    /// Notes that a queued copy writes the range, and spoils what is there so that reading too early shows.
    pub fn begin_write(&self, start: usize, bytes: usize) {
        let mut regions = self.lock();
        let Some((_, region)) = regions.range_mut(..=start).next_back() else { return };
        if !region.in_flight.iter().any(|&(a, b, _)| a < start + bytes && start < b) {
            // SAFETY: the range is page-locked memory that the program gave as the target of a copy.
            unsafe { std::ptr::write_bytes(start as *mut u8, POISON, bytes) };
        }
        region.in_flight.push((start, start + bytes, true));
    }

    /// A copy has run.
    pub fn end(&self, start: usize, bytes: usize, writes: bool) {
        let mut regions = self.lock();
        if let Some((_, region)) = regions.range_mut(..=start).next_back()
            && let Some(i) = region.in_flight.iter().position(|&r| r == (start, start + bytes, writes))
        {
            region.in_flight.swap_remove(i);
        }
    }
}

/// FNV-1a over 8-byte words; enough to see a change.
pub fn digest(bytes: &[u8]) -> u64 {
    let step = |hash: u64, word: u64| (hash ^ word).wrapping_mul(0x0100_0000_01b3).rotate_left(23);
    let words = bytes.chunks_exact(8);
    let tail = words.remainder().iter().fold(bytes.len() as u64, |word, &b| word << 8 | u64::from(b));
    let hash = words.fold(0xcbf2_9ce4_8422_2325, |hash, word| {
        step(hash, word.try_into().map(u64::from_le_bytes).unwrap_or_default())
    });
    step(hash, tail)
}
