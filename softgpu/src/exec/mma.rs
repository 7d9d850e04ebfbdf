//! Tensor-core products of 16 rows: `mma.sync.m16n8k8/k16` with f16 or bf16 inputs and f32 accumulators, of which `wgmma` is
//! made as well.
//!
//! Fragment layouts from the PTX ISA, "Matrix fragments for mma.m16n8k16". With g = lane / 4 and t = lane % 4:
//! A register i holds row g + 8 (i & 1), columns 2t + 8 (i >> 1) and the next; B register i holds rows 2t + 8i and the
//! next, column g; C register i holds row g + 8 (i >> 1), column 2t + (i & 1). Products are exact, sums are f32 in
//! order of k: the device's own order is not documented.
//!
//! Sums stay where registers have them: a lane wants the factor of its row and the one of its column.

use super::convert::f16_to_f32;
use super::isa::Mma;
use super::lanes::{LANES, Regs, Row32};

const K: usize = 16;
/// Sums that are worked on at a time, of each register.
const PART: usize = 16;

/// For each k and each half of the 16 rows, what A gives to each lane.
#[repr(align(64))]
pub(super) struct Factors([[[f32; LANES]; 2]; K]);

/// For each k, B's columns 0, 2, 4 and 6 and then the odd ones: what each lane of four wants for one register.
#[repr(align(64))]
struct Columns([[[f32; 4]; 2]; K]);

/// The sums of 16 rows and 8 columns.
pub(super) type Sums = [[f32; LANES]; 4];

/// D = A B + C over the whole warp.
#[inline(always)]
pub fn run(op: &Mma, regs: &mut Regs) {
    if op.is_bf16 { run_as::<true>(op, regs) } else { run_as::<false>(op, regs) }
}

#[inline(always)]
fn run_as<const IS_BF16: bool>(op: &Mma, regs: &mut Regs) {
    let halves = usize::from(op.k) / 8;
    let (mut a, mut b) = ([[0; LANES]; 4], [[0; LANES]; 2]);
    for i in 0..2 * halves {
        a[i] = regs.r32[op.a[i] as usize];
    }
    for i in 0..halves {
        b[i] = regs.r32[op.b[i] as usize];
    }
    let mut sums = load(regs, &op.c);
    add::<IS_BF16>(&factors::<IS_BF16>(&a), &b, &mut sums, usize::from(op.k));
    store(regs, &op.d, &sums);
}

/// Accumulators from registers.
#[inline(always)]
pub(super) fn load(regs: &Regs, slots: &[u16; 4]) -> Sums {
    let mut sums = [[0.0; LANES]; 4];
    for i in 0..4 {
        let row = &regs.r32[slots[i] as usize];
        for lane in 0..LANES {
            sums[i][lane] = f32::from_bits(row[lane]);
        }
    }
    sums
}

/// Accumulators to registers.
#[inline(always)]
pub(super) fn store(regs: &mut Regs, slots: &[u16; 4], sums: &Sums) {
    for i in 0..4 {
        let row = &mut regs.r32[slots[i] as usize];
        for lane in 0..LANES {
            row[lane] = sums[i][lane].to_bits();
        }
    }
}

/// The factors of an A fragment.
#[inline(always)]
pub(super) fn factors<const IS_BF16: bool>(a: &[Row32; 4]) -> Factors {
    let mut factors = Factors([[[0.0; LANES]; 2]; K]);
    for i in 0..4 {
        for t in 0..4 {
            let (half, k, mut words) = (i & 1, 8 * (i >> 1) + 2 * t, [0; LANES]);
            for lane in 0..LANES {
                words[lane] = a[i][lane & !3 | t];
            }
            for lane in 0..LANES {
                factors.0[k][half][lane] = element::<IS_BF16>(words[lane] as u16);
            }
            for lane in 0..LANES {
                factors.0[k + 1][half][lane] = element::<IS_BF16>((words[lane] >> 16) as u16);
            }
        }
    }
    factors
}

#[inline(always)]
fn columns<const IS_BF16: bool>(b: &[Row32; 2]) -> Columns {
    let mut columns = Columns([[[0.0; 4]; 2]; K]);
    for i in 0..2 {
        let (mut words, mut low, mut high) = ([0; LANES], [0.0; LANES], [0.0; LANES]);
        for at in 0..LANES {
            let (t, n) = (at / 8, at % 8);
            words[at] = b[i][8 * (n % 4) + 4 * (n / 4) + t];
        }
        for at in 0..LANES {
            low[at] = element::<IS_BF16>(words[at] as u16);
        }
        for at in 0..LANES {
            high[at] = element::<IS_BF16>((words[at] >> 16) as u16);
        }
        for t in 0..4 {
            for n in 0..8 {
                columns.0[8 * i + 2 * t][n / 4][n % 4] = low[8 * t + n];
                columns.0[8 * i + 2 * t + 1][n / 4][n % 4] = high[8 * t + n];
            }
        }
    }
    columns
}

#[inline(always)]
fn element<const IS_BF16: bool>(bits: u16) -> f32 {
    if IS_BF16 { f32::from_bits(u32::from(bits) << 16) } else { f16_to_f32(bits) }
}

/// Adds the products with a B fragment, `k` steps.
#[inline(always)]
pub(super) fn add<const IS_BF16: bool>(factors: &Factors, b: &[Row32; 2], sums: &mut Sums, k: usize) {
    let columns = columns::<IS_BF16>(b);
    for first in (0..LANES).step_by(PART) {
        let mut part = [[0.0; PART]; 4];
        for i in 0..4 {
            part[i].copy_from_slice(&sums[i][first..first + PART]);
        }
        for (factors, columns) in factors.0[..k].iter().zip(&columns.0) {
            for i in 0..4 {
                for lane in 0..PART {
                    part[i][lane] += factors[i >> 1][first + lane] * columns[i & 1][lane % 4];
                }
            }
        }
        for i in 0..4 {
            sums[i][first..first + PART].copy_from_slice(&part[i]);
        }
    }
}

impl Factors {
    /// With the other sign.
    #[inline(always)]
    pub(super) fn negate(&mut self) {
        for factor in self.0.as_flattened_mut().as_flattened_mut() {
            *factor = -*factor;
        }
    }
}
