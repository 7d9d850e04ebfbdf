//! Weights and tables on the device.

use std::sync::Arc;

use cudarc::driver::CudaContext;
use half::{bf16, f16};

use super::backend::CudaBackend;
use super::memory::CudaBuffer;
use crate::backend::cpu::RopeTable;
use crate::backend::{DType, HostTensor, RopeConfig, Tensor, dequantize_row};
use crate::{Result, malformed, unsupported};

/// A row-major matrix `[N, K]` of bf16 or f16.
pub struct CudaMatrix(Tensor<CudaBuffer>);

/// Cosines and sines of every position: `[max_positions][cosines | sines][head_dim / 2]` f32.
pub struct CudaRopeTable {
    pub(super) angles: Tensor<CudaBuffer>,
    pub(super) head_dim: usize,
}

impl CudaMatrix {
    /// The matrix as a tensor.
    pub(super) fn tensor(&self) -> &Tensor<CudaBuffer> {
        &self.0
    }

    /// Zeros in its shape.
    pub(super) fn zeroed_like(&self, context: &Arc<CudaContext>) -> Result<Self> {
        let like = self.tensor();
        let buffer = CudaBuffer::allocate(context, like.num_bytes())?;
        Ok(Self(Tensor::new(buffer, 0, like.rows(), like.columns(), like.dtype())))
    }

    pub(super) fn load(backend: &CudaBackend, parts: &[HostTensor], wanted: Option<DType>) -> Result<Self> {
        let dtype = backend.dtype();
        if let Some(wanted) = wanted.filter(|wanted| *wanted != dtype) {
            return Err(unsupported!(
                "this CUDA backend keeps matrices as {dtype}, not {wanted}; f32 weights are for --device cpu"
            ));
        }
        let columns = parts.first().map_or(0, HostTensor::columns);
        if let Some(part) = parts.iter().find(|part| part.columns() != columns) {
            return Err(malformed!("{} has {} columns, others beside it {columns}", part.name(), part.columns()));
        }
        if columns == 0 || !columns.is_multiple_of(8) {
            let name = parts.first().map_or("a matrix", HostTensor::name);
            return Err(unsupported!("{name} has {columns} columns; CUDA kernels need a multiple of 8"));
        }
        let rows: Vec<(&HostTensor, usize)> =
            parts.iter().flat_map(|part| (0..part.rows()).map(move |row| (part, row))).collect();
        let mut numbers = vec![0.0f32; columns];
        let buffer = backend.upload_rows(rows.len(), columns * dtype.block_bytes(), |row, out| {
            let (part, row) = rows[row];
            round_row(part.dtype(), part.row_bytes(row), dtype, &mut numbers, out);
        })?;
        Ok(Self(Tensor::new(buffer, 0, rows.len(), columns, dtype)))
    }
}

/// Writes one stored row as `target`, through `numbers` where the types differ.
fn round_row(stored: DType, bytes: &[u8], target: DType, numbers: &mut [f32], out: &mut [u8]) {
    if stored == target {
        return out.copy_from_slice(bytes);
    }
    dequantize_row(stored, bytes, numbers);
    round(numbers, target, out);
}

/// Writes numbers as `target`, each rounded to the nearest.
pub(super) fn round(numbers: &[f32], target: DType, out: &mut [u8]) {
    for (number, out) in numbers.iter().zip(out.chunks_exact_mut(2)) {
        out.copy_from_slice(&match target {
            DType::F16 => f16::from_f32(*number).to_le_bytes(),
            _ => bf16::from_f32(*number).to_le_bytes(),
        });
    }
}

/// `parts` one after the other as a vector of f32.
pub(super) fn load_vector(
    backend: &CudaBackend,
    parts: &[HostTensor],
    convert: &dyn Fn(f32) -> f32,
) -> Result<Tensor<CudaBuffer>> {
    let mut values = Vec::new();
    for part in parts {
        let start = values.len();
        values.resize(start + part.rows() * part.columns(), 0.0);
        dequantize_row(part.dtype(), part.bytes(), &mut values[start..]);
    }
    values.iter_mut().for_each(|value| *value = convert(*value));
    let bytes: &[u8] = bytemuck::cast_slice(&values);
    let buffer = backend.upload_rows(1, bytes.len(), |_, out| out.copy_from_slice(bytes))?;
    Ok(Tensor::new(buffer, 0, 1, values.len(), DType::F32))
}

impl CudaRopeTable {
    /// Angles are computed on the host, so that every backend has the same.
    pub(super) fn load(backend: &CudaBackend, config: &RopeConfig, max_positions: usize) -> Result<Self> {
        let table = RopeTable::new(config, max_positions)?;
        let head_dim = config.head_dim;
        let buffer = backend.upload_rows(max_positions, head_dim * 4, |position, out| {
            let (cosines, sines) = table.row(position);
            let (first, second) = out.split_at_mut(head_dim * 2);
            first.copy_from_slice(bytemuck::cast_slice(cosines));
            second.copy_from_slice(bytemuck::cast_slice(sines));
        })?;
        Ok(Self { angles: Tensor::new(buffer, 0, max_positions, head_dim, DType::F32), head_dim })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_rounded_to_the_nearest() {
        let stored: Vec<u8> =
            [1.0f32, 1.0 + 1.0 / 512.0, -3.25, 65504.0].iter().flat_map(|x| x.to_le_bytes()).collect();
        let (mut numbers, mut out) = ([0.0; 4], [0u8; 8]);
        round_row(DType::F32, &stored, DType::BF16, &mut numbers, &mut out);
        let found: Vec<f32> = out.chunks_exact(2).map(|x| bf16::from_le_bytes([x[0], x[1]]).to_f32()).collect();
        assert_eq!(found, [1.0, 1.0, -3.25, 65536.0]);
        let rounded = out;
        round_row(DType::BF16, &rounded, DType::BF16, &mut numbers, &mut out);
        assert_eq!(out, rounded);
        round_row(DType::F32, &stored, DType::F16, &mut numbers, &mut out);
        let found: Vec<f32> = out.chunks_exact(2).map(|x| f16::from_le_bytes([x[0], x[1]]).to_f32()).collect();
        assert_eq!(found, [1.0, 1.0 + 1.0 / 512.0, -3.25, 65504.0]);
    }
}
