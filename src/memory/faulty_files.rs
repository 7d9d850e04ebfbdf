//! Files in memory that crash: stop at a given operation, then keep an arbitrary part of what was not made durable.
//!
//! After a crash every write that was not synced is there or not, whole or cut; every name that was made, moved or
//! removed since its folder was synced has changed or not, in any combination. That is what POSIX allows.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use crate::paging::{FileHandle, Files};

/// A file system that can be crashed.
#[derive(Clone, Default)]
pub(super) struct FaultyFiles(Arc<Mutex<Disk>>);

#[derive(Default)]
struct Disk {
    contents: Vec<Content>,
    names: BTreeMap<PathBuf, usize>,
    durable_names: BTreeMap<PathBuf, usize>,
    /// Changes of names since their folder was synced.
    pending: Vec<NameChange>,
    num_operations: usize,
    /// The operation at which everything stops, and how.
    fault: Option<(usize, Fault)>,
    has_crashed: bool,
}

/// What happens at the chosen operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// The process dies: this operation is half done, all later ones fail.
    Crash,
    /// This operation alone fails, without effect.
    Error(ErrorKind),
}

#[derive(Clone, Default)]
struct Content {
    bytes: Vec<u8>,
    durable: Vec<u8>,
    /// Writes since the last sync.
    pending: Vec<(usize, Vec<u8>)>,
}

#[derive(Clone)]
enum NameChange {
    Made(PathBuf, usize),
    Moved(PathBuf, PathBuf, usize),
    Removed(PathBuf),
}

/// Bits from a seed: SplitMix64.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Seed 0 keeps everything, seed 1 nothing, others a part.
    fn keeps(&mut self, seed: u64) -> bool {
        match seed {
            0 => true,
            1 => false,
            _ => self.next() & 1 == 1,
        }
    }
}

impl FaultyFiles {
    /// Lets the operation with this number, counted from now, go wrong.
    pub(super) fn fail_at(&self, operation: usize, fault: Fault) {
        let mut disk = self.disk();
        disk.fault = Some((disk.num_operations + operation, fault));
    }

    pub(super) fn has_crashed(&self) -> bool {
        self.disk().has_crashed
    }

    pub(super) fn num_operations(&self) -> usize {
        self.disk().num_operations
    }

    pub(super) fn names(&self) -> Vec<PathBuf> {
        self.disk().names.keys().cloned().collect()
    }

    /// Replaces the content of a file, as damage does.
    pub(super) fn damage(&self, path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
        let mut disk = self.disk();
        let content = disk.names[path];
        change(&mut disk.contents[content].bytes);
    }

    /// Gives two files each other's names.
    pub(super) fn swap(&self, one: &Path, other: &Path) {
        let mut disk = self.disk();
        let (first, second) = (disk.names[one], disk.names[other]);
        disk.names.insert(one.to_owned(), second);
        disk.names.insert(other.to_owned(), first);
    }

    /// What is found after the machine went down: what was durable, and of the rest what `seed` says.
    pub(super) fn after_crash(&self, seed: u64) -> Self {
        let disk = self.disk();
        let mut dice = Dice(seed);
        let mut names = disk.durable_names.clone();
        for change in disk.pending.iter().filter(|_| dice.keeps(seed)) {
            change.apply(&mut names);
        }
        let contents: Vec<Content> = disk.contents.iter().map(|content| content.after_crash(seed, &mut dice)).collect();
        Self(Arc::new(Mutex::new(Disk { contents, durable_names: names.clone(), names, ..Disk::default() })))
    }

    /// What the next process finds when this one alone was killed: everything, durable or not.
    pub(super) fn after_kill(&self) -> Self {
        let disk = self.disk();
        Self(Arc::new(Mutex::new(Disk {
            contents: disk.contents.clone(),
            names: disk.names.clone(),
            durable_names: disk.durable_names.clone(),
            pending: disk.pending.clone(),
            ..Disk::default()
        })))
    }

    fn disk(&self) -> MutexGuard<'_, Disk> {
        self.0.lock().expect("no test panics inside the files")
    }
}

impl NameChange {
    fn apply(&self, names: &mut BTreeMap<PathBuf, usize>) {
        match self {
            Self::Made(path, content) => {
                names.insert(path.clone(), *content);
            }
            Self::Moved(source, target, content) => {
                names.remove(source);
                names.insert(target.clone(), *content);
            }
            Self::Removed(path) => {
                names.remove(path);
            }
        }
    }

    fn is_in(&self, folder: &Path) -> bool {
        let (Self::Made(path, _) | Self::Moved(_, path, _) | Self::Removed(path)) = self;
        path.parent() == Some(folder)
    }
}

impl Content {
    fn after_crash(&self, seed: u64, dice: &mut Dice) -> Self {
        let mut bytes = self.durable.clone();
        for (start, written) in &self.pending {
            if !dice.keeps(seed) {
                continue;
            }
            let cut = if seed == 0 { written.len() } else { dice.next() as usize % (written.len() + 1) };
            write_into(&mut bytes, *start, &written[..cut]);
        }
        Self { durable: bytes.clone(), bytes, pending: Vec::new() }
    }
}

fn write_into(bytes: &mut Vec<u8>, start: usize, written: &[u8]) {
    if bytes.len() < start + written.len() {
        bytes.resize(start + written.len(), 0);
    }
    bytes[start..start + written.len()].copy_from_slice(written);
}

impl Disk {
    /// Counts an operation. `Ok(true)`: it is the last one, and is half done.
    fn step(&mut self) -> io::Result<bool> {
        if self.has_crashed {
            return Err(io::Error::other("crashed"));
        }
        let operation = self.num_operations;
        self.num_operations += 1;
        match self.fault {
            Some((at, Fault::Crash)) if at == operation => {
                self.has_crashed = true;
                Ok(true)
            }
            Some((at, Fault::Error(kind))) if at == operation => Err(kind.into()),
            _ => Ok(false),
        }
    }

    fn change_name(&mut self, change: NameChange) -> io::Result<()> {
        let is_last = self.step()?;
        change.apply(&mut self.names);
        self.pending.push(change);
        if is_last { Err(io::Error::other("crashed")) } else { Ok(()) }
    }

    fn find(&self, path: &Path) -> io::Result<usize> {
        self.names.get(path).copied().ok_or_else(|| ErrorKind::NotFound.into())
    }
}

impl Files for FaultyFiles {
    fn create(&self, path: &Path) -> io::Result<Box<dyn FileHandle>> {
        let mut disk = self.disk();
        if disk.names.contains_key(path) {
            return Err(ErrorKind::AlreadyExists.into());
        }
        let content = disk.contents.len();
        disk.contents.push(Content::default());
        disk.change_name(NameChange::Made(path.to_owned(), content))?;
        Ok(Box::new(FaultyFile { files: self.clone(), content }))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn FileHandle>> {
        let content = self.disk().find(path)?;
        Ok(Box::new(FaultyFile { files: self.clone(), content }))
    }

    fn rename(&self, source: &Path, target: &Path) -> io::Result<()> {
        let mut disk = self.disk();
        let content = disk.find(source)?;
        disk.change_name(NameChange::Moved(source.to_owned(), target.to_owned(), content))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut disk = self.disk();
        disk.find(path)?;
        disk.change_name(NameChange::Removed(path.to_owned()))
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<PathBuf>> {
        Ok(self.disk().names.keys().filter(|path| path.parent() == Some(folder)).cloned().collect())
    }

    fn create_folder(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }

    fn sync_folder(&self, folder: &Path) -> io::Result<()> {
        let mut disk = self.disk();
        if disk.step()? {
            return Err(io::Error::other("crashed"));
        }
        let (synced, pending) = std::mem::take(&mut disk.pending).into_iter().partition(|change| change.is_in(folder));
        disk.pending = pending;
        let synced: Vec<NameChange> = synced;
        synced.iter().for_each(|change| change.apply(&mut disk.durable_names));
        Ok(())
    }
}

struct FaultyFile {
    files: FaultyFiles,
    content: usize,
}

impl FileHandle for FaultyFile {
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let disk = self.files.disk();
        let start = offset as usize;
        let source = disk.contents[self.content].bytes.get(start..start + bytes.len());
        bytes.copy_from_slice(source.ok_or(ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut disk = self.files.disk();
        let is_last = disk.step()?;
        let content = &mut disk.contents[self.content];
        let written = if is_last { &bytes[..bytes.len() / 2] } else { bytes };
        write_into(&mut content.bytes, offset as usize, written);
        content.pending.push((offset as usize, written.to_vec()));
        if is_last { Err(io::Error::other("crashed")) } else { Ok(()) }
    }

    fn sync(&self) -> io::Result<()> {
        let mut disk = self.files.disk();
        if disk.step()? {
            return Err(io::Error::other("crashed"));
        }
        let content = &mut disk.contents[self.content];
        content.durable = content.bytes.clone();
        content.pending.clear();
        Ok(())
    }

    fn num_bytes(&self) -> io::Result<u64> {
        Ok(self.files.disk().contents[self.content].bytes.len() as u64)
    }
}
