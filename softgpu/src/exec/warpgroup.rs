//! `wgmma`: products of 64 rows by four warps, of which each computes its 16 when it comes to the instruction.
//!
//! PTX ISA, "Asynchronous warpgroup level matrix instructions". Sums are those of a chain of `mma.m16n8k16`, bit for bit, and
//! are there at once: PTX copies accumulators from register to register before the wait. What is asynchronous here is the
//! reading: tiles are under way from an instruction to the wait for its group ([`super::async_proxy`]).

use super::block::Block;
use super::isa::{Accumulate, Left, Wgmma};
use super::lanes::{FULL, LANES, Row32};
use super::load_store::Lanes;
use super::mma::{Factors, Sums, add, factors, load, store};
use super::shared::Shared;
use super::tile::Tile;
use super::warp::Warp;
use crate::fault::{Fault, FaultKind};
use std::collections::VecDeque;

/// Warps of a warpgroup.
const WARPS: u32 = 4;
/// Core matrices along M.
const M_GROUPS: u32 = 8;
const K: usize = 16;

/// The products of one warp that are under way.
#[derive(Debug, Default)]
pub struct Products {
    /// Whether a `wgmma.fence` lies between the last wait and here.
    is_fenced: bool,
    /// Issued and not committed.
    open: Vec<Tiles>,
    groups: VecDeque<Vec<Tiles>>,
    /// Issued in this block.
    issued: usize,
    /// Where the last one was issued, for messages.
    pub(super) pc: u32,
}

/// What a product reads of shared memory.
#[derive(Clone, Copy, Debug)]
struct Tiles {
    a: Option<Tile>,
    b: Tile,
}

/// A product as the warps of a warpgroup must agree on it: place, descriptors, whether it adds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Issue {
    pc: u32,
    descriptors: [u64; 2],
    accumulates: bool,
}

impl Products {
    /// Begins a block.
    pub(super) fn begin(&mut self) {
        self.open.clear();
        self.groups.clear();
        (self.is_fenced, self.issued) = (false, 0);
    }

    /// `wgmma.fence`.
    pub(super) fn fence(&mut self) {
        self.is_fenced = true;
    }

    /// `wgmma.commit_group`.
    pub(super) fn commit(&mut self) {
        self.groups.push_back(std::mem::take(&mut self.open));
    }

    /// `wgmma.wait_group`: ends the reads of all groups but the last `left`.
    pub(super) fn wait(&mut self, shared: &mut Shared, left: u32, warp: u32) {
        self.is_fenced = false;
        let done = self.groups.len().saturating_sub(left as usize);
        for tiles in self.groups.drain(..done).flatten() {
            for tile in tiles.a.iter().chain([&tiles.b]) {
                end(shared, tile, warp);
            }
        }
    }

    /// What the end of the kernel finds under way.
    pub(super) fn left(&self) -> Option<Fault> {
        let missing = if !self.open.is_empty() {
            "committed (wgmma.commit_group)"
        } else if self.groups.iter().any(|group| !group.is_empty()) {
            "waited for (wgmma.wait_group)"
        } else {
            return None;
        };
        Some(Fault::new(FaultKind::AsyncMatrix, format!("wgmma.mma_async is never {missing}")))
    }

    /// Whether so many products as the warpgroup were issued.
    ///
    /// # Errors
    /// Says how many it should have been.
    pub fn check_count(&self, warp: u32, others: usize) -> Result<(), Fault> {
        if self.issued == others {
            return Ok(());
        }
        let what =
            format!("warp {warp} has issued {} wgmma.mma_async, another warp of its warpgroup {others}", self.issued);
        Err(Fault::new(FaultKind::AsyncMatrix, what))
    }
}

fn end(shared: &mut Shared, tile: &Tile, warp: u32) {
    for core in 0..2 * tile.groups {
        for address in tile.rows(core / 2, core % 2) {
            shared.end_read(address, warp);
        }
    }
}

/// `wgmma.mma_async` of all lanes of a warp.
#[inline(always)]
pub fn multiply(op: &Wgmma, warp: &mut Warp, block: &mut Block) -> Lanes<()> {
    let accumulates = begin(op, warp, block)?;
    let tiles = tiles(op, warp).map_err(|fault| (0, fault))?;
    let counted = &mut block.counters;
    counted.mma += 1;
    counted.mma_flops += 2 * 16 * 16 * 2 * op.d.len() as u64;
    // Named where they are called: a pointer to one of them would miss the caller's instruction set.
    let done = if op.is_bf16 {
        multiply_as::<true>(op, warp, &mut block.shared, &tiles, accumulates)
    } else {
        multiply_as::<false>(op, warp, &mut block.shared, &tiles, accumulates)
    };
    done.map_err(|fault| (0, fault))?;
    warp.products.open.push(tiles);
    Ok(())
}

/// Checks that the instruction may be here; whether it accumulates.
fn begin(op: &Wgmma, warp: &mut Warp, block: &mut Block) -> Lanes<bool> {
    let fail = |kind: FaultKind, what: String| Err((0, Fault::new(kind, what)));
    let (group, threads) = (warp.index / WARPS, block.launch.threads());
    let end = (group + 1) * WARPS * LANES as u32;
    if end > threads {
        return fail(
            FaultKind::InactiveLane,
            format!("wgmma in warpgroup {group}, threads {} to {}, of a block of {threads}", end - 128, end - 1),
        );
    }
    if !warp.products.is_fenced {
        return fail(
            FaultKind::AsyncMatrix,
            "wgmma.mma_async with no wgmma.fence since the start or the last wgmma.wait_group".to_owned(),
        );
    }
    let accumulates = match op.accumulate {
        Accumulate::Always => true,
        Accumulate::Never => false,
        Accumulate::If(predicate) => match warp.predicate(predicate) {
            FULL => true,
            0 => false,
            lanes => {
                return fail(FaultKind::InactiveLane, format!("scale-d of wgmma holds in lanes {lanes:#010x} alone"));
            }
        },
    };
    let a = if let Left::Shared(row, _) = op.a { uniform(warp, row)? } else { 0 };
    let issue = Issue { pc: warp.products.pc, descriptors: [a, uniform(warp, op.b)?], accumulates };
    agree(issue, warp, block).map(|()| accumulates)
}

/// A descriptor, the same in all lanes.
fn uniform(warp: &Warp, row: u16) -> Lanes<u64> {
    let row = &warp.regs.r64[row as usize];
    match row.iter().position(|value| *value != row[0]) {
        None => Ok(row[0]),
        Some(lane) => {
            let what = format!("matrix descriptor {:#x} here and {:#x} in lane 0", row[lane], row[0]);
            Err((lane, Fault::new(FaultKind::AsyncMatrix, what)))
        }
    }
}

/// The four warps issue the same products in the same order.
fn agree(issue: Issue, warp: &mut Warp, block: &mut Block) -> Lanes<()> {
    let kernel = block.launch.kernel;
    let issues = &mut block.products[(warp.index / WARPS) as usize];
    let at = warp.products.issued;
    warp.products.issued += 1;
    match issues.get(at) {
        None => issues.push(issue),
        Some(other) if *other == issue => {}
        Some(other) => {
            let [a, b] = issue.descriptors;
            let what = format!(
                "wgmma of warp {} with descriptors {a:#x} and {b:#x}, accumulating: {}; another warp of its warpgroup is at {} \
                 with {:#x} and {:#x}, accumulating: {}",
                warp.index,
                issue.accumulates,
                kernel.source(other.pc as usize),
                other.descriptors[0],
                other.descriptors[1],
                other.accumulates
            );
            return Err((0, Fault::new(FaultKind::AsyncMatrix, what)));
        }
    }
    Ok(())
}

fn tiles(op: &Wgmma, warp: &Warp) -> Result<Tiles, Fault> {
    let descriptor = |row: u16| warp.regs.r64[row as usize][0];
    let a = match op.a {
        Left::Shared(row, is_transposed) => Some(Tile::new(descriptor(row), M_GROUPS, is_transposed)?),
        Left::Registers(_) => None,
    };
    Ok(Tiles { a, b: Tile::new(descriptor(op.b), op.d.len() as u32 / 4, op.is_b_transposed)? })
}

#[inline(always)]
fn multiply_as<const IS_BF16: bool>(
    op: &Wgmma,
    warp: &mut Warp,
    shared: &mut Shared,
    tiles: &Tiles,
    accumulates: bool,
) -> Result<(), Fault> {
    let mut a: Factors = factors::<IS_BF16>(&fragment(op, warp, shared, tiles)?);
    if op.is_negative {
        a.negate();
    }
    for (group, (c, d)) in op.c.as_chunks::<4>().0.iter().zip(op.d.as_chunks::<4>().0).enumerate() {
        let b = [
            core_matrix(shared, &tiles.b, (group as u32, 0), warp.index)?,
            core_matrix(shared, &tiles.b, (group as u32, 1), warp.index)?,
        ];
        let mut sums: Sums = if accumulates { load(&warp.regs, c) } else { [[0.0; LANES]; 4] };
        add::<IS_BF16>(&a, &b, &mut sums, K);
        store(&mut warp.regs, d, &sums);
    }
    Ok(())
}

/// The A fragment of a warp. All 64 rows count as read: who reads which of them is the hardware's affair.
#[inline(always)]
fn fragment(op: &Wgmma, warp: &Warp, shared: &mut Shared, tiles: &Tiles) -> Result<[Row32; 4], Fault> {
    let mut a = [[0; LANES]; 4];
    if let Left::Registers(rows) = op.a {
        for (row, slot) in a.iter_mut().zip(rows) {
            *row = warp.regs.r32[slot as usize];
        }
    }
    let Some(tile) = &tiles.a else { return Ok(a) };
    let first = warp.index % WARPS * 2;
    for group in 0..M_GROUPS {
        for half in 0..2 {
            let words = core_matrix(shared, tile, (group, half), warp.index)?;
            if group / 2 * 2 == first {
                a[(group % 2 + 2 * half) as usize] = words;
            }
        }
    }
    Ok(a)
}

/// A core matrix as a fragment has it: lane 4g + t holds elements 2t and 2t + 1 of row g along M or N.
#[inline(always)]
fn core_matrix(shared: &mut Shared, tile: &Tile, (group, half): (u32, u32), warp: u32) -> Result<Row32, Fault> {
    let (rows, mut words) = (tile.rows(group, half), [0; LANES]);
    for row in 0..8 {
        let bytes = shared.begin_read(rows[row], warp)?.as_chunks::<4>().0;
        for t in 0..4 {
            words[4 * row + t] = u32::from_le_bytes(bytes[t]);
        }
    }
    Ok(if tile.is_transposed { transposed(&words) } else { words })
}

/// From rows along K to rows along M or N.
#[inline(always)]
fn transposed(words: &Row32) -> Row32 {
    let element = |k: usize, n: usize| words[4 * k + n / 2] >> (16 * (n % 2)) & 0xffff;
    let mut out = [0; LANES];
    for lane in 0..LANES {
        let (g, t) = (lane / 4, lane % 4);
        out[lane] = element(2 * t + 1, g) << 16 | element(2 * t, g);
    }
    out
}
