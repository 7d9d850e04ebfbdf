//! The bytes of one file: as they are, as a crash would leave them at least, and the writes in between.

use std::io;
use std::sync::{Mutex, MutexGuard};

use super::{Kept, Random};

/// A file's bytes, shared by its names and handles.
#[derive(Default)]
pub(super) struct Content(Mutex<Versions>);

#[derive(Clone, Default)]
pub(super) struct Versions {
    now: Vec<u8>,
    durable: Vec<u8>,
    pending: Vec<Write>,
}

#[derive(Clone)]
struct Write {
    offset: usize,
    bytes: Vec<u8>,
}

impl Content {
    /// The same, for nobody who has this one open.
    pub(super) fn copy(&self) -> Self {
        Self(Mutex::new(self.lock().clone()))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Versions> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Versions {
    pub(super) fn replace(&mut self, bytes: &[u8]) {
        *self = Versions { now: bytes.to_vec(), durable: bytes.to_vec(), pending: Vec::new() };
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.now
    }

    pub(super) fn read_at(&self, bytes: &mut [u8], offset: usize) -> io::Result<()> {
        let found = self.now.get(offset..offset + bytes.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        bytes.copy_from_slice(found);
        Ok(())
    }

    pub(super) fn write_at(&mut self, bytes: &[u8], offset: usize) {
        let write = Write { offset, bytes: bytes.to_vec() };
        write.apply(&mut self.now);
        self.pending.push(write);
    }

    pub(super) fn sync(&mut self) {
        self.pending.drain(..).for_each(|write| write.apply(&mut self.durable));
    }

    /// What the system could not write it no longer tries to.
    pub(super) fn fail_sync(&mut self) {
        self.pending.clear();
    }

    pub(super) fn crash(&mut self, random: &mut Random) {
        let pending = std::mem::take(&mut self.pending);
        for write in survivors(pending, random) {
            write.apply(&mut self.durable);
        }
        self.now = self.durable.clone();
    }
}

impl Write {
    /// A gap before it reads as zeros.
    fn apply(&self, file: &mut Vec<u8>) {
        let end = self.offset + self.bytes.len();
        file.resize(file.len().max(end), 0);
        file[self.offset..end].copy_from_slice(&self.bytes);
    }

    fn pieces(self, piece_bytes: usize) -> impl Iterator<Item = Write> {
        let Write { offset, bytes } = self;
        let starts = (0..bytes.len()).step_by(piece_bytes);
        starts.map(move |at| {
            let end = bytes.len().min(at + piece_bytes);
            Write { offset: offset + at, bytes: bytes[at..end].to_vec() }
        })
    }
}

fn survivors(pending: Vec<Write>, random: &mut Random) -> Vec<Write> {
    match random.kept() {
        Kept::Nothing => Vec::new(),
        Kept::All => pending,
        Kept::Beginning => {
            let num_first = random.below(pending.len() + 1);
            pending.into_iter().take(num_first).collect()
        }
        Kept::AnyPart => {
            let piece_bytes = 512 << random.below(4);
            let mut pieces: Vec<Write> = pending.into_iter().flat_map(|write| write.pieces(piece_bytes)).collect();
            pieces.retain(|_| random.below(2) == 0);
            random.shuffle(&mut pieces);
            pieces
        }
    }
}
