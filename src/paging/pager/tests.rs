//! Blocks of the host land before they are whole, and what is erased is zeroed there and on the device, whatever is under way.

use super::*;
use crate::backend::sim::{SimBackend, SimEvent};
use crate::backend::{DType, KvLayout, Landing};

const BLOCK_BYTES: usize = 64;

/// A host tier of two slots, and block 0 of the device copied there.
struct World {
    pager: Pager,
    waker: Receiver<()>,
    arena: Arc<HostArena<Vec<u8>>>,
    hash: BlockHash,
}

impl World {
    fn new() -> Self {
        Self::with(BLOCK_BYTES, None)
    }

    fn with(block_bytes: usize, layout: Option<KvLayout>) -> Self {
        let device = SimBackend::default();
        let blocks = device.allocate(2 * block_bytes).unwrap();
        let fill = &mut |bytes: &mut [u8]| {
            bytes.fill(7);
            Ok(())
        };
        device.create_transfer().unwrap().fill(&blocks, 0, block_bytes, fill).unwrap();
        let (wake, waker) = bounded(1);
        let config = PagingConfig {
            block_bytes,
            block_size: 1,
            layout,
            num_host_blocks: 2,
            host_slab_bytes: 0,
            num_threads: 1,
            open: None,
        };
        let arena = Arc::new(HostArena::new(2, block_bytes, 0));
        let pager = Pager::start_over(&device, (&blocks, 2), Arc::clone(&arena), config, &wake).unwrap();
        let hash = BlockHash::root(b"model", b"").child(&[1]);
        let mut world = Self { pager, waker, arena, hash };
        assert!(world.pager.save(hash, &[1], BlockId(0), Tier::Host, Level::default()).is_some());
        world
    }

    fn next(&mut self) -> Completion {
        loop {
            match self.pager.poll() {
                Some(completion) => return completion,
                None => self.waker.recv().unwrap(),
            }
        }
    }

    fn set_bytes(&self) -> usize {
        (0..2).map(|slot| self.arena.lock(BlockId(slot)).bytes().iter().filter(|byte| **byte != 0).count()).sum()
    }
}

#[test]
fn blocks_that_land_can_be_used_before_they_are_whole() {
    let layout = KvLayout::new(2, 1, 16, 16, DType::BF16).unwrap();
    let mut world = World::with(layout.block_bytes(), Some(layout));
    assert!(matches!(world.next(), Completion::Saved { is_there: true, .. }));
    let (ticket, hash) = (world.pager.new_ticket(), world.hash);
    let unknown = hash.child(&[2]);
    assert!(!world.pager.land(ticket, [(hash, &[1][..], BlockId(1)), (unknown, &[2], BlockId(0))].into_iter()));
    world.pager.check_integrity(0, 0);
    assert!(world.pager.land(ticket, [(hash, &[1][..], BlockId(1))].into_iter()));
    world.pager.check_integrity(0, 1);
    let Completion::Landing { landing, .. } = world.next() else { panic!("blocks that land say so first") };
    let landing = landing.downcast::<Landing<SimEvent>>().unwrap();
    assert!([0, 1].iter().all(|layer| landing.event_before(*layer).is_some()));
    assert!(matches!(world.next(), Completion::Loaded { block: BlockId(1), is_whole: true, .. }));
    world.pager.check_integrity(0, 0);
}

/// Where nobody knows how a block is divided it comes up whole.
#[test]
fn nothing_lands_without_a_layout() {
    assert!(!World::new().pager.can_land());
}

#[test]
fn an_erased_slot_is_zeroed_and_not_found() {
    let mut world = World::new();
    // On its way down: ask again later.
    let hash = world.hash;
    let _ = world.pager.erase(&hash);
    assert!(matches!(world.next(), Completion::Saved { is_there: true, .. }));
    assert_eq!((world.pager.find(&hash, &[1]), world.set_bytes()), (Some(Tier::Host), BLOCK_BYTES));
    assert!(world.pager.erase(&hash));
    assert_eq!(world.pager.find(&hash, &[1]), None);
    while world.pager.num_unwiped() > 0 {
        assert!(world.pager.poll().is_none());
        world.pager.check_integrity(0, 0);
    }
    assert_eq!(world.set_bytes(), 0);
}

#[test]
fn a_slot_that_is_read_is_zeroed_afterwards() {
    let mut world = World::new();
    assert!(matches!(world.next(), Completion::Saved { is_there: true, .. }));
    let (ticket, hash) = (world.pager.new_ticket(), world.hash);
    assert!(world.pager.load(ticket, hash, &[1], BlockId(1)));
    assert!(world.pager.erase(&hash));
    assert!(matches!(world.next(), Completion::Loaded { is_whole: true, .. }));
    while world.pager.num_unwiped() > 0 {
        assert!(world.pager.poll().is_none());
    }
    assert_eq!(world.set_bytes(), 0);
}

#[test]
fn a_device_block_is_zeroed() {
    let mut world = World::new();
    assert!(matches!(world.next(), Completion::Saved { is_there: true, .. }));
    assert!(world.pager.wipe(BlockId(0)));
    assert!(matches!(world.next(), Completion::Wiped { block: BlockId(0) }));
    let other = BlockHash::root(b"model", b"").child(&[2]);
    assert!(world.pager.save(other, &[2], BlockId(0), Tier::Host, Level::default()).is_some());
    assert!(matches!(world.next(), Completion::Saved { is_there: true, .. }));
    assert_eq!(world.set_bytes(), BLOCK_BYTES, "the one slot holds zeros, the other what was there before");
}
