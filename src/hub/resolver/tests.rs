//! Tests of the resolver over invented artifacts and sources that need no network.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};

use super::*;
use crate::hub::progress::Silent;

static FIRST: Source = Source::HubFile { repo: "org/first", revision: "main", file: "abc.gguf" };

static ABC: Artifact = Artifact {
    name: "abc",
    about: "",
    file_name: "abc.gguf",
    size_bytes: 3,
    sha256: "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    sources: &[
        Source::HubFile { repo: "org/first", revision: "main", file: "abc.gguf" },
        Source::HubFile { repo: "org/second", revision: "main", file: "abc.gguf" },
    ],
};

/// What each source gives: bytes, or a reason not to.
struct Script {
    first: std::result::Result<&'static [u8], &'static str>,
    second: std::result::Result<&'static [u8], &'static str>,
    num_fetches: Arc<AtomicUsize>,
}

impl Fetch for Script {
    fn fetch(
        &self,
        source: &Source,
        work_folder: &Path,
        target: &mut dyn Write,
        _progress: &mut dyn Progress,
    ) -> Result<()> {
        self.num_fetches.fetch_add(1, Ordering::SeqCst);
        assert_eq!(std::fs::read_dir(work_folder).unwrap().count(), 0);
        std::fs::write(work_folder.join("wheel"), b"half").unwrap();
        let answer = if *source == FIRST { self.first } else { self.second };
        let bytes = answer.map_err(|why| Error::NotFound(why.into()))?;
        target.write_all(bytes).map_err(|e| Error::io("write", work_folder, e))
    }
}

/// Keeps the messages.
#[derive(Default)]
struct Notes(String);

impl Progress for Notes {
    fn start(&mut self, _total_bytes: u64, _label: &str) {}
    fn advance(&mut self, _num_bytes: u64) {}
    fn finish(&mut self) {}
    fn message(&mut self, text: &str) {
        self.0.push_str(text);
    }
}

fn resolver(
    folder: &Path,
    first: std::result::Result<&'static [u8], &'static str>,
    second: std::result::Result<&'static [u8], &'static str>,
) -> (Resolver, Arc<AtomicUsize>) {
    let num_fetches = Arc::new(AtomicUsize::new(0));
    let fetch = Box::new(Script { first, second, num_fetches: Arc::clone(&num_fetches) });
    let hub = Settings {
        endpoint: None,
        cache_folder: Some(folder.join("hf")),
        token: None,
        offline: true,
        idle: std::time::Duration::from_secs(5),
    };
    (Resolver::with_fetch(Cache::at(folder), hub, fetch), num_fetches)
}

fn names_in(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_second_resolve_fetches_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (resolver, num_fetches) = resolver(folder.path(), Ok(b"abc"), Err("not asked"));
    let reference = ModelRef::ShortName(&ABC);
    assert_eq!(resolver.cached(&reference).unwrap(), None);
    let model = resolver.resolve(&reference, &mut Silent).unwrap();
    assert_eq!((model.name.as_str(), std::fs::read(&model.path).unwrap()), ("abc", b"abc".to_vec()));
    assert_eq!(resolver.resolve(&reference, &mut Silent).unwrap(), model);
    assert_eq!(resolver.cached(&reference).unwrap(), Some(model));
    assert_eq!(num_fetches.load(Ordering::SeqCst), 1);
    assert_eq!(names_in(&folder.path().join("models/abc")), ["abc.gguf", "abc.gguf.json"]);
    resolver.fetch_again(&reference, &mut Silent).unwrap();
    assert_eq!(num_fetches.load(Ordering::SeqCst), 2);
}

#[test]
fn the_next_source_is_used_when_one_fails_or_lies() {
    for first in [Err("down"), Ok(&b"abd"[..]), Ok(b"ab"), Ok(b"abcabc")] {
        let folder = tempfile::tempdir().unwrap();
        let (resolver, num_fetches) = resolver(folder.path(), first, Ok(b"abc"));
        let mut notes = Notes::default();
        let model = resolver.resolve(&ModelRef::ShortName(&ABC), &mut notes).unwrap();
        assert_eq!(std::fs::read(model.path).unwrap(), b"abc");
        assert_eq!(num_fetches.load(Ordering::SeqCst), 2);
        assert!(notes.0.contains("org/first/abc.gguf"), "{}", notes.0);
    }
}

#[test]
fn when_all_sources_fail_each_reason_is_told_and_nothing_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let (resolver, _) = resolver(folder.path(), Err("first is down"), Ok(b"xyz"));
    let message = resolver.resolve(&ModelRef::ShortName(&ABC), &mut Silent).unwrap_err().to_string();
    for part in ["org/first", "first is down", "org/second", "SHA-256", "--model PATH"] {
        assert!(message.contains(part), "{part}: {message}");
    }
    assert!(names_in(&folder.path().join("models/abc")).is_empty());
}

#[test]
fn threads_that_want_the_same_model_download_it_once() {
    let folder = tempfile::tempdir().unwrap();
    let (resolver, num_fetches) = resolver(folder.path(), Ok(b"abc"), Err("not asked"));
    let barrier = Barrier::new(4);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                barrier.wait();
                resolver.resolve(&ModelRef::ShortName(&ABC), &mut Silent).unwrap();
            });
        }
    });
    assert_eq!(num_fetches.load(Ordering::SeqCst), 1);
}

#[test]
fn a_file_of_another_size_is_fetched_again_with_a_message() {
    let folder = tempfile::tempdir().unwrap();
    let (resolver, num_fetches) = resolver(folder.path(), Ok(b"abc"), Err("not asked"));
    let reference = ModelRef::ShortName(&ABC);
    let path = resolver.resolve(&reference, &mut Silent).unwrap().path;
    std::fs::write(&path, b"abcd").unwrap();
    let mut notes = Notes::default();
    resolver.resolve(&reference, &mut notes).unwrap();
    assert!(notes.0.contains("4 bytes, not 3") && notes.0.contains("again"), "{}", notes.0);
    assert_eq!(num_fetches.load(Ordering::SeqCst), 2);
    assert_eq!(std::fs::read(&path).unwrap(), b"abc");
}

#[test]
fn verify_finds_damage_of_the_same_size() {
    let folder = tempfile::tempdir().unwrap();
    let (resolver, num_fetches) = resolver(folder.path(), Ok(b"abc"), Err("not asked"));
    let reference = ModelRef::ShortName(&ABC);
    let path = resolver.resolve(&reference, &mut Silent).unwrap().path;
    resolver.verify(&reference, &mut Silent).unwrap();
    assert_eq!(num_fetches.load(Ordering::SeqCst), 1);
    std::fs::write(&path, b"abd").unwrap();
    resolver.resolve(&reference, &mut Silent).unwrap();
    assert_eq!(num_fetches.load(Ordering::SeqCst), 1, "a start compares sizes only");
    let mut notes = Notes::default();
    resolver.verify(&reference, &mut notes).unwrap();
    assert!(notes.0.contains("is damaged"), "{}", notes.0);
    assert_eq!(num_fetches.load(Ordering::SeqCst), 2);
    assert_eq!(std::fs::read(&path).unwrap(), b"abc");
}

#[test]
fn a_file_without_a_record_is_read_before_it_is_trusted() {
    let folder = tempfile::tempdir().unwrap();
    let (resolver, num_fetches) = resolver(folder.path(), Ok(b"abc"), Err("not asked"));
    let model_folder = folder.path().join("models/abc");
    std::fs::create_dir_all(&model_folder).unwrap();
    for (found, expected_fetches) in [(b"abc", 0), (b"abd", 1)] {
        discard(&model_folder.join("abc.gguf")).unwrap();
        std::fs::write(model_folder.join("abc.gguf"), found).unwrap();
        let model = resolver.resolve(&ModelRef::ShortName(&ABC), &mut Silent).unwrap();
        assert_eq!(std::fs::read(model.path).unwrap(), b"abc");
        assert_eq!(num_fetches.load(Ordering::SeqCst), expected_fetches);
        assert_eq!(resolver.cache().list().unwrap().len(), 1);
    }
}

#[test]
fn paths_resolve_to_themselves() {
    let folder = tempfile::tempdir().unwrap();
    let (resolver, _) = resolver(folder.path(), Err("not asked"), Err("not asked"));
    let file = folder.path().join("tiny.Q4.gguf");
    std::fs::write(&file, b"x").unwrap();
    let model = resolver.resolve(&ModelRef::GgufFile(file.clone()), &mut Silent).unwrap();
    assert_eq!(model, ResolvedModel { name: "tiny.Q4".into(), path: file.clone() });
    std::fs::remove_file(&file).unwrap();
    assert!(matches!(resolver.resolve(&ModelRef::GgufFile(file), &mut Silent), Err(Error::NotFound(_))));
    let model = resolver.resolve(&ModelRef::Directory(folder.path().into()), &mut Silent).unwrap();
    assert_eq!(model.path, folder.path());
}

#[test]
fn offline_repositories_come_from_the_cache_only() {
    let folder = tempfile::tempdir().unwrap();
    let (resolver, _) = resolver(folder.path(), Err("not asked"), Err("not asked"));
    let reference = ModelRef::parse("org/name").unwrap();
    let message = resolver.resolve(&reference, &mut Silent).unwrap_err().to_string();
    assert!(message.contains("HF_HUB_OFFLINE"), "{message}");
    let repo = folder.path().join("hf/models--org--name");
    let snapshot = repo.join("snapshots/c0ffee");
    std::fs::create_dir_all(&snapshot).unwrap();
    std::fs::create_dir_all(repo.join("refs")).unwrap();
    std::fs::write(repo.join("refs/main"), "c0ffee").unwrap();
    for name in ["config.json", "model.safetensors", "a-Q8_0.gguf"] {
        std::fs::write(snapshot.join(name), "{}").unwrap();
    }
    let expected = ResolvedModel { name: "org/name".into(), path: snapshot.clone() };
    assert_eq!(resolver.resolve(&reference, &mut Silent).unwrap(), expected);
    let gguf = resolver.resolve(&ModelRef::parse("org/name:q8_0").unwrap(), &mut Silent).unwrap();
    assert_eq!(gguf.path, snapshot.join("a-Q8_0.gguf"));
    assert!(resolver.resolve(&ModelRef::parse("org/name:q4_0").unwrap(), &mut Silent).is_err());
    let by_commit = resolver.resolve(&ModelRef::parse("org/name@c0ffee").unwrap(), &mut Silent).unwrap();
    assert_eq!(by_commit.path, snapshot);
}
