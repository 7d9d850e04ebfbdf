//! What can be changed about a catalog; `commit.rs` says how.
//!
//! Names in a namespace belong to one principal: whoever made the first cube in it. So nobody learns from a refused name
//! what somebody else's cubes are called.

use std::sync::Arc;

use super::acl::{Access, Acl, Principal};
use super::catalog::Catalog;
use super::cube::{Cube, CubeId, Governance, Origin, Priority, SemanticType};
use super::event::EventKind;
use super::folder::Durability;
use super::index::{CubeView, Index, Unerased, denied};
use super::label::Labels;
use super::manifest::Ending;
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
    /// Of these, what is to be erased.
    pub erasures: Vec<Erasure>,
}

/// Blocks of a deleted cube that are to be overwritten.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Erasure {
    /// Whose they were.
    pub id: CubeId,
    /// Those that no cube references any more.
    pub blocks: Vec<BlockHash>,
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

/// The files of an adapter are not the vault's to overwrite.
fn check_erasable(cube: &Cube) -> Result<()> {
    match cube.governance.erase_on_free && cube.payload.parameter().is_some() {
        true => {
            Err(invalid!("Cube `{}` is an adapter, whose files are not kept here; erase_on_free is for KV.", cube.name))
        }
        false => Ok(()),
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
        check_erasable(&cube)?;
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
        let edit = |cube: &mut Cube, _| {
            if cube.version != base {
                let message = "was changed meanwhile; look at its newest version and try again";
                return Err(Error::Conflict(format!("Cube `{}` {message}.", cube.name)));
            }
            self.advance(cube)?;
            cube.payload = Arc::new(payload);
            check_erasable(cube)
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
            check_erasable(cube)
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

    /// What is to be erased and may not be yet: of this process, and of earlier ones that ended before.
    pub fn pending_erasures(&self) -> Vec<Erasure> {
        let index = self.read();
        let pending = index.unerased.iter().map(|(id, unerased)| {
            let free = unerased.blocks.iter().filter(|hash| !index.is_referenced(hash));
            Erasure { id: *id, blocks: free.copied().collect() }
        });
        pending.collect()
    }

    /// Takes note that the blocks of a deleted cube are overwritten. Should that not survive a crash, they are erased again.
    pub fn finish_erasure(&self, id: CubeId) {
        let unerased = self.write().unerased.remove(&id);
        if let Some(Unerased { versions, .. }) = unerased {
            self.write().leftovers.remove(&id);
            self.clean_up(id, versions);
        }
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
