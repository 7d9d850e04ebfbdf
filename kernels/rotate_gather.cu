// Copies stored tokens to other slots and positions: K rotated by the difference of positions (pairs
// (i, i + head_dim / 2), in f32, rounded once), V as it is.
//
//   blocks          the cache, of T or fp8; common.cuh says how a block lies
//   source_slots    [num_copies] i32, block * block_size + offset
//   target_slots    [num_copies] i32; no two are the same, and none is in a block with a source
//   position_deltas [num_copies] i32, of any sign; 0 copies the bits of K
//   angles          [max_positions][cosines | sines][head_dim / 2] f32; every |delta| is below max_positions
//
// head_dim is a multiple of 16, at most 256. A head of a copy has `lanes` neighbouring lanes (`rotation_lanes`). Grid
// (ceil(num_copies * num_kv_heads / (128 / lanes))), block 128.
// Equals `cpu::rotate_gather` bit for bit on a cache of bf16.

#include "common.cuh"

template <class T> __device__ __forceinline__ void copy8(T* target, const T* source) {
    *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(source);
}
template <> __device__ __forceinline__ void copy8(fp8* target, const fp8* source) {
    *reinterpret_cast<uint2*>(target) = *reinterpret_cast<const uint2*>(source);
}

template <class T>
__device__ __forceinline__ void rotate_gather(T* blocks, const int* source_slots, const int* target_slots,
                                              const int* position_deltas, const float* angles, int num_copies,
                                              const CacheShape& shape) {
    const int half = shape.head_dim / 2, lanes = rotation_lanes(shape.head_dim);
    const u64 thread = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x;
    const u64 index = thread / lanes;
    const int first = static_cast<int>(thread % lanes) * 8;
    if (index >= static_cast<u64>(num_copies) * shape.num_kv_heads || first >= half) return;
    const int copy = static_cast<int>(index / shape.num_kv_heads);
    const int kv_head = static_cast<int>(index % shape.num_kv_heads);
    const int source = source_slots[copy], target = target_slots[copy], delta = position_deltas[copy];

    const T* from = cache_row(blocks, shape, source, kv_head, true) + first;
    T* to = cache_row(blocks, shape, target, kv_head, true) + first;
    copy8(to, from);
    copy8(to + half, from + half);

    from = cache_row(blocks, shape, source, kv_head, false) + first;
    to = cache_row(blocks, shape, target, kv_head, false) + first;
    Eight low = load8(from), high = load8(from + half);
    // A rotation by nothing would turn -0 into 0.
    if (delta != 0) {
        const float* cosines = angles + static_cast<u64>(abs(delta)) * shape.head_dim + first;
        rotate(low, high, load8(cosines), load8(cosines + half), delta < 0 ? -1.0f : 1.0f);
    }
    store8(to, low);
    store8(to + half, high);
}

#define ROTATE_GATHER_KERNEL(T)                                                                                        \
    extern "C" __global__ void __launch_bounds__(128)                                                                  \
    rotate_gather_##T(T* blocks, const int* source_slots, const int* target_slots, const int* position_deltas,         \
                      const float* angles, u64 block_stride, u64 layer_offset, int num_copies, int num_kv_heads,       \
                      int head_dim, int block_size) {                                                                  \
        rotate_gather(blocks, source_slots, target_slots, position_deltas, angles, num_copies,                         \
                      {num_kv_heads, head_dim, block_size, block_stride, layer_offset});                               \
    }

ROTATE_GATHER_KERNEL(bf16)
ROTATE_GATHER_KERNEL(f16)
ROTATE_GATHER_KERNEL(fp8)
