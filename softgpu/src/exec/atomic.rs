//! `atom` and `red`.

use super::block::Block;
use super::isa::{AtomOp, Atomic, NONE, NumType};
use super::lanes::LANES;
use super::load_store::{Lanes, addresses, check_alignment, check_read, lanes, spaces};
use super::warp::Warp;
use crate::fault::{Fault, FaultKind};
use crate::ptx::syntax::Space;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

/// The result of a read-modify-write.
pub fn combine(op: AtomOp, ty: NumType, old: u64, b: u64, c: u64) -> u64 {
    let bits = ty.bits();
    let cut = |v: u64| if bits == 64 { v } else { v & 0xffff_ffff };
    let signed = |v: u64| if bits == 64 { v as i64 } else { i64::from(v as i32) };
    let less = if ty.is_signed() { signed(b) < signed(old) } else { b < old };
    match (op, ty) {
        (AtomOp::Add, NumType::F32) => u64::from((f32::from_bits(old as u32) + f32::from_bits(b as u32)).to_bits()),
        (AtomOp::Add, NumType::F64) => (f64::from_bits(old) + f64::from_bits(b)).to_bits(),
        (AtomOp::Add, _) => cut(old.wrapping_add(b)),
        (AtomOp::Min, _) => {
            if less {
                b
            } else {
                old
            }
        }
        (AtomOp::Max, _) => {
            if less || b == old {
                old
            } else {
                b
            }
        }
        (AtomOp::And, _) => old & b,
        (AtomOp::Or, _) => old | b,
        (AtomOp::Xor, _) => old ^ b,
        (AtomOp::Exch, _) => b,
        (AtomOp::Cas, _) => {
            if old == b {
                c
            } else {
                old
            }
        }
        (AtomOp::Inc, _) => {
            if old >= b {
                0
            } else {
                old + 1
            }
        }
        (AtomOp::Dec, _) => {
            if old == 0 || old > b {
                b
            } else {
                old - 1
            }
        }
    }
}

/// `atom` and `red`, lane after lane.
pub fn atomic(warp: &mut Warp, block: &mut Block, atomic: &Atomic, mask: u32) -> Lanes<()> {
    let width = u64::from(atomic.ty.bits() / 8);
    let all = addresses(&warp.regs, atomic.address);
    check_alignment(&all, mask, width)?;
    let wide = atomic.ty.is_wide();
    let [bs, cs] = [atomic.b, atomic.c].map(|slot| warp.regs.row(slot, wide));
    let mut olds = [0; LANES];
    for (space, mask, start) in spaces(atomic.space, &all, mask) {
        for lane in lanes(mask) {
            let (b, c, at) = (bs[lane], cs[lane], all[lane].wrapping_sub(start));
            let update = |old: u64| combine(atomic.op, atomic.ty, old, b, c);
            olds[lane] = match space {
                Space::Shared => atomic_shared(block, at, width, (warp.index, lane), update),
                Space::Local | Space::Param => {
                    Err(Fault::new(FaultKind::OutOfBounds, "atomics work on global and shared memory only"))
                }
                _ => atomic_global(block, at, width, update),
            }
            .map_err(|f| (lane, f))?;
            block.counters.atomics += 1;
        }
    }
    if atomic.d != NONE {
        warp.regs.set_row(atomic.d, wide, &olds, mask);
    }
    Ok(())
}

fn atomic_shared(
    block: &mut Block,
    at: u64,
    width: u64,
    by: (u32, usize),
    update: impl Fn(u64) -> u64,
) -> Result<u64, Fault> {
    let bytes = block.shared.atomic(at, width, by)?;
    let mut raw = [0; 8];
    raw[..width as usize].copy_from_slice(bytes);
    let old = u64::from_le_bytes(raw);
    bytes.copy_from_slice(&update(old).to_le_bytes()[..width as usize]);
    Ok(old)
}

fn atomic_global(block: &mut Block, at: u64, width: u64, update: impl Fn(u64) -> u64) -> Result<u64, Fault> {
    let allocation = block.launch.memory.resolve(at, width)?;
    let offset = at - allocation.base;
    check_read(block, allocation, offset, width)?;
    block.synchronise(at);
    // SAFETY: the range lies in a live allocation, is aligned (checked), and all kernels reach it by atomics here; a
    // kernel that also uses plain accesses on it races, which the checks report.
    let old = unsafe {
        let data = allocation.data(offset);
        if width == 8 {
            AtomicU64::from_ptr(data.cast()).fetch_update(Relaxed, Relaxed, |old| Some(update(old))).unwrap_or(0)
        } else {
            let cell = AtomicU32::from_ptr(data.cast());
            let old = cell.fetch_update(Relaxed, Relaxed, |old| Some(update(u64::from(old)) as u32));
            u64::from(old.unwrap_or(0))
        }
    };
    Ok(old)
}
