//! The disk tier: KV blocks by content in segment files, within a bound, across restarts. Knows no cube, no request and
//! no device; who may ask for which hash is decided above.
//!
//! Below the store's folder each [`BlockFormat`] has a folder, and in it segments (`format.rs` says what a segment is).
//! A segment is written under a temporary name and never changed once it has its last one. What was written is found
//! at once and is durable after [`BlockStore::seal`] or when its segment is full. Opening reads headers, not blocks:
//! every read that fills memory checks the block's digest instead.
//!
//! **Bound.** All segments of all formats, the one being written and the copy that compaction makes take at most
//! `max_bytes`, at any moment and after any crash. To make room, in this order: segments nothing is live in; segments of
//! other formats, oldest first, whole, and none that holds a pinned block or a cube's; then the segment whose blocks are
//! worth least per byte freed. Of the last, pinned blocks and, up to half of it, those worth more than the newcomer are
//! copied and the others evicted. A newcomer that is worth no more than the least of them is turned away (TinyLFU).
//! Blocks with a level, a cube's, go to newcomers of a higher one alone.
//!
//! **Failure.** An error of the disk on the way down makes the store read-only until it is opened again, with one
//! warning; a block that cannot be read, or whose digest is wrong, is forgotten and counted. Neither is an error to
//! whoever asks for blocks.
//!
//! **Locks.** `writer` is held for a whole write, seal or compaction; `index` for moments, and never over I/O. Who needs
//! both takes `writer` first. Readers take `index` alone, so compaction does not hold them up.

mod erase;
mod format;
mod frequency;
mod geometry;
mod index;
mod outcome;
mod pins;
mod reclaim;
mod scan;
mod segment;
#[cfg(test)]
mod tests;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

pub use format::BlockFormat;
pub(super) use format::digest_of as block_digest;
pub use outcome::{Found, OpenReport, StoreStats, Stored};
pub use pins::PinnedBlocks;

use self::format::{BlockRecord, digest_of, read_header};
use self::geometry::Geometry;
use self::index::{Index, Located, Place};
use self::segment::{SegmentId, SegmentWriter};
use super::{FileHandle, Files};
use crate::kv::BlockHash;
use crate::planted::{self, Bug};
use crate::{Error, Result, invalid};

/// A block that compaction keeps moving away from a reader is given up after so many tries.
const MAX_MOVES: usize = 8;

/// What a store keeps and how much of it.
#[derive(Debug, Clone)]
pub struct StoreConfig {
    /// What the blocks are.
    pub format: BlockFormat,
    /// Bytes on disk at most, files of other formats included.
    pub max_bytes: u64,
    /// Bytes of a segment at most: 16 MiB to 256 MiB is sensible. A quarter of `max_bytes` is the limit.
    pub segment_bytes: u64,
}

/// The disk tier. Threads share it; [`BlockStore::read`], [`BlockStore::write`], [`BlockStore::seal`] and
/// [`BlockStore::trim`] wait for the disk, nothing else does.
pub struct BlockStore {
    files: Arc<dyn Files>,
    /// Of this format.
    folder: PathBuf,
    geometry: Geometry,
    index: Mutex<Index>,
    writer: Mutex<Writer>,
    /// Blocks that came another way than through the pager, for it to take note of.
    announced: Mutex<Vec<BlockHash>>,
    has_announced: AtomicBool,
}

/// What one thread at a time writes to.
struct Writer {
    open: Option<OpenSegment>,
    next_id: SegmentId,
}

struct OpenSegment {
    segment: SegmentWriter,
    /// Why it will never be durable. Its blocks can be read until the store is closed.
    broken: Option<String>,
}

impl BlockStore {
    /// Opens the store in `folder`, which need not exist. Nobody else may have it open.
    ///
    /// A folder that cannot be written gives a store that reads only; pins are not known yet, so nothing is evicted
    /// before the first write or [`BlockStore::trim`].
    ///
    /// # Errors
    /// `Invalid` for sizes that cannot be, `Io` when the folder cannot be made for another reason than permission or
    /// room, or not be listed.
    pub fn open(files: Arc<dyn Files>, folder: &Path, config: StoreConfig) -> Result<(Self, OpenReport)> {
        let geometry = Geometry::new(&config)?;
        let own = folder.join(geometry.format.folder_name());
        let made = make_folder(&*files, folder, &own);
        let mut index = Index::new(geometry.num_blocks(), geometry.format.stride());
        let scanned = scan::scan(&*files, folder, &geometry.format, &mut index)?;
        let mut report = scanned.report;
        report.num_blocks = index.num_blocks();
        report.bytes = index.total_bytes();
        let writer = Writer { open: None, next_id: scanned.next_id };
        let (index, writer) = (Mutex::new(index), Mutex::new(writer));
        let (announced, has_announced) = (Mutex::default(), AtomicBool::new(false));
        let store = Self { files, folder: own, geometry, index, writer, announced, has_announced };
        if let Err(e) = made {
            if !is_refusal(&e) {
                return Err(Error::io("create", &store.folder, e));
            }
            store.degrade("create", &store.folder, &e);
        }
        if let Some((path, e)) = scanned.failed_removal {
            store.degrade("remove", &path, &e);
        }
        Ok((store, report))
    }

    /// Whether a block can be read now.
    pub fn contains(&self, hash: &BlockHash) -> bool {
        self.index().find(hash).is_some()
    }

    /// How many of these blocks cannot be read now.
    pub fn count_missing(&self, hashes: &[BlockHash]) -> usize {
        let index = self.index();
        hashes.iter().filter(|hash| index.find(hash).is_none()).count()
    }

    /// Whether so many more blocks would find room without displacing others that are held on to as hard as `level` says, as
    /// far as that can be said before it is tried.
    pub fn would_fit(&self, num_blocks: usize, level: u8) -> bool {
        let index = self.index();
        let needed_bytes = num_blocks as u64 * self.geometry.format.stride();
        let free_bytes = self.geometry.resting_bytes().saturating_sub(index.total_bytes());
        index.degraded.is_none() && needed_bytes <= free_bytes + index.displaceable_bytes(level)
    }

    /// The blocks that can be read now, in no order.
    pub fn hashes(&self) -> Vec<BlockHash> {
        self.index().hashes().copied().collect()
    }

    /// What blocks there are below a store's folder, of this model and of others.
    ///
    /// # Errors
    /// `Io` when the folder cannot be listed.
    pub fn formats(files: &dyn Files, folder: &Path) -> Result<Vec<BlockFormat>> {
        scan::formats(files, folder)
    }

    /// What its blocks are.
    pub fn format(&self) -> &BlockFormat {
        &self.geometry.format
    }

    /// The digest of a block that can be read now, over hash, tokens and bytes.
    pub fn digest(&self, hash: &BlockHash) -> Option<[u8; 32]> {
        self.index().find(hash).map(|place| place.digest)
    }

    /// Has whoever keeps track of the store's blocks take note of some that were written beside it.
    pub fn announce(&self, hashes: &[BlockHash]) {
        self.announced.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).extend_from_slice(hashes);
        self.has_announced.store(true, Ordering::Release);
    }

    /// What was announced since the last call. Looks at one word when that is nothing.
    pub fn take_announced(&self) -> Vec<BlockHash> {
        if !self.has_announced.swap(false, Ordering::AcqRel) {
            return Vec::new();
        }
        std::mem::take(&mut *self.announced.lock().unwrap_or_else(|poisoned| poisoned.into_inner()))
    }

    /// Reads a block into `bytes`, which is one block long, and checks that digest, hash and `tokens` belong together.
    /// The whole block is hashed every time. Unless it is [`Found::Whole`], `bytes` holds anything.
    ///
    /// # Panics
    /// When `bytes` is not one block long.
    pub fn read(&self, hash: &BlockHash, tokens: &[u32], bytes: &mut [u8]) -> Found {
        assert_eq!(bytes.len(), self.geometry.format.block_bytes, "a read fills one block");
        self.index().touch(hash);
        for _ in 0..MAX_MOVES {
            let Some(located) = self.index().locate(hash) else { return Found::Missing };
            let fault = match self.read_located(hash, tokens, &located, bytes) {
                Ok(Found::Damaged(fault)) => fault,
                Ok(found) => return found,
                Err(e) if is_passing(&e) => return Found::Missing,
                Err(e) => e.to_string(),
            };
            // Compaction may have moved the block and removed the file in between: then it is somewhere else now.
            if self.drop_damaged(hash, &located.place, &fault) {
                return Found::Damaged(fault);
            }
        }
        Found::Missing
    }

    fn read_located(&self, hash: &BlockHash, tokens: &[u32], located: &Located, bytes: &mut [u8]) -> io::Result<Found> {
        let Located { place, offset, handle, is_growing } = located;
        let file = match handle {
            Some(handle) => Arc::clone(handle),
            None => self.open_reader(place.segment)?,
        };
        file.read_at(bytes, *offset)?;
        if digest_of(hash, tokens, bytes) == place.digest || planted::is(Bug::DigestIgnored) {
            return Ok(Found::Whole);
        }
        // Either the bytes are wrong or the question is: the tokens that were written tell.
        let stored = self.stored_tokens(place, *is_growing, &*file).filter(|stored| stored != tokens);
        let is_whole = stored.is_some_and(|stored| digest_of(hash, &stored, bytes) == place.digest);
        Ok(if is_whole { Found::Missing } else { Found::Damaged("its digest is wrong".into()) })
    }

    fn open_reader(&self, segment: SegmentId) -> io::Result<Arc<dyn FileHandle>> {
        let file: Arc<dyn FileHandle> = Arc::from(self.files.open(&self.folder.join(segment.file_name()))?);
        self.index().keep_reader(segment, Arc::clone(&file));
        Ok(file)
    }

    fn stored_tokens(&self, place: &Place, is_growing: bool, file: &dyn FileHandle) -> Option<Vec<u32>> {
        let slot = place.slot as usize;
        if is_growing && let Some(open) = self.writer().open.as_ref().filter(|open| open.segment.id() == place.segment)
        {
            return open.segment.records().get(slot).map(|record| record.tokens.clone());
        }
        read_header(file).ok()?.records.into_iter().nth(slot).map(|record| record.tokens)
    }

    fn drop_damaged(&self, hash: &BlockHash, place: &Place, fault: &str) -> bool {
        let mut index = self.index();
        let is_dropped = index.drop_damaged(hash, place);
        let is_first = index.counters.damaged == 1;
        drop(index);
        if is_dropped && is_first {
            let path = self.folder.join(place.segment.file_name());
            tracing::warn!(path = %path.display(), %fault, "damaged KV block on disk, recomputed; later ones are counted");
        }
        is_dropped
    }

    /// Keeps a block, if it is worth its room. It can be read when this returns, and is durable after
    /// [`BlockStore::seal`]. A cube's last block may have fewer tokens than `block_size`, under a hash of its own.
    ///
    /// # Errors
    /// `Invalid` for bytes or tokens of another size than the format's. A failing disk is [`Stored::NoRoom`].
    pub fn write(&self, hash: BlockHash, tokens: &[u32], bytes: &[u8]) -> Result<Stored> {
        let BlockFormat { block_bytes, block_size, .. } = self.geometry.format;
        if bytes.len() != block_bytes || tokens.is_empty() || tokens.len() > block_size {
            let (num_bytes, num_tokens) = (bytes.len(), tokens.len());
            return Err(invalid!(
                "a block has {block_bytes} bytes and 1 to {block_size} tokens, not {num_bytes} and \
                 {num_tokens}"
            ));
        }
        if let Some(stored) = self.refuse_at_once(&hash) {
            return Ok(stored);
        }
        let digest = digest_of(&hash, tokens, bytes);
        let mut writer = self.writer();
        Ok(self.write_record(&mut writer, BlockRecord { hash, digest, tokens: tokens.to_vec() }, bytes))
    }

    /// What can be said before hashing.
    fn refuse_at_once(&self, hash: &BlockHash) -> Option<Stored> {
        let mut index = self.index();
        index.touch(hash);
        match index.find(hash) {
            Some(_) => Some(Stored::Present),
            None => index.degraded.is_some().then_some(Stored::NoRoom),
        }
    }

    fn write_record(&self, writer: &mut Writer, record: BlockRecord, bytes: &[u8]) -> Stored {
        if self.contains(&record.hash) {
            return Stored::Present;
        }
        if writer.open.is_none() {
            self.tidy(writer);
        }
        let region_bytes = self.geometry.format.region_bytes(self.geometry.num_slots);
        let needed_bytes = self.geometry.format.stride() + if writer.open.is_none() { region_bytes } else { 0 };
        if !self.make_room(writer, needed_bytes, Some(&record.hash)) {
            return Stored::NoRoom;
        }
        match self.append(writer, record, bytes) {
            Ok(()) => Stored::New,
            Err(e) => {
                self.degrade("write to", &self.folder, &e);
                Stored::NoRoom
            }
        }
    }

    fn append(&self, writer: &mut Writer, record: BlockRecord, bytes: &[u8]) -> io::Result<()> {
        if writer.open.is_none() {
            self.start_segment(writer)?;
        }
        let open = writer.open.as_mut().expect("a segment was just started");
        let id = open.segment.id();
        if let Err(e) = open.segment.append(record.clone(), bytes) {
            open.broken = Some(e.to_string());
            // Some of the row may have been written.
            self.index().add_leftover(self.geometry.format.stride());
            return Err(e);
        }
        self.index().push_block(id, &record);
        if open.segment.is_full() {
            // Should this fail, the store is degraded and the next seal says so; the block can be read.
            let _ = self.seal_open(writer);
        }
        Ok(())
    }

    fn start_segment(&self, writer: &mut Writer) -> io::Result<()> {
        let Geometry { format, num_slots, .. } = &self.geometry;
        let id = writer.take_id();
        let segment = SegmentWriter::create(&*self.files, &self.folder, format, id, *num_slots).inspect_err(|_| {
            self.discard(&self.folder.join(id.partial_name()), format.region_bytes(*num_slots));
        })?;
        self.index().start_segment(id, segment.extent().region_bytes, segment.handle());
        writer.open = Some(OpenSegment { segment, broken: None });
        Ok(())
    }

    /// Makes everything durable that was written before: [`Stored::New`] and [`Stored::Present`] are promises when this
    /// returns `Ok`.
    ///
    /// # Errors
    /// `Io` when some of it is not and never will be. It can be read until the store is closed.
    pub fn seal(&self) -> Result<()> {
        self.seal_open(&mut self.writer())
    }

    fn seal_open(&self, writer: &mut Writer) -> Result<()> {
        let Some(open) = writer.open.as_mut().filter(|open| !open.segment.records().is_empty()) else { return Ok(()) };
        let path = open.segment.path();
        if let Some(reason) = &open.broken {
            return Err(Error::io("make durable", &path, io::Error::other(reason.clone())));
        }
        if let Err(e) = open.segment.seal(&*self.files) {
            // What a failed sync left out may be reported as synced by the next: there is no second try.
            open.broken = Some(e.to_string());
            self.degrade("seal", &path, &e);
            return Err(Error::io("make durable", &path, e));
        }
        self.index().seal_segment(open.segment.id());
        writer.open = None;
        Ok(())
    }

    /// Keeps blocks from being evicted, whether they are here yet or not, until as many [`BlockStore::unpin`]s. Those
    /// of other formats count: a cube of another model keeps its segments.
    pub fn pin(&self, hashes: &[BlockHash]) {
        let mut index = self.index();
        hashes.iter().for_each(|hash| index.pin(hash));
    }

    /// The same for one block, which gets room, if it is not here yet, as one of this level.
    pub fn pin_at(&self, hash: BlockHash, level: Option<u8>) {
        let mut index = self.index();
        index.pin(&hash);
        if let Some(level) = level {
            index.set_pin_level(&hash, level);
        }
    }

    /// Undoes one [`BlockStore::pin`] of each.
    pub fn unpin(&self, hashes: &[BlockHash]) {
        let mut index = self.index();
        hashes.iter().for_each(|hash| index.unpin(hash));
    }

    /// Holds on to blocks, whether they are here yet or not, as hard as `level` says, or no longer: they are evicted for blocks
    /// of a higher level alone, and never for those without one. A pinned newcomer counts as one of level 5 unless
    /// its pin says otherwise.
    pub fn set_level(&self, hashes: &[BlockHash], level: Option<u8>) {
        let mut index = self.index();
        hashes.iter().for_each(|hash| index.set_level(hash, level));
    }

    /// Evicts until the bound holds, as when it is lower than at the last run: call it once pins are known. Whether it
    /// holds now.
    pub fn trim(&self) -> bool {
        self.make_room(&mut self.writer(), 0, None)
    }

    /// Blocks evicted or found damaged since the last call, and not there now. Of very many the oldest are left out;
    /// asking for one of those finds it missing.
    pub fn take_dropped(&self) -> Vec<BlockHash> {
        self.index().take_dropped()
    }

    /// The store in figures.
    pub fn stats(&self) -> StoreStats {
        let index = self.index();
        let blocks = index.num_blocks() as u64;
        StoreStats {
            bytes: index.total_bytes(),
            live_bytes: blocks * self.geometry.format.block_bytes as u64,
            foreign_bytes: index.foreign_bytes(),
            blocks,
            segments: index.segments().count() as u64,
            damaged: index.counters.damaged,
            evicted: index.counters.evicted,
            rejected: index.counters.rejected,
            compactions: index.counters.compactions,
            degraded: index.degraded.is_some(),
        }
    }

    /// Holds the store's counts together, for tests.
    ///
    /// # Panics
    /// When they contradict each other.
    pub fn check_integrity(&self) {
        self.index().check_integrity();
    }

    /// Stops writing for good. A shortage that passes, of file descriptors say, stops nothing.
    fn degrade(&self, action: &str, path: &Path, error: &io::Error) {
        let mut index = self.index();
        if index.degraded.is_some() || is_passing(error) {
            return;
        }
        index.degraded = Some(error.to_string());
        drop(index);
        let path = path.display();
        tracing::warn!(%path, %error, "cannot {action} the disk tier: it is read-only until the next start");
    }

    /// Removes a file that could not be finished, or counts it as long as it may be there.
    fn discard(&self, path: &Path, bytes: u64) {
        match self.files.remove(path) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(_) => self.index().add_leftover(bytes),
        }
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn writer(&self) -> MutexGuard<'_, Writer> {
        self.writer.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Writer {
    fn take_id(&mut self) -> SegmentId {
        let id = self.next_id;
        self.next_id = id.next();
        id
    }
}

/// Makes the folders and their names durable: a segment is no safer than any folder above it, and an earlier run may
/// have died between making one and syncing it.
fn make_folder(files: &dyn Files, folder: &Path, own: &Path) -> io::Result<()> {
    files.create_folder(own)?;
    files.sync_folder(folder)?;
    let above = folder.ancestors().skip(1).filter(|above| !above.as_os_str().is_empty());
    for above in above {
        match files.sync_folder(above) {
            // One that we may not open, or whose kind knows no sync, is not one that we made anything in.
            Err(e) if matches!(e.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::InvalidInput) => {}
            synced => synced?,
        }
    }
    Ok(())
}

/// Errors of a disk that takes nothing, as opposed to a folder that cannot be.
fn is_refusal(error: &io::Error) -> bool {
    use io::ErrorKind::{PermissionDenied, QuotaExceeded, ReadOnlyFilesystem, StorageFull};
    let kinds = [PermissionDenied, QuotaExceeded, ReadOnlyFilesystem, StorageFull];
    kinds.contains(&error.kind()) || error.raw_os_error() == Some(libc::EIO)
}

/// Shortages of this process or machine that say nothing about the disk.
fn is_passing(error: &io::Error) -> bool {
    error.raw_os_error().is_some_and(|code| [libc::EMFILE, libc::ENFILE, libc::ENOMEM].contains(&code))
}
