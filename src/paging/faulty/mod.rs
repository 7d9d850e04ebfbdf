//! A file system in memory for tests, which breaks where real ones break: it stops at any operation as if the process
//! had died, loses, tears and reorders what was not synced, fills up, and fails on demand. Seeded, so that a failure
//! repeats.
//!
//! Kept over a crash is what [`Files`] promises and, of the rest, nothing, all, a beginning, or any part in any order:
//! writes in pieces of 512 to 4096 bytes, names one by one. Which of these, the seed decides.

mod content;
mod names;
#[cfg(test)]
mod tests;

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
    /// An operation that fails, and how.
    fail_at: Option<(u64, io::ErrorKind)>,
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
        Self::with(Random::new(seed), Names::default())
    }

    fn with(random: Random, names: Names) -> Self {
        let disk = Disk {
            random,
            names,
            life: 0,
            num_operations: 0,
            stop_at: None,
            fail_at: None,
            is_stopped: false,
            fault: None,
            limit_bytes: None,
            peak_bytes: 0,
        };
        Self { disk: Arc::new(Mutex::new(disk)) }
    }

    /// What is found when the machine goes down now, as a file system of its own: with seed 0 everything is left of what was
    /// not synced, with seed 1 nothing, with others whatever they say.
    pub fn after_crash(&self, seed: u64) -> Self {
        let kept = [Kept::All, Kept::Nothing].get(usize::try_from(seed).unwrap_or(usize::MAX)).copied();
        let mut names = self.lock().names.copy();
        names.crash(&mut Random { state: seed, kept });
        Self::with(Random::new(seed), names)
    }

    /// What the next process finds when this one alone is killed now, as a file system of its own: everything, though what
    /// was not synced may still be lost.
    pub fn after_kill(&self) -> Self {
        let disk = self.lock();
        Self::with(Random::new(disk.random.state), disk.names.copy())
    }

    /// Fails the `number`th operation from now on, counted from 1, without effect; those after it work.
    pub fn fail_at(&self, number: u64, kind: io::ErrorKind) {
        let mut disk = self.lock();
        disk.fail_at = Some((disk.num_operations + number, kind));
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
        disk.names.plant(path, bytes);
    }

    /// Changes the bytes of a file, durably.
    ///
    /// # Panics
    /// When there is no such file.
    pub fn change(&self, path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = self.contents(path).expect("a file to change");
        change(&mut bytes);
        self.plant(path, &bytes);
    }

    /// Changes one bit of a file, durably.
    ///
    /// # Panics
    /// When there is no such bit.
    pub fn flip_bit(&self, path: &Path, bit: u64) {
        self.change(path, |bytes| bytes[(bit / 8) as usize] ^= 1 << (bit % 8));
    }

    /// Changes `num_bits` bits of one file, durably, wherever `seed` says; `false` when no file has any.
    pub fn damage(&self, seed: u64, num_bits: usize) -> bool {
        let mut random = Random::new(seed);
        let disk = self.lock();
        let files: Vec<_> = disk.names.files().filter(|(_, content)| !content.lock().bytes().is_empty()).collect();
        let Some((_, content)) = files.get(random.below(files.len())) else { return false };
        let mut bytes = content.lock().bytes().to_vec();
        for _ in 0..num_bits {
            let bit = random.below(8 * bytes.len());
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        content.lock().replace(&bytes);
        true
    }

    /// Cuts a file off, durably.
    ///
    /// # Panics
    /// When there is no such file.
    pub fn truncate(&self, path: &Path, num_bytes: usize) {
        self.change(path, |bytes| bytes.truncate(num_bytes));
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
        let failure = self.fail_at.filter(|(number, _)| *number == self.num_operations);
        let code = match (self.fault, kind) {
            (Some(Fault::ReadOnly), _) => Some(libc::EROFS),
            (Some(Fault::NoSpace), Kind::TakeRoom | Kind::Write) => Some(libc::ENOSPC),
            (Some(Fault::WriteError), Kind::Write) | (Some(Fault::SyncError), Kind::Sync) => Some(libc::EIO),
            _ => None,
        };
        let error = match failure {
            Some((_, kind)) => Some(kind.into()),
            None => code.map(io::Error::from_raw_os_error),
        };
        let done = match error {
            Some(error) => Err(error),
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

    fn open_to_change(&self, path: &Path) -> io::Result<Box<dyn FileHandle>> {
        self.open(path)
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
struct Random {
    state: u64,
    /// What a crash leaves, when that is not left to chance.
    kept: Option<Kept>,
}

/// How much of what was not synced a crash leaves.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kept {
    Nothing,
    All,
    Beginning,
    AnyPart,
}

impl Random {
    fn new(seed: u64) -> Self {
        Self { state: seed, kept: None }
    }

    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.state ^ (self.state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In `[0, bound)`.
    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    fn kept(&mut self) -> Kept {
        let chosen = [Kept::Nothing, Kept::All, Kept::Beginning, Kept::AnyPart][self.below(4)];
        self.kept.unwrap_or(chosen)
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
