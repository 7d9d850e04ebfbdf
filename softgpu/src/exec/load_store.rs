//! Loads and stores, with their checks and counters.

use super::block::Block;
use super::isa::{Access, Address, LOCAL_WINDOW, NONE, PARAM_WINDOW, SHARED_WINDOW, WINDOW_BYTES};
use super::lanes::{FULL, LANES, Regs};
use super::shared;
use super::warp::{Warp, first};
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
#[inline(always)]
pub fn addresses(regs: &Regs, address: Address) -> [u64; LANES] {
    let mut all = regs.row(address.slot, address.wide);
    let most = if address.wide { u64::MAX } else { u64::from(u32::MAX) };
    for at in &mut all {
        *at = at.wrapping_add_signed(address.offset) & most;
    }
    all
}

/// Addresses in a window that begins at `start`.
#[inline(always)]
fn within(all: &[u64; LANES], start: u64) -> [u64; LANES] {
    let mut at = *all;
    for address in &mut at {
        *address = address.wrapping_sub(start);
    }
    at
}

/// Splits generic addresses by window: (space, lanes, start of the window), of which those without lanes are to be left out.
#[inline(always)]
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

#[inline(always)]
pub(super) fn check_alignment(addresses: &[u64; LANES], mask: u32, width: u64) -> Lanes<()> {
    let any = lanes_or(addresses, mask);
    if any & (width - 1) == 0 {
        return Ok(());
    }
    let lane = lanes(mask).find(|&lane| addresses[lane] & (width - 1) != 0).unwrap_or(0);
    let what = format!("{width}-byte access to address {:#x}", addresses[lane]);
    Err((lane, Fault::new(FaultKind::Misaligned, what)))
}

#[inline(always)]
fn lanes_or(addresses: &[u64; LANES], mask: u32) -> u64 {
    let mut any = 0;
    for (lane, address) in addresses.iter().enumerate() {
        any |= if mask >> lane & 1 == 1 { *address } else { 0 };
    }
    any
}

/// `ld`.
#[inline(always)]
pub fn load(warp: &mut Warp, block: &mut Block, access: &Access, mask: u32) -> Lanes<()> {
    let width = u64::from(access.bytes) * u64::from(access.count);
    let all = addresses(&warp.regs, access.address);
    check_alignment(&all, mask, width)?;
    let mut values: Values = [[0; 16]; LANES];
    for (space, mask, start) in spaces(access.space, &all, mask) {
        let at = within(&all, start);
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

/// The word of 8 bytes that an element lies in, its first bit there, and the bits that it has.
#[inline(always)]
fn place(element: usize, bytes: u8) -> (usize, usize, u64) {
    let first = element * bytes as usize;
    (first / 8 * 8, first % 8 * 8, u64::MAX >> (64 - 8 * u32::from(bytes)))
}

#[inline(always)]
fn word(value: &[u8; 16], at: usize) -> u64 {
    let mut raw = [0; 8];
    raw.copy_from_slice(&value[at..at + 8]);
    u64::from_le_bytes(raw)
}

/// Memory bytes to registers.
#[inline(always)]
pub(super) fn scatter(regs: &mut Regs, access: &Access, mask: u32, values: &Values) {
    for (element, &slot) in access.regs[..access.count as usize].iter().enumerate().filter(|(_, slot)| **slot != NONE) {
        let (at, shift, bits) = place(element, access.bytes);
        let unused = if access.signed { bits.leading_zeros() } else { 0 };
        let mut row = [0; LANES];
        for lane in 0..LANES {
            let value = word(&values[lane], at) >> shift & bits;
            row[lane] = ((value << unused) as i64 >> unused) as u64;
        }
        // Registers narrower than 32 bits keep their upper bits zero; signed 16-bit code masks on use.
        regs.set_row(slot, access.wide, &row, mask);
    }
}

/// Registers to memory bytes.
#[inline(always)]
fn gather(regs: &Regs, access: &Access) -> Values {
    let mut values: Values = [[0; 16]; LANES];
    for (element, &slot) in access.regs[..access.count as usize].iter().enumerate() {
        let (at, shift, bits) = place(element, access.bytes);
        let row = regs.row(slot, access.wide);
        for lane in 0..LANES {
            let with = word(&values[lane], at) | (row[lane] & bits) << shift;
            values[lane][at..at + 8].copy_from_slice(&with.to_le_bytes());
        }
    }
    values
}

/// `st`.
#[inline(always)]
pub fn store(warp: &mut Warp, block: &mut Block, access: &Access, mask: u32) -> Lanes<()> {
    let width = u64::from(access.bytes) * u64::from(access.count);
    let all = addresses(&warp.regs, access.address);
    check_alignment(&all, mask, width)?;
    let values = gather(&warp.regs, access);
    for (space, mask, start) in spaces(access.space, &all, mask) {
        let at = within(&all, start);
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

#[inline(always)]
pub(super) fn read_shared(
    warp: &Warp,
    block: &mut Block,
    at: &[u64; LANES],
    mask: u32,
    width: u64,
    values: &mut Values,
) -> Lanes<()> {
    count_shared(block, at, mask, width);
    match width {
        4 => read_lanes::<4>(warp, block, at, mask, values),
        8 => read_lanes::<8>(warp, block, at, mask, values),
        16 => read_lanes::<16>(warp, block, at, mask, values),
        2 => read_lanes::<2>(warp, block, at, mask, values),
        _ => read_lanes::<1>(warp, block, at, mask, values),
    }
}

#[inline(always)]
fn read_lanes<const WIDTH: usize>(
    warp: &Warp,
    block: &mut Block,
    at: &[u64; LANES],
    mask: u32,
    values: &mut Values,
) -> Lanes<()> {
    let uniform = uniform(at, mask);
    let mask = uniform.map_or(mask, |lane| 1 << lane);
    for lane in lanes(mask) {
        let bytes: &[u8; WIDTH] = block.shared.read(at[lane], warp.index).map_err(|f| (lane, f))?;
        values[lane][..WIDTH].copy_from_slice(bytes);
    }
    spread(values, uniform);
    Ok(())
}

#[inline(always)]
fn write_shared(
    warp: &Warp,
    block: &mut Block,
    at: &[u64; LANES],
    mask: u32,
    width: u64,
    values: &Values,
) -> Lanes<()> {
    count_shared(block, at, mask, width);
    match width {
        4 => write_lanes::<4>(warp, block, at, mask, values),
        8 => write_lanes::<8>(warp, block, at, mask, values),
        16 => write_lanes::<16>(warp, block, at, mask, values),
        2 => write_lanes::<2>(warp, block, at, mask, values),
        _ => write_lanes::<1>(warp, block, at, mask, values),
    }
}

#[inline(always)]
fn write_lanes<const WIDTH: usize>(
    warp: &Warp,
    block: &mut Block,
    at: &[u64; LANES],
    mask: u32,
    values: &Values,
) -> Lanes<()> {
    for lane in lanes(mask) {
        let mut bytes = [0; WIDTH];
        bytes.copy_from_slice(&values[lane][..WIDTH]);
        block.shared.write(at[lane], &bytes, (warp.index, lane)).map_err(|f| (lane, f))?;
    }
    Ok(())
}

#[inline(always)]
pub(super) fn count_shared(block: &mut Block, at: &[u64; LANES], mask: u32, width: u64) {
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

#[inline(always)]
fn read_params(block: &Block, at: &[u64; LANES], mask: u32, width: u64, values: &mut Values) -> Lanes<()> {
    let uniform = uniform(at, mask);
    let mask = uniform.map_or(mask, |lane| 1 << lane);
    for lane in lanes(mask) {
        let start = at[lane] as usize;
        let Some(bytes) = block.launch.params.get(start..start.saturating_add(width as usize)) else {
            let what = format!("parameter offset {start} of {} bytes", block.launch.params.len());
            return Err((lane, Fault::new(FaultKind::OutOfBounds, what)));
        };
        values[lane][..width as usize].copy_from_slice(bytes);
    }
    spread(values, uniform);
    Ok(())
}

/// How the addresses of a request lie.
pub(super) struct Pattern {
    /// All lanes active, each `width` after the one before.
    is_dense: bool,
    pub(super) sectors: u64,
    pub(super) bytes: u64,
}

/// The first lane of a mask, if all of it want the same address.
#[inline(always)]
fn uniform(at: &[u64; LANES], mask: u32) -> Option<usize> {
    let (lane, mut differ) = (first(mask), 0);
    for other in 0..LANES {
        differ |= if mask >> other & 1 == 1 { at[other] ^ at[lane] } else { 0 };
    }
    (differ == 0).then_some(lane)
}

/// What one lane has read for all of them.
#[inline(always)]
fn spread(values: &mut Values, from: Option<usize>) {
    if let Some(lane) = from {
        let value: [u8; 16] = values[lane];
        *values = [value; LANES];
    }
}

#[inline(always)]
pub(super) fn pattern(at: &[u64; LANES], mask: u32, width: u64) -> Pattern {
    let mut is_dense = mask == FULL;
    for lane in 1..LANES {
        is_dense &= at[lane] == at[lane - 1].wrapping_add(width);
    }
    if is_dense {
        let sectors = (at[31] + width - 1) / 32 - at[0] / 32 + 1;
        return Pattern { is_dense, sectors, bytes: 32 * width };
    }
    if let Some(lane) = uniform(at, mask) {
        let first = at[lane];
        return Pattern { is_dense, sectors: (first + width - 1) / 32 - first / 32 + 1, bytes: width };
    }
    sparse_pattern(at, mask, width)
}

fn sparse_pattern(at: &[u64; LANES], mask: u32, width: u64) -> Pattern {
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
    Pattern { is_dense: false, sectors, bytes }
}

/// The allocation of an access, trying the one of the lane before first.
#[inline(always)]
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

#[inline(always)]
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
    let uniform = uniform(at, mask);
    let mask = uniform.map_or(mask, |lane| 1 << lane);
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
    spread(values, uniform);
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

/// # Safety
/// `width` (1, 2, 4, 8 or 16) bytes are writable at `target`.
#[inline(always)]
unsafe fn copy_out(value: &[u8; 16], target: *mut u8, width: u64) {
    // SAFETY: the caller's promise; the source has 16 bytes.
    unsafe {
        match width {
            1 => *target = value[0],
            2 => std::ptr::copy_nonoverlapping(value.as_ptr(), target, 2),
            4 => std::ptr::copy_nonoverlapping(value.as_ptr(), target, 4),
            8 => std::ptr::copy_nonoverlapping(value.as_ptr(), target, 8),
            _ => std::ptr::copy_nonoverlapping(value.as_ptr(), target, 16),
        }
    }
}

#[inline(always)]
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

#[inline(always)]
fn check_write(block: &mut Block, allocation: &Allocation, offset: u64, bytes: u64) -> Result<(), Fault> {
    let acquired = &block.acquired;
    let (base, shift) = (block.by.tag_base, block.by.tag_shift);
    block.counters.global_store_footprint_bytes +=
        allocation.note_write(offset, bytes, &block.by, |tag| !is_acquired(acquired, tag - base, shift))?;
    Ok(())
}

#[inline(always)]
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
        unsafe { copy_out(&values[lane], allocation.data(offset), width) };
        allocation.mark_init(offset, width);
        last = Some(allocation);
    }
    Ok(())
}
