//! A file system in memory for tests, which breaks where real ones break: it stops at any operation as if the process
//! had died, loses, tears and reorders what was not synced, fills up, and fails on demand. Seeded, so that a failure
//! repeats.
//!
//! Kept over a crash is what [`Files`] promises and, of the rest, nothing, all, a beginning, or any part in any order:
//! writes in pieces of 512 to 4096 bytes, names one by one. Which of these, the seed decides.

mod content;
mod names;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use self::content::Content;
use self::names::{Entry, Names};
use super::{FileHandle, Files};

/// What fails, until another fault or none is injected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// What takes room: ENOSPC.
    NoSpace,
    /// Every change: EROFS.
    ReadOnly,
    /// Writes: EIO.
    WriteError,
    /// Syncs of files and folders: EIO. What they should have made durable is lost in a crash.
    SyncError,
    /// Reads and opening: EIO.
    ReadError,
    /// Reads: the file has become shorter.
    ShortRead,
}

/// The file system. Clones share it.
#[derive(Clone)]
pub struct FaultyFiles {
    disk: Arc<Mutex<Disk>>,
}

struct Disk {
    random: Random,
    names: Names,
    /// Handles of an earlier life fail.
    life: u64,
    num_operations: u64,
    stop_at: Option<u64>,
    is_stopped: bool,
    fault: Option<Fault>,
    limit_bytes: Option<u64>,
    peak_bytes: u64,
}

/// What an operation needs of the disk.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    TakeRoom,
    Write,
    Sync,
    Rename,
}

impl FaultyFiles {
    /// An empty file system.
    pub fn new(seed: u64) -> Self {
        let disk = Disk {
            random: Random(seed),
            names: Names::default(),
            life: 0,
            num_operations: 0,
            stop_at: None,
            is_stopped: false,
            fault: None,
            limit_bytes: None,
            peak_bytes: 0,
        };
        Self { disk: Arc::new(Mutex::new(disk)) }
    }

    /// Operations that change something, so far: creations, writes, syncs, renames, removals.
    pub fn num_operations(&self) -> u64 {
        self.lock().num_operations
    }

    /// Stops at the `number`th operation from now on, counted from 1. That one happens or not, and is reported to have
    /// failed either way; all after it fail, reads included.
    pub fn stop_at(&self, number: u64) {
        let mut disk = self.lock();
        disk.stop_at = Some(disk.num_operations + number);
    }

    /// Whether it stopped.
    pub fn is_stopped(&self) -> bool {
        self.lock().is_stopped
    }

    /// The machine comes up again after a crash: what was not synced is lost in whole or in part, handles are dead,
    /// faults are gone.
    pub fn restart(&self) {
        let mut disk = self.lock();
        let Disk { random, names, .. } = &mut *disk;
        names.crash(random);
        disk.life += 1;
        disk.stop_at = None;
        disk.is_stopped = false;
        disk.fault = None;
    }

    /// Lets operations fail from now on, or no longer.
    pub fn inject(&self, fault: Option<Fault>) {
        self.lock().fault = fault;
    }

    /// Sets the disk's size: a write beyond it writes what fits, and fails.
    pub fn limit_bytes(&self, limit_bytes: Option<u64>) {
        self.lock().limit_bytes = limit_bytes;
    }

    /// Bytes of all files now.
    pub fn num_bytes(&self) -> u64 {
        self.lock().names.num_bytes()
    }

    /// Bytes of all files when they were most.
    pub fn peak_bytes(&self) -> u64 {
        self.lock().peak_bytes
    }

    /// All files, in order of path.
    pub fn paths(&self) -> Vec<PathBuf> {
        self.lock().names.files().map(|(path, _)| path.clone()).collect()
    }

    /// A file's bytes.
    pub fn contents(&self, path: &Path) -> Option<Vec<u8>> {
        Some(self.lock().names.file(path)?.lock().bytes().to_vec())
    }

    /// Puts a file there, durably, as if it had always been.
    ///
    /// # Panics
    /// When its folder does not exist.
    pub fn plant(&self, path: &Path, bytes: &[u8]) {
        let mut disk = self.lock();
        assert!(disk.names.is_folder(path.parent().unwrap_or(path)), "{} has a folder", path.display());
        disk.names.plant(path, Entry::file(Content::durable(bytes)));
    }

    /// Changes one bit of a file, durably.
    ///
    /// # Panics
    /// When there is no such bit.
    pub fn flip_bit(&self, path: &Path, bit: u64) {
        let mut bytes = self.contents(path).expect("a file to damage");
        bytes[(bit / 8) as usize] ^= 1 << (bit % 8);
        self.plant(path, &bytes);
    }

    /// Cuts a file off, durably.
    ///
    /// # Panics
    /// When there is no such file.
    pub fn truncate(&self, path: &Path, num_bytes: usize) {
        let mut bytes = self.contents(path).expect("a file to cut off");
        bytes.truncate(num_bytes);
        self.plant(path, &bytes);
    }

    /// Gives two files each other's names, durably.
    ///
    /// # Panics
    /// When one does not exist.
    pub fn swap(&self, first: &Path, second: &Path) {
        let bytes = [first, second].map(|path| self.contents(path).expect("a file to swap"));
        self.plant(first, &bytes[1]);
        self.plant(second, &bytes[0]);
    }

    fn lock(&self) -> MutexGuard<'_, Disk> {
        self.disk.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn handle(&self, disk: &Disk, content: Arc<Content>) -> Box<dyn FileHandle> {
        Box::new(FaultyHandle { files: self.clone(), content, life: disk.life })
    }
}

impl Disk {
    fn check_running(&self) -> io::Result<()> {
        if self.is_stopped { Err(io::Error::other("the process died")) } else { Ok(()) }
    }

    /// Does an operation that changes something, unless it is time to stop or a fault forbids it.
    fn change<T>(&mut self, kind: Kind, operation: impl FnOnce(&mut Self) -> io::Result<T>) -> io::Result<T> {
        self.check_running()?;
        self.num_operations += 1;
        let is_last = self.stop_at == Some(self.num_operations);
        let code = match (self.fault, kind) {
            (Some(Fault::ReadOnly), _) => Some(libc::EROFS),
            (Some(Fault::NoSpace), Kind::TakeRoom | Kind::Write) => Some(libc::ENOSPC),
            (Some(Fault::WriteError), Kind::Write) | (Some(Fault::SyncError), Kind::Sync) => Some(libc::EIO),
            _ => None,
        };
        let done = match code {
            Some(code) => Err(io::Error::from_raw_os_error(code)),
            None if is_last && self.random.below(2) == 0 => Err(io::Error::other("the process died")),
            None => operation(self),
        };
        self.peak_bytes = self.peak_bytes.max(self.names.num_bytes());
        self.is_stopped |= is_last;
        self.check_running()?;
        done
    }

    fn check_read(&self) -> io::Result<()> {
        self.check_running()?;
        match self.fault {
            Some(Fault::ReadError) => Err(io::Error::from_raw_os_error(libc::EIO)),
            _ => Ok(()),
        }
    }
}

impl Files for FaultyFiles {
    fn create(&self, path: &Path) -> io::Result<Box<dyn FileHandle>> {
        let mut disk = self.lock();
        let content = Arc::new(Content::default());
        disk.change(Kind::TakeRoom, |disk| disk.names.create(path, Entry::File(Arc::clone(&content))))?;
        Ok(self.handle(&disk, content))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn FileHandle>> {
        let disk = self.lock();
        disk.check_read()?;
        let content = disk.names.file(path).ok_or(io::ErrorKind::NotFound)?;
        Ok(self.handle(&disk, content))
    }

    fn rename(&self, source: &Path, target: &Path) -> io::Result<()> {
        self.lock().change(Kind::Rename, |disk| disk.names.rename(source, target))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.lock().change(Kind::Rename, |disk| disk.names.remove(path))
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<PathBuf>> {
        let disk = self.lock();
        disk.check_read()?;
        disk.names.list(folder)
    }

    fn create_folder(&self, folder: &Path) -> io::Result<()> {
        let mut disk = self.lock();
        if disk.names.is_folder(folder) {
            return disk.check_running();
        }
        disk.change(Kind::TakeRoom, |disk| disk.names.create_folder(folder))
    }

    fn sync_folder(&self, folder: &Path) -> io::Result<()> {
        self.lock().change(Kind::Sync, |disk| disk.names.sync(folder))
    }
}

/// An open file, or one that was open before a crash.
struct FaultyHandle {
    files: FaultyFiles,
    content: Arc<Content>,
    life: u64,
}

impl FaultyHandle {
    fn disk(&self) -> io::Result<MutexGuard<'_, Disk>> {
        let disk = self.files.lock();
        if disk.life == self.life { Ok(disk) } else { Err(io::Error::other("the process died")) }
    }
}

impl FileHandle for FaultyHandle {
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let disk = self.disk()?;
        disk.check_read()?;
        if disk.fault == Some(Fault::ShortRead) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.content.lock().read_at(bytes, offset as usize)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.disk()?.change(Kind::Write, |disk| {
            let others = disk.names.num_bytes() - self.content.lock().bytes().len() as u64;
            let room = disk.limit_bytes.map_or(u64::MAX, |limit| limit.saturating_sub(others + offset));
            let fitting = bytes.len().min(usize::try_from(room).unwrap_or(usize::MAX));
            self.content.lock().write_at(&bytes[..fitting], offset as usize);
            if fitting == bytes.len() { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::ENOSPC)) }
        })
    }

    fn sync(&self) -> io::Result<()> {
        let mut disk = self.disk()?;
        if disk.fault == Some(Fault::SyncError) {
            self.content.lock().fail_sync();
        }
        disk.change(Kind::Sync, |_| {
            self.content.lock().sync();
            Ok(())
        })
    }

    fn num_bytes(&self) -> io::Result<u64> {
        let disk = self.disk()?;
        disk.check_read()?;
        Ok(self.content.lock().bytes().len() as u64)
    }
}

/// Reproducible numbers: SplitMix64.
struct Random(u64);

/// How much of what was not synced a crash leaves.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kept {
    Nothing,
    All,
    Beginning,
    AnyPart,
}

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In `[0, bound)`.
    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    fn kept(&mut self) -> Kept {
        [Kept::Nothing, Kept::All, Kept::Beginning, Kept::AnyPart][self.below(4)]
    }

    /// What is left of a list of things that may be lost, in order.
    fn choose<T>(&mut self, things: Vec<T>) -> Vec<T> {
        let kept = self.kept();
        let num_first = self.below(things.len() + 1);
        let is_kept = |at: usize, random: &mut Self| match kept {
            Kept::Nothing => false,
            Kept::All => true,
            Kept::Beginning => at < num_first,
            Kept::AnyPart => random.below(2) == 0,
        };
        things.into_iter().enumerate().filter_map(|(at, thing)| is_kept(at, self).then_some(thing)).collect()
    }

    fn shuffle<T>(&mut self, things: &mut [T]) {
        for at in (1..things.len()).rev() {
            things.swap(at, self.below(at + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEEDS: std::ops::Range<u64> = 0..200;

    fn made(seed: u64) -> FaultyFiles {
        let files = FaultyFiles::new(seed);
        files.create_folder(Path::new("/vault")).unwrap();
        files.sync_folder(Path::new("/")).unwrap();
        files
    }

    /// How many of the seeds leave each of several outcomes.
    fn outcomes<T: Ord>(outcome: impl Fn(u64) -> T) -> std::collections::BTreeMap<T, usize> {
        let mut counts = std::collections::BTreeMap::new();
        SEEDS.for_each(|seed| *counts.entry(outcome(seed)).or_insert(0) += 1);
        counts
    }

    #[test]
    fn what_was_synced_survives_and_the_rest_may_not() {
        let path = Path::new("/vault/file");
        let counts = outcomes(|seed| {
            let files = made(seed);
            let file = files.create(path).unwrap();
            file.write_at(&[1; 8192], 0).unwrap();
            file.sync().unwrap();
            files.sync_folder(Path::new("/vault")).unwrap();
            file.write_at(&[2; 8192], 4096).unwrap();
            files.restart();
            assert!(file.read_at(&mut [0], 0).is_err(), "handles die with the process");
            let bytes = files.contents(path).unwrap();
            assert_eq!(bytes[..4096], [1; 4096]);
            assert!(bytes[4096..].iter().all(|byte| *byte < 3));
            (bytes.len(), bytes[4096..].iter().filter(|byte| **byte == 2).count())
        });
        assert!(counts.contains_key(&(8192, 0)) && counts.contains_key(&(12288, 8192)), "{counts:?}");
        assert!(counts.len() > 5, "some are torn: {counts:?}");
    }

    #[test]
    fn names_that_were_not_synced_may_be_lost() {
        let counts = outcomes(|seed| {
            let files = made(seed);
            let file = files.create(Path::new("/vault/a")).unwrap();
            file.sync().unwrap();
            files.rename(Path::new("/vault/a"), Path::new("/vault/b")).unwrap();
            files.restart();
            files.paths()
        });
        assert_eq!(counts.len(), 3, "neither, the first, the last: {counts:?}");
    }

    #[test]
    fn a_folder_is_lost_with_what_is_in_it() {
        let counts = outcomes(|seed| {
            let files = FaultyFiles::new(seed);
            files.create_folder(Path::new("/vault/kv")).unwrap();
            files.create(Path::new("/vault/kv/a")).unwrap();
            files.sync_folder(Path::new("/vault/kv")).unwrap();
            files.restart();
            files.paths().len()
        });
        assert_eq!(counts.len(), 2, "{counts:?}");
    }

    #[test]
    fn it_stops_and_starts_again() {
        let counts = outcomes(|seed| {
            let files = made(seed);
            files.stop_at(2);
            let file = files.create(Path::new("/vault/a")).unwrap();
            assert!(!files.is_stopped());
            assert!(file.write_at(&[1], 0).is_err() && files.is_stopped());
            assert!(file.read_at(&mut [0], 0).is_err() && files.list(Path::new("/vault")).is_err());
            let written = files.num_bytes();
            files.restart();
            files.list(Path::new("/vault")).unwrap();
            written
        });
        assert_eq!(counts.len(), 2, "the last operation happens or not: {counts:?}");
    }

    #[test]
    fn faults_fail_what_they_say() {
        let files = made(0);
        let (path, other) = (Path::new("/vault/a"), Path::new("/vault/b"));
        let file = files.create(path).unwrap();
        file.write_at(&[1; 10], 0).unwrap();
        let code = |error: io::Error| error.raw_os_error().unwrap();
        files.inject(Some(Fault::NoSpace));
        assert_eq!(code(file.write_at(&[1], 0).unwrap_err()), libc::ENOSPC);
        files.inject(Some(Fault::ReadOnly));
        assert_eq!(code(files.remove(path).unwrap_err()), libc::EROFS);
        files.inject(Some(Fault::ShortRead));
        assert_eq!(file.read_at(&mut [0], 0).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        files.inject(Some(Fault::ReadError));
        assert_eq!(code(files.open(path).err().unwrap()), libc::EIO);
        files.inject(Some(Fault::SyncError));
        assert_eq!(code(file.sync().unwrap_err()), libc::EIO);
        files.inject(None);
        files.limit_bytes(Some(12));
        assert_eq!(code(file.write_at(&[2; 10], 5).unwrap_err()), libc::ENOSPC);
        assert_eq!(files.contents(path).unwrap(), [1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2]);
        files.plant(other, &[7]);
        files.swap(path, other);
        files.flip_bit(path, 3);
        files.truncate(other, 2);
        assert_eq!((files.contents(path).unwrap(), files.contents(other).unwrap()), (vec![15], vec![1, 1]));
        assert_eq!((files.num_bytes(), files.peak_bytes()), (3, 12));
    }

    #[test]
    fn what_a_failed_sync_should_have_kept_is_lost() {
        let files = made(3);
        let file = files.create(Path::new("/vault/a")).unwrap();
        files.sync_folder(Path::new("/vault")).unwrap();
        file.write_at(&[1], 0).unwrap();
        files.inject(Some(Fault::SyncError));
        assert!(file.sync().is_err());
        files.inject(None);
        file.sync().unwrap();
        files.restart();
        assert_eq!(files.contents(Path::new("/vault/a")).unwrap(), []);
    }
}
