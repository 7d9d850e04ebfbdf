//! Tensor-core instructions: `mma.sync.m16n8k8/k16` with f16 or bf16 inputs and f32 accumulators.
//!
//! Fragment layouts from the PTX ISA, "Matrix fragments for mma.m16n8k16". With g = lane / 4 and t = lane % 4:
//! A register i holds row g + 8 (i & 1), columns 2t + 8 (i >> 1) and the next; B register i holds rows 2t + 8i and the
//! next, column g; C register i holds row g + 8 (i >> 1), column 2t + (i & 1). Products are exact, sums are f32 in
//! order of k: the device's own order is not documented.

use super::convert::f16_to_f32;
use super::isa::Mma;
use super::lanes::{LANES, Regs};

const N: usize = 8;
const M: usize = 16;
const K: usize = 16;

/// D = A B + C over the whole warp.
#[inline(always)]
pub fn run(op: &Mma, regs: &mut Regs) {
    let k = usize::from(op.k);
    let (mut a, mut b, mut c) = ([[0f32; K]; M], [[0f32; N]; K], [[0f32; N]; M]);
    for i in 0..k / 4 {
        let row = regs.r32[op.a[i] as usize];
        for lane in 0..LANES {
            let (g, t) = (lane / 4, lane % 4);
            let target = &mut a[g + 8 * (i & 1)];
            let column = 2 * t + 8 * (i >> 1);
            target[column] = element(row[lane] as u16, op.is_bf16);
            target[column + 1] = element((row[lane] >> 16) as u16, op.is_bf16);
        }
    }
    for i in 0..k / 8 {
        let row = regs.r32[op.b[i] as usize];
        for lane in 0..LANES {
            let (g, t) = (lane / 4, lane % 4);
            b[2 * t + 8 * i][g] = element(row[lane] as u16, op.is_bf16);
            b[2 * t + 8 * i + 1][g] = element((row[lane] >> 16) as u16, op.is_bf16);
        }
    }
    for i in 0..4 {
        let row = regs.r32[op.c[i] as usize];
        for lane in 0..LANES {
            c[lane / 4 + 8 * (i >> 1)][2 * (lane % 4) + (i & 1)] = f32::from_bits(row[lane]);
        }
    }
    multiply(&a, &b, &mut c, k);
    for i in 0..4 {
        let row = &mut regs.r32[op.d[i] as usize];
        for lane in 0..LANES {
            row[lane] = c[lane / 4 + 8 * (i >> 1)][2 * (lane % 4) + (i & 1)].to_bits();
        }
    }
}

#[inline(always)]
fn element(bits: u16, is_bf16: bool) -> f32 {
    if is_bf16 { f32::from_bits(u32::from(bits) << 16) } else { f16_to_f32(bits) }
}

#[inline(always)]
fn multiply(a: &[[f32; K]; M], b: &[[f32; N]; K], c: &mut [[f32; N]; M], k: usize) {
    for (row, sums) in a.iter().zip(c) {
        for (x, weights) in row[..k].iter().zip(b) {
            for n in 0..N {
                sums[n] += x * weights[n];
            }
        }
    }
}
