//! Owns SHA-256 of files and streams.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use sha2::{Digest, Sha256};

use super::progress::Progress;
use crate::{Error, Result};

const CHUNK_BYTES: usize = 1 << 20;

/// The SHA-256 of a file in lower-case hex, read in chunks.
///
/// # Errors
/// `Io` when the file cannot be read.
pub(super) fn sha256_file(path: &Path, progress: &mut dyn Progress) -> Result<String> {
    let mut file = File::open(path).map_err(|e| Error::io("open", path, e))?;
    let total_bytes = file.metadata().map_err(|e| Error::io("read", path, e))?.len();
    progress.start(total_bytes, &format!("checking {}", path.file_name().unwrap_or_default().display()));
    let mut hasher = Sha256::new();
    let mut chunk = vec![0u8; CHUNK_BYTES];
    loop {
        let num_read = match file.read(&mut chunk) {
            Ok(0) => break,
            Ok(num_read) => num_read,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(Error::io("read", path, e)),
        };
        hasher.update(&chunk[..num_read]);
        progress.advance(num_read as u64);
    }
    progress.finish();
    Ok(to_hex(hasher))
}

/// The digest of what `hasher` has seen, in lower-case hex.
pub(super) fn to_hex(hasher: Sha256) -> String {
    format!("{:x}", hasher.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::progress::Silent;

    #[test]
    fn known_digests() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        std::fs::write(&path, b"abc").unwrap();
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256_file(&path, &mut Silent).unwrap(), expected);
        std::fs::write(&path, vec![b'a'; 1_000_000 + CHUNK_BYTES]).unwrap();
        let whole = format!("{:x}", Sha256::digest(vec![b'a'; 1_000_000 + CHUNK_BYTES]));
        assert_eq!(sha256_file(&path, &mut Silent).unwrap(), whole);
        assert!(sha256_file(&folder.path().join("none"), &mut Silent).is_err());
    }
}
