//! What a warp does lane by lane and the lane table does not hold: selection, packing, `.ftz` and `.sat`, rare forms.

use super::alu::{self, Alu};
use super::block::Block;
use super::convert::convert;
use super::isa::Op;
use super::lanes::{FULL, LANES, Lane, Regs, Row32};
use super::load_store::lanes;
use super::simd;
use super::warp::Warp;

impl Warp {
    #[inline(always)]
    pub(super) fn select(&mut self, wide: bool, d: u16, a: u16, b: u16, p: u32, mask: u32) {
        if wide {
            pick::<u64>(&mut self.regs, d, (a, b), p, mask);
        } else {
            pick::<u32>(&mut self.regs, d, (a, b), p, mask);
        }
    }

    /// Sources go through scratch rows 0 to 2 flushed; the result is flushed and clamped in its row.
    #[inline(always)]
    pub(super) fn alu_flush(
        &mut self,
        block: &Block,
        (op, d, mut s): (Alu, u16, [u16; 3]),
        count: u8,
        (ftz, sat): (bool, bool),
        flush_result: bool,
        mask: u32,
    ) {
        if ftz {
            for i in 0..count as usize {
                self.regs.r32[i] = self.regs.r32[s[i] as usize];
                simd::flush(&mut self.regs.r32[i]);
                s[i] = i as u16;
            }
        }
        if !flush_result {
            return block.launch.simd.alu(op, &mut self.regs, d, s, mask);
        }
        block.launch.simd.alu(op, &mut self.regs, 0, s, FULL);
        if ftz {
            simd::flush(&mut self.regs.r32[0]);
        }
        if sat {
            simd::saturate(&mut self.regs.r32[0]);
        }
        alu::run(Alu::Mov32, &mut self.regs, d, [0, 0, 0], mask);
    }

    pub(super) fn clock(&mut self, block: &Block, d: u16, wide: bool, mask: u32) {
        self.regs.set_row(d, wide, &[block.counters.warp_instructions; LANES], mask);
    }

    /// Parts of equal widths to one register, the first part lowest.
    #[inline(always)]
    pub(super) fn pack(&mut self, d: u16, wide: bool, parts: &[u16], mask: u32) {
        let (mut out, bits) = ([0; LANES], part_bits(wide, parts));
        for (part, &slot) in parts.iter().enumerate() {
            let row = &self.regs.r32[slot as usize];
            for lane in 0..LANES {
                out[lane] |= (u64::from(row[lane]) & ((1 << bits) - 1)) << (bits * part);
            }
        }
        self.regs.set_row(d, wide, &out, mask);
    }

    /// The other way.
    #[inline(always)]
    pub(super) fn unpack(&mut self, s: u16, wide: bool, parts: &[u16], mask: u32) {
        let (row, bits) = (self.regs.row(s, wide), part_bits(wide, parts));
        for (part, &slot) in parts.iter().enumerate() {
            let mut out = [0; LANES];
            for lane in 0..LANES {
                out[lane] = (row[lane] >> (bits * part) & ((1 << bits) - 1)) as u32;
            }
            <u32 as Lane>::store(&mut self.regs, slot, &out, mask);
        }
    }

    #[inline(always)]
    pub(super) fn lop3(&mut self, d: u16, sources: [u16; 3], table: u8, mask: u32) {
        let [a, b, c] = sources;
        let load = |slot: u16| <u32 as Lane>::load(&self.regs, slot);
        let out = lop3([load(a), load(b), load(c)], table);
        <u32 as Lane>::store(&mut self.regs, d, &out, mask);
    }

    /// Forms that are rare enough to go lane by lane.
    pub(super) fn lane_by_lane(&mut self, op: &Op, mask: u32) {
        let mut out = [0; LANES];
        match *op {
            Op::Insert { wide, d, field, base, position, length } => {
                let [field, base] = [field, base].map(|slot| self.regs.row(slot, wide));
                let [position, length] = [position, length].map(|slot| self.regs.r32[slot as usize]);
                let bits = if wide { 64 } else { 32 };
                for lane in lanes(mask) {
                    out[lane] = alu::insert(field[lane], base[lane], position[lane], length[lane], bits);
                }
                self.regs.set_row(d, wide, &out, mask);
            }
            Op::Convert { from, to, rounding, saturate, d, d_wide, s, s_wide } => {
                let row = self.regs.row(s, s_wide);
                for lane in lanes(mask) {
                    out[lane] = convert(row[lane], from, to, rounding, saturate);
                }
                self.regs.set_row(d, d_wide, &out, mask);
            }
            _ => {}
        }
    }
}

/// Bits of each part of a register.
fn part_bits(wide: bool, parts: &[u16]) -> usize {
    (if wide { 64 } else { 32 }) / parts.len()
}

/// `d = p ? a : b` on the lanes of `mask`.
#[inline(always)]
fn pick<T: Lane>(regs: &mut Regs, d: u16, (a, b): (u16, u16), p: u32, mask: u32) {
    let (a, b) = (T::load(regs, a), T::load(regs, b));
    let mut out = b;
    for lane in 0..LANES {
        out[lane] = if p >> lane & 1 == 1 { a[lane] } else { b[lane] };
    }
    T::store(regs, d, &out, mask);
}

/// Any function of three bits, by its truth table, for all lanes.
#[inline(always)]
fn lop3([a, b, c]: [Row32; 3], table: u8) -> Row32 {
    let mut out = [0; LANES];
    for i in (0..8).filter(|i| table >> i & 1 == 1) {
        // What turns a bit of the three into one where it is that of row `i`.
        let [x, y, z] = [2, 1, 0].map(|bit| if i >> bit & 1 == 1 { 0 } else { u32::MAX });
        for lane in 0..LANES {
            out[lane] |= (a[lane] ^ x) & (b[lane] ^ y) & (c[lane] ^ z);
        }
    }
    out
}
