// Kernels in which one mistake at a time can be planted: -DBUG=n, 0 for none. planted.rs lists the mistakes.
#include <cuda_bf16.h>
#include <cstdint>

#ifndef BUG
#define BUG 0
#endif

namespace {

constexpr int kTileM = 64;
constexpr int kTileN = 32;
constexpr int kTileK = 32;
constexpr int kThreads = 128;

// A row of a tile is 64 bytes, four chunks of 16; the chunk is swizzled so that 8 rows cover all banks.
__device__ inline uint32_t chunk_address(uint32_t tile, int row, int chunk) {
#if BUG == 12
  return tile + row * 64 + chunk * 16;
#else
  return tile + row * 64 + ((chunk ^ (row >> 1)) & 3) * 16;
#endif
}

__device__ inline void copy_chunk(uint32_t target, const void* source, bool inside) {
  int bytes = inside ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(bytes));
}

__device__ inline void load_tile(uint32_t tile, const __nv_bfloat16* from, int row0, int rows, int tile_rows, int k0, int k) {
  for (int i = threadIdx.x; i < tile_rows * 4; i += kThreads) {
    int row = i / 4, chunk = i % 4;
#if BUG == 8
    bool inside = row0 + row <= rows;
#else
    bool inside = row0 + row < rows;
#endif
    const __nv_bfloat16* source = from + (size_t)(inside ? row0 + row : 0) * k + k0 + chunk * 8;
#if BUG == 10
    source += 1;
#endif
    copy_chunk(chunk_address(tile, row, chunk), source, inside);
  }
}

}  // namespace

// out[m][n] = sum over k of a[m][k] * b[n][k]; k is a multiple of 32. Grid: (n / 32, m / 64), rounded up.
extern "C" __global__ void matmul(const __nv_bfloat16* a, const __nv_bfloat16* b, float* out, int m, int n, int k) {
  __shared__ __align__(128) __nv_bfloat16 a_tiles[2][kTileM * kTileK];
  __shared__ __align__(128) __nv_bfloat16 b_tiles[2][kTileN * kTileK];
  uint32_t a_at = (uint32_t)__cvta_generic_to_shared(a_tiles), b_at = (uint32_t)__cvta_generic_to_shared(b_tiles);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int row0 = blockIdx.y * kTileM, column0 = blockIdx.x * kTileN;
  float sums[4][4] = {};
  auto stage = [&](int step) {
    int buffer = step & 1;
    load_tile(a_at + buffer * kTileM * 64, a, row0, m, kTileM, step * kTileK, k);
    load_tile(b_at + buffer * kTileN * 64, b, column0, n, kTileN, step * kTileK, k);
    asm volatile("cp.async.commit_group;");
  };
  int steps = k / kTileK;
  stage(0);
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) {
      stage(step + 1);
#if BUG == 6
      asm volatile("cp.async.wait_group 2;");
#elif BUG != 7
      asm volatile("cp.async.wait_group 1;");
#endif
    } else {
#if BUG != 7
      asm volatile("cp.async.wait_group 0;");
#endif
    }
#if BUG != 1
    __syncthreads();
#endif
    uint32_t a_tile = a_at + (step & 1) * kTileM * 64, b_tile = b_at + (step & 1) * kTileN * 64;
    for (int half = 0; half < 2; ++half) {
      uint32_t fa[4];
      uint32_t address = chunk_address(a_tile, warp * 16 + lane % 16, half * 2 + lane / 16);
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(fa[0]), "=r"(fa[1]), "=r"(fa[2]), "=r"(fa[3])
                   : "r"(address));
      for (int tile = 0; tile < 4; ++tile) {
        uint32_t fb[2];
        address = chunk_address(b_tile, tile * 8 + lane % 8, half * 2 + lane / 8 % 2);
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(fb[0]), "=r"(fb[1]) : "r"(address));
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(sums[tile][0]), "+f"(sums[tile][1]), "+f"(sums[tile][2]), "+f"(sums[tile][3])
            : "r"(fa[0]), "r"(fa[1]), "r"(fa[2]), "r"(fa[3]), "r"(fb[0]), "r"(fb[1]));
      }
    }
#if BUG != 2
    __syncthreads();
#endif
  }
  for (int tile = 0; tile < 4; ++tile) {
    for (int i = 0; i < 4; ++i) {
      int row = row0 + warp * 16 + lane / 4 + 8 * (i / 2), column = column0 + tile * 8 + lane % 4 * 2 + i % 2;
#if BUG == 9
      if (row < m) out[(size_t)row * n + column] = sums[tile][i];
#else
      if (row < m && column < n) out[(size_t)row * n + column] = sums[tile][i];
#endif
    }
  }
}

__device__ inline float warp_max(float v) {
  for (int offset = 16; offset; offset /= 2) v = fmaxf(v, __shfl_xor_sync(~0u, v, offset));
  return v;
}

__device__ inline float warp_sum(float v) {
  for (int offset = 16; offset; offset /= 2) v += __shfl_xor_sync(~0u, v, offset);
  return v;
}

// Softmax of the first lengths[row] of `stride` values of each row; the others are never written. One block of 128 per row.
extern "C" __global__ void softmax(const float* x, const int* lengths, float* out, int stride) {
  __shared__ float scratch[kThreads / 32];
  int row = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32, n = lengths[row];
  const float* in = x + (size_t)row * stride;
  float best = -INFINITY;
#if BUG == 11
  for (int i = threadIdx.x; i <= n; i += kThreads) best = fmaxf(best, in[i]);
#else
  for (int i = threadIdx.x; i < n; i += kThreads) best = fmaxf(best, in[i]);
#endif
#if BUG == 13
  if (lane < 20) best = warp_max(best);
#else
  best = warp_max(best);
#endif
  if (lane == 0) scratch[warp] = best;
#if BUG == 14
  if (lane < 16) __syncthreads();
#elif BUG != 3
  __syncthreads();
#endif
  best = fmaxf(fmaxf(scratch[0], scratch[1]), fmaxf(scratch[2], scratch[3]));
#if BUG != 4
  __syncthreads();
#endif
  float sum = 0;
  for (int i = threadIdx.x; i < n; i += kThreads) sum += __expf(in[i] - best);
  sum = warp_sum(sum);
  if (lane == 0) scratch[warp] = sum;
#if BUG != 5
  __syncthreads();
#endif
  sum = scratch[0] + scratch[1] + scratch[2] + scratch[3];
  for (int i = threadIdx.x; i < n; i += kThreads) out[(size_t)row * stride + i] = __expf(in[i] - best) / sum;
}

// total[0] += the sum of each block's slice. total begins at 0.
extern "C" __global__ void total(const float* x, float* total, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  float sum = warp_sum(i < n ? x[i] : 0.0f);
  if (threadIdx.x == 0) {
#if BUG == 15
    total[0] += sum;
#else
    atomicAdd(total, sum);
#endif
  }
}

// The last block to arrive adds the partial sums in order: correct by fence and atomic, without a second launch.
extern "C" __global__ void ordered_total(const float* x, float* partial, unsigned* arrived, float* total) {
  __shared__ bool is_last;
  float sum = warp_sum(x[blockIdx.x * 32 + threadIdx.x]);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = sum;
#if BUG != 16
    __threadfence();
#endif
    is_last = atomicAdd(arrived, 1u) == gridDim.x - 1;
    if (is_last) __threadfence();
  }
  __syncthreads();
  if (is_last && threadIdx.x == 0) {
    float all = 0;
    for (int i = 0; i < gridDim.x; ++i) all += partial[i];
    total[0] = all;
  }
}
