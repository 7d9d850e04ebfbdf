//! Changes to a catalog. One at a time: look, write the file, make it durable, then let it be seen.
//!
//! Names in a namespace belong to one principal: whoever made the first cube in it. So nobody learns from a refused name
//! what somebody else's cubes are called.

use std::sync::{Arc, MutexGuard};

use super::acl::{Access, Acl, Principal};
use super::catalog::{Catalog, Writer};
use super::cube::{Cube, CubeId, Governance, MAX_PARENTS, Origin, Priority, SemanticType};
use super::event::EventKind;
use super::folder::{Durability, WriteFault};
use super::index::{CubeView, Index, denied};
use super::label::Labels;
use super::manifest::{Ending, Tombstone};
use super::name::{CubeAddress, CubeName, Version};
use super::payload::Payload;
use super::timestamp::Timestamp;
use crate::kv::BlockHash;
use crate::{Error, Result, invalid};

/// A cube that is to be made.
#[derive(Debug, Clone)]
pub struct NewCube {
    /// What it will be called.
    pub name: CubeName,
    /// What it will hold.
    pub payload: Payload,
    /// The cubes it was made from.
    pub parents: Vec<CubeId>,
    /// Where its content came from.
    pub origin: Origin,
    /// What governs and describes it from the start.
    pub changes: CubeChanges,
}

/// What is to be changed about a cube; `None` leaves a field as it is.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct CubeChanges {
    /// What its content is about; `Some(None)` takes that away.
    pub semantic_type: Option<Option<SemanticType>>,
    /// Free words beside it.
    pub tags: Option<Labels>,
    /// Who may use it.
    pub acl: Option<Acl>,
    /// Lifetime in seconds from now; `Some(None)` ends only by deletion.
    pub ttl_s: Option<Option<u64>>,
    /// Half-life of its heat in seconds.
    pub half_life_s: Option<Option<u64>>,
    /// How hard its blocks are held on to.
    pub priority: Option<Priority>,
    /// Words for what must be handled with care.
    pub sensitivity: Option<Labels>,
    /// Zero its memory when it is freed.
    pub erase_on_free: Option<bool>,
}

/// Cubes that ended, and what that set free.
#[derive(Debug, Clone, Default)]
pub struct Ended {
    /// The cubes.
    pub ids: Vec<CubeId>,
    /// Blocks that no cube references any more.
    pub unreferenced: Vec<BlockHash>,
}

impl NewCube {
    /// A private cube of what somebody wrote.
    pub fn new(name: CubeName, payload: Payload) -> Self {
        let changes = CubeChanges::default();
        Self { name, payload, parents: Vec::new(), origin: Origin::UserInput, changes }
    }
}

impl CubeChanges {
    fn apply(self, cube: &mut Cube, now: Timestamp) {
        let governance = &mut cube.governance;
        set(&mut cube.semantic_type, self.semantic_type);
        set(&mut cube.tags, self.tags);
        set(&mut governance.acl, self.acl);
        set(&mut governance.half_life_s, self.half_life_s);
        set(&mut governance.priority, self.priority);
        set(&mut governance.sensitivity, self.sensitivity);
        set(&mut governance.erase_on_free, self.erase_on_free);
        if let Some(ttl_s) = self.ttl_s {
            governance.start_ttl(ttl_s, now);
        }
    }

    /// What one needs for these changes. Access is changed by those who may share, all else by those who may write.
    fn needs(&self) -> impl Iterator<Item = Access> {
        let is_only_acl = *self == Self { acl: self.acl.clone(), ..Self::default() };
        let share = self.acl.is_some().then_some(Access::Share);
        let write = (!is_only_acl || self.acl.is_none()).then_some(Access::Write);
        share.into_iter().chain(write)
    }
}

fn set<T>(field: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *field = value;
    }
}

impl Catalog {
    /// Makes a cube. With [`Durability::Synced`] it is there after any crash once this returns.
    pub fn create(&self, principal: &Principal, new: NewCube, durability: Durability) -> Result<CubeView> {
        self.check_payload(&new.payload)?;
        let mut writer = self.begin()?;
        let now = self.now();
        self.check_parents(principal, &new.parents)?;
        self.claim(&mut writer, principal, &new.name, now)?;
        self.check_room(&new.payload)?;
        let mut cube = Cube {
            id: CubeId::generate(),
            version: Version::FIRST,
            name: new.name,
            parents: new.parents,
            created_at: now,
            updated_at: now,
            origin: new.origin,
            semantic_type: None,
            tags: Labels::default(),
            governance: Governance::of(principal.clone()),
            payload: Arc::new(new.payload),
        };
        new.changes.apply(&mut cube, now);
        self.commit(&mut writer, cube, durability, EventKind::Created, Some(principal), now)
    }

    /// Makes a private cube of `principal` with the content of another. The blocks are shared.
    pub fn fork(&self, principal: &Principal, source: &CubeAddress, name: CubeName) -> Result<CubeView> {
        let mut writer = self.begin()?;
        let now = self.now();
        let source = self.read().view(principal, source, now)?.cube;
        self.claim(&mut writer, principal, &name, now)?;
        self.check_room(&source.payload)?;
        let mut cube = Cube::clone(&source);
        (cube.id, cube.version, cube.name) = (CubeId::generate(), Version::FIRST, name);
        (cube.parents, cube.created_at, cube.updated_at) = (vec![source.id], now, now);
        // Marks of care stay with the content; access, lifetime and priority are the new owner's to choose.
        cube.governance = Governance {
            sensitivity: source.governance.sensitivity.clone(),
            erase_on_free: source.governance.erase_on_free,
            ..Governance::of(principal.clone())
        };
        self.commit(&mut writer, cube, Durability::Synced, EventKind::Forked, Some(principal), now)
    }

    /// Whether `principal` may make a cube of this name: what [`Catalog::create`] checks, before anything is computed.
    pub fn check_name(&self, principal: &Principal, name: &CubeName) -> Result<()> {
        self.taker(principal, name, self.now()).map(drop)
    }

    /// Whether `principal` may append to a cube: what [`Catalog::append`] checks, before anything is computed.
    pub fn check_append(&self, principal: &Principal, name: &CubeName) -> Result<()> {
        self.changeable(principal, name, Access::Write, self.now()).map(drop)
    }

    /// Adds a version that was made from version `base`; [`Error::Conflict`] when that is no longer the newest. Always
    /// durable: a torn newest version would hide the cube.
    pub fn append(&self, principal: &Principal, name: &CubeName, base: Version, payload: Payload) -> Result<CubeView> {
        self.check_payload(&payload)?;
        self.check_bytes(&payload)?;
        let max_versions = self.limits.max_versions;
        let edit = |cube: &mut Cube, _| {
            if cube.version != base {
                let message = "was changed meanwhile; look at its newest version and try again";
                return Err(Error::Conflict(format!("Cube `{}` {message}.", cube.name)));
            }
            let next = cube.version.next().filter(|next| next.get() as usize <= max_versions);
            cube.version = next.ok_or_else(|| {
                Error::Exhausted(format!(
                    "Cube `{}` has {max_versions} versions, no more are kept; fork it.",
                    cube.name
                ))
            })?;
            cube.payload = Arc::new(payload);
            Ok(())
        };
        self.edit(principal, name, Access::Write, EventKind::Appended, edit)
    }

    /// Gives a cube another name. For the owner, into a namespace that is free or the owner's.
    pub fn rename(&self, principal: &Principal, name: &CubeName, target: CubeName) -> Result<CubeView> {
        let mut writer = self.begin()?;
        let now = self.now();
        let head = self.changeable(principal, name, Access::Own, now)?;
        if target == *name {
            return self.read().view(principal, &CubeAddress::from(target), now);
        }
        self.claim(&mut writer, principal, &target, now)?;
        let mut cube = Cube::clone(&head);
        (cube.name, cube.updated_at) = (target, now);
        self.commit(&mut writer, cube, Durability::Synced, EventKind::Renamed, Some(principal), now)
    }

    /// Changes what governs and describes a cube.
    pub fn change(&self, principal: &Principal, name: &CubeName, changes: CubeChanges) -> Result<CubeView> {
        let edit = |cube: &mut Cube, now| {
            if let Some(access) = changes.needs().find(|access| !cube.allows(principal, *access)) {
                return Err(denied(name, access));
            }
            changes.apply(cube, now);
            Ok(())
        };
        self.edit(principal, name, Access::Read, EventKind::Changed, edit)
    }

    /// Keeps a cube's blocks from eviction.
    pub fn pin(&self, principal: &Principal, name: &CubeName) -> Result<CubeView> {
        self.edit(principal, name, Access::Write, EventKind::Pinned, |cube, _| {
            cube.governance.priority = Priority::Pinned;
            Ok(())
        })
    }

    /// Lets a cube's blocks be evicted like those of others.
    pub fn unpin(&self, principal: &Principal, name: &CubeName) -> Result<CubeView> {
        self.edit(principal, name, Access::Write, EventKind::Unpinned, |cube, _| {
            if cube.governance.priority == Priority::Pinned {
                cube.governance.priority = Priority::default();
            }
            Ok(())
        })
    }

    /// Makes a cube immutable: until it is unfrozen it is neither changed nor renamed nor deleted, and does not expire.
    pub fn freeze(&self, principal: &Principal, name: &CubeName) -> Result<CubeView> {
        self.edit(principal, name, Access::Write, EventKind::Frozen, |cube, _| {
            cube.governance.frozen = true;
            Ok(())
        })
    }

    /// Undoes [`Catalog::freeze`]; a lifetime begins anew.
    pub fn unfreeze(&self, principal: &Principal, name: &CubeName) -> Result<CubeView> {
        let mut writer = self.begin()?;
        let now = self.now();
        let mut cube = Cube::clone(&self.read().accessible(principal, name, Access::Write, now)?.head);
        cube.governance.frozen = false;
        cube.governance.start_ttl(cube.governance.ttl_s, now);
        cube.updated_at = now;
        self.commit(&mut writer, cube, Durability::Synced, EventKind::Unfrozen, Some(principal), now)
    }

    /// Deletes a cube with all its versions. Once this returns it stays deleted; only then may blocks be freed.
    pub fn delete(&self, principal: &Principal, name: &CubeName) -> Result<Ended> {
        let mut writer = self.begin()?;
        let now = self.now();
        let head = self.changeable(principal, name, Access::Own, now)?;
        let mut ended = Ended::default();
        self.end(&mut writer, &head, Ending::Deleted, Some(principal), now, &mut ended)?;
        Ok(ended)
    }

    /// Ends cubes whose lifetime is over, to be called every so often.
    ///
    /// A cube past its lifetime is hidden at once, but ends only when two sweeps in a row find it so: a clock that jumped
    /// ahead and was set right in between has destroyed nothing. Where the clock went back, no cube has more than its
    /// whole lifetime before it.
    pub fn expire(&self) -> Result<Ended> {
        let mut writer = self.begin()?;
        let now = self.now();
        let (over, ahead) = sweep(&mut self.write(), now);
        let mut ended = Ended::default();
        for cube in over {
            self.end(&mut writer, &cube, Ending::Expired, None, now, &mut ended)?;
        }
        for head in ahead {
            let mut cube = Cube::clone(&head);
            cube.governance.start_ttl(cube.governance.ttl_s, now);
            self.commit(&mut writer, cube, Durability::Synced, EventKind::Changed, None, now)?;
        }
        Ok(ended)
    }

    /// Changes the newest version's manifest, or adds one.
    fn edit(
        &self,
        principal: &Principal,
        name: &CubeName,
        access: Access,
        kind: EventKind,
        edit: impl FnOnce(&mut Cube, Timestamp) -> Result<()>,
    ) -> Result<CubeView> {
        let mut writer = self.begin()?;
        let now = self.now();
        let head = self.changeable(principal, name, access, now)?;
        let mut cube = Cube::clone(&head);
        edit(&mut cube, now)?;
        cube.updated_at = now;
        self.commit(&mut writer, cube, Durability::Synced, kind, Some(principal), now)
    }

    fn begin(&self) -> Result<MutexGuard<'_, Writer>> {
        let writer = self.writer.lock().expect("no thread panics while it writes");
        if writer.is_uncertain {
            let message = "An earlier change could not be finished, so the vault takes no further ones; \
                           see the log and restart the server.";
            return Err(Error::Exhausted(message.to_owned()));
        }
        Ok(writer)
    }

    fn changeable(&self, principal: &Principal, name: &CubeName, access: Access, now: Timestamp) -> Result<Arc<Cube>> {
        let head = Arc::clone(&self.read().accessible(principal, name, access, now)?.head);
        if head.governance.frozen {
            return Err(Error::Conflict(format!("Cube `{name}` is frozen; unfreeze it first.")));
        }
        Ok(head)
    }

    /// Gives `principal` this name, if it may have it.
    fn claim(&self, writer: &mut Writer, principal: &Principal, name: &CubeName, now: Timestamp) -> Result<()> {
        match self.taker(principal, name, now)? {
            None => Ok(()),
            Some(expired) => self.end(writer, &expired, Ending::Expired, None, now, &mut Ended::default()),
        }
    }

    /// The expired cube that still has this name. An error when `principal` cannot have it.
    fn taker(&self, principal: &Principal, name: &CubeName, now: Timestamp) -> Result<Option<Arc<Cube>>> {
        let index = self.read();
        if index.namespace_owner(name.namespace()).is_some_and(|owner| owner != principal) {
            let namespace = name.namespace();
            return Err(Error::Denied(format!("Namespace `{namespace}` is somebody else's; choose another.")));
        }
        match index.named(name).map(|entry| Arc::clone(&entry.head)) {
            Some(cube) if !cube.has_expired(now) => {
                Err(Error::Conflict(format!("There is a cube `{name}` already; append to it or choose a name.")))
            }
            taker => Ok(taker),
        }
    }

    fn commit(
        &self,
        writer: &mut Writer,
        cube: Cube,
        durability: Durability,
        kind: EventKind,
        principal: Option<&Principal>,
        now: Timestamp,
    ) -> Result<CubeView> {
        if let Some(folder) = &self.folder {
            folder.write_manifest(&cube, durability).map_err(|fault| writer.note(fault))?;
        }
        let cube = Arc::new(cube);
        let mut index = self.write();
        index.put(Arc::clone(&cube), matches!(kind, EventKind::Created | EventKind::Forked));
        index.events.push(kind, now, principal, Arc::clone(&cube));
        Ok(index.cubes[&cube.id].view(now))
    }

    /// Writes the tombstone first; what follows can be made up for at the next start.
    fn end(
        &self,
        writer: &mut Writer,
        cube: &Arc<Cube>,
        reason: Ending,
        principal: Option<&Principal>,
        now: Timestamp,
        ended: &mut Ended,
    ) -> Result<()> {
        let tombstone = Tombstone::of(cube, now, reason);
        if let Some(folder) = &self.folder {
            folder.write_tombstone(&tombstone).map_err(|fault| writer.note(fault))?;
        }
        let kind = match reason {
            Ending::Deleted => EventKind::Deleted,
            Ending::Expired => EventKind::Expired,
        };
        let mut index = self.write();
        let versions: Vec<Version> = index.cubes[&cube.id].versions().map(|cube| cube.version).collect();
        index.events.push(kind, now, principal, Arc::clone(cube));
        ended.ids.push(cube.id);
        ended.unreferenced.extend(index.bury(tombstone));
        drop(index);
        self.clean_up(cube.id, versions);
        Ok(())
    }

    /// Removes what a tombstone made superfluous. A failure is made up for at the next start.
    fn clean_up(&self, id: CubeId, versions: Vec<Version>) {
        let Some(folder) = &self.folder else { return self.prune() };
        if let Err(error) = folder.remove_manifests(id, versions.into_iter()) {
            tracing::warn!(%error, "a deleted cube's manifest stays for now");
            self.write().leftovers.insert(id);
        }
        self.prune();
    }

    /// Forgets the oldest tombstones above the limit: those whose manifests are surely gone.
    fn prune(&self) {
        let forgotten: Vec<CubeId> = {
            let index = self.read();
            let excess = index.tombstones.len().saturating_sub(self.limits.max_tombstones);
            index.tombstones.keys().filter(|id| !index.leftovers.contains(*id)).take(excess).copied().collect()
        };
        if forgotten.is_empty() {
            return;
        }
        let removed = self.folder.as_ref().map_or(Ok(()), |folder| {
            folder.sync()?;
            forgotten.iter().try_for_each(|id| folder.remove_tombstone(*id))
        });
        if let Err(error) = removed {
            tracing::warn!(%error, "old tombstones stay for now");
        }
        let mut index = self.write();
        forgotten.iter().for_each(|id| drop(index.tombstones.remove(id)));
    }

    fn check_payload(&self, payload: &Payload) -> Result<()> {
        let limits = &self.limits;
        let num_text_bytes = payload.twin().map_or(0, |twin| twin.num_bytes());
        if num_text_bytes > limits.max_text_bytes {
            let max = limits.max_text_bytes;
            return Err(invalid!("The text has {num_text_bytes} bytes, a cube may have {max}; split it."));
        }
        let num_tokens = payload.activation().map_or(0, |activation| activation.token_ids().len());
        if num_tokens > limits.max_tokens {
            let max = limits.max_tokens;
            return Err(invalid!("The text has {num_tokens} tokens, a cube may have {max}; split it."));
        }
        Ok(())
    }

    /// Whether one more cube fits.
    fn check_room(&self, payload: &Payload) -> Result<()> {
        if self.num_cubes() >= self.limits.max_cubes {
            let max = self.limits.max_cubes;
            return Err(Error::Exhausted(format!("There are {max} cubes, no more are kept; delete some.")));
        }
        self.check_bytes(payload)
    }

    /// Whether one more payload fits.
    fn check_bytes(&self, payload: &Payload) -> Result<()> {
        let (index, limits) = (self.read(), &self.limits);
        if index.num_payload_bytes.saturating_add(payload.num_index_bytes()) > limits.max_payload_bytes {
            let max = limits.max_payload_bytes;
            return Err(Error::Exhausted(format!("The cubes' texts and tokens fill {max} bytes; delete some.")));
        }
        Ok(())
    }

    /// Parents must be something the principal may see: an unknown id and somebody else's are the same.
    fn check_parents(&self, principal: &Principal, parents: &[CubeId]) -> Result<()> {
        if parents.len() > MAX_PARENTS {
            return Err(invalid!("A cube has at most {MAX_PARENTS} parents, {} were given.", parents.len()));
        }
        let index = self.read();
        let is_visible = |id: &CubeId| {
            let alive = index.cubes.get(id).is_some_and(|entry| entry.head.allows(principal, Access::Read));
            let gone = index.tombstones.get(id);
            alive || gone.is_some_and(|gone| gone.acl.allows(&gone.owner, principal, Access::Read))
        };
        match parents.iter().find(|id| !is_visible(id)) {
            None => Ok(()),
            Some(id) => Err(Error::NotFound(format!("There is no cube with the id {id}."))),
        }
    }
}

impl Writer {
    fn note(&mut self, fault: WriteFault) -> Error {
        if !fault.is_undone {
            tracing::error!(error = %fault.error, "a change of the vault may or may not be durable");
            self.is_uncertain = true;
        }
        fault.error
    }
}

/// Cubes that two sweeps found past their lifetime, and cubes that have more than their lifetime before them.
fn sweep(index: &mut Index, now: Timestamp) -> (Vec<Arc<Cube>>, Vec<Arc<Cube>>) {
    let (mut over, mut ahead) = (Vec::new(), Vec::new());
    for entry in index.cubes.values_mut() {
        let is_over = entry.head.has_expired(now);
        if is_over && entry.seemed_expired {
            over.push(Arc::clone(&entry.head));
        }
        entry.seemed_expired = is_over;
        let governance = &entry.head.governance;
        let end = governance.expires_at.filter(|_| !governance.frozen);
        if let (Some(end), Some(ttl_s)) = (end, governance.ttl_s)
            && end.since(now).as_secs() > ttl_s
        {
            ahead.push(Arc::clone(&entry.head));
        }
    }
    (over, ahead)
}
