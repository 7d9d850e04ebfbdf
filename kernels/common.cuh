// What every kernel is written with: the two 16-bit types, tensor-core and asynchronous-copy instructions of sm_80,
// reductions whose order is fixed, and where the KV cache keeps a token and an adapter its rows. Includes nothing, so
// that NVRTC compiles it without an include path.
//
// Where the bits of a result must not depend on which kernel computed it, products and sums are spelled with the
// intrinsics __fmul_rn, __fadd_rn and __fmaf_rn, which the compiler neither fuses nor splits.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct bf16 {
    u16 bits;
};
struct f16 {
    u16 bits;
};
// e4m3: what a KV cache may be kept as. Without infinities; the largest number is 448.
struct fp8 {
    u8 bits;
};

// NVRTC has no constant for it.
#define MINUS_INFINITY __int_as_float(0xff800000)
constexpr u32 ALL_LANES = 0xffffffffu;

__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Two numbers in a word, the one of lower address in the low half.
template <class T> __device__ __forceinline__ u32 pack(float low, float high);
template <> __device__ __forceinline__ u32 pack<bf16>(float low, float high) {
    u32 word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
template <> __device__ __forceinline__ u32 pack<f16>(float low, float high) {
    u32 word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

template <class T> __device__ __forceinline__ float2 unpack(u32 word);
template <> __device__ __forceinline__ float2 unpack<bf16>(u32 word) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}
template <> __device__ __forceinline__ float2 unpack<f16>(u32 word) {
    float low, high;
    asm("{\n .reg .b16 a, b;\n mov.b32 {a, b}, %2;\n cvt.f32.f16 %0, a;\n cvt.f32.f16 %1, b;\n}"
        : "=f"(low), "=f"(high)
        : "r"(word));
    return {low, high};
}

// Eight numbers in f32.
struct Eight {
    float at[8];
};

// By value: through a reference each number would be loaded where it is converted, not in one vector.
template <class T> __device__ __forceinline__ Eight unpack8(uint4 words) {
    const float2 a = unpack<T>(words.x), b = unpack<T>(words.y), c = unpack<T>(words.z), d = unpack<T>(words.w);
    return {{a.x, a.y, b.x, b.y, c.x, c.y, d.x, d.y}};
}
template <class T> __device__ __forceinline__ Eight load8(const T* source) {
    return unpack8<T>(*reinterpret_cast<const uint4*>(source));
}
__device__ __forceinline__ Eight load8(const float* source) {
    const float4 a = *reinterpret_cast<const float4*>(source), b = *reinterpret_cast<const float4*>(source + 4);
    return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}
template <class T> __device__ __forceinline__ void store8(T* target, const Eight& x) {
    *reinterpret_cast<uint4*>(target) = make_uint4(pack<T>(x.at[0], x.at[1]), pack<T>(x.at[2], x.at[3]),
                                                   pack<T>(x.at[4], x.at[5]), pack<T>(x.at[6], x.at[7]));
}

// Byte `at` of a word as a number: its bits in place make it 2^-120 times as large, below the normal numbers too.
__device__ __forceinline__ float unpack_fp8(u32 word, int at) {
    const u32 top = word << (24 - 8 * at);
    return __fmul_rn(__uint_as_float((top & 0x80000000u) | (top & 0x7f000000u) >> 4), __uint_as_float(0x7b800000u));
}
// The nearest number, ties to even; what is larger than 448 becomes 448.
__device__ __forceinline__ u32 pack_fp8(float x) {
    const float size = fminf(fabsf(x), 448.0f);
    const u32 bits = __float_as_uint(size);
    // Three bits of fraction, and the exponent's bias of 7 for that of 127.
    const u32 normal = ((bits + 0x7ffffu + (bits >> 20 & 1)) >> 20) - (120u << 3);
    // Multiples of 2^-9, which a sum with 2^14 is rounded to.
    const u32 small = __float_as_uint(__fadd_rn(size, 16384.0f)) - 0x46800000u;
    return (size < 0.015625f ? small : normal) | (__float_as_uint(x) >> 24 & 0x80);
}
__device__ __forceinline__ Eight unpack8_fp8(uint2 words) {
    Eight x;
#pragma unroll
    for (int i = 0; i < 8; i++) x.at[i] = unpack_fp8(i < 4 ? words.x : words.y, i % 4);
    return x;
}
// The low or high two numbers of a word as bf16, which has them all: bits in place as above, and a product that is exact,
// to which minus zero is added because that keeps the sign of zero.
__device__ __forceinline__ u32 fp8_as_bf16(u32 word, bool is_high) {
    const u32 top = __byte_perm(word, 0, is_high ? 0x3424 : 0x1404);
    const u32 bits = (top & 0x80008000u) | (top >> 4 & 0x07f007f0u);
    u32 pair;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(bits), "r"(0x7b807b80u), "r"(0x80008000u));
    return pair;
}
__device__ __forceinline__ void store8_fp8(bf16* target, uint2 words) {
    *reinterpret_cast<uint4*>(target) = make_uint4(fp8_as_bf16(words.x, false), fp8_as_bf16(words.x, true),
                                                   fp8_as_bf16(words.y, false), fp8_as_bf16(words.y, true));
}
template <> __device__ __forceinline__ Eight load8(const fp8* source) {
    return unpack8_fp8(*reinterpret_cast<const uint2*>(source));
}
template <> __device__ __forceinline__ void store8(fp8* target, const Eight& x) {
    u32 words[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 8; i++) words[i / 4] |= pack_fp8(x.at[i]) << i % 4 * 8;
    *reinterpret_cast<uint2*>(target) = make_uint2(words[0], words[1]);
}

// What is read back where eight numbers are stored as T.
template <class T> __device__ __forceinline__ Eight as_stored(const Eight& x) {
    uint4 words;
    store8(reinterpret_cast<T*>(&words), x);
    return load8(reinterpret_cast<const T*>(&words));
}

// Four numbers, for what streams f32: 16 bytes a lane there, 8 in 16-bit types, and whole sectors in both. As they lie in
// memory they take no more registers than that.
template <class T> struct FourWords {
    uint2 words;
};
template <> struct FourWords<float> {
    float4 words;
};
template <class T> __device__ __forceinline__ FourWords<T> load4_words(const T* source) {
    return *reinterpret_cast<const FourWords<T>*>(source);
}
template <class T> __device__ __forceinline__ float4 unpack4(FourWords<T> x) {
    const float2 a = unpack<T>(x.words.x), b = unpack<T>(x.words.y);
    return make_float4(a.x, a.y, b.x, b.y);
}
template <> __device__ __forceinline__ float4 unpack4(FourWords<float> x) { return x.words; }
template <class T> __device__ __forceinline__ float4 load4(const T* source) { return unpack4(load4_words(source)); }

template <class T> __device__ __forceinline__ void store4(T* target, float4 x) {
    *reinterpret_cast<uint2*>(target) = make_uint2(pack<T>(x.x, x.y), pack<T>(x.z, x.w));
}
template <> __device__ __forceinline__ void store4<float>(float* target, float4 x) {
    *reinterpret_cast<float4*>(target) = x;
}

// Widens `len` numbers of 16 bits, a multiple of 4, and multiplies them; by whole warps, of whose `threads` threads this is
// one. A lane reads 16 bytes at a time and stores as many: half of what it has read and half of what its neighbour has, so
// that both together fill a sector in one store.
template <class T>
__device__ __forceinline__ void widen(float* target, const T* source, u64 len, float scale, u64 thread, u64 threads) {
    const int lane = threadIdx.x % 32;
    const bool is_odd = lane % 2 == 1;
    for (u64 i = thread * 8; i < len + lane * 8; i += threads * 8) {
        uint4 own = {};
        if (i + 8 <= len) {
            own = *reinterpret_cast<const uint4*>(source + i);
        } else if (i < len) {
            const uint2 last = *reinterpret_cast<const uint2*>(source + i);
            own.x = last.x, own.y = last.y;
        }
        const uint2 low = make_uint2(own.x, own.y), high = make_uint2(own.z, own.w);
        const uint2 kept = is_odd ? high : low, given = is_odd ? low : high;
        const uint2 got = make_uint2(__shfl_xor_sync(ALL_LANES, given.x, 1), __shfl_xor_sync(ALL_LANES, given.y, 1));
        const u64 first = is_odd ? i - 4 : i, second = first + 8;
        const float4 a = unpack4(FourWords<T>{is_odd ? got : kept}), b = unpack4(FourWords<T>{is_odd ? kept : got});
        if (first < len) store4(target + first, make_float4(a.x * scale, a.y * scale, a.z * scale, a.w * scale));
        if (second < len) store4(target + second, make_float4(b.x * scale, b.y * scale, b.z * scale, b.w * scale));
    }
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 2 log2(e). NVRTC warns of constants that a file does not use, not of macros.
#define TANH_SCALE 2.885390082f

// tanh(x / TANH_SCALE), as 1 - 2 / (2^x + 1): off by 5e-7 at the most, near zero too. What is capped goes through a softmax,
// to which numbers are as good as their differences.
__device__ __forceinline__ float tanh_scaled(float x) {
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(__fadd_rn(exp2_fast(x), 1.0f)));
    return __fmaf_rn(-2.0f, inverse, 1.0f);
}

// Sum over `width` neighbouring lanes, a power of two; every lane gets it.
__device__ __forceinline__ float sum_lanes(float x, int width) {
    for (int step = width / 2; step > 0; step /= 2) x = __fadd_rn(x, __shfl_xor_sync(ALL_LANES, x, step));
    return x;
}

// One step of the tensor cores: c[16][8] += a[16][16] b[16][8]. A lane holds of c: rows lane / 4 and lane / 4 + 8,
// columns lane % 4 * 2 and the next, as {low row, low row, high row, high row}.
template <class T> __device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1);
template <> __device__ __forceinline__ void mma<bf16>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <> __device__ __forceinline__ void mma<f16>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// Four 8x8 matrices of 16-bit numbers; lane `i` gives the address of row `i % 8` of matrix `i / 8`.
__device__ __forceinline__ void load_matrices(u32 (&out)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(u32 (&out)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
}

// Byte offset of 16-byte chunk `chunk` of row `row` in a tile with `CHUNKS` chunks a row. Chunks are exchanged so that
// the same chunk of eight rows in a run lies in eight different groups of banks.
template <int CHUNKS> __device__ __forceinline__ u32 swizzled(int row, int chunk) {
    constexpr int EXCHANGED = CHUNKS % 8 == 0 ? 8 : CHUNKS % 4 == 0 ? 4 : CHUNKS % 2 == 0 ? 2 : 1;
    constexpr int SHIFT = EXCHANGED == 8 ? 0 : EXCHANGED == 4 ? 1 : EXCHANGED == 2 ? 2 : 3;
    return (row * CHUNKS + (chunk ^ ((row >> SHIFT) & (EXCHANGED - 1)))) * 16;
}

// Queues a copy from global to shared memory: 16 bytes, or zeros where there is no source; `source` must be an address
// in the tensor either way.
__device__ __forceinline__ void copy16_async(u32 target, const void* source, bool exists) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(exists ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `PENDING` of the newest groups are under way.
template <int PENDING> __device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Dynamic shared memory of a kernel.
extern __shared__ __align__(16) u8 shared_bytes[];

// A block of the KV cache is [layer][kv_head][K tile | V tile], a tile [token][head_dim] of T. block_stride and
// layer_offset count numbers of T.
struct CacheShape {
    int num_kv_heads, head_dim, block_size;
    u64 block_stride, layer_offset;
};

// Numbers before a token in every tile, and before a head's tile of keys, or values, in every block.
__device__ __forceinline__ u64 token_offset(const CacheShape& shape, int slot) {
    const int block = slot / shape.block_size, token = slot % shape.block_size;
    return block * shape.block_stride + static_cast<u64>(token) * shape.head_dim;
}
__device__ __forceinline__ u64 tile_offset(const CacheShape& shape, int kv_head, bool is_value) {
    const u64 tile = static_cast<u64>(shape.block_size) * shape.head_dim;
    return shape.layer_offset + (2 * kv_head + is_value) * tile;
}

// Where the cache keeps a token's key, or value, of one head.
template <class T>
__device__ __forceinline__ T* cache_row(T* blocks, const CacheShape& shape, int slot, int kv_head, bool is_value) {
    return blocks + token_offset(shape, slot) + tile_offset(shape, kv_head, is_value);
}

// Lanes of a head in kernels that rotate: the power of two not below head_dim / 16. A lane has 8 numbers of the lower
// half and their partners in the upper.
__device__ __forceinline__ int rotation_lanes(int head_dim) {
    const int wanted = head_dim / 16;
    return wanted <= 1 ? 1 : 1 << (32 - __clz(wanted - 1));
}

constexpr int MAX_HEAD_DIM = 256;

// A row of f32 that all heads of a block need, in shared memory. Vectors of four are exchanged so that the eight numbers
// of each of eight neighbouring lanes lie in other banks.
struct SharedRow {
    float4 vectors[MAX_HEAD_DIM / 4];

    static __device__ __forceinline__ int place(int vector) { return vector ^ (vector >> 3 & 1); }
    // By threads [0, block) of a block; who reads waits at a barrier.
    __device__ __forceinline__ void fill(const float* source, int head_dim, int thread) {
        for (int i = thread; i < head_dim / 4; i += blockDim.x) vectors[place(i)] = load4(source + 4 * i);
    }
    // Numbers [first, first + 8).
    __device__ __forceinline__ Eight load8(int first) const {
        const float4 a = vectors[place(first / 4)], b = vectors[place(first / 4 + 1)];
        return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
    }
};

// Turns eight pairs of numbers; `sign` is 1, or -1 to turn backwards.
__device__ __forceinline__ void rotate(Eight& low, Eight& high, const Eight& cos, const Eight& sin, float sign) {
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const float a = low.at[j], b = high.at[j], sine = __fmul_rn(sin.at[j], sign);
        low.at[j] = __fmaf_rn(a, cos.at[j], -__fmul_rn(b, sine));
        high.at[j] = __fmaf_rn(b, cos.at[j], __fmul_rn(a, sine));
    }
}

// Where the rows of a matrix lie in an adapter's pages.
struct PagedRows {
    int first_slot, per_page;
};

// An adapter's update of some columns of a projection's output: a [rank, inputs], b [rank, num_columns], transposed.
struct LoraFactors {
    const u8* arena;
    const int* pages;
    PagedRows a, b;
    float scaling;
    int rank, first_column, num_columns;
};

// An update and what it is added to.
struct LoraPiece : LoraFactors {
    int start, end;  // entries
    int shrunk_at, first_block;
};

// Row `row` of a matrix with so many columns.
template <class T>
__device__ __forceinline__ const T* find_row(const LoraFactors& lora, const PagedRows& rows, int row, int num_columns,
                                             u64 page_bytes) {
    const int slot = rows.first_slot + row, page = slot / rows.per_page;
    const u8* start = lora.arena + static_cast<u64>(lora.pages[page]) * page_bytes;
    return reinterpret_cast<const T*>(start) + static_cast<u64>(slot - page * rows.per_page) * num_columns;
}
