// Embedding: out[t] = scale * table[ids[t]].
//
//   out   [num_tokens, hidden] f32, the residual stream
//   table [vocab, hidden] T
//   ids   [num_tokens] i32, each in [0, vocab)
//
// hidden is a multiple of 8. Grid (num_tokens), block 256: a block copies a row in vectors of 4.
// Equals `CpuBackend::embed` exactly.

#include "common.cuh"

template <class T>
__device__ __forceinline__ void embed(float* out, const T* table, const int* ids, int hidden, float scale) {
    const u64 row = blockIdx.x;
    const T* source = table + static_cast<u64>(ids[row]) * hidden;
    for (int i = threadIdx.x * 4; i < hidden; i += blockDim.x * 4) {
        const float4 x = load4(source + i);
        store4(out + row * hidden + i, make_float4(x.x * scale, x.y * scale, x.z * scale, x.w * scale));
    }
}

extern "C" __global__ void __launch_bounds__(256)
embed_bf16(float* out, const bf16* table, const int* ids, int hidden, float scale) {
    embed(out, table, ids, hidden, scale);
}

extern "C" __global__ void __launch_bounds__(256)
embed_f16(float* out, const f16* table, const int* ids, int hidden, float scale) {
    embed(out, table, ids, hidden, scale);
}
