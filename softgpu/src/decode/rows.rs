//! Rows for registers: PTX has a new one for nearly every value, and all of them for all warps of a block would fit no cache.
//! Registers that are never live at the same place share a row.

use super::bits::Bits;
use super::check::check;
use super::flow::Flow;
use crate::exec::isa::{Inst, NONE};
use crate::exec::operands::Bank;

/// The first rows of the narrow ones are those that `.ftz` uses; no register has their numbers.
pub(super) const SCRATCH: usize = 3;

/// The rows of a kernel.
pub(super) struct Rows {
    /// Of each register of each bank; [`NONE`] for one that no instruction names.
    pub(super) of: [Vec<u16>; 3],
    /// How many there are in each bank.
    pub(super) counts: [usize; 3],
}

/// Gives rows to the registers of each bank, of which there are so many, and names them in the instructions. Those in
/// `prepared` have their values before the first instruction, for all blocks: their rows are theirs alone. So are those of
/// registers that may be read before anything is written to them, which then read as zero at first and what another block
/// has left later.
///
/// # Errors
/// The instruction that would read another register's value, which would be a mistake in here.
pub(super) fn assign(insts: &mut [Inst], registers: [usize; 3], prepared: &[(Bank, u16)]) -> Result<Rows, u32> {
    let flow = Flow::new(insts, registers);
    let mut held = flow.none();
    for &(bank, slot) in prepared {
        held.insert(flow.number(bank, slot));
    }
    let of = share(&flow, &mut held);
    let rows = Rows::new(&flow, of);
    check(&flow, &held, &rows.numbered())?;
    for inst in insts {
        inst.operands(|bank, _, slot| *slot = rows.of[bank as usize][*slot as usize]);
    }
    Ok(rows)
}

impl Rows {
    fn new(flow: &Flow, of: Vec<u16>) -> Self {
        let of = Bank::ALL.map(|bank| of[flow.banks[bank as usize]..flow.banks[bank as usize + 1]].to_vec());
        let count = |of: &Vec<u16>| of.iter().filter(|&&row| row != NONE).max().map_or(0, |&row| row as usize + 1);
        let mut counts = of.each_ref().map(count);
        counts[Bank::Narrow as usize] = counts[Bank::Narrow as usize].max(SCRATCH);
        Self { of, counts }
    }

    /// The row of each register, those of all banks numbered together.
    fn numbered(&self) -> Vec<u32> {
        let [narrow, wide, _] = self.counts;
        let starts = [0, narrow, narrow + wide];
        let number = |start: usize, row: u16| if row == NONE { u32::MAX } else { start as u32 + u32::from(row) };
        self.of.iter().zip(starts).flat_map(|(of, start)| of.iter().map(move |&row| number(start, row))).collect()
    }
}

/// The row of each register in its bank. Adds to `held`, the registers with a row of their own, what is read undefined.
fn share(flow: &Flow, held: &mut Bits) -> Vec<u16> {
    let lifetimes = flow.lifetimes(held);
    held.add(&lifetimes.undefined, &flow.none());
    let mut of = vec![NONE; flow.banks[3]];
    let num_insts = flow.blocks.last().map_or(0, |block| block.insts.end as usize);
    for bank in Bank::ALL {
        let first_row = if bank == Bank::Narrow { SCRATCH } else { 0 };
        let registers = flow.banks[bank as usize] as u32..flow.banks[bank as usize + 1] as u32;
        let start = |register: u32| lifetimes.ranges[register as usize].last().map(|range| range.start);
        let shares = |&register: &u32| !held.contains(register) && start(register).is_some();
        let mut sharing: Vec<u32> = registers.clone().filter(shares).collect();
        sharing.sort_by_key(|&register| start(register));
        let mut taken: Vec<Bits> = Vec::new();
        for register in sharing {
            let ranges = &lifetimes.ranges[register as usize];
            let is_free = |row: &Bits| !ranges.iter().rev().any(|range| row.has_any_of(range));
            let row = taken.iter().position(is_free).unwrap_or_else(|| {
                taken.push(Bits::new(num_insts));
                taken.len() - 1
            });
            ranges.iter().for_each(|range| taken[row].insert_all(range));
            of[register as usize] = (first_row + row) as u16;
        }
        let owned = registers.filter(|&register| held.contains(register)).zip(first_row + taken.len()..);
        owned.for_each(|(register, row)| of[register as usize] = row as u16);
    }
    of
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::flow::Effect;
    use crate::exec::alu::Alu;
    use crate::exec::isa::{Compare, NumType, Op, Pred, SetPredicate};
    use crate::rng::Rng;

    /// Registers of each bank in a random program; the narrow ones begin behind the scratch rows.
    const REGISTERS: [usize; 3] = [SCRATCH + 14, 8, 5];
    /// Of a way through a program that may loop for ever.
    const BLOCKS: usize = 60;

    fn register(rng: &mut Rng, bank: Bank) -> u16 {
        let first = if bank == Bank::Narrow { SCRATCH } else { 0 };
        (first + rng.below(REGISTERS[bank as usize] - first)) as u16
    }

    fn random_op(rng: &mut Rng, num_insts: usize) -> Op {
        let [narrow, other, third] = [(); 3].map(|()| register(rng, Bank::Narrow));
        let (wide, p, q) = (register(rng, Bank::Wide), register(rng, Bank::Predicate), register(rng, Bank::Predicate));
        match rng.below(8) {
            0 | 1 => Op::Alu { op: Alu::AddU32, d: narrow, s: [other, third, 0] },
            2 => Op::Alu { op: Alu::MulWideU32, d: wide, s: [narrow, other, 0] },
            3 => Op::Unpack { s: wide, wide: true, parts: [narrow, other, 0, 0], count: 2 },
            4 => Op::SetPredicate(SetPredicate {
                compare: Compare::Eq,
                unordered: false,
                ty: NumType::U32,
                p,
                q: if rng.below(2) == 0 { q } else { NONE },
                a: narrow,
                b: other,
                combine: None,
            }),
            5 => Op::Select { wide: false, d: narrow, a: other, b: third, p: Pred { slot: p, negated: false } },
            6 => Op::Branch { target: rng.below(num_insts) as u32 },
            _ => Op::BranchTable { index: narrow, targets: [(); 3].map(|()| rng.below(num_insts) as u32).into() },
        }
    }

    fn program(rng: &mut Rng) -> Vec<Inst> {
        let num_insts = 4 + rng.below(40);
        let mut insts: Vec<Inst> = (1..num_insts)
            .map(|_| {
                let op = random_op(rng, num_insts);
                let p = Pred { slot: register(rng, Bank::Predicate), negated: false };
                let is_branch = matches!(op, Op::Branch { .. } | Op::BranchTable { .. });
                Inst { op, guard: (rng.below(if is_branch { 8 } else { 3 }) == 0).then_some(p), loc: 0 }
            })
            .collect();
        insts.push(Inst { op: Op::Exit, guard: None, loc: 0 });
        insts
    }

    /// What a thread that goes a random way reads: every result is a number that follows from all that was read before.
    /// `place` says where the value of a register is.
    fn run(flow: &Flow, held: &Bits, seed: u64, place: impl Fn(u32) -> usize) -> Vec<u64> {
        let (mut rng, mut values, mut read, mut sum) = (Rng::new(seed), [0; 64], Vec::new(), 1u64);
        held.iter().for_each(|register| values[place(register)] = u64::from(register));
        let mut at = 0;
        for _ in 0..BLOCKS {
            let block = &flow.blocks[at];
            for inst in block.insts.clone() {
                let happens = rng.below(2) == 0;
                for &(register, effect) in flow.operands(inst) {
                    let value = &mut values[place(register)];
                    match effect {
                        Effect::Read => read.push(*value),
                        Effect::WriteOrKeep if !happens => continue,
                        Effect::Write | Effect::WriteOrKeep => *value = sum,
                    }
                    sum = sum.wrapping_mul(31).wrapping_add(*value);
                }
            }
            match block.next.len() {
                0 => break,
                ways => at = block.next[rng.below(ways)],
            }
        }
        read
    }

    /// The registers of a random program, which of them have rows of their own, and the row of each.
    fn shared_rows(rng: &mut Rng) -> (Flow, Bits, Vec<u32>) {
        let flow = Flow::new(&mut program(rng), REGISTERS);
        let mut held = flow.none();
        held.insert(flow.number(Bank::Narrow, SCRATCH as u16));
        let of = share(&flow, &mut held);
        let rows = Rows::new(&flow, of).numbered();
        (flow, held, rows)
    }

    /// The same thread on registers and on their rows; `None` where it reads the same.
    fn difference(flow: &Flow, held: &Bits, rows: &[u32], seed: u64) -> Option<()> {
        let on_registers = run(flow, held, seed, |register| register as usize);
        (on_registers != run(flow, held, seed, |register| rows[register as usize] as usize)).then_some(())
    }

    #[test]
    fn threads_read_what_they_would_with_a_row_for_each_register() {
        let mut rng = Rng::new(1);
        let mut num_shared = 0;
        for seed in 0..2000 {
            let (flow, held, rows) = shared_rows(&mut rng);
            assert_eq!(check(&flow, &held, &rows), Ok(()), "program {seed}");
            assert_eq!(difference(&flow, &held, &rows, seed), None, "program {seed}");
            let named: Vec<u32> = rows.iter().copied().filter(|&row| row != u32::MAX).collect();
            let distinct: std::collections::HashSet<u32> = named.iter().copied().collect();
            num_shared += named.len() - distinct.len();
            for register in held.iter() {
                assert_eq!(named.iter().filter(|&&row| row == rows[register as usize]).count(), 1, "program {seed}");
            }
        }
        assert!(num_shared > 2000, "{num_shared} registers share another's row");
    }

    #[test]
    fn the_check_finds_every_row_that_a_thread_could_tell() {
        let mut rng = Rng::new(2);
        let (mut num_found, mut num_told) = (0, 0);
        for seed in 0..2000 {
            let (flow, held, mut rows) = shared_rows(&mut rng);
            let named: Vec<usize> = (0..rows.len()).filter(|&at| rows[at] != u32::MAX).collect();
            let [one, other] = [(); 2].map(|()| named[rng.below(named.len())]);
            rows[one] = rows[other];
            let is_found = check(&flow, &held, &rows).is_err();
            let is_told = difference(&flow, &held, &rows, seed).is_some();
            assert!(is_found || !is_told, "program {seed}: registers {one} and {other}");
            num_found += usize::from(is_found);
            num_told += usize::from(is_told);
        }
        assert!(num_told > 200 && num_found < 1800, "{num_told} told, {num_found} found of 2000");
    }
}
