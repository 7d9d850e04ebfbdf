//! What a step must not ask for, whatever it computes.

use std::collections::HashSet;

use super::device::SimTensor;
use crate::{Result, invalid};

pub(super) fn expect_shape(what: &str, tensor: &SimTensor, rows: usize, columns: usize) -> Result<()> {
    if (tensor.rows(), tensor.columns()) == (rows, columns) {
        return Ok(());
    }
    Err(invalid!("{what} is [{}, {}], wanted [{rows}, {columns}]", tensor.rows(), tensor.columns()))
}

pub(super) fn check_queries(positions: &[i32], context_len: i32) -> Result<()> {
    let is_valid = positions.first().is_none_or(|first| *first >= 0)
        && positions.is_sorted_by(|a, b| a < b)
        && positions.last().is_none_or(|last| last + 1 == context_len);
    match is_valid {
        true => Ok(()),
        false => Err(invalid!("queries at {positions:?} are not in order and end a context of {context_len} tokens")),
    }
}

/// Targets differ and share no block with a source.
pub(super) fn check_copies(sources: &[i32], targets: &[i32], block_size: usize) -> Result<()> {
    if let Some(slot) = sources.iter().chain(targets).find(|slot| **slot < 0) {
        return Err(invalid!("slot {slot} of a copy does not exist"));
    }
    let block = |slot: &i32| *slot as usize / block_size;
    let source_blocks: HashSet<usize> = sources.iter().map(block).collect();
    if let Some(slot) = targets.iter().find(|slot| source_blocks.contains(&block(slot))) {
        return Err(invalid!("slot {slot} is written in a block that is read by the same copy"));
    }
    match targets.iter().collect::<HashSet<_>>().len() == targets.len() {
        true => Ok(()),
        false => Err(invalid!("two tokens are copied to one slot")),
    }
}
