//! Whether registers that share rows get in each other's way. Knows nothing of how the rows were given.

use super::bits::Bits;
use super::flow::{Effect, Flow};

/// No register's value.
const NOBODY: u32 = u32::MAX;

/// Follows the rows along all ways through the kernel: where a register is read, its row must hold its value on each of
/// them. `rows` has the row of each register, those of all banks numbered together; what is in `held` has its value from the
/// start.
///
/// # Errors
/// An instruction that would read the value of another register.
pub fn check(flow: &Flow, held: &Bits, rows: &[u32]) -> Result<(), u32> {
    let mut values: Vec<Vec<u32>> = vec![Vec::new(); flow.blocks.len()];
    let count = rows.iter().filter(|&&row| row != NOBODY).max().map_or(0, |&row| row as usize + 1);
    values[0] = vec![NOBODY; count];
    held.iter().for_each(|register| values[0][rows[register as usize] as usize] = register);
    let mut open = vec![0];
    while let Some(at) = open.pop() {
        let mut now = values[at].clone();
        for inst in flow.blocks[at].insts.clone() {
            step(flow.operands(inst), rows, &mut now).ok_or(inst)?;
        }
        for &next in &flow.blocks[at].next {
            if meet(&mut values[next], &now) {
                open.push(next);
            }
        }
    }
    Ok(())
}

/// The values in the rows after an instruction; `None` if it reads one that is not there.
fn step(operands: &[(u32, Effect)], rows: &[u32], values: &mut [u32]) -> Option<()> {
    for &(register, effect) in operands {
        let value = &mut values[rows[register as usize] as usize];
        match effect {
            Effect::Read if *value != register => return None,
            Effect::WriteOrKeep if *value != register => *value = NOBODY,
            Effect::Write => *value = register,
            Effect::Read | Effect::WriteOrKeep => {}
        }
    }
    Some(())
}

/// Keeps the values that are the same on another way to a block; whether there is news for it.
fn meet(values: &mut Vec<u32>, others: &[u32]) -> bool {
    if values.is_empty() {
        values.extend_from_slice(others);
        return true;
    }
    let mut changed = false;
    for (value, other) in values.iter_mut().zip(others) {
        if value != other && *value != NOBODY {
            (*value, changed) = (NOBODY, true);
        }
    }
    changed
}
