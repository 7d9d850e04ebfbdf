//! Rows of logits: what requests change in them, the token drawn from each, and what is asked about them.

#![allow(unsafe_code)]

use super::backend::{CudaBackend, CudaTensor};
use super::kernels::Kernel;
use super::launch::Arguments;
use super::memory::CudaBuffer;
use super::stream::CudaStream;
use crate::Result;
use crate::backend::{DType, LogitEdits, RowLogprobs, SamplingBatch};

/// See [`Backend::argmax`](crate::backend::Backend::argmax).
pub(super) fn argmax(backend: &CudaBackend, stream: &CudaStream, x: &CudaTensor, out: &CudaTensor) -> Result<()> {
    x.expect("argmax input", x.rows(), x.columns(), DType::F32)?;
    out.expect("argmax output", 1, x.rows(), DType::I32)?;
    let arguments = Arguments::new().tensor(out)?.tensor(x)?.int(x.columns())?;
    // SAFETY: argmax(out, logits, vocab), shapes as checked.
    unsafe { backend.launch(stream, &backend.kernels().argmax, (x.rows(), 1, 1), 1024, arguments) }
}

/// See [`Backend::sample`](crate::backend::Backend::sample).
pub(super) fn sample(
    backend: &CudaBackend,
    stream: &CudaStream,
    logits: &CudaTensor,
    sampling: &SamplingBatch<CudaBuffer>,
    out: &CudaTensor,
) -> Result<()> {
    logits.expect("logits", logits.rows(), logits.columns(), DType::F32)?;
    out.expect("sampled tokens", 1, logits.rows(), DType::I32)?;
    sampling.check(logits.rows(), logits.columns())?;
    let SamplingBatch { temperatures, top_ks, top_ps, min_ps, seeds, indices, masks } = sampling;
    let arguments = Arguments::new().tensor(out)?.tensor(logits)?.tensor(temperatures)?.tensor(top_ks)?;
    let arguments = arguments.tensor(top_ps)?.tensor(min_ps)?.tensor(seeds)?.tensor(indices)?;
    let arguments = arguments.optional(masks.as_ref().map(|masks| &masks.mask_of))?;
    let arguments = arguments.optional(masks.as_ref().map(|masks| &masks.words))?.int(logits.columns())?;
    // SAFETY: sample(out, logits, temperature, top_k, top_p, min_p, seeds, indices, mask_of, masks, vocab), shapes as
    // checked; what mask_of holds is below the number of masks.
    unsafe { backend.launch(stream, &backend.kernels().sample, (logits.rows(), 1, 1), 1024, arguments) }
}

/// See [`Backend::edit_logits`](crate::backend::Backend::edit_logits).
pub(super) fn edit(
    backend: &CudaBackend,
    stream: &CudaStream,
    logits: &CudaTensor,
    edits: &LogitEdits<CudaBuffer>,
) -> Result<()> {
    // SAFETY: edit_logits(logits, edits, entries, vocab).
    unsafe { launch_edits(backend, stream, &backend.kernels().edit_logits, logits, edits) }
}

/// See [`Backend::restore_logits`](crate::backend::Backend::restore_logits).
pub(super) fn restore(
    backend: &CudaBackend,
    stream: &CudaStream,
    logits: &CudaTensor,
    edits: &LogitEdits<CudaBuffer>,
) -> Result<()> {
    // SAFETY: restore_logits(logits, edits, entries, vocab).
    unsafe { launch_edits(backend, stream, &backend.kernels().restore_logits, logits, edits) }
}

/// # Safety
/// The kernel takes (logits, edits, entries, vocab).
unsafe fn launch_edits(
    backend: &CudaBackend,
    stream: &CudaStream,
    kernel: &Kernel,
    logits: &CudaTensor,
    edits: &LogitEdits<CudaBuffer>,
) -> Result<()> {
    logits.expect("logits", logits.rows(), logits.columns(), DType::F32)?;
    edits.check()?;
    let arguments = Arguments::new().tensor(logits)?.tensor(&edits.rows)?.tensor(&edits.entries)?;
    let arguments = arguments.int(logits.columns())?;
    // SAFETY: the caller's promise, and shapes as checked; rows, entries and tokens are below their numbers.
    unsafe { backend.launch(stream, kernel, (edits.rows.rows(), 1, 1), 256, arguments) }
}

/// See [`Backend::logprobs`](crate::backend::Backend::logprobs).
pub(super) fn logprobs(
    backend: &CudaBackend,
    stream: &CudaStream,
    logits: &CudaTensor,
    tokens: &CudaTensor,
    asked: &CudaTensor,
    out: &CudaTensor,
) -> Result<()> {
    logits.expect("logits", logits.rows(), logits.columns(), DType::F32)?;
    tokens.expect("drawn tokens", 1, logits.rows(), DType::I32)?;
    asked.expect("rows that are asked about", asked.rows(), RowLogprobs::ASKED_WORDS, DType::I32)?;
    out.expect("logprobs", asked.rows(), RowLogprobs::NUM_WORDS, DType::I32)?;
    let arguments = Arguments::new().tensor(out)?.tensor(logits)?.tensor(tokens)?.tensor(asked)?;
    let arguments = arguments.int(logits.columns())?;
    // SAFETY: logprobs(out, logits, tokens, asked, vocab), shapes as checked; rows and tokens are below their numbers.
    unsafe { backend.launch(stream, &backend.kernels().logprobs, (asked.rows(), 1, 1), 1024, arguments) }
}
