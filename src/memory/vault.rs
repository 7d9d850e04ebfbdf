//! The folder that memory survives in.
//!
//! ```text
//! version     the format of the folder
//! lock        held by the process that uses it
//! cubes/      manifests and tombstones
//! segments/   KV blocks; opened by the block store
//! ```

use std::fs::{File, OpenOptions, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::catalog::{Catalog, CatalogLimits};
use super::folder::{Durability, read_bounded, replace};
use super::timestamp::Clock;
use crate::paging::{Files, SystemFiles};
use crate::{Error, Result, malformed, unsupported};

/// The version of the format that is written, and the newest that is read.
const FORMAT: u32 = 1;
const BEFORE_FORMAT: &str = "mneme vault ";

/// An open vault: nobody else has it while this lives.
pub struct Vault {
    folder: PathBuf,
    catalog: Arc<Catalog>,
    /// Closing the file releases the lock.
    _lock: File,
}

impl Vault {
    /// Opens the vault in `folder`, which is made if it is missing.
    pub fn open(folder: &Path, clock: Arc<dyn Clock>, limits: CatalogLimits) -> Result<Self> {
        let files: Arc<dyn Files> = Arc::new(SystemFiles);
        files.create_folder(folder).map_err(|e| Error::io("create", folder, e))?;
        let lock = lock(folder)?;
        check_format(files.as_ref(), folder)?;
        let segments = folder.join("segments");
        files.create_folder(&segments).map_err(|e| Error::io("create", &segments, e))?;
        let catalog = Catalog::open(Arc::clone(&files), folder.join("cubes"), clock, limits)?;
        files.sync_folder(folder).map_err(|e| Error::io("sync", folder, e))?;
        Ok(Self { folder: folder.to_owned(), catalog: Arc::new(catalog), _lock: lock })
    }

    /// Its cubes.
    pub fn catalog(&self) -> &Arc<Catalog> {
        &self.catalog
    }

    /// The folder itself.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Where the block store keeps its segments.
    pub fn segments_folder(&self) -> PathBuf {
        self.folder.join("segments")
    }
}

fn lock(folder: &Path) -> Result<File> {
    let path = folder.join("lock");
    let file = OpenOptions::new().write(true).create(true).truncate(false).open(&path);
    let file = file.map_err(|e| Error::io("open", &path, e))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            let folder = folder.display();
            Err(Error::Conflict(format!(
                "the vault {folder} is in use by another process; stop that one, or choose another folder with --vault"
            )))
        }
        Err(TryLockError::Error(error)) => Err(Error::io("lock", &path, error)),
    }
}

/// Reads the version of the folder's format, or writes ours where there is none.
fn check_format(files: &dyn Files, folder: &Path) -> Result<()> {
    let path = folder.join("version");
    let bytes = match read_bounded(files, &path) {
        Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => {
            let text = format!("{BEFORE_FORMAT}{FORMAT}\n");
            return replace(files, &path, text.as_bytes(), Durability::Synced).map_err(|fault| fault.error);
        }
        read => read?,
    };
    let text = std::str::from_utf8(&bytes).unwrap_or_default().trim_end();
    let format = text.strip_prefix(BEFORE_FORMAT).and_then(|number| number.parse::<u32>().ok());
    match format {
        Some(FORMAT) => Ok(()),
        Some(other) => Err(unsupported!(
            "the vault {} has format {other}, this program reads format {FORMAT}; use a newer program or another folder",
            folder.display()
        )),
        None => Err(malformed!("{} does not say 'mneme vault {FORMAT}'; is this a vault?", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::super::acl::Principal;
    use super::super::changes::NewCube;
    use super::super::crash_tests::files;
    use super::super::payload::{Payload, Twin};
    use super::super::timestamp::SystemClock;
    use super::*;

    fn open(folder: &Path) -> Result<Vault> {
        Vault::open(folder, Arc::new(SystemClock), CatalogLimits::default())
    }

    #[test]
    fn one_process_has_a_vault_at_a_time_and_cubes_stay() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("deep/vault");
        let vault = open(&folder).unwrap();
        let new = NewCube::new("ana/a".parse().unwrap(), Payload::Plaintext(Twin::Text("a".to_owned())));
        vault.catalog().create(&Principal::local(), new, Durability::Synced).unwrap();
        let error = open(&folder).err().unwrap().to_string();
        assert!(error.contains("in use") && error.contains("deep/vault") && error.contains("--vault"), "{error}");
        drop(vault);
        let vault = open(&folder).unwrap();
        assert_eq!(vault.catalog().num_cubes(), 1);
        assert!(vault.segments_folder().is_dir() && vault.folder() == folder);
    }

    #[test]
    fn a_crash_while_a_vault_is_made_leaves_one_that_opens() {
        for operation in 0..5 {
            for seed in 0..8 {
                let files = files();
                files.stop_at(operation + 1);
                assert!(check_format(&files, Path::new("/vault")).is_err(), "operation {operation} was reached");
                let image = files.after_crash(seed);
                check_format(&image, Path::new("/vault")).unwrap();
                check_format(&image, Path::new("/vault")).unwrap();
            }
        }
    }

    #[test]
    fn newer_and_foreign_folders_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        for (text, wanted) in
            [("mneme vault 2\n", "format 2"), ("something", "is this a vault"), ("", "is this a vault")]
        {
            std::fs::write(folder.path().join("version"), text).unwrap();
            let error = open(folder.path()).err().unwrap().to_string();
            assert!(error.contains(wanted), "{error}");
        }
        std::fs::write(folder.path().join("version"), "mneme vault 1\n").unwrap();
        open(folder.path()).unwrap();
    }
}
