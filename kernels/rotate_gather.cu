// Copies stored tokens to other slots and positions: K rotated by the difference of positions (pairs
// (i, i + head_dim / 2), in f32, rounded once), V as it is.
//
//   blocks          the cache, of T or fp8; common.cuh says how a block lies
//   source_slots    [num_copies] i32, block * block_size + offset
//   target_slots    [num_copies] i32; no two are the same, and none is in a block with a source
//   position_deltas [num_copies] i32, of any sign; 0 copies the bits of K
//   angles          [max_positions][cosines | sines][head_dim / 2] f32; every |delta| is below max_positions
//
// head_dim is a multiple of 16, at most 256. A row, the key or the value of a head, has `lanes` neighbouring lanes
// (`rotation_lanes`). A block has the same `block / lanes` rows of copies_per_block copies that follow each other, at most
// 4, and reads angles where the delta changes. Grid (ceil(num_copies / copies_per_block), parts of 2 num_kv_heads rows),
// block a multiple of 32, at most 512.
// Equals `cpu::rotate_gather` bit for bit on a cache of bf16.

#include "common.cuh"

constexpr int MAX_COPIES = 4;

// Eight numbers as they lie in memory.
template <class T> struct EightWords {
    uint4 words;
};
template <> struct EightWords<fp8> {
    uint2 words;
};
template <class T> __device__ __forceinline__ Eight unpack8(EightWords<T> x) { return unpack8<T>(x.words); }
template <> __device__ __forceinline__ Eight unpack8(EightWords<fp8> x) { return unpack8_fp8(x.words); }

template <class T>
__device__ __forceinline__ void rotate_gather(T* blocks, const int* source_slots, const int* target_slots,
                                              const int* position_deltas, const float* angles, int num_copies,
                                              int copies_per_block, const CacheShape& shape) {
    typedef EightWords<T> Words;
    __shared__ SharedRow delta_angles;
    const int head_dim = shape.head_dim, half = head_dim / 2, lanes = rotation_lanes(head_dim);
    const int row = blockIdx.y * (blockDim.x / lanes) + threadIdx.x / lanes, first = threadIdx.x % lanes * 8;
    const bool exists = row < 2 * shape.num_kv_heads && first < half, is_value = row >= shape.num_kv_heads;
    T* tile = blocks + tile_offset(shape, is_value ? row - shape.num_kv_heads : row, is_value) + first;

    // A lane reads about one copy, for all.
    const int start = blockIdx.x * copies_per_block, count = min(copies_per_block, num_copies - start);
    const int own = start + min(static_cast<int>(threadIdx.x % 32), count - 1);
    const u64 source = token_offset(shape, source_slots[own]), target = token_offset(shape, target_slots[own]);
    const int own_delta = position_deltas[own];
    Words low[MAX_COPIES], high[MAX_COPIES];
#pragma unroll
    for (int copy = 0; copy < MAX_COPIES; copy++) {
        const T* from = tile + __shfl_sync(ALL_LANES, source, copy);
        if (!exists || copy >= count) continue;
        low[copy] = *reinterpret_cast<const Words*>(from);
        high[copy] = *reinterpret_cast<const Words*>(from + half);
    }
    int fetched = 0;
#pragma unroll
    for (int copy = 0; copy < MAX_COPIES; copy++) {
        if (copy >= count) break;
        T* to = tile + __shfl_sync(ALL_LANES, target, copy);
        const int delta = __shfl_sync(ALL_LANES, own_delta, copy);
        if (delta != 0 && abs(delta) != fetched) {
            if (fetched != 0) __syncthreads();
            fetched = abs(delta);
            delta_angles.fill(angles + static_cast<u64>(fetched) * head_dim, head_dim, threadIdx.x);
            __syncthreads();
        }
        if (!exists) continue;
        // A rotation by nothing would turn -0 into 0.
        if (is_value || delta == 0) {
            *reinterpret_cast<Words*>(to) = low[copy];
            *reinterpret_cast<Words*>(to + half) = high[copy];
            continue;
        }
        Eight a = unpack8(low[copy]), b = unpack8(high[copy]);
        const float sign = delta < 0 ? -1.0f : 1.0f;
        rotate(a, b, delta_angles.load8(first), delta_angles.load8(first + half), sign);
        store8(to, a);
        store8(to + half, b);
    }
}

#define ROTATE_GATHER_KERNEL(T)                                                                                        \
    extern "C" __global__ void __launch_bounds__(512)                                                                  \
    rotate_gather_##T(T* blocks, const int* source_slots, const int* target_slots, const int* position_deltas,         \
                      const float* angles, u64 block_stride, u64 layer_offset, int num_copies, int copies_per_block,   \
                      int num_kv_heads, int head_dim, int block_size) {                                                \
        rotate_gather(blocks, source_slots, target_slots, position_deltas, angles, num_copies, copies_per_block,       \
                      {num_kv_heads, head_dim, block_size, block_stride, layer_offset});                               \
    }

ROTATE_GATHER_KERNEL(bf16)
ROTATE_GATHER_KERNEL(f16)
ROTATE_GATHER_KERNEL(fp8)
