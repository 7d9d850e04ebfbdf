//! Matrices that stay quantised on the device: loading, products, rows as embeddings.
//!
//! A product has the bits of one with the weights unpacked to the device's type, so nobody needs to know which a matrix
//! is. How bytes lie is `records.rs`' matter.

#![allow(unsafe_code)]

use std::sync::Arc;

use super::backend::{CudaBackend, CudaTensor};
use super::kernels::QuantisedKernels;
use super::launch::Arguments;
use super::memory::CudaBuffer;
use super::records::{GROUP_ROWS, Records};
use super::stream::CudaStream;
use crate::backend::{DType, HostTensor};
use crate::{Result, malformed, unsupported};

/// A row-major matrix `[N, K]`, the rows of each format together.
pub(super) struct QuantisedMatrix {
    rows: usize,
    columns: usize,
    segments: Vec<Segment>,
}

/// Neighbouring rows of one format.
struct Segment {
    first_row: usize,
    num_rows: usize,
    records: CudaBuffer,
    kernels: Arc<QuantisedKernels>,
}

impl QuantisedMatrix {
    /// Uploads parts, stacked along their rows; all are quantised.
    pub(super) fn load(backend: &CudaBackend, parts: &[HostTensor]) -> Result<Self> {
        let columns = parts.first().map_or(0, HostTensor::columns);
        if let Some(part) = parts.iter().find(|part| part.columns() != columns) {
            return Err(malformed!("{} has {} columns, others beside it {columns}", part.name(), part.columns()));
        }
        let mut segments = Vec::new();
        let mut rows = 0;
        for parts in parts.chunk_by(|one, next| one.dtype() == next.dtype()) {
            let segment = Segment::load(backend, parts, rows, columns)?;
            rows += segment.num_rows;
            segments.push(segment);
        }
        Ok(Self { rows, columns, segments })
    }

    /// Output features.
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub(super) fn columns(&self) -> usize {
        self.columns
    }

    /// `out[t] = scale * table[ids[t]]`, shapes checked by the caller.
    pub(super) fn embed(
        &self,
        backend: &CudaBackend,
        stream: &CudaStream,
        ids: &CudaTensor,
        scale: f32,
        out: &CudaTensor,
    ) -> Result<()> {
        let [table] = self.segments.as_slice() else {
            return Err(unsupported!("an embedding of several quantised formats; --dtype bf16 unpacks it"));
        };
        let arguments = Arguments::new().tensor(out)?.buffer(&table.records)?.tensor(ids)?;
        let arguments = arguments.int(self.columns)?.float(scale);
        let blocks = (ids.columns(), 1, 1);
        // SAFETY: quant_embed(out, table, ids, hidden, scale), shapes as checked; ids are below the vocabulary.
        unsafe { backend.launch(stream, &table.kernels.embed, blocks, 256, arguments) }
    }

    /// `out = x W^T + bias`, shapes checked by the caller. One launch for each format.
    pub(super) fn multiply(
        &self,
        backend: &CudaBackend,
        stream: &CudaStream,
        x: &CudaTensor,
        bias: Option<&CudaTensor>,
        out: &CudaTensor,
    ) -> Result<()> {
        self.segments.iter().try_for_each(|segment| {
            let tile = segment.kernels.tile(x.rows(), segment.num_rows);
            let arguments = Arguments::new().tensor(out)?.tensor(x)?.buffer(&segment.records)?.optional(bias)?;
            let arguments = arguments.int(x.rows())?.int(segment.num_rows)?.int(self.columns)?;
            let arguments = arguments.int(segment.first_row)?.int(self.rows)?;
            let arguments = arguments.int(usize::from(out.dtype() == DType::F32))?;
            let blocks = (x.rows().div_ceil(tile.tokens), segment.num_rows.div_ceil(tile.outputs), 1);
            // SAFETY: quant_gemm(out, x, weight, bias, num_tokens, n, k, first_output, out_stride, is_f32), shapes as
            // checked; the records are of n rows, which are the outputs from first_output on.
            unsafe { backend.launch(stream, &tile.kernel, blocks, tile.threads, arguments) }
        })
    }
}

impl Segment {
    /// Parts, at least one, of one format.
    fn load(backend: &CudaBackend, parts: &[HostTensor], first_row: usize, columns: usize) -> Result<Self> {
        let format = parts[0].dtype();
        let records = Records::new(format);
        let rows: Vec<(&HostTensor, usize)> =
            parts.iter().flat_map(|part| (0..part.rows()).map(move |row| (part, row))).collect();
        let groups: Vec<&[(&HostTensor, usize)]> = rows.chunks(GROUP_ROWS).collect();
        let buffer = backend.upload_rows(groups.len(), records.group_bytes(columns), |group, out| {
            let rows: Vec<&[u8]> = groups[group].iter().map(|(part, row)| part.row_bytes(*row)).collect();
            records.write_group(&rows, out);
        })?;
        let kernels = backend.kernels().quantised(format)?;
        Ok(Self { first_row, num_rows: rows.len(), records: buffer, kernels })
    }
}
