//! The few file operations that anything durable is made of, as a seam: tests put a layer here that stops, tears and
//! reorders.
//!
//! What a caller may rely on after a crash is what POSIX promises: bytes of a file behind its [`FileHandle::sync`], and
//! names in a folder behind [`Files::sync_folder`]. Nothing else is durable, and nothing else is ordered.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Names in folders.
pub trait Files: Send + Sync + 'static {
    /// Makes a file for reading and writing; an error when there is one already.
    fn create(&self, path: &Path) -> io::Result<Box<dyn FileHandle>>;

    /// Opens a file for reading.
    fn open(&self, path: &Path) -> io::Result<Box<dyn FileHandle>>;

    /// Opens a file for reading and writing.
    fn open_to_change(&self, path: &Path) -> io::Result<Box<dyn FileHandle>>;

    /// Gives a file another name, replacing what had it.
    fn rename(&self, source: &Path, target: &Path) -> io::Result<()>;

    /// Removes a file.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// The files and folders in a folder, in order of name.
    fn list(&self, folder: &Path) -> io::Result<Vec<PathBuf>>;

    /// Makes a folder and those above it, where they are missing.
    fn create_folder(&self, folder: &Path) -> io::Result<()>;

    /// Makes the names in a folder durable.
    fn sync_folder(&self, folder: &Path) -> io::Result<()>;
}

/// An open file. Reads and writes name their place, so that threads share it.
pub trait FileHandle: Send + Sync {
    /// Fills `bytes` from `offset` on; `UnexpectedEof` when the file is shorter.
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()>;

    /// Writes all of `bytes` at `offset`.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Makes the bytes written so far durable.
    fn sync(&self) -> io::Result<()>;

    /// Length in bytes.
    fn num_bytes(&self) -> io::Result<u64>;
}

/// The file system itself.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemFiles;

impl Files for SystemFiles {
    fn create(&self, path: &Path) -> io::Result<Box<dyn FileHandle>> {
        Ok(Box::new(OpenOptions::new().read(true).write(true).create_new(true).open(path)?))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn FileHandle>> {
        Ok(Box::new(File::open(path)?))
    }

    fn open_to_change(&self, path: &Path) -> io::Result<Box<dyn FileHandle>> {
        Ok(Box::new(OpenOptions::new().read(true).write(true).open(path)?))
    }

    fn rename(&self, source: &Path, target: &Path) -> io::Result<()> {
        fs::rename(source, target)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<PathBuf>> {
        let mut paths = fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
        paths.sort();
        Ok(paths)
    }

    fn create_folder(&self, folder: &Path) -> io::Result<()> {
        fs::create_dir_all(folder)
    }

    fn sync_folder(&self, folder: &Path) -> io::Result<()> {
        File::open(folder)?.sync_all()
    }
}

impl FileHandle for File {
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, bytes, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        FileExt::write_all_at(self, bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn num_bytes(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }
}
