//! One block: its warps, shared memory and barriers.

use super::isa::Special;
use super::lanes::LANES;
use super::launch::Launch;
use super::shared::Shared;
use super::warp::{Arrival, Stop, Warp};
use super::warpgroup::Issue;
use crate::counters::Counters;
use crate::fault::{Fault, FaultKind};
use crate::memory::Accessor;
use crate::rng::Rng;
use std::collections::HashMap;

/// Warp instructions before another warp has its turn.
pub(super) const SLICE: u32 = 20_000;

/// What the warps of a block share.
pub struct Block<'a> {
    /// The launch.
    pub launch: &'a Launch<'a>,
    /// Position in the grid.
    pub index: [u32; 3],
    /// Number in the cluster.
    pub rank: u32,
    /// Shared memory.
    pub shared: Shared,
    /// How global accesses are signed.
    pub by: Accessor,
    /// For other blocks, the fences of theirs that this block has seen through atomics.
    pub acquired: HashMap<u32, u32>,
    /// What the warps of each warpgroup have issued.
    pub products: Vec<Vec<Issue>>,
    /// Counters of this thread of the host.
    pub counters: Counters,
    fences: u32,
    linear: u32,
}

#[derive(Clone, Copy)]
enum State {
    Ready,
    Waiting(Arrival),
    /// At a barrier of the cluster, at this instruction.
    AtCluster(u32),
    Done,
}

/// A load from other blocks of the cluster that is still to be done, the only thing that a warp cannot do alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PeerLoad {
    pub(super) warp: usize,
    /// Its instruction.
    pub(super) pc: u32,
    /// Its lanes.
    pub(super) mask: u32,
}

/// What a block has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// Some warp can go on.
    Going,
    /// A warp reads what another block of the cluster has.
    PeerLoad(PeerLoad),
    /// Every warp waits for the cluster, the first one at this instruction.
    AtCluster(u32),
    /// Every warp has exited.
    Done,
}

/// A block with its warps.
pub(super) struct BlockRun<'a> {
    pub(super) block: Block<'a>,
    pub(super) warps: Vec<Warp>,
    states: Vec<State>,
    /// Of the warps in a turn.
    order: Vec<usize>,
    /// How many of them have had this turn.
    taken: usize,
}

impl<'a> BlockRun<'a> {
    /// Room for the blocks of a launch, one after the other.
    pub(super) fn new(launch: &'a Launch<'a>, shared: Shared, mut warps: Vec<Warp>) -> Self {
        warps.resize_with(launch.threads().div_ceil(LANES as u32) as usize, Warp::default);
        let block = Block {
            launch,
            index: [0; 3],
            rank: 0,
            shared,
            by: launch.by.clone(),
            acquired: HashMap::new(),
            products: vec![Vec::new(); launch.threads().div_ceil(4 * LANES as u32) as usize],
            counters: Counters::default(),
            fences: 0,
            linear: 0,
        };
        let order = (0..warps.len()).collect();
        Self { block, states: vec![State::Ready; warps.len()], warps, order, taken: 0 }
    }

    /// Begins the block at `index` of the grid, number `rank` of its cluster.
    pub(super) fn begin(&mut self, index: [u32; 3], rank: u32) {
        let block = &mut self.block;
        let launch = block.launch;
        let [gx, gy, _] = launch.grid;
        (block.index, block.rank) = (index, rank);
        block.linear = (index[2] * gy + index[1]) * gx + index[0];
        block.shared.begin_block();
        block.acquired.clear();
        block.products.iter_mut().for_each(Vec::clear);
        block.fences = 0;
        block.by.tag = launch.by.tag_base + (block.linear << launch.by.tag_shift);
        let threads = launch.threads();
        for (i, warp) in self.warps.iter_mut().enumerate() {
            let lanes = (threads - i as u32 * LANES as u32).min(LANES as u32);
            warp.begin(launch.kernel, i as u32, if lanes == 32 { u32::MAX } else { (1 << lanes) - 1 });
            for &(special, slot) in &launch.kernel.specials {
                warp.regs.r32[slot as usize] =
                    std::array::from_fn(|lane| special_value(&self.block, i as u32, lane as u32, special));
            }
        }
        self.states.fill(State::Ready);
        self.order.iter_mut().enumerate().for_each(|(i, warp)| *warp = i);
        self.taken = self.order.len();
    }

    /// Lets every warp that can go on do so for a slice, or one come to a load from another block, behind which the turn goes on.
    pub(super) fn turn(&mut self, rng: &mut Rng) -> Result<Turn, Fault> {
        let launch = self.block.launch;
        if self.taken == self.order.len() {
            rng.shuffle(&mut self.order, launch.seed != 0);
            self.taken = 0;
        }
        while let Some(&i) = self.order.get(self.taken) {
            while matches!(self.states[i], State::Ready) {
                self.states[i] = match launch.simd.run(&mut self.warps[i], &mut self.block, SLICE)? {
                    Stop::Done => State::Done,
                    Stop::Barrier(arrival) => State::Waiting(arrival),
                    Stop::ClusterBarrier(pc) => State::AtCluster(pc),
                    Stop::PeerLoad { pc, mask } => return Ok(Turn::PeerLoad(PeerLoad { warp: i, pc, mask })),
                    Stop::Slice => break,
                }
            }
            self.taken += 1;
        }
        if self.states.iter().any(|s| matches!(s, State::Ready)) {
            return Ok(Turn::Going);
        }
        if self.states.iter().any(|s| matches!(s, State::Waiting(_))) {
            return self.release().map(|()| Turn::Going);
        }
        self.all_stopped()
    }

    /// Adds the place of the first thread to a finding.
    pub(super) fn place(&self, pc: u32, fault: Fault) -> Fault {
        self.warps[0].place(&self.block, pc, 0, fault)
    }

    /// No warp is at a barrier of the block or can go on.
    fn all_stopped(&mut self) -> Result<Turn, Fault> {
        let at_cluster = |s: &State| if let State::AtCluster(pc) = s { Some(*pc) } else { None };
        let Some(i) = self.states.iter().position(|s| at_cluster(s).is_some()) else {
            self.check_warpgroups()?;
            self.block.counters.blocks += 1;
            return Ok(Turn::Done);
        };
        let pc = at_cluster(&self.states[i]).unwrap_or_default();
        if self.states.iter().all(|s| at_cluster(s).is_some()) {
            return Ok(Turn::AtCluster(pc));
        }
        let absent: Vec<usize> = (0..self.states.len()).filter(|&i| matches!(self.states[i], State::Done)).collect();
        let what = format!("warp {i} waits at a barrier of the cluster for warps {absent:?}, which have exited");
        Err(self.warps[i].place(&self.block, pc, 0, Fault::new(FaultKind::BarrierDivergence, what)))
    }

    /// The barrier of the cluster is complete.
    pub(super) fn pass_cluster_barrier(&mut self) {
        self.states.fill(State::Ready);
        self.block.shared.next_phase();
        self.block.counters.barriers += 1;
    }

    /// The warps of a warpgroup have issued the same products: those that the ones before issued.
    fn check_warpgroups(&self) -> Result<(), Fault> {
        for (i, warp) in self.warps.iter().enumerate() {
            let issued = self.block.products[i / 4].len();
            warp.products
                .check_count(i as u32, issued)
                .map_err(|fault| warp.place(&self.block, warp.products.pc, 0, fault))?;
        }
        Ok(())
    }

    /// Lets the warps of complete barriers go on; if there is none, they wait for ever.
    fn release(&mut self) -> Result<(), Fault> {
        let waiting: Vec<(usize, Arrival)> = self
            .states
            .iter()
            .enumerate()
            .filter_map(|(i, s)| if let State::Waiting(a) = s { Some((i, *a)) } else { None })
            .collect();
        let mut ids: Vec<u32> = waiting.iter().map(|(_, a)| a.id).collect();
        ids.sort_unstable();
        ids.dedup();
        let mut released = false;
        for id in ids {
            let group: Vec<(usize, Arrival)> = waiting.iter().copied().filter(|(_, a)| a.id == id).collect();
            if self.is_complete(&group)? {
                self.pass(&group);
                released = true;
            }
        }
        if released {
            return Ok(());
        }
        let (i, arrival) = waiting[0];
        let is_absent = |&i: &usize| !matches!(self.states[i], State::Waiting(_));
        let absent: Vec<usize> = (0..self.states.len()).filter(is_absent).collect();
        let what = format!(
            "warp {i} waits at barrier {} for warps {absent:?}, which have exited or wait for the cluster",
            arrival.id
        );
        Err(self.warps[i].place(&self.block, arrival.pc, 0, Fault::new(FaultKind::BarrierDivergence, what)))
    }

    fn is_complete(&self, group: &[(usize, Arrival)]) -> Result<bool, Fault> {
        let (first, arrival) = group[0];
        if let Some(count) = arrival.count {
            return Ok(group.len() as u32 * LANES as u32 >= count);
        }
        if let Some((other, a)) = group.iter().find(|(_, a)| a.pc != arrival.pc) {
            let kernel = self.block.launch.kernel;
            let what = format!(
                "warps {first} and {other} wait at different barriers: {} and {}",
                kernel.source(arrival.pc as usize),
                kernel.source(a.pc as usize)
            );
            return Err(self.warps[first].place(
                &self.block,
                arrival.pc,
                0,
                Fault::new(FaultKind::BarrierDivergence, what),
            ));
        }
        Ok(group.len() == self.warps.len())
    }

    fn pass(&mut self, group: &[(usize, Arrival)]) {
        let total: u32 = group.iter().map(|(_, a)| a.votes.count_ones()).sum();
        let all = total == self.block.launch.threads();
        for &(i, arrival) in group {
            self.warps[i].barrier_result(self.block.launch.kernel, arrival.pc, total, all);
            self.states[i] = State::Ready;
        }
        self.block.shared.next_epoch();
        self.block.counters.barriers += 1;
    }
}

impl Block<'_> {
    /// A fence: writes so far may be published by the next atomic.
    pub fn fence(&mut self) {
        let most = (1u32 << self.by.tag_shift) - 1;
        self.fences = (self.fences + 1).min(most);
        self.by.tag = self.launch.by.tag_base + (self.linear << self.by.tag_shift) + self.fences;
    }

    /// An atomic on `address`: publishes what was fenced, and learns what others have published there.
    pub fn synchronise(&mut self, address: u64) {
        if !self.launch.kernel.has_fence {
            return;
        }
        let mut released = self.launch.released.lock().unwrap_or_else(|e| e.into_inner());
        let at = released.entry(address).or_default();
        for (&block, &clock) in at.iter() {
            let seen = self.acquired.entry(block).or_default();
            *seen = (*seen).max(clock);
        }
        if self.fences > 0 {
            // What this block has learnt goes along.
            let learnt: Vec<(u32, u32)> = self.acquired.iter().map(|(&b, &c)| (b, c)).collect();
            for (block, clock) in learnt.into_iter().chain([(self.linear, self.fences)]) {
                let known = at.entry(block).or_default();
                *known = (*known).max(clock);
            }
        }
    }
}

fn special_value(block: &Block, warp: u32, lane: u32, special: Special) -> u32 {
    let launch = block.launch;
    let cluster = launch.kernel.cluster;
    match special {
        Special::Tid(axis) => launch.thread(warp * LANES as u32 + lane)[axis as usize],
        Special::Ntid(axis) => launch.block[axis as usize],
        Special::Ctaid(axis) => block.index[axis as usize],
        Special::Nctaid(axis) => launch.grid[axis as usize],
        Special::ClusterId(axis) => block.index[axis as usize] / cluster[axis as usize],
        Special::NumClusters(axis) => launch.grid[axis as usize] / cluster[axis as usize],
        Special::ClusterCtaid(axis) => block.index[axis as usize] % cluster[axis as usize],
        Special::ClusterNctaid(axis) => cluster[axis as usize],
        Special::ClusterRank => block.rank,
        Special::ClusterSize => launch.kernel.cluster_size(),
        Special::LaneId => lane,
        Special::WarpId => warp,
        Special::NumWarps => launch.threads().div_ceil(LANES as u32),
        Special::SmId => 0,
        Special::LaneMaskEq => 1 << lane,
        Special::LaneMaskLt => (1 << lane) - 1,
        Special::LaneMaskLe => u32::MAX >> (31 - lane),
        Special::LaneMaskGt => !(u32::MAX >> (31 - lane)),
        Special::LaneMaskGe => !((1 << lane) - 1),
        Special::DynamicShared => launch.dynamic_shared,
        Special::TotalShared => launch.dynamic_shared + launch.kernel.static_shared,
    }
}
