//! The register file of one warp: every register is a row of 32 lanes.

use half::{bf16, f16};

/// Lanes of a warp.
pub const LANES: usize = 32;
/// All lanes active.
pub const FULL: u32 = u32::MAX;

/// A row of 32-bit (or narrower, zero-extended) registers.
pub type Row32 = [u32; LANES];
/// A row of 64-bit registers.
pub type Row64 = [u64; LANES];

/// The registers of one warp. Slots are given out by the decoder.
#[derive(Clone, Debug, Default)]
pub struct Regs {
    /// 32-bit registers, and 16- and 8-bit ones zero-extended.
    pub r32: Rows<u32>,
    /// 64-bit registers.
    pub r64: Rows<u64>,
    /// Predicates, one bit a lane.
    pub p: Vec<u32>,
}

/// Rows of one width. They begin where cache lines do, or every vector of lanes would lie in two of them.
#[derive(Clone, Debug, Default)]
pub struct Rows<T>(Vec<Row<T>>);

#[repr(align(64))]
#[derive(Clone, Debug)]
struct Row<T>([T; LANES]);

impl<T: Copy + Default> Rows<T> {
    /// So many rows of zeros.
    pub fn reset(&mut self, count: usize) {
        self.0.clear();
        self.0.resize(count, Row([T::default(); LANES]));
    }
}

impl<T> std::ops::Index<usize> for Rows<T> {
    type Output = [T; LANES];
    #[inline(always)]
    fn index(&self, slot: usize) -> &[T; LANES] {
        &self.0[slot].0
    }
}

impl<T> std::ops::IndexMut<usize> for Rows<T> {
    #[inline(always)]
    fn index_mut(&mut self, slot: usize) -> &mut [T; LANES] {
        &mut self.0[slot].0
    }
}

impl Regs {
    /// A register of either width, zero-extended.
    #[inline(always)]
    pub fn row(&self, slot: u16, wide: bool) -> Row64 {
        if wide {
            return self.r64[slot as usize];
        }
        let (row, mut out) = (&self.r32[slot as usize], [0; LANES]);
        for lane in 0..LANES {
            out[lane] = u64::from(row[lane]);
        }
        out
    }

    /// Writes the lanes of `mask`, cut to the width of the register.
    #[inline(always)]
    pub fn set_row(&mut self, slot: u16, wide: bool, values: &Row64, mask: u32) {
        if wide {
            return u64::store(self, slot, values, mask);
        }
        let mut narrow = [0; LANES];
        for lane in 0..LANES {
            narrow[lane] = values[lane] as u32;
        }
        u32::store(self, slot, &narrow, mask);
    }
}

/// A value type that lives in registers.
pub trait Lane: Copy + Default {
    /// Whether it lives in the 64-bit rows.
    const WIDE: bool;
    /// Reads a row.
    fn load(regs: &Regs, slot: u16) -> [Self; LANES];
    /// Writes the lanes of `mask`.
    fn store(regs: &mut Regs, slot: u16, values: &[Self; LANES], mask: u32);
}

#[inline(always)]
fn blend<T: Copy>(target: &mut [T; LANES], values: &[T; LANES], mask: u32) {
    if mask == FULL {
        *target = *values;
        return;
    }
    for i in 0..LANES {
        target[i] = if mask >> i & 1 != 0 { values[i] } else { target[i] };
    }
}

macro_rules! lane {
    ($type:ty, $file:ident, $row:ty, $wide:literal, $from:expr, $to:expr) => {
        impl Lane for $type {
            const WIDE: bool = $wide;
            #[inline(always)]
            fn load(regs: &Regs, slot: u16) -> [Self; LANES] {
                // A plain loop: `array::map` is not inlined, and then misses the caller's instruction set.
                let row = &regs.$file[slot as usize];
                let mut out = [Self::default(); LANES];
                for i in 0..LANES {
                    out[i] = $from(row[i]);
                }
                out
            }
            #[inline(always)]
            fn store(regs: &mut Regs, slot: u16, values: &[Self; LANES], mask: u32) {
                let mut bits: $row = [0; LANES];
                for i in 0..LANES {
                    bits[i] = $to(values[i]);
                }
                blend(&mut regs.$file[slot as usize], &bits, mask);
            }
        }
    };
}

lane!(u32, r32, Row32, false, std::convert::identity, std::convert::identity);
lane!(i32, r32, Row32, false, (|x: u32| x as i32), (|x: i32| x as u32));
lane!(f32, r32, Row32, false, f32::from_bits, f32::to_bits);
lane!(u16, r32, Row32, false, (|x: u32| x as u16), u32::from);
lane!(i16, r32, Row32, false, (|x: u32| x as i16), (|x: i16| u32::from(x as u16)));
lane!(f16, r32, Row32, false, (|x: u32| f16::from_bits(x as u16)), (|x: f16| u32::from(x.to_bits())));
lane!(bf16, r32, Row32, false, (|x: u32| bf16::from_bits(x as u16)), (|x: bf16| u32::from(x.to_bits())));
lane!(u64, r64, Row64, true, std::convert::identity, std::convert::identity);
lane!(i64, r64, Row64, true, (|x: u64| x as i64), (|x: i64| x as u64));
lane!(f64, r64, Row64, true, f64::from_bits, f64::to_bits);

/// `d = f(a)` on the lanes of `mask`.
#[inline(always)]
pub fn map1<A: Lane, D: Lane>(regs: &mut Regs, d: u16, s: [u16; 3], mask: u32, f: impl Fn(A) -> D) {
    let a = A::load(regs, s[0]);
    let mut out = [D::default(); LANES];
    for i in 0..LANES {
        out[i] = f(a[i]);
    }
    D::store(regs, d, &out, mask);
}

/// `d = f(a, b)` on the lanes of `mask`.
#[inline(always)]
pub fn map2<A: Lane, B: Lane, D: Lane>(regs: &mut Regs, d: u16, s: [u16; 3], mask: u32, f: impl Fn(A, B) -> D) {
    let (a, b) = (A::load(regs, s[0]), B::load(regs, s[1]));
    let mut out = [D::default(); LANES];
    for i in 0..LANES {
        out[i] = f(a[i], b[i]);
    }
    D::store(regs, d, &out, mask);
}

/// `d = f(a, b, c)` on the lanes of `mask`.
#[inline(always)]
pub fn map3<A: Lane, B: Lane, C: Lane, D: Lane>(
    regs: &mut Regs,
    d: u16,
    s: [u16; 3],
    mask: u32,
    f: impl Fn(A, B, C) -> D,
) {
    let (a, b, c) = (A::load(regs, s[0]), B::load(regs, s[1]), C::load(regs, s[2]));
    let mut out = [D::default(); LANES];
    for i in 0..LANES {
        out[i] = f(a[i], b[i], c[i]);
    }
    D::store(regs, d, &out, mask);
}

/// The lanes in which `f(a, b)` holds.
#[inline(always)]
pub fn test2<A: Lane>(regs: &Regs, a: u16, b: u16, f: impl Fn(A, A) -> bool) -> u32 {
    let (a, b) = (A::load(regs, a), A::load(regs, b));
    let mut bits = [0u32; LANES];
    for i in 0..LANES {
        bits[i] = u32::from(f(a[i], b[i])) << i;
    }
    bits.iter().fold(0, |mask, bit| mask | bit)
}
