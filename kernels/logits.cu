// What requests change in rows of logits before tokens are drawn from them, and what they want to know of these rows.
//
//   logits  [num_rows, vocab] f32
//   edits   [num_edits] RowEdit, of different rows
//   entries [*] Entry: the biases of an edit, then its counts; an id at most once among each
//
// edit_logits: adds biases, then penalises what has occurred, as `engine::sampling` does it on the host, operation by
//   operation. Each entry is left with the logit that was there, which restore_logits puts back, last things first.
//   Grid (num_edits), block 256.
//
// logprobs: for each asked row what the log-probabilities of its token and of its likeliest ones follow from. The order
//   of sums is that of `cpu::log_sum_exp` and so is the exponential, so that the host's logarithm gives the host's bits.
//   Grid (num_asked), block 1024.

#include "common.cuh"

struct RowEdit {
    int row, first_entry, num_biases, num_counts;
    float repetition_penalty, frequency_penalty, presence_penalty;
};

// A bias, or how often the token occurs in the output (0: in the prompt alone).
struct Entry {
    int id;
    u32 value;
};

// Gives the entry the logit that it replaces.
__device__ __forceinline__ void replace(float* row, Entry* entry, float logit) {
    entry->value = __float_as_uint(row[entry->id]);
    row[entry->id] = logit;
}

__device__ __forceinline__ float penalised(float logit, const RowEdit& edit, u32 count) {
    logit = logit > 0.0f ? __fdiv_rn(logit, edit.repetition_penalty) : __fmul_rn(logit, edit.repetition_penalty);
    if (count == 0) return logit;
    const float often = __fmul_rn(edit.frequency_penalty, __uint2float_rn(count));
    return __fadd_rn(logit, -__fadd_rn(often, edit.presence_penalty));
}

extern "C" __global__ void edit_logits(float* logits, const RowEdit* edits, Entry* entries, int vocab) {
    const RowEdit edit = edits[blockIdx.x];
    float* row = logits + static_cast<u64>(edit.row) * vocab;
    Entry *biases = entries + edit.first_entry, *counts = biases + edit.num_biases;
    for (int i = threadIdx.x; i < edit.num_biases; i += blockDim.x) {
        replace(row, biases + i, __fadd_rn(row[biases[i].id], __uint_as_float(biases[i].value)));
    }
    __syncthreads();
    for (int i = threadIdx.x; i < edit.num_counts; i += blockDim.x) {
        replace(row, counts + i, penalised(row[counts[i].id], edit, counts[i].value));
    }
}

extern "C" __global__ void restore_logits(float* logits, const RowEdit* edits, const Entry* entries, int vocab) {
    const RowEdit edit = edits[blockIdx.x];
    float* row = logits + static_cast<u64>(edit.row) * vocab;
    const Entry *biases = entries + edit.first_entry, *counts = biases + edit.num_biases;
    for (int i = threadIdx.x; i < edit.num_counts; i += blockDim.x) row[counts[i].id] = __uint_as_float(counts[i].value);
    __syncthreads();
    for (int i = threadIdx.x; i < edit.num_biases; i += blockDim.x) row[biases[i].id] = __uint_as_float(biases[i].value);
}

constexpr int THREADS = 1024;
constexpr int NUM_WARPS = THREADS / 32;
constexpr int MAX_TOP = 20;

// A row that is asked about, and how many of its likeliest tokens.
struct Asked {
    int row, num_top;
};

struct Logprobs {
    double total;  // Sum of exp(logit - most).
    float most;    // The largest logit; minus infinity where there is no number.
    float chosen;  // The token's logit,
    int rank;      // and one more than there are larger ones.
    int unused;
    int ids[MAX_TOP];
    float values[MAX_TOP];
};

// Whole numbers in the order of logits, of equals the lower id first; NaN comes last. None is 0.
__device__ __forceinline__ u64 key_of(float logit, int id) {
    const u32 bits = __float_as_uint(__fadd_rn(logit, 0.0f));  // There is one zero.
    const u32 ordered = logit != logit ? 0 : bits >> 31 ? ~bits : bits | 1u << 31;
    return static_cast<u64>(ordered) << 32 | static_cast<u32>(~id);
}
__device__ __forceinline__ int id_of(u64 key) { return ~static_cast<u32>(key); }

__device__ __forceinline__ u64 largest_in_warp(u64 key) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) key = max(key, __shfl_xor_sync(ALL_LANES, key, step));
    return key;
}

// The largest of the block's; every thread gets it.
__device__ __forceinline__ u64 largest_in_block(u64 key) {
    __shared__ u64 warp_keys[NUM_WARPS];
    key = largest_in_warp(key);
    __syncthreads();  // The last one has been read.
    if (threadIdx.x % 32 == 0) warp_keys[threadIdx.x / 32] = key;
    __syncthreads();
    return largest_in_warp(warp_keys[threadIdx.x % 32]);
}

// e^x for x <= 0 as `cpu::exp` has it; 0 for NaN.
__device__ __forceinline__ float exp_exact(float x) {
    constexpr float LOG2_E = 1.4426950408889634f, ROUND = 12582912.0f, LN2_HIGH = 0.6933594f, LN2_LOW = -2.1219444e-4f;
    constexpr float FIRST = 1.9875691e-4f, REST[] = {1.3982e-3f, 8.333452e-3f, 4.1665796e-2f, 1.6666665e-1f, 5e-1f};
    if (!(x >= -87.0f)) return 0.0f;
    const float shift = __fmaf_rn(x, LOG2_E, ROUND), n = __fadd_rn(shift, -ROUND);
    const float r = __fmaf_rn(n, -LN2_LOW, __fmaf_rn(n, -LN2_HIGH, x));
    float sum = FIRST;
#pragma unroll
    for (float coefficient : REST) sum = __fmaf_rn(sum, r, coefficient);
    const float power = __fadd_rn(__fmaf_rn(sum, __fmul_rn(r, r), r), 1.0f);
    return __int_as_float(__float_as_int(power) + (__float_as_int(shift) << 23));
}

// Four neighbouring logits of a row, NaN behind its end. Rows begin on 16 bytes when their length is a multiple of 4.
__device__ __forceinline__ float4 four(const float* row, int id, int vocab) {
    if (vocab % 4 == 0) return load4(row + id);
    const float none = __int_as_float(0x7fffffff);
    return make_float4(row[id], id + 1 < vocab ? row[id + 1] : none, id + 2 < vocab ? row[id + 2] : none,
                       id + 3 < vocab ? row[id + 3] : none);
}

// The largest key of four neighbours that is below `last`.
__device__ __forceinline__ u64 best_of(float4 x, int id, u64 last) {
    const u64 keys[4] = {key_of(x.x, id), key_of(x.y, id + 1), key_of(x.z, id + 2), key_of(x.w, id + 3)};
    u64 best = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) best = keys[i] < last ? max(best, keys[i]) : best;
    return best;
}

// Sum of exp(logit - most) over a row, in thread 0. Strips of 1024 are summed in f32 in 16 lanes, four to a thread, the
// sums of strips one after the other in f64; what is missing at the end adds nothing.
__device__ __forceinline__ double sum_of_exp(const float* row, int vocab, float most) {
    constexpr int STRIP = 1024, LANES = 16, STRIP_THREADS = 4, NUM_STRIPS = THREADS / STRIP_THREADS;
    __shared__ float strip_sums[NUM_STRIPS];
    const int strip = threadIdx.x / STRIP_THREADS, lane = threadIdx.x % STRIP_THREADS * 4;
    double total = 0.0;
    for (int first = 0; first < vocab; first += NUM_STRIPS * STRIP) {
        const int begin = first + strip * STRIP, end = min(begin + STRIP, vocab);
        float sums[4] = {};
#pragma unroll 4
        for (int id = begin + lane; id < end; id += LANES) {
            const float4 x = four(row, id, vocab);
            sums[0] = __fadd_rn(sums[0], exp_exact(__fadd_rn(x.x, -most)));
            sums[1] = __fadd_rn(sums[1], exp_exact(__fadd_rn(x.y, -most)));
            sums[2] = __fadd_rn(sums[2], exp_exact(__fadd_rn(x.z, -most)));
            sums[3] = __fadd_rn(sums[3], exp_exact(__fadd_rn(x.w, -most)));
        }
#pragma unroll
        for (int i = 0; i < 4; i++) sums[i] = sum_lanes(sums[i], STRIP_THREADS);
        const float sum = __fadd_rn(__fadd_rn(sums[0], sums[2]), __fadd_rn(sums[1], sums[3]));
        if (lane == 0) strip_sums[strip] = sum;
        __syncthreads();
        if (threadIdx.x == 0) {
            for (int i = 0; i < NUM_STRIPS; i++) total = __dadd_rn(total, strip_sums[i]);
        }
        __syncthreads();
    }
    return total;
}

// The next best of thread `owner` behind `last`. A thread has every 1024th four of the row; its warp looks together.
__device__ __forceinline__ u64 next_of(const float* row, int vocab, int owner, u64 last) {
    u64 next = 0;
    for (int id = (owner + threadIdx.x % 32 * THREADS) * 4; id < vocab; id += 32 * THREADS * 4) {
        next = max(next, best_of(four(row, id, vocab), id, last));
    }
    return largest_in_warp(next);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
logprobs(Logprobs* out, const float* logits, const int* tokens, const Asked* asked, int vocab) {
    const Asked question = asked[blockIdx.x];
    const float* row = logits + static_cast<u64>(question.row) * vocab;
    Logprobs* answer = out + blockIdx.x;
    const float chosen = row[tokens[question.row]];
    u64 own = 0;
    int num_larger = 0;
#pragma unroll 4
    for (int id = threadIdx.x * 4; id < vocab; id += THREADS * 4) {
        const float4 x = four(row, id, vocab);
        own = max(own, best_of(x, id, ~0ull));
        num_larger += (x.x > chosen) + (x.y > chosen) + (x.z > chosen) + (x.w > chosen);
    }
    u64 best = largest_in_block(own);
    const float most = best >> 32 == 0 ? MINUS_INFINITY : row[id_of(best)];
    const double total = sum_of_exp(row, vocab, most);
    __shared__ int rank;
    if (threadIdx.x == 0) rank = 1;
    __syncthreads();
    atomicAdd(&rank, num_larger);
    for (int place = 0; place < min(question.num_top, min(vocab, MAX_TOP)); place++) {
        best = largest_in_block(own);
        const int id = id_of(best), owner = id / 4 % THREADS;
        if (threadIdx.x == 0) answer->ids[place] = id, answer->values[place] = row[id];
        if (owner / 32 != threadIdx.x / 32) continue;
        const u64 next = next_of(row, vocab, owner, best);
        if (owner == threadIdx.x) own = next;
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    answer->total = total, answer->most = most, answer->chosen = chosen, answer->rank = rank, answer->unused = 0;
}
