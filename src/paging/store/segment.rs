//! One segment file: its name, writing it from the first block to its seal, reading a row. Knows no other segment.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::format::{BlockFormat, BlockRecord, encode_header};
use super::index::Extent;
use crate::paging::{FileHandle, Files};

/// Which segment, in order of creation; unique in a store, formats taken together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct SegmentId(pub(super) u64);

/// What a file's name says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum SegmentName {
    Sealed(SegmentId),
    Partial(SegmentId),
}

impl SegmentId {
    pub(super) fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }

    pub(super) fn file_name(self) -> String {
        format!("seg-{:016x}.safetensors", self.0)
    }

    pub(super) fn partial_name(self) -> String {
        format!("seg-{:016x}.partial", self.0)
    }

    /// `None` for a file that is not ours.
    pub(super) fn parse(path: &Path) -> Option<SegmentName> {
        let name = path.file_name()?.to_str()?;
        let (digits, kind) = name.strip_prefix("seg-")?.split_once('.')?;
        let id = SegmentId(u64::from_str_radix(digits, 16).ok()?);
        let parsed = if kind == "partial" { SegmentName::Partial(id) } else { SegmentName::Sealed(id) };
        (name == id.file_name() || name == id.partial_name()).then_some(parsed)
    }
}

/// A segment that takes blocks. They can be read through its handle at once, and are durable once it is sealed.
pub(super) struct SegmentWriter {
    id: SegmentId,
    folder: PathBuf,
    handle: Arc<dyn FileHandle>,
    format: BlockFormat,
    region_bytes: u64,
    num_slots: u32,
    records: Vec<BlockRecord>,
}

impl SegmentWriter {
    /// Makes the file, with the room of its header filled with spaces: sealing a full disk's last segment then needs no
    /// new space.
    pub(super) fn create(
        files: &dyn Files,
        folder: &Path,
        format: &BlockFormat,
        id: SegmentId,
        num_slots: u32,
    ) -> io::Result<Self> {
        let handle: Arc<dyn FileHandle> = Arc::from(files.create(&folder.join(id.partial_name()))?);
        let region_bytes = format.region_bytes(num_slots);
        handle.write_at(&vec![b' '; region_bytes as usize], 0)?;
        let (folder, format) = (folder.to_path_buf(), format.clone());
        Ok(Self { id, folder, handle, format, region_bytes, num_slots, records: Vec::new() })
    }

    pub(super) fn id(&self) -> SegmentId {
        self.id
    }

    pub(super) fn handle(&self) -> Arc<dyn FileHandle> {
        Arc::clone(&self.handle)
    }

    pub(super) fn path(&self) -> PathBuf {
        self.folder.join(self.id.partial_name())
    }

    pub(super) fn records(&self) -> &[BlockRecord] {
        &self.records
    }

    pub(super) fn is_full(&self) -> bool {
        self.records.len() as u32 == self.num_slots
    }

    /// Sizes of the file, were it sealed now.
    pub(super) fn extent(&self) -> Extent {
        let bytes = self.region_bytes + self.records.len() as u64 * self.format.stride();
        Extent { bytes, region_bytes: self.region_bytes }
    }

    /// Writes a block into the next row and returns which that is.
    pub(super) fn append(&mut self, record: BlockRecord, bytes: &[u8]) -> io::Result<u32> {
        assert!(!self.is_full() && bytes.len() == self.format.block_bytes, "one row is left, of one block's bytes");
        let offset = self.extent().bytes;
        self.handle.write_at(bytes, offset)?;
        let padding = self.format.stride() as usize - bytes.len();
        if padding > 0 {
            self.handle.write_at(&vec![0; padding], offset + bytes.len() as u64)?;
        }
        self.records.push(record);
        Ok(self.records.len() as u32 - 1)
    }

    /// Makes all blocks durable and gives the file its name. The bytes are durable before the name is, and the name is
    /// durable when this returns.
    pub(super) fn seal(&self, files: &dyn Files) -> io::Result<()> {
        self.handle.write_at(&encode_header(&self.format, &self.records, self.region_bytes), 0)?;
        self.handle.sync()?;
        files.rename(&self.path(), &self.folder.join(self.id.file_name()))?;
        files.sync_folder(&self.folder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_names_are_ours() {
        let id = SegmentId(0xabc);
        assert_eq!(SegmentId::parse(&Path::new("/a").join(id.file_name())), Some(SegmentName::Sealed(id)));
        assert_eq!(SegmentId::parse(&Path::new("/a").join(id.partial_name())), Some(SegmentName::Partial(id)));
        for name in
            ["notes.partial", "seg-1.partial", "seg-000000000000000A.partial", "seg-0000000000000abc.txt", "seg-"]
        {
            assert_eq!(SegmentId::parse(Path::new(name)), None, "{name}");
        }
    }
}
