// What both files of the first half of low-rank updates have in common: lora_shrink.cu says what is computed.

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

// Where the sum of a row and a rank lies, in bytes, among those of a tile of so many ranks. Runs of eight ranks are
// exchanged against bank conflicts of the four rows that half a warp stores.
template <int RANKS> __device__ __forceinline__ u32 sum_at(int row, int rank) {
    const int exchanged = RANKS == 16 ? (row & 2) << 2 : (row & 3) << 3;
    return (row * RANKS + (rank ^ exchanged)) * 4;
}

// Puts a warp's sums among those of a tile, of rows from `first_row` on.
template <int ENTRIES, int RANKS>
__device__ __forceinline__ void store_sums(u8* tile, int first_row, const float (&sums)[ENTRIES / 16][RANKS / 8][4]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < ENTRIES / 16; m++) {
#pragma unroll
        for (int n = 0; n < RANKS / 8; n++) {
            const int row = first_row + m * 16 + lane / 4, rank = n * 8 + lane % 4 * 2;
            const float(&x)[4] = sums[m][n];
            *reinterpret_cast<float2*>(tile + sum_at<RANKS>(row, rank)) = make_float2(x[0], x[1]);
            *reinterpret_cast<float2*>(tile + sum_at<RANKS>(row + 8, rank)) = make_float2(x[2], x[3]);
        }
    }
}

// Many entries: a warp has some of them, a block walks through inputs in stages of 64. A tile is the work of so many
// blocks, which follow each other.
template <int ENTRIES, int RANKS, int SLOTS_, int THREADS, int BLOCKS> struct BlockTile {
    static constexpr int entries = ENTRIES, ranks = RANKS, depth = 64, slots = SLOTS_, threads = THREADS;
    static constexpr u32 blocks = BLOCKS;
    static constexpr u32 x_bytes = ENTRIES * depth * 2, stage_bytes = x_bytes + RANKS * depth * 2;
    // Vectors of 16 bytes that a thread copies of a stage of x, and of a.
    static constexpr int x_vectors = ENTRIES * 8 / threads, a_vectors = (RANKS * 8 + threads - 1) / threads;
};

// Brings stages of inputs from `first_input` on through the block's ring; `use` gets the number of each and where it
// lies.
template <class C, class T, class Use>
__device__ __forceinline__ void walk_stages(const Shrink<T>& tile, int first_input, int num_stages, Use use) {
    const int chunk = threadIdx.x % 8;
    const u32 ring = shared_address(shared_bytes);
    constexpr int PASS = C::threads / 8;  // rows that all threads copy at once
    const T *x[C::x_vectors], *a[C::a_vectors];
#pragma unroll
    for (int i = 0; i < C::x_vectors; i++) x[i] = tile.x_row(tile.first_entry + i * PASS + threadIdx.x / 8);
#pragma unroll
    for (int i = 0; i < C::a_vectors; i++) a[i] = tile.a_row(tile.first_rank + i * PASS + threadIdx.x / 8);
    const auto load = [&](int stage, int slot) {
        if (stage < num_stages) {
            const int input = first_input + stage * C::depth + chunk * 8;
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
    for (int stage = 0, slot = 0; stage < num_stages; stage++, slot = slot + 1 == C::slots ? 0 : slot + 1) {
        wait_for_copies<C::slots - 2>();
        // Also says that everyone is done with the slot that is filled next: the one of the stage before.
        __syncthreads();
        load(stage + C::slots - 1, slot == 0 ? C::slots - 1 : slot - 1);
        use(stage, ring + slot * C::stage_bytes);
    }
    wait_for_copies<0>();
}

// Tile `number` of those of all pieces.
template <class C, class T> __device__ __forceinline__ bool find_tile(Shrink<T>& tile, u32 number) {
    const int rank_tiles = ceil_div(tile.piece.rank, C::ranks), own = number - tile.piece.first_block;
    tile.first_entry = tile.piece.start + own / rank_tiles * C::entries;
    tile.end_entry = min(tile.piece.end, tile.first_entry + C::entries);
    tile.first_rank = own % rank_tiles * C::ranks;
    return tile.has_rows();
}

// A kernel by the file's `shrink` over tiles of one size; `blocks_of` is what it asks of its blocks beside their size.
#define LORA_SHRINK(T, name, C, shrink, blocks_of)                                                                     \
    extern "C" __global__ void blocks_of __launch_bounds__(C::threads)                                                 \
    lora_shrink_##T##_##name(float* shrunk, LoraPiece* table, const T* x, const int* rows, const float* scales,        \
                             int num_inputs, int first_row, int num_rows, int shrunk_stride, int num_pieces,           \
                             int first_piece, u64 page_bytes, const LoraPieces pieces) {                               \
        const u32 number = blockIdx.x / C::blocks;                                                                     \
        int p = 0;                                                                                                     \
        while (p + 1 < num_pieces && pieces.at[p + 1].first_block <= number) p++;                                      \
        Shrink<T> tile = {x, rows, num_inputs, first_row, num_rows, page_bytes, pieces.at[p]};                         \
        if (blockIdx.x == tile.piece.first_block * C::blocks && threadIdx.x == 0) table[first_piece + p] = tile.piece; \
        if (find_tile<C>(tile, number)) shrink<C>(shrunk, tile, scales, shrunk_stride);                                \
    }
