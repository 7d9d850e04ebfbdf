// Matrix product with weights: out = x weight^T (+ bias).
//
//   x      [num_tokens, k] T
//   weight [n, k] T
//   bias   [n] f32, or null
//   out    [num_tokens, n] T or f32
//
// k is a multiple of 8 (rows are read in vectors of 16 bytes), n and num_tokens are any. Tiles are tokens x outputs, which
// kernels are named by; 16 x 32 has 64 threads, 128 x 256 has 256, the others 128. Grid (ceil(num_tokens / tile tokens),
// ceil(n / tile outputs)): blocks that run together share weights, which are then read from memory once, while x stays in
// L2. Dynamic shared memory: 72 KiB for 16 x 32, 144 KiB for 128 x 256, 96 KiB for the others. A warp of the large tiles
// has 64 x 64 sums, so that it multiplies for as long as it takes to load operands from shared memory.
//
// Every output is one chain of mma.m16n8k16 steps in order of k, begun at zero; steps past k add products of zeros,
// which change nothing; the bias is added last. No tile splits k. So a row has the same bits in every tile size and
// whatever else is in the batch.
// Equals `cpu::gemm` on numbers rounded to T: sums are f32 in another order.
//
// Tiles of both operands travel through a ring of cp.async stages in shared memory, their 16-byte chunks exchanged so
// that ldmatrix meets no bank conflict.

#include "common.cuh"
#include "gemm.cuh"

template <int TOKENS, int OUTPUTS, int DEPTH, int WARPS_M, int WARPS_N, int STAGES> struct Tile {
    static constexpr int tokens = TOKENS, outputs = OUTPUTS, depth = DEPTH, stages = STAGES;
    static constexpr int warps_m = WARPS_M, warps_n = WARPS_N, threads = WARPS_M * WARPS_N * 32;
    static constexpr int chunks = DEPTH / 8;
    static constexpr u32 x_bytes = TOKENS * DEPTH * 2, stage_bytes = x_bytes + OUTPUTS * DEPTH * 2;
    // mma tiles of a warp.
    static constexpr int m_tiles = TOKENS / WARPS_M / 16, n_tiles = OUTPUTS / WARPS_N / 8;
};

// Queues the copies of `ROWS` rows of the tile that begins at (first_row, first_k).
template <class C, int ROWS, bool IS_WEIGHT, class T>
__device__ __forceinline__ void load_rows(u32 target, const T* source, int first_row, int num_rows, int first_k,
                                          int k) {
    constexpr int VECTORS = ROWS * C::chunks;
#pragma unroll
    for (int i = 0; i < ceil_div(VECTORS, C::threads); i++) {
        const int vector = i * C::threads + threadIdx.x;
        if (VECTORS % C::threads != 0 && vector >= VECTORS) break;
        const int row = vector / C::chunks, chunk = vector % C::chunks;
        const int from_row = first_row + row, from_k = first_k + chunk * 8;
        const bool exists = from_row < num_rows && from_k < k;
        const T* from = exists ? source + static_cast<u64>(from_row) * k + from_k : source;
        copy16_async(target + swizzled<C::chunks>(IS_WEIGHT ? permuted(row) : row, chunk), from, exists);
    }
}

template <class C, class T>
__device__ __forceinline__ void load_stage(u32 stage, const T* x, const T* weight, int num_tokens, int n, int k,
                                           int first_k) {
    load_rows<C, C::tokens, false>(stage, x, blockIdx.x * C::tokens, num_tokens, first_k, k);
    load_rows<C, C::outputs, true>(stage + C::x_bytes, weight, blockIdx.y * C::outputs, n, first_k, k);
}

// Adds the products of one stage. All mmas of a step of 16 are independent; steps follow in order of k.
template <class C, class T>
__device__ __forceinline__ void multiply_stage(float (&sums)[C::m_tiles][C::n_tiles][4], u32 stage) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first_token = warp / C::warps_n * C::m_tiles * 16, first_output = warp % C::warps_n * C::n_tiles * 8;
#pragma unroll
    for (int step = 0; step < C::depth / 16; step++) {
        u32 a[C::m_tiles][4], b[C::n_tiles][2];
#pragma unroll
        for (int m = 0; m < C::m_tiles; m++) {
            load_matrices(a[m], stage + swizzled<C::chunks>(first_token + m * 16 + lane % 16, step * 2 + lane / 16));
        }
#pragma unroll
        for (int n = 0; n < C::n_tiles; n += 2) {
            u32 pair[4];
            const int row = first_output + n * 8 + lane / 16 * 8 + lane % 8;
            load_matrices(pair, stage + C::x_bytes + swizzled<C::chunks>(row, step * 2 + lane / 8 % 2));
            b[n][0] = pair[0], b[n][1] = pair[1], b[n + 1][0] = pair[2], b[n + 1][1] = pair[3];
        }
#pragma unroll
        for (int m = 0; m < C::m_tiles; m++) {
#pragma unroll
            for (int n = 0; n < C::n_tiles; n++) mma<T>(sums[m][n], a[m], b[n][0], b[n][1]);
        }
    }
}

template <class C, class O>
__device__ __forceinline__ void store_tile(O* out, const float* bias, const float (&sums)[C::m_tiles][C::n_tiles][4],
                                           int num_tokens, int n) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first_token = blockIdx.x * C::tokens + warp / C::warps_n * C::m_tiles * 16 + lane / 4;
    const int first_output = blockIdx.y * C::outputs + warp % C::warps_n * C::n_tiles * 8 + lane % 4 * 4;
#pragma unroll
    for (int m = 0; m < C::m_tiles; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int token = first_token + m * 16 + half * 8;
            if (token >= num_tokens) continue;
#pragma unroll
            for (int pair = 0; pair < C::n_tiles; pair += 2) {
                const float(&left)[4] = sums[m][pair], (&right)[4] = sums[m][pair + 1];
                const int at = half * 2;
                store_outputs(out, bias, make_float4(left[at], left[at + 1], right[at], right[at + 1]), token,
                              first_output + pair * 8, n);
            }
        }
    }
}

template <class C, class T, class O>
__device__ __forceinline__ void gemm(O* out, const T* x, const T* weight, const float* bias, int num_tokens, int n,
                                     int k) {
    const u32 ring = shared_address(shared_bytes);
    const int num_stages = ceil_div(k, C::depth);
    // A group is committed for every stage, empty past the end, so that the count of pending groups stays true.
#pragma unroll
    for (int s = 0; s < C::stages - 1; s++) {
        if (s < num_stages) load_stage<C>(ring + s * C::stage_bytes, x, weight, num_tokens, n, k, s * C::depth);
        commit_copies();
    }
    float sums[C::m_tiles][C::n_tiles][4] = {};
    u32 slot = 0;
    for (int s = 0; s < num_stages; s++) {
        wait_for_copies<C::stages - 2>();
        // Also says that everyone is done with the slot that is filled next: the one of the stage before.
        __syncthreads();
        const int ahead = s + C::stages - 1;
        const u32 free_slot = slot == 0 ? C::stages - 1 : slot - 1;
        if (ahead < num_stages) {
            load_stage<C>(ring + free_slot * C::stage_bytes, x, weight, num_tokens, n, k, ahead * C::depth);
        }
        commit_copies();
        multiply_stage<C, T>(sums, ring + slot * C::stage_bytes);
        slot = slot + 1 == C::stages ? 0 : slot + 1;
    }
    wait_for_copies<0>();
    store_tile<C>(out, bias, sums, num_tokens, n);
}

using Tile16x32 = Tile<16, 32, 128, 1, 2, 6>;
using Tile32x64 = Tile<32, 64, 128, 2, 2, 4>;
using Tile64x64 = Tile<64, 64, 128, 2, 2, 3>;
using Tile128x128 = Tile<128, 128, 64, 2, 2, 3>;
using Tile128x256 = Tile<128, 256, 64, 2, 4, 3>;

#define GEMM_KERNELS(T, O)                                                                                             \
    GEMM_KERNEL(T, O, t, 16x32, 3)                                                                                     \
    GEMM_KERNEL(T, O, t, 32x64, 2)                                                                                     \
    GEMM_KERNEL(T, O, t, 64x64, 2)                                                                                     \
    GEMM_KERNEL(T, O, t, 128x128, 2)                                                                                   \
    GEMM_KERNEL(T, O, t, 128x256, 1)

GEMM_KERNELS(bf16, bf16)
GEMM_KERNELS(bf16, f32)
GEMM_KERNELS(f16, f16)
GEMM_KERNELS(f16, f32)
