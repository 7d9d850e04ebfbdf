//! Snapshots: which versions the cubes of a namespace, or one cube, had at a moment. They name versions, which are
//! immutable, and hold nothing themselves: a cube that is deleted is gone from every snapshot, too.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::acl::{Access, Principal};
use super::catalog::Catalog;
use super::cube::{Cube, CubeId};
use super::event::EventKind;
use super::index::{Entry, Index};
use super::name::{CubeName, Version};
use super::payload::Payload;
use super::timestamp::Timestamp;
use crate::{Error, Result};

/// A snapshot's identity, from the same numbers as those of cubes.
pub type SnapshotId = CubeId;

/// What a snapshot is of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum SnapshotScope {
    /// All cubes of a namespace that its maker could read.
    Namespace(String),
    /// One cube.
    Cube(CubeName),
}

/// Versions of cubes at a moment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Snapshot {
    /// Its identity.
    pub id: SnapshotId,
    /// What it is of.
    pub scope: SnapshotScope,
    /// Who made it; nobody else sees it.
    pub owner: Principal,
    /// When.
    pub created_at: Timestamp,
    /// In order of name.
    pub cubes: Vec<SnapshotCube>,
}

/// A cube in a snapshot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotCube {
    /// The cube's identity.
    pub id: CubeId,
    /// What it was called.
    pub name: CubeName,
    /// Its newest version then.
    pub version: Version,
}

/// A cube then and now.
#[derive(Debug, Clone, PartialEq)]
pub struct Difference {
    /// What it is called now or, when it is gone, what it was called.
    pub name: CubeName,
    /// Its newest version then.
    pub then: Option<Version>,
    /// Its newest version now.
    pub now: Option<Version>,
    /// What became of it.
    pub kind: DifferenceKind,
}

/// What became of a cube since a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DifferenceKind {
    /// It holds what it held.
    Same,
    /// It holds something else.
    Changed,
    /// It is made anew since.
    Added,
    /// It is deleted, or may not be read any more.
    Gone,
}

/// What restoring a snapshot did to a cube.
#[derive(Debug, Clone)]
pub struct Restoration {
    /// The cube as the snapshot has it.
    pub cube: SnapshotCube,
    /// Its newest version now.
    pub version: Option<Version>,
    /// What was done.
    pub outcome: RestoreOutcome,
}

/// What became of a cube that was to be restored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RestoreOutcome {
    /// A new version holds what the snapshot has.
    Restored,
    /// The newest version did already.
    Same,
    /// It is deleted, or may not be read any more.
    Gone,
    /// It may not be changed, and why.
    Refused(String),
}

impl Catalog {
    /// Notes the newest versions of all that `principal` may read of `scope`; durable when this returns.
    pub fn snapshot(&self, principal: &Principal, scope: SnapshotScope) -> Result<Arc<Snapshot>> {
        let writer = self.begin()?;
        let now = self.now();
        let cubes: Vec<SnapshotCube> = {
            let index = self.read();
            if index.snapshots.len() >= self.limits.max_snapshots {
                let max = self.limits.max_snapshots;
                return Err(Error::Exhausted(format!("There are {max} snapshots, no more are kept; delete some.")));
            }
            scope.entries(&index, principal, now).map(|entry| SnapshotCube::of(&entry.head)).collect()
        };
        if cubes.is_empty() {
            return Err(Error::NotFound(format!("There is no cube in `{scope}`.")));
        }
        let snapshot = Snapshot { id: CubeId::generate(), scope, owner: principal.clone(), created_at: now, cubes };
        self.write_snapshot(writer, &snapshot)?;
        let snapshot = Arc::new(snapshot);
        self.write().snapshots.insert(snapshot.id, Arc::clone(&snapshot));
        Ok(snapshot)
    }

    /// The snapshots of `scope` that `principal` made, oldest first.
    pub fn snapshots(&self, principal: &Principal, scope: &SnapshotScope) -> Vec<Arc<Snapshot>> {
        let index = self.read();
        let own = index.snapshots.values().filter(|snapshot| snapshot.owner == *principal && snapshot.scope == *scope);
        own.cloned().collect()
    }

    /// What has changed since a snapshot, in order of name then.
    pub fn diff(&self, principal: &Principal, scope: &SnapshotScope, id: SnapshotId) -> Result<Vec<Difference>> {
        let (index, now) = (self.read(), self.now());
        let snapshot = find(&index, principal, scope, id)?;
        let mut differences: Vec<Difference> =
            snapshot.cubes.iter().map(|cube| difference(&index, principal, cube, now)).collect();
        let is_new = |entry: &&Entry| !snapshot.cubes.iter().any(|cube| cube.id == entry.head.id);
        let added = scope.entries(&index, principal, now).filter(is_new).map(|entry| Difference {
            name: entry.head.name.clone(),
            then: None,
            now: Some(entry.head.version),
            kind: DifferenceKind::Added,
        });
        differences.extend(added);
        Ok(differences)
    }

    /// Gives every cube of a snapshot a new version that holds what it held then. Cubes made since stay, deleted ones stay
    /// deleted, and names, access and lifetimes stay as they are. One cube after the other, each durable: after an error
    /// some are restored, and doing it again does the rest.
    pub fn restore(&self, principal: &Principal, scope: &SnapshotScope, id: SnapshotId) -> Result<Vec<Restoration>> {
        let snapshot = Arc::clone(find(&self.read(), principal, scope, id)?);
        snapshot.cubes.iter().map(|cube| self.restore_cube(principal, cube)).collect()
    }

    fn restore_cube(&self, principal: &Principal, cube: &SnapshotCube) -> Result<Restoration> {
        let ended = |version, outcome| Ok(Restoration { cube: cube.clone(), version, outcome });
        let found = {
            let (index, now) = (self.read(), self.now());
            let entry = index.cubes.get(&cube.id).filter(|entry| entry.is_visible(principal, now));
            entry.and_then(|entry| Some((Arc::clone(&entry.head), payload_of(entry, cube.version)?)))
        };
        let Some((head, payload)) = found else { return ended(None, RestoreOutcome::Gone) };
        if head.payload == payload {
            return ended(Some(head.version), RestoreOutcome::Same);
        }
        self.check_bytes(&payload)?;
        let edit = |cube: &mut Cube, _| {
            self.advance(cube)?;
            cube.payload = payload;
            Ok(())
        };
        match self.edit(principal, &head.name, Access::Write, EventKind::Restored, edit) {
            Ok(view) => ended(Some(view.newest), RestoreOutcome::Restored),
            Err(Error::Denied(why) | Error::Conflict(why)) => ended(Some(head.version), RestoreOutcome::Refused(why)),
            Err(Error::NotFound(_)) => ended(None, RestoreOutcome::Gone),
            Err(error) => Err(error),
        }
    }

    /// Forgets a snapshot; the cubes stay as they are.
    pub fn delete_snapshot(&self, principal: &Principal, scope: &SnapshotScope, id: SnapshotId) -> Result<()> {
        let writer = self.begin()?;
        find(&self.read(), principal, scope, id)?;
        self.remove_snapshot(writer, id)?;
        self.write().snapshots.remove(&id);
        Ok(())
    }
}

fn find<'a>(
    index: &'a Index,
    principal: &Principal,
    scope: &SnapshotScope,
    id: SnapshotId,
) -> Result<&'a Arc<Snapshot>> {
    let found = index.snapshots.get(&id).filter(|found| found.owner == *principal && found.scope == *scope);
    found.ok_or_else(|| Error::NotFound(format!("There is no snapshot {id} of `{scope}`.")))
}

fn payload_of(entry: &Entry, version: Version) -> Option<Arc<Payload>> {
    entry.versions().find(|cube| cube.version == version).map(|cube| Arc::clone(&cube.payload))
}

fn difference(index: &Index, principal: &Principal, cube: &SnapshotCube, now: Timestamp) -> Difference {
    let entry = index.cubes.get(&cube.id).filter(|entry| entry.is_visible(principal, now));
    let Some(entry) = entry else {
        return Difference { name: cube.name.clone(), then: Some(cube.version), now: None, kind: DifferenceKind::Gone };
    };
    let is_same = payload_of(entry, cube.version).is_some_and(|payload| payload == entry.head.payload);
    Difference {
        name: entry.head.name.clone(),
        then: Some(cube.version),
        now: Some(entry.head.version),
        kind: if is_same { DifferenceKind::Same } else { DifferenceKind::Changed },
    }
}

impl SnapshotCube {
    fn of(cube: &Cube) -> Self {
        Self { id: cube.id, name: cube.name.clone(), version: cube.version }
    }
}

impl SnapshotScope {
    /// What `principal` may read of it, in order of name.
    fn entries<'a>(&self, index: &'a Index, principal: &Principal, now: Timestamp) -> impl Iterator<Item = &'a Entry> {
        let (namespace, only) = match self {
            Self::Namespace(namespace) => (namespace.as_str(), None),
            Self::Cube(name) => (name.namespace(), Some(name)),
        };
        let named: Vec<&Entry> = index.named_from(Some(namespace), None).collect();
        let is_wanted =
            |entry: &&Entry| only.is_none_or(|only| entry.head.name == *only) && entry.is_visible(principal, now);
        named.into_iter().filter(is_wanted).collect::<Vec<_>>().into_iter()
    }
}

impl fmt::Display for SnapshotScope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Namespace(namespace) => f.write_str(namespace),
            Self::Cube(name) => name.fmt(f),
        }
    }
}

impl FromStr for SnapshotScope {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if text.contains('/') {
            return text.parse().map(Self::Cube);
        }
        // What could stand before a slash.
        format!("{text}/a").parse::<CubeName>().map(|name| Self::Namespace(name.namespace().to_owned()))
    }
}

impl From<SnapshotScope> for String {
    fn from(scope: SnapshotScope) -> Self {
        scope.to_string()
    }
}

impl TryFrom<String> for SnapshotScope {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::super::acl::{Acl, AclLists, Visibility};
    use super::super::catalog::CatalogLimits;
    use super::super::changes::{CubeChanges, NewCube};
    use super::super::crash_tests::TestClock;
    use super::super::folder::Durability;
    use super::super::payload::Twin;
    use super::*;
    use crate::paging::SystemFiles;

    fn who(name: &str) -> Principal {
        name.parse().unwrap()
    }

    fn name(text: &str) -> CubeName {
        text.parse().unwrap()
    }

    fn text(text: &str) -> Payload {
        Payload::Plaintext(Twin::Text(text.to_owned()))
    }

    fn make(catalog: &Catalog, cube: &str, content: &str) {
        catalog.create(&who("ana"), NewCube::new(name(cube), text(content)), Durability::Synced).unwrap();
    }

    fn append(catalog: &Catalog, cube: &str, content: &str) {
        let newest = catalog.get(&who("ana"), &name(cube).into()).unwrap().newest;
        catalog.append(&who("ana"), &name(cube), newest, text(content)).unwrap();
    }

    fn content(catalog: &Catalog, cube: &str) -> (u32, String) {
        let view = catalog.get(&who("ana"), &name(cube).into()).unwrap();
        (view.newest.get(), view.cube.payload.twin().unwrap().text().unwrap().to_owned())
    }

    fn open(folder: &std::path::Path) -> Catalog {
        let files = Arc::new(SystemFiles);
        Catalog::open(files, folder.join("cubes"), TestClock::at(1_000_000), CatalogLimits::default()).unwrap()
    }

    #[test]
    fn a_namespace_goes_back_to_what_it_held() {
        let folder = tempfile::tempdir().unwrap();
        let catalog = open(folder.path());
        for cube in ["ana/a", "ana/b", "ana/c", "ana/d"] {
            make(&catalog, cube, "then");
        }
        let scope: SnapshotScope = "ana".parse().unwrap();
        let snapshot = catalog.snapshot(&who("ana"), scope.clone()).unwrap();
        append(&catalog, "ana/a", "now");
        catalog.rename(&who("ana"), &name("ana/a"), name("ana/z")).unwrap();
        append(&catalog, "ana/b", "now");
        catalog.freeze(&who("ana"), &name("ana/b")).unwrap();
        catalog.delete(&who("ana"), &name("ana/c")).unwrap();
        make(&catalog, "ana/new", "later");
        // All of it is there after a restart.
        drop(catalog);
        let catalog = open(folder.path());
        assert_eq!(catalog.snapshots(&who("ana"), &scope), [Arc::clone(&snapshot)]);
        let differences = catalog.diff(&who("ana"), &scope, snapshot.id).unwrap();
        let shown: Vec<_> = differences.iter().map(|each| (each.name.as_str(), each.kind)).collect();
        let (same, changed) = (DifferenceKind::Same, DifferenceKind::Changed);
        let (added, gone) = (DifferenceKind::Added, DifferenceKind::Gone);
        let wanted = [("ana/z", changed), ("ana/b", changed), ("ana/c", gone), ("ana/d", same), ("ana/new", added)];
        assert_eq!(shown, wanted);
        let restored = catalog.restore(&who("ana"), &scope, snapshot.id).unwrap();
        let outcomes: Vec<_> = restored.into_iter().map(|each| (each.cube.name.to_string(), each.outcome)).collect();
        assert!(
            matches!(&outcomes[..], [
            (_, RestoreOutcome::Restored),
            (b, RestoreOutcome::Refused(why)),
            (_, RestoreOutcome::Gone),
            (_, RestoreOutcome::Same)
        ] if b == "ana/b" && why.contains("frozen")),
            "{outcomes:?}"
        );
        assert_eq!(content(&catalog, "ana/z"), (3, "then".into()), "what was restored is a version like any other");
        assert_eq!(content(&catalog, "ana/b"), (2, "now".into()));
        assert_eq!(content(&catalog, "ana/new"), (1, "later".into()));
        assert!(catalog.get(&who("ana"), &name("ana/c").into()).is_err(), "what was deleted stays deleted");
        // Again, there is nothing left to do.
        let again = catalog.restore(&who("ana"), &scope, snapshot.id).unwrap();
        assert_eq!(again[0].outcome, RestoreOutcome::Same);
        catalog.delete_snapshot(&who("ana"), &scope, snapshot.id).unwrap();
        assert!(open(folder.path()).snapshots(&who("ana"), &scope).is_empty());
    }

    #[test]
    fn a_snapshot_is_its_makers_and_shows_what_one_may_read() {
        let limits = CatalogLimits { max_snapshots: 2, ..CatalogLimits::default() };
        let catalog = Catalog::in_memory(TestClock::at(1_000_000), limits);
        make(&catalog, "ana/a", "private");
        make(&catalog, "ana/b", "public");
        let public = Acl::try_from(AclLists { visibility: Visibility::Public, ..AclLists::default() }).unwrap();
        let changes = CubeChanges { acl: Some(public), ..CubeChanges::default() };
        catalog.change(&who("ana"), &name("ana/b"), changes).unwrap();
        let scope: SnapshotScope = "ana".parse().unwrap();
        let snapshot = catalog.snapshot(&who("bert"), scope.clone()).unwrap();
        assert_eq!(snapshot.cubes.iter().map(|cube| cube.name.as_str()).collect::<Vec<_>>(), ["ana/b"]);
        assert!(catalog.snapshots(&who("ana"), &scope).is_empty());
        assert!(matches!(catalog.diff(&who("ana"), &scope, snapshot.id), Err(Error::NotFound(_))));
        append(&catalog, "ana/b", "changed");
        let restored = catalog.restore(&who("bert"), &scope, snapshot.id).unwrap();
        assert!(matches!(restored[0].outcome, RestoreOutcome::Refused(_)), "{restored:?}");
        let of = |principal: &str, scope: &str| catalog.snapshot(&who(principal), scope.parse().unwrap());
        assert!(matches!(of("bert", "ana/a"), Err(Error::NotFound(_))));
        assert!(matches!(of("bert", "nobody"), Err(Error::NotFound(_))));
        assert_eq!(of("ana", "ana/a").unwrap().cubes.len(), 1);
        assert!(matches!(of("ana", "ana/a"), Err(Error::Exhausted(_))), "there is a bound");
    }

    #[test]
    fn a_scope_is_a_namespace_or_a_name() {
        assert_eq!("ana".parse::<SnapshotScope>().unwrap(), SnapshotScope::Namespace("ana".into()));
        assert_eq!("ana/a".parse::<SnapshotScope>().unwrap(), SnapshotScope::Cube(name("ana/a")));
        for wrong in ["", "Ana", "..", "a b", "ana/", "a/../b"] {
            assert!(wrong.parse::<SnapshotScope>().is_err(), "{wrong}");
        }
    }
}
