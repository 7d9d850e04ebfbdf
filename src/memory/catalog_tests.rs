//! What a catalog answers to whom, and what it refuses.

use std::sync::Arc;

use super::acl::{Acl, AclLists, Principal, Visibility};
use super::catalog::{Catalog, CatalogLimits, CubeFilter};
use super::changes::{CubeChanges, NewCube};
use super::crash_tests::TestClock;
use super::cube::{CubeId, Priority, SemanticType};
use super::event::EventKind;
use super::folder::Durability;
use super::label::{Label, Labels};
use super::lifecycle::State;
use super::name::{CubeName, Version};
use super::payload::{Kind, Payload, Twin};
use super::samples;
use crate::{Error, Result};

const NOW: u64 = 1_800_000_000_000;
const SECOND: u64 = 1000;

fn catalog() -> (Catalog, Arc<TestClock>) {
    let clock = TestClock::at(NOW);
    (Catalog::in_memory(Arc::<TestClock>::clone(&clock), CatalogLimits::default()), clock)
}

fn who(name: &str) -> Principal {
    name.parse().unwrap()
}

fn name(text: &str) -> CubeName {
    text.parse().unwrap()
}

fn text(text: &str) -> Payload {
    Payload::Plaintext(Twin::Text(text.to_owned()))
}

fn make(catalog: &Catalog, owner: &str, cube: &str) -> Result<CubeId> {
    let new = NewCube::new(name(cube), text("Some text"));
    catalog.create(&who(owner), new, Durability::Synced).map(|view| view.cube.id)
}

fn acl(visibility: Visibility, read: &[&str], write: &[&str], share: &[&str]) -> Acl {
    let list = |names: &[&str]| names.iter().map(|name| who(name)).collect();
    Acl::try_from(AclLists { visibility, read: list(read), write: list(write), share: list(share) }).unwrap()
}

fn give(catalog: &Catalog, cube: &str, acl: Acl) {
    let changes = CubeChanges { acl: Some(acl), ..CubeChanges::default() };
    catalog.change(&who("ana"), &name(cube), changes).unwrap();
}

fn names(catalog: &Catalog, principal: &str, filter: CubeFilter) -> Vec<String> {
    let filter = CubeFilter { limit: 100, ..filter };
    let cubes = catalog.list(&who(principal), &filter).cubes;
    cubes.iter().map(|view| view.cube.name.to_string()).collect()
}

type Operation = fn(&Catalog, &Principal, CubeName) -> Result<()>;

/// Everything one can do to a cube by name.
const OPERATIONS: [Operation; 13] = [
    |c, p, name| c.get(p, &name.into()).map(drop),
    |c, p, name| c.lineage(p, &name).map(drop),
    |c, p, name| c.fork(p, &name.into(), "bert/copy".parse()?).map(drop),
    |c, p, name| c.append(p, &name, Version::FIRST, text("more")).map(drop),
    |c, p, name| c.change(p, &name, CubeChanges { erase_on_free: Some(true), ..CubeChanges::default() }).map(drop),
    |c, p, name| c.change(p, &name, CubeChanges { acl: Some(Acl::Private), ..CubeChanges::default() }).map(drop),
    |c, p, name| c.change(p, &name, CubeChanges::default()).map(drop),
    |c, p, name| c.pin(p, &name).map(drop),
    |c, p, name| c.unpin(p, &name).map(drop),
    |c, p, name| c.freeze(p, &name).map(drop),
    |c, p, name| c.unfreeze(p, &name).map(drop),
    |c, p, name| c.rename(p, &name, "bert/mine".parse()?).map(drop),
    |c, p, name| c.delete(p, &name).map(drop),
];

#[test]
fn what_one_may_not_read_does_not_exist() {
    let (catalog, _) = catalog();
    make(&catalog, "ana", "ana/secret").unwrap();
    for operation in OPERATIONS {
        let hidden = operation(&catalog, &who("bert"), name("ana/secret")).unwrap_err();
        let missing = operation(&catalog, &who("bert"), name("ana/nothing")).unwrap_err();
        assert!(matches!(hidden, Error::NotFound(_)), "{hidden}");
        assert_eq!(hidden.to_string().replace("secret", "nothing"), missing.to_string());
    }
    assert!(names(&catalog, "bert", CubeFilter::default()).is_empty());
    assert!(catalog.events(&who("bert"), 0, 100).events.is_empty());
    // Not even by a name that is taken, or by an id.
    let taken = make(&catalog, "bert", "ana/secret").unwrap_err().to_string();
    assert_eq!(taken, make(&catalog, "bert", "ana/nothing").unwrap_err().to_string());
    let id = catalog.get(&who("ana"), &name("ana/secret").into()).unwrap().cube.id;
    let with_parent = |parent| {
        let new = NewCube { parents: vec![parent], ..NewCube::new(name("bert/child"), text("x")) };
        catalog.create(&who("bert"), new, Durability::Synced).unwrap_err().to_string()
    };
    assert_eq!(
        with_parent(id).replace(&id.to_string(), "ID"),
        with_parent(samples::id(7)).replace(&samples::id(7).to_string(), "ID")
    );
    catalog.delete(&who("ana"), &name("ana/secret")).unwrap();
    assert!(matches!(catalog.lineage(&who("bert"), &name("ana/secret")), Err(Error::NotFound(_))));
    assert!(catalog.lineage(&who("ana"), &name("ana/secret")).unwrap().cube.ended.is_some());
}

#[test]
fn every_operation_needs_its_right() {
    for (principal, allowed) in [
        ("reader", [true, true, false, false, false, false, false, false, false, false, false]),
        ("writer", [true, true, true, true, false, true, true, true, true, true, false]),
        ("sharer", [true, true, false, false, true, false, false, false, false, false, false]),
    ] {
        // All but fork, which goes to bert's namespace, and unfreeze and delete separately.
        let operations =
            OPERATIONS.iter().enumerate().filter(|(at, _)| *at != 2 && *at != 12).map(|(_, operation)| operation);
        for (at, (operation, allowed)) in operations.zip(allowed).enumerate() {
            let (catalog, _) = catalog();
            make(&catalog, "ana", "ana/a").unwrap();
            give(&catalog, "ana/a", acl(Visibility::Shared, &["reader"], &["writer"], &["sharer"]));
            match operation(&catalog, &who(principal), name("ana/a")) {
                Ok(()) => assert!(allowed, "{principal} may do {at}"),
                Err(error) => assert!(!allowed && matches!(error, Error::Denied(_)), "{principal} {at}: {error}"),
            }
            assert!(matches!(
                catalog.delete(&who(principal), &name("ana/a")),
                Err(Error::Denied(_) | Error::NotFound(_) | Error::Conflict(_))
            ));
        }
    }
}

#[test]
fn a_namespace_belongs_to_whoever_began_it() {
    let (catalog, _) = catalog();
    make(&catalog, "ana", "team/a").unwrap();
    assert!(matches!(make(&catalog, "bert", "team/b"), Err(Error::Denied(_))));
    make(&catalog, "ana", "team/b").unwrap();
    make(&catalog, "bert", "team-b/b").unwrap();
    assert!(matches!(catalog.rename(&who("bert"), &name("team-b/b"), name("team/x")), Err(Error::Denied(_))));
    give(&catalog, "team/a", acl(Visibility::Public, &[], &[], &[]));
    assert!(matches!(catalog.fork(&who("bert"), &name("team/a").into(), name("team/x")), Err(Error::Denied(_))));
    let fork = catalog.fork(&who("bert"), &name("team/a").into(), name("team-b/a")).unwrap();
    assert_eq!(fork.cube.governance.owner, who("bert"));
    assert_eq!(fork.cube.governance.acl, Acl::Private);
    ["team/a", "team/b"].iter().for_each(|cube| drop(catalog.delete(&who("ana"), &name(cube)).unwrap()));
    make(&catalog, "bert", "team/a").unwrap();
}

#[test]
fn lists_are_filtered_and_come_in_pages() {
    let (catalog, clock) = catalog();
    for cube in ["ana/a", "ana/b", "ana/c/d", "ana-b/a", "bert/a"] {
        let owner = if cube.starts_with("bert") { "bert" } else { "ana" };
        let mut new = NewCube::new(name(cube), text(&format!("About {cube}, \u{c4}rzte")));
        new.changes.tags = Some(Labels::try_from(vec![cube.parse::<Label>().unwrap()]).unwrap());
        catalog.create(&who(owner), new, Durability::Synced).unwrap();
    }
    let new = NewCube::new(name("ana/kv"), samples::activation_payload("keys", &[1, 2, 3]));
    catalog.create(&who("ana"), new, Durability::Synced).unwrap();
    let all = ["ana-b/a", "ana/a", "ana/b", "ana/c/d", "ana/kv"];
    assert_eq!(names(&catalog, "ana", CubeFilter::default()), all);
    let some = |filter: CubeFilter| names(&catalog, "ana", filter);
    let namespace = |namespace: &str| CubeFilter { namespace: Some(namespace.to_owned()), ..CubeFilter::default() };
    assert_eq!(some(namespace("ana")), all[1..]);
    assert!(
        some(namespace("an")).is_empty() && some(namespace("bert")).is_empty() && some(namespace("../")).is_empty()
    );
    assert_eq!(some(CubeFilter { kind: Some(Kind::Activation), ..CubeFilter::default() }), ["ana/kv"]);
    assert!(some(CubeFilter { kind: Some(Kind::Parameter), ..CubeFilter::default() }).is_empty());
    assert_eq!(some(CubeFilter { tag: Some("ana/b".to_owned()), ..CubeFilter::default() }), ["ana/b"]);
    let query = |query: &str| CubeFilter { query: Some(query.to_owned()), ..CubeFilter::default() };
    assert_eq!(some(query("ABOUT ANA/C")), ["ana/c/d"]);
    assert_eq!(some(query("\u{e4}rzte")).len(), 4);
    assert_eq!(some(query("KEYS")), ["ana/kv"]);
    catalog.note_use(catalog.get(&who("ana"), &name("ana/a").into()).unwrap().cube.id);
    assert_eq!(some(CubeFilter { state: Some(State::Activated), ..CubeFilter::default() }), ["ana/a"]);
    let mut filter = CubeFilter { limit: 2, ..namespace("ana") };
    let first = catalog.list(&who("ana"), &filter);
    filter.after = first.next_after;
    let second = catalog.list(&who("ana"), &filter);
    assert_eq!((first.cubes.len(), second.cubes.len(), second.next_after), (2, 2, None));
    assert_eq!(second.cubes[0].cube.name.as_str(), "ana/c/d");
    clock.set(NOW + 1);
}

#[test]
fn versions_share_blocks_and_what_governs() {
    let (catalog, clock) = catalog();
    let ana = who("ana");
    let tokens: Vec<u32> = (0..40).collect();
    let new = NewCube::new(name("ana/a"), samples::activation_payload("one", &tokens[..20]));
    let first = catalog.create(&ana, new, Durability::Synced).unwrap();
    clock.set(NOW + 5 * SECOND);
    let second =
        catalog.append(&ana, &name("ana/a"), Version::FIRST, samples::activation_payload("one two", &tokens)).unwrap();
    assert_eq!((second.cube.version.get(), second.cube.id), (2, first.cube.id));
    assert!(second.cube.updated_at > second.cube.created_at && second.cube.created_at == first.cube.created_at);
    assert_eq!(catalog.block_references().len(), 4, "of five blocks two are the same");
    give(&catalog, "ana/a", acl(Visibility::Public, &[], &[], &[]));
    let old = catalog.get(&who("bert"), &"ana/a@1".parse().unwrap()).unwrap();
    assert_eq!(old.cube.payload, first.cube.payload);
    assert_eq!((old.cube.version.get(), old.newest.get()), (1, 2));
    assert_eq!(old.cube.governance, catalog.get(&ana, &name("ana/a").into()).unwrap().cube.governance);
    assert!(matches!(catalog.get(&ana, &"ana/a@3".parse().unwrap()), Err(Error::NotFound(_))));
    catalog.fork(&ana, &"ana/a@1".parse().unwrap(), name("ana/b")).unwrap();
    let ended = catalog.delete(&ana, &name("ana/a")).unwrap();
    assert_eq!(ended.unreferenced.len(), 2, "the fork keeps a full and a partial block");
    assert!(ended.unreferenced.iter().all(|hash| !catalog.is_referenced(hash)));
    assert_eq!(catalog.delete(&ana, &name("ana/b")).unwrap().unreferenced.len(), 2);
    assert!(catalog.block_references().is_empty());
    catalog.read().check_integrity();
    assert_eq!(catalog.read().num_payload_bytes, 0);
}

#[test]
fn the_frozen_stay_as_they_are() {
    let (catalog, clock) = catalog();
    let ana = who("ana");
    make(&catalog, "ana", "ana/a").unwrap();
    let changes = CubeChanges { ttl_s: Some(Some(60)), ..CubeChanges::default() };
    catalog.change(&ana, &name("ana/a"), changes).unwrap();
    assert_eq!(catalog.freeze(&ana, &name("ana/a")).unwrap().state, State::Frozen);
    for (at, operation) in OPERATIONS.iter().enumerate() {
        let result = operation(&catalog, &ana, name("ana/a"));
        match at {
            0..=2 => result.unwrap(),
            10 => {}
            _ => assert!(matches!(result, Err(Error::Conflict(_))), "{at}: {result:?}"),
        }
        catalog.freeze(&ana, &name("ana/a")).ok();
    }
    clock.set(NOW + 3600 * SECOND);
    assert!(catalog.expire().unwrap().ids.is_empty() && catalog.expire().unwrap().ids.is_empty());
    catalog.unfreeze(&ana, &name("ana/a")).unwrap();
    assert!(catalog.get(&ana, &name("ana/a").into()).is_ok(), "the lifetime begins anew");
}

#[test]
fn a_lifetime_hides_at_once_and_ends_at_the_second_look() {
    let (catalog, clock) = catalog();
    let ana = who("ana");
    let is_there = |cube: &str| catalog.get(&ana, &name(cube).into()).is_ok();
    let mut new = NewCube::new(name("ana/a"), samples::activation_payload("a", &[1, 2]));
    new.changes.ttl_s = Some(Some(60));
    let id = catalog.create(&ana, new, Durability::Synced).unwrap().cube.id;
    make(&catalog, "ana", "ana/forever").unwrap();
    clock.set(NOW + 59 * SECOND);
    assert!(is_there("ana/a") && catalog.expire().unwrap().ids.is_empty());
    // The clock jumps ahead, is looked at once, and is set right.
    clock.set(NOW + 60 * SECOND);
    assert!(!is_there("ana/a"));
    assert_eq!(names(&catalog, "ana", CubeFilter::default()), ["ana/forever"]);
    assert!(catalog.expire().unwrap().ids.is_empty());
    clock.set(NOW);
    assert!(catalog.expire().unwrap().ids.is_empty() && is_there("ana/a"));
    clock.set(NOW + 61 * SECOND);
    assert!(catalog.expire().unwrap().ids.is_empty());
    let ended = catalog.expire().unwrap();
    assert_eq!((ended.ids, ended.unreferenced.len()), (vec![id], 1));
    // Once it has ended, no clock brings it back.
    clock.set(NOW);
    assert!(!is_there("ana/a") && is_there("ana/forever"));
    let last = catalog.events(&ana, 0, 100).events.pop().unwrap();
    assert_eq!((last.kind, last.principal), (EventKind::Expired, None));
}

#[test]
fn a_clock_that_went_back_prolongs_no_life_beyond_its_ttl() {
    let (catalog, clock) = catalog();
    let ana = who("ana");
    clock.set(NOW + 10 * 365 * 86_400 * SECOND);
    let mut new = NewCube::new(name("ana/a"), text("a"));
    new.changes.ttl_s = Some(Some(60));
    catalog.create(&ana, new, Durability::Synced).unwrap();
    clock.set(NOW);
    catalog.expire().unwrap();
    assert!(catalog.get(&ana, &name("ana/a").into()).is_ok());
    clock.set(NOW + 60 * SECOND);
    assert!(catalog.get(&ana, &name("ana/a").into()).is_err());
}

#[test]
fn the_name_of_an_expired_cube_is_free() {
    let (catalog, clock) = catalog();
    let mut new = NewCube::new(name("ana/a"), text("a"));
    new.changes.ttl_s = Some(Some(1));
    let old = catalog.create(&who("ana"), new, Durability::Synced).unwrap().cube.id;
    assert!(matches!(make(&catalog, "ana", "ana/a"), Err(Error::Conflict(_))));
    clock.set(NOW + SECOND);
    assert_ne!(make(&catalog, "ana", "ana/a").unwrap(), old);
    catalog.read().check_integrity();
}

#[test]
fn changes_change_what_they_name() {
    let (catalog, _) = catalog();
    let ana = who("ana");
    make(&catalog, "ana", "ana/a").unwrap();
    let changes = CubeChanges {
        semantic_type: Some(Some(SemanticType::Skill)),
        priority: Some(Priority::level(9).unwrap()),
        half_life_s: Some(Some(5)),
        ttl_s: Some(Some(100)),
        erase_on_free: Some(true),
        ..CubeChanges::default()
    };
    catalog.change(&ana, &name("ana/a"), changes).unwrap();
    let changes = CubeChanges { ttl_s: Some(None), semantic_type: Some(None), ..CubeChanges::default() };
    let cube = catalog.change(&ana, &name("ana/a"), changes).unwrap().cube;
    assert_eq!((cube.semantic_type, cube.governance.ttl_s, cube.governance.expires_at), (None, None, None));
    assert_eq!((cube.governance.half_life_s, cube.governance.erase_on_free), (Some(5), true));
    assert_eq!(cube.governance.priority, Priority::level(9).unwrap());
    assert_eq!(catalog.unpin(&ana, &name("ana/a")).unwrap().cube.governance.priority, Priority::level(9).unwrap());
    assert_eq!(catalog.pin(&ana, &name("ana/a")).unwrap().cube.governance.priority, Priority::Pinned);
    assert_eq!(catalog.unpin(&ana, &name("ana/a")).unwrap().cube.governance.priority, Priority::default());
    let renamed = catalog.rename(&ana, &name("ana/a"), name("ana/b")).unwrap();
    assert_eq!(renamed.cube.name.as_str(), "ana/b");
    assert!(catalog.get(&ana, &name("ana/a").into()).is_err());
    make(&catalog, "ana", "ana/a").unwrap();
    assert!(matches!(catalog.rename(&ana, &name("ana/a"), name("ana/b")), Err(Error::Conflict(_))));
    let kinds: Vec<EventKind> = catalog.events(&ana, 0, 100).events.iter().map(|event| event.kind).collect();
    use EventKind::{Changed, Created, Pinned, Renamed, Unpinned};
    assert_eq!(kinds, [Created, Changed, Changed, Unpinned, Pinned, Unpinned, Renamed, Created]);
}

#[test]
fn everything_has_a_bound() {
    let limits = CatalogLimits {
        max_cubes: 2,
        max_versions: 2,
        max_text_bytes: 10,
        max_tokens: 4,
        max_payload_bytes: 60,
        max_tombstones: 1,
        ..CatalogLimits::default()
    };
    let catalog = Catalog::in_memory(TestClock::at(NOW), limits);
    let ana = who("ana");
    let add = |cube: &str, payload| catalog.create(&ana, NewCube::new(name(cube), payload), Durability::Synced);
    assert!(matches!(add("ana/a", text("eleven byte")), Err(Error::Invalid(_))));
    assert!(matches!(add("ana/a", samples::activation_payload("a", &[1; 5])), Err(Error::Invalid(_))));
    add("ana/a", text("ten bytes!")).unwrap();
    let second = catalog.append(&ana, &name("ana/a"), Version::FIRST, text("b")).unwrap().newest;
    assert!(matches!(catalog.append(&ana, &name("ana/a"), Version::FIRST, text("c")), Err(Error::Conflict(_))));
    assert!(matches!(catalog.append(&ana, &name("ana/a"), second, text("c")), Err(Error::Exhausted(_))));
    assert!(add("ana/b", samples::activation_payload("a", &[1; 4])).is_ok());
    assert!(matches!(add("ana/c", text("c")), Err(Error::Exhausted(_))));
    catalog.delete(&ana, &name("ana/a")).unwrap();
    assert!(
        matches!(add("ana/c", samples::activation_payload("a", &[1; 4])), Err(Error::Exhausted(_))),
        "60 bytes are full"
    );
    catalog.delete(&ana, &name("ana/b")).unwrap();
    assert_eq!(catalog.read().tombstones.len(), 1);
    let parents = vec![samples::id(9); 65];
    let new = NewCube { parents, ..NewCube::new(name("ana/c"), text("c")) };
    assert!(matches!(catalog.create(&ana, new, Durability::Synced), Err(Error::Invalid(_))));
}

#[test]
fn lineage_goes_both_ways_and_stops_at_what_is_hidden() {
    let (catalog, _) = catalog();
    let ana = who("ana");
    let child = |cube: &str, parents: Vec<CubeId>| {
        let new = NewCube { parents, ..NewCube::new(name(cube), text("x")) };
        catalog.create(&ana, new, Durability::Synced).unwrap().cube.id
    };
    let top = child("ana/top", vec![]);
    let middle = child("ana/middle", vec![top]);
    let bottom = child("ana/bottom", vec![middle, top]);
    let ids = |relatives: &[super::lineage::Relative]| relatives.iter().map(|relative| relative.id).collect::<Vec<_>>();
    let lineage = catalog.lineage(&ana, &name("ana/bottom")).unwrap();
    assert_eq!((ids(&lineage.ancestors), ids(&lineage.descendants)), (vec![middle, top], vec![]));
    let lineage = catalog.lineage(&ana, &name("ana/top")).unwrap();
    assert_eq!((ids(&lineage.ancestors), ids(&lineage.descendants)), (vec![], vec![middle, bottom]));
    for cube in ["ana/top", "ana/bottom"] {
        give(&catalog, cube, acl(Visibility::Public, &[], &[], &[]));
    }
    let lineage = catalog.lineage(&who("bert"), &name("ana/bottom")).unwrap();
    assert_eq!(ids(&lineage.ancestors), [top]);
}

/// A block that several cubes name is held on to as the one says that does so hardest, whatever happens to the others.
#[test]
fn blocks_have_the_priority_of_the_hardest_holder() {
    let (catalog, _) = catalog();
    let (ana, tokens) = (who("ana"), (0..16).collect::<Vec<u32>>());
    let make = |cube: &str| {
        let new = NewCube::new(name(cube), samples::activation_payload("text", &tokens));
        catalog.create(&ana, new, Durability::Synced).unwrap().cube
    };
    let (first, _) = (make("ana/a"), make("ana/b"));
    let [block] = catalog.blocks_of(first.id)[..] else { panic!("one block of sixteen tokens") };
    let level = |level: u8| Some(Priority::level(level).unwrap());
    let change = |cube: &str, priority: Option<Priority>| {
        let changes = CubeChanges { priority, ..CubeChanges::default() };
        catalog.change(&ana, &name(cube), changes).unwrap();
        catalog.read().check_integrity();
        catalog.priority_of(&block)
    };
    assert_eq!(catalog.priority_of(&block), level(5));
    assert_eq!(change("ana/a", level(2)), level(5));
    assert_eq!(change("ana/b", level(1)), level(2));
    assert_eq!(change("ana/b", Some(Priority::Pinned)), Some(Priority::Pinned));
    assert_eq!(change("ana/b", level(3)), level(3));
    // All versions of a cube count, and a frozen one is pinned.
    let more = samples::activation_payload("other", &[7]);
    catalog.append(&ana, &name("ana/b"), Version::FIRST, more).unwrap();
    assert_eq!(change("ana/b", level(9)), level(9));
    catalog.freeze(&ana, &name("ana/a")).unwrap();
    assert_eq!(catalog.priority_of(&block), Some(Priority::Pinned));
    catalog.unfreeze(&ana, &name("ana/a")).unwrap();
    catalog.delete(&ana, &name("ana/b")).unwrap();
    assert_eq!(catalog.priority_of(&block), level(2));
    catalog.delete(&ana, &name("ana/a")).unwrap();
    assert_eq!(catalog.priority_of(&block), None);
    catalog.read().check_integrity();
}

#[test]
fn use_makes_a_cube_active_until_its_blocks_leave() {
    let (catalog, _) = catalog();
    let id = make(&catalog, "ana", "ana/a").unwrap();
    let state = || catalog.get(&who("ana"), &name("ana/a").into()).unwrap().state;
    assert_eq!(state(), State::Generated);
    catalog.note_use(id);
    catalog.note_use(id);
    assert_eq!(state(), State::Activated);
    catalog.note_evicted(id);
    assert_eq!(state(), State::Archived);
    let view = catalog.get(&who("ana"), &name("ana/a").into()).unwrap();
    assert_eq!((view.usage.num_hits, view.heat), (2, 2.0));
    catalog.note_use(samples::id(5));
    assert_eq!(catalog.events(&who("ana"), 0, 100).events.len(), 3);
}
