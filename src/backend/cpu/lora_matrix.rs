//! An adapter's matrices as the kernels read them: each a run of rows of 32-number groups, in bf16 or f32.
//!
//! Of bf16, word `i` of a group holds number `i` in its low half and number `16 + i` in its high half, so that two vectors
//! of neighbours come out of one load. Rows are filled up with zeros.

#![allow(unsafe_code)]

use half::bf16;

use super::dequantize::dequantize_row;
use super::simd::{LANES, Simd};
use crate::Result;
use crate::backend::{DType, HostTensor, LoraLoader, LoraPart};

/// Numbers of a group.
pub(super) const GROUP: usize = 2 * LANES;

/// What a row of a matrix is filled up to.
const ROW_GROUPS: usize = 2;

/// Numbers that fill a row of [`GroupedMatrix`] to its stride.
const STRIDE: usize = ROW_GROUPS * GROUP;

/// A matrix in groups.
pub(super) struct GroupedMatrix {
    words: Vec<u32>,
    stride: usize,
    is_bf16: bool,
}

/// An adapter's update of one projection.
pub struct CpuLora {
    pub(super) parts: Vec<CpuLoraPart>,
}

/// An update of some columns.
pub(super) struct CpuLoraPart {
    /// `A`: a row per rank.
    pub(super) shrink: GroupedMatrix,
    /// `B`, transposed: a row per rank.
    pub(super) expand: GroupedMatrix,
    pub(super) rank: usize,
    pub(super) num_inputs: usize,
    pub(super) num_outputs: usize,
    pub(super) first_column: usize,
    pub(super) scaling: f32,
}

/// Arranges adapters; needs nothing of the backend.
pub struct CpuLoraLoader;

impl LoraLoader for CpuLoraLoader {
    type Lora = CpuLora;

    fn load(&self, parts: &[LoraPart]) -> Result<CpuLora> {
        let load = |part: &LoraPart| {
            part.check()?;
            Ok(CpuLoraPart::new(part))
        };
        Ok(CpuLora { parts: parts.iter().map(load).collect::<Result<_>>()? })
    }
}

impl CpuLoraPart {
    fn new(part: &LoraPart) -> Self {
        let LoraPart { a, b, scaling, first_column } = part;
        let (rank, num_inputs, num_outputs) = (a.rows(), a.columns(), b.rows());
        let is_bf16 = a.dtype() == DType::BF16 && b.dtype() == DType::BF16;
        let (a, b) = (numbers(a), numbers(b));
        Self {
            shrink: GroupedMatrix::new(rank, num_inputs, is_bf16, |row, column| a[row * num_inputs + column]),
            expand: GroupedMatrix::new(rank, num_outputs, is_bf16, |row, column| b[column * rank + row]),
            rank,
            num_inputs,
            num_outputs,
            first_column: *first_column,
            scaling: *scaling,
        }
    }
}

fn numbers(tensor: &HostTensor) -> Vec<f32> {
    let mut values = vec![0.0; tensor.rows() * tensor.columns()];
    dequantize_row(tensor.dtype(), tensor.bytes(), &mut values);
    values
}

impl GroupedMatrix {
    /// `rows` rows of `columns` numbers, which bf16 holds exactly when `is_bf16`.
    fn new(rows: usize, columns: usize, is_bf16: bool, number: impl Fn(usize, usize) -> f32) -> Self {
        let stride = columns.next_multiple_of(STRIDE);
        let number = |row: usize, column: usize| if column < columns { number(row, column) } else { 0.0 };
        let mut words = Vec::with_capacity(if is_bf16 { rows * stride / 2 } else { rows * stride });
        for row in 0..rows {
            for group in (0..stride).step_by(GROUP) {
                if is_bf16 {
                    let bits = |column: usize| u32::from(bf16::from_f32(number(row, column)).to_bits());
                    words.extend((group..group + LANES).map(|at| bits(at) | bits(at + LANES) << 16));
                } else {
                    words.extend((group..group + GROUP).map(|at| number(row, at).to_bits()));
                }
            }
        }
        Self { words, stride, is_bf16 }
    }

    pub(super) fn is_bf16(&self) -> bool {
        self.is_bf16
    }

    /// One number, anywhere in a row.
    pub(super) fn number(&self, row: usize, column: usize) -> f32 {
        let at = row * self.stride + column;
        if !self.is_bf16 {
            return f32::from_bits(self.words[at]);
        }
        let (group, within) = (at / GROUP * LANES, at % GROUP);
        let word = self.words[group + within % LANES];
        bf16::from_bits(if within < LANES { word } else { word >> 16 } as u16).to_f32()
    }

    /// Numbers `[column, column + 32)` of a row; `column` is a multiple of 32 and `BF16` says how they are kept.
    ///
    /// # Safety
    /// The row exists, and `column` lies before the end of its stride.
    #[inline(always)]
    pub(super) unsafe fn group<S: Simd, const BF16: bool>(&self, s: S, row: usize, column: usize) -> [S::F32; 2] {
        debug_assert!(column.is_multiple_of(GROUP) && column < self.stride && BF16 == self.is_bf16);
        let at = row * self.stride + column;
        // SAFETY: the group lies inside `words`, by the caller's promise.
        unsafe {
            if BF16 {
                let group = self.words.as_ptr().add(at / 2).cast::<u8>();
                [s.load_bf16_low(group), s.load_bf16_high(group)]
            } else {
                let group = self.words.as_ptr().add(at).cast::<f32>();
                [s.load(group), s.load(group.add(LANES))]
            }
        }
    }
}
