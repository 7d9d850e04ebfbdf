// Choosing a token from each row of logits.
//
//   logits [num_rows, vocab] f32
//   out    [num_rows] i32
//
// argmax: the lowest index of the largest number; NaN never wins, a row of nothing else gives 0. Equals `cpu::argmax`.
//
// sample: temperature, then top-k, then top-p and min-p on what is left, then one draw; temperature <= 0 is argmax, and
//   top_k 0, top_p 1, min_p 0 cut nothing. All parameters are [num_rows]. Row r has the mask masks[mask_of[r]], or all
//   its tokens where mask_of[r] is negative or mask_of null; a logit whose bit is not set counts as minus infinity. A
//   draw is a function of (seed, index), the host sampler's own. Equals `engine::sampling::Sampler::choose` in the tokens that are kept; the draw walks them in
//   order of id, which is the host's order, too, where neither top-p nor min-p is asked for. Weights may differ in
//   their last bits, and one below 2^-40 of the largest counts as none.
//
// Grid (num_rows), block 1024. Probabilities are summed as whole numbers in units of 2^-40 of the largest, so that sums
// do not depend on the order in which threads add. A cut is found digit by digit from a histogram of the weights' bits,
// 11, 10 and 10 of them; equal weights at the cut are kept in order of id.

#include "common.cuh"

constexpr int THREADS = 1024;
constexpr int NUM_WARPS = THREADS / 32;
constexpr int NUM_BINS = 2048;

struct Largest {
    float value;
    int index;
};

constexpr int NO_INDEX = 0x7fffffff;

__device__ __forceinline__ Largest larger(Largest a, Largest b) {
    return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a;
}

__device__ __forceinline__ Largest larger_in_warp(Largest best) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        const float value = __shfl_xor_sync(ALL_LANES, best.value, step);
        best = larger(best, {value, __shfl_xor_sync(ALL_LANES, best.index, step)});
    }
    return best;
}

// A row of logits and which of its tokens may be drawn: a bit each, or all.
struct Row {
    const float* logits;
    const u32* mask;
    int vocab;

    // Bit 0 says whether `id` may be drawn, the bits above say it of those behind it.
    __device__ __forceinline__ u32 allowed_from(int id) const {
        return mask == nullptr ? ALL_LANES : mask[id / 32] >> id % 32;
    }
    __device__ __forceinline__ float logit(int id) const {
        return allowed_from(id) & 1 ? logits[id] : MINUS_INFINITY;
    }
    __device__ __forceinline__ float4 four(int id) const {
        const float4 x = load4(logits + id);
        const u32 allowed = allowed_from(id);
        return make_float4(allowed & 1 ? x.x : MINUS_INFINITY, allowed & 2 ? x.y : MINUS_INFINITY,
                           allowed & 4 ? x.z : MINUS_INFINITY, allowed & 8 ? x.w : MINUS_INFINITY);
    }
};

// Shows all logits of a row to its block, each to one thread, in no order: `see(id, logit)`. Loads of two vectors are under way
// at a time.
template <class See> __device__ __forceinline__ void visit(const Row& row, See see) {
    // Rows begin on 16 bytes when their length is a multiple of 4.
    if (row.vocab % 4 != 0) {
        for (int id = threadIdx.x; id < row.vocab; id += THREADS) see(id, row.logit(id));
        return;
    }
    constexpr int STEP = THREADS * 4;
    for (int first = threadIdx.x * 4; first < row.vocab; first += 2 * STEP) {
        const int second = first + STEP;
        const bool has_second = second < row.vocab;
        const float4 x = row.four(first), y = row.four(has_second ? second : first);
        see(first, x.x), see(first + 1, x.y), see(first + 2, x.z), see(first + 3, x.w);
        if (has_second) see(second, y.x), see(second + 1, y.y), see(second + 2, y.z), see(second + 3, y.w);
    }
}

// The largest number of a row; every thread gets it.
__device__ __forceinline__ Largest largest_of_row(const Row& row) {
    __shared__ Largest warp_best[NUM_WARPS];
    Largest best = {MINUS_INFINITY, NO_INDEX};
    // Rows begin on 16 bytes when their length is a multiple of 4. Here more loads are under way than in `visit`.
    if (row.vocab % 4 == 0) {
#pragma unroll 4
        for (int i = threadIdx.x * 4; i < row.vocab; i += THREADS * 4) {
            const float4 x = row.four(i);
            best = larger(larger(best, {x.x, i}), {x.y, i + 1});
            best = larger(larger(best, {x.z, i + 2}), {x.w, i + 3});
        }
    } else {
        for (int i = threadIdx.x; i < row.vocab; i += THREADS) best = larger(best, {row.logit(i), i});
    }
    best = larger_in_warp(best);
    if (threadIdx.x % 32 == 0) warp_best[threadIdx.x / 32] = best;
    __syncthreads();
    best = larger_in_warp(warp_best[threadIdx.x % 32]);
    return {best.value, best.index == NO_INDEX ? 0 : best.index};
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) argmax(int* out, const float* logits, int vocab) {
    const Largest best = largest_of_row({logits + static_cast<u64>(blockIdx.x) * vocab, nullptr, vocab});
    if (threadIdx.x == 0) out[blockIdx.x] = best.index;
}

// The weights exp((logit - largest) / temperature) of a row, as the bits of an f32: for such numbers bits and weights
// have one order.
struct Weights {
    Row row;
    float largest, temperature;

    __device__ __forceinline__ u32 bits(int id) const { return bits_of(row.logit(id)); }
    __device__ __forceinline__ u32 bits_of(float logit) const {
        constexpr float LOG2_E = 1.4426950408889634f;
        const float exponent = __fdiv_rn(__fadd_rn(logit, -largest), temperature);
        const float weight = exp2_fast(__fmul_rn(exponent, LOG2_E));
        return weight > 0.0f ? __float_as_uint(weight) : 0;  // A NaN has none.
    }
    static __device__ __forceinline__ u64 units(u32 bits) {
        constexpr float UNITS = 1099511627776.0f;  // 2^40
        return static_cast<u64>(__uint_as_float(bits) * UNITS);
    }
};

// What is kept: weights above `bits`, and of those that equal it the first `ties` in order of id.
struct Cut {
    u32 bits;
    u64 ties;
};

__device__ __forceinline__ u64 sum_warp(u64 x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}

// Sum over this lane and those below.
__device__ __forceinline__ u64 scan_warp(u64 x) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const u64 below = __shfl_up_sync(ALL_LANES, x, step);
        if (threadIdx.x % 32 >= step) x += below;
    }
    return x;
}

// Sums by digit, in two words each: shared memory adds 32 bits at once, and 64 in a loop that ends when nobody else adds to
// the same sum, which for rows of like weights is never.
struct Histogram {
    u32 low[NUM_BINS], high[NUM_BINS];
    u64 warp_sums[NUM_WARPS];
    u64 rest;
    u32 bin;

    __device__ __forceinline__ void clear() {
        for (int i = threadIdx.x; i < NUM_BINS; i += THREADS) low[i] = high[i] = 0;
    }
    // Whoever adds what makes a low word overflow carries.
    __device__ __forceinline__ void add(u32 to, u64 units) {
        const u32 own = static_cast<u32>(units), before = atomicAdd(&low[to], own);
        const u32 carried = static_cast<u32>(units >> 32) + (before + own < own);
        if (carried > 0) atomicAdd(&high[to], carried);
    }
    __device__ __forceinline__ u64 sum(int of) const { return static_cast<u64>(high[of]) << 32 | low[of]; }
};

// The share `share` (in [0, 1), 40 binary digits of it) of `total`, rounded up, 1 at least.
__device__ __forceinline__ u64 share_of(u64 total, float share) {
    const u64 digits = Weights::units(__float_as_uint(fmaxf(share, 0.0f)));
    const u64 low = total * digits, high = __umul64hi(total, digits);
    const u64 whole = high << 24 | low >> 40;
    const u64 rounded = whole + ((low & ((1ull << 40) - 1)) != 0);
    return rounded == 0 ? 1 : rounded;
}

// Counts, or sums the weights, of what is kept and whose bits above `shift + num_bits` are `prefix`, by the `num_bits`
// bits above `shift`.
template <bool BY_WEIGHT>
__device__ __forceinline__ void fill(Histogram& histogram, const Weights& weights, Cut cut, u32 prefix, int shift,
                                     int num_bits) {
    histogram.clear();
    __syncthreads();
    const u32 digit = (1u << num_bits) - 1;
    visit(weights.row, [&](int, float logit) {
        const u32 bits = weights.bits_of(logit);
        const u64 own = BY_WEIGHT ? Weights::units(bits) : 1;
        if (own > 0 && bits > cut.bits && bits >> (shift + num_bits) == prefix) {
            histogram.add(bits >> shift & digit, own);
        }
    });
    if (threadIdx.x == 0 && cut.ties > 0 && cut.bits >> (shift + num_bits) == prefix) {
        const u64 each = BY_WEIGHT ? Weights::units(cut.bits) : 1;
        histogram.add(cut.bits >> shift & digit, cut.ties * each);
    }
    __syncthreads();
}

// Sum of all bins; each warp leaves the sum of its 64.
__device__ __forceinline__ u64 sum_bins(Histogram& histogram) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first = warp * 64 + lane * 2;
    const u64 sum = sum_warp(histogram.sum(first) + histogram.sum(first + 1));
    if (lane == 0) histogram.warp_sums[warp] = sum;
    __syncthreads();
    return sum_warp(histogram.warp_sums[lane]);
}

// Finds the bin in which the sum from the highest bin down reaches `wanted`, which is not above the sum of all, and
// what is wanted of that bin. Needs the warp sums.
__device__ __forceinline__ void find_bin(Histogram& histogram, u64 wanted) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = warp * 64 + lane * 2;
    const u64 higher_warps = sum_warp(lane > warp ? histogram.warp_sums[lane] : 0);
    const u64 low = histogram.sum(first), high = histogram.sum(first + 1);
    const u64 higher_lanes = histogram.warp_sums[warp] - scan_warp(low + high);
    const u64 above_high = higher_warps + higher_lanes, above_low = above_high + high;
    if (above_high < wanted && wanted <= above_low) {
        histogram.bin = first + 1, histogram.rest = wanted - above_high;
    } else if (above_low < wanted && wanted <= above_low + low) {
        histogram.bin = first, histogram.rest = wanted - above_low;
    }
    __syncthreads();
}

// Narrows `cut` to the largest `top_k` weights, or to the largest that together reach a share `top_p`.
template <bool BY_WEIGHT>
__device__ __forceinline__ Cut narrow(Histogram& histogram, const Weights& weights, Cut cut, int top_k, float top_p) {
    u32 found = 0;
    u64 wanted = 0;
    for (int level = 0; level < 3; level++) {
        const int shift = level == 0 ? 20 : level == 1 ? 10 : 0, num_bits = level == 0 ? 11 : 10;
        fill<BY_WEIGHT>(histogram, weights, cut, found, shift, num_bits);
        const u64 total = sum_bins(histogram);
        if (level == 0) {
            wanted = BY_WEIGHT ? share_of(total, top_p) : static_cast<u64>(top_k);
            if (wanted >= total) return cut;
        }
        find_bin(histogram, wanted);
        found = found << num_bits | histogram.bin;
        wanted = histogram.rest;
    }
    const u64 each = BY_WEIGHT ? Weights::units(found) : 1;
    return {found, (wanted + each - 1) / each};
}

// A number in [0, 2^53) that depends on its arguments alone: two steps of SplitMix64.
__device__ __forceinline__ u64 scramble(u64 state) {
    u64 z = state + 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}
__device__ __forceinline__ u64 draw(u64 seed, u64 index) { return scramble(scramble(seed) ^ index) >> 11; }

// Weight of the tokens that are kept of 32 neighbours, one a lane, which has the bits of its weight, or none; `ties` says how
// many equal weights may still be kept.
__device__ __forceinline__ u64 kept_units(u32 bits, Cut cut, bool exists, u64& ties) {
    const bool is_tie = cut.ties > 0 && exists && bits == cut.bits;
    const u32 all_ties = __ballot_sync(ALL_LANES, is_tie);
    const u64 rank = __popc(all_ties & ((1u << threadIdx.x % 32) - 1));
    const bool is_kept = bits > cut.bits || (is_tie && rank < ties);
    const u64 count = __popc(all_ties);
    ties = count < ties ? ties - count : 0;
    return is_kept ? Weights::units(bits) : 0;
}

// The token at `drawn` / 2^53 of the kept weight, in order of id. Each warp has a run of ids.
__device__ __forceinline__ void pick(int* out, const Weights& weights, Cut cut, u64 drawn) {
    __shared__ u64 sums[NUM_WARPS], num_ties[NUM_WARPS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int run = ceil_div(ceil_div(weights.row.vocab, NUM_WARPS), 32) * 32;
    const int begin = min(warp * run, weights.row.vocab), end = min(begin + run, weights.row.vocab);
    u64 sum = 0, equal = 0;
#pragma unroll 4
    for (int id = begin + lane; id < end; id += 32) {
        const u32 bits = weights.bits(id);
        if (bits > cut.bits) sum += Weights::units(bits);
        equal += cut.ties > 0 && bits == cut.bits;
    }
    sum = sum_warp(sum), equal = sum_warp(equal);
    if (lane == 0) sums[warp] = sum, num_ties[warp] = equal;
    __syncthreads();
    // Lane by lane the runs of all warps: how many ties each may keep, and where it begins in the sum.
    const u64 ties_before = scan_warp(num_ties[lane]) - num_ties[lane];
    const u64 ties_left = ties_before < cut.ties ? cut.ties - ties_before : 0;
    const u64 run_sum = sums[lane] + min(num_ties[lane], ties_left) * Weights::units(cut.bits);
    const u64 run_end = scan_warp(run_sum);
    const u64 total = __shfl_sync(ALL_LANES, run_end, 31);
    const u64 position = __umul64hi(total, drawn) << 11 | total * drawn >> 53;
    const u32 reached = __ballot_sync(ALL_LANES, position < run_end);
    if (__ffs(reached) - 1 != warp) return;
    u64 before = __shfl_sync(ALL_LANES, run_end - run_sum, warp), ties = __shfl_sync(ALL_LANES, ties_left, warp);
    const auto bits_at = [&](int id) { return id < end ? weights.bits(id) : 0; };
    u32 next_bits = bits_at(begin + lane);
    for (int id = begin + lane; id - lane < end; id += 32) {
        const u32 bits = next_bits;
        next_bits = bits_at(id + 32);
        const u64 units = kept_units(bits, cut, id < end, ties);
        const u64 after = before + scan_warp(units);
        if (units > 0 && position < after && position >= after - units) out[blockIdx.x] = id;
        before = __shfl_sync(ALL_LANES, after, 31);
        if (position < before) return;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
sample(int* out, const float* logits, const float* temperature, const int* top_k, const float* top_p,
       const float* min_p, const u64* seeds, const u64* indices, const int* mask_of, const u32* masks, int vocab) {
    __shared__ Histogram histogram;
    const int row = blockIdx.x, mask = mask_of == nullptr ? -1 : mask_of[row];
    const u32* row_mask = mask < 0 ? nullptr : masks + static_cast<u64>(mask) * ceil_div(vocab, 32);
    const Row row_logits = {logits + static_cast<u64>(row) * vocab, row_mask, vocab};
    const Largest best = largest_of_row(row_logits);
    // Without a finite largest number there are no weights.
    if (temperature[row] <= 0.0f || best.value == MINUS_INFINITY || best.value == -MINUS_INFINITY) {
        if (threadIdx.x == 0) out[row] = best.index;
        return;
    }
    const Weights weights = {row_logits, best.value, temperature[row]};
    Cut cut = {0, 0};
    if (top_k[row] > 0 && top_k[row] < vocab) cut = narrow<false>(histogram, weights, cut, top_k[row], 1.0f);
    // The largest weight is 1, so min-p is a weight.
    const u32 least = __float_as_uint(fminf(fmaxf(min_p[row], 0.0f), 1.0f));
    if (top_p[row] < 1.0f) cut = narrow<true>(histogram, weights, cut, 0, top_p[row]);
    if (least > cut.bits) cut = {least - 1, 0};
    pick(out, weights, cut, draw(seeds[row], indices[row]));
}
