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
// hidden is a multiple of 8, at most 32768. Grid (num_tokens); a block has one row and keeps it in registers between
// the sum and the product: block 256 when hidden <= 8192, else 1024. The order of a sum depends on that alone.
// Equals `cpu::rms_norm` and `cpu::add_rms_norm`, with `out` rounded to T.

#include "common.cuh"

// Vectors of 4 numbers that a thread keeps, at most.
constexpr int MAX_VECTORS = 8;

// Sum over the block; every thread gets it.
__device__ __forceinline__ float sum_block(float x) {
    __shared__ float warp_sums[32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, num_warps = blockDim.x / 32;
    x = sum_lanes(x, 32);
    if (lane == 0) warp_sums[warp] = x;
    __syncthreads();
    return sum_lanes(lane < num_warps ? warp_sums[lane] : 0.0f, 32);
}

// `take(i)` gives numbers [i, i + 4) of the row.
template <class T, class Take>
__device__ __forceinline__ void norm_row(T* out, const float* weight, int hidden, float epsilon, Take take) {
    float4 kept[MAX_VECTORS];
    float sum = 0.0f;
#pragma unroll
    for (int v = 0; v < MAX_VECTORS; v++) {
        const int i = (v * blockDim.x + threadIdx.x) * 4;
        if (i >= hidden) break;
        const float4 x = kept[v] = take(i);
        sum = __fmaf_rn(x.w, x.w, __fmaf_rn(x.z, x.z, __fmaf_rn(x.y, x.y, __fmaf_rn(x.x, x.x, sum))));
    }
    const float mean = __fdiv_rn(sum_block(sum), static_cast<float>(hidden));
    const float inverse = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, epsilon)));
#pragma unroll
    for (int v = 0; v < MAX_VECTORS; v++) {
        const int i = (v * blockDim.x + threadIdx.x) * 4;
        if (i >= hidden) break;
        const float4 x = kept[v], w = load4(weight + i);
        const float4 unit = make_float4(x.x * inverse, x.y * inverse, x.z * inverse, x.w * inverse);
        store4(out + i, make_float4(unit.x * w.x, unit.y * w.y, unit.z * w.z, unit.w * w.w));
    }
}

template <class T, class X>
__device__ __forceinline__ void rms_norm(T* out, const X* x, const float* weight, int hidden, float epsilon) {
    const u64 start = static_cast<u64>(blockIdx.x) * hidden;
    norm_row(out + start, weight, hidden, epsilon, [=](int i) { return load4(x + start + i); });
}

template <class T>
__device__ __forceinline__ void add_rms_norm(T* out, float* residual, const T* delta, const float* weight, int hidden,
                                             float epsilon) {
    const u64 start = static_cast<u64>(blockIdx.x) * hidden;
    norm_row(out + start, weight, hidden, epsilon, [=](int i) {
        const float4 before = load4(residual + start + i), added = load4(delta + start + i);
        const float4 x = make_float4(before.x + added.x, before.y + added.y, before.z + added.z, before.w + added.w);
        store4(residual + start + i, x);
        return x;
    });
}

#define NORM_KERNELS(T)                                                                                                \
    extern "C" __global__ void __launch_bounds__(1024)                                                                 \
    rms_norm_##T(T* out, const float* x, const float* weight, int hidden, float epsilon) {                             \
        rms_norm(out, x, weight, hidden, epsilon);                                                                     \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(1024)                                                                 \
    rms_norm_##T##_rows(T* out, const T* x, const float* weight, int hidden, float epsilon) {                          \
        rms_norm(out, x, weight, hidden, epsilon);                                                                     \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(1024)                                                                 \
    add_rms_norm_##T(T* out, float* residual, const T* delta, const float* weight, int hidden, float epsilon) {        \
        add_rms_norm(out, residual, delta, weight, hidden, epsilon);                                                   \
    }

NORM_KERNELS(bf16)
NORM_KERNELS(f16)
