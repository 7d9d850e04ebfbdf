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
use std::sync::Mutex;

/// Warp instructions before another warp has its turn.
const SLICE: u32 = 20_000;
/// Turns of a block before it is taken for an endless loop.
const MAX_TURNS: u64 = 2_000_000;

/// What workers leave behind for later ones: to get fresh memory takes longer than many a launch.
static SPARE: Mutex<Vec<Spare>> = Mutex::new(Vec::new());
/// As many as there may be workers at a time, and kernels that programs launch in turn.
const MAX_SPARE: usize = 96;

#[derive(Default)]
struct Spare {
    shared: Shared,
    warps: Vec<Warp>,
    /// Whose registers they have.
    kernel: u64,
}

fn spare() -> std::sync::MutexGuard<'static, Vec<Spare>> {
    SPARE.lock().unwrap_or_else(|e| e.into_inner())
}

impl Spare {
    /// For a kernel, whose own registers need no preparing; where many are kept, else the one that was left longest ago.
    fn take(kernel: u64) -> Self {
        let mut spare = spare();
        match spare.iter().rposition(|spare| spare.kernel == kernel) {
            Some(at) => spare.remove(at),
            None if spare.len() == MAX_SPARE => spare.remove(0),
            None => Self::default(),
        }
    }
}

/// What the warps of a block share.
pub struct Block<'a> {
    /// The launch.
    pub launch: &'a Launch<'a>,
    /// Position in the grid.
    pub index: [u32; 3],
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
    Done,
}

/// A worker of the host: runs blocks one after the other, reusing registers and shared memory.
pub struct Worker<'a> {
    /// The block at hand.
    pub block: Block<'a>,
    warps: Vec<Warp>,
}

impl<'a> Worker<'a> {
    /// A worker for a launch.
    pub fn new(launch: &'a Launch<'a>) -> Self {
        let Spare { mut shared, mut warps, .. } = Spare::take(launch.kernel.id);
        launch.prepare(&mut shared);
        warps.resize_with(launch.threads().div_ceil(LANES as u32) as usize, Warp::default);
        let block = Block {
            launch,
            index: [0; 3],
            shared,
            by: launch.by.clone(),
            acquired: HashMap::new(),
            products: vec![Vec::new(); launch.threads().div_ceil(4 * LANES as u32) as usize],
            counters: Counters::default(),
            fences: 0,
            linear: 0,
        };
        Self { block, warps }
    }

    /// Runs block number `linear` to its end.
    ///
    /// # Errors
    /// The first finding.
    pub fn run(&mut self, linear: u32) -> Result<(), Fault> {
        let launch = self.block.launch;
        self.begin(linear);
        let mut rng = Rng::new(launch.seed ^ u64::from(linear) << 20);
        let mut states = vec![State::Ready; self.warps.len()];
        let mut order: Vec<usize> = (0..self.warps.len()).collect();
        for _ in 0..MAX_TURNS {
            rng.shuffle(&mut order, launch.seed != 0);
            for &i in &order {
                if matches!(states[i], State::Ready) {
                    states[i] = match launch.simd.run(&mut self.warps[i], &mut self.block, SLICE)? {
                        Stop::Done => State::Done,
                        Stop::Barrier(arrival) => State::Waiting(arrival),
                        Stop::Slice => State::Ready,
                    };
                }
            }
            if launch.is_stopped() {
                return Ok(());
            }
            if states.iter().all(|s| matches!(s, State::Done)) {
                self.check_warpgroups()?;
                self.block.counters.blocks += 1;
                return Ok(());
            }
            if !states.iter().any(|s| matches!(s, State::Ready)) {
                self.release(&mut states)?;
            }
        }
        let what = format!("block ran {} warp instructions without an end", MAX_TURNS * u64::from(SLICE));
        Err(self.warps[0].place(&self.block, 0, 0, Fault::new(FaultKind::Timeout, what)))
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

    fn begin(&mut self, linear: u32) {
        let block = &mut self.block;
        let launch = block.launch;
        let [gx, gy, _] = launch.grid;
        block.index = [linear % gx, linear / gx % gy, linear / gx / gy];
        block.linear = linear;
        block.shared.begin_block();
        block.acquired.clear();
        block.products.iter_mut().for_each(Vec::clear);
        block.fences = 0;
        block.by.tag = launch.by.tag_base + (linear << launch.by.tag_shift);
        let threads = launch.threads();
        for (i, warp) in self.warps.iter_mut().enumerate() {
            let lanes = (threads - i as u32 * LANES as u32).min(LANES as u32);
            warp.begin(launch.kernel, i as u32, if lanes == 32 { u32::MAX } else { (1 << lanes) - 1 });
            for &(special, slot) in &launch.kernel.specials {
                warp.regs.r32[slot as usize] =
                    std::array::from_fn(|lane| special_value(launch, block.index, i as u32, lane as u32, special));
            }
        }
    }

    /// Lets the warps of complete barriers go on; if there is none, they wait for ever.
    fn release(&mut self, states: &mut [State]) -> Result<(), Fault> {
        let waiting: Vec<(usize, Arrival)> = states
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
                self.pass(&group, states);
                released = true;
            }
        }
        if released {
            return Ok(());
        }
        let (i, arrival) = waiting[0];
        let absent: Vec<usize> =
            states.iter().enumerate().filter(|(_, s)| matches!(s, State::Done)).map(|(i, _)| i).collect();
        let what = format!("warp {i} waits at barrier {} for warps {absent:?}, which have exited", arrival.id);
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

    fn pass(&mut self, group: &[(usize, Arrival)], states: &mut [State]) {
        let total: u32 = group.iter().map(|(_, a)| a.votes.count_ones()).sum();
        let all = total == self.block.launch.threads();
        for &(i, arrival) in group {
            self.warps[i].barrier_result(self.block.launch.kernel, arrival.pc, total, all);
            states[i] = State::Ready;
        }
        self.block.shared.next_epoch();
        self.block.counters.barriers += 1;
    }
}

impl Drop for Worker<'_> {
    /// Where a block was left in its middle, memory is not what the next one may count on.
    fn drop(&mut self) {
        let mut spare = spare();
        if spare.len() < MAX_SPARE && !self.block.launch.is_stopped() && !std::thread::panicking() {
            let shared = std::mem::take(&mut self.block.shared);
            spare.push(Spare { shared, warps: std::mem::take(&mut self.warps), kernel: self.block.launch.kernel.id });
        }
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

fn special_value(launch: &Launch, block: [u32; 3], warp: u32, lane: u32, special: Special) -> u32 {
    match special {
        Special::Tid(axis) => launch.thread(warp * LANES as u32 + lane)[axis as usize],
        Special::Ntid(axis) => launch.block[axis as usize],
        Special::Ctaid(axis) => block[axis as usize],
        Special::Nctaid(axis) => launch.grid[axis as usize],
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
