//! One warp: registers, divergence, the instruction loop.
//!
//! Divergence is a list of splits (pc, lanes). The split with the lowest pc runs; splits that meet at a pc merge. An
//! instruction in which lanes work together holds its split until every live lane that it names has arrived. When only
//! held splits are left, they can never meet: that is a finding.

use super::alu::{self, Alu};
use super::block::Block;
use super::convert::convert;
use super::isa::{AtomOp, Kernel, Logic, NONE, Op, Pred, Shuffle, Vote};
use super::lanes::{FULL, LANES, Regs};
use super::load_store::{self, combine};
use super::simd;
use crate::exec::isa::NumType;
use crate::fault::{Fault, FaultKind};

/// Lanes at one place in the program.
#[derive(Clone, Copy, Debug)]
struct Split {
    pc: u32,
    mask: u32,
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
    /// At a barrier.
    Barrier(Arrival),
    /// Its time slice is over.
    Slice,
}

/// The state of one warp.
#[derive(Debug, Default)]
pub struct Warp {
    /// Registers.
    pub regs: Regs,
    /// Number in the block.
    pub index: u32,
    splits: Vec<Split>,
    /// Lanes that exist.
    started: u32,
    /// Lanes that have not exited.
    live: u32,
    /// Local memory, lane after lane.
    pub local: Vec<u8>,
    /// One byte per local byte: written.
    pub local_init: Vec<u8>,
    /// Copies issued and not committed.
    pub open_copies: Vec<Pending>,
    groups: std::collections::VecDeque<Vec<Pending>>,
    /// Where the last copy was issued, for messages.
    copy_pc: u32,
}

/// What an instruction did to the flow of control.
enum Flow {
    Next,
    Jumped,
    Diverged,
    Hold,
    Stop(Arrival),
}

type LaneResult<T> = load_store::Lanes<T>;

impl Warp {
    /// Prepares the warp for a block: `started` lanes at the first instruction, constants in their rows.
    pub fn begin(&mut self, kernel: &Kernel, index: u32, started: u32) {
        self.regs.r32.resize(kernel.rows.0, [0; LANES]);
        self.regs.r64.resize(kernel.rows.1, [0; LANES]);
        self.regs.p.resize(kernel.rows.2, 0);
        kernel.consts32.iter().for_each(|&(slot, value)| self.regs.r32[slot as usize] = [value; LANES]);
        kernel.consts64.iter().for_each(|&(slot, value)| self.regs.r64[slot as usize] = [value; LANES]);
        self.splits.clear();
        self.splits.push(Split { pc: 0, mask: started, held: false });
        (self.index, self.started, self.live) = (index, started, started);
        let local = kernel.local_bytes as usize * LANES;
        self.local.resize(local, 0);
        self.local_init.clear();
        self.local_init.resize(local, 0);
        self.open_copies.clear();
        self.groups.clear();
    }

    /// Runs until a barrier, the end or `slice` instructions.
    ///
    /// # Errors
    /// A finding, with the place.
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
                return Ok(Stop::Barrier(stop));
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

    fn run_split(
        &mut self,
        block: &mut Block,
        at: usize,
        limit: u32,
        left: &mut u32,
    ) -> Result<Option<Arrival>, Fault> {
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
                Flow::Stop(arrival) => {
                    self.splits[at].pc = pc + 1;
                    return Ok(Some(arrival));
                }
            }
            if *left == 0 || self.splits[at].pc >= limit {
                return Ok(None);
            }
        }
    }

    fn predicate(&self, p: Pred) -> u32 {
        let bits = self.regs.p[p.slot as usize];
        if p.negated { !bits } else { bits }
    }

    fn set_predicate(&mut self, slot: u16, bits: u32, mask: u32) {
        if slot != NONE {
            let row = &mut self.regs.p[slot as usize];
            *row = *row & !mask | bits & mask;
        }
    }

    fn step(&mut self, block: &mut Block, op: &Op, at: usize, mask: u32) -> LaneResult<Flow> {
        match op {
            Op::Branch { target } => return Ok(self.branch(at, mask, *target)),
            Op::BranchTable { index, targets } => return self.branch_table(at, mask, *index, targets),
            Op::Exit => return Ok(self.exit(at, mask)),
            _ if mask == 0 => {}
            Op::Load(access) => load_store::load(self, block, access, mask)?,
            Op::Store(access) => load_store::store(self, block, access, mask)?,
            Op::Atomic(atomic) => load_store::atomic(self, block, atomic, mask)?,
            Op::AsyncCopy(copy) => {
                self.copy_pc = self.splits[at].pc;
                load_store::async_copy(self, block, copy, mask)?;
            }
            Op::AsyncCommit => self.commit_copies(mask),
            Op::AsyncWait { groups } => self.wait_copies(block, mask, *groups as usize),
            Op::AsyncWaitAll => {
                self.commit_copies(mask);
                self.wait_copies(block, mask, 0);
            }
            Op::Fence => block.fence(),
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
            Op::Lop3 { .. } | Op::Insert { .. } | Op::Convert { .. } | Op::Pack { .. } | Op::Unpack { .. } => {
                self.lane_by_lane(op, mask);
            }
            Op::Alu { op, d, s } => block.launch.simd.alu(*op, &mut self.regs, *d, *s, mask),
            _ => return self.together(block, op, at, mask),
        }
        Ok(Flow::Next)
    }

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
        let Some(copy) = left else { return Ok(()) };
        let what = format!("cp.async to shared address {:#x} is never waited for", copy.target);
        Err(self.place(block, self.copy_pc, copy.lane as usize, Fault::new(FaultKind::AsyncCopy, what)))
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
                    block.shared.land(u64::from(copy.target), &copy.data[..copy.bytes as usize], index);
                }
                !lands
            });
        }
        while self.groups.len() > groups && self.groups.front().is_some_and(Vec::is_empty) {
            self.groups.pop_front();
        }
    }

    fn assertion(&self, block: &Block, mask: u32, message: u16, file: u16, line: u16) -> (usize, Fault) {
        let lane = first(mask);
        let text = |slot: u16| block.launch.text(self.regs.r64[slot as usize][lane]);
        let line = self.regs.r32[line as usize][lane];
        (lane, Fault::new(FaultKind::Assert, format!("assertion `{}` failed, {}:{line}", text(message), text(file))))
    }

    fn select(&mut self, wide: bool, d: u16, a: u16, b: u16, p: u32, mask: u32) {
        let pick = |lane: usize| p >> lane & 1 == 1;
        if wide {
            let (a, b) = (self.regs.r64[a as usize], self.regs.r64[b as usize]);
            let out: [u64; LANES] = std::array::from_fn(|i| if pick(i) { a[i] } else { b[i] });
            <u64 as super::lanes::Lane>::store(&mut self.regs, d, &out, mask);
        } else {
            let (a, b) = (self.regs.r32[a as usize], self.regs.r32[b as usize]);
            let out: [u32; LANES] = std::array::from_fn(|i| if pick(i) { a[i] } else { b[i] });
            <u32 as super::lanes::Lane>::store(&mut self.regs, d, &out, mask);
        }
    }

    /// Sources go through scratch rows 0 to 2 flushed; the result is flushed and clamped in its row.
    fn alu_flush(
        &mut self,
        block: &Block,
        (op, d, mut s): (Alu, u16, [u16; 3]),
        count: u8,
        (ftz, sat): (bool, bool),
        flush_result: bool,
        mask: u32,
    ) {
        if ftz {
            for i in 0..count as usize {
                self.regs.r32[i] = self.regs.r32[s[i] as usize];
                simd::flush(&mut self.regs.r32[i]);
                s[i] = i as u16;
            }
        }
        if !flush_result {
            return block.launch.simd.alu(op, &mut self.regs, d, s, mask);
        }
        block.launch.simd.alu(op, &mut self.regs, 0, s, FULL);
        if ftz {
            simd::flush(&mut self.regs.r32[0]);
        }
        if sat {
            simd::saturate(&mut self.regs.r32[0]);
        }
        alu::run(Alu::Mov32, &mut self.regs, d, [0, 0, 0], mask);
    }

    fn clock(&mut self, block: &Block, d: u16, wide: bool, mask: u32) {
        let now = block.counters.warp_instructions;
        for lane in (0..LANES).filter(|lane| mask >> lane & 1 == 1) {
            if wide {
                self.regs.r64[d as usize][lane] = now;
            } else {
                self.regs.r32[d as usize][lane] = now as u32;
            }
        }
    }

    fn get(&self, slot: u16, wide: bool, lane: usize) -> u64 {
        if wide { self.regs.r64[slot as usize][lane] } else { u64::from(self.regs.r32[slot as usize][lane]) }
    }

    fn set(&mut self, slot: u16, wide: bool, lane: usize, value: u64) {
        if wide {
            self.regs.r64[slot as usize][lane] = value;
        } else {
            self.regs.r32[slot as usize][lane] = value as u32;
        }
    }

    /// Forms that are rare enough to go lane by lane.
    fn lane_by_lane(&mut self, op: &Op, mask: u32) {
        for lane in (0..LANES).filter(|lane| mask >> lane & 1 == 1) {
            match *op {
                Op::Lop3 { d, a, b, c, table } => {
                    let [a, b, c] = [a, b, c].map(|slot| self.regs.r32[slot as usize][lane]);
                    self.regs.r32[d as usize][lane] = lop3(a, b, c, table);
                }
                Op::Insert { wide, d, field, base, position, length } => {
                    let (field, base) = (self.get(field, wide, lane), self.get(base, wide, lane));
                    let (position, length) = (self.get(position, false, lane), self.get(length, false, lane));
                    let bits = if wide { 64 } else { 32 };
                    self.set(d, wide, lane, alu::insert(field, base, position as u32, length as u32, bits));
                }
                Op::Convert { from, to, rounding, saturate, d, d_wide, s, s_wide } => {
                    let value = convert(self.get(s, s_wide, lane), from, to, rounding, saturate);
                    self.set(d, d_wide, lane, value);
                }
                Op::Pack { d, wide, parts, count } => {
                    let bits = (if wide { 64 } else { 32 }) / u32::from(count);
                    let part = |i: usize| (self.get(parts[i], false, lane) & ((1 << bits) - 1)) << (bits * i as u32);
                    let value = (0..count as usize).fold(0, |value, i| value | part(i));
                    self.set(d, wide, lane, value);
                }
                Op::Unpack { s, wide, parts, count } => {
                    let bits = (if wide { 64 } else { 32 }) / u32::from(count);
                    let value = self.get(s, wide, lane);
                    for (i, &part) in parts[..count as usize].iter().enumerate() {
                        self.set(part, false, lane, value >> (bits * i as u32) & ((1 << bits) - 1));
                    }
                }
                _ => {}
            }
        }
    }

    /// Instructions in which lanes work together: hold until the lanes that they name have arrived.
    fn together(&mut self, block: &mut Block, op: &Op, at: usize, mask: u32) -> LaneResult<Flow> {
        let arrived = self.splits[at].mask;
        let named = match *op {
            Op::Shuffle { mask: m, .. }
            | Op::Vote { mask: m, .. }
            | Op::Match { mask: m, .. }
            | Op::Reduce { mask: m, .. }
            | Op::WarpBarrier { mask: m } => self.regs.r32[m as usize][first(mask)],
            Op::ActiveMask { .. } => mask,
            _ => self.live,
        };
        if mask & !named != 0 {
            let what = format!("lane {} runs it but is not in its member mask {named:#010x}", first(mask & !named));
            return Err((first(mask & !named), Fault::new(FaultKind::InactiveLane, what)));
        }
        if named & self.live & !arrived != 0 {
            self.check_reachable(block, op, at, mask)?;
            return Ok(Flow::Hold);
        }
        match op {
            Op::Barrier { id, count } => return self.barrier(block, *id, *count, 0, mask),
            Op::BarrierReduce { id, p, .. } => {
                let votes = self.predicate(*p) & mask;
                return self.barrier(block, *id, NONE, votes, mask);
            }
            Op::WarpBarrier { .. } => {}
            Op::ActiveMask { d } => self.broadcast(*d, mask, mask),
            Op::Shuffle { mode, d, p, a, b, c, .. } => self.shuffle(*mode, (*d, *p), (*a, *b, *c), mask)?,
            Op::Vote { mode, d, p, .. } => self.vote(*mode, *d, self.predicate(*p) & mask, mask),
            Op::Match { all, wide, d, p, a, .. } => self.matching(*all, *wide, (*d, *p), *a, mask),
            Op::Reduce { op, signed, d, a, .. } => self.reduce(*op, *signed, *d, *a, mask),
            _ => return self.whole_warp(block, op, mask),
        }
        Ok(Flow::Next)
    }

    /// A block barrier that the lanes elsewhere cannot come to any more is an error at once: they would go on and the
    /// finding would be whatever they stumble over.
    fn check_reachable(&self, block: &Block, op: &Op, at: usize, mask: u32) -> LaneResult<()> {
        let (kernel, pc) = (block.launch.kernel, self.splits[at].pc);
        let is_barrier = matches!(op, Op::Barrier { .. } | Op::BarrierReduce { .. });
        let lost = self.splits.iter().find(|s| is_barrier && s.pc != pc && !kernel.reaches(s.pc, pc));
        let Some(split) = lost else { return Ok(()) };
        let what = format!(
            "lanes {mask:#010x} of warp {} wait at a barrier that lanes {:#010x}, at {}, have passed by",
            self.index,
            split.mask,
            kernel.source(split.pc as usize)
        );
        Err((first(mask), Fault::new(FaultKind::BarrierDivergence, what)))
    }

    fn whole_warp(&mut self, block: &mut Block, op: &Op, mask: u32) -> LaneResult<Flow> {
        if mask != FULL {
            let what = format!("{:#010x} are the lanes here, the instruction needs all 32", mask);
            return Err((first(mask), Fault::new(FaultKind::InactiveLane, what)));
        }
        match op {
            Op::LoadMatrix { count, transposed, d, address } => {
                load_store::load_matrix(self, block, &d[..*count as usize], *transposed, *address)?;
            }
            Op::Mma(mma) => {
                block.counters.mma += 1;
                block.launch.simd.mma(mma, &mut self.regs);
            }
            _ => {}
        }
        Ok(Flow::Next)
    }

    fn barrier(&self, _block: &Block, id: u16, count: u16, votes: u32, mask: u32) -> LaneResult<Flow> {
        let missing = self.started & !mask;
        if missing != 0 {
            let what = format!(
                "barrier reached by lanes {mask:#010x} of warp {}; lanes {missing:#010x} have exited or pass it by",
                self.index
            );
            return Err((
                first(if mask == 0 { missing } else { mask }),
                Fault::new(FaultKind::BarrierDivergence, what),
            ));
        }
        let lane = first(mask);
        let count = (count != NONE).then(|| self.regs.r32[count as usize][lane]);
        let pc = self.splits[0].pc;
        Ok(Flow::Stop(Arrival { id: self.regs.r32[id as usize][lane], count, pc, votes }))
    }

    /// Gives the result of `bar.red` at `pc`; `total` threads voted yes, `all` or not.
    pub fn barrier_result(&mut self, kernel: &Kernel, pc: u32, total: u32, all: bool) {
        let Op::BarrierReduce { op, d, .. } = kernel.insts[pc as usize].op else { return };
        match op {
            None => self.broadcast(d, total, self.started),
            Some(Logic::And) => self.set_predicate(d, if all { FULL } else { 0 }, self.started),
            Some(_) => self.set_predicate(d, if total > 0 { FULL } else { 0 }, self.started),
        }
    }

    fn broadcast(&mut self, d: u16, value: u32, mask: u32) {
        let row = &mut self.regs.r32[d as usize];
        (0..LANES).filter(|lane| mask >> lane & 1 == 1).for_each(|lane| row[lane] = value);
    }

    /// `shfl.sync` as the PTX ISA writes it: `c` holds the clamp (bits 0-4) and the segment mask (bits 8-12).
    fn shuffle(&mut self, mode: Shuffle, (d, p): (u16, u16), (a, b, c): (u16, u16, u16), mask: u32) -> LaneResult<()> {
        let [values, offsets, controls] = [a, b, c].map(|slot| self.regs.r32[slot as usize]);
        let (mut out, mut valid) = (values, 0);
        for lane in (0..LANES as u32).filter(|lane| mask >> lane & 1 == 1) {
            let (b, c) = (offsets[lane as usize] & 0x1f, controls[lane as usize]);
            let (clamp, segment) = (c & 0x1f, c >> 8 & 0x1f);
            let max = lane & segment | clamp & !segment;
            let min = lane & segment;
            let (from, inside) = match mode {
                Shuffle::Up => (lane.wrapping_sub(b), lane as i32 - b as i32 >= max as i32),
                Shuffle::Down => (lane + b, lane + b <= max),
                Shuffle::Butterfly => (lane ^ b, lane ^ b <= max),
                Shuffle::Index => (min | b & !segment, (min | b & !segment) <= max),
            };
            let from = if inside { from } else { lane };
            if mask >> from & 1 == 0 {
                let what = format!("lane {lane} reads lane {from}, which does not take part (active {mask:#010x})");
                return Err((lane as usize, Fault::new(FaultKind::InactiveLane, what)));
            }
            out[lane as usize] = values[from as usize];
            valid |= u32::from(inside) << lane;
        }
        <u32 as super::lanes::Lane>::store(&mut self.regs, d, &out, mask);
        self.set_predicate(p, valid, mask);
        Ok(())
    }

    fn vote(&mut self, mode: Vote, d: u16, yes: u32, mask: u32) {
        let result = match mode {
            Vote::Ballot => return self.broadcast(d, yes, mask),
            Vote::All => yes == mask,
            Vote::Any => yes != 0,
            Vote::Uniform => yes == mask || yes == 0,
        };
        self.set_predicate(d, if result { FULL } else { 0 }, mask);
    }

    fn matching(&mut self, all: bool, wide: bool, (d, p): (u16, u16), a: u16, mask: u32) {
        let equal = |warp: &Self, lane: usize| {
            let mine = warp.get(a, wide, lane);
            (0..LANES).filter(|&o| mask >> o & 1 == 1 && warp.get(a, wide, o) == mine).fold(0u32, |m, o| m | 1 << o)
        };
        let mut holds = 0;
        for lane in (0..LANES).filter(|lane| mask >> lane & 1 == 1) {
            let same = equal(self, lane);
            let value = if all && same != mask { 0 } else { same };
            holds |= u32::from(value != 0) << lane;
            self.regs.r32[d as usize][lane] = value;
        }
        self.set_predicate(p, holds, mask);
    }

    fn reduce(&mut self, op: AtomOp, signed: bool, d: u16, a: u16, mask: u32) {
        let ty = if signed { NumType::S32 } else { NumType::U32 };
        let row = self.regs.r32[a as usize];
        let values = (0..LANES).filter(|lane| mask >> lane & 1 == 1).map(|lane| u64::from(row[lane]));
        let result = values.reduce(|old, value| combine(op, ty, old, value, 0)).unwrap_or(0);
        self.broadcast(d, result as u32, mask);
    }

    /// Adds kernel, line, block and thread to a finding.
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
        let is_barrier = |op: &Op| matches!(op, Op::Barrier { .. } | Op::BarrierReduce { .. });
        let kind = if self.splits.iter().all(|s| is_barrier(&kernel.insts[s.pc as usize].op)) {
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
fn first(mask: u32) -> usize {
    (mask.trailing_zeros() as usize).min(LANES - 1)
}

fn apply(logic: Logic, a: u32, b: u32) -> u32 {
    match logic {
        Logic::And => a & b,
        Logic::Or => a | b,
        Logic::Xor => a ^ b,
    }
}

/// Any function of three bits, by its truth table.
fn lop3(a: u32, b: u32, c: u32, table: u8) -> u32 {
    (0..8).filter(|i| table >> i & 1 == 1).fold(0, |out, i| {
        let pick = |bit: u32, value: u32| if i >> bit & 1 == 1 { value } else { !value };
        out | pick(2, a) & pick(1, b) & pick(0, c)
    })
}
