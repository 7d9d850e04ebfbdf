//! Device memory: allocations at addresses that mean nothing to the host, each with its shadow.
//!
//! An address is `BASE + slot * 4 GiB + offset`. An allocation owns whole slots and begins [`LEAD`] bytes into its first
//! one, so between any two lie at least 256 MiB that belong to nobody; slots are never used twice, so a freed address
//! stays recognisable. The addresses are not canonical on x86-64: a host that follows one faults at once.
//!
//! # Concurrency
//! Blocks of one launch run on several threads over the same bytes, as they do on a device, and so do operations of several
//! streams. Each holds [`Memory::in_use`], without which nothing is freed. Shadow words that two blocks or operations may
//! touch are relaxed atomics; data bytes are raw memory, and a program that races on them is reported.

use crate::fault::{Fault, FaultKind};
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ops::Range;
use std::sync::atomic::{
    AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering::Acquire, Ordering::Relaxed, Ordering::Release,
    Ordering::SeqCst,
};
use std::sync::{Mutex, RwLock, RwLockReadGuard};

/// First device address.
pub const BASE: u64 = 0x0100_0000_0000_0000;
const SLOT_BITS: u32 = 32;
const LEAD: u64 = 256 << 20;
const CHUNK: usize = 4096;
const CHUNKS: usize = 4096;
/// Bytes that share one stream-order stamp.
pub const GRANULE: u64 = 64;

/// Raw zeroed memory of the host, returned to it on drop.
struct Block {
    pointer: *mut u8,
    bytes: usize,
}

impl Block {
    fn new(bytes: u64) -> Option<Self> {
        let layout = Layout::from_size_align(bytes.max(1) as usize, 16).ok()?;
        // SAFETY: the layout has a size above zero.
        let pointer = unsafe { alloc_zeroed(layout) };
        (!pointer.is_null()).then_some(Self { pointer, bytes: layout.size() })
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with the same size and alignment.
        unsafe { dealloc(self.pointer, Layout::from_size_align_unchecked(self.bytes, 16)) };
    }
}

struct Blocks {
    data: Block,
    init: Block,
    writers: Block,
    stamps: Block,
}

/// One allocation and its shadow.
pub struct Allocation {
    /// Number in order of creation, for messages.
    pub id: u64,
    /// First address.
    pub base: u64,
    /// Size, bytes.
    pub bytes: u64,
    /// Who asked: a call or a module variable.
    pub origin: String,
    blocks: Mutex<Option<Blocks>>,
    data: AtomicPtr<u8>,
    init: AtomicPtr<u8>,
    writers: AtomicPtr<AtomicU32>,
    stamps: AtomicPtr<[AtomicU64; 2]>,
    freed: AtomicBool,
    /// The last launch that stored here; others need not look at the writers.
    last_launch: AtomicU64,
    /// Whether all of it counts as written, whatever `init` says.
    is_all_init: AtomicBool,
    /// Held by who makes `init` say so instead.
    telling: Mutex<()>,
    /// Whether its data is what the host gave, zeros.
    is_untouched: AtomicBool,
}

/// Who makes an access: the operation of a stream and, in a kernel, the block.
#[derive(Clone, Debug, Default)]
pub struct Accessor {
    /// Stream number and position in it, packed as the stamps are.
    pub stamp: u64,
    /// For each stream, the last position that is known to have completed before.
    pub clock: std::sync::Arc<Vec<u64>>,
    /// The launch, 0 outside kernels.
    pub launch: u64,
    /// First writer tag of the launch.
    pub tag_base: u32,
    /// Tags per block, as a shift.
    pub tag_shift: u32,
    /// Writer tag of the block.
    pub tag: u32,
}

/// Packs a stream number and a position.
pub fn stamp(stream: u64, position: u64) -> u64 {
    stream << 48 | position
}

impl Accessor {
    fn is_after(&self, stamp: u64) -> bool {
        let (stream, position) = ((stamp >> 48) as usize, stamp & ((1 << 48) - 1));
        stamp >> 48 == self.stamp >> 48 || self.clock.get(stream).copied().unwrap_or(0) >= position
    }
}

/// How an access found the shadow; the caller adds kernel and thread.
pub type Checked = Result<(), Fault>;

impl Allocation {
    /// Whether the offset range lies inside.
    pub fn contains(&self, address: u64, bytes: u64) -> bool {
        address >= self.base && address - self.base <= self.bytes && bytes <= self.bytes - (address - self.base)
    }

    /// Whether it was freed.
    pub fn is_freed(&self) -> bool {
        self.freed.load(Acquire)
    }

    /// The host pointer to an offset.
    ///
    /// # Safety
    /// The allocation is live and the offset inside it.
    #[inline(always)]
    pub unsafe fn data(&self, offset: u64) -> *mut u8 {
        // SAFETY: the caller keeps the offset inside.
        unsafe { self.data.load(Relaxed).add(offset as usize) }
    }

    /// One line for messages.
    pub fn describe(&self) -> String {
        format!("allocation #{} ({}, {} bytes at {:#x})", self.id, self.origin, self.bytes, self.base)
    }

    /// Whether all bytes of the range were written.
    #[inline(always)]
    pub fn is_init(&self, offset: u64, bytes: u64) -> bool {
        if self.is_all_init.load(Acquire) {
            return true;
        }
        // SAFETY: the init block has one byte per byte of the allocation and callers check the range first.
        let init = unsafe { std::slice::from_raw_parts(self.init.load(Relaxed).add(offset as usize), bytes as usize) };
        init.iter().fold(1, |all, &byte| all & byte) == 1
    }

    /// First unwritten byte of the range.
    pub fn first_uninit(&self, range: Range<u64>) -> Option<u64> {
        range.into_iter().find(|&at| !self.is_init(at, 1))
    }

    /// Marks the range written.
    #[inline(always)]
    pub fn mark_init(&self, offset: u64, bytes: u64) {
        if self.is_all_init.load(Acquire) {
            return;
        }
        if bytes == self.bytes {
            // Many a program sets all of what it has allocated.
            return self.is_all_init.store(true, Release);
        }
        // SAFETY: as in `is_init`; bytes of different accesses are different bytes.
        unsafe { std::ptr::write_bytes(self.init.load(Relaxed).add(offset as usize), 1, bytes as usize) };
    }

    /// Has the init bytes say what they are.
    fn tell_init(&self) {
        let _telling = self.telling.lock().unwrap_or_else(|e| e.into_inner());
        if self.is_all_init.load(Acquire) {
            // The bytes first: others may be reading.
            // SAFETY: as in `is_init`.
            unsafe { std::ptr::write_bytes(self.init.load(Relaxed), 1, self.bytes as usize) };
            self.is_all_init.store(false, Release);
        }
    }

    /// Copies the init bytes of a range from another allocation.
    pub fn copy_init(&self, offset: u64, source: &Allocation, source_offset: u64, bytes: u64) {
        if source.is_all_init.load(Acquire) {
            return self.mark_init(offset, bytes);
        }
        self.tell_init();
        // SAFETY: both ranges were checked by the copy; `copy` allows overlap.
        unsafe {
            let from = source.init.load(Relaxed).add(source_offset as usize);
            std::ptr::copy(from, self.init.load(Relaxed).add(offset as usize), bytes as usize);
        }
    }

    #[inline(always)]
    fn writers(&self, offset: u64, bytes: u64) -> &[AtomicU32] {
        // SAFETY: one word per byte of the allocation; callers check the range first; atomics may be shared.
        unsafe { std::slice::from_raw_parts(self.writers.load(Relaxed).add(offset as usize), bytes as usize) }
    }

    #[inline(always)]
    fn stamps(&self, offset: u64, bytes: u64) -> &[[AtomicU64; 2]] {
        let (first, last) = (offset / GRANULE, (offset + bytes - 1) / GRANULE);
        // SAFETY: one pair per granule of the allocation; callers check the range first; atomics may be shared.
        unsafe {
            std::slice::from_raw_parts(self.stamps.load(Relaxed).add(first as usize), (last - first + 1) as usize)
        }
    }

    /// Checks a read against writes of other blocks and other streams. Returns the bytes of granules seen first by this
    /// operation.
    #[inline]
    pub fn note_read(
        &self,
        offset: u64,
        bytes: u64,
        by: &Accessor,
        foreign: impl Fn(u32) -> bool,
    ) -> Result<u64, Fault> {
        let mut new = 0;
        for [write, read] in self.stamps(offset, bytes) {
            if read.load(Relaxed) == by.stamp {
                continue;
            }
            // Who writes at the same time leaves its stamp before it looks at this one: one of the two sees the other.
            read.store(by.stamp, SeqCst);
            let last = write.load(SeqCst);
            if !by.is_after(last) {
                return Err(self.unordered(offset, "reads", "written", last));
            }
            new += GRANULE;
        }
        if by.launch != 0 && self.last_launch.load(Relaxed) == by.launch {
            for (i, writer) in self.writers(offset, bytes).iter().enumerate() {
                let tag = writer.load(Relaxed);
                if tag >= by.tag_base
                    && (tag - by.tag_base) >> by.tag_shift != (by.tag - by.tag_base) >> by.tag_shift
                    && foreign(tag)
                {
                    return Err(self.block_race(offset + i as u64, "reads", tag, by));
                }
            }
        }
        Ok(new)
    }

    /// Whether nobody has written to it, so that its data is zeros.
    pub fn is_untouched(&self) -> bool {
        self.is_untouched.load(Relaxed)
    }

    /// Notes that somebody writes to it.
    #[inline(always)]
    pub fn touch(&self) {
        if self.is_untouched.load(Relaxed) {
            self.is_untouched.store(false, Relaxed);
        }
    }

    /// Checks a write likewise and takes the bytes over.
    #[inline]
    pub fn note_write(
        &self,
        offset: u64,
        bytes: u64,
        by: &Accessor,
        foreign: impl Fn(u32) -> bool,
    ) -> Result<u64, Fault> {
        self.touch();
        let mut new = 0;
        for [write, read] in self.stamps(offset, bytes) {
            if write.load(Relaxed) == by.stamp {
                continue;
            }
            let last = write.swap(by.stamp, SeqCst);
            if !by.is_after(last) {
                return Err(self.unordered(offset, "writes", "written", last));
            }
            let last = read.load(SeqCst);
            if !by.is_after(last) {
                return Err(self.unordered(offset, "writes", "read", last));
            }
            new += GRANULE;
        }
        if by.launch != 0 {
            self.last_launch.store(by.launch, Relaxed);
            for (i, writer) in self.writers(offset, bytes).iter().enumerate() {
                let tag = writer.load(Relaxed);
                if tag >= by.tag_base
                    && (tag - by.tag_base) >> by.tag_shift != (by.tag - by.tag_base) >> by.tag_shift
                    && foreign(tag)
                {
                    return Err(self.block_race(offset + i as u64, "writes", tag, by));
                }
                writer.store(by.tag, Relaxed);
            }
        }
        Ok(new)
    }

    fn block_race(&self, offset: u64, verb: &str, tag: u32, by: &Accessor) -> Fault {
        let block = |tag: u32| (tag - by.tag_base) >> by.tag_shift;
        let what = format!(
            "block {} {verb} address {:#x}, which block {} wrote in the same launch with nothing between to order them; {}",
            block(by.tag),
            self.base + offset,
            block(tag),
            self.describe()
        );
        Fault::new(FaultKind::Race, what)
    }

    fn unordered(&self, offset: u64, verb: &str, done: &str, stamp: u64) -> Fault {
        let what = format!(
            "operation {verb} near address {:#x}, which operation {} of stream {} has {done} and nothing orders the two; {}",
            self.base + offset,
            stamp & ((1 << 48) - 1),
            stamp >> 48,
            self.describe()
        );
        Fault::new(FaultKind::StreamOrder, what)
    }

    /// Forgets who wrote what; needed when writer tags start again from zero.
    fn clear_writers(&self) {
        if !self.is_freed() {
            self.writers(0, self.bytes).iter().for_each(|writer| writer.store(0, Relaxed));
        }
    }
}

type Chunk = [AtomicPtr<Allocation>; CHUNK];

/// Held by what runs: nothing is freed meanwhile.
pub type InUse<'a> = RwLockReadGuard<'a, ()>;

/// All allocations of the device.
pub struct Memory {
    chunks: Box<[AtomicPtr<Chunk>]>,
    next: Mutex<Next>,
    used: AtomicU64,
    capacity: u64,
    /// Bytes that a single allocation may have.
    largest: u64,
    next_tag: AtomicU32,
    in_use: RwLock<()>,
}

struct Next {
    slot: u64,
    id: u64,
}

impl Memory {
    /// An empty memory of `capacity` bytes.
    pub fn new(capacity: u64) -> Self {
        Self {
            chunks: (0..CHUNKS).map(|_| AtomicPtr::default()).collect(),
            next: Mutex::new(Next { slot: 0, id: 1 }),
            used: AtomicU64::new(0),
            capacity,
            largest: u64::MAX,
            next_tag: AtomicU32::new(1),
            in_use: RwLock::default(),
        }
    }

    /// The same where what is free lies in pieces, of so many bytes at the most.
    pub fn in_pieces(self, largest: u64) -> Self {
        Self { largest, ..self }
    }

    /// Keeps all allocations while it is held.
    pub fn in_use(&self) -> InUse<'_> {
        self.in_use.read().unwrap_or_else(|e| e.into_inner())
    }

    /// Free and total bytes.
    pub fn info(&self) -> (u64, u64) {
        (self.capacity.saturating_sub(self.used.load(Relaxed)), self.capacity)
    }

    /// Allocates `bytes` (at least 1) of uninitialised memory; `None` when the device is full, or has no such piece.
    pub fn allocate(&self, bytes: u64, origin: &str) -> Option<&Allocation> {
        let charged = bytes.max(1).next_multiple_of(512);
        let mut next = self.next.lock().unwrap_or_else(|e| e.into_inner());
        let slots = (LEAD + bytes + LEAD).div_ceil(1 << SLOT_BITS);
        if bytes > self.largest
            || self.used.load(Relaxed) + charged > self.capacity
            || next.slot + slots > (CHUNK * CHUNKS) as u64
        {
            return None;
        }
        let (base, id) = (BASE + (next.slot << SLOT_BITS) + LEAD, next.id);
        let allocation = Box::leak(Box::new(new_allocation(id, base, bytes, origin)?));
        self.used.fetch_add(charged, Relaxed);
        for slot in next.slot..next.slot + slots {
            self.entry(slot).store(allocation, Release);
        }
        next.slot += slots;
        next.id += 1;
        Some(allocation)
    }

    /// The table entry of a slot, made on demand. Only called under the lock of `next`.
    fn entry(&self, slot: u64) -> &AtomicPtr<Allocation> {
        let chunk = &self.chunks[slot as usize / CHUNK];
        if chunk.load(Acquire).is_null() {
            let fresh: Box<Chunk> = Box::new(std::array::from_fn(|_| AtomicPtr::default()));
            chunk.store(Box::leak(fresh), Release);
        }
        // SAFETY: chunks are leaked and never replaced.
        unsafe { &(*chunk.load(Acquire))[slot as usize % CHUNK] }
    }

    /// The allocation whose slots hold the address, live or freed, or `None`.
    #[inline]
    pub fn find(&self, address: u64) -> Option<&Allocation> {
        let slot = address.checked_sub(BASE)? >> SLOT_BITS;
        let chunk = self.chunks.get(slot as usize / CHUNK)?.load(Acquire);
        // SAFETY: chunks and allocations are leaked and never replaced.
        unsafe { chunk.as_ref()?[slot as usize % CHUNK].load(Acquire).as_ref() }
    }

    /// The live allocation that holds the whole range.
    ///
    /// # Errors
    /// Out of bounds or use after free, naming the nearest allocation.
    pub fn resolve(&self, address: u64, bytes: u64) -> Result<&Allocation, Fault> {
        let Some(allocation) = self.find(address) else { return Err(outside(address, bytes, None)) };
        if !allocation.contains(address, bytes) {
            return Err(outside(address, bytes, Some(allocation)));
        }
        if allocation.is_freed() {
            let what = format!("{bytes} bytes at {address:#x} in freed {}", allocation.describe());
            return Err(Fault::new(FaultKind::UseAfterFree, what));
        }
        Ok(allocation)
    }

    /// Frees the allocation that begins at the address, once nothing runs.
    ///
    /// # Errors
    /// A pointer that is not the start of a live allocation.
    pub fn free(&self, address: u64) -> Result<(), Fault> {
        let bad = |what: String| Err(Fault::new(FaultKind::BadFree, what));
        let _unused = self.in_use.write().unwrap_or_else(|e| e.into_inner());
        match self.find(address) {
            None => bad(format!("{address:#x} was never allocated")),
            Some(a) if a.base != address => bad(format!("{address:#x} is inside {}, not its start", a.describe())),
            Some(a) if a.freed.swap(true, Acquire) => bad(format!("second free of {}", a.describe())),
            Some(a) => {
                drop(a.blocks.lock().unwrap_or_else(|e| e.into_inner()).take());
                self.used.fetch_sub(a.bytes.max(1).next_multiple_of(512), Relaxed);
                Ok(())
            }
        }
    }

    /// Takes `count` writer tags for a launch, and gives the first with what the launch holds.
    pub fn take_tags(&self, count: u64) -> (u32, InUse<'_>) {
        let count = count.min(u64::from(u32::MAX / 2)) as u32;
        loop {
            let in_use = self.in_use();
            let first = self.next_tag.fetch_update(Relaxed, Relaxed, |first| first.checked_add(count));
            match first {
                Ok(first) => return (first, in_use),
                Err(_) => drop(in_use),
            }
            self.begin_tags(count);
        }
    }

    /// Forgets all writers, once nothing runs, if there are no `count` tags left.
    fn begin_tags(&self, count: u32) {
        let _unused = self.in_use.write().unwrap_or_else(|e| e.into_inner());
        if self.next_tag.load(Relaxed).checked_add(count).is_none() {
            let slots = self.next.lock().unwrap_or_else(|e| e.into_inner()).slot;
            (0..slots).filter_map(|slot| self.find(BASE + (slot << SLOT_BITS))).for_each(Allocation::clear_writers);
            self.next_tag.store(1, Relaxed);
        }
    }
}

fn new_allocation(id: u64, base: u64, bytes: u64, origin: &str) -> Option<Allocation> {
    let blocks = Blocks {
        data: Block::new(bytes)?,
        init: Block::new(bytes)?,
        writers: Block::new(bytes.checked_mul(4)?)?,
        stamps: Block::new(bytes.div_ceil(GRANULE).checked_mul(16)?)?,
    };
    Some(Allocation {
        id,
        base,
        bytes,
        origin: origin.to_owned(),
        data: AtomicPtr::new(blocks.data.pointer),
        init: AtomicPtr::new(blocks.init.pointer),
        writers: AtomicPtr::new(blocks.writers.pointer.cast()),
        stamps: AtomicPtr::new(blocks.stamps.pointer.cast()),
        blocks: Mutex::new(Some(blocks)),
        freed: AtomicBool::new(false),
        last_launch: AtomicU64::new(0),
        is_all_init: AtomicBool::new(false),
        telling: Mutex::default(),
        is_untouched: AtomicBool::new(true),
    })
}

// SAFETY: a block is plain memory; who may touch it when is the module's rule above.
unsafe impl Send for Block {}

fn outside(address: u64, bytes: u64, near: Option<&Allocation>) -> Fault {
    let mut what = format!("{bytes} bytes at {address:#x}");
    match near {
        Some(a) if address < a.base => {
            what += &format!(", {} bytes before the start of {}", a.base - address, a.describe())
        }
        Some(a) => what += &format!(", which begins {} bytes into {}", address - a.base, a.describe()),
        None if address < 4096 => what += ", a null pointer",
        None if address < 1 << 47 => what += ", a host address: copy the data to the device first",
        None => what += ", in no allocation",
    }
    Fault::new(FaultKind::OutOfBounds, what)
}
