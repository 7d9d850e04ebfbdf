// The first half of low-rank updates of a projection's output (LoRA, arXiv 2106.09685), for all adapters of a step at
// once:
//
//   shrunk[row, at + r] = scale * scaling * (x[row] . a[r])    for the rows of each piece; lora_expand.cu adds them up
//
//   x       [num_tokens, num_inputs] T; what the projection was given
//   rows    [num_entries] i32; a piece's are ascending
//   scales  [num_entries] f32
//   shrunk  [num_rows, shrunk_stride] f32 for the rows [first_row, first_row + num_rows); what no piece has is not read
//   table   [num_pieces] LoraPiece; filled in with those of the arguments, at first_piece and on
//
// A piece is one adapter's update of some columns and the entries, at least one, it is added to: a [rank, num_inputs]
// T, b [rank, num_columns] T, transposed. num_inputs is a multiple of 8, shrunk_at and shrunk_stride of 4; a piece has
// its rank of shrunk numbers, filled up to a multiple of 4. A rank is any and never filled up to another's. Rows of a
// and b lie in pages of page_bytes: row r is number (first_slot + r) % per_page of the adapter's page (first_slot + r)
// / per_page, which is page `pages[..]` of the arena. No row is cut, and sums do not know of pages.
//
// Inputs are cut into eight segments of whole runs of 64. A product is a chain of mma.m16n8k16 steps in order of input
// for each segment, begun at zero; segments are added up in order. So a row's bits depend neither on other rows nor on
// the tile.
//
// Tiles are entries x ranks, and a block finds its piece by its number: a piece has ceil(entries / tile entries) *
// ceil(rank / tile ranks) from its first_block on. Grid (their sum).
//   _t16, _t32, _t64: that many entries x 16 ranks, block 256: a warp for each segment, with a ring of its own.
//   _t64_r16, _t64_r64, _t128_r16, _t128_r64: block 2 * entries: a warp for 16 entries, the block has all inputs.
// Both operands travel through rings of cp.async in shared memory, chunks of 16 bytes exchanged against bank conflicts.

#include "common.cuh"
#include "lora_shrink.cuh"

// Few entries: a warp has a segment, in stages of 32 inputs.
template <int ENTRIES, int SLOTS_> struct FewTile {
    static constexpr int entries = ENTRIES, ranks = 16, depth = 32, slots = SLOTS_, threads = SEGMENTS * 32;
    static constexpr u32 blocks = 1;
    static constexpr u32 x_bytes = ENTRIES * depth * 2, stage_bytes = x_bytes + ranks * depth * 2;
};

template <class C, class T>
__device__ __forceinline__ void shrink_segment(float (&sums)[C::entries / 16][2][4], const Shrink<T>& tile, u32 ring) {
    const int lane = threadIdx.x % 32, segment = segment_inputs(tile.num_inputs);
    const int start = threadIdx.x / 32 * segment;
    const int num_stages = ceil_div(max(0, min(segment, tile.num_inputs - start)), C::depth);
    const T *x[C::entries / 8], *a[2];
#pragma unroll
    for (int i = 0; i < C::entries / 8; i++) x[i] = tile.x_row(tile.first_entry + i * 8 + lane / 4);
#pragma unroll
    for (int i = 0; i < 2; i++) a[i] = tile.a_row(tile.first_rank + i * 8 + lane / 4);
    const auto load = [&](int stage, int slot) {
        if (stage < num_stages) {
            const int input = start + stage * C::depth + lane % 4 * 8;
            const u32 target = ring + slot * C::stage_bytes;
#pragma unroll
            for (int i = 0; i < C::entries / 8; i++) {
                tile.copy8(target + swizzled<4>(i * 8 + lane / 4, lane % 4), x[i], input);
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                tile.copy8(target + C::x_bytes + swizzled<4>(i * 8 + lane / 4, lane % 4), a[i], input);
            }
        }
        // Also past the end, so that the count of pending groups stays true.
        commit_copies();
    };
#pragma unroll
    for (int s = 0; s < C::slots - 1; s++) load(s, s);
    for (int stage = 0, slot = 0; stage < num_stages; stage++, slot = slot + 1 == C::slots ? 0 : slot + 1) {
        wait_for_copies<C::slots - 2>();
        // Also says that every lane is done with the slot that is filled next: the one of the stage before.
        __syncwarp();
        load(stage + C::slots - 1, slot == 0 ? C::slots - 1 : slot - 1);
        const u32 at = ring + slot * C::stage_bytes;
#pragma unroll
        for (int step = 0; step < C::depth / 16; step++) {
            shrink16<T, C::entries, 16, 4>(sums, at, 0, at + C::x_bytes, step);
        }
    }
    wait_for_copies<0>();
    __syncwarp();
}

template <class C, class T>
__device__ __forceinline__ void shrink_few(float* shrunk, const Shrink<T>& tile, const float* scales,
                                           int shrunk_stride) {
    constexpr u32 RING_BYTES = C::slots * C::stage_bytes;
    static_assert(RING_BYTES >= C::entries * 16 * 4, "a warp's sums lie where its ring was");
    u8* mine = shared_bytes + threadIdx.x / 32 * RING_BYTES;
    float sums[C::entries / 16][2][4] = {};
    shrink_segment<C>(sums, tile, shared_address(mine));
    store_sums<C::entries, 16>(mine, 0, sums);
    __syncthreads();

    const int num_segments = ceil_div(tile.num_inputs, segment_inputs(tile.num_inputs));
#pragma unroll
    for (int i = 0; i < C::entries * 16 / C::threads; i++) {
        const int at = i * C::threads + threadIdx.x, row = at / 16, rank = at % 16, entry = tile.first_entry + row;
        if (entry >= tile.end_entry || tile.first_rank + rank >= tile.piece.rank) continue;
        const int token = tile.rows[entry];
        if (!tile.is_mine(token)) continue;
        const auto sum_of = [&](int segment) {
            return *reinterpret_cast<const float*>(shared_bytes + segment * RING_BYTES + sum_at<16>(row, rank));
        };
        float sum = sum_of(0);
        for (int segment = 1; segment < num_segments; segment++) sum = __fadd_rn(sum, sum_of(segment));
        float* target = shrunk + static_cast<u64>(token - tile.first_row) * shrunk_stride + tile.piece.shrunk_at;
        target[tile.first_rank + rank] = __fmul_rn(sum, __fmul_rn(scales[entry], tile.piece.scaling));
    }
}

// Many entries: a warp has 16 of them, the block all inputs.
template <int ENTRIES, int RANKS, int SLOTS> using ManyTile = BlockTile<ENTRIES, RANKS, SLOTS, ENTRIES * 2, 1>;

template <class C, class T>
__device__ __forceinline__ void shrink_many(float* shrunk, const Shrink<T>& tile, const float* scales,
                                            int shrunk_stride) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int num_stages = ceil_div(tile.num_inputs, C::depth);
    const int segment_stages = segment_inputs(tile.num_inputs) / C::depth;
    float sums[1][C::ranks / 8][4] = {}, totals[C::ranks / 8][4];
    int segment_end = segment_stages;
    walk_stages<C>(tile, 0, num_stages, [&](int stage, u32 at) {
#pragma unroll
        for (int step = 0; step < C::depth / 16; step++) {
            shrink16<T, 16, C::ranks, 8>(sums, at, warp * 16, at + C::x_bytes, step);
        }
        if (stage + 1 != num_stages && stage + 1 != segment_end) return;
#pragma unroll
        for (int n = 0; n < C::ranks / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                totals[n][i] = segment_end == segment_stages ? sums[0][n][i] : __fadd_rn(totals[n][i], sums[0][n][i]);
                sums[0][n][i] = 0.0f;
            }
        }
        segment_end += segment_stages;
    });
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int entry = tile.first_entry + warp * 16 + half * 8 + lane / 4;
        if (entry >= tile.end_entry) continue;
        const int token = tile.rows[entry];
        if (!tile.is_mine(token)) continue;
        const float factor = __fmul_rn(scales[entry], tile.piece.scaling);
        float* target = shrunk + static_cast<u64>(token - tile.first_row) * shrunk_stride + tile.piece.shrunk_at;
#pragma unroll
        for (int n = 0; n < C::ranks / 8; n++) {
            const int rank = tile.first_rank + n * 8 + lane % 4 * 2;
            if (rank >= tile.piece.rank) continue;
            *reinterpret_cast<float2*>(target + rank) =
                make_float2(__fmul_rn(totals[n][half * 2], factor), __fmul_rn(totals[n][half * 2 + 1], factor));
        }
    }
}

using Few16 = FewTile<16, 5>;
using Few32 = FewTile<32, 4>;
using Few64 = FewTile<64, 2>;
using Many64x16 = ManyTile<64, 16, 6>;
using Many64x64 = ManyTile<64, 64, 5>;
using Many128x16 = ManyTile<128, 16, 4>;
using Many128x64 = ManyTile<128, 64, 4>;

#define LORA_SHRINK_KERNELS(T)                                                                                         \
    LORA_SHRINK(T, t16, Few16, shrink_few, )                                                                           \
    LORA_SHRINK(T, t32, Few32, shrink_few, )                                                                           \
    LORA_SHRINK(T, t64, Few64, shrink_few, )                                                                           \
    LORA_SHRINK(T, t64_r16, Many64x16, shrink_many, )                                                                  \
    LORA_SHRINK(T, t64_r64, Many64x64, shrink_many, )                                                                  \
    LORA_SHRINK(T, t128_r16, Many128x16, shrink_many, )                                                                \
    LORA_SHRINK(T, t128_r64, Many128x64, shrink_many, )

LORA_SHRINK_KERNELS(bf16)
LORA_SHRINK_KERNELS(f16)
