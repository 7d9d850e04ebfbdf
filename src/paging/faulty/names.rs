//! The names in all folders: as they are, as a crash would leave them at least, and the changes in between.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Random;
use super::content::Content;

/// What a name stands for.
#[derive(Clone)]
pub(super) enum Entry {
    Folder,
    File(Arc<Content>),
}

/// Names of files and folders. The root is always there.
#[derive(Default)]
pub(super) struct Names {
    now: BTreeMap<PathBuf, Entry>,
    durable: BTreeMap<PathBuf, Entry>,
    pending: Vec<Change>,
}

/// One change that happens whole or not at all: a name goes, a name comes, or both.
struct Change {
    removed: Option<PathBuf>,
    added: Option<(PathBuf, Entry)>,
}

impl Change {
    fn apply(&self, names: &mut BTreeMap<PathBuf, Entry>) {
        if let Some(path) = &self.removed {
            names.remove(path);
        }
        if let Some((path, entry)) = &self.added {
            names.insert(path.clone(), entry.clone());
        }
    }

    fn is_in(&self, folder: &Path) -> bool {
        let path = self.added.as_ref().map(|(path, _)| path).or(self.removed.as_ref());
        path.is_some_and(|path| path.parent() == Some(folder))
    }
}

/// Copies contents, each once, so that names of one file stay names of one file.
#[derive(Default)]
struct Copies(HashMap<*const Content, Arc<Content>>);

impl Copies {
    fn entry(&mut self, entry: &Entry) -> Entry {
        match entry {
            Entry::Folder => Entry::Folder,
            Entry::File(content) => {
                let copy = self.0.entry(Arc::as_ptr(content)).or_insert_with(|| Arc::new(content.copy()));
                Entry::File(Arc::clone(copy))
            }
        }
    }

    fn names(&mut self, names: &BTreeMap<PathBuf, Entry>) -> BTreeMap<PathBuf, Entry> {
        names.iter().map(|(path, entry)| (path.clone(), self.entry(entry))).collect()
    }

    fn change(&mut self, change: &Change) -> Change {
        let added = change.added.as_ref().map(|(path, entry)| (path.clone(), self.entry(entry)));
        Change { removed: change.removed.clone(), added }
    }
}

fn is_root(path: &Path) -> bool {
    path.parent().is_none()
}

impl Names {
    /// The same with contents of its own.
    pub(super) fn copy(&self) -> Self {
        let mut copies = Copies::default();
        let (now, durable) = (copies.names(&self.now), copies.names(&self.durable));
        let pending = self.pending.iter().map(|change| copies.change(change)).collect();
        Self { now, durable, pending }
    }

    pub(super) fn file(&self, path: &Path) -> Option<Arc<Content>> {
        match self.now.get(path)? {
            Entry::File(content) => Some(Arc::clone(content)),
            Entry::Folder => None,
        }
    }

    pub(super) fn files(&self) -> impl Iterator<Item = (&PathBuf, &Arc<Content>)> {
        self.now.iter().filter_map(|(path, entry)| match entry {
            Entry::File(content) => Some((path, content)),
            Entry::Folder => None,
        })
    }

    pub(super) fn num_bytes(&self) -> u64 {
        self.files().map(|(_, content)| content.lock().bytes().len() as u64).sum()
    }

    pub(super) fn is_folder(&self, path: &Path) -> bool {
        is_root(path) || matches!(self.now.get(path), Some(Entry::Folder))
    }

    pub(super) fn list(&self, folder: &Path) -> io::Result<Vec<PathBuf>> {
        if !self.is_folder(folder) {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(self.now.keys().filter(|path| path.parent() == Some(folder)).cloned().collect())
    }

    fn change(&mut self, removed: Option<PathBuf>, added: Option<(PathBuf, Entry)>) {
        let change = Change { removed, added };
        change.apply(&mut self.now);
        self.pending.push(change);
    }

    pub(super) fn create(&mut self, path: &Path, entry: Entry) -> io::Result<()> {
        if !path.parent().is_some_and(|folder| self.is_folder(folder)) {
            return Err(io::ErrorKind::NotFound.into());
        }
        if self.now.contains_key(path) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        self.change(None, Some((path.to_path_buf(), entry)));
        Ok(())
    }

    pub(super) fn create_folder(&mut self, folder: &Path) -> io::Result<()> {
        let mut missing: Vec<&Path> = folder.ancestors().filter(|path| !self.is_folder(path)).collect();
        missing.reverse();
        missing.into_iter().try_for_each(|path| self.create(path, Entry::Folder))
    }

    pub(super) fn rename(&mut self, source: &Path, target: &Path) -> io::Result<()> {
        assert_eq!(source.parent(), target.parent(), "renames across folders are not modelled");
        let content = self.file(source).ok_or(io::ErrorKind::NotFound)?;
        self.change(Some(source.to_path_buf()), Some((target.to_path_buf(), Entry::File(content))));
        Ok(())
    }

    pub(super) fn remove(&mut self, path: &Path) -> io::Result<()> {
        self.file(path).ok_or(io::ErrorKind::NotFound)?;
        self.change(Some(path.to_path_buf()), None);
        Ok(())
    }

    pub(super) fn sync(&mut self, folder: &Path) -> io::Result<()> {
        if !self.is_folder(folder) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let (synced, pending) = std::mem::take(&mut self.pending).into_iter().partition(|change| change.is_in(folder));
        let synced: Vec<Change> = synced;
        synced.iter().for_each(|change| change.apply(&mut self.durable));
        self.pending = pending;
        Ok(())
    }

    /// Gives a file these bytes as if it had always had them; who has it open sees them.
    pub(super) fn plant(&mut self, path: &Path, bytes: &[u8]) {
        let content = self.file(path).unwrap_or_default();
        content.lock().replace(bytes);
        self.pending.retain(|change| change.added.as_ref().is_none_or(|(added, _)| added != path));
        self.now.insert(path.to_path_buf(), Entry::File(Arc::clone(&content)));
        self.durable.insert(path.to_path_buf(), Entry::File(content));
    }

    pub(super) fn crash(&mut self, random: &mut Random) {
        let pending = std::mem::take(&mut self.pending);
        for change in random.choose(pending) {
            change.apply(&mut self.durable);
        }
        let names = self.durable.clone();
        let has_folders =
            |path: &Path| path.ancestors().skip(1).all(|folder| is_root(folder) || names.contains_key(folder));
        self.durable.retain(|path, _| has_folders(path));
        self.now = self.durable.clone();
        self.files().for_each(|(_, content)| content.lock().crash(random));
    }
}
