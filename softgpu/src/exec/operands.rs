//! Which registers an instruction reads and writes: the one place that knows the operands of every operation.

use super::alu;
use super::isa::{
    Access, Accumulate, Address, AsyncCopy, Atomic, Inst, Left, Mma, NONE, Op, Pred, SetPredicate, Vote, Wgmma,
};

/// A kind of register, as an index into what is kept for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bank {
    /// 32 bits and fewer.
    Narrow,
    /// 64 bits.
    Wide,
    /// One bit a lane.
    Predicate,
}

impl Bank {
    /// All of them in the order of their indices.
    pub const ALL: [Self; 3] = [Self::Narrow, Self::Wide, Self::Predicate];

    /// The bank of values of 64 bits, or of fewer.
    pub fn of(wide: bool) -> Self {
        if wide { Self::Wide } else { Self::Narrow }
    }
}

/// What an instruction does with a register. It has read all it reads of a lane before it writes anything of that lane,
/// or of any lane where lanes read each other's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Reads it.
    Read,
    /// Writes all of it, in the lanes of the guard.
    Write,
}

use Bank::{Narrow, Predicate};
use Role::{Read, Write};

/// Passes on the operands that are there.
struct Visitor<F>(F);

impl<F: FnMut(Bank, Role, &mut u16)> Visitor<F> {
    fn name(&mut self, bank: Bank, role: Role, slot: &mut u16) {
        if *slot != NONE {
            self.0(bank, role, slot);
        }
    }

    fn read<'a>(&mut self, wide: bool, slots: impl IntoIterator<Item = &'a mut u16>) {
        slots.into_iter().for_each(|slot| self.name(Bank::of(wide), Read, slot));
    }

    fn write<'a>(&mut self, wide: bool, slots: impl IntoIterator<Item = &'a mut u16>) {
        slots.into_iter().for_each(|slot| self.name(Bank::of(wide), Write, slot));
    }

    fn test(&mut self, pred: &mut Pred) {
        self.name(Predicate, Read, &mut pred.slot);
    }

    fn set(&mut self, slot: &mut u16) {
        self.name(Predicate, Write, slot);
    }

    fn address(&mut self, address: &mut Address) {
        self.read(address.wide, [&mut address.slot]);
    }

    fn access(&mut self, role: Role, Access { count, regs, wide, address, .. }: &mut Access) {
        self.address(address);
        regs[..*count as usize].iter_mut().for_each(|slot| self.name(Bank::of(*wide), role, slot));
    }

    fn atomic(&mut self, Atomic { ty, d, address, b, c, .. }: &mut Atomic) {
        self.address(address);
        self.read(ty.is_wide(), [b, c]);
        self.write(ty.is_wide(), [d]);
    }

    fn set_predicate(&mut self, SetPredicate { ty, p, q, a, b, combine, .. }: &mut SetPredicate) {
        self.read(ty.is_wide(), [a, b]);
        if let Some((_, pred)) = combine {
            self.test(pred);
        }
        self.set(p);
        self.set(q);
    }

    fn mma(&mut self, Mma { d, a, b, c, .. }: &mut Mma) {
        self.read(false, a.iter_mut().chain(b).chain(c));
        self.write(false, d);
    }

    fn wgmma(&mut self, Wgmma { d, c, a, b, accumulate, .. }: &mut Wgmma) {
        match a {
            Left::Shared(descriptor, _) => self.read(true, [descriptor]),
            Left::Registers(rows) => self.read(false, rows),
        }
        self.read(true, [b]);
        if let Accumulate::If(pred) = accumulate {
            self.test(pred);
        }
        if !matches!(accumulate, Accumulate::Never) {
            self.read(false, c.iter_mut());
        }
        self.write(false, d.iter_mut());
    }

    /// No arm for the rest: whoever adds an operation says here what its operands are.
    fn op(&mut self, op: &mut Op) {
        match op {
            Op::Alu { op, d, s } | Op::AluFlush { op, d, s, .. } => {
                let signature = alu::signature(*op);
                s.iter_mut().zip(signature.sources).for_each(|(slot, &wide)| self.read(wide, [slot]));
                self.write(signature.wide, [d]);
            }
            Op::SetPredicate(set) => self.set_predicate(set),
            Op::Select { wide, d, a, b, p } => {
                self.read(*wide, [a, b]);
                self.test(p);
                self.write(*wide, [d]);
            }
            Op::Logic { op: _, d, a, b } => {
                self.test(a);
                self.test(b);
                self.set(d);
            }
            Op::MovPredicate { d, a } => {
                self.test(a);
                self.set(d);
            }
            Op::Lop3 { d, a, b, c, table: _ } => {
                self.read(false, [a, b, c]);
                self.write(false, [d]);
            }
            Op::Insert { wide, d, field, base, position, length } => {
                self.read(*wide, [field, base]);
                self.read(false, [position, length]);
                self.write(*wide, [d]);
            }
            Op::Convert { d, d_wide, s, s_wide, .. } => {
                self.read(*s_wide, [s]);
                self.write(*d_wide, [d]);
            }
            Op::Pack { d, wide, parts, count } => {
                self.read(false, &mut parts[..*count as usize]);
                self.write(*wide, [d]);
            }
            Op::Unpack { s, wide, parts, count } => {
                self.read(*wide, [s]);
                self.write(false, &mut parts[..*count as usize]);
            }
            Op::Clock { d, wide } => self.write(*wide, [d]),
            Op::BranchTable { index, targets: _ } => self.read(false, [index]),
            Op::Assert { message, file, line } => {
                self.read(true, [message, file]);
                self.read(false, [line]);
            }
            Op::Load(access) | Op::PeerLoad(access) => self.access(Write, access),
            Op::PeerAddress { d, a, rank } => {
                self.read(false, [a, rank]);
                self.write(false, [d]);
            }
            Op::Store(access) => self.access(Read, access),
            Op::Atomic(atomic) => self.atomic(atomic),
            Op::AsyncCopy(AsyncCopy { target, source, source_bytes, .. }) => {
                self.address(target);
                self.address(source);
                self.read(false, [source_bytes]);
            }
            Op::Barrier { id, count } => self.read(false, [id, count]),
            Op::BarrierReduce { op, id, d, p } => {
                self.read(false, [id]);
                self.test(p);
                self.name(if op.is_some() { Predicate } else { Narrow }, Write, d);
            }
            Op::WarpBarrier { mask } => self.read(false, [mask]),
            Op::Shuffle { mode: _, d, p, a, b, c, mask } => {
                self.read(false, [a, b, c, mask]);
                self.write(false, [d]);
                self.set(p);
            }
            Op::Vote { mode, d, p, mask } => {
                self.read(false, [mask]);
                self.test(p);
                self.name(if *mode == Vote::Ballot { Narrow } else { Predicate }, Write, d);
            }
            Op::ActiveMask { d } => self.write(false, [d]),
            Op::Match { all: _, wide, d, p, a, mask } => {
                self.read(*wide, [a]);
                self.read(false, [mask]);
                self.write(false, [d]);
                self.set(p);
            }
            Op::Reduce { d, a, mask, .. } => {
                self.read(false, [a, mask]);
                self.write(false, [d]);
            }
            Op::LoadMatrix { count, d, address, .. } => {
                self.address(address);
                self.write(false, &mut d[..*count as usize]);
            }
            Op::Mma(mma) => self.mma(mma),
            Op::Wgmma(wgmma) => self.wgmma(wgmma),
            Op::Branch { target: _ }
            | Op::Exit
            | Op::Trap
            | Op::AsyncCommit
            | Op::AsyncWait { groups: _ }
            | Op::AsyncWaitAll
            | Op::WgmmaFence
            | Op::WgmmaCommit
            | Op::WgmmaWait { groups: _ }
            | Op::Fence
            | Op::ProxyFence
            | Op::ClusterBarrier
            | Op::Nop => {}
        }
    }
}

impl Inst {
    /// Names every register operand, which may be renamed: what is read first, then what is written.
    pub fn operands(&mut self, name: impl FnMut(Bank, Role, &mut u16)) {
        let mut visitor = Visitor(name);
        if let Some(guard) = &mut self.guard {
            visitor.test(guard);
        }
        visitor.op(&mut self.op);
    }
}
