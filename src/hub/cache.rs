//! Owns the user's model cache: where it is, what is in it, one writer at a time, and that a file in it is whole.
//!
//! Layout below the root: `models/NAME/FILE`, beside it `FILE.json` (size and digest as downloaded), and
//! `locks/NAME.lock`. A file appears under its name only after its digest was checked and its bytes were synced.

use std::fs::{File, TryLockError};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::catalog::Artifact;
use super::digest;
use super::progress::Progress;
use crate::{Error, Result, invalid, malformed};

/// A model cache on disk.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
}

/// A downloaded model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CachedModel {
    /// Its short name.
    pub name: String,
    /// The file.
    pub path: PathBuf,
    /// The file's size now.
    pub size_bytes: u64,
    /// The digest it had when it was downloaded.
    pub sha256: String,
}

/// What the cache has of an artifact. Only sizes are compared: a digest at every start would read the whole file.
#[derive(Debug, PartialEq, Eq)]
pub enum CacheState {
    /// Nothing.
    Missing,
    /// The file, whose digest was checked when it was written.
    Ready(PathBuf),
    /// A file of the right size without its record.
    Unrecorded(PathBuf),
    /// A file that cannot be the artifact, and why.
    Damaged(String),
}

/// The record beside a file.
#[derive(Serialize, Deserialize)]
struct Record {
    size_bytes: u64,
    sha256: String,
}

impl Cache {
    /// The user's cache: `MNEME_CACHE_DIR`, or `mneme` in the system's cache folder (`XDG_CACHE_HOME`).
    ///
    /// # Errors
    /// `Invalid` when neither is known.
    pub fn from_env() -> Result<Self> {
        match std::env::var_os("MNEME_CACHE_DIR").filter(|value| !value.is_empty()) {
            Some(root) => Ok(Cache::at(root)),
            None => dirs::cache_dir()
                .map(|base| Cache::at(base.join("mneme")))
                .ok_or_else(|| invalid!("no cache folder is known (HOME is unset); set MNEME_CACHE_DIR")),
        }
    }

    /// A cache at a given folder, made when first written to. A relative folder is taken from the current one now:
    /// child processes run elsewhere.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        let root = root.into();
        Cache { root: std::path::absolute(&root).unwrap_or(root) }
    }

    /// The folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn folder(&self, name: &str) -> PathBuf {
        self.root.join("models").join(name)
    }

    /// Scratch space of the one download that holds the lock of `name`.
    pub(super) fn work_folder(&self, name: &str) -> PathBuf {
        self.folder(name).join(".download")
    }

    pub(super) fn file(&self, artifact: &Artifact) -> PathBuf {
        self.folder(artifact.name).join(artifact.file_name)
    }

    /// What there is of `artifact`.
    ///
    /// # Errors
    /// `Io` when the cache cannot be read.
    pub fn state(&self, artifact: &Artifact) -> Result<CacheState> {
        let path = self.file(artifact);
        let found_bytes = match std::fs::metadata(&path) {
            Ok(metadata) => metadata.len(),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(CacheState::Missing),
            Err(e) => return Err(Error::io("read", &path, e)),
        };
        if found_bytes != artifact.size_bytes {
            let wanted = artifact.size_bytes;
            return Ok(CacheState::Damaged(format!("{} has {found_bytes} bytes, not {wanted}", path.display())));
        }
        match read_record(&path) {
            None => Ok(CacheState::Unrecorded(path)),
            Some(record) if record.sha256 == artifact.sha256 => Ok(CacheState::Ready(path)),
            Some(_) => Ok(CacheState::Damaged(format!("{} is another version of the model", path.display()))),
        }
    }

    /// All downloaded models, by name. Downloads under way and files without a record are left out.
    ///
    /// # Errors
    /// `Io` when the cache cannot be read; a cache that does not exist is empty.
    pub fn list(&self) -> Result<Vec<CachedModel>> {
        let mut models = Vec::new();
        for folder in entries(&self.root.join("models"))? {
            let Some(name) = folder.file_name().and_then(|name| name.to_str()) else { continue };
            if !folder.is_dir() {
                continue;
            }
            for path in entries(&folder)? {
                let Some(record) = read_record(&path) else { continue };
                let size_bytes = std::fs::metadata(&path).map_err(|e| Error::io("read", &path, e))?.len();
                models.push(CachedModel { name: name.to_owned(), path, size_bytes, sha256: record.sha256 });
            }
        }
        models.sort_by(|a, b| (&a.name, &a.path).cmp(&(&b.name, &b.path)));
        Ok(models)
    }

    /// Deletes a downloaded model; `false` when there was none. Waits for a download of it to end.
    ///
    /// # Errors
    /// `Invalid` for a name that is no plain name, `Io` when deleting fails.
    pub fn remove(&self, name: &str, progress: &mut dyn Progress) -> Result<bool> {
        if !super::reference::is_plain(name, "") {
            return Err(invalid!("{name:?} is no short name"));
        }
        let folder = self.folder(name);
        if !folder.exists() {
            return Ok(false);
        }
        let _lock = self.lock(name, progress)?;
        match std::fs::remove_dir_all(&folder) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(Error::io("delete", &folder, e)),
        }
    }

    /// Makes this process the only one that writes `name`; waits for another. The system frees the lock of a process
    /// that dies, so a lock file left behind blocks nobody.
    pub(super) fn lock(&self, name: &str, progress: &mut dyn Progress) -> Result<CacheLock> {
        let folder = self.root.join("locks");
        std::fs::create_dir_all(&folder).map_err(|e| Error::io("create", &folder, e))?;
        let path = folder.join(format!("{name}.lock"));
        let file = File::create(&path).map_err(|e| Error::io("create", &path, e))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                progress.message(&format!("waiting: another process is downloading {name}"));
                file.lock().map_err(|e| Error::io("lock", &path, e))?;
            }
            Err(TryLockError::Error(e)) => return Err(Error::io("lock", &path, e)),
        }
        Ok(CacheLock { _file: file })
    }
}

/// Held while one model's folder is written; dropping it lets the next process in.
pub(super) struct CacheLock {
    _file: File,
}

/// The sorted entries of a folder, empty when there is none. Names beginning with a dot are scratch space.
fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let reader = match std::fs::read_dir(folder) {
        Ok(reader) => reader,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::io("list", folder, e)),
    };
    let mut paths = Vec::new();
    for entry in reader {
        let entry = entry.map_err(|e| Error::io("list", folder, e))?;
        if !entry.file_name().as_encoded_bytes().starts_with(b".") {
            paths.push(entry.path());
        }
    }
    paths.sort();
    Ok(paths)
}

fn record_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".json");
    PathBuf::from(name)
}

fn read_record(path: &Path) -> Option<Record> {
    let text = std::fs::read(record_path(path)).ok()?;
    serde_json::from_slice(&text).ok()
}

/// Notes that `path` was found to have the artifact's digest.
pub(super) fn write_record(path: &Path, artifact: &Artifact) -> Result<()> {
    let record = Record { size_bytes: artifact.size_bytes, sha256: artifact.sha256.to_owned() };
    let target = record_path(path);
    let text = serde_json::to_vec(&record).expect("a record has only plain fields");
    std::fs::write(&target, text).map_err(|e| Error::io("write", &target, e))
}

/// Deletes the record and then the file, so that a crash in between leaves a file without a record, which is checked.
pub(super) fn discard(path: &Path) -> Result<()> {
    for path in [record_path(path), path.to_path_buf()] {
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io("delete", &path, e)),
            _ => {}
        }
    }
    Ok(())
}

/// A download on its way into the cache: hashes while it writes, and is deleted unless it is committed.
pub(super) struct PartialFile<'a> {
    artifact: &'a Artifact,
    target: PathBuf,
    path: PathBuf,
    file: BufWriter<File>,
    hasher: Sha256,
    written_bytes: u64,
}

impl<'a> PartialFile<'a> {
    /// Starts writing `artifact` below `folder`, which the caller has locked; what a dead download left is overwritten.
    pub(super) fn create(artifact: &'a Artifact, folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))?;
        let path = folder.join(format!(".{}.partial", artifact.file_name));
        let file = File::create(&path).map_err(|e| Error::io("create", &path, e))?;
        let target = folder.join(artifact.file_name);
        let file = BufWriter::with_capacity(1 << 20, file);
        Ok(PartialFile { artifact, target, path, file, hasher: Sha256::new(), written_bytes: 0 })
    }

    /// Checks size and digest, syncs, and gives the file its name.
    ///
    /// # Errors
    /// `Format` when the bytes are not the artifact's, `Io` when writing fails; the partial file is deleted then.
    pub(super) fn commit(mut self) -> Result<PathBuf> {
        let (artifact, path) = (self.artifact, self.path.clone());
        self.file.flush().map_err(|e| Error::io("write", &path, e))?;
        if self.written_bytes != artifact.size_bytes {
            let (found, wanted) = (self.written_bytes, artifact.size_bytes);
            return Err(malformed!("{} ended after {found} of {wanted} bytes", artifact.file_name));
        }
        let found = digest::to_hex(std::mem::take(&mut self.hasher));
        if found != artifact.sha256 {
            let (name, wanted) = (artifact.file_name, artifact.sha256);
            return Err(malformed!("{name} has SHA-256 {found}, not {wanted}: refused"));
        }
        self.file.get_ref().sync_all().map_err(|e| Error::io("sync", &path, e))?;
        discard(&self.target)?;
        std::fs::rename(&path, &self.target).map_err(|e| Error::io("rename", &path, e))?;
        write_record(&self.target, artifact)?;
        sync_folder(&self.target)?;
        Ok(self.target.clone())
    }
}

impl Write for PartialFile<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let after_bytes = self.written_bytes + bytes.len() as u64;
        if after_bytes > self.artifact.size_bytes {
            let limit = self.artifact.size_bytes;
            return Err(std::io::Error::other(format!("the source gives more than the {limit} bytes of the model")));
        }
        let num_written = self.file.write(bytes)?;
        self.hasher.update(&bytes[..num_written]);
        self.written_bytes += num_written as u64;
        Ok(num_written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

impl Drop for PartialFile<'_> {
    fn drop(&mut self) {
        // After a commit the name is gone and this finds nothing.
        let _ = std::fs::remove_file(&self.path);
    }
}

fn sync_folder(path: &Path) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(|e| Error::io("sync", folder, e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::progress::Silent;

    static ABC: Artifact = Artifact {
        name: "abc",
        about: "",
        file_name: "abc.gguf",
        size_bytes: 3,
        sha256: "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        sources: &[],
    };

    fn download(cache: &Cache, bytes: &[u8]) -> Result<PathBuf> {
        let mut partial = PartialFile::create(&ABC, &cache.folder(ABC.name))?;
        partial.write_all(bytes).map_err(|e| Error::io("write", Path::new("abc"), e))?;
        partial.commit()
    }

    fn names(cache: &Cache) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(cache.folder(ABC.name))
            .map(|dir| dir.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect())
            .unwrap_or_default();
        names.sort();
        names
    }

    #[test]
    fn a_whole_download_is_listed_and_removed() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path());
        assert_eq!(cache.list().unwrap(), []);
        assert_eq!(cache.state(&ABC).unwrap(), CacheState::Missing);
        let path = download(&cache, b"abc").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"abc");
        assert_eq!(cache.state(&ABC).unwrap(), CacheState::Ready(path.clone()));
        assert_eq!(names(&cache), ["abc.gguf", "abc.gguf.json"]);
        let expected = CachedModel { name: "abc".into(), path, size_bytes: 3, sha256: ABC.sha256.into() };
        assert_eq!(cache.list().unwrap(), [expected]);
        assert!(cache.remove("abc", &mut Silent).unwrap());
        assert!(!cache.remove("abc", &mut Silent).unwrap());
        assert_eq!(cache.list().unwrap(), []);
        assert!(cache.remove("../abc", &mut Silent).is_err());
    }

    #[test]
    fn a_relative_root_becomes_absolute() {
        assert!(Cache::at("models-here").root().is_absolute());
    }

    #[test]
    fn wrong_bytes_leave_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path());
        for (bytes, reason) in [(&b"abd"[..], "SHA-256"), (b"ab", "ended after 2"), (b"abcd", "more than the 3")] {
            let message = download(&cache, bytes).unwrap_err().to_string();
            assert!(message.contains(reason), "{message}");
            assert!(names(&cache).is_empty());
        }
    }

    #[test]
    fn an_interrupted_download_leaves_no_half_file() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path());
        let mut partial = PartialFile::create(&ABC, &cache.folder(ABC.name)).unwrap();
        partial.write_all(b"ab").unwrap();
        assert_eq!(cache.state(&ABC).unwrap(), CacheState::Missing);
        assert_eq!(cache.list().unwrap(), []);
        drop(partial);
        assert!(names(&cache).is_empty());
        // A process that was killed cannot tidy up; the next one overwrites what it left.
        std::fs::write(cache.folder(ABC.name).join(".abc.gguf.partial"), b"leftover from a crash").unwrap();
        download(&cache, b"abc").unwrap();
        assert_eq!(names(&cache), ["abc.gguf", "abc.gguf.json"]);
    }

    #[test]
    fn damage_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path());
        let path = download(&cache, b"abc").unwrap();
        std::fs::write(&path, b"ab").unwrap();
        assert!(matches!(cache.state(&ABC).unwrap(), CacheState::Damaged(why) if why.contains("2 bytes, not 3")));
        std::fs::write(&path, b"abc").unwrap();
        std::fs::write(record_path(&path), br#"{"size_bytes":3,"sha256":"00"}"#).unwrap();
        assert!(matches!(cache.state(&ABC).unwrap(), CacheState::Damaged(why) if why.contains("another version")));
        std::fs::write(record_path(&path), b"{").unwrap();
        assert_eq!(cache.state(&ABC).unwrap(), CacheState::Unrecorded(path));
    }

    #[test]
    fn the_lock_admits_one() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path());
        let held = cache.lock("abc", &mut Silent).unwrap();
        let file = File::open(folder.path().join("locks/abc.lock")).unwrap();
        assert!(matches!(file.try_lock(), Err(TryLockError::WouldBlock)));
        drop(held);
        file.try_lock().unwrap();
    }
}
