//! Adapters on the device: the factors of an update as the kernels read them, in the type of activations.

use std::sync::{Arc, Mutex};

use cudarc::driver::CudaContext;

use super::backend::{CudaTensor, expect_vectors};
use super::memory::CudaBuffer;
use super::upload::Uploader;
use super::weights::round;
use crate::backend::{DType, HostTensor, LoraLoader, LoraPart, Tensor, dequantize_row};
use crate::{Result, unsupported};

/// What factors are filled up to, so that each begins where vectors may.
const UPLOAD_BYTES: usize = 256;

/// An adapter's update of one projection, on the device.
pub struct CudaLora {
    pub(super) parts: Vec<CudaLoraPart>,
}

/// An update of some columns.
pub(super) struct CudaLoraPart {
    /// `A`, `[rank, inputs]`.
    pub(super) a: CudaTensor,
    /// `B`, transposed, `[rank, outputs]`.
    pub(super) b: CudaTensor,
    pub(super) scaling: f32,
    pub(super) first_column: usize,
}

/// Brings adapters onto the device through the buffers that weights came through.
pub struct CudaLoraLoader {
    context: Arc<CudaContext>,
    uploader: Arc<Mutex<Uploader>>,
    dtype: DType,
}

impl CudaLoraLoader {
    pub(super) fn new(context: &Arc<CudaContext>, uploader: &Arc<Mutex<Uploader>>, dtype: DType) -> Self {
        Self { context: Arc::clone(context), uploader: Arc::clone(uploader), dtype }
    }

    fn upload(&self, bytes: &[u8]) -> Result<CudaBuffer> {
        let buffer = CudaBuffer::allocate(&self.context, bytes.len())?;
        let mut uploader = self.uploader.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        uploader.upload_rows(&buffer, bytes.len() / UPLOAD_BYTES, UPLOAD_BYTES, |row, out| {
            out.copy_from_slice(&bytes[row * UPLOAD_BYTES..][..UPLOAD_BYTES]);
        })?;
        Ok(buffer)
    }
}

impl LoraLoader for CudaLoraLoader {
    type Lora = CudaLora;

    /// All factors of a projection lie in one buffer.
    fn load(&self, parts: &[LoraPart]) -> Result<CudaLora> {
        let mut bytes = Vec::new();
        let mut placed = Vec::with_capacity(parts.len());
        for part in parts {
            part.check()?;
            check_vectors(part)?;
            let (a, b) = (Factor::new(&part.a, self.dtype), Factor::new(&part.b, self.dtype));
            let scaling = part.scaling * a.scale * b.scale;
            if !scaling.is_finite() {
                let (a, b) = (part.a.name(), part.b.name());
                return Err(unsupported!("{a} and {b} hold numbers too large to be multiplied in {}", self.dtype));
            }
            let a_at = place(&mut bytes, a.bytes);
            let b_at = place(&mut bytes, transposed(&b.bytes, part.b.rows(), part.b.columns()));
            placed.push((part, scaling, a_at, b_at));
        }
        let buffer = self.upload(&bytes)?;
        let on_device = |(part, scaling, a_at, b_at): (&LoraPart, f32, usize, usize)| {
            let (rank, inputs, outputs) = (part.a.rows(), part.a.columns(), part.b.rows());
            CudaLoraPart {
                a: Tensor::new(buffer.clone(), a_at, rank, inputs, self.dtype),
                b: Tensor::new(buffer.clone(), b_at, rank, outputs, self.dtype),
                scaling,
                first_column: part.first_column,
            }
        };
        Ok(CudaLora { parts: placed.into_iter().map(on_device).collect() })
    }
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

/// Puts a factor behind the others and says where it begins.
fn place(bytes: &mut Vec<u8>, factor: Vec<u8>) -> usize {
    let at = bytes.len();
    bytes.extend(factor);
    bytes.resize(bytes.len().next_multiple_of(UPLOAD_BYTES), 0);
    at
}

#[cfg(test)]
mod tests {
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
