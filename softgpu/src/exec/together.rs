//! Instructions in which the lanes of a warp work together: shuffles, votes, reductions, barriers, matrices.

use super::block::Block;
use super::isa::{AtomOp, Kernel, Logic, NONE, NumType, Op, Shuffle, Vote};
use super::lanes::{FULL, LANES, Lane};
use super::warp::{Arrival, Flow, LaneResult, Stop, Warp, first};
use super::{async_copy, atomic};
use crate::fault::{Fault, FaultKind};

impl Warp {
    /// Instructions in which lanes work together: hold until the lanes that they name have arrived.
    #[inline(always)]
    pub(super) fn together(&mut self, block: &mut Block, op: &Op, at: usize, mask: u32) -> LaneResult<Flow> {
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
            Op::Barrier { id, count } => return self.barrier(*id, *count, 0, mask),
            Op::BarrierReduce { id, p, .. } => {
                let votes = self.predicate(*p) & mask;
                return self.barrier(*id, NONE, votes, mask);
            }
            Op::ClusterBarrier => return self.cluster_barrier(mask),
            Op::WarpBarrier { .. } => {}
            Op::ActiveMask { d } => self.broadcast(*d, mask, mask),
            Op::Shuffle { mode, d, p, a, b, c, .. } => self.shuffle(*mode, (*d, *p), (*a, *b, *c), mask)?,
            Op::Vote { mode, d, p, .. } => self.vote(*mode, *d, self.predicate(*p) & mask, mask),
            Op::Match { all, wide, d, p, a, .. } => self.matching(*all, *wide, (*d, *p), *a, mask),
            Op::Reduce { op, signed, d, a, .. } => self.reduce(*op, *signed, *d, *a, mask),
            _ => return self.whole_warp(block, op, self.splits[at].pc, mask),
        }
        Ok(Flow::Next)
    }

    /// A block barrier that the lanes elsewhere cannot come to any more is an error at once: they would go on and the
    /// finding would be whatever they stumble over.
    fn check_reachable(&self, block: &Block, op: &Op, at: usize, mask: u32) -> LaneResult<()> {
        let (kernel, pc) = (block.launch.kernel, self.splits[at].pc);
        let lost = self.splits.iter().find(|s| op.is_barrier() && s.pc != pc && !kernel.reaches(s.pc, pc));
        let Some(split) = lost else { return Ok(()) };
        let what = format!(
            "lanes {mask:#010x} of warp {} wait at a barrier that lanes {:#010x}, at {}, have passed by",
            self.index,
            split.mask,
            kernel.source(split.pc as usize)
        );
        Err((first(mask), Fault::new(FaultKind::BarrierDivergence, what)))
    }

    #[inline(always)]
    fn whole_warp(&mut self, block: &mut Block, op: &Op, pc: u32, mask: u32) -> LaneResult<Flow> {
        if mask != FULL {
            let what = format!("{:#010x} are the lanes here, the instruction needs all 32", mask);
            return Err((first(mask), Fault::new(FaultKind::InactiveLane, what)));
        }
        match op {
            Op::LoadMatrix { count, transposed, d, address } => {
                async_copy::load_matrix(self, block, &d[..*count as usize], *transposed, *address)?;
            }
            Op::Mma(mma) => {
                block.counters.mma += 1;
                block.counters.mma_flops += 2 * 16 * 8 * u64::from(mma.k);
                block.launch.simd.mma(mma, &mut self.regs);
            }
            Op::Wgmma(wgmma) => {
                self.products.pc = pc;
                block.launch.simd.wgmma(wgmma, self, block)?;
            }
            Op::WgmmaFence => self.products.fence(),
            Op::WgmmaCommit => self.products.commit(),
            Op::WgmmaWait { groups } => self.products.wait(&mut block.shared, *groups, self.index),
            _ => {}
        }
        Ok(Flow::Next)
    }

    fn barrier(&mut self, id: u16, count: u16, votes: u32, mask: u32) -> LaneResult<Flow> {
        self.check_all_here(mask)?;
        let lane = first(mask);
        let count = (count != NONE).then(|| self.regs.r32[count as usize][lane]);
        let pc = self.splits[0].pc;
        self.stop = Some(Stop::Barrier(Arrival { id: self.regs.r32[id as usize][lane], count, pc, votes }));
        Ok(Flow::Stop)
    }

    fn cluster_barrier(&mut self, mask: u32) -> LaneResult<Flow> {
        self.check_all_here(mask)?;
        self.stop = Some(Stop::ClusterBarrier(self.splits[0].pc));
        Ok(Flow::Stop)
    }

    /// Checks that every lane that ever was has come to a barrier.
    fn check_all_here(&self, mask: u32) -> LaneResult<()> {
        let missing = self.started & !mask;
        if missing == 0 {
            return Ok(());
        }
        let what = format!(
            "barrier reached by lanes {mask:#010x} of warp {}; lanes {missing:#010x} have exited or pass it by",
            self.index
        );
        Err((first(if mask == 0 { missing } else { mask }), Fault::new(FaultKind::BarrierDivergence, what)))
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

    #[inline(always)]
    fn broadcast(&mut self, d: u16, value: u32, mask: u32) {
        <u32 as Lane>::store(&mut self.regs, d, &[value; LANES], mask);
    }

    /// `shfl.sync` as the PTX ISA writes it: `c` holds the clamp (bits 0-4) and the segment mask (bits 8-12).
    #[inline(always)]
    fn shuffle(&mut self, mode: Shuffle, (d, p): (u16, u16), (a, b, c): (u16, u16, u16), mask: u32) -> LaneResult<()> {
        let step = self.regs.r32[b as usize][0];
        // What sums over a warp are made of: all lanes, in one segment.
        if mode == Shuffle::Butterfly && mask == FULL && self.is_all(c, 0x1f) && self.is_all(b, step) {
            let (values, mut out) = (<u32 as Lane>::load(&self.regs, a), [0; LANES]);
            for lane in 0..LANES {
                out[lane] = values[lane ^ (step & 0x1f) as usize];
            }
            <u32 as Lane>::store(&mut self.regs, d, &out, FULL);
            self.set_predicate(p, FULL, FULL);
            return Ok(());
        }
        self.any_shuffle(mode, (d, p), (a, b, c), mask)
    }

    #[inline(always)]
    fn is_all(&self, slot: u16, value: u32) -> bool {
        let mut differ = 0;
        for other in &self.regs.r32[slot as usize] {
            differ |= other ^ value;
        }
        differ == 0
    }

    fn any_shuffle(
        &mut self,
        mode: Shuffle,
        (d, p): (u16, u16),
        (a, b, c): (u16, u16, u16),
        mask: u32,
    ) -> LaneResult<()> {
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
        <u32 as Lane>::store(&mut self.regs, d, &out, mask);
        self.set_predicate(p, valid, mask);
        Ok(())
    }

    #[inline(always)]
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
        let row = self.regs.row(a, wide);
        let equal = |lane: usize| {
            (0..LANES).filter(|&o| mask >> o & 1 == 1 && row[o] == row[lane]).fold(0u32, |m, o| m | 1 << o)
        };
        let (mut out, mut holds) = ([0; LANES], 0);
        for lane in (0..LANES).filter(|lane| mask >> lane & 1 == 1) {
            let same = equal(lane);
            out[lane] = if all && same != mask { 0 } else { same };
            holds |= u32::from(out[lane] != 0) << lane;
        }
        <u32 as Lane>::store(&mut self.regs, d, &out, mask);
        self.set_predicate(p, holds, mask);
    }

    fn reduce(&mut self, op: AtomOp, signed: bool, d: u16, a: u16, mask: u32) {
        let ty = if signed { NumType::S32 } else { NumType::U32 };
        let row = self.regs.r32[a as usize];
        let values = (0..LANES).filter(|lane| mask >> lane & 1 == 1).map(|lane| u64::from(row[lane]));
        let result = values.reduce(|old, value| atomic::combine(op, ty, old, value, 0)).unwrap_or(0);
        self.broadcast(d, result as u32, mask);
    }
}
