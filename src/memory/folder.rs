//! The folder of manifests and tombstones: reads all of them, replaces one atomically.
//!
//! A change is durable when its call returns: the new file is written under a temporary name and synced, renamed, and
//! the folder is synced. Until the rename nothing has changed; if it or what follows fails, nobody knows, and the error
//! says so.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::cube::{Cube, CubeId};
use super::manifest::{
    FileName, MAX_FILE_BYTES, Tombstone, decode_manifest, decode_snapshot, decode_tombstone, encode_manifest,
    encode_snapshot, encode_tombstone,
};
use super::name::Version;
use super::snapshot::{Snapshot, SnapshotId};
use crate::paging::Files;
use crate::{Error, Result, malformed};

/// What marks a file that is still being written.
const TEMPORARY: &str = "tmp";

/// Where manifests and tombstones lie.
pub(super) struct ManifestFolder {
    files: Arc<dyn Files>,
    folder: PathBuf,
}

/// Whether a change must outlive a crash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// The call returns when it does.
    Synced,
    /// It may be lost, but is never half there.
    Unsynced,
}

/// A write that failed.
#[derive(Debug)]
pub(super) struct WriteFault {
    pub(super) error: Error,
    /// Whether the folder is surely as it was before.
    pub(super) is_undone: bool,
}

/// Everything in the folder.
#[derive(Default)]
pub(super) struct Contents {
    pub(super) manifests: Vec<Cube>,
    pub(super) tombstones: Vec<Tombstone>,
    pub(super) snapshots: Vec<Snapshot>,
    pub(super) damaged: Vec<Damaged>,
}

/// A file that is not what it should be. It is left where it is.
#[derive(Debug)]
pub struct Damaged {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub error: Error,
    /// What its name says it is.
    pub(super) name: Option<FileName>,
}

impl ManifestFolder {
    /// The folder, made if it is missing. What a dead process began to write is removed, and what it finished is synced.
    pub(super) fn open(files: Arc<dyn Files>, folder: PathBuf) -> Result<Self> {
        files.create_folder(&folder).map_err(|e| Error::io("create", &folder, e))?;
        let this = Self { files, folder };
        for path in this.list()?.iter().filter(|path| path.extension().is_some_and(|ending| ending == TEMPORARY)) {
            this.files.remove(path).map_err(|e| Error::io("remove", path, e))?;
        }
        this.sync()?;
        Ok(this)
    }

    /// Reads every file.
    pub(super) fn read_all(&self) -> Result<Contents> {
        let mut contents = Contents::default();
        for path in self.list()? {
            self.read_into(path, &mut contents);
        }
        Ok(contents)
    }

    fn read_into(&self, path: PathBuf, contents: &mut Contents) {
        let text = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let name = text.parse::<FileName>();
        let known = name.as_ref().ok().copied();
        let read = name.and_then(|name| {
            let bytes = read_bounded(self.files.as_ref(), &path)?;
            match name {
                FileName::Manifest(..) => contents.manifests.push(decode_manifest(name, &bytes)?),
                FileName::Tombstone(_) => contents.tombstones.push(decode_tombstone(name, &bytes)?),
                FileName::Snapshot(_) => contents.snapshots.push(decode_snapshot(name, &bytes)?),
            }
            Ok(())
        });
        if let Err(error) = read {
            contents.damaged.push(Damaged { path, error, name: known });
        }
    }

    /// Writes or replaces the manifest of a cube's version.
    pub(super) fn write_manifest(&self, cube: &Cube, durability: Durability) -> std::result::Result<(), WriteFault> {
        let bytes = encode_manifest(cube).map_err(|error| WriteFault { error, is_undone: true })?;
        self.replace(FileName::Manifest(cube.id, cube.version), &bytes, durability)
    }

    /// Writes a tombstone.
    pub(super) fn write_tombstone(&self, tombstone: &Tombstone) -> std::result::Result<(), WriteFault> {
        self.replace(FileName::Tombstone(tombstone.id), &encode_tombstone(tombstone), Durability::Synced)
    }

    /// Writes a snapshot.
    pub(super) fn write_snapshot(&self, snapshot: &Snapshot) -> std::result::Result<(), WriteFault> {
        let bytes = encode_snapshot(snapshot).map_err(|error| WriteFault { error, is_undone: true })?;
        self.replace(FileName::Snapshot(snapshot.id), &bytes, Durability::Synced)
    }

    /// Removes a snapshot, for good.
    pub(super) fn remove_snapshot(&self, id: SnapshotId) -> Result<()> {
        self.remove(FileName::Snapshot(id))?;
        self.sync()
    }

    /// Removes manifests of a cube that has a tombstone.
    pub(super) fn remove_manifests(&self, id: CubeId, versions: impl Iterator<Item = Version>) -> Result<()> {
        for version in versions {
            self.remove(FileName::Manifest(id, version))?;
        }
        Ok(())
    }

    /// Removes a tombstone.
    pub(super) fn remove_tombstone(&self, id: CubeId) -> Result<()> {
        self.remove(FileName::Tombstone(id))
    }

    /// Makes the names in the folder durable.
    pub(super) fn sync(&self) -> Result<()> {
        self.files.sync_folder(&self.folder).map_err(|e| Error::io("sync", &self.folder, e))
    }

    fn remove(&self, name: FileName) -> Result<()> {
        let path = self.folder.join(name.to_string());
        match self.files.remove(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io("remove", &path, error)),
            _ => Ok(()),
        }
    }

    fn list(&self) -> Result<Vec<PathBuf>> {
        self.files.list(&self.folder).map_err(|e| Error::io("read", &self.folder, e))
    }

    fn replace(&self, name: FileName, bytes: &[u8], durability: Durability) -> std::result::Result<(), WriteFault> {
        replace(self.files.as_ref(), &self.folder.join(name.to_string()), bytes, durability)
    }
}

/// Gives `path` this content, or leaves what it had. The folder is synced too.
pub(super) fn replace(
    files: &dyn Files,
    path: &Path,
    bytes: &[u8],
    durability: Durability,
) -> std::result::Result<(), WriteFault> {
    let temporary = path.with_added_extension(TEMPORARY);
    if let Err(error) = write_new(files, &temporary, bytes, durability) {
        // What cannot be removed now is removed at the next start.
        let _ = files.remove(&temporary);
        return Err(WriteFault { error: Error::io("write", &temporary, error), is_undone: true });
    }
    let folder = path.parent().unwrap_or(Path::new("."));
    let renamed = files.rename(&temporary, path).map_err(|e| Error::io("replace", path, e));
    let finished = renamed.and_then(|()| match durability {
        Durability::Synced => files.sync_folder(folder).map_err(|e| Error::io("sync", folder, e)),
        Durability::Unsynced => Ok(()),
    });
    finished.map_err(|error| WriteFault { error, is_undone: false })
}

fn write_new(files: &dyn Files, path: &Path, bytes: &[u8], durability: Durability) -> io::Result<()> {
    let file = match files.create(path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            files.remove(path)?;
            files.create(path)?
        }
        created => created?,
    };
    file.write_at(bytes, 0)?;
    if durability == Durability::Synced { file.sync() } else { Ok(()) }
}

/// The content of a file, unless it is longer than any of ours.
pub(super) fn read_bounded(files: &dyn Files, path: &Path) -> Result<Vec<u8>> {
    let read_error = |error| Error::io("read", path, error);
    let file = files.open(path).map_err(read_error)?;
    let num_bytes = file.num_bytes().map_err(read_error)?;
    let len = usize::try_from(num_bytes).ok().filter(|len| *len <= MAX_FILE_BYTES);
    let len = len.ok_or_else(|| malformed!("it has {num_bytes} bytes, at most {MAX_FILE_BYTES} were expected"))?;
    let mut bytes = vec![0; len];
    file.read_at(&mut bytes, 0).map_err(read_error)?;
    Ok(bytes)
}
