// Causal attention over the paged KV cache: decode and prefill kernels that give a row the same bits.
//
//   qkv          [num_tokens, (num_heads + 2 num_kv_heads) D] T, q normalised and rotated (kv_store.cu)
//   blocks       KV blocks of T or fp8; kv_store.cu says how they lie, block_stride and layer_offset count their numbers
//   block_tables [num_seqs, max_blocks] i32; entries past the context are not read
//   context_lens [num_seqs] i32, one past the position of the last query
//   cu_seqlens_q [num_seqs + 1] i32
//   positions    [num_tokens] i32, ascending in a sequence, gaps allowed: a query sees the keys up to its own position
//   out          [num_tokens, num_heads D] T
//
// A row is one query token and one of the `group` q heads of a KV head: row r of a sequence is token r / group, head
// r % group. So a key or value, once in shared memory, serves the whole group and, in prefill, all tokens of a tile.
//
// attention_decode:  sequences with at most decode_rows (<= 16) rows. Grid (num_chunks, num_kv_heads, num_seqs), block
//                    128. With `partials`, a block does one chunk of 256 positions, and attention_combine folds them;
//                    without, num_chunks is 1 and a block does all. Four warps divide the keys of a tile for the
//                    scores, and the dimensions for the weighted sum.
// attention_combine: a row has `lanes` = D / 4 threads, rounded up to a power of two, 32 at most. Grid
//                    (ceil(decode_rows lanes / block), num_kv_heads, num_seqs), block a multiple of 32, at most 128.
// attention_prefill: the other sequences. Grid (ceil(max rows / 64), num_kv_heads, num_seqs), block 128: 64 rows, 16 a
//                    warp. For D = 256 block 256: two warps share rows, and have half of the dimensions each.
// Dynamic shared memory: queries, a tile of 64 keys, one of 64 values; decode has 16 query rows and 4608 bytes more.
// Keys and values arrive by cp.async: values while scores are computed, the next keys while values are weighed. Those of
// fp8 arrive beside the tiles, in as much memory again as fp8 takes, and each thread turns what it has copied into T.
//
// Arithmetic of a row, the same in all kernels: scores are chains of mma steps in order of dimensions, capped alone; tiles of 64
// positions are weighed in order, with a running maximum that begins anew at every multiple of 256; weights are rounded
// to T for the mma, their sum is not; chunks are folded in order. A masked position has a weight of zero, and a tile or
// chunk without a visible position changes nothing, so it does not matter which of them a kernel skips.
// Equals `cpu::attention` on numbers rounded to T.

#include "common.cuh"

constexpr int TILE = 64;
constexpr int CHUNK = 256;
constexpr int SCORE_STRIDE = 72;
constexpr float LOG2_E = 1.4426950408889634f;

template <class T, class C> struct Arguments {
    T* out;
    float* partials;
    const T* qkv;
    const C* blocks;
    const int *block_tables, *context_lens, *cu_seqlens_q, *positions;
    u64 block_stride, layer_offset;
    int max_blocks, block_size, num_heads, num_kv_heads, decode_rows, window;
    float scale, cap_scale;
};

// The rows of one sequence and KV head, and what they see.
struct Rows {
    int sequence, kv_head, group, first_token, num_queries, context_len, window;
    const int* positions;

    __device__ __forceinline__ Rows(const int* context_lens, const int* cu_seqlens_q, const int* query_positions,
                                    int num_heads, int num_kv_heads, int window_or_none)
        : sequence(blockIdx.z), kv_head(blockIdx.y), group(num_heads / num_kv_heads), window(window_or_none),
          positions(query_positions) {
        first_token = cu_seqlens_q[sequence];
        num_queries = cu_seqlens_q[sequence + 1] - first_token;
        context_len = context_lens[sequence];
    }
    __device__ __forceinline__ int count() const { return num_queries * group; }
    __device__ __forceinline__ int token(int row) const { return first_token + row / group; }
    __device__ __forceinline__ int head(int row) const { return kv_head * group + row % group; }
    // Positions [begin, end) that a row sees; none when there is no such row.
    __device__ __forceinline__ int end(int row) const {
        return row < count() ? positions[token(row)] + 1 : 0;
    }
    __device__ __forceinline__ int begin(int row) const { return window > 0 ? max(end(row) - window, 0) : 0; }
    // From the first chunk that some row sees to the last.
    __device__ __forceinline__ int first_chunk() const { return begin(0) / CHUNK; }
    __device__ __forceinline__ int end_chunk() const { return ceil_div(context_len, CHUNK); }
};

// Blocks hold a multiple of RUN positions, so the keys of a run lie one behind the other.
constexpr int RUN = 16;

// What the rows of a block see of their sequence, positions [begin, end), and where the chunk at hand lies: lane l of
// every warp knows where its run l begins, in numbers of the cache. So a warp asks the block table once for a chunk.
struct Context {
    int begin, end;
    u64 place;

    __device__ __forceinline__ Context(int first, int behind) : begin(first), end(behind), place(0) {}
    // Whether some position of the run that begins there is seen. No other run is read.
    __device__ __forceinline__ bool has(int position) const { return position + RUN > begin && position < end; }
    // The chunk of a tile becomes the one at hand.
    template <class Arguments>
    __device__ __forceinline__ void find_chunk(const Arguments& args, const Rows& rows, int tile, int head_dim) {
        const int lane = threadIdx.x % 32, position = tile * TILE / CHUNK * CHUNK + lane * RUN;
        if (lane >= CHUNK / RUN || !has(position)) return;
        const int index = position / args.block_size, offset = position % args.block_size;
        const int block = args.block_tables[static_cast<u64>(rows.sequence) * args.max_blocks + index];
        place = block * args.block_stride + static_cast<u64>(offset) * head_dim;
    }
    __device__ __forceinline__ u64 place_of(int position) const {
        return __shfl_sync(ALL_LANES, place, position % CHUNK / RUN);
    }
};

// A tile of 64 keys, or values, in shared memory, and where its bytes arrive if they are not of T.
struct TileMemory {
    u32 tile, arriving;
};

// Queues the copy of the keys (or values) of a tile in the chunk at hand; zeros in place of runs that nobody sees and
// past the end.
template <int D, int THREADS, class T, class C>
__device__ __forceinline__ void load_tile(const TileMemory& target, const Arguments<T, C>& args, const Rows& rows,
                                          const Context& context, int tile, bool is_value) {
    constexpr int NUMBERS = 16 / sizeof(C), CHUNKS = D / NUMBERS, VECTORS = RUN * CHUNKS;
    const u64 tile_numbers = static_cast<u64>(args.block_size) * D;
    const C* head = args.blocks + args.layer_offset + (2 * rows.kv_head + is_value) * tile_numbers;
#pragma unroll
    for (int run = 0; run < TILE / RUN; run++) {
        const int position = tile * TILE + run * RUN;
        const C* source = head + context.place_of(position);
        const int end = context.has(position) ? context.end - position : 0;
#pragma unroll
        for (int i = 0; i < ceil_div(VECTORS, THREADS); i++) {
            const int vector = i * THREADS + threadIdx.x;
            if (VECTORS % THREADS != 0 && vector >= VECTORS) break;
            const int row = vector / CHUNKS, chunk = vector % CHUNKS;
            const bool exists = row < end;
            const C* from = exists ? source + vector * NUMBERS : head;
            const u32 place = sizeof(C) == sizeof(T) ? target.tile + swizzled<CHUNKS>(run * RUN + row, chunk)
                                                     : target.arriving + (run * VECTORS + vector) * 16;
            copy16_async(place, from, exists);
        }
    }
}

// Behind the wait for copies and before the barrier: turns the numbers that this thread has copied into T. Not unrolled,
// which would cost registers that decode has not.
template <int D, int THREADS, class T, class C> __device__ __forceinline__ void land_tile(const TileMemory& target) {
    if constexpr (sizeof(C) != sizeof(T)) {
        constexpr int CHUNKS = D / 16, VECTORS = RUN * CHUNKS;
        u8* tile = shared_bytes + (target.tile - shared_address(shared_bytes));
        const u8* arriving = shared_bytes + (target.arriving - shared_address(shared_bytes));
#pragma unroll 1
        for (int run = 0; run < TILE / RUN; run++) {
#pragma unroll 1
            for (int i = 0; i < ceil_div(VECTORS, THREADS); i++) {
                const int vector = i * THREADS + threadIdx.x;
                if (VECTORS % THREADS != 0 && vector >= VECTORS) break;
                const u32 place = swizzled<D / 8>(run * RUN + vector / CHUNKS, vector % CHUNKS * 2);
                const uint4 words = *reinterpret_cast<const uint4*>(arriving + (run * VECTORS + vector) * 16);
                // A pair of chunks lies in one of four pairs of bank groups, and four threads in a row in all of them.
                // The next four begin with the other half of theirs: no two of eight meet in a bank.
                const u32 turned = (place >> 4 ^ vector >> 2) & 1;
                const uint2 low = make_uint2(words.x, words.y), high = make_uint2(words.z, words.w);
                store8_fp8(reinterpret_cast<T*>(tile + (place ^ turned << 4)), turned ? high : low);
                store8_fp8(reinterpret_cast<T*>(tile + (place ^ (turned ^ 1) << 4)), turned ? low : high);
            }
        }
    }
}

template <int D, int THREADS, int ROWS, class T, class C>
__device__ __forceinline__ void load_queries(u32 target, const Arguments<T, C>& args, const Rows& rows, int first_row) {
    constexpr int CHUNKS = D / 8, VECTORS = ROWS * CHUNKS;
    const int heads = args.num_heads + 2 * args.num_kv_heads;
#pragma unroll
    for (int i = 0; i < ceil_div(VECTORS, THREADS); i++) {
        const int vector = i * THREADS + threadIdx.x;
        if (VECTORS % THREADS != 0 && vector >= VECTORS) break;
        const int row = vector / CHUNKS, chunk = vector % CHUNKS, wanted = first_row + row;
        const bool exists = wanted < rows.count();
        const u64 head = exists ? static_cast<u64>(rows.token(wanted)) * heads + rows.head(wanted) : 0;
        copy16_async(target + swizzled<CHUNKS>(row, chunk), args.qkv + head * D + chunk * 8, exists);
    }
}

// Scores of 16 rows and 16 * RUNS keys, as mma tiles of 8 keys.
template <class T, int D, int RUNS>
__device__ __forceinline__ void score(float (&scores)[2 * RUNS][4], u32 queries, int first_row, u32 keys,
                                      int first_key) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2 * RUNS; i++) scores[i][0] = scores[i][1] = scores[i][2] = scores[i][3] = 0.0f;
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
        u32 q[4];
        load_matrices(q, queries + swizzled<D / 8>(first_row + lane % 16, step * 2 + lane / 16));
#pragma unroll
        for (int run = 0; run < RUNS; run++) {
            u32 k[4];
            const int key = first_key + run * 16 + lane / 16 * 8 + lane % 8;
            load_matrices(k, keys + swizzled<D / 8>(key, step * 2 + lane / 8 % 2));
            mma<T>(scores[2 * run], q, k[0], k[1]);
            mma<T>(scores[2 * run + 1], q, k[2], k[3]);
        }
    }
}

// From products of queries and keys to scores in units of log2: outer times the product or, where inner is not 0, times the
// tanh of inner / TANH_SCALE times the product.
struct ScoreScale {
    float outer, inner;

    __device__ __forceinline__ ScoreScale(float scale, float cap_scale)
        : outer(__fmul_rn(scale, LOG2_E)), inner(__fmul_rn(cap_scale, TANH_SCALE)) {}
};

// Maximum of the scaled scores, in units of log2, and sum of the weights relative to it.
struct Softmax {
    float max, sum;
};

// What each side of a fold is multiplied with; 1 and 0 when only the first has seen a position.
__device__ __forceinline__ float2 fold_factors(float max, float other_max) {
    const float largest = fmaxf(max, other_max), base = largest == MINUS_INFINITY ? 0.0f : largest;
    return {exp2_fast(__fadd_rn(max, -base)), exp2_fast(__fadd_rn(other_max, -base))};
}
__device__ __forceinline__ float fold(float x, float y, float2 factors) {
    return __fmaf_rn(y, factors.y, __fmul_rn(x, factors.x));
}
__device__ __forceinline__ void fold(Softmax& total, const Softmax& chunk) {
    const float2 factors = fold_factors(total.max, chunk.max);
    total = {fmaxf(total.max, chunk.max), fold(total.sum, chunk.sum, factors)};
}
// What a weighted sum is multiplied with in the end; 0 for a row that has seen nothing.
__device__ __forceinline__ float inverse(float sum) { return sum == 0.0f ? 0.0f : __frcp_rn(sum); }

// What a warp knows of its 16 rows: a lane has rows lane / 4 and lane / 4 + 8, and of `N` mma tiles of 8 dimensions the
// columns lane % 4 * 2 and the next.
template <int N> struct RowSums {
    float chunk[N][4], total[N][4];
    Softmax chunk_softmax[2], total_softmax[2];
    int begin[2], end[2];

    __device__ __forceinline__ RowSums(const Rows& rows, int first_row) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = first_row + threadIdx.x % 32 / 4 + i * 8;
            begin[i] = rows.begin(row), end[i] = rows.end(row);
            total_softmax[i] = {MINUS_INFINITY, 0.0f};
        }
#pragma unroll
        for (int n = 0; n < N; n++) total[n][0] = total[n][1] = total[n][2] = total[n][3] = 0.0f;
        begin_chunk();
    }

    __device__ __forceinline__ void begin_chunk() {
        chunk_softmax[0] = chunk_softmax[1] = {MINUS_INFINITY, 0.0f};
#pragma unroll
        for (int n = 0; n < N; n++) chunk[n][0] = chunk[n][1] = chunk[n][2] = chunk[n][3] = 0.0f;
    }

    // Turns the scores of positions [first, first + TILE) into weights, the left operand of an mma, and scales what was
    // summed before to the new maximum.
    template <class T>
    __device__ __forceinline__ void weigh(float (&scores)[TILE / 8][4], u32 (&weights)[TILE / 16][4], int first,
                                          const ScoreScale& score_scale) {
        const float scale = score_scale.outer;
        if (score_scale.inner != 0.0f) cap(scores, score_scale.inner);
        mask(scores, first);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            Softmax& state = chunk_softmax[i];
            float largest = MINUS_INFINITY;
#pragma unroll
            for (int n = 0; n < TILE / 8; n++) largest = fmaxf(largest, fmaxf(scores[n][2 * i], scores[n][2 * i + 1]));
            largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 2));
            const float max = fmaxf(state.max, __fmul_rn(largest, scale));
            const float base = max == MINUS_INFINITY ? 0.0f : max;
            const float rescale = exp2_fast(__fadd_rn(state.max, -base));
            float sum = __fmul_rn(state.sum, rescale);
#pragma unroll
            for (int n = 0; n < TILE / 8; n++) {
                float &left = scores[n][2 * i], &right = scores[n][2 * i + 1];
                left = exp2_fast(__fmaf_rn(left, scale, -base)), right = exp2_fast(__fmaf_rn(right, scale, -base));
                sum = __fadd_rn(sum, __fadd_rn(left, right));
                weights[n / 2][n % 2 * 2 + i] = pack<T>(left, right);
            }
            state = {max, sum};
#pragma unroll
            for (int n = 0; n < N; n++) {
                chunk[n][2 * i] = __fmul_rn(chunk[n][2 * i], rescale);
                chunk[n][2 * i + 1] = __fmul_rn(chunk[n][2 * i + 1], rescale);
            }
        }
    }

    // The hyperbolic tangent in place of every product.
    static __device__ __forceinline__ void cap(float (&scores)[TILE / 8][4], float inner) {
#pragma unroll
        for (int n = 0; n < TILE / 8; n++) {
#pragma unroll
            for (int j = 0; j < 4; j++) scores[n][j] = tanh_scaled(__fmul_rn(scores[n][j], inner));
        }
    }

    __device__ __forceinline__ void mask(float (&scores)[TILE / 8][4], int first) const {
        const bool sees_all = begin[0] <= first && begin[1] <= first && first + TILE <= min(end[0], end[1]);
        if (__all_sync(ALL_LANES, sees_all)) return;
        const int lane_first = first + threadIdx.x % 4 * 2;
#pragma unroll
        for (int n = 0; n < TILE / 8; n++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int position = lane_first + n * 8 + j % 2;
                if (position < begin[j / 2] || position >= end[j / 2]) scores[n][j] = MINUS_INFINITY;
            }
        }
    }

    // Adds the weighted values of a tile; mma tile n has dimensions [8 (first_tile + n * step), + 8).
    template <class T, int D>
    __device__ __forceinline__ void add_values(const u32 (&weights)[TILE / 16][4], u32 values, int first_tile,
                                               int step) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int n = 0; n < N; n++) {
            const int tile = first_tile + n * step;
            if (tile >= D / 8) break;
#pragma unroll
            for (int half = 0; half < TILE / 32; half++) {
                u32 v[4];
                load_matrices_transposed(v, values + swizzled<D / 8>(half * 32 + lane, tile));
                mma<T>(chunk[n], weights[2 * half], v[0], v[1]);
                mma<T>(chunk[n], weights[2 * half + 1], v[2], v[3]);
            }
        }
    }

    // The four lanes of a row have summed weights apart.
    __device__ __forceinline__ void end_chunk() {
#pragma unroll
        for (int i = 0; i < 2; i++) chunk_softmax[i].sum = sum_lanes(chunk_softmax[i].sum, 4);
    }

    __device__ __forceinline__ void fold_chunk() {
        end_chunk();
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float2 factors = fold_factors(total_softmax[i].max, chunk_softmax[i].max);
#pragma unroll
            for (int n = 0; n < N; n++) {
                total[n][2 * i] = fold(total[n][2 * i], chunk[n][2 * i], factors);
                total[n][2 * i + 1] = fold(total[n][2 * i + 1], chunk[n][2 * i + 1], factors);
            }
            fold(total_softmax[i], chunk_softmax[i]);
        }
        begin_chunk();
    }

    __device__ __forceinline__ void normalise() {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float factor = inverse(total_softmax[i].sum);
#pragma unroll
            for (int n = 0; n < N; n++) {
                total[n][2 * i] = __fmul_rn(total[n][2 * i], factor);
                total[n][2 * i + 1] = __fmul_rn(total[n][2 * i + 1], factor);
            }
        }
    }

    template <class T> __device__ __forceinline__ u32 result(int n, int i) const {
        return pack<T>(total[n][2 * i], total[n][2 * i + 1]);
    }
};

// In one vector, which the compiler does not always make of two numbers: each alone, they meet in banks.
__device__ __forceinline__ void store_pair(float2* target, float x, float y) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(shared_address(target)), "f"(x), "f"(y) : "memory");
}

// The warps' scores, brought together so that every warp has those of the whole tile.
__device__ __forceinline__ void exchange_scores(float (&scores)[TILE / 8][4], const float (&own)[2][4], float* shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float* corner = shared + lane / 4 * SCORE_STRIDE + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < 2; n++) {
        float2* low = reinterpret_cast<float2*>(corner + (warp * 2 + n) * 8);
        store_pair(low, own[n][0], own[n][1]);
        store_pair(low + 4 * SCORE_STRIDE, own[n][2], own[n][3]);
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < TILE / 8; n++) {
        const float2* low = reinterpret_cast<const float2*>(corner + n * 8);
        const float2 a = low[0], b = low[4 * SCORE_STRIDE];
        scores[n][0] = a.x, scores[n][1] = a.y, scores[n][2] = b.x, scores[n][3] = b.y;
    }
}

// Where decode leaves what chunks give: [num_seqs][num_kv_heads][num_chunks][decode_rows] times D weighted values, and
// behind all of them pairs of maximum and sum, [num_seqs][num_kv_heads][decode_rows][num_chunks]: those of a row are read
// together. Called in grids of (any, num_kv_heads, num_seqs).
template <class Number> struct Partials {
    Number *first_values, *first_states;
    int num_chunks, decode_rows, head_dim;

    __device__ __forceinline__ Partials(Number* partials, const Rows& rows, int chunks, int num_rows, int dims)
        : num_chunks(chunks), decode_rows(num_rows), head_dim(dims) {
        const u64 per_head = static_cast<u64>(num_chunks) * decode_rows;
        const u64 before = (static_cast<u64>(rows.sequence) * gridDim.y + rows.kv_head) * per_head;
        first_values = partials + before * head_dim;
        first_states = partials + gridDim.z * gridDim.y * per_head * head_dim + before * 2;
    }
    __device__ __forceinline__ Number* values(int chunk, int row) const {
        return first_values + (static_cast<u64>(chunk) * decode_rows + row) * head_dim;
    }
    __device__ __forceinline__ Number* state(int chunk, int row) const {
        return first_states + (static_cast<u64>(row) * num_chunks + chunk) * 2;
    }
};

template <int D, int N, class T, class C>
__device__ __forceinline__ void store_partial(const Arguments<T, C>& args, const Rows& rows, RowSums<N>& sums, int chunk) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    sums.end_chunk();
    const Partials<float> partials(args.partials, rows, gridDim.x, args.decode_rows, D);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = lane / 4 + i * 8;
        if (row >= rows.count()) continue;
        float* target = partials.values(chunk, row);
#pragma unroll
        for (int n = 0; n < N; n++) {
            const int tile = warp + n * 4;
            if (tile >= D / 8) break;
            float2* pair = reinterpret_cast<float2*>(target + tile * 8 + lane % 4 * 2);
            *pair = {sums.chunk[n][2 * i], sums.chunk[n][2 * i + 1]};
        }
        if (warp == 0 && lane % 4 == 0) {
            float2* state = reinterpret_cast<float2*>(partials.state(chunk, row));
            *state = {sums.chunk_softmax[i].max, sums.chunk_softmax[i].sum};
        }
    }
}

template <int D, int N, class T, class C>
__device__ __forceinline__ void store_rows(const Arguments<T, C>& args, const Rows& rows, const RowSums<N>& sums) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = lane / 4 + i * 8;
        if (row >= rows.count()) continue;
        T* target = args.out + (static_cast<u64>(rows.token(row)) * args.num_heads + rows.head(row)) * D;
#pragma unroll
        for (int n = 0; n < N; n++) {
            const int tile = warp + n * 4;
            if (tile < D / 8) *reinterpret_cast<u32*>(target + tile * 8 + lane % 4 * 2) = sums.template result<T>(n, i);
        }
    }
}

template <int D, class T, class C> __device__ __forceinline__ void decode(const Arguments<T, C>& args) {
    constexpr int THREADS = 128, WARPS = 4, N = (D / 8 + WARPS - 1) / WARPS;
    const Rows rows(args.context_lens, args.cu_seqlens_q, args.positions, args.num_heads, args.num_kv_heads,
                    args.window);
    const bool is_split = args.partials != nullptr;
    const int chunk = blockIdx.x, warp = threadIdx.x / 32;
    if (rows.count() == 0 || rows.count() > args.decode_rows) return;
    if (is_split && (chunk < rows.first_chunk() || chunk >= rows.end_chunk())) return;

    constexpr u32 SCORES = (16 + 2 * TILE) * D * 2, ARRIVING = SCORES + 16 * SCORE_STRIDE * 4;
    const u32 queries = shared_address(shared_bytes), tiles = queries + 16 * D * 2, arriving = queries + ARRIVING;
    const TileMemory keys = {tiles, arriving}, values = {tiles + TILE * D * 2, arriving + TILE * D};
    float* shared_scores = reinterpret_cast<float*>(shared_bytes + SCORES);
    Context context(rows.begin(0), rows.context_len);
    int tile = context.begin / TILE, end_tile = ceil_div(context.end, TILE);
    if (is_split) tile = max(tile, chunk * (CHUNK / TILE)), end_tile = min(end_tile, (chunk + 1) * (CHUNK / TILE));
    const ScoreScale scale(args.scale, args.cap_scale);

    load_queries<D, THREADS, 16>(queries, args, rows, 0);
    context.find_chunk(args, rows, tile, D);
    load_tile<D, THREADS>(keys, args, rows, context, tile, false);
    commit_copies();
    RowSums<N> sums(rows, 0);
    for (; tile < end_tile; tile++) {
        wait_for_copies<0>();
        land_tile<D, THREADS, T, C>(keys);
        __syncthreads();  // The keys are here, and nobody reads the values of the tile before.
        load_tile<D, THREADS>(values, args, rows, context, tile, true);
        commit_copies();
        float own[2][4], scores[TILE / 8][4];
        score<T, D, 1>(own, queries, 0, keys.tile, warp * 16);
        exchange_scores(scores, own, shared_scores);  // Its barrier: nobody reads the keys any more.
        const bool ends_chunk = (tile + 1) % (CHUNK / TILE) == 0;
        if (tile + 1 < end_tile) {
            if (ends_chunk) context.find_chunk(args, rows, tile + 1, D);
            load_tile<D, THREADS>(keys, args, rows, context, tile + 1, false);
        }
        commit_copies();
        u32 weights[TILE / 16][4];
        sums.template weigh<T>(scores, weights, tile * TILE, scale);
        wait_for_copies<1>();
        land_tile<D, THREADS, T, C>(values);
        __syncthreads();  // The values are here, and nobody reads the exchanged scores.
        sums.template add_values<T, D>(weights, values.tile, warp, WARPS);
        if (!is_split && (ends_chunk || tile + 1 == end_tile)) sums.fold_chunk();
    }
    wait_for_copies<0>();
    if (is_split) {
        store_partial<D>(args, rows, sums, chunk);
    } else {
        sums.normalise();
        store_rows<D>(args, rows, sums);
    }
}

__device__ __forceinline__ float4 fold(float4 x, float4 y, float2 factors) {
    return make_float4(fold(x.x, y.x, factors), fold(x.y, y.y, factors), fold(x.z, y.z, factors),
                       fold(x.w, y.w, factors));
}

// Folds what `decode` left of a row, chunk after chunk. A row has as many lanes as have four dimensions each, rounded up to
// a power of two; of 256 dimensions a lane has four more. Each lane brings another chunk's maximum and sum.
template <class T>
__device__ __forceinline__ void combine(T* out, const float* partials, const Rows& rows, int num_chunks, int num_heads,
                                        int head_dim, int decode_rows) {
    constexpr int PARTS = 2, PART = 128;
    if (rows.count() == 0 || rows.count() > decode_rows) return;
    const int lanes = head_dim <= 16 ? 4 : head_dim <= 32 ? 8 : head_dim <= 64 ? 16 : 32, lane = threadIdx.x % lanes;
    const int row = (blockIdx.x * blockDim.x + threadIdx.x) / lanes, end = rows.end_chunk();
    // The lanes of a warp stay together, with a row or without.
    const int row_dims = row < rows.count() ? head_dim : 0;
    const Partials<const float> left(partials, rows, num_chunks, decode_rows, head_dim);
    float4 total[PARTS] = {};
    Softmax softmax = {MINUS_INFINITY, 0.0f};
    for (int first = rows.first_chunk(); first < end; first += lanes) {
        float2 own = {MINUS_INFINITY, 0.0f};
        if (row_dims > 0 && first + lane < end) own = *reinterpret_cast<const float2*>(left.state(first + lane, row));
        const int count = min(lanes, end - first);
#pragma unroll 4
        for (int i = 0; i < count; i++) {
            const Softmax state = {__shfl_sync(ALL_LANES, own.x, i, lanes), __shfl_sync(ALL_LANES, own.y, i, lanes)};
            const float2 factors = fold_factors(softmax.max, state.max);
            const float* values = left.values(first + i, row);
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                const int dim = part * PART + lane * 4;
                if (dim < row_dims) total[part] = fold(total[part], load4(values + dim), factors);
            }
            fold(softmax, state);
        }
    }
    const float factor = inverse(softmax.sum);
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        const int dim = part * PART + lane * 4;
        if (dim >= row_dims) continue;
        const float4 x = total[part];
        T* target = out + (static_cast<u64>(rows.token(row)) * num_heads + rows.head(row)) * head_dim + dim;
        store4(target, make_float4(__fmul_rn(x.x, factor), __fmul_rn(x.y, factor), __fmul_rn(x.z, factor),
                                   __fmul_rn(x.w, factor)));
    }
}

// Brings the warps' rows together in shared memory, where the queries were, and stores them in vectors of 16 bytes.
template <int D, int THREADS, int N, class T, class C>
__device__ __forceinline__ void store_query_tile(const Arguments<T, C>& args, const Rows& rows, const RowSums<N>& sums,
                                                 int first_row, int warp_row, int first_tile) {
    constexpr int CHUNKS = D / 8, VECTORS = TILE * CHUNKS;
    const int lane = threadIdx.x % 32;
    __syncthreads();
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const u32 offset = swizzled<CHUNKS>(warp_row + lane / 4 + i * 8, first_tile + n) + lane % 4 * 4;
            *reinterpret_cast<u32*>(shared_bytes + offset) = sums.template result<T>(n, i);
        }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < ceil_div(VECTORS, THREADS); i++) {
        const int vector = i * THREADS + threadIdx.x, row = vector / CHUNKS, wanted = first_row + row;
        if ((VECTORS % THREADS != 0 && vector >= VECTORS) || wanted >= rows.count()) break;
        T* target = args.out + (static_cast<u64>(rows.token(wanted)) * args.num_heads + rows.head(wanted)) * D;
        const uint4 x = *reinterpret_cast<const uint4*>(shared_bytes + swizzled<CHUNKS>(row, vector % CHUNKS));
        *reinterpret_cast<uint4*>(target + vector % CHUNKS * 8) = x;
    }
}

template <int D> constexpr int PREFILL_THREADS = D > 128 ? 256 : 128;

template <int D, class T, class C> __device__ __forceinline__ void prefill(const Arguments<T, C>& args) {
    constexpr int THREADS = PREFILL_THREADS<D>, N = D / 8 / (THREADS / 128);
    const Rows rows(args.context_lens, args.cu_seqlens_q, args.positions, args.num_heads, args.num_kv_heads,
                    args.window);
    const int first_row = blockIdx.x * TILE;
    if (rows.count() <= args.decode_rows || first_row >= rows.count()) return;

    const u32 queries = shared_address(shared_bytes), tiles = queries + TILE * D * 2, arriving = queries + 3 * TILE * D * 2;
    const TileMemory keys = {tiles, arriving}, values = {tiles + TILE * D * 2, arriving + TILE * D};
    const int warp = threadIdx.x / 32, warp_row = warp % 4 * 16, first_tile = warp / 4 * N;
    const int last_row = min(first_row + TILE, rows.count()) - 1;
    const ScoreScale scale(args.scale, args.cap_scale);
    Context context(rows.begin(first_row), rows.end(last_row));
    int tile = context.begin / TILE;
    const int end_tile = ceil_div(context.end, TILE);

    load_queries<D, THREADS, TILE>(queries, args, rows, first_row);
    context.find_chunk(args, rows, tile, D);
    load_tile<D, THREADS>(keys, args, rows, context, tile, false);
    commit_copies();
    RowSums<N> sums(rows, first_row + warp_row);
    for (; tile < end_tile; tile++) {
        wait_for_copies<0>();
        land_tile<D, THREADS, T, C>(keys);
        __syncthreads();  // The keys are here, and nobody reads the values of the tile before.
        load_tile<D, THREADS>(values, args, rows, context, tile, true);
        commit_copies();
        float scores[TILE / 8][4];
        score<T, D, TILE / 16>(scores, queries, warp_row, keys.tile, 0);
        __syncthreads();  // Nobody reads the keys any more.
        const bool ends_chunk = (tile + 1) % (CHUNK / TILE) == 0;
        if (tile + 1 < end_tile) {
            if (ends_chunk) context.find_chunk(args, rows, tile + 1, D);
            load_tile<D, THREADS>(keys, args, rows, context, tile + 1, false);
        }
        commit_copies();
        u32 weights[TILE / 16][4];
        sums.template weigh<T>(scores, weights, tile * TILE, scale);
        wait_for_copies<1>();
        land_tile<D, THREADS, T, C>(values);
        __syncthreads();  // The values are here.
        sums.template add_values<T, D>(weights, values.tile, first_tile, 1);
        if (ends_chunk || tile + 1 == end_tile) sums.fold_chunk();
    }
    wait_for_copies<0>();
    sums.normalise();
    store_query_tile<D, THREADS>(args, rows, sums, first_row, warp_row, first_tile);
}

#define ATTENTION_PARAMETERS(T, C)                                                                                     \
    T *out, float *partials, const T *qkv, const C *blocks, const int *block_tables, const int *context_lens,          \
        const int *cu_seqlens_q, const int *positions, u64 block_stride, u64 layer_offset, int max_blocks,             \
        int block_size, int num_heads, int num_kv_heads, int decode_rows, int window, float scale, float cap_scale
#define ATTENTION_ARGUMENTS                                                                                            \
    {out,          partials,     qkv,        blocks,     block_tables, context_lens, cu_seqlens_q, positions,          \
     block_stride, layer_offset, max_blocks, block_size, num_heads,    num_kv_heads, decode_rows,  window,             \
     scale,        cap_scale}

#define ATTENTION_KERNELS(name, T, C, D)                                                                               \
    extern "C" __global__ void __launch_bounds__(128, D > 128 ? 2 : 4)                                                 \
    attention_decode_##name##_d##D(ATTENTION_PARAMETERS(T, C)) {                                                       \
        decode<D, T, C>(ATTENTION_ARGUMENTS);                                                                          \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(PREFILL_THREADS<D>)                                                   \
    attention_prefill_##name##_d##D(ATTENTION_PARAMETERS(T, C)) {                                                      \
        prefill<D, T, C>(ATTENTION_ARGUMENTS);                                                                         \
    }

#define ALL_ATTENTION_KERNELS(name, T, C)                                                                              \
    ATTENTION_KERNELS(name, T, C, 16)                                                                                  \
    ATTENTION_KERNELS(name, T, C, 32)                                                                                  \
    ATTENTION_KERNELS(name, T, C, 64)                                                                                  \
    ATTENTION_KERNELS(name, T, C, 80)                                                                                  \
    ATTENTION_KERNELS(name, T, C, 96)                                                                                  \
    ATTENTION_KERNELS(name, T, C, 128)                                                                                 \
    ATTENTION_KERNELS(name, T, C, 256)

#define COMBINE_KERNEL(T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(128)                                                                  \
    attention_combine_##T(T* out, const float* partials, const int* context_lens, const int* cu_seqlens_q,             \
                          const int* positions, int num_chunks, int num_heads, int num_kv_heads, int head_dim,         \
                          int decode_rows, int window) {                                                               \
        const Rows rows(context_lens, cu_seqlens_q, positions, num_heads, num_kv_heads, window);                       \
        combine(out, partials, rows, num_chunks, num_heads, head_dim, decode_rows);                                    \
    }

COMBINE_KERNEL(bf16)
COMBINE_KERNEL(f16)
ALL_ATTENTION_KERNELS(bf16, bf16, bf16)
ALL_ATTENTION_KERNELS(f16, f16, f16)
ALL_ATTENTION_KERNELS(bf16_fp8, bf16, fp8)
