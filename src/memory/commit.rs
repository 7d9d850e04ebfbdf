//! How a change of a catalog is made: look, write the file, make it durable, then let it be seen. One at a time.

use std::sync::{Arc, MutexGuard};

use super::acl::{Access, Principal};
use super::catalog::{Catalog, Writer};
use super::changes::{Ended, Erasure};
use super::cube::{Cube, CubeId, MAX_PARENTS};
use super::event::EventKind;
use super::folder::{Durability, WriteFault};
use super::index::{CubeView, Unerased};
use super::manifest::{Ending, Tombstone};
use super::name::{CubeName, Version};
use super::payload::Payload;
use super::snapshot::{Snapshot, SnapshotId};
use super::timestamp::Timestamp;
use crate::{Error, Result, invalid};

impl Catalog {
    /// Changes the newest version's manifest, or adds one.
    pub(super) fn edit(
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

    pub(super) fn begin(&self) -> Result<MutexGuard<'_, Writer>> {
        let writer = self.writer.lock().expect("no thread panics while it writes");
        if writer.is_uncertain {
            let message = "An earlier change could not be finished, so the vault takes no further ones; \
                           see the log and restart the server.";
            return Err(Error::Exhausted(message.to_owned()));
        }
        Ok(writer)
    }

    pub(super) fn changeable(
        &self,
        principal: &Principal,
        name: &CubeName,
        access: Access,
        now: Timestamp,
    ) -> Result<Arc<Cube>> {
        let head = Arc::clone(&self.read().accessible(principal, name, access, now)?.head);
        if head.governance.frozen {
            return Err(Error::Conflict(format!("Cube `{name}` is frozen; unfreeze it first.")));
        }
        Ok(head)
    }

    /// Gives `principal` this name, if it may have it.
    pub(super) fn claim(
        &self,
        writer: &mut Writer,
        principal: &Principal,
        name: &CubeName,
        now: Timestamp,
    ) -> Result<()> {
        match self.taker(principal, name, now)? {
            None => Ok(()),
            Some(expired) => self.end(writer, &expired, Ending::Expired, None, now, &mut Ended::default()),
        }
    }

    /// The expired cube that still has this name. An error when `principal` cannot have it.
    pub(super) fn taker(&self, principal: &Principal, name: &CubeName, now: Timestamp) -> Result<Option<Arc<Cube>>> {
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

    pub(super) fn commit(
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
    pub(super) fn end(
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
        let freed = index.bury(tombstone);
        ended.unreferenced.extend(&freed);
        if cube.governance.erase_on_free && !freed.is_empty() {
            index.leftovers.insert(cube.id);
            index.unerased.insert(cube.id, Unerased { versions, blocks: freed.clone() });
            drop(index);
            ended.erasures.push(Erasure { id: cube.id, blocks: freed });
            self.prune();
        } else {
            drop(index);
            self.clean_up(cube.id, versions);
        }
        Ok(())
    }

    /// Removes what a tombstone made superfluous. A failure is made up for at the next start.
    pub(super) fn clean_up(&self, id: CubeId, versions: Vec<Version>) {
        let Some(folder) = &self.folder else { return self.prune() };
        if let Err(error) = folder.remove_manifests(id, versions.into_iter()) {
            tracing::warn!(%error, "a deleted cube's manifest stays for now");
            self.write().leftovers.insert(id);
        }
        self.prune();
    }

    pub(super) fn write_snapshot(&self, mut writer: MutexGuard<'_, Writer>, snapshot: &Snapshot) -> Result<()> {
        let Some(folder) = &self.folder else { return Ok(()) };
        folder.write_snapshot(snapshot).map_err(|fault| writer.note(fault))
    }

    /// A removal that is not durable may be undone by a crash, which loses nothing.
    pub(super) fn remove_snapshot(&self, _writer: MutexGuard<'_, Writer>, id: SnapshotId) -> Result<()> {
        self.folder.as_ref().map_or(Ok(()), |folder| folder.remove_snapshot(id))
    }

    /// Gives a cube the number of its next version.
    pub(super) fn advance(&self, cube: &mut Cube) -> Result<()> {
        let max_versions = self.limits.max_versions;
        let next = cube.version.next().filter(|next| next.get() as usize <= max_versions);
        cube.version = next.ok_or_else(|| {
            Error::Exhausted(format!("Cube `{}` has {max_versions} versions, no more are kept; fork it.", cube.name))
        })?;
        Ok(())
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

    pub(super) fn check_payload(&self, payload: &Payload) -> Result<()> {
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
    pub(super) fn check_room(&self, payload: &Payload) -> Result<()> {
        if self.num_cubes() >= self.limits.max_cubes {
            let max = self.limits.max_cubes;
            return Err(Error::Exhausted(format!("There are {max} cubes, no more are kept; delete some.")));
        }
        self.check_bytes(payload)
    }

    /// Whether one more payload fits.
    pub(super) fn check_bytes(&self, payload: &Payload) -> Result<()> {
        let (index, limits) = (self.read(), &self.limits);
        if index.num_payload_bytes.saturating_add(payload.num_index_bytes()) > limits.max_payload_bytes {
            let max = limits.max_payload_bytes;
            return Err(Error::Exhausted(format!("The cubes' texts and tokens fill {max} bytes; delete some.")));
        }
        Ok(())
    }

    /// Parents must be something the principal may see: an unknown id and somebody else's are the same.
    pub(super) fn check_parents(&self, principal: &Principal, parents: &[CubeId]) -> Result<()> {
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
