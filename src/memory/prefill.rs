//! Work that memory has for the engine: cubes whose KV is not all on disk any more, because it had to make room, was damaged, or
//! never came along. Says what is missing; who runs the model does it when nothing else is to be done.

use std::sync::Arc;

use super::catalog::Catalog;
use super::cube::{Cube, CubeId, Priority};
use super::digest::Digest;
use super::index::Entry;
use crate::kv::BlockHash;

/// A cube is tried so often before it is left to its next use.
pub const MAX_PREFILL_ATTEMPTS: u32 = 3;

/// What a cube lacks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Gap {
    /// Blocks that are not on disk.
    pub num_missing: usize,
    /// How often they were computed in vain.
    pub num_attempts: u32,
    /// What came of the last time, or why there was none.
    pub reason: Option<String>,
}

/// Tokens whose KV is to be computed and kept.
#[derive(Debug, Clone, PartialEq)]
pub struct PrefillJob {
    /// The cube, in its newest version.
    pub cube: Arc<Cube>,
    /// What of its blocks is not there.
    pub num_missing: usize,
}

impl Gap {
    fn is_hopeless(&self) -> bool {
        self.num_attempts >= MAX_PREFILL_ATTEMPTS
    }
}

impl Catalog {
    /// At most `limit` cubes whose newest version lacks blocks, those first that are held on to hardest, of these the hottest.
    /// `identity` is what blocks computed now are valid for: cubes of another model wait for that. `count_missing` says how
    /// many of some blocks are not there.
    pub fn prefill_jobs(
        &self,
        identity: &Digest,
        limit: usize,
        count_missing: impl Fn(&[BlockHash]) -> usize,
    ) -> Vec<PrefillJob> {
        let now = self.now();
        let bound: Vec<(Arc<Cube>, f64)> = {
            let index = self.read();
            let entries =
                index.cubes.values().filter(|entry| is_bound_to(entry, identity) && !entry.head.has_expired(now));
            entries.map(|entry| (Arc::clone(&entry.head), entry.view(now).heat)).collect()
        };
        let mut lacking: Vec<(PrefillJob, f64)> = Vec::new();
        for (cube, heat) in bound {
            let blocks: Vec<BlockHash> = cube.payload.blocks().copied().collect();
            let num_missing = count_missing(&blocks);
            if self.note_missing(&cube, num_missing) {
                lacking.push((PrefillJob { cube, num_missing }, heat));
            }
        }
        lacking.sort_by(|(one, one_heat), (other, other_heat)| {
            let by_hold = hold_of(&other.cube).cmp(&hold_of(&one.cube));
            by_hold.then(other_heat.total_cmp(one_heat)).then(one.cube.id.cmp(&other.cube.id))
        });
        lacking.into_iter().map(|(job, _)| job).take(limit).collect()
    }

    /// Whether that is worth a try.
    fn note_missing(&self, cube: &Cube, num_missing: usize) -> bool {
        let is_known = |entry: &Entry| entry.gap.as_ref().map_or(0, |gap| gap.num_missing) == num_missing;
        let mut index = self.write();
        let Some(entry) = index.cubes.get_mut(&cube.id).filter(|entry| entry.head.version == cube.version) else {
            return false;
        };
        if num_missing == 0 {
            entry.gap = None;
        } else if !is_known(entry) {
            entry.gap.get_or_insert_default().num_missing = num_missing;
        }
        entry.gap.as_ref().is_some_and(|gap| !gap.is_hopeless())
    }

    /// Takes note that all blocks of a cube are there.
    pub fn note_prefilled(&self, id: CubeId) {
        if let Some(entry) = self.write().cubes.get_mut(&id) {
            entry.gap = None;
        }
    }

    /// Takes note that a cube's blocks could not be computed or kept.
    pub fn note_prefill_failed(&self, id: CubeId, reason: String) {
        if let Some(gap) = self.write().cubes.get_mut(&id).and_then(|entry| entry.gap.as_mut()) {
            gap.num_attempts += 1;
            gap.reason = Some(reason);
        }
    }

    /// Takes note that there is a reason not to compute a cube's blocks now.
    pub fn note_prefill_deferred(&self, id: CubeId, reason: String) {
        if let Some(gap) = self.write().cubes.get_mut(&id).and_then(|entry| entry.gap.as_mut()) {
            gap.reason = Some(reason);
        }
    }
}

fn is_bound_to(entry: &Entry, identity: &Digest) -> bool {
    entry.head.payload.activation().is_some_and(|activation| activation.binding().identity == *identity)
}

/// How hard a cube is held on to: levels, then pinned and frozen.
fn hold_of(cube: &Cube) -> u8 {
    match cube.governance.hold() {
        Priority::Pinned => u8::MAX,
        Priority::Level(level) => level.get(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::super::catalog::CatalogLimits;
    use super::super::changes::{CubeChanges, NewCube};
    use super::super::folder::Durability;
    use super::super::samples;
    use super::super::timestamp::SystemClock;
    use super::super::{Payload, Principal, Twin};
    use super::*;

    fn catalog() -> Catalog {
        Catalog::in_memory(Arc::new(SystemClock), CatalogLimits::default())
    }

    /// A cube of two blocks that are its own.
    fn make(catalog: &Catalog, name: &str, first_token: u32, level: u8) -> Arc<Cube> {
        let tokens: Vec<u32> = (first_token..first_token + 20).collect();
        let mut new = NewCube::new(name.parse().unwrap(), samples::activation_payload("text", &tokens));
        new.changes = CubeChanges { priority: Some(Priority::level(level).unwrap()), ..CubeChanges::default() };
        catalog.create(&Principal::local(), new, Durability::Synced).unwrap().cube
    }

    fn names(jobs: &[PrefillJob]) -> Vec<(&str, usize)> {
        jobs.iter().map(|job| (job.cube.name.as_str(), job.num_missing)).collect()
    }

    fn identity() -> Digest {
        samples::binding().identity
    }

    #[test]
    fn the_hardest_held_and_hottest_come_first_and_the_whole_not_at_all() {
        let catalog = catalog();
        let whole = make(&catalog, "ana/whole", 0, 9);
        make(&catalog, "ana/low", 100, 1);
        let hot = make(&catalog, "ana/hot", 200, 5);
        make(&catalog, "ana/cold", 300, 5);
        make(&catalog, "ana/high", 400, 7);
        let text = NewCube::new("ana/text".parse().unwrap(), Payload::Plaintext(Twin::Text("text".into())));
        catalog.create(&Principal::local(), text, Durability::Synced).unwrap();
        catalog.note_use(hot.id);
        let there: HashSet<BlockHash> = whole.payload.blocks().chain(hot.payload.blocks().take(1)).copied().collect();
        let count = |blocks: &[BlockHash]| blocks.iter().filter(|hash| !there.contains(*hash)).count();
        let jobs = catalog.prefill_jobs(&identity(), 10, count);
        assert_eq!(names(&jobs), [("ana/high", 2), ("ana/hot", 1), ("ana/cold", 2), ("ana/low", 2)]);
        assert_eq!(names(&catalog.prefill_jobs(&identity(), 1, count)), [("ana/high", 2)]);
        assert!(catalog.prefill_jobs(&Digest::of(b"another model"), 10, count).is_empty());
        let gap = |name: &str| catalog.get(&Principal::local(), &name.parse().unwrap()).unwrap().gap;
        assert_eq!(gap("ana/whole"), None);
        assert_eq!(gap("ana/hot").unwrap().num_missing, 1);
    }

    #[test]
    fn a_cube_is_tried_a_bounded_number_of_times_and_says_why() {
        let catalog = catalog();
        let cube = make(&catalog, "ana/a", 0, 5);
        let jobs = || catalog.prefill_jobs(&identity(), 10, <[BlockHash]>::len).len();
        let gap = || catalog.get(&Principal::local(), &cube.name.clone().into()).unwrap().gap;
        assert_eq!(jobs(), 1);
        catalog.note_prefill_deferred(cube.id, "no room".into());
        assert_eq!((jobs(), gap().unwrap().num_attempts), (1, 0));
        for number in 1..=MAX_PREFILL_ATTEMPTS {
            catalog.note_prefill_failed(cube.id, format!("try {number}"));
            assert_eq!(jobs(), usize::from(number < MAX_PREFILL_ATTEMPTS));
        }
        let wanted = Gap { num_missing: 2, num_attempts: 3, reason: Some("try 3".into()) };
        assert_eq!(gap(), Some(wanted));
        // Its next use computed it.
        assert!(catalog.prefill_jobs(&identity(), 10, |_| 0).is_empty());
        assert_eq!((gap(), jobs()), (None, 1));
        catalog.note_prefilled(cube.id);
        assert_eq!(gap(), None);
    }
}
