//! Which block lies where, what it is worth, and how many bytes all files take. Touches no file.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;

use super::format::{BlockRecord, Digest};
use super::frequency::FrequencySketch;
use super::segment::SegmentId;
use crate::kv::BlockHash;
use crate::paging::FileHandle;

/// Hashes that wait to be told of at most; the oldest are forgotten, and whoever asks for such a block finds it missing.
const MAX_DROPPED: usize = 1 << 16;

/// Sealed files that are kept open for reading; the one opened first is closed first.
const MAX_READERS: usize = 64;
/// What one more step of a level adds to a block's worth: more than any block without a level is worth.
const LEVEL_VALUE: f64 = 17.0;

/// The level of a newcomer that is pinned and has none: somebody is about to name it in a cube like most.
pub(super) const PINNED_LEVEL: u8 = 5;

/// A floor holds for an eighth of as many requests as there are blocks.
const REQUESTS_PER_FLOOR: u64 = 8;

/// Where a block's bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) segment: SegmentId,
    pub(super) slot: u32,
    pub(super) digest: Digest,
}

struct Entry {
    place: Place,
    last_use: u64,
}

/// All a reader needs.
pub(super) struct Located {
    pub(super) place: Place,
    /// Where the row begins in its file.
    pub(super) offset: u64,
    /// The file's handle, if it is open.
    pub(super) handle: Option<Arc<dyn FileHandle>>,
    /// Whether the file is still being written.
    pub(super) is_growing: bool,
}

/// A segment of the store's own format.
pub(super) struct Segment {
    pub(super) bytes: u64,
    /// Of them before row 0.
    pub(super) region_bytes: u64,
    /// By row. A row is live while the block of that hash is found there.
    pub(super) hashes: Vec<BlockHash>,
    pub(super) num_live: u32,
    /// Live rows that are pinned.
    pub(super) num_pinned: u32,
    pub(super) last_use: u64,
    /// Until it is sealed: its file has another name then.
    pub(super) handle: Option<Arc<dyn FileHandle>>,
    /// Of a sealed file that was read lately.
    reader: Option<Arc<dyn FileHandle>>,
}

/// Sizes of a segment's file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Extent {
    pub(super) bytes: u64,
    pub(super) region_bytes: u64,
}

/// A file that counts towards the bound and whose blocks cannot be read: another format's, or a damaged one.
pub(super) struct ForeignSegment {
    pub(super) id: SegmentId,
    pub(super) path: PathBuf,
    pub(super) bytes: u64,
    /// Empty when its header does not say.
    pub(super) hashes: Vec<BlockHash>,
    /// Whether it may make room. A file that this build is too old for may not.
    pub(super) is_evictable: bool,
}

/// A live block as compaction sees it.
pub(super) struct LiveBlock {
    pub(super) hash: BlockHash,
    pub(super) value: f64,
    pub(super) is_pinned: bool,
    /// How hard it is held on to, when it is at all.
    pub(super) level: Option<u8>,
}

/// What happened so far.
#[derive(Default)]
pub(super) struct Counters {
    pub(super) damaged: u64,
    pub(super) evicted: u64,
    pub(super) rejected: u64,
    pub(super) compactions: u64,
}

/// The index of one store.
pub(super) struct Index {
    blocks: HashMap<BlockHash, Entry>,
    segments: BTreeMap<SegmentId, Segment>,
    foreign: Vec<ForeignSegment>,
    pins: HashMap<BlockHash, u32>,
    /// Of pinned blocks, as what they count when they come in; of the others 5.
    pin_levels: HashMap<BlockHash, u8>,
    /// Blocks that cubes hold on to, and how hard; here or not.
    levels: HashMap<BlockHash, u8>,
    sketch: FrequencySketch,
    /// Bytes from one row of a segment to the next.
    stride: u64,
    /// Requests so far.
    clock: u64,
    /// Bytes of own segments, of foreign ones, and of files that are being removed or could not be.
    own_bytes: u64,
    foreign_bytes: u64,
    leftover_bytes: u64,
    dropped: VecDeque<BlockHash>,
    /// Segments with a reader, in order of opening.
    readers: VecDeque<SegmentId>,
    /// What the last newcomer that was turned away would have had to be worth more than, and when that was.
    floor: Option<(f64, u64)>,
    pub(super) counters: Counters,
    /// Why nothing is written any more.
    pub(super) degraded: Option<String>,
}

impl Index {
    /// An empty index for a store of about `num_blocks` blocks, whose rows are `stride` bytes long.
    pub(super) fn new(num_blocks: u64, stride: u64) -> Self {
        Self {
            blocks: HashMap::new(),
            segments: BTreeMap::new(),
            foreign: Vec::new(),
            pins: HashMap::new(),
            pin_levels: HashMap::new(),
            levels: HashMap::new(),
            sketch: FrequencySketch::new(num_blocks),
            stride,
            clock: 0,
            own_bytes: 0,
            foreign_bytes: 0,
            leftover_bytes: 0,
            dropped: VecDeque::new(),
            readers: VecDeque::with_capacity(MAX_READERS),
            floor: None,
            counters: Counters::default(),
            degraded: None,
        }
    }

    pub(super) fn find(&self, hash: &BlockHash) -> Option<Place> {
        self.blocks.get(hash).map(|entry| entry.place)
    }

    /// Where to read a block.
    pub(super) fn locate(&self, hash: &BlockHash) -> Option<Located> {
        let place = self.find(hash)?;
        let segment = &self.segments[&place.segment];
        let offset = segment.region_bytes + u64::from(place.slot) * self.stride;
        let handle = segment.handle.as_ref().or(segment.reader.as_ref()).cloned();
        Some(Located { place, offset, handle, is_growing: segment.handle.is_some() })
    }

    /// Keeps a sealed segment's file open, in place of the one that has been open longest.
    pub(super) fn keep_reader(&mut self, id: SegmentId, reader: Arc<dyn FileHandle>) {
        let Some(segment) = self.segments.get_mut(&id).filter(|segment| segment.reader.is_none()) else { return };
        segment.reader = Some(reader);
        if self.readers.len() == MAX_READERS
            && let Some(oldest) = self.readers.pop_front()
            && let Some(segment) = self.segments.get_mut(&oldest)
        {
            segment.reader = None;
        }
        self.readers.push_back(id);
    }

    /// Notes that somebody wants a block, whether it is here or not.
    pub(super) fn touch(&mut self, hash: &BlockHash) {
        self.clock += 1;
        self.sketch.increment(hash);
        if let Some(entry) = self.blocks.get_mut(hash) {
            entry.last_use = self.clock;
            if let Some(segment) = self.segments.get_mut(&entry.place.segment) {
                segment.last_use = self.clock;
            }
        }
    }

    pub(super) fn hashes(&self) -> impl Iterator<Item = &BlockHash> {
        self.blocks.keys()
    }

    pub(super) fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    pub(super) fn segments(&self) -> impl Iterator<Item = (SegmentId, &Segment)> {
        self.segments.iter().map(|(id, segment)| (*id, segment))
    }

    pub(super) fn segment(&self, id: SegmentId) -> Option<&Segment> {
        self.segments.get(&id)
    }

    pub(super) fn foreign_bytes(&self) -> u64 {
        self.foreign_bytes
    }

    /// Bytes of all files.
    pub(super) fn total_bytes(&self) -> u64 {
        self.own_bytes + self.foreign_bytes + self.leftover_bytes
    }

    /// What a block never stored would be worth, were it stored now: one more than how often it was asked for, and more
    /// when a cube holds on to it or is about to.
    pub(super) fn candidate_value(&self, hash: &BlockHash) -> f64 {
        self.frequency(hash) + self.candidate_level(hash).map_or(0.0, level_value)
    }

    fn frequency(&self, hash: &BlockHash) -> f64 {
        1.0 + f64::from(self.sketch.estimate(hash))
    }

    /// How hard a block that is not stored yet will be held on to.
    pub(super) fn candidate_level(&self, hash: &BlockHash) -> Option<u8> {
        let of_pin = || self.pin_levels.get(hash).copied().unwrap_or(PINNED_LEVEL);
        self.levels.get(hash).copied().or_else(|| self.is_pinned(hash).then(of_pin))
    }

    /// Holds on to a block this hard, or no longer.
    pub(super) fn set_level(&mut self, hash: &BlockHash, level: Option<u8>) {
        let before = match level {
            Some(level) => self.levels.insert(*hash, level),
            None => self.levels.remove(hash),
        };
        if before > level {
            self.floor = None;
        }
    }

    /// Bytes that a newcomer of `level` could have others give up: of blocks without a level or with a lower one, and of files
    /// of other formats that may go.
    pub(super) fn displaceable_bytes(&self, level: u8) -> u64 {
        let may_go = |hash: &BlockHash| !self.is_pinned(hash) && self.levels.get(hash).is_none_or(|held| *held < level);
        self.blocks.keys().filter(|hash| may_go(hash)).count() as u64 * self.stride
    }

    /// Whether a newcomer of this value need not be weighed: one like it was turned away, and too little has happened
    /// since for the least of the blocks to have aged.
    pub(super) fn is_below_floor(&self, value: f64) -> bool {
        let is_recent = |at| self.clock - at <= self.blocks.len() as u64 / REQUESTS_PER_FLOOR;
        self.floor.is_some_and(|(floor, at)| value <= floor && is_recent(at))
    }

    /// Notes what a newcomer would have had to be worth more than.
    pub(super) fn set_floor(&mut self, least_value: f64) {
        self.floor = Some((least_value, self.clock));
    }

    /// Frequency over age, where a block is one older when as many requests came since as there are blocks.
    fn value(&self, hash: &BlockHash, entry: &Entry) -> f64 {
        let age = (self.clock - entry.last_use) as f64 / self.blocks.len().max(1) as f64;
        self.frequency(hash) / (1.0 + age) + self.levels.get(hash).copied().map_or(0.0, level_value)
    }

    /// The live blocks of a segment, by row.
    pub(super) fn live_blocks(&self, id: SegmentId) -> Vec<LiveBlock> {
        let Some(segment) = self.segments.get(&id) else { return Vec::new() };
        let live = segment.hashes.iter().enumerate().filter_map(|(slot, hash)| {
            let entry = self.blocks.get(hash)?;
            let is_here = entry.place.segment == id && entry.place.slot as usize == slot;
            let (is_pinned, level) = (self.is_pinned(hash), self.levels.get(hash).copied());
            is_here.then(|| LiveBlock { hash: *hash, value: self.value(hash, entry), is_pinned, level })
        });
        live.collect()
    }

    pub(super) fn pin(&mut self, hash: &BlockHash) {
        let count = self.pins.entry(*hash).or_insert(0);
        *count += 1;
        if *count == 1 {
            self.count_pin(hash, 1);
        }
    }

    /// Has a pinned block come in as one of this level, or of a higher one that another pin wants.
    pub(super) fn set_pin_level(&mut self, hash: &BlockHash, level: u8) {
        let known = self.pin_levels.entry(*hash).or_insert(level);
        *known = level.max(*known);
    }

    /// Undoes one [`Index::pin`]; one more than there were does nothing.
    pub(super) fn unpin(&mut self, hash: &BlockHash) {
        let Some(count) = self.pins.get_mut(hash) else { return };
        *count -= 1;
        if *count == 0 {
            self.pins.remove(hash);
            self.pin_levels.remove(hash);
            self.floor = None;
            self.count_pin(hash, -1);
        }
    }

    pub(super) fn is_pinned(&self, hash: &BlockHash) -> bool {
        self.pins.contains_key(hash)
    }

    fn count_pin(&mut self, hash: &BlockHash, change: i32) {
        let Some(place) = self.find(hash) else { return };
        let segment = self.segments.get_mut(&place.segment).expect("a place is in a segment");
        segment.num_pinned = segment.num_pinned.saturating_add_signed(change);
    }

    /// Adds a segment that takes blocks.
    pub(super) fn start_segment(&mut self, id: SegmentId, region_bytes: u64, handle: Arc<dyn FileHandle>) {
        self.add_segment(id, Extent { bytes: region_bytes, region_bytes }, Some(handle));
    }

    /// Adds a sealed segment. Blocks found elsewhere until now are found here.
    pub(super) fn add_sealed(&mut self, id: SegmentId, extent: Extent, records: &[BlockRecord]) {
        self.add_segment(id, extent, None);
        for record in records {
            self.clock += 1;
            self.place_block(record.hash, record.digest, id, self.clock);
        }
    }

    fn add_segment(&mut self, id: SegmentId, extent: Extent, handle: Option<Arc<dyn FileHandle>>) {
        let Extent { bytes, region_bytes } = extent;
        self.own_bytes += bytes;
        let (hashes, last_use) = (Vec::new(), self.clock);
        let segment =
            Segment { bytes, region_bytes, hashes, num_live: 0, num_pinned: 0, last_use, handle, reader: None };
        let replaced = self.segments.insert(id, segment);
        assert!(replaced.is_none(), "segment numbers are given once");
    }

    /// Adds a block in the next row of a segment.
    pub(super) fn push_block(&mut self, id: SegmentId, record: &BlockRecord) {
        self.place_block(record.hash, record.digest, id, self.clock);
        self.segments.get_mut(&id).expect("the segment was started").bytes += self.stride;
        self.own_bytes += self.stride;
    }

    fn place_block(&mut self, hash: BlockHash, digest: Digest, id: SegmentId, last_use: u64) {
        self.remove_block(&hash);
        let is_pinned = self.is_pinned(&hash);
        let segment = self.segments.get_mut(&id).expect("the segment was added");
        let slot = segment.hashes.len() as u32;
        segment.hashes.push(hash);
        segment.num_live += 1;
        segment.num_pinned += u32::from(is_pinned);
        segment.last_use = segment.last_use.max(last_use);
        self.blocks.insert(hash, Entry { place: Place { segment: id, slot, digest }, last_use });
    }

    fn remove_block(&mut self, hash: &BlockHash) -> Option<Entry> {
        let entry = self.blocks.remove(hash)?;
        let is_pinned = self.is_pinned(hash);
        let segment = self.segments.get_mut(&entry.place.segment).expect("a place is in a segment");
        segment.num_live -= 1;
        segment.num_pinned -= u32::from(is_pinned);
        Some(entry)
    }

    /// Forgets blocks, pinned or not; how many there were.
    pub(super) fn forget(&mut self, hashes: &HashSet<BlockHash>) -> usize {
        let found: Vec<BlockHash> = hashes.iter().filter(|hash| self.blocks.contains_key(*hash)).copied().collect();
        for hash in &found {
            self.remove_block(hash);
            self.tell_dropped(*hash);
        }
        found.len()
    }

    /// Segments that have rows of these blocks, live or dead.
    pub(super) fn segments_with(&self, hashes: &HashSet<BlockHash>) -> Vec<SegmentId> {
        let has = |segment: &Segment| segment.hashes.iter().any(|hash| hashes.contains(hash));
        self.segments.iter().filter(|(_, segment)| has(segment)).map(|(id, _)| *id).collect()
    }

    /// Where the rows of these blocks begin in a segment's file.
    pub(super) fn rows_of(&self, id: SegmentId, hashes: &HashSet<BlockHash>) -> Vec<u64> {
        let Some(segment) = self.segments.get(&id) else { return Vec::new() };
        let rows = segment.hashes.iter().zip(0..).filter(|(hash, _)| hashes.contains(*hash));
        rows.map(|(_, slot): (_, u64)| segment.region_bytes + slot * self.stride).collect()
    }

    /// The file has its last name; readers open it by that.
    pub(super) fn seal_segment(&mut self, id: SegmentId) {
        self.segments.get_mut(&id).expect("the segment was started").handle = None;
    }

    /// Forgets a block whose bytes are wrong at `place`; `false` if it is not there any more.
    pub(super) fn drop_damaged(&mut self, hash: &BlockHash, place: &Place) -> bool {
        if self.find(hash) != Some(*place) {
            return false;
        }
        self.remove_block(hash);
        self.tell_dropped(*hash);
        self.counters.damaged += 1;
        true
    }

    fn tell_dropped(&mut self, hash: BlockHash) {
        if self.dropped.len() == MAX_DROPPED {
            self.dropped.pop_front();
        }
        self.dropped.push_back(hash);
    }

    /// Without those that were stored anew since.
    pub(super) fn take_dropped(&mut self) -> Vec<BlockHash> {
        self.dropped.drain(..).filter(|hash| !self.blocks.contains_key(hash)).collect()
    }

    /// Switches from rewritten segments to their copy. Blocks that were not copied are evicted, except those pinned
    /// meanwhile, whose segment stays. Returns the segments to remove; their bytes count until
    /// [`Index::forget_leftover`].
    pub(super) fn finish_rewrite(
        &mut self,
        copy: Option<(SegmentId, Extent, &[BlockRecord])>,
        sources: &[SegmentId],
    ) -> Vec<(SegmentId, u64)> {
        if let Some((id, extent, records)) = copy {
            self.add_segment(id, extent, None);
            records.iter().for_each(|record| self.move_block(record, id, sources));
            self.counters.compactions += 1;
        }
        let gone: Vec<SegmentId> = sources.iter().copied().filter(|id| self.evict_all(*id)).collect();
        gone.into_iter().filter_map(|id| Some((id, self.remove_segment(id)?))).collect()
    }

    /// A block that was dropped, or stored anew, while it was copied keeps what it is; its row in the copy is dead.
    fn move_block(&mut self, record: &BlockRecord, id: SegmentId, sources: &[SegmentId]) {
        let last_use = self.blocks.get(&record.hash).filter(|entry| sources.contains(&entry.place.segment));
        match last_use.map(|entry| entry.last_use) {
            Some(last_use) => self.place_block(record.hash, record.digest, id, last_use),
            None => self.segments.get_mut(&id).expect("the copy was added").hashes.push(record.hash),
        }
    }

    /// Evicts what is not pinned; whether nothing is left.
    fn evict_all(&mut self, id: SegmentId) -> bool {
        for block in self.live_blocks(id).into_iter().filter(|block| !block.is_pinned) {
            self.remove_block(&block.hash);
            self.tell_dropped(block.hash);
            self.counters.evicted += 1;
        }
        self.segments.get(&id).is_some_and(|segment| segment.num_live == 0)
    }

    fn remove_segment(&mut self, id: SegmentId) -> Option<u64> {
        let bytes = self.segments.remove(&id)?.bytes;
        self.readers.retain(|reader| *reader != id);
        self.own_bytes -= bytes;
        self.leftover_bytes += bytes;
        Some(bytes)
    }

    pub(super) fn add_foreign(&mut self, segment: ForeignSegment) {
        self.foreign_bytes += segment.bytes;
        let at = self.foreign.partition_point(|other| other.id <= segment.id);
        self.foreign.insert(at, segment);
    }

    /// Whether a file of another format has any of these blocks.
    pub(super) fn is_foreign(&self, hashes: &HashSet<BlockHash>) -> bool {
        self.foreign.iter().flat_map(|segment| &segment.hashes).any(|hash| hashes.contains(hash))
    }

    /// Takes the oldest foreign segment that may go: none that holds a pinned block or a cube's. Its bytes count until
    /// [`Index::forget_leftover`].
    pub(super) fn take_foreign(&mut self) -> Option<ForeignSegment> {
        let may_go = |segment: &ForeignSegment| {
            segment.is_evictable
                && !segment.hashes.iter().any(|hash| self.pins.contains_key(hash) || self.levels.contains_key(hash))
        };
        let at = self.foreign.iter().position(may_go)?;
        let segment = self.foreign.remove(at);
        self.foreign_bytes -= segment.bytes;
        self.leftover_bytes += segment.bytes;
        Some(segment)
    }

    /// Counts a file that nothing refers to and that may be there still.
    pub(super) fn add_leftover(&mut self, bytes: u64) {
        self.leftover_bytes += bytes;
    }

    /// A file that nothing refers to is gone for good.
    pub(super) fn forget_leftover(&mut self, bytes: u64) {
        self.leftover_bytes -= bytes;
    }

    /// Holds the counts together.
    ///
    /// # Panics
    /// When they contradict each other.
    pub(super) fn check_integrity(&self) {
        let live = |id| self.blocks.values().filter(|entry| entry.place.segment == id).count();
        for (id, segment) in &self.segments {
            let blocks = self.live_blocks(*id);
            assert_eq!(blocks.len(), segment.num_live as usize, "live rows of {id:?}");
            assert_eq!(blocks.len(), live(*id), "blocks of {id:?} have rows of their own");
            let num_pinned = blocks.iter().filter(|block| block.is_pinned).count();
            assert_eq!(num_pinned, segment.num_pinned as usize, "pinned rows of {id:?}");
        }
        let known = |entry: &Entry| self.segments.contains_key(&entry.place.segment);
        assert!(self.blocks.values().all(known), "every block is in a segment");
        assert_eq!(self.own_bytes, self.segments.values().map(|segment| segment.bytes).sum::<u64>());
        assert_eq!(self.foreign_bytes, self.foreign.iter().map(|segment| segment.bytes).sum::<u64>());
        assert!(self.pins.values().all(|&count| count > 0));
    }
}

fn level_value(level: u8) -> f64 {
    LEVEL_VALUE * (1.0 + f64::from(level))
}
