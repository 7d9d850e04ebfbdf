// What matrix products with plain weights have in common, whichever instructions multiply: how a lane's sums become
// neighbouring outputs. In a run of 16 outputs the weight rows are put into shared memory in the order
// 0 1 4 5 8 9 12 13 2 3 6 7 10 11 14 15: then the two columns that a lane has of each of two neighbouring mma tiles are four
// neighbouring outputs, which it stores as one vector.

// Where row `row` of the weight tile lies in shared memory.
__device__ __forceinline__ int permuted(int row) { return (row & ~15) | (row & 2) << 2 | (row & 12) >> 1 | (row & 1); }

__device__ __forceinline__ void store_one(float* target, float x) { *target = x; }
template <class T> __device__ __forceinline__ void store_one(T* target, float x) {
    target->bits = static_cast<u16>(pack<T>(x, 0.0f));
}

// Stores four neighbouring outputs of a row, as far as they exist.
template <class O>
__device__ __forceinline__ void store_outputs(O* out, const float* bias, float4 x, int token, int output, int n) {
    O* target = out + static_cast<u64>(token) * n + output;
    if (n % 4 == 0 && output < n) {
        if (bias != nullptr) {
            const float4 b = load4(bias + output);
            x = make_float4(x.x + b.x, x.y + b.y, x.z + b.z, x.w + b.w);
        }
        store4(target, x);
        return;
    }
    const float numbers[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (output + i < n) store_one(target + i, bias == nullptr ? numbers[i] : numbers[i] + bias[output + i]);
    }
}

typedef float f32;

// A kernel by the file's `gemm` over one of its tiles; names of tiles begin with `kind`.
#define GEMM_KERNEL(T, O, kind, tile, min_blocks)                                                                      \
    extern "C" __global__ void __launch_bounds__(Tile##tile::threads, min_blocks)                                      \
    gemm_##T##_##O##_##kind##tile(O* out, const T* x, const T* weight, const float* bias, int num_tokens, int n,       \
                                  int k) {                                                                             \
        gemm<Tile##tile>(out, x, weight, bias, num_tokens, n, k);                                                      \
    }
