//! That it breaks, and breaks only where it may.

use super::*;

const SEEDS: std::ops::Range<u64> = 0..200;

fn made(seed: u64) -> FaultyFiles {
    let files = FaultyFiles::new(seed);
    files.create_folder(Path::new("/vault")).unwrap();
    files.sync_folder(Path::new("/")).unwrap();
    files
}

/// How many of the seeds leave each of several outcomes.
fn outcomes<T: Ord>(outcome: impl Fn(u64) -> T) -> std::collections::BTreeMap<T, usize> {
    let mut counts = std::collections::BTreeMap::new();
    SEEDS.for_each(|seed| *counts.entry(outcome(seed)).or_insert(0) += 1);
    counts
}

#[test]
fn what_was_synced_survives_and_the_rest_may_not() {
    let path = Path::new("/vault/file");
    let counts = outcomes(|seed| {
        let files = made(seed);
        let file = files.create(path).unwrap();
        file.write_at(&[1; 8192], 0).unwrap();
        file.sync().unwrap();
        files.sync_folder(Path::new("/vault")).unwrap();
        file.write_at(&[2; 8192], 4096).unwrap();
        files.restart();
        assert!(file.read_at(&mut [0], 0).is_err(), "handles die with the process");
        let bytes = files.contents(path).unwrap();
        assert_eq!(bytes[..4096], [1; 4096]);
        assert!(bytes[4096..].iter().all(|byte| *byte < 3));
        (bytes.len(), bytes[4096..].iter().filter(|byte| **byte == 2).count())
    });
    assert!(counts.contains_key(&(8192, 0)) && counts.contains_key(&(12288, 8192)), "{counts:?}");
    assert!(counts.len() > 5, "some are torn: {counts:?}");
}

#[test]
fn names_that_were_not_synced_may_be_lost() {
    let counts = outcomes(|seed| {
        let files = made(seed);
        let file = files.create(Path::new("/vault/a")).unwrap();
        file.sync().unwrap();
        files.rename(Path::new("/vault/a"), Path::new("/vault/b")).unwrap();
        files.restart();
        files.paths()
    });
    assert_eq!(counts.len(), 3, "neither, the first, the last: {counts:?}");
}

#[test]
fn a_folder_is_lost_with_what_is_in_it() {
    let counts = outcomes(|seed| {
        let files = FaultyFiles::new(seed);
        files.create_folder(Path::new("/vault/kv")).unwrap();
        files.create(Path::new("/vault/kv/a")).unwrap();
        files.sync_folder(Path::new("/vault/kv")).unwrap();
        files.restart();
        files.paths().len()
    });
    assert_eq!(counts.len(), 2, "{counts:?}");
}

#[test]
fn it_stops_and_starts_again() {
    let counts = outcomes(|seed| {
        let files = made(seed);
        files.stop_at(2);
        let file = files.create(Path::new("/vault/a")).unwrap();
        assert!(!files.is_stopped());
        assert!(file.write_at(&[1], 0).is_err() && files.is_stopped());
        assert!(file.read_at(&mut [0], 0).is_err() && files.list(Path::new("/vault")).is_err());
        let written = files.num_bytes();
        files.restart();
        files.list(Path::new("/vault")).unwrap();
        written
    });
    assert_eq!(counts.len(), 2, "the last operation happens or not: {counts:?}");
}

#[test]
fn faults_fail_what_they_say() {
    let files = made(0);
    let (path, other) = (Path::new("/vault/a"), Path::new("/vault/b"));
    let file = files.create(path).unwrap();
    file.write_at(&[1; 10], 0).unwrap();
    let code = |error: io::Error| error.raw_os_error().unwrap();
    files.inject(Some(Fault::NoSpace));
    assert_eq!(code(file.write_at(&[1], 0).unwrap_err()), libc::ENOSPC);
    files.inject(Some(Fault::ReadOnly));
    assert_eq!(code(files.remove(path).unwrap_err()), libc::EROFS);
    files.inject(Some(Fault::ShortRead));
    assert_eq!(file.read_at(&mut [0], 0).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    files.inject(Some(Fault::ReadError));
    assert_eq!(code(files.open(path).err().unwrap()), libc::EIO);
    files.inject(Some(Fault::SyncError));
    assert_eq!(code(file.sync().unwrap_err()), libc::EIO);
    files.inject(None);
    files.limit_bytes(Some(12));
    assert_eq!(code(file.write_at(&[2; 10], 5).unwrap_err()), libc::ENOSPC);
    assert_eq!(files.contents(path).unwrap(), [1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2]);
    files.plant(other, &[7]);
    files.swap(path, other);
    files.flip_bit(path, 3);
    files.truncate(other, 2);
    assert_eq!((files.contents(path).unwrap(), files.contents(other).unwrap()), (vec![15], vec![1, 1]));
    assert_eq!((files.num_bytes(), files.peak_bytes()), (3, 12));
}

#[test]
fn what_a_failed_sync_should_have_kept_is_lost() {
    let files = made(3);
    let file = files.create(Path::new("/vault/a")).unwrap();
    files.sync_folder(Path::new("/vault")).unwrap();
    file.write_at(&[1], 0).unwrap();
    files.inject(Some(Fault::SyncError));
    assert!(file.sync().is_err());
    files.inject(None);
    file.sync().unwrap();
    files.restart();
    assert!(files.contents(Path::new("/vault/a")).unwrap().is_empty());
}
