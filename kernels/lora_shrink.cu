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

// The most pieces that fit into the arguments of a launch, with room to spare.
constexpr int MAX_PIECES = 32;
struct LoraPieces {
    LoraPiece at[MAX_PIECES];
};

// Inputs of a segment.
constexpr int SEGMENTS = 8, SEGMENT_UNIT = 64;
__device__ __forceinline__ int segment_inputs(int num_inputs) {
    return ceil_div(num_inputs, SEGMENTS * SEGMENT_UNIT) * SEGMENT_UNIT;
}

// What all threads of a block of lora_shrink know.
template <class T> struct Shrink {
    const T* x;
    const int* rows;
    int num_inputs, first_row, num_rows;
    u64 page_bytes;
    LoraPiece piece;
    int first_entry, end_entry, first_rank;  // of the block's tile

    __device__ __forceinline__ bool is_mine(int row) const { return row >= first_row && row - first_row < num_rows; }
    // Whether the tile has any of the rows: they ascend.
    __device__ __forceinline__ bool has_rows() const {
        return rows[first_entry] - first_row < num_rows && rows[end_entry - 1] >= first_row;
    }
    // Null where there is none.
    __device__ __forceinline__ const T* x_row(int entry) const {
        if (entry >= end_entry) return nullptr;
        const int row = rows[entry];
        return is_mine(row) ? x + static_cast<u64>(row) * num_inputs : nullptr;
    }
    __device__ __forceinline__ const T* a_row(int rank) const {
        return rank < piece.rank ? find_row<T>(piece, piece.a, rank, num_inputs, page_bytes) : nullptr;
    }
    // Queues the copy of eight numbers of a row, or of zeros.
    __device__ __forceinline__ void copy8(u32 target, const T* row, int input) const {
        const bool exists = row != nullptr && input < num_inputs;
        copy16_async(target, exists ? row + input : x, exists);
    }
};

// Adds the products of 16 inputs: `ENTRIES` rows of one tile and `RANKS` of another, of CHUNKS chunks each.
template <class T, int ENTRIES, int RANKS, int CHUNKS>
__device__ __forceinline__ void shrink16(float (&sums)[ENTRIES / 16][RANKS / 8][4], u32 x_tile, int first_entry,
                                         u32 a_tile, int step) {
    const int lane = threadIdx.x % 32;
    u32 x[ENTRIES / 16][4];
#pragma unroll
    for (int m = 0; m < ENTRIES / 16; m++) {
        const int row = first_entry + m * 16 + lane % 16;
        load_matrices(x[m], x_tile + swizzled<CHUNKS>(row, step * 2 + lane / 16));
    }
#pragma unroll
    for (int n = 0; n < RANKS / 8; n += 2) {
        u32 a[4];
        load_matrices(a, a_tile + swizzled<CHUNKS>(n * 8 + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
#pragma unroll
        for (int m = 0; m < ENTRIES / 16; m++) {
            mma<T>(sums[m][n], x[m], a[0], a[1]);
            mma<T>(sums[m][n + 1], x[m], a[2], a[3]);
        }
    }
}

// Few entries: a warp has a segment, in stages of 32 inputs.
template <int ENTRIES, int SLOTS_> struct FewTile {
    static constexpr int entries = ENTRIES, ranks = 16, depth = 32, slots = SLOTS_, threads = SEGMENTS * 32;
    static constexpr u32 x_bytes = ENTRIES * depth * 2, stage_bytes = x_bytes + ranks * depth * 2;
};

// Where a warp's sum of a row and a rank lies behind the start of its ring. Halves of every other pair of rows are
// exchanged against bank conflicts.
__device__ __forceinline__ u32 sum_at(int row, int rank) { return (row * 16 + (rank ^ (row & 2) << 2)) * 4; }

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
    const int lane = threadIdx.x % 32;
    u8* mine = shared_bytes + threadIdx.x / 32 * RING_BYTES;
    float sums[C::entries / 16][2][4] = {};
    shrink_segment<C>(sums, tile, shared_address(mine));
#pragma unroll
    for (int m = 0; m < C::entries / 16; m++) {
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const int row = m * 16 + lane / 4, rank = n * 8 + lane % 4 * 2;
            *reinterpret_cast<float2*>(mine + sum_at(row, rank)) = make_float2(sums[m][n][0], sums[m][n][1]);
            *reinterpret_cast<float2*>(mine + sum_at(row + 8, rank)) = make_float2(sums[m][n][2], sums[m][n][3]);
        }
    }
    __syncthreads();

    const int num_segments = ceil_div(tile.num_inputs, segment_inputs(tile.num_inputs));
#pragma unroll
    for (int i = 0; i < C::entries * 16 / C::threads; i++) {
        const int at = i * C::threads + threadIdx.x, row = at / 16, rank = at % 16, entry = tile.first_entry + row;
        if (entry >= tile.end_entry || tile.first_rank + rank >= tile.piece.rank) continue;
        const int token = tile.rows[entry];
        if (!tile.is_mine(token)) continue;
        const auto sum_of = [&](int segment) {
            return *reinterpret_cast<const float*>(shared_bytes + segment * RING_BYTES + sum_at(row, rank));
        };
        float sum = sum_of(0);
        for (int segment = 1; segment < num_segments; segment++) sum = __fadd_rn(sum, sum_of(segment));
        float* target = shrunk + static_cast<u64>(token - tile.first_row) * shrunk_stride + tile.piece.shrunk_at;
        target[tile.first_rank + rank] = __fmul_rn(sum, __fmul_rn(scales[entry], tile.piece.scaling));
    }
}

// Many entries: a warp has 16 of them, the block walks through the inputs in stages of 64.
template <int ENTRIES, int RANKS, int SLOTS_> struct ManyTile {
    static constexpr int entries = ENTRIES, ranks = RANKS, depth = 64, slots = SLOTS_, threads = ENTRIES * 2;
    static constexpr u32 x_bytes = ENTRIES * depth * 2, stage_bytes = x_bytes + RANKS * depth * 2;
    // Vectors of 16 bytes that a thread copies of a stage of x, and of a.
    static constexpr int x_vectors = ENTRIES * 8 / threads, a_vectors = (RANKS * 8 + threads - 1) / threads;
};

template <class C, class T>
__device__ __forceinline__ void shrink_many(float* shrunk, const Shrink<T>& tile, const float* scales,
                                            int shrunk_stride) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, chunk = threadIdx.x % 8;
    const u32 ring = shared_address(shared_bytes);
    const int num_stages = ceil_div(tile.num_inputs, C::depth);
    const int segment_stages = segment_inputs(tile.num_inputs) / C::depth;
    constexpr int PASS = C::threads / 8;  // rows that all threads copy at once
    const T *x[C::x_vectors], *a[C::a_vectors];
#pragma unroll
    for (int i = 0; i < C::x_vectors; i++) x[i] = tile.x_row(tile.first_entry + i * PASS + threadIdx.x / 8);
#pragma unroll
    for (int i = 0; i < C::a_vectors; i++) a[i] = tile.a_row(tile.first_rank + i * PASS + threadIdx.x / 8);
    const auto load = [&](int stage, int slot) {
        if (stage < num_stages) {
            const int input = stage * C::depth + chunk * 8;
            const u32 target = ring + slot * C::stage_bytes;
#pragma unroll
            for (int i = 0; i < C::x_vectors; i++) {
                tile.copy8(target + swizzled<8>(i * PASS + threadIdx.x / 8, chunk), x[i], input);
            }
#pragma unroll
            for (int i = 0; i < C::a_vectors; i++) {
                const int rank = i * PASS + threadIdx.x / 8;
                if (rank < C::ranks) tile.copy8(target + C::x_bytes + swizzled<8>(rank, chunk), a[i], input);
            }
        }
        // Also past the end, so that the count of pending groups stays true.
        commit_copies();
    };
#pragma unroll
    for (int s = 0; s < C::slots - 1; s++) load(s, s);
    float sums[1][C::ranks / 8][4] = {}, totals[C::ranks / 8][4];
    int segment_end = segment_stages;
    for (int stage = 0, slot = 0; stage < num_stages; stage++, slot = slot + 1 == C::slots ? 0 : slot + 1) {
        wait_for_copies<C::slots - 2>();
        // Also says that everyone is done with the slot that is filled next: the one of the stage before.
        __syncthreads();
        load(stage + C::slots - 1, slot == 0 ? C::slots - 1 : slot - 1);
        const u32 at = ring + slot * C::stage_bytes;
#pragma unroll
        for (int step = 0; step < C::depth / 16; step++) {
            shrink16<T, 16, C::ranks, 8>(sums, at, warp * 16, at + C::x_bytes, step);
        }
        if (stage + 1 != segment_end && stage + 1 != num_stages) continue;
#pragma unroll
        for (int n = 0; n < C::ranks / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                totals[n][i] = segment_end == segment_stages ? sums[0][n][i] : __fadd_rn(totals[n][i], sums[0][n][i]);
                sums[0][n][i] = 0.0f;
            }
        }
        segment_end += segment_stages;
    }
    wait_for_copies<0>();
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

// The block's tile of its piece.
template <class C, class T>
__device__ __forceinline__ bool find_tile(Shrink<T>& tile) {
    const int rank_tiles = ceil_div(tile.piece.rank, C::ranks), number = blockIdx.x - tile.piece.first_block;
    tile.first_entry = tile.piece.start + number / rank_tiles * C::entries;
    tile.end_entry = min(tile.piece.end, tile.first_entry + C::entries);
    tile.first_rank = number % rank_tiles * C::ranks;
    return tile.has_rows();
}

#define LORA_SHRINK(T, name, C, shrink)                                                                                \
    extern "C" __global__ void __launch_bounds__(C::threads)                                                           \
    lora_shrink_##T##_##name(float* shrunk, LoraPiece* table, const T* x, const int* rows, const float* scales,        \
                             int num_inputs, int first_row, int num_rows, int shrunk_stride, int num_pieces,           \
                             int first_piece, u64 page_bytes, const LoraPieces pieces) {                               \
        int p = 0;                                                                                                     \
        while (p + 1 < num_pieces && pieces.at[p + 1].first_block <= blockIdx.x) p++;                                  \
        Shrink<T> tile = {x, rows, num_inputs, first_row, num_rows, page_bytes, pieces.at[p]};                         \
        if (blockIdx.x == tile.piece.first_block && threadIdx.x == 0) table[first_piece + p] = tile.piece;             \
        if (find_tile<C>(tile)) shrink<C>(shrunk, tile, scales, shrunk_stride);                                        \
    }

using Few16 = FewTile<16, 5>;
using Few32 = FewTile<32, 4>;
using Few64 = FewTile<64, 2>;
using Many64x16 = ManyTile<64, 16, 6>;
using Many64x64 = ManyTile<64, 64, 5>;
using Many128x16 = ManyTile<128, 16, 4>;
using Many128x64 = ManyTile<128, 64, 4>;

#define LORA_SHRINK_KERNELS(T)                                                                                         \
    LORA_SHRINK(T, t16, Few16, shrink_few)                                                                             \
    LORA_SHRINK(T, t32, Few32, shrink_few)                                                                             \
    LORA_SHRINK(T, t64, Few64, shrink_few)                                                                             \
    LORA_SHRINK(T, t64_r16, Many64x16, shrink_many)                                                                    \
    LORA_SHRINK(T, t64_r64, Many64x64, shrink_many)                                                                    \
    LORA_SHRINK(T, t128_r16, Many128x16, shrink_many)                                                                  \
    LORA_SHRINK(T, t128_r64, Many128x64, shrink_many)

LORA_SHRINK_KERNELS(bf16)
LORA_SHRINK_KERNELS(f16)
