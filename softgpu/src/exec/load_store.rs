//! Loads and stores, with their checks and counters.

use super::block::Block;
use super::isa::{Access, Address, LOCAL_WINDOW, NONE, PARAM_WINDOW, SHARED_WINDOW, WINDOW_BYTES};
use super::lanes::{FULL, LANES, Regs};
use super::shared;
use super::warp::Warp;
use crate::fault::{Fault, FaultKind};
use crate::memory::Allocation;
use crate::ptx::syntax::Space;

/// A finding and the lane that made it.
pub type Lanes<T> = Result<T, (usize, Fault)>;

/// Up to 16 bytes for each lane.
pub(super) type Values = [[u8; 16]; LANES];

/// Lanes of a mask in order.
pub(super) fn lanes(mask: u32) -> impl Iterator<Item = usize> {
    (0..LANES).filter(move |lane| mask >> lane & 1 == 1)
}

/// The address of every lane.
#[inline]
pub fn addresses(regs: &Regs, address: Address) -> [u64; LANES] {
    if address.wide {
        regs.r64[address.slot as usize].map(|a| a.wrapping_add_signed(address.offset))
    } else {
        regs.r32[address.slot as usize].map(|a| u64::from(a.wrapping_add(address.offset as u32)))
    }
}

/// Splits generic addresses by window: (space, lanes, start of the window), of which those without lanes are to be left out.
pub(super) fn spaces(space: Space, addresses: &[u64; LANES], mask: u32) -> impl Iterator<Item = (Space, u32, u64)> {
    let mut found = [(space, 0, 0); 4];
    if space == Space::Generic {
        split_by_window(addresses, mask, &mut found);
    } else {
        found[0] = (space, mask, if space == Space::Param { PARAM_WINDOW } else { 0 });
    }
    found.into_iter().filter(|(_, mask, _)| *mask != 0)
}

fn split_by_window(addresses: &[u64; LANES], mask: u32, found: &mut [(Space, u32, u64); 4]) {
    for lane in lanes(mask) {
        let window = addresses[lane] & !(WINDOW_BYTES - 1);
        let (space, start) = match window {
            SHARED_WINDOW => (Space::Shared, window),
            LOCAL_WINDOW => (Space::Local, window),
            PARAM_WINDOW => (Space::Param, window),
            _ => (Space::Global, 0),
        };
        if let Some(part) = found.iter_mut().find(|part| part.0 == space || part.1 == 0) {
            *part = (space, part.1 | 1 << lane, start);
        }
    }
}

pub(super) fn check_alignment(addresses: &[u64; LANES], mask: u32, width: u64) -> Lanes<()> {
    let any = lanes_or(addresses, mask);
    if any & (width - 1) == 0 {
        return Ok(());
    }
    let lane = lanes(mask).find(|&lane| addresses[lane] & (width - 1) != 0).unwrap_or(0);
    let what = format!("{width}-byte access to address {:#x}", addresses[lane]);
    Err((lane, Fault::new(FaultKind::Misaligned, what)))
}

fn lanes_or(addresses: &[u64; LANES], mask: u32) -> u64 {
    let mut any = 0;
    for (lane, address) in addresses.iter().enumerate() {
        any |= if mask >> lane & 1 == 1 { *address } else { 0 };
    }
    any
}

/// `ld`.
pub fn load(warp: &mut Warp, block: &mut Block, access: &Access, mask: u32) -> Lanes<()> {
    let width = u64::from(access.bytes) * u64::from(access.count);
    let all = addresses(&warp.regs, access.address);
    check_alignment(&all, mask, width)?;
    let mut values: Values = [[0; 16]; LANES];
    for (space, mask, start) in spaces(access.space, &all, mask) {
        let at = all.map(|a| a.wrapping_sub(start));
        match space {
            Space::Shared => read_shared(warp, block, &at, mask, width, &mut values)?,
            Space::Local => read_local(warp, &at, mask, width, &mut values)?,
            Space::Param => read_params(block, &at, mask, width, &mut values)?,
            _ => read_global(block, &at, mask, width, &mut values)?,
        }
    }
    scatter(&mut warp.regs, access, mask, &values);
    Ok(())
}

/// Memory bytes to registers.
fn scatter(regs: &mut Regs, access: &Access, mask: u32, values: &Values) {
    let bytes = access.bytes as usize;
    for (element, &slot) in access.regs[..access.count as usize].iter().enumerate() {
        if slot == NONE {
            continue;
        }
        if bytes == 4 && !access.wide {
            let row = &mut regs.r32[slot as usize];
            for lane in 0..LANES {
                let v = &values[lane][element * 4..element * 4 + 4];
                let value = u32::from_le_bytes([v[0], v[1], v[2], v[3]]);
                row[lane] = if mask >> lane & 1 == 1 { value } else { row[lane] };
            }
            continue;
        }
        for lane in lanes(mask) {
            let mut raw = [0; 8];
            raw[..bytes].copy_from_slice(&values[lane][element * bytes..(element + 1) * bytes]);
            let value = u64::from_le_bytes(raw);
            let unused = 64 - 8 * bytes as u32;
            let value = if access.signed { ((value << unused) as i64 >> unused) as u64 } else { value };
            if access.wide {
                regs.r64[slot as usize][lane] = value;
            } else {
                // Registers narrower than 32 bits keep their upper bits zero; signed 16-bit code masks on use.
                regs.r32[slot as usize][lane] = value as u32;
            }
        }
    }
}

/// `st`.
pub fn store(warp: &mut Warp, block: &mut Block, access: &Access, mask: u32) -> Lanes<()> {
    let width = u64::from(access.bytes) * u64::from(access.count);
    let all = addresses(&warp.regs, access.address);
    check_alignment(&all, mask, width)?;
    let mut values: Values = [[0; 16]; LANES];
    let bytes = access.bytes as usize;
    for (element, &slot) in access.regs[..access.count as usize].iter().enumerate() {
        for lane in 0..LANES {
            let value = if access.wide {
                regs64(&warp.regs, slot, lane)
            } else {
                u64::from(warp.regs.r32[slot as usize][lane])
            };
            values[lane][element * bytes..(element + 1) * bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
        }
    }
    for (space, mask, start) in spaces(access.space, &all, mask) {
        let at = all.map(|a| a.wrapping_sub(start));
        match space {
            Space::Shared => write_shared(warp, block, &at, mask, width, &values)?,
            Space::Local => write_local(warp, &at, mask, width, &values)?,
            Space::Param => {
                return Err((0, Fault::new(FaultKind::OutOfBounds, "kernel parameters are read-only")));
            }
            _ => write_global(block, &at, mask, width, &values)?,
        }
    }
    Ok(())
}

pub(super) fn regs64(regs: &Regs, slot: u16, lane: usize) -> u64 {
    regs.r64[slot as usize][lane]
}

pub(super) fn read_shared(
    warp: &Warp,
    block: &mut Block,
    at: &[u64; LANES],
    mask: u32,
    width: u64,
    values: &mut Values,
) -> Lanes<()> {
    count_shared(block, at, mask, width);
    for lane in lanes(mask) {
        let bytes = block.shared.read(at[lane], width, warp.index).map_err(|f| (lane, f))?;
        // SAFETY: `read` gave `width` bytes.
        unsafe { copy_in(bytes.as_ptr(), &mut values[lane], width) };
    }
    Ok(())
}

fn write_shared(
    warp: &Warp,
    block: &mut Block,
    at: &[u64; LANES],
    mask: u32,
    width: u64,
    values: &Values,
) -> Lanes<()> {
    count_shared(block, at, mask, width);
    for lane in lanes(mask) {
        block.shared.write(at[lane], &values[lane][..width as usize], warp.index).map_err(|f| (lane, f))?;
    }
    Ok(())
}

fn count_shared(block: &mut Block, at: &[u64; LANES], mask: u32, width: u64) {
    let (passes, ideal) = shared::wavefronts(at, mask, width);
    block.counters.shared_requests += 1;
    block.counters.shared_wavefronts += passes;
    block.counters.shared_wavefronts_ideal += ideal;
}

fn local_range(warp: &Warp, lane: usize, at: u64, width: u64) -> Lanes<std::ops::Range<usize>> {
    let size = warp.local.len() as u64 / LANES as u64;
    if at.checked_add(width).is_none_or(|end| end > size) {
        let what = format!("{width} bytes at local address {at:#x} of {size} bytes of local memory per thread");
        return Err((lane, Fault::new(FaultKind::OutOfBounds, what)));
    }
    let start = (lane as u64 * size + at) as usize;
    Ok(start..start + width as usize)
}

fn read_local(warp: &Warp, at: &[u64; LANES], mask: u32, width: u64, values: &mut Values) -> Lanes<()> {
    for lane in lanes(mask) {
        let range = local_range(warp, lane, at[lane], width)?;
        if warp.local_init[range.clone()].contains(&0) {
            let what = format!("local address {:#x}, which this thread has not written", at[lane]);
            return Err((lane, Fault::new(FaultKind::Uninitialised, what)));
        }
        values[lane][..width as usize].copy_from_slice(&warp.local[range]);
    }
    Ok(())
}

fn write_local(warp: &mut Warp, at: &[u64; LANES], mask: u32, width: u64, values: &Values) -> Lanes<()> {
    for lane in lanes(mask) {
        let range = local_range(warp, lane, at[lane], width)?;
        warp.local_init[range.clone()].fill(1);
        warp.local[range].copy_from_slice(&values[lane][..width as usize]);
    }
    Ok(())
}

fn read_params(block: &Block, at: &[u64; LANES], mask: u32, width: u64, values: &mut Values) -> Lanes<()> {
    for lane in lanes(mask) {
        let start = at[lane] as usize;
        let Some(bytes) = block.launch.params.get(start..start.saturating_add(width as usize)) else {
            let what = format!("parameter offset {start} of {} bytes", block.launch.params.len());
            return Err((lane, Fault::new(FaultKind::OutOfBounds, what)));
        };
        values[lane][..width as usize].copy_from_slice(bytes);
    }
    Ok(())
}

/// How the addresses of a request lie.
pub(super) struct Pattern {
    /// All lanes active, each `width` after the one before.
    is_dense: bool,
    pub(super) sectors: u64,
    pub(super) bytes: u64,
}

pub(super) fn pattern(at: &[u64; LANES], mask: u32, width: u64) -> Pattern {
    let mut is_dense = mask == FULL;
    for lane in 1..LANES {
        is_dense &= at[lane] == at[lane - 1].wrapping_add(width);
    }
    if is_dense {
        let sectors = (at[31] + width - 1) / 32 - at[0] / 32 + 1;
        return Pattern { is_dense, sectors, bytes: 32 * width };
    }
    let mut sorted = [0; LANES];
    let mut n = 0;
    for lane in lanes(mask) {
        sorted[n] = at[lane];
        n += 1;
    }
    sorted[..n].sort_unstable();
    let (mut sectors, mut bytes, mut end, mut last_sector) = (0, 0, 0, u64::MAX);
    for &address in &sorted[..n] {
        let start = address.max(end);
        let stop = address.saturating_add(width);
        bytes += stop.saturating_sub(start);
        end = end.max(stop);
        for sector in address / 32..=(stop - 1) / 32 {
            sectors += u64::from(sector != last_sector);
            last_sector = sector;
        }
    }
    Pattern { is_dense, sectors, bytes }
}

/// The allocation of an access, trying the one of the lane before first.
pub(super) fn resolve<'m>(
    block: &Block<'m>,
    last: Option<&'m Allocation>,
    lane: usize,
    at: u64,
    width: u64,
) -> Lanes<&'m Allocation> {
    match last {
        Some(allocation) if allocation.contains(at, width) => Ok(allocation),
        _ => block.launch.memory.resolve(at, width).map_err(|f| (lane, f)),
    }
}

fn read_global(block: &mut Block, at: &[u64; LANES], mask: u32, width: u64, values: &mut Values) -> Lanes<()> {
    let pattern = pattern(at, mask, width);
    block.counters.global_load_requests += 1;
    block.counters.global_load_sectors += pattern.sectors;
    block.counters.global_load_bytes += pattern.bytes;
    if pattern.is_dense && block.launch.memory.resolve(at[0], 32 * width).is_ok() {
        let allocation = block.launch.memory.resolve(at[0], 32 * width).map_err(|f| (0, f))?;
        let offset = at[0] - allocation.base;
        check_read(block, allocation, offset, 32 * width).map_err(|f| (0, f))?;
        for (lane, value) in values.iter_mut().enumerate() {
            // SAFETY: the whole range lies inside a live allocation.
            unsafe { copy_in(allocation.data(offset + lane as u64 * width), value, width) };
        }
        return Ok(());
    }
    let (mut last, mut previous) = (None, None);
    for lane in lanes(mask) {
        if let Some(before) = previous
            && at[before] == at[lane]
        {
            let value: [u8; 16] = values[before];
            values[lane] = value;
            continue;
        }
        let allocation = resolve(block, last, lane, at[lane], width)?;
        let offset = at[lane] - allocation.base;
        check_read(block, allocation, offset, width).map_err(|f| (lane, f))?;
        // SAFETY: `resolve` found the range in a live allocation.
        unsafe { copy_in(allocation.data(offset), &mut values[lane], width) };
        (last, previous) = (Some(allocation), Some(lane));
    }
    Ok(())
}

/// # Safety
/// `width` (1, 2, 4, 8 or 16) bytes are readable at `source`.
#[inline(always)]
pub(super) unsafe fn copy_in(source: *const u8, value: &mut [u8; 16], width: u64) {
    // SAFETY: the caller's promise; the target has 16 bytes.
    unsafe {
        match width {
            1 => value[0] = *source,
            2 => std::ptr::copy_nonoverlapping(source, value.as_mut_ptr(), 2),
            4 => std::ptr::copy_nonoverlapping(source, value.as_mut_ptr(), 4),
            8 => std::ptr::copy_nonoverlapping(source, value.as_mut_ptr(), 8),
            16 => std::ptr::copy_nonoverlapping(source, value.as_mut_ptr(), 16),
            _ => std::ptr::copy_nonoverlapping(source, value.as_mut_ptr(), width as usize),
        }
    }
}

pub(super) fn check_read(block: &mut Block, allocation: &Allocation, offset: u64, bytes: u64) -> Result<(), Fault> {
    if !allocation.is_init(offset, bytes) {
        let at = allocation.first_uninit(offset..offset + bytes).unwrap_or(offset);
        let what = format!("address {:#x}, never written, in {}", allocation.base + at, allocation.describe());
        return Err(Fault::new(FaultKind::Uninitialised, what));
    }
    let acquired = &block.acquired;
    let (base, shift) = (block.by.tag_base, block.by.tag_shift);
    block.counters.global_load_footprint_bytes +=
        allocation.note_read(offset, bytes, &block.by, |tag| !is_acquired(acquired, tag - base, shift))?;
    Ok(())
}

/// Whether a write of another block was published (fence, atomic) and seen (atomic) by this one.
fn is_acquired(acquired: &std::collections::HashMap<u32, u32>, tag: u32, shift: u32) -> bool {
    shift > 0 && acquired.get(&(tag >> shift)).is_some_and(|&clock| clock > tag & ((1 << shift) - 1))
}

fn check_write(block: &mut Block, allocation: &Allocation, offset: u64, bytes: u64) -> Result<(), Fault> {
    let acquired = &block.acquired;
    let (base, shift) = (block.by.tag_base, block.by.tag_shift);
    block.counters.global_store_footprint_bytes +=
        allocation.note_write(offset, bytes, &block.by, |tag| !is_acquired(acquired, tag - base, shift))?;
    Ok(())
}

fn write_global(block: &mut Block, at: &[u64; LANES], mask: u32, width: u64, values: &Values) -> Lanes<()> {
    let pattern = pattern(at, mask, width);
    block.counters.global_store_requests += 1;
    block.counters.global_store_sectors += pattern.sectors;
    block.counters.global_store_bytes += pattern.bytes;
    let whole = if pattern.is_dense { block.launch.memory.resolve(at[0], 32 * width).ok() } else { None };
    if let Some(allocation) = whole {
        check_write(block, allocation, at[0] - allocation.base, 32 * width).map_err(|f| (0, f))?;
    }
    let mut last = whole;
    for lane in lanes(mask) {
        let allocation = resolve(block, last, lane, at[lane], width)?;
        let offset = at[lane] - allocation.base;
        if whole.is_none() {
            check_write(block, allocation, offset, width).map_err(|f| (lane, f))?;
        }
        // SAFETY: `resolve` found the range in a live allocation.
        unsafe { std::ptr::copy_nonoverlapping(values[lane].as_ptr(), allocation.data(offset), width as usize) };
        allocation.mark_init(offset, width);
        last = Some(allocation);
    }
    Ok(())
}
