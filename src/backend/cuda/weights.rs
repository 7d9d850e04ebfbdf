//! Weights and tables on the device.

#![allow(unsafe_code)]

use std::sync::Arc;

use cudarc::driver::CudaContext;
use half::{bf16, f16};

use super::backend::CudaBackend;
use super::launch::Arguments;
use super::memory::CudaBuffer;
use super::quantised::QuantisedMatrix;
use super::stream::CudaStream;
use crate::backend::cpu::RopeTable;
use crate::backend::{DType, HostTensor, RopeConfig, Tensor, dequantize_row};
use crate::{Result, malformed, unsupported};

/// A row-major matrix `[N, K]` of bf16 or f16, or of blocks of a quantised format.
pub struct CudaMatrix(Weights);

enum Weights {
    Plain(Tensor<CudaBuffer>),
    Quantised(QuantisedMatrix),
}

/// Cosines and sines of every position: `[max_positions][cosines | sines][head_dim / 2]` f32.
pub struct CudaRopeTable {
    pub(super) angles: Tensor<CudaBuffer>,
    pub(super) head_dim: usize,
}

impl CudaMatrix {
    /// Output features.
    pub(super) fn rows(&self) -> usize {
        match &self.0 {
            Weights::Plain(tensor) => tensor.rows(),
            Weights::Quantised(matrix) => matrix.rows(),
        }
    }

    /// Input features.
    pub(super) fn columns(&self) -> usize {
        match &self.0 {
            Weights::Plain(tensor) => tensor.columns(),
            Weights::Quantised(matrix) => matrix.columns(),
        }
    }

    /// The matrix as a tensor, for what changes weights; an error where they are quantised.
    pub(super) fn plain(&self) -> Result<&Tensor<CudaBuffer>> {
        match &self.0 {
            Weights::Plain(tensor) => Ok(tensor),
            Weights::Quantised(_) => Err(unsupported!(
                "adapters cannot be merged into quantised weights; they are applied beside them, or merged with --dtype \
                 bf16, which unpacks weights"
            )),
        }
    }

    /// Zeros in its shape.
    pub(super) fn zeroed_like(&self, context: &Arc<CudaContext>) -> Result<Self> {
        let like = self.plain()?;
        let buffer = CudaBuffer::allocate(context, like.num_bytes())?;
        Ok(Self(Weights::Plain(Tensor::new(buffer, 0, like.rows(), like.columns(), like.dtype()))))
    }

    /// Quantised parts stay as they are unless a type is wanted; others become the device's type.
    pub(super) fn load(backend: &CudaBackend, parts: &[HostTensor], wanted: Option<DType>) -> Result<Self> {
        let dtype = backend.dtype();
        if let Some(wanted) = wanted.filter(|wanted| *wanted != dtype) {
            return Err(unsupported!(
                "this CUDA backend keeps matrices as {dtype}, not {wanted}; f32 weights are for --device cpu"
            ));
        }
        if wanted.is_none() && !parts.is_empty() && parts.iter().all(|part| part.dtype().is_quantised()) {
            return QuantisedMatrix::load(backend, parts).map(|matrix| Self(Weights::Quantised(matrix)));
        }
        load_plain(backend, parts).map(|tensor| Self(Weights::Plain(tensor)))
    }

    /// See [`Backend::embed`](crate::backend::Backend::embed).
    pub(super) fn embed(
        &self,
        backend: &CudaBackend,
        stream: &CudaStream,
        ids: &Tensor<CudaBuffer>,
        scale: f32,
        out: &Tensor<CudaBuffer>,
    ) -> Result<()> {
        ids.expect("token ids", 1, ids.columns(), DType::I32)?;
        out.expect("embedding output", ids.columns(), self.columns(), DType::F32)?;
        let table = match &self.0 {
            Weights::Plain(tensor) => tensor,
            Weights::Quantised(matrix) => return matrix.embed(backend, stream, ids, scale, out),
        };
        let arguments = Arguments::new().tensor(out)?.tensor(table)?.tensor(ids)?.int(table.columns())?.float(scale);
        // SAFETY: embed(out, table, ids, hidden, scale), shapes as checked; ids are below the vocabulary.
        unsafe { backend.launch(stream, &backend.kernels().embed, (ids.columns(), 1, 1), 256, arguments) }
    }

    /// `out = x W^T + bias`; see [`Backend::linear`](crate::backend::Backend::linear).
    pub(super) fn multiply(
        &self,
        backend: &CudaBackend,
        stream: &CudaStream,
        x: &Tensor<CudaBuffer>,
        bias: Option<&Tensor<CudaBuffer>>,
        out: &Tensor<CudaBuffer>,
    ) -> Result<()> {
        let (num_tokens, inputs, outputs) = (x.rows(), self.columns(), self.rows());
        x.expect("projection input", num_tokens, inputs, backend.dtype())?;
        if out.dtype() != DType::F32 {
            out.expect("projection output", num_tokens, outputs, backend.dtype())?;
        }
        out.expect("projection output", num_tokens, outputs, out.dtype())?;
        if let Some(bias) = bias {
            bias.expect("projection bias", 1, outputs, DType::F32)?;
        }
        let weight = match &self.0 {
            Weights::Plain(tensor) => tensor,
            Weights::Quantised(matrix) => return matrix.multiply(backend, stream, x, bias, out),
        };
        // Its biases are of 16 bits, ours of f32.
        if let (None, Some(cublaslt)) = (bias, backend.cublaslt())
            && cublaslt.multiply(stream, x, weight, out)?
        {
            return Ok(());
        }
        let kernels = backend.kernels();
        let tilings = if out.dtype() == DType::F32 { &kernels.gemm_f32 } else { &kernels.gemm };
        let gemm = tilings.choose(num_tokens, outputs, backend.info().multiprocessors)?;
        let tile = gemm.tile;
        let blocks = (num_tokens.div_ceil(tile.tokens), outputs.div_ceil(tile.outputs), 1);
        let arguments = Arguments::new().tensor(out)?.tensor(x)?.tensor(weight)?.optional(bias)?;
        let arguments = arguments.int(num_tokens)?.int(outputs)?.int(inputs)?;
        // SAFETY: gemm(out, x, weight, bias, num_tokens, n, k), shapes as checked.
        unsafe { backend.launch(stream, &gemm.kernel, blocks, tile.threads, arguments) }
    }
}

/// Parts stacked along their rows, rounded to the device's type.
fn load_plain(backend: &CudaBackend, parts: &[HostTensor]) -> Result<Tensor<CudaBuffer>> {
    let dtype = backend.dtype();
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
    Ok(Tensor::new(buffer, 0, rows.len(), columns, dtype))
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
