//! Which adapters lie on the device, and who holds them there.
//!
//! An adapter has pages of the KV pool, a group of blocks. While it is being loaded and while anybody uses it the group is
//! held; otherwise it lies among the free blocks, in the order in which these were given back, and is there until
//! sequences or other adapters take one of its pages. So there is one order of eviction for all that the device's memory
//! holds. Plain data with one owner, the engine's thread, which never waits here.

use std::any::Any;
use std::collections::HashMap;
use std::sync::{Arc, Weak};

use super::adapter_io::{AdapterArrival, AdapterIo, AdapterLoad, DeviceAdapter};
use super::adapters::{AppliedAdapter, Loaded, LoadedAdapter};
use crate::adapters::AdapterDigest;
use crate::backend::LoraAdapter;
use crate::kv::{CachedPool, GroupId};
use crate::paging::Tier;
use crate::planted::{self, Bug};
use crate::telemetry::{EngineMetrics, Evictor};

/// Adapters on the device, and on their way.
pub(super) struct Residency {
    io: AdapterIo,
    residents: HashMap<AdapterDigest, Resident>,
    num_loading: usize,
    page_bytes: usize,
    metrics: Arc<EngineMetrics>,
}

struct Resident {
    group: GroupId,
    num_pages: usize,
    /// Sequences, and a merge, that need it where it is.
    num_users: usize,
    state: State,
    /// To see whether anybody could still ask for it.
    loaded: Weak<Loaded>,
}

enum State {
    /// From where this handle says.
    Loading(LoadedAdapter),
    Ready(DeviceAdapter),
    /// It could not be brought up, and its users have yet to be told.
    Failed,
}

/// An adapter that could not be brought up from where this handle says.
pub(super) struct FailedLoad {
    pub(super) adapter: LoadedAdapter,
    pub(super) why: String,
}

impl Resident {
    /// Whether its pages are free, for whoever needs some.
    fn is_idle(&self) -> bool {
        self.num_users == 0 && matches!(self.state, State::Ready(_))
    }

    fn holds_pages(&self) -> bool {
        match self.state {
            State::Loading(_) => true,
            State::Ready(_) => self.num_users > 0 && !planted::is(Bug::AdapterNotPinned),
            State::Failed => false,
        }
    }
}

impl Residency {
    pub(super) fn new(io: AdapterIo, page_bytes: usize, metrics: Arc<EngineMetrics>) -> Self {
        Self { io, residents: HashMap::new(), num_loading: 0, page_bytes, metrics }
    }

    /// Holds all of these adapters, and has those brought up that are not there; no one when the pool has no room for all
    /// of them beside `num_reserved` blocks.
    pub(super) fn hold(&mut self, pool: &mut CachedPool, adapters: &[AppliedAdapter], num_reserved: usize) -> bool {
        self.forget_evicted(pool, Evictor::Kv);
        if self.num_missing_pages(adapters) + num_reserved > pool.num_free() {
            return false;
        }
        // Those that are there first, lest the others take their pages.
        let is_there = |applied: &&AppliedAdapter| self.residents.contains_key(&applied.adapter.digest());
        let (there, missing): (Vec<_>, Vec<_>) = adapters.iter().partition(is_there);
        let mut held = Vec::with_capacity(adapters.len());
        for applied in there.into_iter().chain(missing) {
            if !self.hold_one(pool, &applied.adapter) {
                held.into_iter().for_each(|digest| self.release(pool, digest));
                return false;
            }
            held.push(applied.adapter.digest());
        }
        true
    }

    /// Free blocks that holding these takes.
    fn num_missing_pages(&self, adapters: &[AppliedAdapter]) -> usize {
        let pages = |applied: &AppliedAdapter| match self.residents.get(&applied.adapter.digest()) {
            Some(resident) if !resident.is_idle() => 0,
            _ => applied.adapter.num_pages(),
        };
        adapters.iter().map(pages).sum()
    }

    fn hold_one(&mut self, pool: &mut CachedPool, adapter: &LoadedAdapter) -> bool {
        let Some(resident) = self.residents.get_mut(&adapter.digest()) else { return self.start_load(pool, adapter) };
        resident.num_users += 1;
        resident.loaded = adapter.downgrade();
        if resident.num_users == 1 && resident.holds_pages() && !matches!(resident.state, State::Loading(_)) {
            let is_there = pool.hold_group(resident.group);
            assert!(is_there, "adapters that were evicted are forgotten");
        }
        true
    }

    fn start_load(&mut self, pool: &mut CachedPool, adapter: &LoadedAdapter) -> bool {
        let (num_pages, num_cached) = (adapter.num_pages(), pool.num_cached());
        let Some(group) = pool.allocate_group(num_pages) else { return false };
        self.forget_evicted(pool, Evictor::Adapter);
        self.metrics.adapters.evicted_kv_blocks.inc_by(num_cached.saturating_sub(pool.num_cached()) as u64);
        let blocks = pool.group_blocks(group).unwrap_or_default();
        let pages = blocks.iter().map(|block| block.0).collect();
        if !self.io.send(AdapterLoad { adapter: adapter.clone(), group, pages }) {
            pool.release_group(group);
            pool.end_group(group);
            return false;
        }
        self.num_loading += 1;
        let (state, loaded) = (State::Loading(adapter.clone()), adapter.downgrade());
        self.residents.insert(adapter.digest(), Resident { group, num_pages, num_users: 1, state, loaded });
        true
    }

    /// Holds an adapter that is held already.
    pub(super) fn hold_again(&mut self, digest: AdapterDigest) {
        let resident = self.residents.get_mut(&digest).filter(|resident| resident.num_users > 0);
        resident.expect("an adapter that is held is known").num_users += 1;
    }

    /// Lets go of an adapter that was held.
    pub(super) fn release(&mut self, pool: &mut CachedPool, digest: AdapterDigest) {
        let resident = self.residents.get_mut(&digest).expect("an adapter that is held is known");
        let held_pages = resident.holds_pages();
        resident.num_users -= 1;
        if resident.num_users > 0 {
            return;
        }
        match resident.state {
            State::Loading(_) => {}
            State::Ready(_) if held_pages => pool.release_group(resident.group),
            State::Ready(_) => {}
            State::Failed => drop(self.residents.remove(&digest)),
        }
    }

    /// Whether all of these, which are held, have arrived.
    pub(super) fn are_ready(&self, adapters: &[AppliedAdapter]) -> bool {
        let is_ready = |applied: &AppliedAdapter| {
            let resident = self.residents.get(&applied.adapter.digest());
            resident.is_some_and(|resident| matches!(resident.state, State::Ready(_)))
        };
        adapters.iter().all(is_ready)
    }

    /// Groups without which what is computed under these adapters is of little use.
    pub(super) fn groups_of(&self, adapters: &[AppliedAdapter]) -> Arc<[GroupId]> {
        let resident = |applied: &AppliedAdapter| self.residents.get(&applied.adapter.digest());
        adapters.iter().filter_map(resident).map(|resident| resident.group).collect()
    }

    /// What kernels take of an adapter that is held and has arrived.
    pub(super) fn on_device<L: Send + Sync + 'static>(&self, digest: AdapterDigest) -> Arc<LoraAdapter<L>> {
        let state = self.residents.get(&digest).map(|resident| &resident.state);
        let Some(State::Ready(device)) = state else { panic!("{digest:?} is used and not on the device") };
        let device: Arc<dyn Any + Send + Sync> = Arc::clone(device);
        device.downcast().expect("an engine's adapters are its own backend's")
    }

    /// Takes note of loads that have ended; the next one that failed while somebody wanted it.
    pub(super) fn poll(&mut self, pool: &mut CachedPool) -> Option<FailedLoad> {
        while let Some(arrival) = self.io.poll() {
            let failed = self.absorb(pool, arrival);
            if failed.is_some() {
                return failed;
            }
        }
        self.forget_evicted(pool, Evictor::Kv);
        None
    }

    fn absorb(&mut self, pool: &mut CachedPool, arrival: AdapterArrival) -> Option<FailedLoad> {
        let AdapterArrival { group, result, took } = arrival;
        self.num_loading -= 1;
        let (&digest, resident) = self
            .residents
            .iter_mut()
            .find(|(_, resident)| resident.group == group)
            .expect("what is being loaded is known");
        match result {
            Ok((device, source)) => {
                self.metrics.adapters.count_load(source == Tier::Disk, took);
                resident.state = State::Ready(device);
                if !resident.holds_pages() {
                    pool.release_group(group);
                }
                None
            }
            Err(error) => {
                tracing::warn!(%error, ?digest, "an adapter could not be brought to the device");
                self.metrics.adapters.load_failures.inc();
                pool.release_group(group);
                pool.end_group(group);
                let before = std::mem::replace(&mut resident.state, State::Failed);
                if resident.num_users == 0 {
                    self.residents.remove(&digest);
                    return None;
                }
                match before {
                    State::Loading(adapter) => Some(FailedLoad { adapter, why: error.to_string() }),
                    State::Ready(_) | State::Failed => None,
                }
            }
        }
    }

    /// Forgets adapters of which `evictor` has taken a page, and gives up those that nobody can ask for any more.
    fn forget_evicted(&mut self, pool: &mut CachedPool, evictor: Evictor) {
        let metrics = &self.metrics.adapters;
        self.residents.retain(|_, resident| {
            if !resident.is_idle() {
                return true;
            }
            if pool.group_blocks(resident.group).is_none() {
                metrics.count_eviction(evictor);
                return false;
            }
            let is_known = resident.loaded.strong_count() > 0;
            if !is_known {
                pool.end_group(resident.group);
            }
            is_known
        });
        let num_pages: usize = self.residents.values().map(|resident| resident.num_pages).sum();
        metrics.set_resident(self.residents.len(), num_pages * self.page_bytes);
    }

    /// Loads under way.
    pub(super) fn num_loading(&self) -> usize {
        self.num_loading
    }

    /// Pages that nobody can take.
    pub(super) fn num_held(&self) -> usize {
        self.residents.values().filter(|resident| resident.holds_pages()).map(|resident| resident.num_pages).sum()
    }

    /// Panics unless adapters are held `num_holds` times. For tests and debug builds.
    pub(super) fn check_integrity(&self, num_holds: usize) {
        let found: usize = self.residents.values().map(|resident| resident.num_users).sum();
        assert_eq!(found, num_holds, "adapters are held by nobody");
        let num_loading =
            self.residents.values().filter(|resident| matches!(resident.state, State::Loading(_))).count();
        assert_eq!(num_loading, self.num_loading, "loads under way are miscounted");
    }
}

#[cfg(test)]
#[path = "residency_tests.rs"]
mod tests;
