//! Which pages of a file the system keeps in memory, and asking it to forget them: what a measurement of the disk has to
//! know.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use memmap2::MmapOptions;

/// How much of a file is in the page cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Residency {
    /// Pages of the file.
    pub num_pages: usize,
    /// Those in memory.
    pub num_resident: usize,
}

/// Writes a file's changes back and asks the system to forget its pages. Whether it did, [`residency`] tells: pages that
/// somebody has mapped, and files that live in memory alone, stay.
///
/// # Errors
/// When the file cannot be synced, or the file system takes no advice.
pub fn forget_pages(file: &File) -> io::Result<()> {
    // A page that has not been written back is not dropped.
    file.sync_all()?;
    // SAFETY: the descriptor is open as long as `file` is; the call touches no memory of this process.
    match unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) } {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(code)),
    }
}

/// Which share of a file is in memory now. Reads none of it.
///
/// # Errors
/// When the file cannot be mapped or the system does not tell.
pub fn residency(file: &File) -> io::Result<Residency> {
    let num_bytes = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
    if num_bytes == 0 {
        return Ok(Residency::default());
    }
    // SAFETY: nothing reads through the mapping, so it does not matter who changes or cuts off the file.
    let map = unsafe { MmapOptions::new().len(num_bytes).map(file)? };
    let mut pages = vec![0u8; num_bytes.div_ceil(page_bytes()?)];
    // SAFETY: the mapping begins on a page and is `num_bytes` long; `pages` has a byte for each of its pages.
    match unsafe { libc::mincore(map.as_ptr().cast_mut().cast(), num_bytes, pages.as_mut_ptr()) } {
        0 => {
            Ok(Residency { num_pages: pages.len(), num_resident: pages.iter().filter(|page| **page & 1 == 1).count() })
        }
        _ => Err(io::Error::last_os_error()),
    }
}

/// Maps a finished segment, all its pages at once, and shows its bytes from `start` on: what attaching blocks without
/// copying them would take.
///
/// # Errors
/// When the file cannot be mapped or is shorter than `start`.
pub fn show_mapped(file: &File, start: u64, show: &mut dyn FnMut(&[u8])) -> io::Result<()> {
    // SAFETY: segments are never changed after they got their names, and no reference outlives the mapping.
    let map = unsafe { MmapOptions::new().populate().map(file)? };
    let bytes = usize::try_from(start).ok().and_then(|start| map.get(start..));
    show(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
    Ok(())
}

fn page_bytes() -> io::Result<usize> {
    // SAFETY: asks for a constant.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};

    use super::*;

    #[test]
    fn a_file_that_was_just_read_is_in_memory_all_of_it() {
        let mut file = tempfile::tempfile().unwrap();
        assert_eq!(residency(&file).unwrap(), Residency::default());
        let num_bytes = 5 * page_bytes().unwrap() + 1;
        file.write_all(&vec![7; num_bytes]).unwrap();
        file.rewind().unwrap();
        file.read_to_end(&mut Vec::new()).unwrap();
        assert_eq!(residency(&file).unwrap(), Residency { num_pages: 6, num_resident: 6 });
    }

    #[test]
    fn forgetting_keeps_the_bytes() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[3; 20_000]).unwrap();
        forget_pages(&file).unwrap();
        let after = residency(&file).unwrap();
        assert!(
            after.num_resident <= after.num_pages && after.num_pages == 20_000usize.div_ceil(page_bytes().unwrap())
        );
        file.rewind().unwrap();
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, [3; 20_000]);
    }
}
