//! Opening: what the files in a store's folder are. Reads headers and no block; removes what a crash left half written.

use std::io;
use std::path::{Path, PathBuf};

use super::OpenReport;
use super::format::{BlockFormat, BlockRecord, Header, HeaderFault, read_header};
use super::index::{Extent, ForeignSegment, Index};
use super::segment::{SegmentId, SegmentName};
use crate::kv::BlockHash;
use crate::paging::Files;
use crate::{Error, Result};

/// Messages about files at most.
const MAX_FAULTS: usize = 100;

/// What was found besides what the index was told.
pub(super) struct Scanned {
    pub(super) report: OpenReport,
    /// No file has this number or a higher one.
    pub(super) next_id: SegmentId,
    /// Why a half-written file could not be removed.
    pub(super) failed_removal: Option<(PathBuf, io::Error)>,
}

/// The formats of the blocks below `folder`, as the first segment of each that can be read says.
///
/// # Errors
/// `Io` when the folder cannot be listed.
pub(super) fn formats(files: &dyn Files, folder: &Path) -> Result<Vec<BlockFormat>> {
    let folders = files.list(folder).map_err(|e| Error::io("list", folder, e))?;
    let mut formats = Vec::new();
    for path in folders.iter().filter(|path| is_format_folder(path)) {
        let segments = files.list(path).map_err(|e| Error::io("list", path, e))?;
        let sealed = segments.iter().filter(|path| matches!(SegmentId::parse(path), Some(SegmentName::Sealed(_))));
        let mut headers = sealed.filter_map(|path| read_header(&*files.open(path).ok()?).ok());
        formats.extend(headers.next().map(|header| header.format));
    }
    Ok(formats)
}

/// Walks over the folders of all formats below `folder` and fills an empty index.
///
/// # Errors
/// `Io` when the folder of this format cannot be listed.
pub(super) fn scan(files: &dyn Files, folder: &Path, format: &BlockFormat, index: &mut Index) -> Result<Scanned> {
    let mut scan = Scan { files, format, index, scanned: Scanned::new() };
    let own = folder.join(format.folder_name());
    let paths = match files.list(folder) {
        Ok(paths) => paths,
        Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(e) => return Err(Error::io("list", folder, e)),
    };
    for path in paths.iter().filter(|path| is_format_folder(path)) {
        match files.list(path) {
            Ok(segments) => scan.visit_folder(path, &segments, *path == own),
            Err(e) if *path == own => return Err(Error::io("list", path, e)),
            Err(e) => scan.tell_fault(path, &e.to_string()),
        }
    }
    Ok(scan.scanned)
}

fn is_format_folder(path: &Path) -> bool {
    path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with("kv-"))
}

impl Scanned {
    fn new() -> Self {
        Self { report: OpenReport::default(), next_id: SegmentId(0), failed_removal: None }
    }
}

struct Scan<'a> {
    files: &'a dyn Files,
    format: &'a BlockFormat,
    index: &'a mut Index,
    scanned: Scanned,
}

impl Scan<'_> {
    fn visit_folder(&mut self, folder: &Path, paths: &[PathBuf], is_own: bool) {
        let num_before = self.scanned.report.num_partial_removed;
        paths.iter().for_each(|path| self.visit(path, is_own));
        // A removed file that came back after a crash would count towards nothing.
        if self.scanned.report.num_partial_removed > num_before
            && let Err(e) = self.files.sync_folder(folder)
        {
            self.scanned.failed_removal = Some((folder.to_path_buf(), e));
        }
    }

    /// Files come in order of name, which is the order they were made in: of two copies of a block the newer counts.
    fn visit(&mut self, path: &Path, is_own: bool) {
        let Some(name) = SegmentId::parse(path) else { return };
        let (SegmentName::Sealed(id) | SegmentName::Partial(id)) = name;
        self.scanned.next_id = self.scanned.next_id.max(id.next());
        match name {
            SegmentName::Partial(_) => self.remove_partial(path),
            SegmentName::Sealed(_) => self.add(path, id, is_own),
        }
    }

    fn remove_partial(&mut self, path: &Path) {
        match self.files.remove(path) {
            Ok(()) => self.scanned.report.num_partial_removed += 1,
            Err(e) => {
                let bytes = self.files.open(path).and_then(|file| file.num_bytes()).unwrap_or(0);
                self.index.add_leftover(bytes);
                self.scanned.failed_removal = Some((path.to_path_buf(), e));
            }
        }
    }

    fn add(&mut self, path: &Path, id: SegmentId, is_own: bool) {
        let (bytes, header) = self.open(path);
        match header {
            Ok(header) if is_own && header.format == *self.format => self.add_own(path, id, bytes, &header),
            Ok(header) => self.add_foreign(path, id, bytes, hashes_of(&header.records), true),
            Err(fault) => {
                let (is_evictable, message) = match fault {
                    HeaderFault::Damaged(error) => (true, error.to_string()),
                    HeaderFault::Unknown(error) => (false, error.to_string()),
                    HeaderFault::Io(error) => (false, error.to_string()),
                };
                self.tell_fault(path, &message);
                self.add_foreign(path, id, bytes, Vec::new(), is_evictable);
            }
        }
    }

    fn open(&self, path: &Path) -> (u64, std::result::Result<Header, HeaderFault>) {
        match self.files.open(path) {
            Ok(file) => (file.num_bytes().unwrap_or(0), read_header(&*file)),
            Err(e) => (0, Err(HeaderFault::Io(e))),
        }
    }

    fn add_own(&mut self, path: &Path, id: SegmentId, bytes: u64, header: &Header) {
        let extent = Extent { bytes, region_bytes: header.region_bytes };
        self.index.add_sealed(id, extent, &header.records);
        self.scanned.report.num_segments += 1;
        if header.num_missing > 0 {
            self.index.counters.damaged += header.num_missing as u64;
            self.tell_fault(path, &format!("it was cut off and lacks its last {} blocks", header.num_missing));
        }
    }

    fn add_foreign(&mut self, path: &Path, id: SegmentId, bytes: u64, hashes: Vec<BlockHash>, is_evictable: bool) {
        self.index.add_foreign(ForeignSegment { id, path: path.to_path_buf(), bytes, hashes, is_evictable });
        self.scanned.report.num_foreign_segments += 1;
    }

    fn tell_fault(&mut self, path: &Path, message: &str) {
        if self.scanned.report.faults.len() < MAX_FAULTS {
            self.scanned.report.faults.push(format!("{}: {message}", path.display()));
        }
    }
}

fn hashes_of(records: &[BlockRecord]) -> Vec<BlockHash> {
    records.iter().map(|record| record.hash).collect()
}
