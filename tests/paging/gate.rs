//! A file system whose syncs of folders wait at a gate.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};

use mneme::paging::faulty::FaultyFiles;
use mneme::paging::{FileHandle, Files};

pub struct GatedFiles {
    files: FaultyFiles,
    gate: Gate,
}

/// Closed or open, and whether somebody waits at it.
#[derive(Clone, Default)]
pub struct Gate(Arc<(Mutex<State>, Condvar)>);

#[derive(Default)]
struct State {
    is_closed: bool,
    is_waited_for: bool,
}

impl GatedFiles {
    /// The gate is open.
    pub fn new(files: &FaultyFiles) -> (Self, Gate) {
        let gate = Gate::default();
        (Self { files: files.clone(), gate: gate.clone() }, gate)
    }
}

impl Gate {
    pub fn close(&self) {
        self.0.0.lock().unwrap().is_closed = true;
    }

    pub fn open(&self) {
        self.0.0.lock().unwrap().is_closed = false;
        self.0.1.notify_all();
    }

    /// Returns when somebody waits at the closed gate.
    pub fn wait_for_somebody(&self) {
        let state = self.0.0.lock().unwrap();
        drop(self.0.1.wait_while(state, |state| !state.is_waited_for).unwrap());
    }

    fn pass(&self) {
        let mut state = self.0.0.lock().unwrap();
        state.is_waited_for |= state.is_closed;
        self.0.1.notify_all();
        drop(self.0.1.wait_while(state, |state| state.is_closed).unwrap());
    }
}

impl Files for GatedFiles {
    fn create(&self, path: &Path) -> io::Result<Box<dyn FileHandle>> {
        self.files.create(path)
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn FileHandle>> {
        self.files.open(path)
    }

    fn open_to_change(&self, path: &Path) -> io::Result<Box<dyn FileHandle>> {
        self.files.open_to_change(path)
    }

    fn rename(&self, source: &Path, target: &Path) -> io::Result<()> {
        self.files.rename(source, target)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.files.remove(path)
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<PathBuf>> {
        self.files.list(folder)
    }

    fn create_folder(&self, folder: &Path) -> io::Result<()> {
        self.files.create_folder(folder)
    }

    fn sync_folder(&self, folder: &Path) -> io::Result<()> {
        self.gate.pass();
        self.files.sync_folder(folder)
    }
}
