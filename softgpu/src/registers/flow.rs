//! The flow of control and of values through a kernel: blocks, and where each register is live.
//!
//! Everything is said of one thread: each lane has a column of its own in every row, and comes through the blocks on its own
//! way. A lane that reads another's column does so while that one is at the same instruction.

use super::bits::Bits;
use crate::exec::isa::Inst;
use crate::exec::operands::{Bank, Role};
use std::ops::Range;

/// What an instruction does with a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Takes its value.
    Read,
    /// Gives it another.
    Write,
    /// Under a guard: the old value may stay.
    WriteOrKeep,
}

/// Instructions that run one after the other.
#[derive(Debug)]
pub struct Block {
    /// Their numbers.
    pub insts: Range<u32>,
    /// Blocks that may be next.
    pub next: Vec<usize>,
}

/// A kernel as its registers see it. They are numbered through the banks.
pub struct Flow {
    /// In the order of their instructions.
    pub blocks: Vec<Block>,
    /// Where the registers of each bank begin, and the number of all.
    pub banks: [usize; 4],
    operands: Vec<(u32, Effect)>,
    /// First operand of each instruction.
    starts: Vec<u32>,
}

/// Where registers are live.
pub struct Lifetimes {
    /// At the start of the kernel: they may be read before they are written.
    pub undefined: Bits,
    /// For each register, instructions behind which its value is wanted still, or which write it; later ranges first.
    pub ranges: Vec<Vec<Range<u32>>>,
}

impl Flow {
    /// Of instructions that have so many registers of each bank.
    pub fn new(insts: &mut [Inst], registers: [usize; 3]) -> Self {
        let mut banks = [0; 4];
        for bank in 0..3 {
            banks[bank + 1] = banks[bank] + registers[bank];
        }
        let (mut operands, mut starts) = (Vec::new(), vec![0]);
        for inst in insts.iter_mut() {
            let write = if inst.guard.is_some() { Effect::WriteOrKeep } else { Effect::Write };
            inst.operands(|bank, role, slot| {
                let effect = if role == Role::Read { Effect::Read } else { write };
                operands.push(((banks[bank as usize] + *slot as usize) as u32, effect));
            });
            starts.push(operands.len() as u32);
        }
        Self { blocks: blocks(insts), banks, operands, starts }
    }

    /// The number of a register.
    pub fn number(&self, bank: Bank, slot: u16) -> u32 {
        (self.banks[bank as usize] + slot as usize) as u32
    }

    /// What an instruction does, reads first.
    pub fn operands(&self, inst: u32) -> &[(u32, Effect)] {
        &self.operands[self.starts[inst as usize] as usize..self.starts[inst as usize + 1] as usize]
    }

    /// A set of registers.
    pub fn none(&self) -> Bits {
        Bits::new(self.banks[3])
    }

    /// Where registers are live, but for those of `held`.
    pub fn lifetimes(&self, held: &Bits) -> Lifetimes {
        let live = self.live_in(held);
        let (mut ranges, mut ends) = (vec![Vec::new(); self.banks[3]], vec![0; self.banks[3]]);
        for block in self.blocks.iter().rev() {
            let mut live_out = self.none();
            block.next.iter().for_each(|&next| {
                live_out.add(&live[next], held);
            });
            self.block_ranges(block, live_out, held, &mut ends, &mut ranges);
        }
        Lifetimes { undefined: live[0].clone(), ranges }
    }

    /// What is live at the start of each block.
    fn live_in(&self, held: &Bits) -> Vec<Bits> {
        let mut live: Vec<Bits> = self.blocks.iter().map(|_| self.none()).collect();
        let mut written = live.clone();
        for (at, block) in self.blocks.iter().enumerate() {
            for &(register, effect) in block.insts.clone().flat_map(|inst| self.operands(inst)) {
                match effect {
                    Effect::Read if !held.contains(register) && !written[at].contains(register) => {
                        live[at].insert(register);
                    }
                    Effect::Write => {
                        written[at].insert(register);
                    }
                    Effect::Read | Effect::WriteOrKeep => {}
                }
            }
        }
        let mut changed = true;
        while changed {
            changed = false;
            for at in (0..self.blocks.len()).rev() {
                let mut mine = std::mem::replace(&mut live[at], Bits::new(0));
                for &next in self.blocks[at].next.iter().filter(|&&next| next != at) {
                    changed |= mine.add(&live[next], &written[at]);
                }
                live[at] = mine;
            }
        }
        live
    }

    /// Goes up a block from what is `live` at its end; `ends` says of what is live where its range ends.
    fn block_ranges(
        &self,
        block: &Block,
        mut live: Bits,
        held: &Bits,
        ends: &mut [u32],
        ranges: &mut [Vec<Range<u32>>],
    ) {
        live.iter().for_each(|register| ends[register as usize] = block.insts.end);
        for inst in block.insts.clone().rev() {
            for &(register, effect) in
                self.operands(inst).iter().rev().filter(|(register, _)| !held.contains(*register))
            {
                match effect {
                    Effect::Read => {
                        if live.insert(register) {
                            ends[register as usize] = inst;
                        }
                    }
                    Effect::Write | Effect::WriteOrKeep if !live.contains(register) => {
                        ranges[register as usize].push(inst..inst + 1);
                    }
                    Effect::Write => {
                        live.remove(register);
                        ranges[register as usize].push(inst..ends[register as usize]);
                    }
                    Effect::WriteOrKeep => {}
                }
            }
        }
        for register in live.iter().filter(|&register| ends[register as usize] > block.insts.start) {
            ranges[register as usize].push(block.insts.start..ends[register as usize]);
        }
    }
}

fn blocks(insts: &[Inst]) -> Vec<Block> {
    let mut leads = Bits::new(insts.len() + 1);
    leads.insert(0);
    for (at, inst) in insts.iter().enumerate() {
        inst.targets().iter().for_each(|&target| {
            leads.insert(target);
        });
        if !inst.targets().is_empty() || !inst.goes_on() {
            leads.insert(at as u32 + 1);
        }
    }
    let starts: Vec<u32> = leads.iter().filter(|&at| (at as usize) < insts.len()).collect();
    let block_of = |inst: u32| starts.partition_point(|&start| start <= inst) - 1;
    let block = |at: usize| {
        let end = starts.get(at + 1).copied().unwrap_or(insts.len() as u32);
        let last = &insts[end as usize - 1];
        let next = last.targets().iter().copied().chain(last.goes_on().then_some(end)).map(block_of).collect();
        Block { insts: starts[at]..end, next }
    };
    (0..starts.len()).map(block).collect()
}
