// Root-mean-square norm of rows (arXiv 1910.07467), and the same behind a residual sum:
//
//   rms_norm:     out = x / sqrt(mean(x^2) + epsilon) * weight
//   add_rms_norm: residual += delta; out = rms_norm(residual)
//
//   x        [num_tokens, hidden] f32, or T in the kernels named _rows
//   residual [num_tokens, hidden] f32
//   delta    [num_tokens, hidden] T
//   weight   [hidden] f32
//   out      [num_tokens, hidden] T
//
// hidden is a multiple of 8 and at most what the name ends in. Grid (up to num_tokens); a block does the rows
// blockIdx.x, blockIdx.x + gridDim.x and so on, and reads the weights once. Block 256 when hidden <= 8192, else 1024:
// the order of a sum depends on that alone.
// Equals `cpu::rms_norm` and `cpu::add_rms_norm`, with `out` rounded to T.

#include "common.cuh"

// Rows as they are.
template <class X> struct Plain {
    typedef FourWords<X> Words;
    const X* x;

    __device__ __forceinline__ Words load(u64 at) const { return load4_words(x + at); }
    __device__ __forceinline__ float4 take(const Words& words, u64) const { return unpack4(words); }
};

// Rows that become sums when they are taken.
template <class T> struct Summed {
    struct Words {
        FourWords<float> before;
        FourWords<T> added;
    };
    float* residual;
    const T* delta;

    __device__ __forceinline__ Words load(u64 at) const {
        return {load4_words<float>(residual + at), load4_words(delta + at)};
    }
    __device__ __forceinline__ float4 take(const Words& words, u64 at) const {
        const float4 before = unpack4(words.before), added = unpack4(words.added);
        const float4 x = make_float4(before.x + added.x, before.y + added.y, before.z + added.z, before.w + added.w);
        store4(residual + at, x);
        return x;
    }
};

__device__ __forceinline__ float add_squares(float sum, float4 x) {
    return __fmaf_rn(x.w, x.w, __fmaf_rn(x.z, x.z, __fmaf_rn(x.y, x.y, __fmaf_rn(x.x, x.x, sum))));
}

// One over the root mean square of the row whose squares the threads have in `sum`. Every thread gets it; `warp_sums`
// may be written again behind another barrier.
__device__ __forceinline__ float invert_root(float sum, int hidden, float epsilon, float* warp_sums) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, num_warps = blockDim.x / 32;
    sum = sum_lanes(sum, 32);
    if (lane == 0) warp_sums[warp] = sum;
    __syncthreads();
    sum = sum_lanes(lane < num_warps ? warp_sums[lane] : 0.0f, 32);
    const float mean = __fdiv_rn(sum, static_cast<float>(hidden));
    return __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, epsilon)));
}

template <class T> __device__ __forceinline__ void store_scaled(T* out, float4 x, float inverse, float4 weight) {
    const float4 unit = make_float4(x.x * inverse, x.y * inverse, x.z * inverse, x.w * inverse);
    store4(out, make_float4(unit.x * weight.x, unit.y * weight.y, unit.z * weight.z, unit.w * weight.w));
}

// Rows of up to 1024 VECTORS numbers. A thread keeps its weights, and has the next row on the way while a row is summed.
template <int VECTORS, class T, class Rows>
__device__ __forceinline__ void norm_rows(T* out, const Rows& rows, const float* weight, int num_tokens, int hidden,
                                          float epsilon) {
    __shared__ float warp_sums[2][8];
    const int first = threadIdx.x * 4, step = gridDim.x;
    typename Rows::Words next[VECTORS];
    float4 weights[VECTORS];
    int row = blockIdx.x;
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
        const int i = v * 1024 + first;
        if (i < hidden) next[v] = rows.load(static_cast<u64>(row) * hidden + i);
    }
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
        const int i = v * 1024 + first;
        if (i < hidden) weights[v] = load4(weight + i);
    }
    for (int turn = 0; row < num_tokens; row += step, turn ^= 1) {
        const u64 start = static_cast<u64>(row) * hidden;
        float4 kept[VECTORS];
        float sum = 0.0f;
#pragma unroll
        for (int v = 0; v < VECTORS; v++) {
            const int i = v * 1024 + first;
            if (i < hidden) sum = add_squares(sum, kept[v] = rows.take(next[v], start + i));
        }
        if (row + step < num_tokens) {
#pragma unroll
            for (int v = 0; v < VECTORS; v++) {
                const int i = v * 1024 + first;
                if (i < hidden) next[v] = rows.load(start + static_cast<u64>(step) * hidden + i);
            }
        }
        // The other half is still read for the row before.
        const float inverse = invert_root(sum, hidden, epsilon, warp_sums[turn]);
#pragma unroll
        for (int v = 0; v < VECTORS; v++) {
            const int i = v * 1024 + first;
            if (i < hidden) store_scaled(out + start + i, kept[v], inverse, weights[v]);
        }
    }
}

// A row of up to 32768 numbers, which leaves no registers for more.
template <class T, class Rows>
__device__ __forceinline__ void norm_wide_row(T* out, const Rows& rows, const float* weight, int num_tokens,
                                              int hidden, float epsilon) {
    __shared__ float warp_sums[32];
    const u64 start = static_cast<u64>(blockIdx.x) * hidden;
    float4 kept[8];
    float sum = 0.0f;
#pragma unroll
    for (int v = 0; v < 8; v++) {
        const int i = (v * 1024 + threadIdx.x) * 4;
        if (i < hidden) sum = add_squares(sum, kept[v] = rows.take(rows.load(start + i), start + i));
    }
    const float inverse = invert_root(sum, hidden, epsilon, warp_sums);
#pragma unroll
    for (int v = 0; v < 8; v++) {
        const int i = (v * 1024 + threadIdx.x) * 4;
        if (i < hidden) store_scaled(out + start + i, kept[v], inverse, load4(weight + i));
    }
}

#define NORM_KERNELS(T, widest, threads, norm)                                                                         \
    extern "C" __global__ void __launch_bounds__(threads)                                                              \
    rms_norm_##T##_h##widest(T* out, const float* x, const float* weight, int num_tokens, int hidden, float epsilon) { \
        norm(out, Plain<float>{x}, weight, num_tokens, hidden, epsilon);                                               \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(threads)                                                              \
    rms_norm_##T##_rows_h##widest(T* out, const T* x, const float* weight, int num_tokens, int hidden,                 \
                                  float epsilon) {                                                                     \
        norm(out, Plain<T>{x}, weight, num_tokens, hidden, epsilon);                                                   \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(threads)                                                              \
    add_rms_norm_##T##_h##widest(T* out, float* residual, const T* delta, const float* weight, int num_tokens,         \
                                 int hidden, float epsilon) {                                                          \
        norm(out, Summed<T>{residual, delta}, weight, num_tokens, hidden, epsilon);                                    \
    }

NORM_KERNELS(bf16, 4096, 256, norm_rows<4>)
NORM_KERNELS(bf16, 8192, 256, norm_rows<8>)
NORM_KERNELS(bf16, 32768, 1024, norm_wide_row)
NORM_KERNELS(f16, 4096, 256, norm_rows<4>)
NORM_KERNELS(f16, 8192, 256, norm_rows<8>)
NORM_KERNELS(f16, 32768, 1024, norm_wide_row)
