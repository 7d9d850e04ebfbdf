// The first half of low-rank updates for adapters with many rows, for Hopper, by clusters: arguments and results as in
// lora_shrink.cu.
//
// Tiles are entries x ranks, which kernels are named by, and each has a cluster of eight blocks, one for each segment
// of the inputs. So a tile has many entries, for which `a` is read once, while eight multiprocessors read x. Pieces
// count tiles in first_block; grid (8 * the sum of tiles), block 256: a warp for an eighth of the entries. Dynamic
// shared memory: for each stage of the ring 128 bytes for every entry and every rank of the tile.
//   _c128_r16  6 stages; two blocks of a multiprocessor
//   _c256_r16  5 stages
//   _c384_r16  4 stages
//   _c128_r64  4 stages; two blocks of a multiprocessor
//   _c256_r64  5 stages
//
// Bits are those of lora_shrink.cu: a segment is the same chain of steps, and segments are added up in order. A block
// leaves its sums in shared memory where its ring was; then block b adds up those of the b-th eighth of the entries,
// which it reads from all of the cluster. This file is compiled for compute capability 9.0 alone.

#include "common.cuh"
#include "cluster.cuh"
#include "lora_shrink.cuh"

template <int ENTRIES, int RANKS, int SLOTS> using ClusterTile = BlockTile<ENTRIES, RANKS, SLOTS, 256, CLUSTER>;

// Adds up, in order, the four sums at `own` that the blocks with the first segments have.
__device__ __forceinline__ float4 add_segments(u32 own, int num_segments) {
    float4 sums[SEGMENTS];
#pragma unroll
    for (int segment = 0; segment < SEGMENTS; segment++) {
        if (segment < num_segments) sums[segment] = load16_peer(peer_address(own, segment));
    }
    float4 sum = sums[0];
#pragma unroll
    for (int segment = 1; segment < SEGMENTS; segment++) {
        if (segment >= num_segments) continue;
        const float4 x = sums[segment];
        sum = make_float4(__fadd_rn(sum.x, x.x), __fadd_rn(sum.y, x.y), __fadd_rn(sum.z, x.z), __fadd_rn(sum.w, x.w));
    }
    return sum;
}

// Writes the block's part of the tile's entries.
template <class C, class T>
__device__ __forceinline__ void write_part(float* shrunk, const Shrink<T>& tile, const float* scales,
                                           int shrunk_stride) {
    constexpr int ROWS = C::entries / CLUSTER, VECTORS = C::ranks / 4;
    const int num_segments = ceil_div(tile.num_inputs, segment_inputs(tile.num_inputs));
    const int first_row = cluster_rank() * ROWS;
    for (int i = threadIdx.x; i < ROWS * VECTORS; i += C::threads) {
        const int row = first_row + i / VECTORS, rank = i % VECTORS * 4, entry = tile.first_entry + row;
        if (entry >= tile.end_entry || tile.first_rank + rank >= tile.piece.rank) continue;
        const int token = tile.rows[entry];
        if (!tile.is_mine(token)) continue;
        const float factor = __fmul_rn(scales[entry], tile.piece.scaling);
        const float4 sum = add_segments(shared_address(shared_bytes) + sum_at<C::ranks>(row, rank), num_segments);
        float* target = shrunk + static_cast<u64>(token - tile.first_row) * shrunk_stride + tile.piece.shrunk_at;
        // A piece has its rank of numbers, filled up to whole vectors.
        *reinterpret_cast<float4*>(target + tile.first_rank + rank) =
            make_float4(__fmul_rn(sum.x, factor), __fmul_rn(sum.y, factor), __fmul_rn(sum.z, factor),
                        __fmul_rn(sum.w, factor));
    }
}

template <class C, class T>
__device__ __forceinline__ void shrink_cluster(float* shrunk, const Shrink<T>& tile, const float* scales,
                                               int shrunk_stride) {
    constexpr int WARP_ENTRIES = C::entries / (C::threads / 32);
    static_assert(CLUSTER == SEGMENTS, "a block has a segment");
    static_assert(C::slots * C::stage_bytes >= C::entries * C::ranks * 4, "a block's sums lie where its ring was");
    const int warp = threadIdx.x / 32, segment = segment_inputs(tile.num_inputs), start = cluster_rank() * segment;
    const int num_stages = ceil_div(max(0, min(segment, tile.num_inputs - start)), C::depth);
    float sums[WARP_ENTRIES / 16][C::ranks / 8][4] = {};
    walk_stages<C>(tile, start, num_stages, [&](int, u32 at) {
#pragma unroll
        for (int step = 0; step < C::depth / 16; step++) {
            shrink16<T, WARP_ENTRIES, C::ranks, 8>(sums, at, warp * WARP_ENTRIES, at + C::x_bytes, step);
        }
    });
    // Everyone is done with the ring.
    __syncthreads();
    store_sums<WARP_ENTRIES, C::ranks>(shared_bytes, warp * WARP_ENTRIES, sums);
    cluster_barrier();
    write_part<C>(shrunk, tile, scales, shrunk_stride);
    // No block ends while others read its sums.
    cluster_barrier();
}

using Tile128x16 = ClusterTile<128, 16, 6>;
using Tile256x16 = ClusterTile<256, 16, 5>;
using Tile384x16 = ClusterTile<384, 16, 4>;
using Tile128x64 = ClusterTile<128, 64, 4>;
using Tile256x64 = ClusterTile<256, 64, 5>;

// A whole cluster has a tile, so all its blocks come to the barriers or none.
#define LORA_SHRINK_KERNELS(T)                                                                                         \
    LORA_SHRINK(T, c128_r16, Tile128x16, shrink_cluster, __cluster_dims__(CLUSTER, 1, 1))                              \
    LORA_SHRINK(T, c256_r16, Tile256x16, shrink_cluster, __cluster_dims__(CLUSTER, 1, 1))                              \
    LORA_SHRINK(T, c384_r16, Tile384x16, shrink_cluster, __cluster_dims__(CLUSTER, 1, 1))                              \
    LORA_SHRINK(T, c128_r64, Tile128x64, shrink_cluster, __cluster_dims__(CLUSTER, 1, 1))                              \
    LORA_SHRINK(T, c256_r64, Tile256x64, shrink_cluster, __cluster_dims__(CLUSTER, 1, 1))

LORA_SHRINK_KERNELS(bf16)
LORA_SHRINK_KERNELS(f16)
