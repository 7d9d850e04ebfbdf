//! Registers that share rows, in random programs.

use softgpu::exec::alu::Alu;
use softgpu::exec::isa::{Compare, Inst, NONE, NumType, Op, Pred, SetPredicate};
use softgpu::exec::operands::Bank;
use softgpu::registers::bits::Bits;
use softgpu::registers::check::check;
use softgpu::registers::flow::{Effect, Flow};
use softgpu::registers::rows::{SCRATCH, share};
use softgpu::rng::Rng;

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
    let rows = share(&flow, &mut held).numbered();
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
