//! All cubes in memory: by id, by name, and which blocks they reference. Does no I/O; whoever changes it has made the
//! change durable before.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Bound;
use std::sync::Arc;

use super::acl::{Access, Principal};
use super::cube::{Cube, CubeId, Governance, Priority};
use super::event::EventLog;
use super::lifecycle::{State, Usage};
use super::manifest::Tombstone;
use super::name::{CubeAddress, CubeName, Version};
use super::payload::Payload;
use super::prefill::Gap;
use super::snapshot::{Snapshot, SnapshotId};
use super::timestamp::Timestamp;
use crate::kv::BlockHash;
use crate::{Error, Result};

/// A cube as it is seen now.
#[derive(Debug, Clone)]
pub struct CubeView {
    /// The header and payload of the version asked for; what governs the cube is that of its newest version.
    pub cube: Arc<Cube>,
    /// Where it is in its life.
    pub state: State,
    /// How much it was used.
    pub usage: Usage,
    /// Its heat now.
    pub heat: f64,
    /// Its newest version.
    pub newest: Version,
    /// What of its blocks was missing when somebody looked.
    pub gap: Option<Gap>,
}

/// A cube with all its versions.
pub(super) struct Entry {
    pub(super) head: Arc<Cube>,
    pub(super) older: BTreeMap<Version, Arc<Cube>>,
    pub(super) usage: Usage,
    pub(super) is_resident: bool,
    /// Made by this process.
    pub(super) is_new: bool,
    /// The last sweep found it past its lifetime.
    pub(super) seemed_expired: bool,
    /// What of its newest version was not on disk when somebody looked.
    pub(super) gap: Option<Gap>,
}

/// Everything that can be found.
pub(super) struct Index {
    pub(super) cubes: HashMap<CubeId, Entry>,
    names: BTreeMap<CubeName, CubeId>,
    pub(super) tombstones: BTreeMap<CubeId, Tombstone>,
    pub(super) snapshots: BTreeMap<SnapshotId, Arc<Snapshot>>,
    /// Deleted cubes some of whose manifests are still there.
    pub(super) leftovers: HashSet<CubeId>,
    /// Deleted cubes whose blocks are to be overwritten; their manifests stay until then.
    pub(super) unerased: BTreeMap<CubeId, Unerased>,
    references: HashMap<BlockHash, Holders>,
    pub(super) num_payload_bytes: usize,
    /// Versions that are adapters.
    pub(super) num_parameters: usize,
    pub(super) events: EventLog,
}

/// What is left of a cube until its blocks are overwritten.
#[derive(Debug, Default)]
pub(super) struct Unerased {
    pub(super) versions: Vec<Version>,
    pub(super) blocks: Vec<BlockHash>,
}

/// How many versions name a block, by how hard their cubes hold on to theirs: levels 0 to 9, then pinned.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Holders([u32; 11]);

impl Holders {
    fn rank(governance: &Governance) -> usize {
        match governance.hold() {
            Priority::Pinned => 10,
            Priority::Level(level) => usize::from(level.get()),
        }
    }

    /// As the one holds it that holds it hardest; `None` when nobody does.
    fn priority(&self) -> Option<Priority> {
        let rank = self.0.iter().rposition(|count| *count > 0)?;
        Some(Priority::level(rank as u8).unwrap_or(Priority::Pinned))
    }
}

impl Entry {
    pub(super) fn new(head: Arc<Cube>, is_new: bool) -> Self {
        let older = BTreeMap::new();
        Self { head, older, usage: Usage::default(), is_resident: false, is_new, seemed_expired: false, gap: None }
    }

    fn state(&self, now: Timestamp) -> State {
        if self.head.governance.frozen {
            State::Frozen
        } else if self.head.has_expired(now) {
            State::Expired
        } else if self.is_resident {
            State::Activated
        } else if self.is_new && self.usage.num_hits == 0 {
            State::Generated
        } else {
            State::Archived
        }
    }

    pub(super) fn versions(&self) -> impl Iterator<Item = &Arc<Cube>> {
        self.older.values().chain([&self.head])
    }

    pub(super) fn view(&self, now: Timestamp) -> CubeView {
        CubeView {
            cube: Arc::clone(&self.head),
            state: self.state(now),
            usage: self.usage,
            heat: self.usage.heat(now, self.head.governance.half_life_s),
            newest: self.head.version,
            gap: self.gap.clone(),
        }
    }

    /// One version, under what governs the cube now.
    fn view_of(&self, version: Version, now: Timestamp) -> Option<CubeView> {
        let view = self.view(now);
        if version == self.head.version {
            return Some(view);
        }
        let older = self.older.get(&version)?;
        let mut cube = Cube::clone(&self.head);
        (cube.version, cube.payload) = (version, Arc::clone(&older.payload));
        Some(CubeView { cube: Arc::new(cube), gap: None, ..view })
    }
}

impl Index {
    pub(super) fn new(events: EventLog) -> Self {
        Self {
            cubes: HashMap::new(),
            names: BTreeMap::new(),
            tombstones: BTreeMap::new(),
            snapshots: BTreeMap::new(),
            leftovers: HashSet::new(),
            unerased: BTreeMap::new(),
            references: HashMap::new(),
            num_payload_bytes: 0,
            num_parameters: 0,
            events,
        }
    }

    /// The cube of that name, whoever may see it.
    pub(super) fn named(&self, name: &CubeName) -> Option<&Entry> {
        self.names.get(name).and_then(|id| self.cubes.get(id))
    }

    /// The cube of that name if `principal` may see it. What one may not see does not exist.
    pub(super) fn visible(&self, principal: &Principal, name: &CubeName, now: Timestamp) -> Result<&Entry> {
        let entry = self.named(name).filter(|entry| entry.is_visible(principal, now));
        entry.ok_or_else(|| not_found(&CubeAddress::from(name.clone())))
    }

    /// The cube of that name if `principal` may have `access`.
    pub(super) fn accessible(
        &self,
        principal: &Principal,
        name: &CubeName,
        access: Access,
        now: Timestamp,
    ) -> Result<&Entry> {
        let entry = self.visible(principal, name, now)?;
        if entry.head.allows(principal, access) { Ok(entry) } else { Err(denied(name, access)) }
    }

    /// One version of a cube that `principal` may see.
    pub(super) fn view(&self, principal: &Principal, address: &CubeAddress, now: Timestamp) -> Result<CubeView> {
        let entry = self.visible(principal, &address.name, now).map_err(|_| not_found(address))?;
        let view = match address.version {
            None => Some(entry.view(now)),
            Some(version) => entry.view_of(version, now),
        };
        view.ok_or_else(|| not_found(address))
    }

    /// Whose namespace this is: its cubes all have one owner.
    pub(super) fn namespace_owner(&self, namespace: &str) -> Option<&Principal> {
        let first = self.named_from(Some(namespace), None).next()?;
        Some(&first.head.governance.owner)
    }

    /// Cubes in order of name, of one namespace or of all, behind `after`.
    pub(super) fn named_from<'a, 'n>(
        &'a self,
        namespace: Option<&'n str>,
        after: Option<&CubeName>,
    ) -> impl Iterator<Item = &'a Entry> + use<'a, 'n> {
        let start = namespace.map_or_else(String::new, |namespace| format!("{namespace}/"));
        let from = match after.map(CubeName::as_str).filter(|after| *after >= start.as_str()) {
            Some(after) => Bound::Excluded(after),
            None => Bound::Included(start.as_str()),
        };
        let names = self.names.range::<str, _>((from, Bound::Unbounded));
        let names = names.take_while(move |(name, _)| namespace.is_none_or(|wanted| name.namespace() == wanted));
        names.filter_map(|(_, id)| self.cubes.get(id))
    }

    /// Adds a cube, a version, or what governs a cube now.
    pub(super) fn put(&mut self, cube: Arc<Cube>, is_new: bool) {
        let previous = self.cubes.get(&cube.id).map(|entry| Arc::clone(&entry.head));
        if let Some(previous) = previous.as_ref().map(|previous| Holders::rank(&previous.governance)) {
            self.move_holders(cube.id, previous, Holders::rank(&cube.governance));
        }
        if previous.as_ref().is_none_or(|previous| previous.version != cube.version) {
            self.reference(&cube);
        }
        if let Some(previous) = &previous {
            self.names.remove(&previous.name);
        }
        self.names.insert(cube.name.clone(), cube.id);
        let entry = self.cubes.entry(cube.id).or_insert_with(|| Entry::new(Arc::clone(&cube), is_new));
        if let Some(previous) = previous.filter(|previous| previous.version < cube.version) {
            entry.older.insert(previous.version, previous);
        }
        if entry.head.version != cube.version {
            entry.gap = None;
        }
        entry.head = cube;
    }

    /// Puts a tombstone where a cube was. Returns the blocks that no cube references any more.
    pub(super) fn bury(&mut self, tombstone: Tombstone) -> Vec<BlockHash> {
        let mut freed = Vec::new();
        if let Some(entry) = self.cubes.remove(&tombstone.id) {
            self.names.remove(&entry.head.name);
            let rank = Holders::rank(&entry.head.governance);
            entry.versions().for_each(|cube| self.release(&cube.payload, rank, &mut freed));
        }
        self.tombstones.insert(tombstone.id, tombstone);
        freed
    }

    /// Counts the blocks and bytes of a version.
    pub(super) fn reference(&mut self, cube: &Cube) {
        self.num_payload_bytes += cube.payload.num_index_bytes();
        self.num_parameters += usize::from(cube.payload.parameter().is_some());
        for hash in cube.payload.blocks() {
            self.references.entry(*hash).or_default().0[Holders::rank(&cube.governance)] += 1;
        }
    }

    /// All versions of a cube are held on to as hard as its newest one says.
    fn move_holders(&mut self, id: CubeId, before: usize, after: usize) {
        let Some(entry) = self.cubes.get(&id).filter(|_| before != after) else { return };
        for hash in entry.versions().flat_map(|cube| cube.payload.blocks()) {
            let Holders(counts) = self.references.get_mut(hash).expect("a cube's blocks are counted");
            counts[before] -= 1;
            counts[after] += 1;
        }
    }

    fn release(&mut self, payload: &Payload, rank: usize, freed: &mut Vec<BlockHash>) {
        self.num_payload_bytes -= payload.num_index_bytes();
        self.num_parameters -= usize::from(payload.parameter().is_some());
        for hash in payload.blocks() {
            let holders = self.references.get_mut(hash).expect("a cube's blocks are counted");
            holders.0[rank] -= 1;
            if *holders == Holders::default() {
                self.references.remove(hash);
                freed.push(*hash);
            }
        }
    }

    pub(super) fn is_referenced(&self, hash: &BlockHash) -> bool {
        self.references.contains_key(hash)
    }

    pub(super) fn block_references(&self) -> Vec<BlockHash> {
        self.references.keys().copied().collect()
    }

    /// How hard a block is held on to, by the cube that does so hardest.
    pub(super) fn priority_of(&self, hash: &BlockHash) -> Option<Priority> {
        self.references.get(hash)?.priority()
    }

    /// Panics where the parts disagree. For tests.
    #[cfg(test)]
    pub(super) fn check_integrity(&self) {
        assert_eq!(self.names.len(), self.cubes.len());
        let mut counts: HashMap<BlockHash, Holders> = HashMap::new();
        for (id, entry) in &self.cubes {
            assert_eq!(self.names.get(&entry.head.name), Some(id));
            assert!(!self.tombstones.contains_key(id), "{id} is alive and dead");
            assert!(entry.older.keys().all(|version| *version < entry.head.version));
            let rank = Holders::rank(&entry.head.governance);
            let blocks = entry.versions().flat_map(|cube| cube.payload.blocks());
            blocks.for_each(|hash| counts.entry(*hash).or_default().0[rank] += 1);
        }
        assert_eq!(counts, self.references);
        let versions = self.cubes.values().flat_map(Entry::versions);
        assert!(versions.filter(|cube| cube.payload.parameter().is_some()).count() <= self.num_parameters);
    }
}

impl Entry {
    pub(super) fn is_visible(&self, principal: &Principal, now: Timestamp) -> bool {
        self.head.allows(principal, Access::Read) && !self.head.has_expired(now)
    }
}

fn not_found(address: &CubeAddress) -> Error {
    Error::NotFound(format!("There is no cube `{address}`."))
}

pub(super) fn denied(name: &CubeName, access: Access) -> Error {
    let wanted = match access {
        Access::Read => "read it",
        Access::Write => "change it",
        Access::Share => "change who may use it",
        Access::Own => "rename or delete it",
    };
    Error::Denied(format!("You may not {wanted}: cube `{name}` grants you less; ask its owner."))
}
