//! Norms of rows: the kernel for their width, and how many blocks share the rows.

#![allow(unsafe_code)]

use super::backend::{CudaBackend, CudaTensor, expect_vectors};
use super::kernels::NormKernels;
use super::launch::Arguments;
use super::memory::CudaBuffer;
use super::stream::CudaStream;
use crate::Result;
use crate::backend::{DType, Norm};

/// Numbers that a multiprocessor should have on the way, whether in one block or in several.
const WANTED_COLUMNS: usize = 4096;

impl NormKernels {
    /// Blocks for `num_rows` rows. Each is one block's until every multiprocessor has enough of them; then a block has
    /// several, for which it reads the weights once. The bits of a row are the same.
    fn num_blocks(&self, num_rows: usize, columns: usize, multiprocessors: usize) -> usize {
        let enough = multiprocessors * (WANTED_COLUMNS / columns).max(1);
        num_rows.div_ceil((num_rows / enough).clamp(1, self.width.max_block_rows))
    }
}

/// The kernels for rows of so many numbers; an error when a norm is not of such rows, or none can be.
fn find<'a>(backend: &'a CudaBackend, columns: usize, norm: &Norm<'_, CudaBuffer>) -> Result<&'a NormKernels> {
    norm.weight.expect("norm weight", 1, columns, DType::F32)?;
    expect_vectors("a norm", columns)?;
    backend.kernels().norm(columns)
}

/// See [`Backend::rms_norm`](crate::backend::Backend::rms_norm).
pub(super) fn rms_norm(
    backend: &CudaBackend,
    stream: &CudaStream,
    x: &CudaTensor,
    norm: &Norm<'_, CudaBuffer>,
    out: &CudaTensor,
) -> Result<()> {
    let (rows, columns) = (x.rows(), x.columns());
    let kernels = find(backend, columns, norm)?;
    out.expect("norm output", rows, columns, backend.dtype())?;
    let (kernel, dtype) = match x.dtype() {
        DType::F32 => (&kernels.rms_norm, DType::F32),
        _ => (&kernels.rms_norm_rows, backend.dtype()),
    };
    x.expect("norm input", rows, columns, dtype)?;
    let arguments = Arguments::new().tensor(out)?.tensor(x)?.tensor(norm.weight)?;
    let arguments = arguments.int(rows)?.int(columns)?.float(norm.epsilon);
    let blocks = (kernels.num_blocks(rows, columns, backend.info().multiprocessors), 1, 1);
    // SAFETY: rms_norm(out, x, weight, num_tokens, hidden, epsilon), shapes as checked.
    unsafe { backend.launch(stream, kernel, blocks, kernels.width.threads, arguments) }
}

/// See [`Backend::add_rms_norm`](crate::backend::Backend::add_rms_norm).
pub(super) fn add_rms_norm(
    backend: &CudaBackend,
    stream: &CudaStream,
    residual: &CudaTensor,
    delta: &CudaTensor,
    norm: &Norm<'_, CudaBuffer>,
    out: &CudaTensor,
) -> Result<()> {
    let (rows, columns) = (residual.rows(), residual.columns());
    let kernels = find(backend, columns, norm)?;
    residual.expect("residual", rows, columns, DType::F32)?;
    delta.expect("residual update", rows, columns, backend.dtype())?;
    out.expect("norm output", rows, columns, backend.dtype())?;
    let arguments = Arguments::new().tensor(out)?.tensor(residual)?.tensor(delta)?.tensor(norm.weight)?;
    let arguments = arguments.int(rows)?.int(columns)?.float(norm.epsilon);
    let blocks = (kernels.num_blocks(rows, columns, backend.info().multiprocessors), 1, 1);
    // SAFETY: add_rms_norm(out, residual, delta, weight, num_tokens, hidden, epsilon), shapes as checked.
    unsafe { backend.launch(stream, &kernels.add_rms_norm, blocks, kernels.width.threads, arguments) }
}
