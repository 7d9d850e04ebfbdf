//! The segment files that hold one context: read without an engine, brought into the page cache and out of it.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::hint;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use mneme::paging::page_cache::{Residency, forget_pages, residency, show_mapped};

/// Pages are asked to leave so often; what comes back in between was read ahead.
const TRIES: usize = 3;

/// Files of blocks, by the bytes behind their headers.
#[derive(Debug)]
pub(super) struct SegmentFiles {
    files: Vec<SegmentFile>,
    /// Bytes that are read at once: one block's.
    block_bytes: usize,
}

#[derive(Debug)]
struct SegmentFile {
    path: PathBuf,
    file: File,
    /// Where the blocks begin, and where they end.
    start: u64,
    end: u64,
}

/// The finished segments below `folder`, those of all formats.
pub(super) fn list_segments(folder: &Path) -> io::Result<BTreeSet<PathBuf>> {
    let mut paths = BTreeSet::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            paths.extend(list_segments(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "safetensors") {
            paths.insert(path);
        }
    }
    Ok(paths)
}

impl SegmentFiles {
    /// The files that hold `num_blocks` blocks and nothing else.
    pub(super) fn open<'a>(paths: impl Iterator<Item = &'a PathBuf>, num_blocks: usize) -> anyhow::Result<Self> {
        let open = |path: &PathBuf| SegmentFile::open(path).with_context(|| format!("cannot read {}", path.display()));
        let files = paths.map(open).collect::<anyhow::Result<Vec<_>>>()?;
        let num_bytes = files.iter().map(|file| file.end - file.start).sum::<u64>() as usize;
        anyhow::ensure!(
            num_blocks > 0 && num_bytes > 0 && num_bytes.is_multiple_of(num_blocks),
            "{} segment files of {num_bytes} bytes do not hold {num_blocks} blocks",
            files.len()
        );
        Ok(Self { files, block_bytes: num_bytes / num_blocks })
    }

    /// Bytes of a block in its file.
    pub(super) fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    /// Bytes of all blocks.
    pub(super) fn num_bytes(&self) -> usize {
        self.files.iter().map(|file| (file.end - file.start) as usize).sum()
    }

    /// Reads all blocks in order into `buffer`, which has room for them, and says how long that took.
    pub(super) fn read(&self, buffer: &mut [u8]) -> io::Result<Duration> {
        self.read_each(buffer, |_| ())
    }

    /// Reads all blocks, each into its place in `buffer` and then through the digest: what attaching them takes.
    pub(super) fn read_and_hash(&self, buffer: &mut [u8]) -> io::Result<Duration> {
        self.read_each(buffer, |block| {
            hint::black_box(blake3::hash(block));
        })
    }

    fn read_each(&self, buffer: &mut [u8], visit: impl Fn(&[u8])) -> io::Result<Duration> {
        let started_at = Instant::now();
        let mut pieces = buffer.chunks_exact_mut(self.block_bytes);
        for file in &self.files {
            for offset in (file.start..file.end).step_by(self.block_bytes) {
                let piece = pieces.next().ok_or_else(|| io::Error::other("the buffer is too small"))?;
                file.file.read_exact_at(piece, offset)?;
                visit(piece);
            }
        }
        Ok(started_at.elapsed())
    }

    /// Maps all blocks where they lie and takes their digests: what attaching them without a copy would take.
    pub(super) fn map_and_hash(&self) -> io::Result<Duration> {
        let started_at = Instant::now();
        for file in &self.files {
            show_mapped(&file.file, file.start, &mut |bytes| {
                bytes.chunks_exact(self.block_bytes).for_each(|block| {
                    hint::black_box(blake3::hash(block));
                });
            })?;
        }
        Ok(started_at.elapsed())
    }

    /// Brings all pages into the page cache. Returns why not, if some stay out.
    pub(super) fn bring_in(&self, buffer: &mut [u8]) -> io::Result<Option<String>> {
        self.read(buffer)?;
        let Residency { num_pages, num_resident } = self.residency()?;
        let is_short = num_resident * 100 < num_pages * 99;
        Ok(is_short.then(|| format!("{num_resident} of {num_pages} pages are in the page cache, wanted all")))
    }

    /// Takes all pages out of the page cache. Returns why not, if some stay.
    pub(super) fn drop_pages(&self) -> io::Result<Option<String>> {
        for _ in 0..TRIES {
            self.files.iter().try_for_each(|file| forget_pages(&file.file))?;
            if self.residency()?.num_resident == 0 {
                return Ok(None);
            }
        }
        let Residency { num_pages, num_resident } = self.residency()?;
        let name = self.files.first().map(|file| file.path.display().to_string()).unwrap_or_default();
        Ok(Some(format!("{num_resident} of {num_pages} pages of {name} stay in the page cache, wanted none")))
    }

    fn residency(&self) -> io::Result<Residency> {
        let mut sum = Residency::default();
        for file in &self.files {
            let Residency { num_pages, num_resident } = residency(&file.file)?;
            sum.num_pages += num_pages;
            sum.num_resident += num_resident;
        }
        Ok(sum)
    }
}

impl SegmentFile {
    fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let mut length = [0; 8];
        file.read_exact_at(&mut length, 0)?;
        // safetensors: the length of the header, the header, the bytes.
        let start = u64::from_le_bytes(length).saturating_add(8);
        let end = file.metadata()?.len();
        match start < end {
            true => Ok(Self { path: path.to_owned(), file, start, end }),
            false => Err(io::Error::new(ErrorKind::InvalidData, "no blocks behind the header")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write_segment(path: &Path, blocks: &[u8]) {
        let header = b"{}  ";
        let length = (header.len() as u64).to_le_bytes();
        fs::write(path, [&length[..], header, blocks].concat()).unwrap();
    }

    #[test]
    fn blocks_are_read_in_order_across_files() {
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("kv-1");
        fs::create_dir(&inner).unwrap();
        write_segment(&inner.join("seg-1.safetensors"), &[1, 1, 2, 2]);
        write_segment(&inner.join("seg-2.safetensors"), &[3, 3]);
        fs::write(inner.join("seg-3.partial"), [9; 9]).unwrap();
        let paths = list_segments(folder.path()).unwrap();
        let files = SegmentFiles::open(paths.iter(), 3).unwrap();
        assert_eq!((files.block_bytes(), files.num_bytes()), (2, 6));
        let mut buffer = [0; 6];
        files.read(&mut buffer).unwrap();
        assert_eq!(buffer, [1, 1, 2, 2, 3, 3]);
        assert_eq!(files.bring_in(&mut buffer).unwrap(), None);
        assert!(files.read(&mut [0; 4]).is_err(), "four bytes have no room for six");
        buffer.fill(0);
        files.read_and_hash(&mut buffer).unwrap();
        assert_eq!(buffer, [1, 1, 2, 2, 3, 3]);
        files.map_and_hash().unwrap();
    }

    #[test]
    fn files_that_hold_something_else_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("seg-1.safetensors");
        write_segment(&path, &[1, 2, 3]);
        assert!(SegmentFiles::open([&path].into_iter(), 2).is_err(), "three bytes are not two blocks");
        fs::write(&path, u64::MAX.to_le_bytes()).unwrap();
        assert!(SegmentFiles::open([&path].into_iter(), 1).is_err(), "a header longer than its file");
        assert!(SegmentFiles::open([].into_iter(), 1).is_err());
    }
}
