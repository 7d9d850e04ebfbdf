//! What a warp does lane by lane and the lane table does not hold: selection, packing, `.ftz` and `.sat`, rare forms.

use super::alu::{self, Alu};
use super::block::Block;
use super::convert::convert;
use super::isa::Op;
use super::lanes::{FULL, LANES, Lane, Row32};
use super::simd;
use super::warp::Warp;

impl Warp {
    pub(super) fn select(&mut self, wide: bool, d: u16, a: u16, b: u16, p: u32, mask: u32) {
        let pick = |lane: usize| p >> lane & 1 == 1;
        if wide {
            let (a, b) = (self.regs.r64[a as usize], self.regs.r64[b as usize]);
            let out: [u64; LANES] = std::array::from_fn(|i| if pick(i) { a[i] } else { b[i] });
            <u64 as Lane>::store(&mut self.regs, d, &out, mask);
        } else {
            let (a, b) = (self.regs.r32[a as usize], self.regs.r32[b as usize]);
            let out: [u32; LANES] = std::array::from_fn(|i| if pick(i) { a[i] } else { b[i] });
            <u32 as Lane>::store(&mut self.regs, d, &out, mask);
        }
    }

    /// Sources go through scratch rows 0 to 2 flushed; the result is flushed and clamped in its row.
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
        let now = block.counters.warp_instructions;
        for lane in (0..LANES).filter(|lane| mask >> lane & 1 == 1) {
            if wide {
                self.regs.r64[d as usize][lane] = now;
            } else {
                self.regs.r32[d as usize][lane] = now as u32;
            }
        }
    }

    pub(super) fn get(&self, slot: u16, wide: bool, lane: usize) -> u64 {
        if wide { self.regs.r64[slot as usize][lane] } else { u64::from(self.regs.r32[slot as usize][lane]) }
    }

    fn set(&mut self, slot: u16, wide: bool, lane: usize, value: u64) {
        if wide {
            self.regs.r64[slot as usize][lane] = value;
        } else {
            self.regs.r32[slot as usize][lane] = value as u32;
        }
    }

    pub(super) fn lop3(&mut self, d: u16, sources: [u16; 3], table: u8, mask: u32) {
        let out = lop3(sources.map(|slot| self.regs.r32[slot as usize]), table);
        <u32 as Lane>::store(&mut self.regs, d, &out, mask);
    }

    /// Forms that are rare enough to go lane by lane.
    pub(super) fn lane_by_lane(&mut self, op: &Op, mask: u32) {
        for lane in (0..LANES).filter(|lane| mask >> lane & 1 == 1) {
            match *op {
                Op::Insert { wide, d, field, base, position, length } => {
                    let (field, base) = (self.get(field, wide, lane), self.get(base, wide, lane));
                    let (position, length) = (self.get(position, false, lane), self.get(length, false, lane));
                    let bits = if wide { 64 } else { 32 };
                    self.set(d, wide, lane, alu::insert(field, base, position as u32, length as u32, bits));
                }
                Op::Convert { from, to, rounding, saturate, d, d_wide, s, s_wide } => {
                    let value = convert(self.get(s, s_wide, lane), from, to, rounding, saturate);
                    self.set(d, d_wide, lane, value);
                }
                Op::Pack { d, wide, parts, count } => {
                    let bits = (if wide { 64 } else { 32 }) / u32::from(count);
                    let part = |i: usize| (self.get(parts[i], false, lane) & ((1 << bits) - 1)) << (bits * i as u32);
                    let value = (0..count as usize).fold(0, |value, i| value | part(i));
                    self.set(d, wide, lane, value);
                }
                Op::Unpack { s, wide, parts, count } => {
                    let bits = (if wide { 64 } else { 32 }) / u32::from(count);
                    let value = self.get(s, wide, lane);
                    for (i, &part) in parts[..count as usize].iter().enumerate() {
                        self.set(part, false, lane, value >> (bits * i as u32) & ((1 << bits) - 1));
                    }
                }
                _ => {}
            }
        }
    }
}

/// Any function of three bits, by its truth table, for all lanes.
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
