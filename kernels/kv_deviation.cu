// How far freshly computed keys and values are from stored ones: the sum of squared differences of a token over KV
// heads, K and V, the fresh ones rounded to the type of the cache.
//
//   out    [num_tokens] f32; infinite where nothing is stored
//   qkv    [num_tokens, (num_heads + 2 num_kv_heads) head_dim] T, k rotated (kv_store.cu)
//   blocks the cache, of T or fp8; common.cuh says how a block lies
//   slots  [num_tokens] i32, block * block_size + offset of the stored token; negative when there is none
//
// head_dim is a multiple of 8. Grid (num_tokens), block 128. A thread sums vectors of 8 numbers in order, then threads
// are summed in a fixed tree. Equals `cpu::kv_deviation` on numbers rounded to T but for the order of the sum.

#include "common.cuh"

constexpr int THREADS = 128;

template <class T, class C>
__device__ __forceinline__ void kv_deviation(float* out, const T* qkv, const C* blocks, const int* slots,
                                             int num_heads, const CacheShape& shape) {
    const int token = blockIdx.x, slot = slots[token];
    if (slot < 0) {
        if (threadIdx.x == 0) out[token] = -MINUS_INFINITY;
        return;
    }
    const int head_vectors = shape.head_dim / 8, kv_vectors = shape.num_kv_heads * head_vectors;
    const u64 columns = static_cast<u64>(num_heads + 2 * shape.num_kv_heads) * shape.head_dim;
    const T* fresh = qkv + token * columns + static_cast<u64>(num_heads) * shape.head_dim;
    float sum = 0.0f;
    for (int vector = threadIdx.x; vector < 2 * kv_vectors; vector += THREADS) {
        const bool is_value = vector >= kv_vectors;
        const int within = is_value ? vector - kv_vectors : vector;
        const C* stored = cache_row(blocks, shape, slot, within / head_vectors, is_value);
        const Eight b = load8(stored + within % head_vectors * 8);
        Eight a = load8(fresh + vector * 8);
        if constexpr (sizeof(C) != sizeof(T)) a = as_stored<C>(a);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float difference = __fadd_rn(a.at[j], -b.at[j]);
            sum = __fmaf_rn(difference, difference, sum);
        }
    }
    __shared__ float warp_sums[THREADS / 32];
    sum = sum_lanes(sum, 32);
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        out[token] = __fadd_rn(__fadd_rn(warp_sums[0], warp_sums[1]), __fadd_rn(warp_sums[2], warp_sums[3]));
    }
}

#define KV_DEVIATION_KERNEL(name, T, C)                                                                                \
    extern "C" __global__ void __launch_bounds__(128)                                                                  \
    kv_deviation_##name(float* out, const T* qkv, const C* blocks, const int* slots, u64 block_stride,                 \
                        u64 layer_offset, int num_heads, int num_kv_heads, int head_dim, int block_size) {             \
        kv_deviation(out, qkv, blocks, slots, num_heads,                                                               \
                     {num_kv_heads, head_dim, block_size, block_stride, layer_offset});                                \
    }

KV_DEVIATION_KERNEL(bf16, bf16, bf16)
KV_DEVIATION_KERNEL(f16, f16, f16)
KV_DEVIATION_KERNEL(bf16_fp8, bf16, fp8)
