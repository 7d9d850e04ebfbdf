// Products with weights in ggml's block formats, which stay as they are in memory, and rows of them.
//
//   quant_gemm:  out = x weight^T (+ bias)
//   quant_embed: out[t] = scale * table[ids[t]]
//
//   x       [num_tokens, k] T
//   weight  [n, k] in records, see below
//   bias    f32, or null
//   out     [num_tokens, out_stride] T or f32; the products are its columns [first_output, first_output + n), and
//           bias has the same columns
//
// k is a multiple of 32, for the formats with blocks of 256 of 256; n and num_tokens are any.
//
// A weight is taken out of its block in f32, as `dequantize_row` does it, and rounded to T. Its codes become the B
// fragments of mma.m16n8k16 in registers, and every output is one chain of those in order of k, begun at zero, the bias
// added last: what gemm.cu does. So a product has the bits that gemm.cu gives for the weights unpacked to T, in every
// tile and whatever else is in the batch. Only a weight of zero may have the other sign, which no sum notices.
//
// Records. Eight rows (zeros behind the last) by 64 columns, 256 for blocks of 256, hold exactly the bytes of their
// blocks, in planes, each a multiple of 16 bytes. All records of eight rows follow each other.
//
//   low bits    for each 64 columns: of Q8 16 bytes a lane, byte 4 s + j; of the others 8 bytes a lane, nibble s % 2 of
//               byte s / 2 * 4 + j, where lane l holds of row l / 4 and the columns 16 s + [0, 16) the codes j of
//               the columns 2 (l % 4) + {0, 1, 8, 9}: those that an mma wants from it
//   high bits   for each 64 columns: of Q5 2 bytes a lane, bit 4 j + s; of Q6 4 bytes a lane, bits 8 j + 2 s + {0, 1}
//   scales      of blocks of 32: for each row 2 f16 scales, then 2 f16 minima where there are any
//               Q4_K, Q5_K: for each row 16 bytes: f16 scale and scale of minima; of each 64 columns {scale, minimum}
//               twice, 6 bits each: 4 u16 with four low bits of each, 4 u8 with two high bits
//               Q6_K: for each row 16 signed bytes; then for each row its f16 scale
//
// Codes are unsigned: the value's offset (8, 16, 32 or 128, where there are no minima) is taken off here.
//
// Tiles of quant_gemm: _t16 16 tokens x 8 outputs a warp, 16 warps at most; _t64 64 tokens x 16 outputs a warp, 8 warps
// at most. Grid (ceil(num_tokens / tile tokens), ceil(n / tile outputs)). Dynamic shared memory: 32 KiB for _t16, 24 KiB
// for _t64, and for every 8 outputs of the tile 4 units for _t16, 2 for _t64, a unit being the bytes of 8 rows of 256
// weights. quant_embed: grid (num_tokens), block 256.

#include "common.cuh"

enum Scales { PLAIN, WITH_MINIMA, SIX_BITS, EIGHT_BITS };

template <int BITS, Scales SCALES> struct Format {
    static constexpr int bits = BITS;
    static constexpr Scales scales = SCALES;
    static constexpr bool has_minima = SCALES == WITH_MINIMA || SCALES == SIX_BITS;
    // Runs of 64 columns in a record, and the bytes of its parts; those of the bits for each run.
    static constexpr int quarters = SCALES == SIX_BITS || SCALES == EIGHT_BITS ? 4 : 1;
    static constexpr int low_bytes = BITS == 8 ? 512 : 256, high_bytes = BITS == 5 ? 64 : BITS == 6 ? 128 : 0;
    static constexpr int scale_bytes = SCALES == PLAIN ? 32 : SCALES == WITH_MINIMA ? 64 : SCALES == SIX_BITS ? 128 : 144;
    static constexpr int record_bytes = quarters * (low_bytes + high_bytes) + scale_bytes;
    // Records of 256 columns.
    static constexpr int unit_bytes = 4 / quarters * record_bytes;
    static_assert(record_bytes % 16 == 0, "records are copied in vectors");

    // All records of eight rows.
    __device__ static __forceinline__ int group_bytes(int k) { return ceil_div(k, 64 * quarters) * record_bytes; }
};

using q4_0 = Format<4, PLAIN>;
using q4_1 = Format<4, WITH_MINIMA>;
using q5_0 = Format<5, PLAIN>;
using q5_1 = Format<5, WITH_MINIMA>;
using q8_0 = Format<8, PLAIN>;
using q4_k = Format<4, SIX_BITS>;
using q5_k = Format<5, SIX_BITS>;
using q6_k = Format<6, EIGHT_BITS>;

// Makes a float of byte `at` of a word in one instruction, and exactly: 128 + byte, for bytes up to 127, ...
__device__ __forceinline__ float above_128(u32 word, int at) {
    return __uint_as_float(__byte_perm(word, 0x43000000, 0x7044 | at << 8));
}
// ... or 32768 + byte.
__device__ __forceinline__ float above_32768(u32 word, int at) {
    return __uint_as_float(__byte_perm(word, 0x47000000, 0x7404 | at << 4));
}

__device__ __forceinline__ float low_f16(u32 word) { return unpack<f16>(word & 0xffff).x; }

// Where the parts of a run of 64 columns lie, of a record in `unit`, which has 256 columns.
template <class F> struct Run {
    const u8 *low, *high, *scales;
    // Its number in the record.
    int at;

    __device__ __forceinline__ Run(const u8* unit, int quarter) : at(F::quarters == 1 ? 0 : quarter) {
        const u8* record = F::quarters == 1 ? unit + quarter * F::record_bytes : unit;
        low = record + at * F::low_bytes;
        high = record + F::quarters * F::low_bytes + at * F::high_bytes;
        scales = record + F::quarters * (F::low_bytes + F::high_bytes);
    }
};

// The codes of a lane in 64 columns, a byte each, one word for each 16 columns: of low bits and, in as many bits as there
// are, high ones. Those of Q8 lie like that.
template <class F> __device__ __forceinline__ void unpack_codes(u32 (&codes)[4], uint2 low, u32 high) {
    codes[0] = low.x & 0x0f0f0f0f, codes[1] = low.x >> 4 & 0x0f0f0f0f;
    codes[2] = low.y & 0x0f0f0f0f, codes[3] = low.y >> 4 & 0x0f0f0f0f;
    if constexpr (F::bits == 5) {
        // A nibble of the half word for each byte.
        u32 bits = (high | high << 8) & 0x00ff00ff;
        bits = (bits | bits << 4) & 0x0f0f0f0f;
#pragma unroll
        for (int step = 0; step < 4; step++) codes[step] |= bits << (4 - step) & 0x10101010;
    }
    if constexpr (F::bits == 6) {
        codes[0] |= high << 4 & 0x30303030, codes[1] |= high << 2 & 0x30303030;
        codes[2] |= high & 0x30303030, codes[3] |= high >> 2 & 0x30303030;
    }
}

template <class F> __device__ __forceinline__ void load_codes(u32 (&codes)[4], const Run<F>& run, int lane) {
    if constexpr (F::bits == 8) {
        const uint4 words = *reinterpret_cast<const uint4*>(run.low + lane * 16);
        codes[0] = words.x, codes[1] = words.y, codes[2] = words.z, codes[3] = words.w;
    } else {
        u32 high = 0;
        if constexpr (F::bits == 5) high = *reinterpret_cast<const u16*>(run.high + lane * 2);
        if constexpr (F::bits == 6) high = *reinterpret_cast<const u32*>(run.high + lane * 4);
        unpack_codes<F>(codes, *reinterpret_cast<const uint2*>(run.low + lane * 8), high);
    }
}

// The same for one lane, or for an even lane and the next in vectors of 16 bytes.
template <class F> __device__ __forceinline__ void load_codes(u32 (&codes)[1][4], const Run<F>& run, int lane) {
    load_codes<F>(codes[0], run, lane);
}
template <class F> __device__ __forceinline__ void load_codes(u32 (&codes)[2][4], const Run<F>& run, int lane) {
    uint2 high = {};
    if constexpr (F::bits == 5) {
        const u32 both = *reinterpret_cast<const u32*>(run.high + lane * 2);
        high = make_uint2(both & 0xffff, both >> 16);
    }
    if constexpr (F::bits == 6) high = *reinterpret_cast<const uint2*>(run.high + lane * 4);
    const uint4 low = *reinterpret_cast<const uint4*>(run.low + lane * 8);
    unpack_codes<F>(codes[0], make_uint2(low.x, low.y), high.x);
    unpack_codes<F>(codes[1], make_uint2(low.z, low.w), high.y);
}

// What each 16 columns of a run of 64 have in common: a weight is scale * (code - offset) + minimum, computed as
// fma(scale, F, rest), where F is the float of the code as above, less 128 if there is a minimum. Products of scales and
// codes are exact in f32, and so is `rest` where it undoes what F is too large by: one rounding, or none.
struct Terms {
    float scale[4], rest[4];
};

template <class F> __device__ __forceinline__ Terms load_terms(const u8* scales, int quarter, int row) {
    Terms terms;
    if constexpr (F::scales == PLAIN) {
        const float2 scale = unpack<f16>(*reinterpret_cast<const u32*>(scales + row * 4));
#pragma unroll
        for (int step = 0; step < 4; step++) terms.scale[step] = step < 2 ? scale.x : scale.y;
    }
    if constexpr (F::scales == WITH_MINIMA) {
        const uint2 words = *reinterpret_cast<const uint2*>(scales + row * 8);
        const float2 scale = unpack<f16>(words.x), minimum = unpack<f16>(words.y);
#pragma unroll
        for (int step = 0; step < 4; step++) {
            terms.scale[step] = step < 2 ? scale.x : scale.y;
            terms.rest[step] = step < 2 ? minimum.x : minimum.y;
        }
    }
    if constexpr (F::scales == SIX_BITS) {
        const u8* own = scales + row * 16;
        const float2 block = unpack<f16>(*reinterpret_cast<const u32*>(own));
        u32 low = *reinterpret_cast<const u16*>(own + 4 + quarter * 2), high = own[12 + quarter];
        low = (low | low << 8) & 0x00ff00ff;
        low = (low | low << 4) & 0x0f0f0f0f;
        high = (high | high << 12) & 0x000f000f;
        high = (high | high << 6) & 0x03030303;
        const u32 numbers = low | high << 4;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float scale = __fmaf_rn(block.x, above_128(numbers, half * 2), -128.0f * block.x);
            const float minimum = __fmaf_rn(-block.y, above_128(numbers, half * 2 + 1), 128.0f * block.y);
            terms.scale[half * 2] = terms.scale[half * 2 + 1] = scale;
            terms.rest[half * 2] = terms.rest[half * 2 + 1] = minimum;
        }
    }
    if constexpr (F::scales == EIGHT_BITS) {
        const float block = low_f16(*reinterpret_cast<const u16*>(scales + 128 + row * 2));
        const u32 numbers = *reinterpret_cast<const u32*>(scales + row * 16 + quarter * 4) ^ 0x80808080;
#pragma unroll
        for (int step = 0; step < 4; step++) terms.scale[step] = block * (above_32768(numbers, step) - 32896.0f);
    }
    if constexpr (!F::has_minima) {
        constexpr float excess = F::bits == 8 ? 32768.0f + 128.0f : 128.0f + (1 << (F::bits - 1));
#pragma unroll
        for (int step = 0; step < 4; step++) terms.rest[step] = -excess * terms.scale[step];
    }
    return terms;
}

// Two weights of a word of codes, as T.
template <class F, class T>
__device__ __forceinline__ u32 weight_pair(u32 codes, int at, float scale, float rest) {
    float number[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float code = F::bits == 8 ? above_32768(codes, at + i) : above_128(codes, at + i);
        if constexpr (F::has_minima) code -= 128.0f;
        number[i] = __fmaf_rn(scale, code, rest);
    }
    return pack<T>(number[0], number[1]);
}

// The weights of a lane's codes.
template <class F, class T>
__device__ __forceinline__ void unpack_weights(u32 (&b)[4][2], const u32 (&codes)[4], const Terms& terms) {
#pragma unroll
    for (int step = 0; step < 4; step++) {
        b[step][0] = weight_pair<F, T>(codes[step], 0, terms.scale[step], terms.rest[step]);
        b[step][1] = weight_pair<F, T>(codes[step], 2, terms.scale[step], terms.rest[step]);
    }
}

// A lane's part of eight rows and 64 columns: the B fragments of four steps of 16. `unit` has 256 columns, of which
// run `quarter` is meant.
template <class F, class T>
__device__ __forceinline__ void load_weights(u32 (&b)[4][2], const u8* unit, int quarter, int lane) {
    const Run<F> run(unit, quarter);
    u32 codes[4];
    load_codes<F>(codes, run, lane);
    unpack_weights<F, T>(b, codes, load_terms<F>(run.scales, run.at, lane / 4));
}

// A block has TOKENS rows and 8 * N_TILES outputs for each of its warps, which stand side by side along the outputs, so
// that each weight is unpacked once in a block. How many warps it has is up to the launch. Rows of x come in stages of
// DEPTH columns, weights in units of 256, both through rings in shared memory; a warp brings the weights that it unpacks, so
// that it knows where they are without dividing, and all bring x together.
template <int TOKENS, int N_TILES, int DEPTH, int X_SLOTS, int UNIT_SLOTS> struct Tile {
    static constexpr int tokens = TOKENS, depth = DEPTH, x_slots = X_SLOTS, unit_slots = UNIT_SLOTS;
    static constexpr int chunks = DEPTH / 8, stages_per_unit = 256 / DEPTH;
    static constexpr u32 x_bytes = TOKENS * DEPTH * 2;
    // mma tiles of a warp.
    static constexpr int m_tiles = TOKENS / 16, n_tiles = N_TILES;
    // A unit is asked for so many stages ahead; it must not be among the copies that may still be under way.
    static_assert(stages_per_unit * (UNIT_SLOTS - 1) >= X_SLOTS - 1 && UNIT_SLOTS <= X_SLOTS, "units come in time");

    // Runs of eight outputs in a block.
    __device__ static __forceinline__ int groups() { return blockDim.x / 32 * N_TILES; }
};

// All rows of a stage: a thread has the same chunk of every so manyth row.
template <class C, class T>
__device__ __forceinline__ void load_x(u32 target, const T* x, int num_tokens, int first_k, int k) {
    const int chunk = threadIdx.x % C::chunks, from_k = first_k + chunk * 8, step = blockDim.x / C::chunks;
    int row = threadIdx.x / C::chunks;
    const T* from = x + static_cast<u64>(blockIdx.x * C::tokens + row) * k + from_k;
    const int num_rows = from_k < k ? num_tokens - blockIdx.x * C::tokens : 0;
#pragma unroll 1
    for (; row < C::tokens; row += step, from += static_cast<u64>(step) * k) {
        const bool exists = row < num_rows;
        copy16_async(target + swizzled<C::chunks>(row, chunk), exists ? from : x, exists);
    }
}

// A unit of the groups of this warp, which nobody else reads.
template <class C, class F>
__device__ __forceinline__ void load_unit(u32 target, const u8* weight, int num_groups, int group_bytes, int unit) {
    const int first_group = threadIdx.x / 32 * C::n_tiles, lane_at = threadIdx.x % 32 * 16;
#pragma unroll
    for (int n = 0; n < C::n_tiles; n++) {
        const int group = blockIdx.y * C::groups() + first_group + n;
        const int end = group < num_groups ? group_bytes - unit * F::unit_bytes : 0;
        const u8* from = weight + static_cast<u64>(group) * group_bytes + unit * F::unit_bytes;
#pragma unroll
        for (int first = 0; first < F::unit_bytes; first += 512) {
            const int at = first + lane_at;
            if (first + 512 > F::unit_bytes && at >= F::unit_bytes) break;
            copy16_async(target + (first_group + n) * F::unit_bytes + at, at < end ? from + at : weight, at < end);
        }
    }
}

// Adds the products of the 64 columns that begin at chunk `first_chunk` of a stage of x.
template <class C, class F, class T>
__device__ __forceinline__ void multiply(float (&sums)[C::m_tiles][C::n_tiles][4], u32 stage, int first_chunk,
                                         const u8* units, int quarter) {
    const int lane = threadIdx.x % 32, first_group = threadIdx.x / 32 * C::n_tiles;
    u32 b[C::n_tiles][4][2];
#pragma unroll
    for (int n = 0; n < C::n_tiles; n++) {
        load_weights<F, T>(b[n], units + (first_group + n) * F::unit_bytes, quarter, lane);
    }
#pragma unroll
    for (int step = 0; step < 4; step++) {
#pragma unroll
        for (int m = 0; m < C::m_tiles; m++) {
            u32 a[4];
            const int chunk = first_chunk + step * 2 + lane / 16;
            load_matrices(a, stage + swizzled<C::chunks>(m * 16 + lane % 16, chunk));
#pragma unroll
            for (int n = 0; n < C::n_tiles; n++) mma<T>(sums[m][n], a, b[n][step][0], b[n][step][1]);
        }
    }
}

// Where the columns of the product lie in the output.
struct Columns {
    int first, stride, count;
};

template <class T>
__device__ __forceinline__ void store_pair(void* out, bool is_f32, u64 at, float2 x, bool both) {
    if (is_f32) {
        float* target = static_cast<float*>(out) + at;
        if (both && at % 2 == 0) {
            *reinterpret_cast<float2*>(target) = x;
        } else {
            target[0] = x.x;
            if (both) target[1] = x.y;
        }
        return;
    }
    u16* target = static_cast<u16*>(out) + at;
    const u32 word = pack<T>(x.x, x.y);
    if (both && at % 2 == 0) {
        *reinterpret_cast<u32*>(target) = word;
    } else {
        target[0] = static_cast<u16>(word);
        if (both) target[1] = static_cast<u16>(word >> 16);
    }
}

template <class C, class T>
__device__ __forceinline__ void store_tile(void* out, bool is_f32, const float* bias,
                                           const float (&sums)[C::m_tiles][C::n_tiles][4], int num_tokens,
                                           const Columns& columns) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int n = 0; n < C::n_tiles; n++) {
        const int output = (blockIdx.y * C::groups() + warp * C::n_tiles + n) * 8 + lane % 4 * 2;
        if (output >= columns.count) continue;
        const bool both = output + 1 < columns.count;
        const int column = columns.first + output;
        const float2 added =
            bias == nullptr ? make_float2(0.0f, 0.0f) : make_float2(bias[column], both ? bias[column + 1] : 0.0f);
#pragma unroll
        for (int m = 0; m < C::m_tiles; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int token = blockIdx.x * C::tokens + m * 16 + half * 8 + lane / 4;
                if (token >= num_tokens) continue;
                float2 x = make_float2(sums[m][n][half * 2], sums[m][n][half * 2 + 1]);
                if (bias != nullptr) x = make_float2(x.x + added.x, x.y + added.y);
                store_pair<T>(out, is_f32, static_cast<u64>(token) * columns.stride + column, x, both);
            }
        }
    }
}

template <class C, class F, class T>
__device__ __forceinline__ void quant_gemm(void* out, const T* x, const u8* weight, const float* bias, int num_tokens,
                                           int k, const Columns& columns, bool is_f32) {
    constexpr u32 RING_BYTES = C::x_slots * C::x_bytes;
    const u32 ring = shared_address(shared_bytes), units_bytes = C::groups() * F::unit_bytes;
    const int num_stages = ceil_div(k, C::depth), num_units = ceil_div(k, 256);
    const int num_groups = ceil_div(columns.count, 8), group_bytes = F::group_bytes(k);
    const auto load_stage = [&](int stage) {
        if (stage < num_stages) {
            load_x<C>(ring + stage % C::x_slots * C::x_bytes, x, num_tokens, stage * C::depth, k);
        }
    };
    const auto load_units = [&](int unit) {
        if (unit < num_units) {
            const u32 slot = ring + RING_BYTES + unit % C::unit_slots * units_bytes;
            load_unit<C, F>(slot, weight, num_groups, group_bytes, unit);
        }
    };
    // A group is committed for every stage, empty past the end, so that the count of pending groups stays true.
#pragma unroll
    for (int s = 0; s < C::x_slots - 1; s++) {
        load_stage(s);
        if (s < C::unit_slots - 1) load_units(s);
        commit_copies();
    }
    float sums[C::m_tiles][C::n_tiles][4] = {};
    for (int s = 0; s < num_stages; s++) {
        wait_for_copies<C::x_slots - 2>();
        // Also says that everyone is done with the slots that are filled next.
        __syncthreads();
        load_stage(s + C::x_slots - 1);
        if (s % C::stages_per_unit == 0) load_units(s / C::stages_per_unit + C::unit_slots - 1);
        commit_copies();
        const u32 stage = ring + s % C::x_slots * C::x_bytes;
        const u8* units = shared_bytes + RING_BYTES + s / C::stages_per_unit % C::unit_slots * units_bytes;
#pragma unroll
        for (int run = 0; run < C::depth / 64; run++) {
            multiply<C, F, T>(sums, stage, run * 8, units, s % C::stages_per_unit * (C::depth / 64) + run);
        }
    }
    wait_for_copies<0>();
    store_tile<C, T>(out, is_f32, bias, sums, num_tokens, columns);
}

// Where lanes of a fragment have 8 bytes of low bits, a thread has what two of them have, and 16 bytes: of every eight
// columns four in a row. Else it has one lane's.
template <class F, class T>
__device__ __forceinline__ void quant_embed(float* out, const u8* table, const int* ids, int hidden, float scale) {
    constexpr int LANES = F::bits == 8 ? 1 : 2, THREADS = 4 / LANES;
    const int row = ids[blockIdx.x];
    const u8* group = table + static_cast<u64>(row / 8) * F::group_bytes(hidden);
    float* target = out + static_cast<u64>(blockIdx.x) * hidden;
    for (int i = threadIdx.x; i < ceil_div(hidden, 64) * THREADS; i += blockDim.x) {
        const int number = i / THREADS, lane = i % THREADS * LANES;
        const Run<F> run(group + number / 4 * F::unit_bytes, number % 4);
        u32 codes[LANES][4], weights[LANES][4][2];
        load_codes<F>(codes, run, row % 8 * 4 + lane);
        const Terms terms = load_terms<F>(run.scales, run.at, row % 8);
#pragma unroll
        for (int j = 0; j < LANES; j++) unpack_weights<F, T>(weights[j], codes[j], terms);
#pragma unroll
        for (int at = 0; at < 8; at++) {
            const int column = number * 64 + at * 8 + lane * 2;
            if (column >= hidden) break;
            const float2 a = unpack<T>(weights[0][at / 2][at % 2]);
            if constexpr (LANES == 1) {
                *reinterpret_cast<float2*>(target + column) = make_float2(a.x * scale, a.y * scale);
            } else {
                const float2 b = unpack<T>(weights[1][at / 2][at % 2]);
                store4(target + column, make_float4(a.x * scale, a.y * scale, b.x * scale, b.y * scale));
            }
        }
    }
}

using Tile16 = Tile<16, 1, 256, 4, 4>;
using Tile64 = Tile<64, 2, 64, 3, 2>;

#define QUANT_GEMM_KERNEL(T, F, tokens, threads, min_blocks)                                                           \
    extern "C" __global__ void __launch_bounds__(threads, min_blocks)                                                  \
    quant_gemm_##T##_##F##_t##tokens(void* out, const T* x, const u8* weight, const float* bias, int num_tokens,       \
                                     int n, int k, int first_output, int out_stride, int is_f32) {                     \
        const Columns columns = {first_output, out_stride, n};                                                         \
        quant_gemm<Tile##tokens, F>(out, x, weight, bias, num_tokens, k, columns, is_f32 != 0);                        \
    }

#define QUANT_KERNELS(T, F)                                                                                            \
    QUANT_GEMM_KERNEL(T, F, 16, 512, 2)                                                                                \
    QUANT_GEMM_KERNEL(T, F, 64, 256, 2)                                                                                \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
    quant_embed_##T##_##F(float* out, const u8* table, const int* ids, int hidden, float scale) {                      \
        quant_embed<F, T>(out, table, ids, hidden, scale);                                                             \
    }

#define QUANT_FORMATS(T)                                                                                               \
    QUANT_KERNELS(T, q4_0)                                                                                             \
    QUANT_KERNELS(T, q4_1)                                                                                             \
    QUANT_KERNELS(T, q5_0)                                                                                             \
    QUANT_KERNELS(T, q5_1)                                                                                             \
    QUANT_KERNELS(T, q8_0)                                                                                             \
    QUANT_KERNELS(T, q4_k)                                                                                             \
    QUANT_KERNELS(T, q5_k)                                                                                             \
    QUANT_KERNELS(T, q6_k)

QUANT_FORMATS(bf16)
QUANT_FORMATS(f16)
