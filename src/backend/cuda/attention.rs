//! Rotation, KV store and attention: the launches that know about blocks of the KV cache.

#![allow(unsafe_code)]

use std::sync::{Arc, Mutex, MutexGuard};

use cudarc::driver::CudaContext;

use super::backend::{CudaBackend, CudaTensor};
use super::kernels::{AttentionKernels, DECODE_THREADS};
use super::launch::Arguments;
use super::memory::CudaBuffer;
use super::stream::CudaStream;
use crate::backend::{AttentionMetadata, AttentionShape, DType, HeadTransform, KvLayer, KvOrder, SequenceRun, Tensor};
use crate::{Result, invalid, unsupported};

/// Positions of one chunk of decode attention. Chunks begin at multiples of it, whatever the batch.
pub(super) const CHUNK_POSITIONS: usize = 256;

/// Query rows of one KV head that decode attention takes at most.
const MAX_DECODE_ROWS: usize = 16;

/// Query rows of a prefill block.
const PREFILL_ROWS: usize = 64;

/// Memory for the results of single chunks. A step that needs more has so many sequences and heads that it fills the
/// device without splitting their contexts.
const PARTIALS_BYTES: usize = 32 << 20;

/// From how many chunks on contexts are split, where whole ones take up to this percentage of the blocks that the device has
/// at a time. Where they take more, splitting adds what partial results and a second kernel cost and gains nothing.
/// Measured on an H100 (docs/benchmarks.md).
const SPLITS: [(usize, usize); 3] = [(15, 2), (27, 4), (33, 8)];

/// The same where there are a few more blocks than the device has at a time, which would run when all others have ended.
const OVERFLOW: (usize, usize) = (140, 4);

/// Whether `num_blocks` contexts of up to `num_chunks` chunks are split, on a device with room for `max_blocks` blocks. It
/// depends on nothing but what a decode step is repeated for (`graphs.rs`), and changes no bit.
fn splits(num_blocks: usize, num_chunks: usize, max_blocks: usize) -> bool {
    let takes = |percentage: usize| num_blocks * 100 <= max_blocks * percentage;
    let fitting = match takes(100) {
        true => SPLITS.iter().find(|(percentage, _)| takes(*percentage)),
        false => Some(&OVERFLOW).filter(|(percentage, _)| takes(*percentage)),
    };
    fitting.is_some_and(|(_, fewest)| num_chunks >= *fewest)
}

/// Where decode attention keeps the results of chunks until they are combined.
pub(super) struct Partials(Mutex<CudaBuffer>);

impl Partials {
    pub(super) fn allocate(context: &Arc<CudaContext>) -> Result<Self> {
        Ok(Self(Mutex::new(CudaBuffer::allocate(context, PARTIALS_BYTES)?)))
    }

    /// For the launches that write and read them, which nobody else's may come between.
    fn lock(&self) -> MutexGuard<'_, CudaBuffer> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// Sequences of a step whose whole contexts are among its tokens: keys and values are those of `qkv`.
#[cfg_attr(not(feature = "flash-attn"), allow(dead_code))]
pub(super) struct Uncached<'a> {
    pub(super) qkv: &'a CudaTensor,
    pub(super) out: &'a CudaTensor,
    pub(super) shape: &'a AttentionShape,
    pub(super) run: &'a SequenceRun,
    /// `[1, S + 1]` i32: the token rows of each of the run's sequences begin and end there, counted from the step's first.
    pub(super) cu_seqlens: CudaTensor,
}

/// What both attention kernels are told, beside the tensors.
struct Call<'a> {
    qkv: &'a CudaTensor,
    out: &'a CudaTensor,
    shape: &'a AttentionShape,
    kv: &'a KvLayer<'a, CudaBuffer>,
    metadata: &'a AttentionMetadata<CudaBuffer>,
    /// Sequences with at most so many rows of a KV head are decode attention's, the others prefill attention's.
    decode_rows: usize,
}

/// Checks what every launch on the KV cache relies on.
fn check(
    backend: &CudaBackend,
    qkv: &CudaTensor,
    shape: &AttentionShape,
    kv: &KvLayer<'_, CudaBuffer>,
    metadata: &AttentionMetadata<CudaBuffer>,
) -> Result<()> {
    metadata.check()?;
    shape.check(qkv, kv.layout, metadata.num_tokens, backend.dtype())?;
    check_layer(backend, kv)
}

/// An error unless the cache is kept as kernels read it, and has the layer.
pub(super) fn check_layer(backend: &CudaBackend, kv: &KvLayer<'_, CudaBuffer>) -> Result<()> {
    let layout = kv.layout;
    if layout.order() != KvOrder::Rows {
        let (order, dtype, own) = (layout.order(), layout.dtype(), backend.dtype());
        return Err(unsupported!("the KV cache on this device is kept as rows of {own}, not {order:?} of {dtype}"));
    }
    backend.kernels().cache(layout.dtype())?;
    match kv.layer < layout.num_layers() {
        true => Ok(()),
        false => Err(invalid!("the KV cache has {} layers, layer {} was asked for", layout.num_layers(), kv.layer)),
    }
}

/// Numbers from one block to the next, and from the beginning of a block to its layer.
pub(super) fn strides(kv: &KvLayer<'_, CudaBuffer>) -> (usize, usize) {
    let number_bytes = kv.layout.dtype().block_bytes();
    (kv.layout.block_bytes() / number_bytes, kv.layout.k_tile_offset(kv.layer, 0) / number_bytes)
}

/// Blocks that rotate `num_heads` heads for each of `num_rows` tokens, or groups of copies, and threads of a block. One has
/// all heads of a row, for which it reads angles once, unless there are so few rows that it takes several to fill the device.
pub(super) fn rotation_grid(
    backend: &CudaBackend,
    num_rows: usize,
    num_heads: usize,
    head_dim: usize,
) -> ((usize, usize, usize), usize) {
    let lanes = (head_dim / 16).next_power_of_two();
    let max_threads = if num_rows < backend.info().multiprocessors { 128 } else { 512 };
    let parts = (num_heads * lanes).div_ceil(max_threads);
    ((num_rows, parts, 1), (num_heads.div_ceil(parts) * lanes).next_multiple_of(32))
}

/// See [`Backend::rope_and_store_kv`](crate::backend::Backend::rope_and_store_kv).
pub(super) fn rope_and_store_kv(
    backend: &CudaBackend,
    stream: &CudaStream,
    qkv: &CudaTensor,
    heads: &HeadTransform<'_, CudaBackend>,
    kv: &KvLayer<'_, CudaBuffer>,
    metadata: &AttentionMetadata<CudaBuffer>,
) -> Result<()> {
    let shape = &heads.shape;
    check(backend, qkv, shape, kv, metadata)?;
    let head_dim = shape.head_dim;
    if !head_dim.is_multiple_of(16) || head_dim > 256 || heads.rope.head_dim != head_dim {
        let rotated = heads.rope.head_dim;
        return Err(unsupported!(
            "heads of {head_dim} with angles for {rotated}; CUDA rotates multiples of 16 up to 256"
        ));
    }
    for norm in [&heads.q_norm, &heads.k_norm].into_iter().flatten() {
        norm.weight.expect("head norm", 1, head_dim, DType::F32)?;
    }
    let (block_stride, layer_offset) = strides(kv);
    let epsilon = heads.q_norm.as_ref().or(heads.k_norm.as_ref()).map_or(0.0, |norm| norm.epsilon);
    let arguments = Arguments::new()
        .tensor(qkv)?
        .buffer(kv.blocks)?
        .tensor(&metadata.positions)?
        .tensor(&metadata.slot_mapping)?
        .tensor(&heads.rope.angles)?
        .optional(heads.q_norm.as_ref().map(|norm| norm.weight))?
        .optional(heads.k_norm.as_ref().map(|norm| norm.weight))?
        .float(epsilon)
        .long(block_stride)
        .long(layer_offset)
        .int(shape.num_heads)?
        .int(shape.num_kv_heads)?
        .int(head_dim)?
        .int(kv.layout.block_size())?;
    let (blocks, threads) =
        rotation_grid(backend, metadata.num_tokens, shape.num_heads + 2 * shape.num_kv_heads, head_dim);
    let kernel = &backend.kernels().cache(kv.layout.dtype())?.rope_store_kv;
    // SAFETY: rope_store_kv(qkv, blocks, positions, slots, angles, q_norm, k_norm, epsilon, block_stride, layer_offset,
    // num_heads, num_kv_heads, head_dim, block_size), shapes as checked; positions lie inside the table of angles, slots
    // inside the pool.
    unsafe { backend.launch(stream, kernel, blocks, threads, arguments) }
}

/// See [`Backend::attention`](crate::backend::Backend::attention).
pub(super) fn attention(
    backend: &CudaBackend,
    stream: &CudaStream,
    qkv: &CudaTensor,
    shape: &AttentionShape,
    kv: &KvLayer<'_, CudaBuffer>,
    metadata: &AttentionMetadata<CudaBuffer>,
    out: &CudaTensor,
) -> Result<()> {
    check(backend, qkv, shape, kv, metadata)?;
    out.expect("attention output", qkv.rows(), shape.num_heads * shape.head_dim, backend.dtype())?;
    let kernels = backend.kernels().attention(kv.layout.dtype(), shape.head_dim)?;
    let group = shape.num_heads / shape.num_kv_heads;
    let decode_rows = if group <= MAX_DECODE_ROWS { group } else { 0 };
    let launch = |metadata: &AttentionMetadata<CudaBuffer>| {
        Call { qkv, out, shape, kv, metadata, decode_rows }.launch(backend, stream, kernels, group)
    };
    if !backend.attends_in_runs() || !metadata.runs.has_uncached() {
        return launch(metadata);
    }
    for run in metadata.runs.iter() {
        let part = part_of(metadata, run);
        match backend.flash_attention().filter(|_| run.is_uncached) {
            Some(flash) => {
                flash.attend(backend, stream, &Uncached { qkv, out, shape, run, cu_seqlens: part.cu_seqlens_q })?;
            }
            None => launch(&part)?,
        }
    }
    Ok(())
}

/// What kernels are told of a run alone. Rows of tokens are counted from the step's first as before.
fn part_of(metadata: &AttentionMetadata<CudaBuffer>, run: &SequenceRun) -> AttentionMetadata<CudaBuffer> {
    let (first, num_seqs) = (run.sequences.start, run.sequences.len());
    let entries = |array: &CudaTensor, len| {
        let offset_bytes = array.offset_bytes() + first * array.dtype().block_bytes();
        Tensor::new(array.buffer().clone(), offset_bytes, 1, len, array.dtype())
    };
    AttentionMetadata {
        num_seqs,
        num_tokens: run.tokens.len(),
        max_query_len: run.max_query_len,
        max_context_len: run.max_context_len,
        cu_seqlens_q: entries(&metadata.cu_seqlens_q, num_seqs + 1),
        context_lens: entries(&metadata.context_lens, num_seqs),
        block_tables: metadata.block_tables.rows_from(first).first_rows(num_seqs),
        ..metadata.clone()
    }
}

impl Call<'_> {
    fn launch(
        &self,
        backend: &CudaBackend,
        stream: &CudaStream,
        kernels: &AttentionKernels,
        group: usize,
    ) -> Result<()> {
        if self.has_decodes() {
            self.launch_decode(backend, stream, kernels)?;
        }
        if self.has_prefills() {
            self.launch_prefill(backend, stream, kernels, group)?;
        }
        Ok(())
    }

    /// Whether a sequence may have one new token only.
    fn has_decodes(&self) -> bool {
        let AttentionMetadata { num_seqs, num_tokens, max_query_len, .. } = *self.metadata;
        // When all sequences are as long as the longest, none is shorter.
        self.decode_rows > 0 && (max_query_len == 1 || num_tokens < num_seqs * max_query_len)
    }

    fn has_prefills(&self) -> bool {
        self.decode_rows == 0 || self.metadata.max_query_len > 1
    }

    fn launch_decode(&self, backend: &CudaBackend, stream: &CudaStream, kernels: &AttentionKernels) -> Result<()> {
        let AttentionShape { num_kv_heads, head_dim, .. } = *self.shape;
        let num_seqs = self.metadata.num_seqs;
        let num_chunks = self.metadata.max_context_len.div_ceil(CHUNK_POSITIONS);
        let partials_bytes = num_seqs * num_kv_heads * num_chunks * self.decode_rows * (head_dim + 2) * 4;
        let max_blocks = backend.info().multiprocessors * kernels.decode_blocks;
        let splits = splits(num_seqs * num_kv_heads, num_chunks, max_blocks) && partials_bytes <= PARTIALS_BYTES;
        let held = splits.then(|| backend.partials().lock());
        let partials = held.as_deref();
        let num_chunks = if splits { num_chunks } else { 1 };
        let blocks = (num_chunks, num_kv_heads, num_seqs);
        let arguments = self.arguments(partials)?;
        // SAFETY: attention_decode as `arguments` lists them, shapes as checked; block tables name blocks of the pool.
        unsafe { backend.launch(stream, &kernels.decode, blocks, DECODE_THREADS, arguments) }?;
        match partials {
            Some(partials) => self.launch_combine(backend, stream, partials, num_chunks),
            None => Ok(()),
        }
    }

    fn launch_combine(
        &self,
        backend: &CudaBackend,
        stream: &CudaStream,
        partials: &CudaBuffer,
        num_chunks: usize,
    ) -> Result<()> {
        let AttentionShape { num_heads, num_kv_heads, head_dim, window, .. } = *self.shape;
        let arguments = Arguments::new()
            .tensor(self.out)?
            .buffer(partials)?
            .tensor(&self.metadata.context_lens)?
            .tensor(&self.metadata.cu_seqlens_q)?
            .tensor(&self.metadata.positions)?
            .int(num_chunks)?
            .int(num_heads)?
            .int(num_kv_heads)?
            .int(head_dim)?
            .int(self.decode_rows)?
            .int(window.unwrap_or(0))?;
        // A lane has four dimensions of a row.
        let threads = self.decode_rows * (head_dim / 4).next_power_of_two().min(32);
        let block = threads.next_multiple_of(32).min(128);
        let blocks = (threads.div_ceil(block), num_kv_heads, self.metadata.num_seqs);
        let kernel = &backend.kernels().attention_combine;
        // SAFETY: attention_combine(out, partials, context_lens, cu_seqlens_q, positions, num_chunks, num_heads,
        // num_kv_heads, head_dim, decode_rows, window), shapes as checked, behind the decode kernel on the same stream.
        unsafe { backend.launch(stream, kernel, blocks, block, arguments) }
    }

    fn launch_prefill(
        &self,
        backend: &CudaBackend,
        stream: &CudaStream,
        kernels: &AttentionKernels,
        group: usize,
    ) -> Result<()> {
        let num_tiles = (self.metadata.max_query_len * group).div_ceil(PREFILL_ROWS);
        let blocks = (num_tiles, self.shape.num_kv_heads, self.metadata.num_seqs);
        let arguments = self.arguments(None)?;
        // SAFETY: attention_prefill as `arguments` lists them, shapes as checked; block tables name blocks of the pool.
        unsafe { backend.launch(stream, &kernels.prefill, blocks, kernels.prefill_threads, arguments) }
    }

    /// `out, partials, qkv, blocks, block_tables, context_lens, cu_seqlens_q, positions, block_stride, layer_offset,
    /// max_blocks, block_size, num_heads, num_kv_heads, decode_rows, window, scale, cap_scale`.
    fn arguments(&self, partials: Option<&CudaBuffer>) -> Result<Arguments<'_>> {
        let (block_stride, layer_offset) = strides(self.kv);
        // The cap, and what products are multiplied with inside of the tangent.
        let (scale, cap_scale) =
            self.shape.softcap.map_or((self.shape.scale, 0.0), |cap| (cap, self.shape.scale / cap));
        let arguments = Arguments::new().tensor(self.out)?;
        let arguments = match partials {
            Some(partials) => arguments.buffer(partials)?,
            None => arguments.optional(None)?,
        };
        Ok(arguments
            .tensor(self.qkv)?
            .buffer(self.kv.blocks)?
            .tensor(&self.metadata.block_tables)?
            .tensor(&self.metadata.context_lens)?
            .tensor(&self.metadata.cu_seqlens_q)?
            .tensor(&self.metadata.positions)?
            .long(block_stride)
            .long(layer_offset)
            .int(self.metadata.block_tables.columns())?
            .int(self.kv.layout.block_size())?
            .int(self.shape.num_heads)?
            .int(self.shape.num_kv_heads)?
            .int(self.decode_rows)?
            .int(self.shape.window.unwrap_or(0))?
            .float(scale)
            .float(cap_scale))
    }
}

#[cfg(test)]
mod tests {
    use super::splits;

    /// An H100 with heads of 128 numbers, of which a KV head serves four.
    const MAX_BLOCKS: usize = 132 * 4;

    #[test]
    fn contexts_are_split_where_that_was_faster() {
        for (num_blocks, wanted) in [
            (8, [false, true, true, true]),
            (64, [false, true, true, true]),
            (96, [false, false, true, true]),
            (128, [false, false, true, true]),
            (160, [false, false, false, true]),
            (192, [false; 4]),
            (528, [false; 4]),
            (640, [false, false, true, true]),
            (768, [false; 4]),
            (2048, [false; 4]),
        ] {
            let found = [1, 2, 4, 8].map(|num_chunks| splits(num_blocks, num_chunks, MAX_BLOCKS));
            assert_eq!(found, wanted, "{num_blocks} blocks");
        }
    }
}
