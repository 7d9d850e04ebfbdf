//! The disk tier over a file system that stops at every operation, and under `kill -9`: what was acknowledged is there
//! and whole, nothing reads back other bytes, the bound holds.

#![allow(missing_docs, clippy::unwrap_used)]

use std::collections::{BTreeSet, HashSet};
use std::io::{self, BufRead, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, LazyLock};

use mneme::kv::BlockHash;
use mneme::paging::faulty::FaultyFiles;
use mneme::paging::{BlockFormat, BlockStore, FileHandle, Files, Found, OpenReport, StoreConfig, Stored, SystemFiles};

#[path = "support/random.rs"]
#[allow(dead_code, unreachable_pub)]
mod random;
use random::Random;

const FOLDER: &str = "/data/vault";
const BLOCK_BYTES: usize = 4096;
const BLOCK_SIZE: usize = 4;

/// Rows of 4 KiB behind a header of 4 KiB: four to a segment, six segments to the store.
const SEGMENT_BYTES: u64 = 5 * 4096;
const MAX_BYTES: u64 = 6 * SEGMENT_BYTES;

fn config(layout: &str) -> StoreConfig {
    let format = BlockFormat { block_bytes: BLOCK_BYTES, block_size: BLOCK_SIZE, layout: layout.into() };
    StoreConfig { format, max_bytes: MAX_BYTES, segment_bytes: SEGMENT_BYTES }
}

/// A block is a function of its number.
fn block(number: u32) -> (BlockHash, Vec<u32>, Vec<u8>) {
    let tokens = (0..=number % BLOCK_SIZE as u32).map(|at| number + at).collect();
    let mut bytes = vec![0; BLOCK_BYTES];
    blake3::Hasher::new().update(&number.to_le_bytes()).finalize_xof().fill(&mut bytes);
    (hash(number), tokens, bytes)
}

fn hash(number: u32) -> BlockHash {
    static ROOT: LazyLock<BlockHash> = LazyLock::new(|| BlockHash::root(b"crash", b""));
    ROOT.child(&[number])
}

/// Whether a block is whole; an error when it claims to be and is not.
fn is_whole(store: &BlockStore, number: u32) -> Result<bool, String> {
    let (hash, tokens, wanted) = block(number);
    let mut bytes = vec![0; BLOCK_BYTES];
    match store.read(&hash, &tokens, &mut bytes) {
        Found::Whole if bytes != wanted => Err(format!("block {number} reads back other bytes")),
        found => Ok(found == Found::Whole),
    }
}

/// What a store must have: acknowledged by a seal and not told to be dropped since.
#[derive(Default)]
struct Model {
    written: BTreeSet<u32>,
    sealed: BTreeSet<u32>,
    pinned: BTreeSet<u32>,
}

impl Model {
    /// A dropped block is no loss, a pinned one is.
    fn follow_drops(&mut self, store: &BlockStore) -> Result<(), String> {
        let dropped: HashSet<BlockHash> = store.take_dropped().into_iter().collect();
        if dropped.is_empty() {
            return Ok(());
        }
        let is_dropped = |number: &u32| dropped.contains(&hash(*number));
        if let Some(number) = self.pinned.iter().find(|number| self.sealed.contains(number) && is_dropped(number)) {
            return Err(format!("pinned block {number} was dropped"));
        }
        self.written.retain(|number| !is_dropped(number));
        self.sealed.retain(|number| !is_dropped(number));
        Ok(())
    }

    fn operate(&mut self, store: &BlockStore, random: &mut Random) -> Result<(), String> {
        let number = random.below(40) as u32;
        match random.below(20) {
            0..11 => {
                let (hash, tokens, bytes) = block(number);
                if store.write(hash, &tokens, &bytes).map_err(|e| e.to_string())? != Stored::NoRoom {
                    self.written.insert(number);
                }
            }
            11..13 => {
                if store.seal().is_ok() {
                    self.sealed.append(&mut self.written);
                }
            }
            13..18 => drop(is_whole(store, number)?),
            18 if self.pinned.len() < 4 && self.pinned.insert(number) => store.pin(&[hash(number)]),
            _ => {
                if let Some(number) = self.pinned.pop_first() {
                    store.unpin(&[hash(number)]);
                }
            }
        }
        self.follow_drops(store)
    }

    /// After a crash: nothing acknowledged is lost, nothing is wrong, and nothing takes more than it may.
    fn check(&mut self, store: &BlockStore, report: &OpenReport, files: &FaultyFiles) -> Result<(), String> {
        if !report.faults.is_empty() {
            return Err(format!("damaged files: {:?}", report.faults));
        }
        for number in 0..40 {
            let (is_found, is_whole) = (store.contains(&hash(number)), is_whole(store, number)?);
            if is_found != is_whole {
                return Err(format!("block {number} is damaged"));
            }
            if self.sealed.contains(&number) && !is_whole {
                return Err(format!("block {number} was acknowledged and is lost"));
            }
        }
        let most = files.num_bytes().max(files.peak_bytes());
        if most > MAX_BYTES {
            return Err(format!("{most} bytes on disk, the bound is {MAX_BYTES}"));
        }
        // What is found on opening is durable, whether it was acknowledged or came back.
        self.written.clear();
        self.sealed = (0..40).filter(|number| store.contains(&hash(*number))).collect();
        Ok(())
    }
}

/// A file layer that forgets some syncs: what a crash test must notice.
struct Careless {
    files: FaultyFiles,
    skips: Skips,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Skips {
    Nothing,
    Files,
    Folders,
}

struct CarelessHandle(Box<dyn FileHandle>, Skips);

impl FileHandle for CarelessHandle {
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_at(bytes, offset)
    }
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_at(bytes, offset)
    }
    fn sync(&self) -> io::Result<()> {
        if self.1 == Skips::Files { Ok(()) } else { self.0.sync() }
    }
    fn num_bytes(&self) -> io::Result<u64> {
        self.0.num_bytes()
    }
}

impl Files for Careless {
    fn create(&self, path: &Path) -> io::Result<Box<dyn FileHandle>> {
        Ok(Box::new(CarelessHandle(self.files.create(path)?, self.skips)))
    }
    fn open(&self, path: &Path) -> io::Result<Box<dyn FileHandle>> {
        self.files.open(path)
    }
    fn open_to_change(&self, path: &Path) -> io::Result<Box<dyn FileHandle>> {
        self.files.open_to_change(path)
    }
    fn rename(&self, source: &Path, target: &Path) -> io::Result<()> {
        self.files.rename(source, target)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        self.files.remove(path)
    }
    fn list(&self, folder: &Path) -> io::Result<Vec<PathBuf>> {
        self.files.list(folder)
    }
    fn create_folder(&self, folder: &Path) -> io::Result<()> {
        self.files.create_folder(folder)
    }
    fn sync_folder(&self, folder: &Path) -> io::Result<()> {
        if self.skips == Skips::Folders { Ok(()) } else { self.files.sync_folder(folder) }
    }
}

fn open(files: &FaultyFiles, skips: Skips) -> mneme::Result<(BlockStore, OpenReport)> {
    let layer = Careless { files: files.clone(), skips };
    BlockStore::open(Arc::new(layer), Path::new(FOLDER), config("pairs"))
}

/// Opens the store and works with it until `num_steps` are done or the process "dies".
fn live(
    files: &FaultyFiles,
    skips: Skips,
    model: &mut Model,
    random: &mut Random,
    num_steps: usize,
) -> Result<(), String> {
    let (store, report) = match open(files, skips) {
        Ok(opened) => opened,
        Err(_) if files.is_stopped() => return Ok(()),
        Err(e) => return Err(e.to_string()),
    };
    // Opening may have been the last thing that worked.
    if files.is_stopped() {
        return Ok(());
    }
    model.check(&store, &report, files)?;
    store.pin(&model.pinned.iter().map(|number| hash(*number)).collect::<Vec<_>>());
    for _ in 0..num_steps {
        model.operate(&store, random)?;
        if files.is_stopped() {
            break;
        }
    }
    store.check_integrity();
    Ok(())
}

/// Lives of `num_steps` steps, the first of which ends at operation `stop_at`, the second somewhere, the third on its
/// own. Returns the operations of the first.
fn lives(seed: u64, stop_at: u64, skips: Skips, num_steps: usize) -> Result<u64, String> {
    let files = FaultyFiles::new(seed.wrapping_mul(1_000_003) ^ stop_at);
    // The same steps whatever the stop, so that every operation of theirs is one.
    let mut random = Random::new(seed);
    let mut model = Model::default();
    files.stop_at(stop_at);
    live(&files, skips, &mut model, &mut random, num_steps)?;
    let num_operations = files.num_operations();
    files.restart();
    files.stop_at(1 + random.below(60) as u64);
    live(&files, skips, &mut model, &mut random, num_steps)?;
    files.restart();
    live(&files, skips, &mut model, &mut random, num_steps / 2)?;
    Ok(num_operations)
}

/// Crashes at every operation of a seed's steps.
fn crash_everywhere(seed: u64, skips: Skips, num_steps: usize) -> Result<u64, String> {
    let mut stop_at = 1;
    loop {
        let reached = lives(seed, stop_at, skips, num_steps)
            .map_err(|fault| format!("seed {seed}, stopped at operation {stop_at}: {fault}"))?;
        if reached < stop_at {
            return Ok(reached);
        }
        stop_at += 1;
    }
}

#[test]
fn a_crash_at_any_operation_loses_nothing_acknowledged() {
    let num_operations: u64 = (0..20).map(|seed| crash_everywhere(seed, Skips::Nothing, 120).unwrap()).sum();
    assert!(num_operations > 20 * 100, "{num_operations} crashes are few");
}

#[test]
fn forgotten_syncs_are_noticed() {
    for skips in [Skips::Files, Skips::Folders] {
        let fault = (0..24).find_map(|seed| crash_everywhere(seed, skips, 120).err());
        assert!(fault.is_some(), "{skips:?} are not synced and nobody notices");
    }
}

fn filled(files: &FaultyFiles, layout: &str, numbers: std::ops::Range<u32>) {
    let (store, _) = BlockStore::open(Arc::new(files.clone()), Path::new(FOLDER), config(layout)).unwrap();
    for number in numbers {
        let (hash, tokens, bytes) = block(number);
        assert_eq!(store.write(hash, &tokens, &bytes).unwrap(), Stored::New);
    }
    store.seal().unwrap();
}

/// A store of four segments of four blocks, its segments, and what is whole of which after `damage`.
fn whole_after(damage: impl Fn(&FaultyFiles, &[PathBuf]), is_open: bool) -> (Vec<u32>, u64) {
    let files = FaultyFiles::new(5);
    filled(&files, "pairs", 0..16);
    let paths = files.paths();
    assert_eq!(paths.len(), 4);
    let (mut store, _) = open(&files, Skips::Nothing).unwrap();
    damage(&files, &paths);
    if !is_open {
        store = open(&files, Skips::Nothing).unwrap().0;
    }
    let whole = (0..16).filter(|number| is_whole(&store, *number).unwrap()).collect();
    store.check_integrity();
    (whole, store.stats().damaged)
}

#[test]
fn a_flipped_bit_costs_its_block_and_no_other() {
    let mut random = Random::new(9);
    for round in 0..300 {
        let (segment, is_open) = (random.below(4), random.once_in(2));
        // Every other round the header, whose damage may cost the segment.
        let in_header = round % 2 == 0;
        let byte = if in_header { random.below(4096) } else { 4096 + random.below(4 * 4096) };
        let (whole, damaged) =
            whole_after(|files, paths| files.flip_bit(&paths[segment], (byte * 8 + round % 8) as u64), is_open);
        let others = (0..16).filter(|number| *number as usize / 4 != segment);
        assert!(others.into_iter().all(|number| whole.contains(&number)), "byte {byte} of {segment}: {whole:?}");
        if !in_header {
            assert_eq!((whole.len(), damaged), (15, 1), "byte {byte} of {segment}: {whole:?}");
        }
    }
}

#[test]
fn a_file_cut_off_keeps_what_is_left() {
    for (bytes, is_open, wanted) in [
        (4096 + 2 * 4096 + 1, true, 14),
        (4096 + 2 * 4096 + 1, false, 14),
        (100, false, 12),
        (0, false, 12),
        (0, true, 12),
    ] {
        let (whole, _) = whole_after(|files, paths| files.truncate(&paths[2], bytes), is_open);
        assert_eq!(whole.len(), wanted, "{bytes} bytes left, open {is_open}: {whole:?}");
    }
}

#[test]
fn swapped_files_of_one_size_are_noticed() {
    let swap = |files: &FaultyFiles, paths: &[PathBuf]| files.swap(&paths[0], &paths[3]);
    let (whole, damaged) = whole_after(swap, true);
    assert_eq!((whole, damaged), ((4..12).collect(), 8));
    let (whole, damaged) = whole_after(swap, false);
    assert_eq!((whole.len(), damaged), (16, 0), "a segment says itself what it holds");
}

#[test]
fn another_formats_file_is_not_believed() {
    let files = FaultyFiles::new(5);
    filled(&files, "rows", 0..4);
    let theirs = files.paths().remove(0);
    filled(&files, "pairs", 8..12);
    let ours = files.paths().into_iter().find(|path| *path != theirs).unwrap();
    files.plant(&ours, &files.contents(&theirs).unwrap());
    let (store, report) = open(&files, Skips::Nothing).unwrap();
    assert_eq!((report.num_blocks, report.num_foreign_segments), (0, 2));
    assert!((0..12).all(|number| !is_whole(&store, number).unwrap()));
}

#[test]
fn a_disk_that_fills_up_costs_no_block_that_was_there() {
    for room in (0..12u64).map(|at| at * 3000) {
        let files = FaultyFiles::new(5);
        filled(&files, "pairs", 0..4);
        files.limit_bytes(Some(files.num_bytes() + room));
        let (store, _) = open(&files, Skips::Nothing).unwrap();
        let stored = (4..16).filter(|number| {
            let (hash, tokens, bytes) = block(*number);
            store.write(hash, &tokens, &bytes).unwrap() == Stored::New
        });
        let stored: Vec<u32> = stored.collect();
        assert!(store.stats().degraded && stored.len() as u64 * 4096 <= room);
        let is_sealed = store.seal().is_ok();
        assert!((0..4).chain(stored.iter().copied()).all(|number| is_whole(&store, number).unwrap()));
        files.restart();
        files.limit_bytes(None);
        let (store, report) = open(&files, Skips::Nothing).unwrap();
        assert!(report.faults.is_empty(), "{:?}", report.faults);
        let promised = if is_sealed { &stored[..] } else { &[] };
        let lost = (0..4).chain(promised.iter().copied()).find(|number| !is_whole(&store, *number).unwrap());
        assert_eq!(lost, None, "{room} bytes of room, sealed {is_sealed}, stored {stored:?}");
    }
}

// ---- kill -9 of a real process ----

const CHILD_FOLDER: &str = "MNEME_CRASH_TEST_FOLDER";
const CHILD_PINNED: &str = "MNEME_CRASH_TEST_PINNED";
const KILL_TEST: &str = "killed_processes_keep_what_they_acknowledged";

/// Blocks that the child promises at a time.
const NUM_PROMISED: usize = 8;

fn open_folder(folder: &Path) -> (BlockStore, OpenReport) {
    BlockStore::open(Arc::new(SystemFiles), folder, config("pairs")).unwrap()
}

fn say(line: &str) {
    let mut out = io::stdout().lock();
    writeln!(out, "\n@{line}").and_then(|()| out.flush()).unwrap();
}

/// Writes and seals until somebody kills it. Says `+N` when block N is sealed, and `-N` before it lets N go.
fn write_until_killed(folder: &Path, pinned: &str) -> ! {
    let (store, _) = open_folder(folder);
    let mut promised: Vec<u32> = pinned.split_terminator(' ').map(|number| number.parse().unwrap()).collect();
    store.pin(&promised.iter().map(|number| hash(*number)).collect::<Vec<_>>());
    let first = promised.iter().max().map_or(0, |number| number + 1);
    for number in first.. {
        let (hash, tokens, bytes) = block(number);
        store.pin(&[hash]);
        let stored = store.write(hash, &tokens, &bytes).unwrap();
        assert_ne!(stored, Stored::NoRoom);
        if number % 3 != 0 {
            store.seal().unwrap();
            say(&format!("+{number}"));
            promised.push(number);
        } else {
            store.unpin(&[hash]);
        }
        if promised.len() > NUM_PROMISED {
            let number = promised.remove(0);
            say(&format!("-{number}"));
            store.unpin(&[self::hash(number)]);
        }
    }
    unreachable!("the numbers do not run out")
}

/// Runs a child until it has said `num_lines` lines, kills it, and follows all it said.
fn run_and_kill(folder: &Path, num_lines: usize, promised: &mut BTreeSet<u32>) {
    let pinned: Vec<String> = promised.iter().map(|number: &u32| number.to_string()).collect();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", KILL_TEST, "--nocapture", "--test-threads", "1"])
        .env(CHILD_FOLDER, folder)
        .env(CHILD_PINNED, pinned.join(" "))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let mut num_seen = 0;
    for line in lines.filter_map(|line| line.strip_prefix('@').map(str::to_owned)) {
        let number = line[1..].parse().unwrap();
        match &line[..1] {
            "+" => promised.insert(number),
            _ => promised.remove(&number),
        };
        num_seen += 1;
        if num_seen == num_lines {
            child.kill().unwrap();
        }
    }
    assert!(num_seen >= num_lines, "the child ended by itself");
    assert!(!child.wait().unwrap().success());
}

#[test]
fn killed_processes_keep_what_they_acknowledged() {
    if let (Ok(folder), Ok(pinned)) = (std::env::var(CHILD_FOLDER), std::env::var(CHILD_PINNED)) {
        write_until_killed(Path::new(&folder), &pinned);
    }
    let folder = tempfile::tempdir().unwrap();
    let mut random = Random::new(1);
    let mut promised = BTreeSet::new();
    for round in 0..12 {
        run_and_kill(folder.path(), random.within(1, 60), &mut promised);
        let (store, report) = open_folder(folder.path());
        assert!(report.faults.is_empty() && report.bytes <= MAX_BYTES, "{report:?}");
        for number in promised.iter() {
            assert_eq!(is_whole(&store, *number), Ok(true), "block {number} in round {round}");
        }
        assert!(store.hashes().len() >= promised.len());
    }
    assert!(promised.iter().max().is_some_and(|number| *number > 40), "the store was filled several times");
}
