//! Adapters as the kernels read them: the factors of an update in the type of activations, in pages.

use super::backend::expect_vectors;
use super::launch::ints;
use super::memory::CudaBuffer;
use super::weights::round;
use crate::backend::{DType, HostTensor, LoraLoader, LoraPages, LoraPart, PageImage, RowRun, dequantize_row};
use crate::{Result, unsupported};

/// 64-bit words of `LoraFactors`.
pub(super) const FACTOR_WORDS: usize = 6;

/// An adapter's update of one projection, on the device.
pub struct CudaLora {
    pub(super) arena: CudaBuffer,
    pub(super) page_bytes: usize,
    /// The address of the table of the adapter's pages.
    pub(super) table: u64,
    pub(super) parts: Vec<CudaLoraPart>,
}

/// An update of some columns.
#[derive(Clone, Copy)]
pub(super) struct CudaLoraPart {
    /// `A`, `[rank, inputs]`.
    pub(super) a: RowRun,
    /// `B`, transposed, `[rank, outputs]`.
    pub(super) b: RowRun,
    pub(super) num_inputs: usize,
    pub(super) num_columns: usize,
    pub(super) scaling: f32,
    pub(super) first_column: usize,
}

impl CudaLora {
    /// One of its parts as `LoraFactors` of `common.cuh`.
    pub(super) fn factor_words(&self, part: &CudaLoraPart, scaling: f32) -> Result<[u64; FACTOR_WORDS]> {
        Ok([
            self.arena.address(0, self.arena.len())?,
            self.table,
            ints(part.a.first_slot, part.a.rows_per_page)?,
            ints(part.b.first_slot, part.b.rows_per_page)?,
            u64::from(scaling.to_bits()) | ints(0, part.a.num_rows)?,
            ints(part.first_column, part.num_columns)?,
        ])
    }
}

/// An update of one projection, arranged.
pub struct PackedCudaLora {
    parts: Vec<CudaLoraPart>,
}

/// Arranges adapters for kernels of one type.
pub struct CudaLoraLoader {
    dtype: DType,
}

impl CudaLoraLoader {
    pub(super) fn new(dtype: DType) -> Self {
        Self { dtype }
    }

    fn pack_part(&self, part: &LoraPart, image: &mut PageImage) -> Result<CudaLoraPart> {
        part.check()?;
        check_vectors(part)?;
        let (rank, num_inputs, num_columns) = (part.a.rows(), part.a.columns(), part.b.rows());
        let (a, b) = (Factor::new(&part.a, self.dtype), Factor::new(&part.b, self.dtype));
        let scaling = part.scaling * a.scale * b.scale;
        if !scaling.is_finite() {
            let (a, b) = (part.a.name(), part.b.name());
            return Err(unsupported!("{a} and {b} hold numbers too large to be multiplied in {}", self.dtype));
        }
        let b_bytes = transposed(&b.bytes, num_columns, rank);
        let a = write_rows(part.a.name(), &a.bytes, rank, image)?;
        let b = write_rows(part.b.name(), &b_bytes, rank, image)?;
        Ok(CudaLoraPart { a, b, num_inputs, num_columns, scaling, first_column: part.first_column })
    }
}

impl LoraLoader for CudaLoraLoader {
    type Buffer = CudaBuffer;
    type Packed = PackedCudaLora;
    type Lora = CudaLora;

    fn pack(&self, parts: &[LoraPart], image: &mut PageImage) -> Result<PackedCudaLora> {
        let parts = parts.iter().map(|part| self.pack_part(part, image)).collect::<Result<_>>()?;
        Ok(PackedCudaLora { parts })
    }

    fn place(&self, packed: &PackedCudaLora, pages: &LoraPages<CudaBuffer>) -> Result<CudaLora> {
        let arena = pages.arena().clone();
        for run in packed.parts.iter().flat_map(|part| [&part.a, &part.b]) {
            for row in 0..run.num_rows {
                arena.address(pages.offset(run, row), run.row_bytes)?;
            }
        }
        let table = arena.address(pages.table_offset(), 0)?;
        Ok(CudaLora { page_bytes: pages.page_bytes(), table, parts: packed.parts.clone(), arena })
    }
}

fn write_rows(name: &str, bytes: &[u8], num_rows: usize, image: &mut PageImage) -> Result<RowRun> {
    let row_bytes = bytes.len() / num_rows;
    let run = image.reserve(name, num_rows, row_bytes)?;
    for (row, bytes) in bytes.chunks_exact(row_bytes).enumerate() {
        image.row_mut(&run, row).copy_from_slice(bytes);
    }
    Ok(run)
}

/// An error unless kernels can read the part's rows, and add to its columns, in vectors.
fn check_vectors(part: &LoraPart) -> Result<()> {
    expect_vectors(part.a.name(), part.a.columns())?;
    expect_vectors(&format!("the output of {}", part.b.name()), part.b.rows())?;
    match part.first_column.is_multiple_of(8) {
        true => Ok(()),
        false => {
            let (name, column) = (part.b.name(), part.first_column);
            Err(unsupported!("{name} belongs to column {column} and on; CUDA kernels need a multiple of 8"))
        }
    }
}

/// A matrix in another type: `scale` times its numbers are those that were stored, up to rounding.
struct Factor {
    bytes: Vec<u8>,
    scale: f32,
}

impl Factor {
    /// Where the type changes, numbers are first multiplied by the power of two that brings the largest to between one and
    /// two: f16 would lose small ones, which adapters have many of, and has no large ones.
    fn new(tensor: &HostTensor, dtype: DType) -> Self {
        if tensor.dtype() == dtype {
            return Self { bytes: tensor.bytes().to_vec(), scale: 1.0 };
        }
        let mut numbers = vec![0.0f32; tensor.rows() * tensor.columns()];
        dequantize_row(tensor.dtype(), tensor.bytes(), &mut numbers);
        let largest = numbers.iter().fold(0.0f32, |largest, number| largest.max(number.abs()));
        let exponent = if largest == 0.0 { 0 } else { (largest.to_bits() >> 23) as i32 - 127 };
        let inverse = 2.0f32.powi(-exponent);
        numbers.iter_mut().for_each(|number| *number *= inverse);
        let mut bytes = vec![0; numbers.len() * dtype.block_bytes()];
        round(&numbers, dtype, &mut bytes);
        Self { bytes, scale: 2.0f32.powi(exponent) }
    }
}

/// The transpose of a matrix of 16-bit numbers.
fn transposed(bytes: &[u8], rows: usize, columns: usize) -> Vec<u8> {
    let mut out = vec![0; bytes.len()];
    for (row, numbers) in bytes.chunks_exact(2 * columns).enumerate() {
        for (column, number) in numbers.chunks_exact(2).enumerate() {
            out[2 * (column * rows + row)..][..2].copy_from_slice(number);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use half::f16;

    use super::*;

    #[test]
    fn small_and_large_numbers_keep_their_digits_in_f16() {
        for factor in [1e-9f32, 3e4, 1e12] {
            let stored: Vec<f32> = [1.0, -0.75, 0.001, 0.0].iter().map(|number| number * factor).collect();
            let bytes: Vec<u8> = stored.iter().flat_map(|number| number.to_le_bytes()).collect();
            let len = bytes.len();
            let tensor = HostTensor::new("test", Arc::new(bytes), 0..len, DType::F32, 2, 2).unwrap();
            let found = Factor::new(&tensor, DType::F16);
            for (bytes, stored) in found.bytes.chunks_exact(2).zip(&stored) {
                let number = f16::from_le_bytes([bytes[0], bytes[1]]).to_f32() * found.scale;
                assert!((number - stored).abs() <= stored.abs() / 2048.0, "{number}, wanted {stored}");
            }
        }
    }

    #[test]
    fn a_transpose_has_rows_for_columns() {
        let bytes: Vec<u8> = (0..12).collect();
        assert_eq!(transposed(&bytes, 2, 3), [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]);
    }
}
