// Low-rank updates of a projection's output (LoRA, arXiv 2106.09685), for all adapters of a step at once:
//
//   lora_shrink: shrunk[row, at + r] = scale * scaling * (x[row] . a[r])    for the rows of each piece
//   lora_expand: out[row] += sum over pieces of shrunk[row, at ..] b        for the rows that have any
//
//   x       [num_tokens, num_inputs] T; what the projection was given
//   out     [num_tokens, num_outputs] T; what it gave
//   rows    [num_entries] i32; a piece's are ascending
//   scales  [num_entries] f32
//   shrunk  [num_rows, shrunk_stride] f32 for the rows [first_row, first_row + num_rows); what no piece has stays
//           unwritten and is never read
//   table   [num_pieces] LoraPiece; lora_shrink fills in those of its arguments, at first_piece and on
//
// A piece is one adapter's update of some columns and the entries, at least one, it is added to: a
// [rank, num_inputs] T, b [rank, num_columns] T, transposed. num_inputs, num_outputs, first_column and num_columns are
// multiples of 8, shrunk_at and shrunk_stride of 4; a rank is any and never filled up to another's.
// Rows of a and b lie in pages of page_bytes: row r is number (first_slot + r) % per_page of the adapter's page
// (first_slot + r) / per_page, which is page `pages[..]` of the arena. No row is cut, and sums do not know of pages.
//
// lora_shrink: blocks only for what there is. A piece has ceil(entries / 16) * ceil(rank / 16) from its first_block on,
// and a block finds its piece by that. Grid (their sum), block 256. Tensor cores: 16 rows by 16 ranks; warp w of 8 has
// every eighth run of 32 inputs from w * 32 on, in order, then warps are summed in order. So the order follows
// num_inputs alone.
// lora_expand: grid (ceil(num_rows / 16), ceil(num_outputs / 256)), block 128. Every sum is one chain in order of piece
// and rank, in f32 because shrunk numbers are; it is added to `out` and rounded to T once.
// A row's bits do not depend on other rows, and a number of `out` to which nothing is added is not written.
// Equals `cpu::add_lora` on factors rounded to T, with `out` rounded to T; sums are in another order.

#include "common.cuh"

struct LoraPiece : LoraFactors {
    int start, end;  // entries
    int shrunk_at, first_block;
};

// The most pieces that fit into the arguments of a launch, with room to spare.
constexpr int MAX_PIECES = 32;
struct LoraPieces {
    LoraPiece at[MAX_PIECES];
};

constexpr int TILE_ROWS = 16, TILE_RANKS = 16, SHRINK_WARPS = 8;

__device__ __forceinline__ uint4 load16(const void* source) { return *reinterpret_cast<const uint4*>(source); }

// Adds products of 32 inputs. Lane `l` has eight neighbours of row l / 4 of each operand, which two steps of the tensor
// cores take by halves: all operands in the same order, so that no number has to change lanes.
template <class T>
__device__ __forceinline__ void multiply32(float (&sums)[4], const uint4& low, const uint4& high, const uint4& a) {
    const u32 first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
    mma<T>(sums, first, a.x, a.y);
    mma<T>(sums, second, a.z, a.w);
}

// One warp's share of the products of 16 rows and 16 ranks. A row or rank that does not exist is null.
template <class T>
__device__ __forceinline__ void shrink_tile(float (&sums)[2][4], const T* const (&x)[2], const T* const (&a)[2],
                                            int num_inputs) {
    constexpr int STRIDE = SHRINK_WARPS * 32;
#pragma unroll 4
    for (int i = threadIdx.x / 32 * 32 + threadIdx.x % 4 * 8; i - threadIdx.x % 4 * 8 < num_inputs; i += STRIDE) {
        const uint4 zero = make_uint4(0, 0, 0, 0);
        const bool exists = i < num_inputs;
        const uint4 low = exists && x[0] != nullptr ? load16(x[0] + i) : zero;
        const uint4 high = exists && x[1] != nullptr ? load16(x[1] + i) : zero;
#pragma unroll
        for (int n = 0; n < 2; n++) {
            multiply32<T>(sums[n], low, high, exists && a[n] != nullptr ? load16(a[n] + i) : zero);
        }
    }
}

// Where a warp's sum lies in shared memory. Halves of every other pair of rows are exchanged against bank conflicts.
__device__ __forceinline__ int sum_at(int warp, int row, int rank) {
    return (warp * TILE_ROWS + row) * TILE_RANKS + (rank ^ (row & 2) << 2);
}

template <class T>
__device__ __forceinline__ void lora_shrink(float* shrunk, const T* x, const int* rows, const float* scales,
                                            int num_inputs, int first_row, int num_rows, int shrunk_stride,
                                            u64 page_bytes, const LoraPiece& piece) {
    const int rank_tiles = ceil_div(piece.rank, TILE_RANKS), tile = blockIdx.x - piece.first_block;
    const int first_entry = piece.start + tile / rank_tiles * TILE_ROWS, first_rank = tile % rank_tiles * TILE_RANKS;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

    const T *tile_x[2], *tile_a[2];
#pragma unroll
    for (int n = 0; n < 2; n++) {
        const int entry = first_entry + n * 8 + lane / 4, rank = first_rank + n * 8 + lane / 4;
        const int row = entry < piece.end ? rows[entry] : -1;
        const bool is_mine = row >= first_row && row - first_row < num_rows;
        tile_x[n] = is_mine ? x + static_cast<u64>(row) * num_inputs : nullptr;
        tile_a[n] = rank < piece.rank ? find_row<T>(piece, piece.a, rank, num_inputs, page_bytes) : nullptr;
    }
    // Every warp has the same rows.
    if (!__any_sync(ALL_LANES, tile_x[0] != nullptr || tile_x[1] != nullptr)) return;

    float sums[2][4] = {};
    shrink_tile(sums, tile_x, tile_a, num_inputs);
    __shared__ float warp_sums[SHRINK_WARPS * TILE_ROWS * TILE_RANKS];
#pragma unroll
    for (int n = 0; n < 2; n++) {
        const int rank = n * 8 + lane % 4 * 2;
        *reinterpret_cast<float2*>(warp_sums + sum_at(warp, lane / 4, rank)) = make_float2(sums[n][0], sums[n][1]);
        *reinterpret_cast<float2*>(warp_sums + sum_at(warp, lane / 4 + 8, rank)) = make_float2(sums[n][2], sums[n][3]);
    }
    __syncthreads();

    const int entry = first_entry + threadIdx.x / TILE_RANKS, rank = threadIdx.x % TILE_RANKS;
    if (entry >= piece.end || first_rank + rank >= piece.rank) return;
    const int row = rows[entry] - first_row;
    if (row < 0 || row >= num_rows) return;
    float sum = warp_sums[sum_at(0, threadIdx.x / TILE_RANKS, rank)];
#pragma unroll
    for (int w = 1; w < SHRINK_WARPS; w++) {
        sum = __fadd_rn(sum, warp_sums[sum_at(w, threadIdx.x / TILE_RANKS, rank)]);
    }
    float* target = shrunk + static_cast<u64>(row) * shrunk_stride + piece.shrunk_at + first_rank;
    target[rank] = __fmul_rn(sum, __fmul_rn(scales[entry], piece.scaling));
}

// Expansion: a stage has eight ranks of a piece, 256 columns of b and what the 16 rows have of the shrunk numbers.
constexpr int TILE_COLUMNS = 256, STAGE_RANKS = 8, STAGES = 7, EXPAND_THREADS = 128;
constexpr int THREAD_ROWS = TILE_ROWS * 32 / EXPAND_THREADS;
constexpr u32 B_BYTES = STAGE_RANKS * TILE_COLUMNS * 2, STAGE_BYTES = B_BYTES + TILE_ROWS * STAGE_RANKS * 4;

// Copies the first `bytes` of 16 and writes zeros behind them.
__device__ __forceinline__ void copy_first_async(u32 target, const void* source, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(bytes) : "memory");
}

// Whether a piece has an entry for `row`. Rows ascend, so that none can lie further from the first than its number is
// from the first's: where they have no gaps, the first look finds it.
__device__ __forceinline__ bool has_row(const LoraPiece& piece, const int* rows, int row) {
    int low = piece.start, high = piece.end;
    const int distance = row - rows[low];
    if (distance < 0) return false;
    high = min(high, low + distance + 1);
    if (rows[high - 1] == row) return true;
    while (low < high) {
        const int middle = (low + high) / 2, found = rows[middle];
        if (found == row) return true;
        if (found < row) low = middle + 1;
        else high = middle;
    }
    return false;
}

// The stages of a run of pieces in order.
struct Cursor {
    u32 left;  // pieces not done, by bit
    int rank;  // the first of the stage

    __device__ __forceinline__ int piece() const { return __ffs(left) - 1; }
    __device__ __forceinline__ void advance(const LoraPiece* pieces) {
        rank += STAGE_RANKS;
        if (rank < pieces[piece()].rank) return;
        left &= left - 1;
        rank = 0;
    }
};

// What all threads of a block of lora_expand know.
struct Tile {
    int first_row, first_column;  // of `shrunk` and `out`
    int shrunk_stride;
    const float* shrunk;
    u64 page_bytes;
};

template <class T>
__device__ __forceinline__ void load_stage(u32 stage, const Tile& tile, const LoraPiece& piece, u32 members,
                                           int first_rank) {
    constexpr int VECTORS = TILE_COLUMNS / 8;
#pragma unroll
    for (int i = 0; i < STAGE_RANKS * VECTORS / EXPAND_THREADS; i++) {
        const int vector = i * EXPAND_THREADS + threadIdx.x, rank = first_rank + vector / VECTORS;
        const int column = tile.first_column + vector % VECTORS * 8 - piece.first_column;
        const bool exists = rank < piece.rank && column >= 0 && column < piece.num_columns;
        const void* source = piece.arena;
        if (exists) source = find_row<T>(piece, piece.b, rank, piece.num_columns, tile.page_bytes) + column;
        copy16_async(stage + vector * 16, source, exists);
    }
    const int row = threadIdx.x / 2, rank = first_rank + threadIdx.x % 2 * 4;
    if (row >= TILE_ROWS) return;
    const bool exists = (members >> row & 1) != 0 && rank < piece.rank;
    const u64 at = static_cast<u64>(tile.first_row + row) * tile.shrunk_stride + piece.shrunk_at + rank;
    copy_first_async(stage + B_BYTES + threadIdx.x * 16, exists ? tile.shrunk + at : tile.shrunk,
                     exists ? 4 * min(4, piece.rank - rank) : 0);
}

// Adds a stage to the thread's rows among `members`.
template <class T>
__device__ __forceinline__ void add_stage(float (&sums)[THREAD_ROWS][8], const u8* stage, u32 members) {
    const T* b = reinterpret_cast<const T*>(stage) + threadIdx.x % 32 * 8;
    const float* all = reinterpret_cast<const float*>(stage + B_BYTES);
    const float* shrunk = all + threadIdx.x / 32 * THREAD_ROWS * STAGE_RANKS;
#pragma unroll
    for (int k = 0; k < STAGE_RANKS; k += 4) {
        float4 y[THREAD_ROWS];
#pragma unroll
        for (int row = 0; row < THREAD_ROWS; row++) y[row] = load4(shrunk + row * STAGE_RANKS + k);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const Eight numbers = load8(b + (k + j) * TILE_COLUMNS);
#pragma unroll
            for (int row = 0; row < THREAD_ROWS; row++) {
                if ((members >> row & 1) == 0) continue;
                const float factor = j == 0 ? y[row].x : j == 1 ? y[row].y : j == 2 ? y[row].z : y[row].w;
#pragma unroll
                for (int i = 0; i < 8; i++) sums[row][i] = __fmaf_rn(factor, numbers.at[i], sums[row][i]);
            }
        }
    }
}

// Bit `row` of members[i]: whether the block has anything to add to that row of its tile from pieces[i].
__device__ __forceinline__ void find_members(u32* members, const LoraPiece* pieces, int count, const int* rows,
                                             const Tile& tile, int first_row, int num_rows) {
    const int row = threadIdx.x % TILE_ROWS;
    for (int p = threadIdx.x / TILE_ROWS; p < MAX_PIECES; p += EXPAND_THREADS / TILE_ROWS) {
        bool is_member = p < count && tile.first_row + row < num_rows;
        if (is_member) {
            const LoraPiece& piece = pieces[p];
            const int start = piece.first_column - tile.first_column;
            is_member = start < TILE_COLUMNS && start + piece.num_columns > 0 &&
                        has_row(piece, rows, first_row + tile.first_row + row);
        }
        const u32 votes = __ballot_sync(ALL_LANES, is_member);
        if (row == 0) members[p] = votes >> threadIdx.x % 32 & 0xffff;
    }
}

template <class T>
__device__ __forceinline__ void lora_expand(T* out, const float* shrunk, const LoraPiece* table, const int* rows,
                                            int num_outputs, int first_row, int num_rows, int shrunk_stride,
                                            int num_pieces, u64 page_bytes) {
    __shared__ __align__(16) LoraPiece pieces[MAX_PIECES];
    __shared__ u32 members[MAX_PIECES];
    __shared__ __align__(16) u8 ring[STAGES * STAGE_BYTES];
    const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * THREAD_ROWS;
    const Tile tile = {static_cast<int>(blockIdx.x) * TILE_ROWS, static_cast<int>(blockIdx.y) * TILE_COLUMNS,
                       shrunk_stride, shrunk, page_bytes};
    const int column = tile.first_column + lane * 8;

    float sums[THREAD_ROWS][8] = {};
    u32 changed = 0;  // the thread's rows, by bit
    for (int first = 0; first < num_pieces; first += MAX_PIECES) {
        const int count = min(MAX_PIECES, num_pieces - first);
        constexpr int VECTORS = sizeof(LoraPiece) / 16;
        static_assert(MAX_PIECES * VECTORS <= EXPAND_THREADS, "a vector for every thread at most");
        __syncthreads();
        if (threadIdx.x < count * VECTORS) {
            const uint4* source = reinterpret_cast<const uint4*>(table + first);
            reinterpret_cast<uint4*>(pieces)[threadIdx.x] = source[threadIdx.x];
        }
        __syncthreads();
        find_members(members, pieces, count, rows, tile, first_row, num_rows);
        __syncthreads();
        Cursor now = {__ballot_sync(ALL_LANES, members[lane] != 0), 0}, ahead = now;
        const auto load_next = [&](int slot) {
            if (ahead.left != 0) {
                const int p = ahead.piece();
                load_stage<T>(shared_address(ring) + slot * STAGE_BYTES, tile, pieces[p], members[p], ahead.rank);
                ahead.advance(pieces);
            }
            commit_copies();
        };
        for (int slot = 0; slot < STAGES - 1; slot++) load_next(slot);
        for (int slot = 0; now.left != 0; slot = slot + 1 == STAGES ? 0 : slot + 1) {
            wait_for_copies<STAGES - 2>();
            // Also says that everyone is done with the slot that is filled next: the one of the stage before.
            __syncthreads();
            load_next(slot == 0 ? STAGES - 1 : slot - 1);
            const LoraPiece& piece = pieces[now.piece()];
            const u32 mine = members[now.piece()] >> warp_row & ((1 << THREAD_ROWS) - 1);
            if (mine != 0 && column >= piece.first_column && column < piece.first_column + piece.num_columns) {
                add_stage<T>(sums, ring + slot * STAGE_BYTES, mine);
                changed |= mine;
            }
            now.advance(pieces);
        }
        wait_for_copies<0>();
    }
#pragma unroll
    for (int row = 0; row < THREAD_ROWS; row++) {
        if ((changed >> row & 1) == 0) continue;
        T* target = out + static_cast<u64>(first_row + tile.first_row + warp_row + row) * num_outputs + column;
        Eight numbers = load8(target);
#pragma unroll
        for (int i = 0; i < 8; i++) numbers.at[i] = __fadd_rn(numbers.at[i], sums[row][i]);
        store8(target, numbers);
    }
}

#define LORA_KERNELS(T)                                                                                                \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
    lora_shrink_##T(float* shrunk, LoraPiece* table, const T* x, const int* rows, const float* scales, int num_inputs, \
                    int first_row, int num_rows, int shrunk_stride, int num_pieces, int first_piece, u64 page_bytes,   \
                    const LoraPieces pieces) {                                                                         \
        int p = 0;                                                                                                     \
        while (p + 1 < num_pieces && pieces.at[p + 1].first_block <= blockIdx.x) p++;                                  \
        const LoraPiece piece = pieces.at[p];                                                                          \
        if (blockIdx.x == piece.first_block && threadIdx.x == 0) table[first_piece + p] = piece;                       \
        lora_shrink(shrunk, x, rows, scales, num_inputs, first_row, num_rows, shrunk_stride, page_bytes, piece);       \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(128)                                                                  \
    lora_expand_##T(T* out, const float* shrunk, const LoraPiece* table, const int* rows, int num_outputs,             \
                    int first_row, int num_rows, int shrunk_stride, int num_pieces, u64 page_bytes) {                  \
        lora_expand(out, shrunk, table, rows, num_outputs, first_row, num_rows, shrunk_stride, num_pieces,             \
                    page_bytes);                                                                                       \
    }

LORA_KERNELS(bf16)
LORA_KERNELS(f16)
