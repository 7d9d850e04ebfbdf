// Matrix product with weights for Hopper, by warpgroups: out = x weight^T (+ bias), arguments as in gemm.cu.
//
// Tiles are tokens x outputs, which kernels are named by; a warpgroup of 128 threads has 64 tokens of the tile and all of
// its outputs. Grid (ceil(num_tokens / tile tokens), ceil(n / tile outputs)). Dynamic shared memory: `stages` times 128
// bytes for each row of both tiles, and 1 KiB, because tiles begin at multiples of that.
//   _w64x64      6 stages; two blocks of a multiprocessor
//   _w128x128s6  for blocks that have a multiprocessor for themselves
//   _w128x128s3  two blocks of a multiprocessor: one stores while the other multiplies
//   _w128x192    5 stages
//   _w128x256    4 stages
//
// Bits are those of gemm.cu: an output is the same chain of steps of 16 in order of k, and on Hopper wgmma rounds a step as
// mma does (docs/gpu.md says what was compared). This file is compiled for compute capability 9.0 alone, which is the only
// one that has these instructions.
//
// Both operands travel through a ring of cp.async stages in shared memory. A row of a stage is 64 numbers, whose 16-byte
// chunks are exchanged as wgmma's swizzle of 128 bytes wants them. While the tensor cores have a stage to read and one
// more waiting, threads queue the copies of the stage behind all that are on their way.

#include "common.cuh"
#include "gemm.cuh"

// Numbers of a row in a stage, and the bytes that they are.
constexpr int DEPTH = 64, ROW_BYTES = 128;

template <int TOKENS, int OUTPUTS, int STAGES> struct Tile {
    static constexpr int tokens = TOKENS, outputs = OUTPUTS, stages = STAGES, threads = TOKENS / 64 * 128;
    static constexpr u32 x_bytes = TOKENS * ROW_BYTES, stage_bytes = x_bytes + OUTPUTS * ROW_BYTES;
};

// Orders what a warp has done with registers before the matrix instructions that follow.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most `PENDING` of the newest groups are under way.
template <int PENDING> __device__ __forceinline__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Shows the tensor cores what this thread has put into shared memory.
__device__ __forceinline__ void publish_to_tensor_cores() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Describes a tile of rows of 128 bytes, swizzled so, to the tensor cores: eight rows are 1024 bytes.
__device__ __forceinline__ u64 describe(u32 address) {
    constexpr u64 SWIZZLE_128 = static_cast<u64>(1) << 62, EIGHT_ROWS = static_cast<u64>(1024 / 16) << 32;
    constexpr u64 UNUSED = static_cast<u64>(1) << 16;
    return SWIZZLE_128 | EIGHT_ROWS | UNUSED | (address & 0x3ffff) / 16;
}

// Operands 0 to 63 of an asm statement, and on to 95 and 127; and sums that they stand for, eight columns at a time.
#define TEN(t) "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9, "
#define OPERANDS_32 TEN() TEN(1) TEN(2) "%30, %31"
#define OPERANDS_64 TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) "%60, %61, %62, %63"
#define OPERANDS_96 TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) TEN(6) TEN(7) TEN(8) "%90, %91, %92, %93, %94, %95"
#define OPERANDS_128                                                                                                   \
    TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) TEN(6) TEN(7) TEN(8) TEN(9) TEN(10) TEN(11)                               \
    "%120, %121, %122, %123, %124, %125, %126, %127"
#define SUMS_4(at) "+f"(sums[at][0]), "+f"(sums[at][1]), "+f"(sums[at][2]), "+f"(sums[at][3])
#define SUMS_16(at) SUMS_4(at), SUMS_4(at + 1), SUMS_4(at + 2), SUMS_4(at + 3)
#define SUMS_32 SUMS_16(0), SUMS_16(4)
#define SUMS_64 SUMS_32, SUMS_16(8), SUMS_16(12)
#define SUMS_96 SUMS_64, SUMS_16(16), SUMS_16(20)
#define SUMS_128 SUMS_96, SUMS_16(24), SUMS_16(28)

// One step of a warpgroup: sums[64][OUTPUTS] += x[64][16] weight[OUTPUTS][16]^T. A lane's sums are those of the mmas of its
// warp's 16 rows, eight columns each. The sums are not to be touched before the products are waited for.
template <class T, int OUTPUTS> __device__ __forceinline__ void wgmma(float (&sums)[OUTPUTS / 8][4], u64 x, u64 weight);
#define WGMMA(T, OUTPUTS, NUM, X, WEIGHT)                                                                              \
    template <> __device__ __forceinline__ void wgmma<T, OUTPUTS>(float (&sums)[OUTPUTS / 8][4], u64 x, u64 weight) {  \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #OUTPUTS "k16.f32." #T "." #T " {" OPERANDS_##NUM             \
                     "}, %" #X ", %" #WEIGHT ", 1, 1, 1, 0, 0;"                                                        \
                     : SUMS_##NUM                                                                                      \
                     : "l"(x), "l"(weight));                                                                           \
    }
#define WGMMAS(T)                                                                                                      \
    WGMMA(T, 64, 32, 32, 33) WGMMA(T, 128, 64, 64, 65) WGMMA(T, 192, 96, 96, 97) WGMMA(T, 256, 128, 128, 129)
WGMMAS(bf16)
WGMMAS(f16)

// What a thread copies of a tile of `ROWS` rows, in each stage: the same chunk of every `THREADS` / 8th row.
template <class T, int ROWS, int THREADS, bool IS_WEIGHT> struct RowCopies {
    static constexpr int step = THREADS / 8, count = ROWS / step;
    const T* source;  // The first number in the first stage.
    u32 target;       // Bytes behind the start of the tile.
    u32 exists;       // Of the rows, one bit each.
    int left;         // Numbers from that first one to the end of the row.

    __device__ __forceinline__ RowCopies(const T* matrix, int first_row, int num_rows, int k) {
        const int thread = threadIdx.x, row = thread / 8, chunk = thread % 8;
        source = matrix + static_cast<u64>(first_row + row) * k + chunk * 8;
        target = swizzled<8>(IS_WEIGHT ? permuted(row) : row, chunk);
        exists = 0;
        left = k - chunk * 8;
#pragma unroll
        for (int i = 0; i < count; i++) exists |= (first_row + row + i * step < num_rows ? 1u : 0u) << i;
    }
    // Queues the copies into a tile; `any` is an address in some tensor.
    __device__ __forceinline__ void load(u32 tile, int stage, int k, const T* any) const {
        static_assert(step % 16 == 0, "rows of a thread keep their places among sixteen");
        const bool has_numbers = stage * DEPTH < left;
#pragma unroll
        for (int i = 0; i < count; i++) {
            const bool is_there = has_numbers && (exists >> i & 1);
            copy16_async(tile + target + i * step * ROW_BYTES,
                         is_there ? source + stage * DEPTH + static_cast<u64>(i * step) * k : any, is_there);
        }
    }
};

// Queues the products of one stage, with the rows of x that begin at `x_offset`.
template <class C, class T>
__device__ __forceinline__ void multiply_stage(float (&sums)[C::outputs / 8][4], u32 stage, u32 x_offset) {
    const u32 x = stage + x_offset, weight = stage + C::x_bytes;
    begin_products();
#pragma unroll
    for (int step = 0; step < DEPTH / 16; step++) {
        wgmma<T, C::outputs>(sums, describe(x + step * 32), describe(weight + step * 32));
    }
    commit_products();
}

template <class C, class O>
__device__ __forceinline__ void store_tile(O* out, const float* bias, const float (&sums)[C::outputs / 8][4],
                                           int num_tokens, int n) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, group = threadIdx.x / 128;
    const int first_token = blockIdx.x * C::tokens + group * 64 + warp * 16 + lane / 4;
    const int first_output = blockIdx.y * C::outputs + lane % 4 * 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int token = first_token + half * 8, at = half * 2;
        if (token >= num_tokens) continue;
#pragma unroll
        for (int pair = 0; pair < C::outputs / 8; pair += 2) {
            const float(&left)[4] = sums[pair], (&right)[4] = sums[pair + 1];
            store_outputs(out, bias, make_float4(left[at], left[at + 1], right[at], right[at + 1]), token,
                          first_output + pair * 8, n);
        }
    }
}

template <class C, class T, class O>
__device__ __forceinline__ void gemm(O* out, const T* x, const T* weight, const float* bias, int num_tokens, int n,
                                     int k) {
    const u32 ring = (shared_address(shared_bytes) + 1023) & ~1023u;
    const int num_stages = ceil_div(k, DEPTH);
    const RowCopies<T, C::tokens, C::threads, false> x_rows(x, blockIdx.x * C::tokens, num_tokens, k);
    const RowCopies<T, C::outputs, C::threads, true> weight_rows(weight, blockIdx.y * C::outputs, n, k);
    // A group is committed for every stage, empty past the end, so that the count of pending groups stays true.
    const auto load = [&](int stage, u32 slot) {
        if (stage < num_stages) {
            x_rows.load(ring + slot * C::stage_bytes, stage, k, x);
            weight_rows.load(ring + slot * C::stage_bytes + C::x_bytes, stage, k, x);
        }
        commit_copies();
    };
#pragma unroll
    for (int s = 0; s < C::stages - 1; s++) load(s, s);
    float sums[C::outputs / 8][4] = {};
    u32 slot = 0;
    const u32 x_offset = threadIdx.x / 128 * 64 * ROW_BYTES;
    for (int s = 0; s < num_stages; s++) {
        wait_for_copies<C::stages - 2>();
        publish_to_tensor_cores();
        __syncthreads();
        multiply_stage<C, T>(sums, ring + slot * C::stage_bytes, x_offset);
        // The stage before is done with, by all once they have come here: its slot is filled next.
        wait_for_products<1>();
        __syncthreads();
        load(s + C::stages - 1, slot == 0 ? C::stages - 1 : slot - 1);
        slot = slot + 1 == C::stages ? 0 : slot + 1;
    }
    wait_for_products<0>();
    wait_for_copies<0>();
    store_tile<C>(out, bias, sums, num_tokens, n);
}

using Tile64x64 = Tile<64, 64, 6>;
using Tile128x128s6 = Tile<128, 128, 6>;
using Tile128x128s3 = Tile<128, 128, 3>;
using Tile128x192 = Tile<128, 192, 5>;
using Tile128x256 = Tile<128, 256, 4>;

#define GEMM_KERNELS(T, O)                                                                                             \
    GEMM_KERNEL(T, O, w, 64x64, 2)                                                                                     \
    GEMM_KERNEL(T, O, w, 128x128s6, 1)                                                                                 \
    GEMM_KERNEL(T, O, w, 128x128s3, 2)                                                                                 \
    GEMM_KERNEL(T, O, w, 128x192, 1)                                                                                   \
    GEMM_KERNEL(T, O, w, 128x256, 1)

GEMM_KERNELS(bf16, bf16)
GEMM_KERNELS(bf16, f32)
GEMM_KERNELS(f16, f16)
GEMM_KERNELS(f16, f32)
