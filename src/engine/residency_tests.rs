//! Adapters against a thread that loads when the test says so.

use crossbeam::channel::{Receiver, Sender};

use super::super::adapters::sample;
use super::*;
use crate::kv::BlockHash;

/// A pool, adapters in it, and the thread's ends of the queues.
struct World {
    pool: CachedPool,
    residency: Residency,
    loads: Receiver<AdapterLoad>,
    arrivals: Sender<AdapterArrival>,
}

fn applied(adapter: &LoadedAdapter) -> AppliedAdapter {
    AppliedAdapter { adapter: adapter.clone(), scale: 1.0 }
}

impl World {
    fn new(num_blocks: usize) -> Self {
        let (io, loads, arrivals) = AdapterIo::manual(2);
        let metrics = Arc::new(EngineMetrics::new("test", 1, num_blocks));
        Self { pool: CachedPool::new(num_blocks, 1), residency: Residency::new(io, 8, metrics), loads, arrivals }
    }

    fn hold(&mut self, adapters: &[&LoadedAdapter]) -> bool {
        let adapters: Vec<_> = adapters.iter().copied().map(applied).collect();
        let is_held = self.residency.hold(&mut self.pool, &adapters, 0);
        self.check();
        is_held
    }

    fn release(&mut self, adapter: &LoadedAdapter) {
        self.residency.release(&mut self.pool, adapter.digest());
        self.check();
    }

    fn is_ready(&self, adapter: &LoadedAdapter) -> bool {
        self.residency.are_ready(&[applied(adapter)])
    }

    /// Ends the oldest load.
    fn arrive(&mut self, result: std::result::Result<(), &str>) -> Option<FailedLoad> {
        let group = self.loads.try_recv().unwrap().group;
        let device: DeviceAdapter = Arc::new(LoraAdapter::<u64>::new(1));
        let result = result.map(|()| (device, Tier::Disk)).map_err(|why| crate::malformed!("{why}"));
        self.arrivals.send(AdapterArrival { group, result, took: Default::default() }).unwrap();
        let failed = self.residency.poll(&mut self.pool);
        self.check();
        failed
    }

    /// Brings an adapter up, in use by nobody.
    fn bring(&mut self, adapter: &LoadedAdapter) {
        assert!(self.hold(&[adapter]) && self.arrive(Ok(())).is_none());
        self.release(adapter);
    }

    fn check(&self) {
        self.pool.check_integrity(self.residency.num_held());
    }

    fn num_resident(&self) -> i64 {
        self.residency.metrics.adapters.resident.get()
    }

    fn num_evictions(&self, evictor: Evictor) -> u64 {
        self.residency.metrics.adapters.num_evictions(evictor)
    }
}

#[test]
fn an_adapter_in_use_keeps_its_pages_and_an_idle_one_until_somebody_needs_them() {
    let mut world = World::new(6);
    let (a, b) = (sample(1, 4), sample(2, 4));
    assert!(world.hold(&[&a]) && !world.is_ready(&a));
    assert_eq!((world.pool.num_free(), world.residency.num_loading()), (2, 1));
    assert!(!world.hold(&[&b]), "there is no room for both");
    assert!(world.arrive(Ok(())).is_none() && world.is_ready(&a));
    assert!(world.hold(&[&a]));
    world.release(&a);
    assert_eq!(world.pool.num_free(), 2, "somebody uses it still");
    world.release(&a);
    assert_eq!((world.pool.num_free(), world.num_resident()), (6, 1));
    // It is there when it is wanted again.
    assert!(world.hold(&[&a]) && world.is_ready(&a) && world.loads.is_empty());
    world.release(&a);
    assert!(world.hold(&[&b]));
    assert_eq!((world.num_evictions(Evictor::Adapter), world.num_evictions(Evictor::Kv)), (1, 0));
    assert!(!world.hold(&[&a]));
    world.residency.check_integrity(1);
}

#[test]
fn blocks_of_sequences_take_idle_adapters_and_adapters_take_cached_blocks() {
    let mut world = World::new(4);
    let a = sample(1, 3);
    world.bring(&a);
    let root = BlockHash::root(b"model", b"");
    let blocks: Vec<_> = (0..2)
        .map(|token| {
            let block = world.pool.allocate().unwrap();
            world.pool.insert(root.child(&[token]), &[token], block);
            block
        })
        .collect();
    assert!(world.residency.poll(&mut world.pool).is_none());
    assert_eq!((world.num_evictions(Evictor::Kv), world.num_resident()), (1, 0));
    assert!(!world.is_ready(&a));
    blocks.into_iter().for_each(|block| world.pool.release(block));
    assert!(world.hold(&[&a]));
    assert_eq!(world.residency.metrics.adapters.evicted_kv_blocks.get(), 1);
}

#[test]
fn all_adapters_of_a_request_are_held_or_none() {
    let mut world = World::new(5);
    let (a, b, c) = (sample(1, 2), sample(2, 2), sample(3, 2));
    world.bring(&a);
    assert!(!world.hold(&[&a, &b, &c]));
    assert_eq!(world.pool.num_free(), 5);
    assert!(world.hold(&[&b, &a]));
    assert!(world.is_ready(&a), "the one that was there is not what makes room for the other");
    world.release(&a);
    world.release(&b);
    // It is not free before its load has ended.
    assert_eq!(world.pool.num_free(), 3);
    assert!(world.arrive(Ok(())).is_none());
    assert_eq!(world.pool.num_free(), 5);
}

#[test]
fn more_loads_than_the_queue_holds_are_not_begun() {
    let mut world = World::new(10);
    let adapters = [1, 2, 3].map(|digest| sample(digest, 2));
    assert!(world.hold(&[&adapters[0]]) && world.hold(&[&adapters[1]]));
    assert!(!world.hold(&[&adapters[0], &adapters[2]]));
    assert_eq!(world.pool.num_free(), 6);
    world.residency.check_integrity(2);
    assert!(world.arrive(Ok(())).is_none());
    assert!(world.hold(&[&adapters[2]]));
}

#[test]
fn a_failed_load_is_told_to_those_who_hold_it_and_tried_again_later() {
    let mut world = World::new(4);
    let a = sample(1, 3);
    assert!(world.hold(&[&a]));
    let failed = world.arrive(Err("the file is gone")).unwrap();
    assert_eq!((failed.adapter.digest(), failed.why.as_str()), (a.digest(), "the file is gone"));
    assert_eq!(world.pool.num_free(), 4);
    world.release(&a);
    assert!(world.residency.residents.is_empty());
    assert!(world.hold(&[&a]), "who comes next tries again");
    world.release(&a);
    assert!(world.arrive(Err("the file is gone")).is_none(), "nobody wants it any more");
    world.residency.check_integrity(0);
    assert_eq!((world.pool.num_free(), world.residency.metrics.adapters.load_failures.get()), (4, 2));
}

#[test]
fn an_adapter_that_nobody_can_name_makes_room_at_once() {
    let mut world = World::new(4);
    let a = sample(1, 3);
    world.bring(&a);
    drop(a);
    assert!(world.residency.poll(&mut world.pool).is_none());
    assert_eq!(world.num_resident(), 0);
    assert_eq!(world.num_evictions(Evictor::Kv), 0);
}
