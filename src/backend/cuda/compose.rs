//! Stored tokens at other positions, and how far they are from fresh ones: the launches that composition takes.

#![allow(unsafe_code)]

use super::attention::{check_layer, rotation_grid, strides};
use super::backend::{CudaBackend, CudaTensor};
use super::launch::Arguments;
use super::memory::CudaBuffer;
use super::stream::CudaStream;
use super::weights::CudaRopeTable;
use crate::backend::{AttentionShape, DType, KvLayer, RotatedCopies};
use crate::{Result, unsupported};

/// Copies that a block of `rotate_gather` makes at most.
const MAX_BLOCK_COPIES: usize = 4;

/// See [`Backend::rotate_gather`](crate::backend::Backend::rotate_gather).
pub(super) fn rotate_gather(
    backend: &CudaBackend,
    stream: &CudaStream,
    kv: &KvLayer<'_, CudaBuffer>,
    copies: &RotatedCopies<CudaBuffer>,
    rope: &CudaRopeTable,
) -> Result<()> {
    copies.check()?;
    check_layer(backend, kv)?;
    let (num_copies, num_kv_heads, head_dim) = (copies.len(), kv.layout.num_kv_heads(), kv.layout.head_dim());
    if head_dim > 256 || rope.head_dim != head_dim {
        let rotated = rope.head_dim;
        return Err(unsupported!(
            "heads of {head_dim} with angles for {rotated}; CUDA rotates multiples of 16 up to 256"
        ));
    }
    let (block_stride, layer_offset) = strides(kv);
    let block_copies = (num_copies / backend.info().multiprocessors).clamp(1, MAX_BLOCK_COPIES);
    let arguments = Arguments::new()
        .buffer(kv.blocks)?
        .tensor(&copies.source_slots)?
        .tensor(&copies.target_slots)?
        .tensor(&copies.position_deltas)?
        .tensor(&rope.angles)?
        .long(block_stride)
        .long(layer_offset)
        .int(num_copies)?
        .int(block_copies)?
        .int(num_kv_heads)?
        .int(head_dim)?
        .int(kv.layout.block_size())?;
    let (blocks, threads) = rotation_grid(backend, num_copies.div_ceil(block_copies), 2 * num_kv_heads, head_dim);
    let kernel = &backend.kernels().cache(kv.layout.dtype())?.rotate_gather;
    // SAFETY: rotate_gather(blocks, source_slots, target_slots, position_deltas, angles, block_stride, layer_offset,
    // num_copies, copies_per_block, num_kv_heads, head_dim, block_size), shapes as checked; slots lie inside the pool,
    // deltas inside the table of angles.
    unsafe { backend.launch(stream, kernel, blocks, threads, arguments) }
}

/// See [`Backend::kv_deviation`](crate::backend::Backend::kv_deviation).
pub(super) fn kv_deviation(
    backend: &CudaBackend,
    stream: &CudaStream,
    qkv: &CudaTensor,
    shape: &AttentionShape,
    kv: &KvLayer<'_, CudaBuffer>,
    slots: &CudaTensor,
    out: &CudaTensor,
) -> Result<()> {
    let num_tokens = qkv.rows();
    shape.check(qkv, kv.layout, num_tokens, backend.dtype())?;
    check_layer(backend, kv)?;
    slots.expect("slots", 1, num_tokens, DType::I32)?;
    out.expect("deviations", 1, num_tokens, DType::F32)?;
    let (block_stride, layer_offset) = strides(kv);
    let arguments = Arguments::new()
        .tensor(out)?
        .tensor(qkv)?
        .buffer(kv.blocks)?
        .tensor(slots)?
        .long(block_stride)
        .long(layer_offset)
        .int(shape.num_heads)?
        .int(shape.num_kv_heads)?
        .int(shape.head_dim)?
        .int(kv.layout.block_size())?;
    let kernel = &backend.kernels().cache(kv.layout.dtype())?.kv_deviation;
    // SAFETY: kv_deviation(out, qkv, blocks, slots, block_stride, layer_offset, num_heads, num_kv_heads, head_dim,
    // block_size), shapes as checked; slots lie inside the pool or are negative.
    unsafe { backend.launch(stream, kernel, (num_tokens, 1, 1), 128, arguments) }
}
