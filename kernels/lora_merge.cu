// Low-rank updates merged into a copy of weights (LoRA, arXiv 2106.09685):
//
//   target[row] = weight[row] + sum over pieces of scaling * (b[row] a)     for the rows [first_row, end_row)
//
//   weight, target  [num_outputs, num_inputs] T; others' memory
//
// A piece is one adapter's update of rows that the launch's are among: a [rank, num_inputs] T, b [rank, num_columns] T,
// transposed, so that its column `c` belongs to row first_column + c. num_inputs, first_column and num_columns are
// multiples of 8, a rank is any. Without pieces weights are copied.
//
// A product of b and a is one chain of fused multiply-adds in order of rank, begun at zero; pieces are added to the
// weight one after the other, by one more each, all in f32; the sum is rounded to T once. So a number's bits depend on
// nothing but its row, its column and the pieces, and equal `cpu::merge_rows` on factors rounded to T.
//
// Grid (ceil(num_inputs / 256), ceil(num_rows / block_rows)), block 256; num_rows counts from the multiple of 8 that is
// not above first_row, block_rows is a multiple of 32. A block goes down its rows in strips of 32: each weight is read
// once, while those of the strip before are computed, and written once. Stages of 16 ranks of a and b travel through a
// ring in shared memory; what a strip needs of a stays there for all of them when that is no more than the ring holds,
// 64 ranks.

#include "common.cuh"

// The most pieces that fit into the arguments of a launch, with room to spare.
constexpr int MAX_PIECES = 32;
struct LoraPieces {
    LoraFactors at[MAX_PIECES];
};

constexpr int STRIP_ROWS = 32, TILE_INPUTS = 256, STAGE_RANKS = 16, SLOTS = 4, THREADS = 256;
constexpr int THREAD_ROWS = STRIP_ROWS * 32 / THREADS;
constexpr u32 A_BYTES = STAGE_RANKS * TILE_INPUTS * 2, B_BYTES = STAGE_RANKS * STRIP_ROWS * 2;

// What all threads of a block know.
struct Tile {
    int first_input, num_inputs;
    int first_row, end_row;  // of its strips
    int num_stages;          // of a strip
    u64 page_bytes;
};

// The stages of all strips in order.
struct Cursor {
    int row;          // the strip's first
    int piece, rank;  // the stage's first
    int stage;        // of the strip
    int slot;         // in the ring

    __device__ __forceinline__ void advance(const Tile& tile, const LoraPieces& pieces) {
        slot = (slot + 1) % SLOTS;
        rank += STAGE_RANKS;
        stage++;
        if (rank < pieces.at[piece].rank) return;
        rank = 0;
        piece++;
        if (stage < tile.num_stages) return;
        stage = piece = 0;
        row += STRIP_ROWS;
    }
    // Where the stage has its part of a: at its own place, when all strips find theirs there.
    __device__ __forceinline__ int a_slot(const Tile& tile) const { return tile.num_stages <= SLOTS ? stage : slot; }
};

template <class T>
__device__ __forceinline__ void load_stage(u32 ring, const Tile& tile, const LoraFactors& piece, const Cursor& at) {
    constexpr int VECTORS = TILE_INPUTS / 8, B_VECTORS = STRIP_ROWS / 8;
    if (tile.num_stages > SLOTS || at.row == tile.first_row) {
#pragma unroll
        for (int i = 0; i < STAGE_RANKS * VECTORS / THREADS; i++) {
            const int vector = i * THREADS + threadIdx.x, rank = at.rank + vector / VECTORS;
            const int input = tile.first_input + vector % VECTORS * 8;
            if (rank >= piece.rank || input >= tile.num_inputs) continue;
            const T* source = find_row<T>(piece, piece.a, rank, tile.num_inputs, tile.page_bytes) + input;
            copy16_async(ring + at.a_slot(tile) * A_BYTES + vector * 16, source, true);
        }
    }
    const int rank = at.rank + threadIdx.x / B_VECTORS;
    const int column = at.row - piece.first_column + threadIdx.x % B_VECTORS * 8;
    if (threadIdx.x >= STAGE_RANKS * B_VECTORS || rank >= piece.rank || column >= piece.num_columns) return;
    const T* source = find_row<T>(piece, piece.b, rank, piece.num_columns, tile.page_bytes) + column;
    copy16_async(ring + SLOTS * A_BYTES + at.slot * B_BYTES + threadIdx.x * 16, source, true);
}

// Adds the products of a stage's ranks for the thread's rows and eight inputs.
template <class T>
__device__ __forceinline__ void multiply(float (&products)[THREAD_ROWS][8], const u8* ring, const Tile& tile,
                                         const Cursor& at, int num_ranks) {
    const T* a = reinterpret_cast<const T*>(ring + at.a_slot(tile) * A_BYTES) + threadIdx.x % 32 * 8;
    const u8* slot = ring + SLOTS * A_BYTES + at.slot * B_BYTES;
    const T* b = reinterpret_cast<const T*>(slot) + threadIdx.x / 32 * THREAD_ROWS;
#pragma unroll 4
    for (int k = 0; k < num_ranks; k++) {
        const Eight x = load8(a + k * TILE_INPUTS);
        const float4 y = load4(b + k * STRIP_ROWS);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            products[0][i] = __fmaf_rn(y.x, x.at[i], products[0][i]);
            products[1][i] = __fmaf_rn(y.y, x.at[i], products[1][i]);
            products[2][i] = __fmaf_rn(y.z, x.at[i], products[2][i]);
            products[3][i] = __fmaf_rn(y.w, x.at[i], products[3][i]);
        }
    }
}

template <class T>
__device__ __forceinline__ void lora_merge(T* target, const T* weight, int num_inputs, int first_row, int end_row,
                                           int block_rows, int num_pieces, u64 page_bytes, const LoraPieces& pieces) {
    static_assert(THREAD_ROWS == 4, "as many rows as a vector of b has");
    __shared__ __align__(16) u8 ring[SLOTS * (A_BYTES + B_BYTES)];
    Tile tile = {static_cast<int>(blockIdx.x) * TILE_INPUTS, num_inputs, 0, 0, 0, page_bytes};
    tile.first_row = (first_row & ~7) + static_cast<int>(blockIdx.y) * block_rows;
    tile.end_row = min(end_row, tile.first_row + block_rows);
    for (int p = 0; p < num_pieces; p++) tile.num_stages += ceil_div(pieces.at[p].rank, STAGE_RANKS);

    const int input = tile.first_input + threadIdx.x % 32 * 8;
    const auto is_mine = [&](int row) { return row >= first_row && row < tile.end_row && input < num_inputs; };
    const auto at = [&](int row) { return static_cast<u64>(row) * num_inputs + input; };
    Cursor now = {tile.first_row, 0, 0, 0, 0}, ahead = now;
    const auto load_next = [&] {
        if (tile.num_stages > 0 && ahead.row < tile.end_row) {
            load_stage<T>(shared_address(ring), tile, pieces.at[ahead.piece], ahead);
            ahead.advance(tile, pieces);
        }
        commit_copies();
    };
#pragma unroll
    for (int slot = 0; slot < SLOTS - 1; slot++) load_next();
    uint4 next[THREAD_ROWS];
    const auto load_weights = [&](int row) {
#pragma unroll
        for (int r = 0; r < THREAD_ROWS; r++) {
            next[r] = make_uint4(0, 0, 0, 0);
            if (is_mine(row + r)) next[r] = *reinterpret_cast<const uint4*>(weight + at(row + r));
        }
    };
    load_weights(tile.first_row + threadIdx.x / 32 * THREAD_ROWS);

    for (int strip = tile.first_row; strip < tile.end_row; strip += STRIP_ROWS) {
        const int row = strip + threadIdx.x / 32 * THREAD_ROWS;
        Eight sums[THREAD_ROWS];
#pragma unroll
        for (int r = 0; r < THREAD_ROWS; r++) sums[r] = unpack8<T>(next[r]);
        load_weights(row + STRIP_ROWS);
        float products[THREAD_ROWS][8] = {};
        for (int stage = 0; stage < tile.num_stages; stage++) {
            wait_for_copies<SLOTS - 2>();
            // Also says that everyone is done with the slot that is filled next: the one of the stage before.
            __syncthreads();
            load_next();
            const LoraFactors& piece = pieces.at[now.piece];
            // Nobody has brought what lies beside the matrix.
            const bool exists = input < num_inputs && row < tile.end_row;
            multiply<T>(products, ring, tile, now, exists ? min(STAGE_RANKS, piece.rank - now.rank) : 0);
            if (now.rank + STAGE_RANKS >= piece.rank) {
#pragma unroll
                for (int r = 0; r < THREAD_ROWS; r++) {
#pragma unroll
                    for (int i = 0; i < 8; i++) {
                        sums[r].at[i] = __fmaf_rn(piece.scaling, products[r][i], sums[r].at[i]);
                        products[r][i] = 0.0f;
                    }
                }
            }
            now.advance(tile, pieces);
        }
#pragma unroll
        for (int r = 0; r < THREAD_ROWS; r++) {
            if (is_mine(row + r)) store8(target + at(row + r), sums[r]);
        }
    }
    wait_for_copies<0>();
}

#define LORA_MERGE_KERNEL(T)                                                                                          \
    extern "C" __global__ void __launch_bounds__(256, 2)                                                              \
    lora_merge_##T(T* target, const T* weight, int num_inputs, int first_row, int end_row, int block_rows,            \
                   int num_pieces, u64 page_bytes, const LoraPieces pieces) {                                         \
        lora_merge(target, weight, num_inputs, first_row, end_row, block_rows, num_pieces, page_bytes, pieces);       \
    }

LORA_MERGE_KERNEL(bf16)
LORA_MERGE_KERNEL(f16)
