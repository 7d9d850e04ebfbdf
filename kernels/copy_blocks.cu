// Copies a batch of KV blocks: block pairs[2 i] of `source` to block pairs[2 i + 1] of `target`.
//
//   source, target  pools of blocks of block_bytes, a multiple of 16; they may be one pool
//   pairs           [num_pairs][2] i32; no block is a target twice, nor a source and a target of one pool
//
// Grid (ceil(block_bytes / 16384), num_pairs), block 256: a block moves 16 KiB, four vectors of 16 bytes a thread, all
// loaded before the first is stored. Equals `CpuBackend::copy`, pair by pair.

#include "common.cuh"

constexpr int VECTORS = 4;

extern "C" __global__ void __launch_bounds__(256)
copy_blocks(u8* target, const u8* source, const int* pairs, u64 block_bytes) {
    const uint4* from = reinterpret_cast<const uint4*>(source + pairs[2 * blockIdx.y] * block_bytes);
    uint4* to = reinterpret_cast<uint4*>(target + pairs[2 * blockIdx.y + 1] * block_bytes);
    const u64 first = static_cast<u64>(blockIdx.x) * VECTORS * blockDim.x + threadIdx.x;
    const u64 len = block_bytes / 16;
    uint4 kept[VECTORS];
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
        if (first + v * blockDim.x < len) kept[v] = from[first + v * blockDim.x];
    }
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
        if (first + v * blockDim.x < len) to[first + v * blockDim.x] = kept[v];
    }
}
