// What both files of the second half of low-rank updates have in common: lora_expand.cu says what is computed.

// Pieces that a block looks at together.
constexpr int MAX_PIECES = 32;

// Expansion: strips of 16 rows, stages of 16 ranks. A warp has of each stage its 64 columns of b, and of each strip
// those of `out`; the block has the shrunk numbers.
constexpr int STRIP_ROWS = 16, STAGE_RANKS = 16, WARP_COLUMNS = 64, RING = 3, MAX_STRIPS = 32;
constexpr u32 SHRUNK_BYTES = STRIP_ROWS * STAGE_RANKS * 4, B_BYTES = STAGE_RANKS * WARP_COLUMNS * 2;
constexpr u32 OUT_BYTES = STRIP_ROWS * WARP_COLUMNS * 2;

// Copies the first `bytes` of 16 and writes zeros behind them.
__device__ __forceinline__ void copy_first_async(u32 target, const void* source, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(bytes) : "memory");
}

// The first entry of a piece that is not below `row`, or its end. Rows ascend, so that none can lie further from the
// first than its number is from the first's: where they have no gaps, the first look finds it.
__device__ __forceinline__ int find_entry(const LoraPiece& piece, const int* rows, int row) {
    int low = piece.start;
    const int distance = row - rows[low];
    if (distance <= 0) return low;
    int high = min(piece.end, low + distance);
    if (rows[high - 1] < row) return high;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (rows[middle] < row) low = middle + 1;
        else high = middle;
    }
    return low;
}

__device__ __forceinline__ bool covers(const LoraPiece& piece, int column) {
    return column >= piece.first_column && column < piece.first_column + piece.num_columns;
}

// What the threads of a block of lora_expand share: pieces, and by bit which rows of each strip each of them has.
struct Shared {
    __align__(16) LoraPiece pieces[MAX_PIECES];
    u32 members[MAX_STRIPS][MAX_PIECES];
};

// The stages of a run of strips that have the same pieces.
struct Cursor {
    int strip, stage, rank;  // the stage's number in the strip, its first rank in the piece
    u32 all, left;           // pieces of a strip, those not done, by bit
    int count;               // stages before

    __device__ __forceinline__ int piece() const { return __ffs(left) - 1; }
    __device__ __forceinline__ bool ends(const LoraPiece& piece) const { return rank + STAGE_RANKS >= piece.rank; }
    __device__ __forceinline__ void advance(const LoraPiece& piece) {
        const bool is_last = ends(piece);
        count++, stage++, rank += STAGE_RANKS;
        if (!is_last) return;
        rank = 0, left &= left - 1;
        if (left == 0) left = all, stage = 0, strip++;
    }
};

// What lies in the warps' slots of b before any strip is looked at: nothing.
struct NoneOfB {
    static constexpr bool IS_NONE = true;
    __device__ __forceinline__ bool is_there() const { return false; }
};

// Splits two neighbouring numbers into pairs of bf16, whose sums have 16 bits of each.
__device__ __forceinline__ void split(u32& high, u32& low, float2 x) {
    high = pack<bf16>(x.x, x.y);
    const float2 rounded = unpack<bf16>(high);
    low = pack<bf16>(__fsub_rn(x.x, rounded.x), __fsub_rn(x.y, rounded.y));
}

// A step of the tensor cores by shrunk numbers in two parts. b in f16 is all there in two; the product of both low
// parts is below what is kept.
template <class T>
__device__ __forceinline__ void multiply_split(float (&products)[4], const u32 (&high)[4], const u32 (&low)[4], u32 b0,
                                               u32 b1);
template <>
__device__ __forceinline__ void multiply_split<bf16>(float (&products)[4], const u32 (&high)[4], const u32 (&low)[4],
                                                     u32 b0, u32 b1) {
    mma<bf16>(products, high, b0, b1);
    mma<bf16>(products, low, b0, b1);
}
template <>
__device__ __forceinline__ void multiply_split<f16>(float (&products)[4], const u32 (&high)[4], const u32 (&low)[4],
                                                    u32 b0, u32 b1) {
    u32 high0, low0, high1, low1;
    split(high0, low0, unpack<f16>(b0));
    split(high1, low1, unpack<f16>(b1));
    mma<bf16>(products, high, high0, high1);
    mma<bf16>(products, low, high0, high1);
    mma<bf16>(products, high, low0, low1);
}

template <class T, int WARPS, int B_SLOTS> struct Expand {
    static constexpr int threads = WARPS * 32, columns = WARPS * WARP_COLUMNS;
    static constexpr u32 warp_bytes = B_SLOTS * B_BYTES + RING * OUT_BYTES;

    T* out;
    const float* shrunk;
    const int* rows;
    int num_outputs, first_row, shrunk_stride;
    u64 page_bytes;
    Shared& shared;
    int num_loaded;                       // of its pieces
    int block_row, end_row, warp_column;  // of `shrunk`; the warp's first column
    u8* b_ring;                           // the warp's
    u8* out_ring;
    float sums[8][4];  // of the strip, as mma has them
    u32 touched;       // vectors of eight columns that have any, by bit, of the lower and of the upper row
    u32 loaded;        // rows of which the lane's vector is there, by bit, where batches of pieces follow each other

    // Takes the block's rows and the warp's columns and slots.
    __device__ __forceinline__ void begin(int num_rows, int block_rows) {
        const int warp = threadIdx.x / 32;
        block_row = blockIdx.x * block_rows;
        end_row = min(num_rows, block_row + block_rows);
        warp_column = (static_cast<int>(blockIdx.y) * WARPS + warp) * WARP_COLUMNS;
        b_ring = slots_of(warp);
        out_ring = b_ring + B_SLOTS * B_BYTES;
        clear();
    }

    // Where a warp's slots of b begin.
    static __device__ __forceinline__ u8* slots_of(int warp) {
        return shared_bytes + RING * SHRUNK_BYTES + warp * warp_bytes;
    }

    __device__ __forceinline__ int num_strips() const { return ceil_div(end_row - block_row, STRIP_ROWS); }

    __device__ __forceinline__ void load_pieces(const LoraPiece* table, int count) {
        constexpr int VECTORS = sizeof(LoraPiece) / 16;
        const uint4* source = reinterpret_cast<const uint4*>(table);
        __syncthreads();
        for (int i = threadIdx.x; i < count * VECTORS; i += threads) {
            reinterpret_cast<uint4*>(shared.pieces)[i] = source[i];
        }
        __syncthreads();
        num_loaded = count;
        for (int i = threadIdx.x; i < num_strips() * MAX_PIECES; i += threads) shared.members[0][i] = 0;
        __syncthreads();
        for (int p = threadIdx.x / 32; p < count; p += WARPS) find_members(p);
        __syncthreads();
    }

    // By a warp: the block's rows that a piece has, if it has any of the block's columns.
    __device__ __forceinline__ void find_members(int p) {
        const LoraPiece& piece = shared.pieces[p];
        const int start = piece.first_column - static_cast<int>(blockIdx.y) * WARPS * WARP_COLUMNS;
        if (start >= WARPS * WARP_COLUMNS || start + piece.num_columns <= 0) return;
        const int first = find_entry(piece, rows, first_row + block_row);
        const int end = min(piece.end, first + end_row - block_row);
#pragma unroll 4
        for (int entry = first + threadIdx.x % 32; entry < end; entry += 32) {
            const int at = rows[entry] - first_row - block_row;
            if (at < end_row - block_row) atomicOr(&shared.members[at / STRIP_ROWS][p], 1u << at % STRIP_ROWS);
        }
    }

    __device__ __forceinline__ u32 pieces_of(int strip) const {
        const int lane = threadIdx.x % 32;
        return __ballot_sync(ALL_LANES, lane < num_loaded && shared.members[strip][lane] != 0);
    }

    // The first of a strip of `out`.
    __device__ __forceinline__ T* row_of(int strip) const {
        return out + static_cast<u64>(first_row + block_row + strip * STRIP_ROWS) * num_outputs;
    }

    // The strip's vectors of `out` to which the pieces add anything: four for a lane, as they are copied.
    __device__ __forceinline__ void load_out(const Cursor& at, bool is_only_batch) {
        const int lane = threadIdx.x % 32, column = warp_column + lane % 8 * 8;
        if (is_only_batch) loaded = 0;
        u32 wanted = 0;  // rows
        for (u32 left = at.all; left != 0; left &= left - 1) {
            const int p = __ffs(left) - 1;
            if (covers(shared.pieces[p], column)) wanted |= shared.members[at.strip][p];
        }
        const T* source = row_of(at.strip) + column;
        const u32 target = shared_address(out_ring) + at.strip % RING * OUT_BYTES;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = i * 4 + lane / 8;
            if ((wanted >> row & 1) == 0 || (loaded >> row & 1) != 0) continue;
            copy16_async(target + swizzled<8>(row, lane % 8), source + static_cast<u64>(row) * num_outputs, true);
        }
        loaded |= wanted;
    }

    // By a warp: a stage's 64 columns from `first_column` on.
    __device__ __forceinline__ void load_b(const LoraPiece& piece, int first_rank, int first_column, u32 target) const {
        const int lane = threadIdx.x % 32, column = first_column + lane % 8 * 8;
        const int own_rank = first_rank + lane % STAGE_RANKS;
        const T* own = reinterpret_cast<const T*>(piece.arena);
        if (lane < STAGE_RANKS && own_rank < piece.rank) {
            own = find_row<T>(piece, piece.b, own_rank, piece.num_columns, page_bytes);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int rank = i * 4 + lane / 8;
            const T* row = reinterpret_cast<const T*>(__shfl_sync(ALL_LANES, reinterpret_cast<u64>(own), rank));
            const bool exists = first_rank + rank < piece.rank && covers(piece, column);
            const T* source = exists ? row + (column - piece.first_column) : row;
            copy16_async(target + swizzled<8>(rank, lane % 8), source, exists);
        }
    }

    // By the first threads of the block. Halves of every other pair of rows are exchanged against bank conflicts.
    __device__ __forceinline__ void load_shrunk(const Cursor& at, const LoraPiece& piece) {
        const int row = threadIdx.x / 4, chunk = threadIdx.x % 4, rank = at.rank + chunk * 4;
        if (row >= STRIP_ROWS) return;
        const bool exists = (shared.members[at.strip][at.piece()] >> row & 1) != 0 && rank < piece.rank;
        const int from_row = block_row + at.strip * STRIP_ROWS + row;
        const u64 from = static_cast<u64>(from_row) * shrunk_stride + piece.shrunk_at + rank;
        const u32 target = shared_address(shared_bytes) + at.count % RING * SHRUNK_BYTES + row * 64;
        copy_first_async(target + (chunk ^ (row & 2)) * 16, exists ? shrunk + from : shrunk,
                         exists ? 4 * min(4, piece.rank - rank) : 0);
    }

    // Adds the products of a stage for the warp's columns.
    __device__ __forceinline__ void multiply(float (&products)[8][4], const u8* stage, u32 b_tile) const {
        const int lane = threadIdx.x % 32;
        u32 high[4], low[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = lane / 4 + i % 2 * 8, chunk = (lane % 4 / 2 + i / 2 * 2) ^ (row & 2);
            split(high[i], low[i], *reinterpret_cast<const float2*>(stage + row * 64 + chunk * 16 + lane % 2 * 8));
        }
#pragma unroll
        for (int n = 0; n < 8; n += 2) {
            u32 b[4];
            load_matrices_transposed(b, b_tile + swizzled<8>(lane % 16, n + lane / 16));
#pragma unroll
            for (int i = 0; i < 2; i++) multiply_split<T>(products[n + i], high, low, b[2 * i], b[2 * i + 1]);
        }
    }

    // Adds a piece's products to the sums of the rows and columns that it has.
    __device__ __forceinline__ void add(float (&products)[8][4], const LoraPiece& piece, u32 members) {
        const int row = threadIdx.x % 32 / 4, start = (piece.first_column - warp_column) / 8;
        // Vectors [start, end) of eight.
        const u32 below_end = (1u << max(0, min(8, start + piece.num_columns / 8))) - 1;
        const u32 covered = below_end & ~((1u << max(0, min(8, start))) - 1);
        const u32 added = (members >> row & 1 ? covered : 0) | (members >> row & 0x100 ? covered << 8 : 0);
        touched |= added;
        if (__all_sync(ALL_LANES, added == 0xffff)) {
            add_vectors(products, [](int) { return true; });
        } else {
            add_vectors(products, [&](int vector) { return (added >> vector & 1) != 0; });
        }
    }
    template <class Has> __device__ __forceinline__ void add_vectors(float (&products)[8][4], Has has) {
#pragma unroll
        for (int n = 0; n < 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (has(i / 2 * 8 + n)) sums[n][i] = __fadd_rn(sums[n][i], products[n][i]);
                products[n][i] = 0.0f;
            }
        }
    }

    // Adds the sums of a strip to what lies in shared memory, and writes that.
    __device__ __forceinline__ void finish(int strip) {
        if (__all_sync(ALL_LANES, touched == 0xffff)) {
            finish_vectors(strip, [](u32, int) { return true; });
        } else {
            finish_vectors(strip, [](u32 touched, int vector) { return (touched >> vector & 1) != 0; });
        }
    }
    template <class Has> __device__ __forceinline__ void finish_vectors(int strip, Has has) {
        const int lane = threadIdx.x % 32, column = lane % 8;
        u8* tile = out_ring + strip % RING * OUT_BYTES;
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int n = 0; n < 8; n++) {
                if (!has(touched, half * 8 + n)) continue;
                u32* pair = reinterpret_cast<u32*>(tile + swizzled<8>(lane / 4 + half * 8, n) + lane % 4 * 4);
                const float2 x = unpack<T>(*pair);
                *pair = pack<T>(__fadd_rn(x.x, sums[n][half * 2]), __fadd_rn(x.y, sums[n][half * 2 + 1]));
            }
        }
        __syncwarp();
        T* target = row_of(strip) + warp_column + column * 8;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = i * 4 + lane / 8;
            const u32 of_row = __shfl_sync(ALL_LANES, touched, row % 8 * 4);
            if (!has(of_row, i / 2 * 8 + column)) continue;
            *reinterpret_cast<uint4*>(target + static_cast<u64>(row) * num_outputs) =
                *reinterpret_cast<const uint4*>(tile + swizzled<8>(row, column));
        }
    }

    __device__ __forceinline__ void clear() {
        touched = loaded = 0;
#pragma unroll
        for (int n = 0; n < 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) sums[n][i] = 0.0f;
        }
    }

    // The strips [start, end), all of which have these pieces; writes them where there are no other pieces.
    template <class B> __device__ __forceinline__ void walk(int start, int end, u32 all, bool is_only_batch, B b) {
        int strip_stages = 0;
        for (u32 left = all; left != 0; left &= left - 1) {
            strip_stages += ceil_div(shared.pieces[__ffs(left) - 1].rank, STAGE_RANKS);
        }
        const int num_stages = strip_stages * (end - start);
        const bool stays = strip_stages <= B_SLOTS;
        const auto b_slot = [&](const Cursor& at) {
            if constexpr (!B::IS_NONE) {
                if (b.is_there()) return b.slot(at);
            }
            return stays ? at.stage : at.count % B_SLOTS;
        };
        Cursor now = {start, 0, 0, all, all, 0}, ahead = now;
        const auto load_next = [&] {
            if (ahead.count < num_stages) {
                const LoraPiece& piece = shared.pieces[ahead.piece()];
                load_shrunk(ahead, piece);
                if (!b.is_there() && (ahead.strip == start || !stays)) {
                    load_b(piece, ahead.rank, warp_column, shared_address(b_ring) + b_slot(ahead) * B_BYTES);
                }
                if (ahead.stage == 0) load_out(ahead, is_only_batch);
                ahead.advance(piece);
            }
            commit_copies();
        };
#pragma unroll 1
        for (int i = 0; i < RING - 1; i++) load_next();
        float products[8][4] = {};
        while (now.count < num_stages) {
            wait_for_copies<RING - 2>();
            // Also says that everyone is done with the shrunk numbers of the stage before, whose slot is filled next.
            __syncthreads();
            const LoraPiece& piece = shared.pieces[now.piece()];
            const bool is_mine =
                warp_column + WARP_COLUMNS > piece.first_column && warp_column < piece.first_column + piece.num_columns;
            if (is_mine) {
                const u8* stage = shared_bytes + now.count % RING * SHRUNK_BYTES;
                multiply(products, stage, shared_address(b_ring) + b_slot(now) * B_BYTES);
            }
            // The warp's own slot of b may be the one just read.
            __syncwarp();
            load_next();
            if (is_mine && now.ends(piece)) add(products, piece, shared.members[now.strip][now.piece()]);
            if (now.stage == strip_stages - 1 && is_only_batch) {
                finish(now.strip);
                clear();
            }
            now.advance(piece);
        }
        wait_for_copies<0>();
        __syncthreads();
    }

    // All strips, in runs of those that have the same pieces.
    template <class B> __device__ __forceinline__ void walk_runs(bool is_only_batch, B b) {
        for (int start = 0, end = 0; start < num_strips(); start = end) {
            const u32 all = pieces_of(start);
            do end++;
            while (end < num_strips() && pieces_of(end) == all);
            if (all != 0) walk(start, end, all, is_only_batch, b);
        }
    }
};

// A kernel by the file's `lora_expand`; `blocks_of` is what it asks of its blocks beside their size.
#define LORA_EXPAND(T, name, warps, b_slots, min_blocks, blocks_of)                                                    \
    extern "C" __global__ void blocks_of __launch_bounds__(warps * 32, min_blocks)                                     \
    lora_expand_##T##_##name(T* out, const float* shrunk, const LoraPiece* table, const int* rows, int num_outputs,    \
                             int first_row, int num_rows, int shrunk_stride, int num_pieces, int block_rows,           \
                             u64 page_bytes) {                                                                         \
        lora_expand<T, warps, b_slots>(out, shrunk, table, rows, num_outputs, first_row, num_rows, shrunk_stride,      \
                                       num_pieces, block_rows, page_bytes);                                            \
    }
