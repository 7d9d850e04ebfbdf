// Embedding: out[t] = scale * table[ids[t]].
//
//   out   [num_tokens, hidden] f32, the residual stream
//   table [vocab, hidden] T
//   ids   [num_tokens] i32, each in [0, vocab)
//
// hidden is a multiple of 8. Grid (num_tokens), block 256: a block has a row.
// Equals `CpuBackend::embed` exactly.

#include "common.cuh"

template <class T>
__device__ __forceinline__ void embed(float* out, const T* table, const int* ids, int hidden, float scale) {
    const u64 row = blockIdx.x, width = hidden;
    widen(out + row * width, table + ids[row] * width, width, scale, threadIdx.x, blockDim.x);
}

extern "C" __global__ void __launch_bounds__(256)
embed_bf16(float* out, const bf16* table, const int* ids, int hidden, float scale) {
    embed(out, table, ids, hidden, scale);
}

extern "C" __global__ void __launch_bounds__(256)
embed_f16(float* out, const f16* table, const int* ids, int hidden, float scale) {
    embed(out, table, ids, hidden, scale);
}
