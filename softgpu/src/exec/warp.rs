//! One warp: registers, divergence, the instruction loop.
//!
//! Divergence is a list of splits (pc, lanes). The split with the lowest pc runs; splits that meet at a pc merge. An
//! instruction in which lanes work together holds its split until every live lane that it names has arrived. When only
//! held splits are left, they can never meet: that is a finding.

use super::block::Block;
use super::isa::{CLUSTER_SHIFT, Kernel, Logic, NONE, Op, Pred};
use super::lanes::{LANES, Lane, Regs};
use super::warpgroup::Products;
use super::{async_copy, atomic, load_store};
use crate::fault::{Fault, FaultKind};

/// Lanes at one place in the program.
#[derive(Clone, Copy, Debug)]
pub(super) struct Split {
    pub(super) pc: u32,
    pub(super) mask: u32,
    held: bool,
}

/// A `cp.async` on its way.
#[derive(Clone, Copy, Debug)]
pub struct Pending {
    /// The lane that issued it.
    pub lane: u8,
    /// Shared address.
    pub target: u32,
    /// Bytes that arrive.
    pub bytes: u8,
    /// What arrives.
    pub data: [u8; 16],
}

/// A warp at a barrier of the block.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    /// Barrier number.
    pub id: u32,
    /// Threads that it waits for; `None` means the whole block.
    pub count: Option<u32>,
    /// Where.
    pub pc: u32,
    /// Lanes whose predicate holds, for `bar.red`.
    pub votes: u32,
}

/// Why a warp stopped.
#[derive(Clone, Copy, Debug)]
pub enum Stop {
    /// Every lane has exited.
    Done,
    /// At a barrier of its block.
    Barrier(Arrival),
    /// At a barrier of its cluster, at this instruction.
    ClusterBarrier(u32),
    /// Behind a load from other blocks of its cluster, which somebody who has them is to do.
    #[allow(missing_docs)]
    PeerLoad { pc: u32, mask: u32 },
    /// Its time slice is over.
    Slice,
}

/// The state of one warp.
#[derive(Debug, Default)]
pub struct Warp {
    /// Registers.
    pub regs: Regs,
    /// Whose they are; 0 for nobody's.
    kernel: u64,
    /// Number in the block.
    pub index: u32,
    pub(super) splits: Vec<Split>,
    /// Lanes that exist.
    pub(super) started: u32,
    /// Lanes that have not exited.
    pub(super) live: u32,
    /// Local memory, lane after lane.
    pub local: Vec<u8>,
    /// One byte per local byte: written.
    pub local_init: Vec<u8>,
    /// Copies issued and not committed.
    pub open_copies: Vec<Pending>,
    groups: std::collections::VecDeque<Vec<Pending>>,
    /// Where the last copy was issued, for messages.
    copy_pc: u32,
    /// Products of its warpgroup, as far as they are its own.
    pub products: Products,
    /// Why it has stopped in the middle of a slice.
    pub(super) stop: Option<Stop>,
}

/// What an instruction did to the flow of control.
pub(super) enum Flow {
    Next,
    Jumped,
    Diverged,
    Hold,
    /// As [`Warp::stop`] says.
    Stop,
}

pub(crate) type LaneResult<T> = load_store::Lanes<T>;

impl Warp {
    /// Makes the registers those of a kernel: zeros, and constants in their rows, which nothing writes to.
    fn take_rows(&mut self, kernel: &Kernel) {
        self.regs.r32.reset(kernel.rows[0]);
        self.regs.r64.reset(kernel.rows[1]);
        self.regs.p.clear();
        self.local.clear();
        self.regs.p.resize(kernel.rows[2], 0);
        kernel.consts32.iter().for_each(|&(slot, value)| self.regs.r32[slot as usize] = [value; LANES]);
        kernel.consts64.iter().for_each(|&(slot, value)| self.regs.r64[slot as usize] = [value; LANES]);
        self.kernel = kernel.id;
    }

    /// Prepares the warp for a block: `started` lanes at the first instruction.
    pub fn begin(&mut self, kernel: &Kernel, index: u32, started: u32) {
        if self.kernel != kernel.id {
            self.take_rows(kernel);
        }
        self.splits.clear();
        self.splits.push(Split { pc: 0, mask: started, held: false });
        (self.index, self.started, self.live) = (index, started, started);
        let local = kernel.local_bytes as usize * LANES;
        self.local.resize(local, 0);
        self.local_init.clear();
        self.local_init.resize(local, 0);
        self.open_copies.clear();
        self.groups.clear();
        self.products.begin();
    }

    /// Runs until a barrier, the end or `slice` instructions. All that it does often is compiled together with it, for
    /// one instruction set after the other ([`super::simd`]).
    ///
    /// # Errors
    /// A finding, with the place.
    #[inline(always)]
    pub fn run(&mut self, block: &mut Block, slice: u32) -> Result<Stop, Fault> {
        let mut left = slice;
        loop {
            let Some(at) = self.pick() else {
                if self.splits.is_empty() {
                    return self.finish(block).map(|()| Stop::Done);
                }
                return Err(self.stuck(block));
            };
            let limit = self
                .splits
                .iter()
                .filter(|s| s.pc != self.splits[at].pc)
                .map(|s| s.pc)
                .filter(|&pc| pc > self.splits[at].pc)
                .min();
            if let Some(stop) = self.run_split(block, at, limit.unwrap_or(u32::MAX), &mut left)? {
                return Ok(stop);
            }
            if left == 0 {
                return Ok(Stop::Slice);
            }
        }
    }

    /// Merges splits that have met and picks the lowest that is not held.
    fn pick(&mut self) -> Option<usize> {
        let mut i = 0;
        while i < self.splits.len() {
            let Split { pc, .. } = self.splits[i];
            if let Some(first) = self.splits[..i].iter().position(|s| s.pc == pc) {
                let other = self.splits.swap_remove(i);
                self.splits[first].mask |= other.mask;
                self.splits[first].held = false;
            } else {
                i += 1;
            }
        }
        (0..self.splits.len()).filter(|&i| !self.splits[i].held).min_by_key(|&i| self.splits[i].pc)
    }

    #[inline(always)]
    fn run_split(&mut self, block: &mut Block, at: usize, limit: u32, left: &mut u32) -> Result<Option<Stop>, Fault> {
        let kernel = block.launch.kernel;
        loop {
            let Split { pc, mask, .. } = self.splits[at];
            let inst = &kernel.insts[pc as usize];
            let active = match inst.guard {
                None => mask,
                Some(guard) => mask & self.predicate(guard),
            };
            block.counters.warp_instructions += 1;
            block.counters.lane_instructions += u64::from(active.count_ones());
            *left = left.saturating_sub(1);
            let flow = if let Op::Alu { op, d, s } = inst.op {
                block.launch.simd.alu(op, &mut self.regs, d, s, active);
                Flow::Next
            } else {
                self.step(block, &inst.op, at, active).map_err(|(lane, fault)| self.place(block, pc, lane, fault))?
            };
            match flow {
                Flow::Next => self.splits[at].pc = pc + 1,
                Flow::Jumped => {}
                Flow::Diverged => return Ok(None),
                Flow::Hold => {
                    block.counters.warp_instructions -= 1;
                    block.counters.lane_instructions -= u64::from(active.count_ones());
                    self.splits[at].held = true;
                    return Ok(None);
                }
                Flow::Stop => {
                    self.splits[at].pc = pc + 1;
                    return Ok(self.stop.take());
                }
            }
            if *left == 0 || self.splits[at].pc >= limit {
                return Ok(None);
            }
        }
    }

    #[inline(always)]
    pub(super) fn predicate(&self, p: Pred) -> u32 {
        let bits = self.regs.p[p.slot as usize];
        if p.negated { !bits } else { bits }
    }

    #[inline(always)]
    pub(super) fn set_predicate(&mut self, slot: u16, bits: u32, mask: u32) {
        if slot != NONE {
            let row = &mut self.regs.p[slot as usize];
            *row = *row & !mask | bits & mask;
        }
    }

    #[inline(always)]
    fn step(&mut self, block: &mut Block, op: &Op, at: usize, mask: u32) -> LaneResult<Flow> {
        match op {
            Op::Branch { target } => return Ok(self.branch(at, mask, *target)),
            Op::BranchTable { index, targets } => return self.branch_table(at, mask, *index, targets),
            Op::Exit => return Ok(self.exit(at, mask)),
            _ if mask == 0 => {}
            Op::Load(access) => load_store::load(self, block, access, mask)?,
            Op::Store(access) => load_store::store(self, block, access, mask)?,
            Op::PeerLoad(_) => {
                self.stop = Some(Stop::PeerLoad { pc: self.splits[at].pc, mask });
                return Ok(Flow::Stop);
            }
            Op::PeerAddress { d, a, rank } => self.peer_address(block, *d, *a, *rank, mask)?,
            Op::Atomic(atomic) => atomic::atomic(self, block, atomic, mask)?,
            Op::AsyncCopy(copy) => {
                self.copy_pc = self.splits[at].pc;
                async_copy::async_copy(self, block, copy, mask)?;
            }
            Op::AsyncCommit => self.commit_copies(mask),
            Op::AsyncWait { groups } => self.wait_copies(block, mask, *groups as usize),
            Op::AsyncWaitAll => {
                self.commit_copies(mask);
                self.wait_copies(block, mask, 0);
            }
            Op::Fence => block.fence(),
            Op::ProxyFence => block.shared.proxy_fence(self.index, mask),
            Op::Nop => {}
            Op::Trap => return Err((first(mask), Fault::new(FaultKind::Assert, "trap"))),
            Op::Assert { message, file, line } => return Err(self.assertion(block, mask, *message, *file, *line)),
            Op::SetPredicate(set) => {
                let holds = block.launch.simd.compare(set, &self.regs);
                let other = set.combine.map(|(logic, p)| (logic, self.predicate(p)));
                let with = |bits: u32| other.map_or(bits, |(logic, p)| apply(logic, bits, p));
                self.set_predicate(set.p, with(holds), mask);
                self.set_predicate(set.q, with(!holds), mask);
            }
            Op::Select { wide, d, a, b, p } => self.select(*wide, *d, *a, *b, self.predicate(*p), mask),
            Op::Logic { op, d, a, b } => {
                self.set_predicate(*d, apply(*op, self.predicate(*a), self.predicate(*b)), mask)
            }
            Op::MovPredicate { d, a } => self.set_predicate(*d, self.predicate(*a), mask),
            Op::AluFlush { op, d, s, count, ftz, sat, flush_result } => {
                let (flush, result) = ((*ftz, *sat), *flush_result);
                self.alu_flush(block, (*op, *d, *s), *count, flush, result, mask);
            }
            Op::Clock { d, wide } => self.clock(block, *d, *wide, mask),
            Op::Lop3 { d, a, b, c, table } => self.lop3(*d, [*a, *b, *c], *table, mask),
            Op::Pack { d, wide, parts, count } => self.pack(*d, *wide, &parts[..*count as usize], mask),
            Op::Unpack { s, wide, parts, count } => self.unpack(*s, *wide, &parts[..*count as usize], mask),
            Op::Insert { .. } | Op::Convert { .. } => self.lane_by_lane(op, mask),
            Op::Alu { op, d, s } => block.launch.simd.alu(*op, &mut self.regs, *d, *s, mask),
            _ => return self.together(block, op, at, mask),
        }
        Ok(Flow::Next)
    }

    #[inline(always)]
    fn branch(&mut self, at: usize, taken: u32, target: u32) -> Flow {
        let Split { pc, mask, .. } = self.splits[at];
        if taken == 0 {
            return Flow::Next;
        }
        self.splits[at].pc = target;
        if self.splits.len() == 1 && taken == mask {
            return Flow::Jumped;
        }
        if taken != mask {
            self.splits[at].mask = taken;
            self.splits.push(Split { pc: pc + 1, mask: mask & !taken, held: false });
        }
        Flow::Diverged
    }

    fn branch_table(&mut self, at: usize, mask: u32, index: u16, targets: &[u32]) -> LaneResult<Flow> {
        if mask == 0 {
            return Ok(Flow::Next);
        }
        let Split { pc, mask: all, .. } = self.splits.swap_remove(at);
        if all != mask {
            self.splits.push(Split { pc: pc + 1, mask: all & !mask, held: false });
        }
        for lane in (0..LANES).filter(|lane| mask >> lane & 1 == 1) {
            let index = self.regs.r32[index as usize][lane];
            let Some(&pc) = targets.get(index as usize) else {
                return Err((lane, Fault::new(FaultKind::OutOfBounds, format!("branch table index {index}"))));
            };
            self.splits.push(Split { pc, mask: 1 << lane, held: false });
        }
        Ok(Flow::Diverged)
    }

    fn exit(&mut self, at: usize, mask: u32) -> Flow {
        if mask == 0 {
            return Flow::Next;
        }
        self.live &= !mask;
        self.splits[at].mask &= !mask;
        self.splits[at].pc += 1;
        if self.splits[at].mask == 0 {
            self.splits.swap_remove(at);
        }
        // The held ones wait for fewer lanes now.
        self.splits.iter_mut().for_each(|split| split.held = false);
        Flow::Diverged
    }

    fn finish(&self, block: &Block) -> Result<(), Fault> {
        let left = self.open_copies.first().or_else(|| self.groups.iter().flatten().next());
        if let Some(copy) = left {
            let what = format!("cp.async to shared address {:#x} is never waited for", copy.target);
            return Err(self.place(block, self.copy_pc, copy.lane as usize, Fault::new(FaultKind::AsyncCopy, what)));
        }
        self.products.left().map_or(Ok(()), |fault| Err(self.place(block, self.products.pc, 0, fault)))
    }

    fn commit_copies(&mut self, mask: u32) {
        let (mine, others) = self.open_copies.iter().partition(|copy| mask >> copy.lane & 1 == 1);
        self.open_copies = others;
        self.groups.push_back(mine);
    }

    fn wait_copies(&mut self, block: &mut Block, mask: u32, groups: usize) {
        let done = self.groups.len().saturating_sub(groups);
        let index = self.index;
        for group in self.groups.iter_mut().take(done) {
            group.retain(|copy| {
                let lands = mask >> copy.lane & 1 == 1;
                if lands {
                    let by = (index, copy.lane as usize);
                    block.shared.land(u64::from(copy.target), &copy.data[..copy.bytes as usize], by);
                }
                !lands
            });
        }
        while self.groups.len() > groups && self.groups.front().is_some_and(Vec::is_empty) {
            self.groups.pop_front();
        }
    }

    /// `mapa`: where what lies at `a` in the block's shared memory lies in that of another block of the cluster.
    fn peer_address(&mut self, block: &Block, d: u16, a: u16, rank: u16, mask: u32) -> LaneResult<()> {
        let size = block.launch.kernel.cluster_size();
        let (mut at, ranks) = (self.regs.r32[a as usize], self.regs.r32[rank as usize]);
        for lane in load_store::lanes(mask) {
            if ranks[lane] >= size {
                let what = format!("block {} of a cluster of {size}", ranks[lane]);
                return Err((lane, Fault::new(FaultKind::OutOfBounds, what)));
            }
            at[lane] = at[lane] & ((1 << CLUSTER_SHIFT) - 1) | (ranks[lane] + 1) << CLUSTER_SHIFT;
        }
        <u32 as Lane>::store(&mut self.regs, d, &at, mask);
        Ok(())
    }

    fn assertion(&self, block: &Block, mask: u32, message: u16, file: u16, line: u16) -> (usize, Fault) {
        let lane = first(mask);
        let text = |slot: u16| block.launch.text(self.regs.r64[slot as usize][lane]);
        let line = self.regs.r32[line as usize][lane];
        (lane, Fault::new(FaultKind::Assert, format!("assertion `{}` failed, {}:{line}", text(message), text(file))))
    }

    /// Adds kernel, line, block and thread to a finding.
    #[cold]
    pub fn place(&self, block: &Block, pc: u32, lane: usize, fault: Fault) -> Fault {
        let kernel = block.launch.kernel;
        let thread = block.launch.thread(self.index * LANES as u32 + lane as u32);
        let [x, y, z] = block.index;
        fault.at(format!(
            "kernel {}, {}, block ({x}, {y}, {z}), thread ({}, {}, {})",
            kernel.name,
            kernel.source(pc as usize),
            thread[0],
            thread[1],
            thread[2]
        ))
    }

    /// Only held splits are left: they wait for each other.
    fn stuck(&self, block: &Block) -> Fault {
        let kernel = block.launch.kernel;
        let at = |split: &Split| format!("lanes {:#010x} at {}", split.mask, kernel.source(split.pc as usize));
        let places: Vec<String> = self.splits.iter().map(at).collect();
        let split = self.splits[0];
        let kind = if self.splits.iter().all(|s| kernel.insts[s.pc as usize].op.is_barrier()) {
            FaultKind::BarrierDivergence
        } else {
            FaultKind::InactiveLane
        };
        let what =
            format!("lanes of warp {} wait for each other and can never meet: {}", self.index, places.join("; "));
        self.place(block, split.pc, first(split.mask), Fault::new(kind, what))
    }
}

/// The lowest lane of a mask.
#[inline(always)]
pub(super) fn first(mask: u32) -> usize {
    (mask.trailing_zeros() as usize).min(LANES - 1)
}

#[inline(always)]
fn apply(logic: Logic, a: u32, b: u32) -> u32 {
    match logic {
        Logic::And => a & b,
        Logic::Or => a | b,
        Logic::Xor => a ^ b,
    }
}
