// Rows moved, and numbers converted.
//
//   gather_rows: out[i] = x[indices[i]] for rows of row_bytes, a multiple of 16. Grid (num_rows), block 128.
//                Equals `CpuBackend::gather_rows`.
//   cast_A_B:    out[i] = x[i], rounded to nearest even. len is a multiple of 4, block 256, grid (ceil(len / 2048)) to
//                f32, (ceil(len / 1024)) from f32. Equals the conversions of `half`.

#include "common.cuh"

extern "C" __global__ void __launch_bounds__(128)
gather_rows(u8* out, const u8* x, const int* indices, int row_bytes) {
    const uint4* source = reinterpret_cast<const uint4*>(x + static_cast<u64>(indices[blockIdx.x]) * row_bytes);
    uint4* target = reinterpret_cast<uint4*>(out + static_cast<u64>(blockIdx.x) * row_bytes);
    for (int i = threadIdx.x; i < row_bytes / 16; i += blockDim.x) target[i] = source[i];
}

template <class T> __device__ __forceinline__ void narrow(T* out, const float* x, u64 len) {
    const u64 i = (static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
    if (i < len) store4(out + i, load4(x + i));
}

#define CAST_KERNELS(T)                                                                                                \
    extern "C" __global__ void __launch_bounds__(256) cast_##T##_f32(float* out, const T* x, u64 len) {                \
        const u64 first = static_cast<u64>(blockIdx.x) * blockDim.x;                                                   \
        widen(out, x, len, 1.0f, first + threadIdx.x, static_cast<u64>(gridDim.x) * blockDim.x);                       \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) cast_f32_##T(T* out, const float* x, u64 len) {                  \
        narrow(out, x, len);                                                                                           \
    }

CAST_KERNELS(bf16)
CAST_KERNELS(f16)
