//! All cubes of a vault: found, listed and followed here, changed in `changes.rs`.
//!
//! The manifests and tombstones in the folder are the truth; everything in memory is rebuilt from them at start. Every
//! method that names a cube takes the principal who asks. What one may not read is told apart from what does not exist
//! by nothing.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::acl::{Access, Principal};
use super::cube::{Cube, CubeId, Priority};
use super::event::{EventKind, EventLog, EventPage};
use super::folder::{Contents, Damaged, ManifestFolder};
use super::index::{CubeView, Entry, Index};
use super::lifecycle::State;
use super::manifest::{FileName, Tombstone};
use super::name::{CubeAddress, CubeName, Version};
use super::payload::Kind;
use super::timestamp::{Clock, Timestamp};
use crate::kv::BlockHash;
use crate::paging::Files;
use crate::{Error, Result};

/// How much a catalog holds.
#[derive(Debug, Clone, Copy)]
pub struct CatalogLimits {
    /// Cubes, of all principals together.
    pub max_cubes: usize,
    /// Versions of one cube.
    pub max_versions: usize,
    /// Bytes of text or messages of one version.
    pub max_text_bytes: usize,
    /// Tokens of one version.
    pub max_tokens: usize,
    /// Bytes of all payloads, which are kept in memory: texts, token ids and block names.
    pub max_payload_bytes: usize,
    /// Tombstones; the oldest ones go first.
    pub max_tombstones: usize,
    /// Snapshots, of all principals together.
    pub max_snapshots: usize,
    /// Events kept in memory.
    pub max_events: usize,
    /// Cubes or events in one answer.
    pub max_page: usize,
}

/// All cubes of a vault.
pub struct Catalog {
    /// `None` keeps everything in memory only.
    pub(super) folder: Option<ManifestFolder>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) limits: CatalogLimits,
    /// Held through a change, I/O included; readers never wait for it.
    pub(super) writer: Mutex<Writer>,
    index: RwLock<Index>,
    damaged: Vec<Damaged>,
}

/// Whoever holds it changes the folder.
#[derive(Debug, Default)]
pub(super) struct Writer {
    /// A change failed halfway: what is on disk may be newer than what is in memory.
    pub(super) is_uncertain: bool,
}

/// Which cubes are wanted; what is left out is not asked for.
#[derive(Debug, Clone, Default)]
pub struct CubeFilter {
    /// Of this namespace.
    pub namespace: Option<String>,
    /// Of this kind.
    pub kind: Option<Kind>,
    /// In this state.
    pub state: Option<State>,
    /// With this tag.
    pub tag: Option<String>,
    /// With this in name, tags or text, in upper or lower case.
    pub query: Option<String>,
    /// Behind this name.
    pub after: Option<CubeName>,
    /// At most this many.
    pub limit: usize,
}

/// A stretch of the list, in order of name.
#[derive(Debug, Clone)]
pub struct CubePage {
    /// The cubes.
    pub cubes: Vec<CubeView>,
    /// Where the next page begins; `None` on the last.
    pub next_after: Option<CubeName>,
}

impl Default for CatalogLimits {
    fn default() -> Self {
        Self {
            max_cubes: 100_000,
            max_versions: 256,
            max_text_bytes: 4 << 20,
            max_tokens: 1 << 18,
            max_payload_bytes: 2 << 30,
            max_tombstones: 100_000,
            max_snapshots: 1000,
            max_events: 4096,
            max_page: 1000,
        }
    }
}

impl Catalog {
    /// The catalog of the manifests in `folder`, which is made if it is missing. Damaged files are left out and reported
    /// by [`Catalog::damaged`]; an error means that the folder itself cannot be used.
    pub fn open(files: Arc<dyn Files>, folder: PathBuf, clock: Arc<dyn Clock>, limits: CatalogLimits) -> Result<Self> {
        let folder = ManifestFolder::open(files, folder)?;
        let mut contents = folder.read_all()?;
        let mut index = Index::new(EventLog::new(limits.max_events, clock.now()));
        let dead = bury_all(&mut index, &mut contents);
        clear_leftovers(&folder, &mut index, &contents.manifests, &dead)?;
        contents.manifests.retain(|cube| !dead.contains(&cube.id));
        let snapshots = std::mem::take(&mut contents.snapshots);
        index.snapshots = snapshots.into_iter().map(|snapshot| (snapshot.id, Arc::new(snapshot))).collect();
        let damaged = admit_all(&mut index, contents);
        for Damaged { path, error, .. } in &damaged {
            tracing::warn!(path = %path.display(), %error, "a file of the vault is damaged and left out");
        }
        Ok(Self { folder: Some(folder), clock, limits, writer: Mutex::default(), index: RwLock::new(index), damaged })
    }

    /// A catalog without a folder: it ends with the process.
    pub fn in_memory(clock: Arc<dyn Clock>, limits: CatalogLimits) -> Self {
        let index = RwLock::new(Index::new(EventLog::new(limits.max_events, clock.now())));
        Self { folder: None, clock, limits, writer: Mutex::default(), index, damaged: Vec::new() }
    }

    /// Whether what is acknowledged outlives the process.
    pub fn is_durable(&self) -> bool {
        self.folder.is_some()
    }

    /// Files that were left out at start.
    pub fn damaged(&self) -> &[Damaged] {
        &self.damaged
    }

    /// One cube or one version of it; [`Error::NotFound`] also for what `principal` may not read.
    pub fn get(&self, principal: &Principal, address: &CubeAddress) -> Result<CubeView> {
        self.read().view(principal, address, self.clock.now())
    }

    /// The cubes that `principal` may read.
    pub fn list(&self, principal: &Principal, filter: &CubeFilter) -> CubePage {
        let limit = filter.limit.clamp(1, self.limits.max_page);
        let mut cubes = match filter.query.as_ref().map(|query| query.to_lowercase()) {
            None => self.candidates(principal, filter, limit + 1),
            Some(query) => {
                // Texts are searched when the index is free again.
                let all = self.candidates(principal, filter, usize::MAX);
                all.into_iter().filter(|view| mentions(&view.cube, &query)).take(limit + 1).collect()
            }
        };
        let has_more = cubes.len() > limit;
        cubes.truncate(limit);
        let next_after = cubes.last().filter(|_| has_more).map(|view| view.cube.name.clone());
        CubePage { cubes, next_after }
    }

    /// At most `limit` cubes that pass all of the filter but its query.
    fn candidates(&self, principal: &Principal, filter: &CubeFilter, limit: usize) -> Vec<CubeView> {
        let (index, now) = (self.read(), self.clock.now());
        let visible = index
            .named_from(filter.namespace.as_deref(), filter.after.as_ref())
            .filter(|entry| entry.is_visible(principal, now));
        visible.map(|entry| entry.view(now)).filter(|view| filter.accepts(view)).take(limit).collect()
    }

    /// What happened behind event `since`, to cubes that `principal` may read.
    pub fn events(&self, principal: &Principal, since: u64, limit: usize) -> EventPage {
        self.read().events.since(principal, since, limit.clamp(1, self.limits.max_page))
    }

    /// Every block that a cube references, those of damaged cubes too: what must not be freed.
    pub fn block_references(&self) -> Vec<BlockHash> {
        self.read().block_references()
    }

    /// Whether a cube references this block.
    pub fn is_referenced(&self, hash: &BlockHash) -> bool {
        self.read().is_referenced(hash)
    }

    /// How hard a block is held on to, by the cube that does so hardest; `None` when no cube references it.
    pub fn priority_of(&self, hash: &BlockHash) -> Option<Priority> {
        self.read().priority_of(hash)
    }

    /// Every block of all versions of a cube.
    pub fn blocks_of(&self, id: CubeId) -> Vec<BlockHash> {
        let index = self.read();
        let versions = index.cubes.get(&id).into_iter().flat_map(Entry::versions);
        versions.flat_map(|cube| cube.payload.blocks()).copied().collect()
    }

    /// Cubes there are, of all principals.
    pub fn num_cubes(&self) -> usize {
        self.read().cubes.len()
    }

    /// Whether there is a cube that is an adapter, of whomever: who looks for one may have to read files.
    pub fn has_parameters(&self) -> bool {
        self.read().num_parameters > 0
    }

    /// Notes that a request used a cube, whose blocks are in memory now.
    pub fn note_use(&self, id: CubeId) {
        let (mut index, now) = (self.write(), self.clock.now());
        let Some(entry) = index.cubes.get_mut(&id) else { return };
        entry.usage.note(now, entry.head.governance.half_life_s);
        let was_resident = std::mem::replace(&mut entry.is_resident, true);
        let head = Arc::clone(&entry.head);
        if !was_resident {
            index.events.push(EventKind::Activated, now, None, head);
        }
    }

    /// Notes that a cube's blocks have left memory.
    pub fn note_evicted(&self, id: CubeId) {
        let (mut index, now) = (self.write(), self.clock.now());
        let Some(entry) = index.cubes.get_mut(&id) else { return };
        let was_resident = std::mem::replace(&mut entry.is_resident, false);
        let head = Arc::clone(&entry.head);
        if was_resident {
            index.events.push(EventKind::Archived, now, None, head);
        }
    }

    pub(super) fn read(&self) -> RwLockReadGuard<'_, Index> {
        self.index.read().expect("no thread panics while it changes the index")
    }

    pub(super) fn write(&self) -> RwLockWriteGuard<'_, Index> {
        self.index.write().expect("no thread panics while it changes the index")
    }
}

impl CubeFilter {
    /// Whether a cube passes, its text aside.
    fn accepts(&self, view: &CubeView) -> bool {
        let cube = &view.cube;
        self.kind.is_none_or(|kind| cube.payload.kind() == kind)
            && self.state.is_none_or(|state| view.state == state)
            && self.tag.as_ref().is_none_or(|tag| cube.tags.has(tag))
    }
}

/// Whether `query`, in lower case, stands in a cube's name, tags or text.
fn mentions(cube: &Cube, query: &str) -> bool {
    cube.name.as_str().contains(query)
        || cube.tags.iter().any(|tag| tag.as_str().to_lowercase().contains(query))
        || cube.payload.twin().is_some_and(|twin| twin.mentions(query))
}

/// Takes all tombstones in, and returns whom they stand for. A damaged one still stands for its cube.
fn bury_all(index: &mut Index, contents: &mut Contents) -> HashSet<CubeId> {
    let mut dead: HashSet<CubeId> = contents.tombstones.iter().map(|tombstone| tombstone.id).collect();
    dead.extend(contents.damaged.iter().filter_map(|damaged| match damaged.name {
        Some(FileName::Tombstone(id)) => Some(id),
        _ => None,
    }));
    contents.tombstones.drain(..).for_each(|tombstone| drop(index.bury(tombstone)));
    dead
}

/// Removes the manifests of cubes with a whole tombstone, which a crash left behind; of those whose blocks were to be erased
/// they say which these are.
fn clear_leftovers(
    folder: &ManifestFolder,
    index: &mut Index,
    manifests: &[Cube],
    dead: &HashSet<CubeId>,
) -> Result<()> {
    for cube in manifests.iter().filter(|cube| dead.contains(&cube.id)) {
        let Some(tombstone) = index.tombstones.get(&cube.id) else { continue };
        if tombstone.erase_on_free {
            let unerased = index.unerased.entry(cube.id).or_default();
            unerased.versions.push(cube.version);
            unerased.blocks.extend(cube.payload.blocks());
            index.leftovers.insert(cube.id);
            continue;
        }
        if let Err(error) = folder.remove_manifests(cube.id, [cube.version].into_iter()) {
            tracing::warn!(%error, "a deleted cube's manifest stays for now");
            index.leftovers.insert(cube.id);
        }
    }
    Ok(())
}

/// Takes in every cube whose newest manifest is whole, and returns what is damaged.
///
/// A cube with a damaged newer version is not served from an older one: that one's access lists may be outdated.
fn admit_all(index: &mut Index, contents: Contents) -> Vec<Damaged> {
    let Contents { manifests, mut damaged, .. } = contents;
    let mut torn: HashMap<CubeId, Version> = HashMap::new();
    for found in &damaged {
        if let Some(FileName::Manifest(id, version)) = found.name {
            let newest = torn.entry(id).or_insert(version);
            *newest = version.max(*newest);
        }
    }
    let mut cubes: BTreeMap<CubeId, BTreeMap<Version, Cube>> = BTreeMap::new();
    for cube in manifests {
        cubes.entry(cube.id).or_default().insert(cube.version, cube);
    }
    for (id, versions) in cubes {
        let (newest, head) = versions.last_key_value().expect("a cube has a version");
        let is_taken = index.named(&head.name).is_some();
        if torn.get(&id).is_some_and(|torn| torn > newest) || is_taken {
            if is_taken {
                damaged.push(doubled(head));
            }
            versions.values().for_each(|cube| index.reference(cube));
            continue;
        }
        versions.into_values().for_each(|cube| index.put(Arc::new(cube), false));
    }
    damaged
}

/// Two cubes of one name: the vault never writes that, somebody copied files.
fn doubled(cube: &Cube) -> Damaged {
    let name = FileName::Manifest(cube.id, cube.version);
    let error = Error::Conflict(format!("an older cube is called `{}` too", cube.name));
    Damaged { path: PathBuf::from(name.to_string()), error, name: Some(name) }
}

impl Catalog {
    /// The tombstone of a deleted cube, the newest of that name that `principal` could read.
    pub(super) fn tombstone_named<'a>(
        index: &'a Index,
        principal: &Principal,
        name: &CubeName,
    ) -> Option<&'a Tombstone> {
        let is_wanted = |tombstone: &&Tombstone| {
            tombstone.name == *name && tombstone.acl.allows(&tombstone.owner, principal, Access::Read)
        };
        index.tombstones.values().filter(is_wanted).max_by_key(|tombstone| (tombstone.deleted_at, tombstone.id))
    }

    pub(super) fn now(&self) -> Timestamp {
        self.clock.now()
    }
}
