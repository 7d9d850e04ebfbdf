//! The blocks of a cluster, which run on one thread of the host: barriers of the cluster, and loads from each other's shared
//! memory. A kernel without clusters has clusters of one block.

use super::block::{BlockRun, PeerLoad, SLICE, Turn};
use super::isa::{CLUSTER_SHIFT, Op};
use super::lanes::LANES;
use super::launch::Launch;
use super::load_store::{self, Lanes, Values, lanes};
use super::shared::Shared;
use super::warp::Warp;
use crate::counters::Counters;
use crate::fault::{Fault, FaultKind};
use crate::rng::Rng;
use std::sync::Mutex;

/// Turns of a cluster before it is taken for an endless loop.
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

/// A worker of the host: runs clusters one after the other, reusing registers and shared memory.
pub struct Worker<'a> {
    launch: &'a Launch<'a>,
    /// In order of their ranks.
    blocks: Vec<BlockRun<'a>>,
    /// Of the blocks in a turn.
    order: Vec<usize>,
}

impl<'a> Worker<'a> {
    /// A worker for a launch.
    pub fn new(launch: &'a Launch<'a>) -> Self {
        let size = launch.kernel.cluster_size() as usize;
        let block = |_| {
            let Spare { mut shared, warps, .. } = Spare::take(launch.kernel.id);
            launch.prepare(&mut shared);
            BlockRun::new(launch, shared, warps)
        };
        Self { launch, blocks: (0..size).map(block).collect(), order: (0..size).collect() }
    }

    /// What all blocks so far have counted.
    pub fn counters(&self) -> Counters {
        let mut all = Counters::default();
        self.blocks.iter().for_each(|run| all += run.block.counters);
        all
    }

    /// Runs cluster number `linear` to its end.
    ///
    /// # Errors
    /// The first finding.
    pub fn run(&mut self, linear: u32) -> Result<(), Fault> {
        let launch = self.launch;
        for (rank, run) in (0..).zip(&mut self.blocks) {
            run.begin(launch.block_of(linear, rank), rank);
        }
        let mut rng = Rng::new(launch.seed ^ u64::from(linear) << 20);
        self.order.iter_mut().enumerate().for_each(|(i, block)| *block = i);
        let mut turns = vec![Turn::Going; self.blocks.len()];
        for _ in 0..MAX_TURNS {
            if self.order.len() > 1 {
                rng.shuffle(&mut self.order, launch.seed != 0);
            }
            for at in 0..self.order.len() {
                let i = self.order[at];
                if turns[i] == Turn::Going {
                    turns[i] = self.turn(i, &mut rng)?;
                }
            }
            if launch.is_stopped() {
                return Ok(());
            }
            if turns.iter().all(|turn| *turn == Turn::Done) {
                return self.check_exits();
            }
            if !turns.contains(&Turn::Going) {
                self.pass_barrier(&mut turns)?;
            }
        }
        let what = format!("block ran {} warp instructions without an end", MAX_TURNS * u64::from(SLICE));
        Err(self.blocks[0].place(0, Fault::new(FaultKind::Timeout, what)))
    }

    fn turn(&mut self, i: usize, rng: &mut Rng) -> Result<Turn, Fault> {
        let turn = self.blocks[i].turn(rng)?;
        let Turn::PeerLoad(load) = turn else { return Ok(turn) };
        self.peer_load(i, load).map_err(|(lane, fault)| {
            self.blocks[i].warps[load.warp].place(&self.blocks[i].block, load.pc, lane, fault)
        })?;
        Ok(Turn::Going)
    }

    /// A load of a warp of block `i` from the shared memory of others of the cluster.
    fn peer_load(&mut self, i: usize, load: PeerLoad) -> Lanes<()> {
        let Op::PeerLoad(access) = &self.launch.kernel.insts[load.pc as usize].op else { return Ok(()) };
        let width = u64::from(access.bytes) * u64::from(access.count);
        let mut at = load_store::addresses(&self.blocks[i].warps[load.warp].regs, access.address);
        load_store::check_alignment(&at, load.mask, width)?;
        let mut ranks = [i; LANES];
        for lane in lanes(load.mask) {
            // What no `mapa` has made is the block's own.
            ranks[lane] = (at[lane] >> CLUSTER_SHIFT).checked_sub(1).map_or(i, |rank| rank as usize);
            at[lane] &= (1 << CLUSTER_SHIFT) - 1;
        }
        let mut values: Values = [[0; 16]; LANES];
        for rank in 0..self.blocks.len() {
            let mask = lanes(load.mask).filter(|&lane| ranks[lane] == rank).fold(0, |mask, lane| mask | 1 << lane);
            if mask == 0 {
                continue;
            }
            if rank == i {
                let BlockRun { block, warps, .. } = &mut self.blocks[i];
                load_store::read_shared(&warps[load.warp], block, &at, mask, width, &mut values)?;
                continue;
            }
            load_store::count_shared(&mut self.blocks[i].block, &at, mask, width);
            self.blocks[i].block.counters.peer_load_bytes += width * u64::from(mask.count_ones());
            for lane in lanes(mask) {
                let read = self.blocks[rank].block.shared.read_for_peer(at[lane], width, i as u32);
                values[lane][..width as usize].copy_from_slice(read.map_err(|fault| (lane, fault))?);
            }
        }
        load_store::scatter(&mut self.blocks[i].warps[load.warp].regs, access, load.mask, &values);
        Ok(())
    }

    /// Every block has exited or waits for the cluster.
    fn pass_barrier(&mut self, turns: &mut [Turn]) -> Result<(), Fault> {
        let absent: Vec<usize> = (0..turns.len()).filter(|&i| turns[i] == Turn::Done).collect();
        if let Some((i, pc)) = turns.iter().enumerate().find_map(|(i, turn)| match turn {
            Turn::AtCluster(pc) if !absent.is_empty() => Some((i, *pc)),
            _ => None,
        }) {
            let what =
                format!("a barrier of the cluster, at which blocks {absent:?} of it have not been before they exited");
            return Err(self.blocks[i].place(pc, Fault::new(FaultKind::BarrierDivergence, what)));
        }
        self.blocks.iter_mut().for_each(BlockRun::pass_cluster_barrier);
        turns.fill(Turn::Going);
        Ok(())
    }

    fn check_exits(&self) -> Result<(), Fault> {
        let end = self.launch.kernel.insts.len() as u32;
        self.blocks.iter().try_for_each(|run| run.block.shared.check_exit().map_err(|fault| run.place(end, fault)))
    }
}

impl Drop for Worker<'_> {
    /// Where a block was left in its middle, memory is not what the next one may count on.
    fn drop(&mut self) {
        if self.launch.is_stopped() || std::thread::panicking() {
            return;
        }
        let mut spare = spare();
        for run in self.blocks.drain(..) {
            if spare.len() < MAX_SPARE {
                let (shared, warps) = (run.block.shared, run.warps);
                spare.push(Spare { shared, warps, kernel: self.launch.kernel.id });
            }
        }
    }
}
