//! What a model's weights are, byte for byte: the digest at the root of every block hash.
//!
//! BLAKE3 over (name, type, shape, bytes) of all tensors in order of name, so that shards and file order do not matter.
//! Reading all weights takes a while for a large model: the result is kept in the user's cache under the stamps of the
//! files, and a file that was touched in any way is read again.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use super::weights::{Checkpoint, StoredTensor};
use crate::{Error, Result};

/// The digest of fewer bytes is computed every time.
const MIN_KEPT_BYTES: usize = 1 << 20;

/// A digest of 32 bytes.
pub type WeightsDigest = [u8; 32];

/// The digest of a checkpoint's weights, from `cache_folder` when its files have not changed since, else computed on
/// `num_threads` threads and, of many bytes, kept there. A cache that cannot be written costs time at the next start and nothing else.
///
/// # Errors
/// `Io` when a file has gone.
pub fn weights_digest(checkpoint: &Checkpoint, cache_folder: &Path, num_threads: usize) -> Result<WeightsDigest> {
    let tensors = checkpoint.stored_tensors();
    if tensors.iter().map(|tensor| tensor.range.len()).sum::<usize>() < MIN_KEPT_BYTES {
        return Ok(compute(&tensors, num_threads));
    }
    let kept = kept_at(checkpoint, cache_folder)?;
    if let Some(digest) = fs::read_to_string(&kept).ok().and_then(|text| parse(&text)) {
        return Ok(digest);
    }
    let digest = compute(&tensors, num_threads);
    if let Err(error) = keep(&kept, &digest) {
        tracing::debug!(%error, "the digest of the weights is not kept");
    }
    Ok(digest)
}

/// Where the digest of files with these stamps is kept.
fn kept_at(checkpoint: &Checkpoint, cache_folder: &Path) -> Result<PathBuf> {
    let mut hasher = blake3::Hasher::new_derive_key("mneme stamps of weights v1");
    for path in checkpoint.weight_files() {
        let stamp = fs::metadata(&path).map_err(|error| Error::io("look at", &path, error))?;
        for number in [stamp.dev(), stamp.ino(), stamp.size()] {
            hasher.update(&number.to_le_bytes());
        }
        for time in [stamp.mtime(), stamp.mtime_nsec(), stamp.ctime(), stamp.ctime_nsec()] {
            hasher.update(&time.to_le_bytes());
        }
    }
    Ok(cache_folder.join(format!("{}.blake3", hasher.finalize().to_hex())))
}

fn parse(text: &str) -> Option<WeightsDigest> {
    blake3::Hash::from_hex(text.trim_end()).ok().map(Into::into)
}

/// Under another name first, so that nobody reads half of it.
fn keep(path: &Path, digest: &WeightsDigest) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let partial = path.with_extension(format!("{}.partial", std::process::id()));
    fs::write(&partial, format!("{}\n", blake3::Hash::from(*digest).to_hex()))?;
    fs::rename(&partial, path)
}

/// Tensors are hashed side by side, and their digests in order of name.
fn compute(tensors: &[StoredTensor], num_threads: usize) -> WeightsDigest {
    let digests = Mutex::new(vec![[0; 32]; tensors.len()]);
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..num_threads.max(1) {
            scope.spawn(|| {
                while let Some((at, tensor)) = tensor_at(tensors, next.fetch_add(1, Ordering::Relaxed)) {
                    let digest = digest_of(tensor);
                    digests.lock().unwrap_or_else(|poisoned| poisoned.into_inner())[at] = digest;
                }
            });
        }
    });
    let digests = digests.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    let mut hasher = blake3::Hasher::new_derive_key("mneme weights v1");
    digests.iter().for_each(|digest| {
        hasher.update(digest);
    });
    hasher.finalize().into()
}

fn tensor_at(tensors: &[StoredTensor], at: usize) -> Option<(usize, &StoredTensor)> {
    tensors.get(at).map(|tensor| (at, tensor))
}

fn digest_of(tensor: &StoredTensor) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key("mneme tensor v1");
    for text in [&tensor.name, &tensor.kind] {
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    }
    hasher.update(tensor.bytes());
    hasher.finalize().into()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn tensor(name: &str, bytes: &[u8], rows: usize) -> StoredTensor {
        StoredTensor {
            name: name.into(),
            kind: format!("F32 [{rows}, {}]", bytes.len() / 4 / rows),
            source: Arc::new(bytes.to_vec()),
            range: 0..bytes.len(),
        }
    }

    #[test]
    fn every_name_shape_and_byte_counts_and_threads_do_not() {
        let bytes = [7u8; 64];
        let mut other = bytes;
        other[63] ^= 1;
        let base = [tensor("a", &bytes, 2), tensor("b", &bytes, 4)];
        let digest = compute(&base, 1);
        assert_eq!(compute(&base, 7), digest);
        for changed in [
            [tensor("c", &bytes, 2), tensor("b", &bytes, 4)],
            [tensor("a", &bytes, 4), tensor("b", &bytes, 4)],
            [tensor("a", &other, 2), tensor("b", &bytes, 4)],
        ] {
            assert_ne!(compute(&changed, 2), digest);
        }
    }

    #[test]
    fn what_is_kept_is_read_back_and_nonsense_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/a.blake3");
        keep(&path, &[3; 32]).unwrap();
        assert_eq!(parse(&fs::read_to_string(&path).unwrap()), Some([3; 32]));
        assert_eq!(parse("not a digest"), None);
        assert_eq!(fs::read_dir(folder.path().join("deep")).unwrap().count(), 1);
    }
}
