//! What a cube was made from, and what was made from it; deleted cubes included. Relatives that the asking principal may
//! not read are left out, and what lies behind them.

use std::collections::{HashMap, HashSet, VecDeque};

use super::acl::{Access, Acl, Principal};
use super::catalog::Catalog;
use super::cube::{Cube, CubeId};
use super::index::Index;
use super::manifest::{Ending, Tombstone};
use super::name::{CubeName, Version};
use super::payload::Kind;
use super::timestamp::Timestamp;
use crate::Result;

/// Most relatives in one answer.
const MAX_RELATIVES: usize = 1000;

/// A cube's relatives, nearest first.
#[derive(Debug, Clone)]
pub struct Lineage {
    /// The cube asked for.
    pub cube: Relative,
    /// What it was made from.
    pub ancestors: Vec<Relative>,
    /// What was made from it.
    pub descendants: Vec<Relative>,
}

/// A living or deleted cube in a lineage.
#[derive(Debug, Clone, PartialEq)]
pub struct Relative {
    /// Its identity.
    pub id: CubeId,
    /// What it is called, or was.
    pub name: CubeName,
    /// What it is.
    pub kind: Kind,
    /// Its newest version.
    pub version: Version,
    /// What it was made from.
    pub parents: Vec<CubeId>,
    /// When it was made.
    pub created_at: Timestamp,
    /// When and why it ended, if it did.
    pub ended: Option<(Timestamp, Ending)>,
}

impl From<&Cube> for Relative {
    fn from(cube: &Cube) -> Self {
        Self {
            id: cube.id,
            name: cube.name.clone(),
            kind: cube.payload.kind(),
            version: cube.version,
            parents: cube.parents.clone(),
            created_at: cube.created_at,
            ended: None,
        }
    }
}

impl From<&Tombstone> for Relative {
    fn from(tombstone: &Tombstone) -> Self {
        Self {
            id: tombstone.id,
            name: tombstone.name.clone(),
            kind: tombstone.kind,
            version: tombstone.version,
            parents: tombstone.parents.clone(),
            created_at: tombstone.created_at,
            ended: Some((tombstone.deleted_at, tombstone.reason)),
        }
    }
}

impl Catalog {
    /// The lineage of a cube, or of the last deleted one of that name.
    pub fn lineage(&self, principal: &Principal, name: &CubeName) -> Result<Lineage> {
        let (index, now) = (self.read(), self.now());
        let found = index.visible(principal, name, now).map(|entry| Relative::from(entry.head.as_ref()));
        let gone = || Self::tombstone_named(&index, principal, name).map(Relative::from);
        let cube = found.or_else(|error| gone().ok_or(error))?;
        let family = Family::of(&index, principal);
        let ancestors = family.walk(cube.id, |relative| relative.parents.clone());
        let descendants = family.walk(cube.id, |relative| family.children_of(relative.id));
        Ok(Lineage { cube, ancestors, descendants })
    }
}

/// All that one principal may see, by identity.
struct Family {
    members: HashMap<CubeId, Relative>,
    children: HashMap<CubeId, Vec<CubeId>>,
}

impl Family {
    fn of(index: &Index, principal: &Principal) -> Self {
        let is_visible = |acl: &Acl, owner: &Principal| acl.allows(owner, principal, Access::Read);
        let alive = index.cubes.values().map(|entry| entry.head.as_ref());
        let alive = alive.filter(|cube| cube.allows(principal, Access::Read)).map(Relative::from);
        let gone = index.tombstones.values().filter(|gone| is_visible(&gone.acl, &gone.owner)).map(Relative::from);
        let members: HashMap<CubeId, Relative> = alive.chain(gone).map(|relative| (relative.id, relative)).collect();
        let mut children: HashMap<CubeId, Vec<CubeId>> = HashMap::new();
        for relative in members.values() {
            relative.parents.iter().for_each(|parent| children.entry(*parent).or_default().push(relative.id));
        }
        children.values_mut().for_each(|ids| ids.sort());
        Self { members, children }
    }

    fn children_of(&self, id: CubeId) -> Vec<CubeId> {
        self.children.get(&id).cloned().unwrap_or_default()
    }

    /// Breadth first from `start`, which is not part of the answer.
    fn walk(&self, start: CubeId, next: impl Fn(&Relative) -> Vec<CubeId>) -> Vec<Relative> {
        let (mut seen, mut waiting, mut found) = (HashSet::from([start]), VecDeque::from([start]), Vec::new());
        while let Some(relative) = waiting.pop_front().and_then(|id| self.members.get(&id)) {
            for id in next(relative) {
                if found.len() < MAX_RELATIVES && self.members.contains_key(&id) && seen.insert(id) {
                    found.push(self.members[&id].clone());
                    waiting.push_back(id);
                }
            }
        }
        found
    }
}
