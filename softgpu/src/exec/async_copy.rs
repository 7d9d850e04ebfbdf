//! `cp.async` and `ldmatrix`: the way of matrix tiles into and out of shared memory.

use super::block::Block;
use super::isa::{Address, AsyncCopy, NONE};
use super::lanes::{FULL, LANES};
use super::load_store::{
    Lanes, Values, addresses, check_alignment, check_read, copy_in, lanes, pattern, read_shared, resolve,
};
use super::warp::{Pending, Warp};
use crate::fault::{Fault, FaultKind};

/// `cp.async`: reads now, arrives at its wait.
#[inline(always)]
pub fn async_copy(warp: &mut Warp, block: &mut Block, copy: &AsyncCopy, mask: u32) -> Lanes<()> {
    let width = u64::from(copy.bytes);
    let (targets, sources) = (addresses(&warp.regs, copy.target), addresses(&warp.regs, copy.source));
    check_alignment(&targets, mask, width)?;
    let read: [u64; LANES] = match copy.source_bytes {
        NONE => [width; LANES],
        slot => warp.regs.r32[slot as usize].map(u64::from),
    };
    let mut reading = 0;
    for lane in lanes(mask) {
        if read[lane] > width {
            let what = format!("cp.async of {width} bytes with a source size of {}", read[lane]);
            return Err((lane, Fault::new(FaultKind::AsyncCopy, what)));
        }
        reading |= u32::from(read[lane] > 0) << lane;
    }
    check_alignment(&sources, reading, width)?;
    if reading != 0 {
        let pattern = pattern(&sources, reading, width);
        block.counters.global_load_requests += 1;
        block.counters.global_load_sectors += pattern.sectors;
        block.counters.global_load_bytes += pattern.bytes;
    }
    let mut last = None;
    for lane in lanes(mask) {
        let mut data = [0; 16];
        if read[lane] > 0 {
            let allocation = resolve(block, last, lane, sources[lane], read[lane])?;
            let offset = sources[lane] - allocation.base;
            check_read(block, allocation, offset, read[lane]).map_err(|f| (lane, f))?;
            // SAFETY: `resolve` found the range in a live allocation.
            unsafe { copy_in(allocation.data(offset), &mut data, read[lane]) };
            last = Some(allocation);
        }
        let (target, shared) = (targets[lane], &mut block.shared);
        match width {
            16 => shared.reserve::<16>(target, warp.index),
            8 => shared.reserve::<8>(target, warp.index),
            _ => shared.reserve::<4>(target, warp.index),
        }
        .map_err(|f| (lane, f))?;
        block.counters.async_copy_bytes += read[lane];
        warp.open_copies.push(Pending { lane: lane as u8, target: target as u32, bytes: copy.bytes, data });
    }
    Ok(())
}

/// `ldmatrix`: lane 8j + i names row i of matrix j.
#[inline(always)]
pub fn load_matrix(warp: &mut Warp, block: &mut Block, d: &[u16], transposed: bool, address: Address) -> Lanes<()> {
    let all = addresses(&warp.regs, address);
    let used = if d.len() == 4 { FULL } else { (1 << (8 * d.len())) - 1 };
    check_alignment(&all, used, 16)?;
    let mut values: Values = [[0; 16]; LANES];
    read_shared(warp, block, &all, used, 16, &mut values)?;
    let element = |matrix: usize, row: usize, column: usize| {
        let bytes = &values[8 * matrix + row][2 * column..2 * column + 2];
        u32::from(u16::from_le_bytes([bytes[0], bytes[1]]))
    };
    for (matrix, &slot) in d.iter().enumerate() {
        for lane in 0..LANES {
            let (g, t) = (lane / 4, 2 * (lane % 4));
            let (low, high) = if transposed {
                (element(matrix, t, g), element(matrix, t + 1, g))
            } else {
                (element(matrix, g, t), element(matrix, g, t + 1))
            };
            warp.regs.r32[slot as usize][lane] = high << 16 | low;
        }
    }
    Ok(())
}
