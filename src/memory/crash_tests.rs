//! What a crash at any moment leaves of a catalog: every step whole or not begun, and every step that was acknowledged.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::acl::{Acl, AclLists, Principal, Visibility};
use super::catalog::{Catalog, CatalogLimits, CubeFilter};
use super::changes::{CubeChanges, NewCube};
use super::cube::{Cube, CubeId};
use super::folder::Durability;
use super::label::{Label, Labels};
use super::name::{CubeAddress, CubeName, Version};
use super::samples;
use super::timestamp::{Clock, Timestamp};
use crate::paging::Files;
use crate::paging::faulty::FaultyFiles;
use crate::{Error, Result};

/// How an image is torn: everything kept, nothing kept, and fourteen mixtures.
const NUM_SEEDS: u64 = 16;

/// A clock that tests set; its ticks make every moment different.
pub(super) struct TestClock(AtomicU64);

impl TestClock {
    pub(super) fn at(millis: u64) -> Arc<Self> {
        Arc::new(Self(AtomicU64::new(millis)))
    }

    pub(super) fn set(&self, millis: u64) {
        self.0.store(millis, Ordering::SeqCst);
    }
}

impl Clock for TestClock {
    fn now(&self) -> Timestamp {
        Timestamp::from_millis(self.0.load(Ordering::SeqCst))
    }
}

const NOW: u64 = 1_000_000;

fn ana() -> Principal {
    "ana".parse().unwrap()
}

fn name(text: &str) -> CubeName {
    text.parse().unwrap()
}

fn limits() -> CatalogLimits {
    // Fewer than the steps make, so that forgetting one is crashed too.
    CatalogLimits { max_tombstones: 1, ..CatalogLimits::default() }
}

/// Files with a folder for cubes that is surely there.
pub(super) fn files() -> FaultyFiles {
    let files = FaultyFiles::new(2);
    files.create_folder(Path::new("/vault/cubes")).unwrap();
    ["/", "/vault"].into_iter().for_each(|folder| files.sync_folder(Path::new(folder)).unwrap());
    files
}

/// Operations since then.
fn num_operations(changed: &FaultyFiles) -> u64 {
    changed.num_operations() - files().num_operations()
}

fn open(files: &FaultyFiles) -> Result<Catalog> {
    Catalog::open(Arc::new(files.clone()), PathBuf::from("/vault/cubes"), TestClock::at(NOW), limits())
}

fn shared_with_bert() -> Acl {
    let read = vec!["bert".parse().unwrap()];
    Acl::try_from(AclLists { visibility: Visibility::Shared, read, ..AclLists::default() }).unwrap()
}

type Step = fn(&Catalog) -> Result<()>;

/// A life of cubes. Every step is acknowledged when it returns.
const STEPS: [Step; 16] = [
    |catalog| create(catalog, "ana/a", "first"),
    |catalog| create(catalog, "ana/b", "second"),
    |catalog| {
        let changes = CubeChanges { acl: Some(shared_with_bert()), ..CubeChanges::default() };
        catalog.change(&ana(), &name("ana/a"), changes).map(drop)
    },
    |catalog| append(catalog, "ana/a", "first and more"),
    // Back to private: an older manifest says shared.
    |catalog| {
        let changes = CubeChanges { acl: Some(Acl::Private), ..CubeChanges::default() };
        catalog.change(&ana(), &name("ana/a"), changes).map(drop)
    },
    |catalog| catalog.rename(&ana(), &name("ana/b"), name("ana/c")).map(drop),
    // The name is free again and is given to another cube at once.
    |catalog| create(catalog, "ana/b", "third"),
    |catalog| catalog.fork(&ana(), &"ana/a@1".parse().unwrap(), name("ana/d")).map(drop),
    |catalog| catalog.pin(&ana(), &name("ana/d")).map(drop),
    |catalog| catalog.freeze(&ana(), &name("ana/d")).map(drop),
    |catalog| catalog.delete(&ana(), &name("ana/a")).map(drop),
    |catalog| create(catalog, "ana/a", "fourth, under a deleted name"),
    |catalog| append(catalog, "ana/c", "second and more"),
    |catalog| catalog.delete(&ana(), &name("ana/b")).map(drop),
    // Older than the last one: its tombstone is forgotten at once.
    |catalog| catalog.delete(&ana(), &name("ana/c")).map(drop),
    |catalog| catalog.unfreeze(&ana(), &name("ana/d")).map(drop),
];

fn tokens(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

fn new_cube(cube: &str, text: &str) -> NewCube {
    let mut new = NewCube::new(name(cube), samples::activation_payload(text, &tokens(text)));
    let tag = text.split(' ').next().unwrap().parse::<Label>().unwrap();
    new.changes.tags = Some(Labels::try_from(vec![tag]).unwrap());
    new
}

fn create(catalog: &Catalog, cube: &str, text: &str) -> Result<()> {
    catalog.create(&ana(), new_cube(cube, text), Durability::Synced).map(drop)
}

fn append(catalog: &Catalog, cube: &str, text: &str) -> Result<()> {
    let newest = catalog.get(&ana(), &name(cube).into())?.newest;
    catalog.append(&ana(), &name(cube), newest, samples::activation_payload(text, &tokens(text))).map(drop)
}

/// Everything that is to survive, without ids: they differ from run to run.
fn dump(catalog: &Catalog) -> Vec<Cube> {
    let filter = CubeFilter { limit: 100, ..CubeFilter::default() };
    let mut cubes = Vec::new();
    for view in catalog.list(&ana(), &filter).cubes {
        for version in (1..=view.newest.get()).filter_map(Version::new) {
            let address = CubeAddress { name: view.cube.name.clone(), version: Some(version) };
            let mut cube = Cube::clone(&catalog.get(&ana(), &address).expect("every version is there").cube);
            cube.id = samples::id(0);
            cube.parents.clear();
            cubes.push(cube);
        }
    }
    catalog.read().check_integrity();
    cubes
}

/// The state after each number of steps.
fn expected() -> Vec<Vec<Cube>> {
    let catalog = open(&files()).unwrap();
    let mut states = vec![dump(&catalog)];
    for step in STEPS {
        step(&catalog).unwrap();
        states.push(dump(&catalog));
    }
    states
}

/// Runs steps until one fails; how many were acknowledged.
fn run(files: &FaultyFiles) -> usize {
    let Ok(catalog) = open(files) else { return 0 };
    STEPS.iter().take_while(|step| step(&catalog).is_ok()).count()
}

fn assert_is_one_of(files: &FaultyFiles, before: &[Cube], after: &[Cube], case: &str) {
    let catalog = open(files).unwrap();
    let found = dump(&catalog);
    assert!(found == before || found == after, "{case}: found {:?}", found.iter().map(|c| &c.name).collect::<Vec<_>>());
    let leftover = files.paths().into_iter().find(|path| path.extension().is_some_and(|ending| ending == "tmp"));
    assert_eq!(leftover, None, "{case}: nothing half written stays");
    assert!(catalog.damaged().is_empty(), "{case}: {:?}", catalog.damaged());
}

#[test]
fn a_crash_at_any_operation_leaves_every_step_done_or_not_begun() {
    let states = expected();
    let all = files();
    assert_eq!(run(&all), STEPS.len());
    let num_operations = num_operations(&all);
    assert!(num_operations > 60, "{num_operations} operations are hardly all of them");
    for operation in 0..num_operations {
        let files = files();
        files.stop_at(operation + 1);
        let num_done = run(&files);
        assert!(files.is_stopped(), "operation {operation} was reached");
        let (before, after) = (&states[num_done], &states[(num_done + 1).min(STEPS.len())]);
        for seed in 0..NUM_SEEDS {
            let case = format!("crash at operation {operation}, seed {seed}");
            assert_is_one_of(&files.after_crash(seed), before, after, &case);
        }
    }
}

#[test]
fn what_was_seen_after_a_kill_stays_when_the_power_goes() {
    let all = files();
    run(&all);
    for operation in 0..num_operations(&all) {
        let files = files();
        files.stop_at(operation + 1);
        run(&files);
        let image = files.after_kill();
        let seen = dump(&open(&image).unwrap());
        for seed in 0..4 {
            let case = format!("killed at operation {operation}, power gone with seed {seed}");
            assert_is_one_of(&image.after_crash(seed), &seen, &seen, &case);
        }
    }
}

#[test]
fn a_crash_while_recovering_loses_nothing_either() {
    let states = expected();
    let all = files();
    run(&all);
    for operation in (0..num_operations(&all)).step_by(3) {
        let files = files();
        files.stop_at(operation + 1);
        let num_done = run(&files);
        let (before, after) = (&states[num_done], &states[(num_done + 1).min(STEPS.len())]);
        for seed in 0..4 {
            for second in 0..4 {
                let image = files.after_crash(seed);
                image.stop_at(second + 1);
                let first_look = open(&image).ok().map(|catalog| dump(&catalog));
                let case = format!("crash at operation {operation}, seed {seed}, again at {second}");
                for later_seed in 0..4 {
                    let later = image.after_crash(later_seed);
                    assert_is_one_of(&later, before, after, &case);
                    // What was seen after the first crash is not taken back by the second.
                    if let Some(seen) = &first_look {
                        assert_is_one_of(&later, seen, seen, &case);
                    }
                }
            }
        }
    }
}

#[test]
fn the_deleted_stay_deleted_and_are_remembered() {
    let files = files();
    let catalog = open(&files).unwrap();
    create(&catalog, "ana/a", "parent").unwrap();
    catalog.fork(&ana(), &"ana/a".parse().unwrap(), name("ana/child")).unwrap();
    let ended = catalog.delete(&ana(), &name("ana/a")).unwrap();
    assert!(ended.unreferenced.is_empty(), "the fork still uses the blocks");
    for seed in 0..NUM_SEEDS {
        let catalog = open(&files.after_crash(seed)).unwrap();
        assert!(matches!(catalog.get(&ana(), &"ana/a".parse().unwrap()), Err(Error::NotFound(_))));
        let lineage = catalog.lineage(&ana(), &name("ana/child")).unwrap();
        assert_eq!(lineage.ancestors.iter().map(|relative| relative.id).collect::<Vec<_>>(), ended.ids);
        assert!(lineage.ancestors[0].ended.is_some());
    }
}

#[test]
fn a_cube_that_need_not_be_durable_is_whole_or_gone() {
    let files = files();
    let catalog = open(&files).unwrap();
    catalog.create(&ana(), new_cube("ana/a", "text"), Durability::Unsynced).unwrap();
    let wanted = dump(&catalog);
    let mut num_there = 0;
    for seed in 0..NUM_SEEDS {
        let found = dump(&open(&files.after_crash(seed)).unwrap());
        assert!(found.is_empty() || found == wanted, "seed {seed}");
        num_there += found.len();
    }
    assert!((1..NUM_SEEDS as usize).contains(&num_there), "both were seen: {num_there}");
}

#[test]
fn a_full_disk_refuses_and_changes_nothing() {
    let states = expected();
    let all = files();
    run(&all);
    let mut num_refused = 0;
    for operation in 0..num_operations(&all) {
        let files = files();
        files.fail_at(operation + 1, ErrorKind::StorageFull);
        let Ok(catalog) = open(&files) else { continue };
        let failed = STEPS.iter().position(|step| step(&catalog).is_err());
        let Some(failed) = failed else { continue };
        num_refused += 1;
        assert_eq!(dump(&catalog), states[failed], "operation {operation}: what is seen is what was acknowledged");
        // Either the step was surely not done and works now, or nothing is written any more.
        if STEPS[failed](&catalog).is_ok() {
            STEPS[failed + 1..].iter().for_each(|step| step(&catalog).unwrap());
            assert_eq!(dump(&catalog), states[STEPS.len()]);
            assert_is_one_of(&files.after_crash(1), &states[STEPS.len()], &states[STEPS.len()], "durable");
        } else {
            let later = create(&catalog, "ana/z", "text").unwrap_err();
            assert!(later.to_string().contains("restart"), "{later}");
            assert_is_one_of(&files.after_crash(0), &states[failed], &states[failed + 1], "after the restart");
        }
    }
    assert!(num_refused > 20, "{num_refused}");
}

fn path_of(files: &FaultyFiles, id: CubeId, ending: &str) -> PathBuf {
    let path = Path::new("/vault/cubes").join(format!("{id}.{ending}.json"));
    assert!(files.paths().contains(&path), "{}", path.display());
    path
}

#[test]
fn damage_hides_a_cube_rather_than_showing_an_older_access_list() {
    let files = files();
    let catalog = open(&files).unwrap();
    let mut new = new_cube("ana/a", "public once");
    let lists = AclLists { visibility: Visibility::Public, ..AclLists::default() };
    new.changes.acl = Some(Acl::try_from(lists).unwrap());
    let id = catalog.create(&ana(), new, Durability::Synced).unwrap().cube.id;
    let changes = CubeChanges { acl: Some(Acl::Private), ..CubeChanges::default() };
    append(&catalog, "ana/a", "secret now").unwrap();
    catalog.change(&ana(), &name("ana/a"), changes).unwrap();
    files.change(&path_of(&files, id, "2"), |bytes| bytes[200] ^= 1);
    let catalog = open(&files).unwrap();
    assert_eq!((catalog.num_cubes(), catalog.damaged().len()), (0, 1));
    assert!(!catalog.block_references().is_empty(), "what may be repaired keeps its blocks");
    assert!(files.paths().contains(&path_of(&files, id, "2")), "the file stays for whoever repairs it");
}

#[test]
fn damage_to_an_old_version_costs_that_version() {
    let files = files();
    let catalog = open(&files).unwrap();
    let id = catalog.create(&ana(), new_cube("ana/a", "one"), Durability::Synced).unwrap().cube.id;
    append(&catalog, "ana/a", "one two").unwrap();
    files.change(&path_of(&files, id, "1"), |bytes| bytes.truncate(100));
    let catalog = open(&files).unwrap();
    assert_eq!(catalog.damaged().len(), 1);
    assert!(catalog.get(&ana(), &"ana/a".parse().unwrap()).is_ok());
    assert!(catalog.get(&ana(), &"ana/a@1".parse().unwrap()).is_err());
}

#[test]
fn a_damaged_tombstone_still_stands_for_its_cube() {
    let files = files();
    let catalog = open(&files).unwrap();
    let id = catalog.create(&ana(), new_cube("ana/a", "one"), Durability::Synced).unwrap().cube.id;
    let manifest = path_of(&files, id, "1");
    // The tombstone is durable, the manifest's removal is not.
    catalog.delete(&ana(), &name("ana/a")).unwrap();
    let image = files.after_crash(1);
    assert!(image.paths().contains(&manifest));
    image.change(&path_of(&image, id, "tombstone"), |bytes| bytes.clear());
    let catalog = open(&image).unwrap();
    assert_eq!((catalog.num_cubes(), catalog.damaged().len()), (0, 1));
}

#[test]
fn files_that_changed_places_or_do_not_belong_are_left_out() {
    let files = files();
    let catalog = open(&files).unwrap();
    let id = |cube: &str| catalog.create(&ana(), new_cube(cube, "same"), Durability::Synced).unwrap().cube.id;
    let (one, other) = (id("ana/a"), id("ana/b"));
    files.swap(&path_of(&files, one, "1"), &path_of(&files, other, "1"));
    let catalog = open(&files).unwrap();
    assert_eq!((catalog.num_cubes(), catalog.damaged().len()), (0, 2));
    files.swap(&path_of(&files, one, "1"), &path_of(&files, other, "1"));
    crate::paging::Files::create(&files, Path::new("/vault/cubes/notes.txt")).unwrap();
    let catalog = open(&files).unwrap();
    assert_eq!((catalog.num_cubes(), catalog.damaged().len()), (2, 1));
}
