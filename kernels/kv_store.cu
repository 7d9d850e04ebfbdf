// What happens to a token between the qkv projection and attention: norms of the q and k heads where the model has
// them, rotation (pairs (i, i + head_dim / 2), arXiv 2104.09864), and the store of k and v in the KV cache.
//
// Layout of the cache on a GPU: a block is [layer][kv_head][K tile | V tile], as on the CPU, but a tile is
// [token][head_dim] of T. A row of a tile is then a run of 16-byte vectors, which is what cp.async copies and what
// ldmatrix reads: K as it lies (the mma's columns are keys), V transposed on the way. The CPU's pairs would have to be
// taken apart first.
//
//   qkv          [num_tokens, (num_heads + 2 num_kv_heads) head_dim] T; q and k are changed in place
//   blocks       the cache, of T or fp8; layer_offset = layer * num_kv_heads * 2 * block_size * head_dim
//   positions    [num_tokens] i32
//   slot_mapping [num_tokens] i32, block * block_size + offset; a negative slot stores nothing
//   angles       [max_positions][cosines | sines][head_dim / 2] f32
//   q_norm       [head_dim] f32, or null; k_norm likewise
//
// head_dim is a multiple of 16, at most 256. A head has `lanes` neighbouring lanes (`rotation_lanes`), a block `block /
// lanes` heads of one token, and angles and weights are read once for all of them. Grid (num_tokens, parts of a token),
// block a multiple of 32, at most 512.
// Equals `cpu::rope_and_store_kv` on numbers rounded to T; the sum of squares is in another order. A cache of fp8 has the
// fp8 next to each of these.

#include "common.cuh"

// Scales a head to a root mean square of 1, then by `weight`. All lanes of the warp take part in the sum.
__device__ __forceinline__ void norm_head(Eight& low, Eight& high, const SharedRow& weight, int first, int head_dim,
                                          float epsilon, int lanes, bool is_normed) {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < 8; j++) sum = __fmaf_rn(high.at[j], high.at[j], __fmaf_rn(low.at[j], low.at[j], sum));
    sum = sum_lanes(sum, lanes);
    if (!is_normed) return;
    const float mean = __fdiv_rn(sum, static_cast<float>(head_dim));
    const float inverse = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, epsilon)));
    const Eight low_weight = weight.load8(first), high_weight = weight.load8(first + head_dim / 2);
#pragma unroll
    for (int j = 0; j < 8; j++) {
        low.at[j] = __fmul_rn(__fmul_rn(low.at[j], inverse), low_weight.at[j]);
        high.at[j] = __fmul_rn(__fmul_rn(high.at[j], inverse), high_weight.at[j]);
    }
}

template <class T, class C>
__device__ __forceinline__ void rope_store_kv(T* qkv, C* blocks, const int* positions, const int* slot_mapping,
                                              const float* angles, const float* q_norm, const float* k_norm,
                                              float epsilon, int num_heads, const CacheShape& shape) {
    __shared__ SharedRow token_angles, q_weight, k_weight;
    const int head_dim = shape.head_dim, half = head_dim / 2, lanes = rotation_lanes(head_dim);
    const int heads = num_heads + 2 * shape.num_kv_heads, token = blockIdx.x;
    const int head = blockIdx.y * (blockDim.x / lanes) + threadIdx.x / lanes, first = threadIdx.x % lanes * 8;
    const bool exists = head < heads && first < half;
    const bool is_query = head < num_heads, is_value = head >= num_heads + shape.num_kv_heads;

    T* row = qkv + (static_cast<u64>(token) * heads + head) * head_dim + first;
    // Threads that fetch no angles need no position, and those of queries no slot.
    const int position = threadIdx.x < head_dim / 4 ? positions[token] : 0;
    const int slot = exists && !is_query ? slot_mapping[token] : -1;
    // On the way while angles are fetched.
    uint4 low_words = {}, high_words = {};
    if (exists) {
        low_words = *reinterpret_cast<const uint4*>(row);
        high_words = *reinterpret_cast<const uint4*>(row + half);
    }
    // Weights by the last threads: the first still wait for the position.
    const int from_end = blockDim.x - 1 - threadIdx.x;
    if (q_norm != nullptr) q_weight.fill(q_norm, head_dim, from_end);
    if (k_norm != nullptr) k_weight.fill(k_norm, head_dim, from_end);
    token_angles.fill(angles + static_cast<u64>(position) * head_dim, head_dim, threadIdx.x);
    __syncthreads();

    Eight low = unpack8<T>(low_words), high = unpack8<T>(high_words);
    if (q_norm != nullptr || k_norm != nullptr) {
        const bool is_normed = exists && !is_value && (is_query ? q_norm : k_norm) != nullptr;
        norm_head(low, high, is_query ? q_weight : k_weight, first, head_dim, epsilon, lanes, is_normed);
    }
    if (!exists) return;
    if (!is_value) {
        rotate(low, high, token_angles.load8(first), token_angles.load8(first + half), 1.0f);
        store8(row, low);
        store8(row + half, high);
    }
    if (slot < 0) return;
    const int kv_head = head - num_heads - (is_value ? shape.num_kv_heads : 0);
    C* target = cache_row(blocks, shape, slot, kv_head, is_value) + first;
    // The cache keeps what the row has, however few bits: kv_deviation.cu finds no difference.
    if constexpr (sizeof(C) != sizeof(T)) low = as_stored<T>(low), high = as_stored<T>(high);
    store8(target, low);
    store8(target + half, high);
}

#define STORE_KERNEL(name, T, C)                                                                                       \
    extern "C" __global__ void __launch_bounds__(512)                                                                  \
    rope_store_kv_##name(T* qkv, C* blocks, const int* positions, const int* slot_mapping, const float* angles,        \
                         const float* q_norm, const float* k_norm, float epsilon, u64 block_stride, u64 layer_offset,  \
                         int num_heads, int num_kv_heads, int head_dim, int block_size) {                              \
        rope_store_kv(qkv, blocks, positions, slot_mapping, angles, q_norm, k_norm, epsilon, num_heads,                \
                      {num_kv_heads, head_dim, block_size, block_stride, layer_offset});                               \
    }

STORE_KERNEL(bf16, bf16, bf16)
STORE_KERNEL(f16, f16, f16)
STORE_KERNEL(bf16_fp8, bf16, fp8)
