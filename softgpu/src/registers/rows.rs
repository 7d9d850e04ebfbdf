//! Rows for registers: PTX has a new one for nearly every value, and all of them for all warps of a block would fit no cache.
//! Registers that are never live at the same place share a row.

use super::bits::Bits;
use super::check::check;
use super::flow::Flow;
use crate::exec::isa::{Inst, NONE};
use crate::exec::operands::Bank;

/// The first rows of the narrow ones are those that `.ftz` uses; no register has their numbers.
pub const SCRATCH: usize = 3;

/// The rows of a kernel.
pub struct Rows {
    /// Of each register of each bank; [`NONE`] for one that no instruction names.
    pub of: [Vec<u16>; 3],
    /// How many there are in each bank.
    pub counts: [usize; 3],
}

/// Gives rows to the registers of each bank, of which there are so many, and names them in the instructions. Those in
/// `prepared` have their values before the first instruction, for all blocks: their rows are theirs alone. So are those of
/// registers that may be read before anything is written to them, which then read as zero at first and what another block
/// has left later.
///
/// # Errors
/// The instruction that would read another register's value, which would be a mistake in here.
pub fn assign(insts: &mut [Inst], registers: [usize; 3], prepared: &[(Bank, u16)]) -> Result<Rows, u32> {
    let flow = Flow::new(insts, registers);
    let mut held = flow.none();
    for &(bank, slot) in prepared {
        held.insert(flow.number(bank, slot));
    }
    let rows = share(&flow, &mut held);
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

    /// The row of each register, those of all banks numbered together; `u32::MAX` for one that no instruction names.
    pub fn numbered(&self) -> Vec<u32> {
        let [narrow, wide, _] = self.counts;
        let starts = [0, narrow, narrow + wide];
        let number = |start: usize, row: u16| if row == NONE { u32::MAX } else { start as u32 + u32::from(row) };
        self.of.iter().zip(starts).flat_map(|(of, start)| of.iter().map(move |&row| number(start, row))).collect()
    }
}

/// Gives rows. Adds to `held`, the registers with a row of their own, what is read undefined.
pub fn share(flow: &Flow, held: &mut Bits) -> Rows {
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
    Rows::new(flow, of)
}
