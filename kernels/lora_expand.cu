// The second half of low-rank updates of a projection's output, for all adapters of a step at once, behind
// lora_shrink.cu:
//
//   out[row] += sum over pieces of shrunk[row, at ..] b        for the rows that have any
//
//   out     [num_tokens, num_outputs] T; what the projection gave
//   shrunk, table, rows    as lora_shrink left and took them
//
// num_outputs and a piece's first_column and num_columns are multiples of 8. A number of `out` to which nothing is
// added is not written.
//
// A piece's products are a chain of mma.m16n8k16 steps in order of rank, begun at zero; pieces are added up in order,
// in f32, and the sum is added to `out` and rounded once. Shrunk numbers, and b in f16, are taken as sums of two bf16:
// 16 bits of a shrunk number count, and none is too large or too small. What is not a row's own is never added to it,
// so its bits depend neither on other rows nor on the tile. Equals `cpu::add_lora` on factors rounded to T, with `out`
// rounded to T; sums are in another order.
//
// A block has 64 columns for each warp and goes down block_rows rows in strips of 16. While the pieces stay the same
// and have no more ranks than there is room for, b stays in shared memory, so that it is read once for the block.
// block_rows is a multiple of 16, 512 at the most, and 16 where there are more than MAX_PIECES pieces, for which sums
// wait in registers.
//   _w4, _w8: warps of a block; there is room for 64 and for 32 ranks.
// Grid (ceil(num_rows / block_rows), ceil(num_outputs / (64 * warps))), block 32 * warps.
// b, `out` and shrunk numbers travel through rings of cp.async, chunks of 16 bytes exchanged against bank conflicts.

#include "common.cuh"
#include "lora_expand.cuh"

template <class T, int WARPS, int B_SLOTS>
__device__ __forceinline__ void lora_expand(T* out, const float* shrunk, const LoraPiece* table, const int* rows,
                                            int num_outputs, int first_row, int num_rows, int shrunk_stride,
                                            int num_pieces, int block_rows, u64 page_bytes) {
    __shared__ Shared shared;
    Expand<T, WARPS, B_SLOTS> block = {out, shrunk, rows, num_outputs, first_row, shrunk_stride, page_bytes, shared};
    block.begin(num_rows, block_rows);
    const bool is_only_batch = num_pieces <= MAX_PIECES;
    for (int first = 0; first < num_pieces; first += MAX_PIECES) {
        block.load_pieces(table + first, min(MAX_PIECES, num_pieces - first));
        block.walk_runs(is_only_batch, NoneOfB());
    }
    if (!is_only_batch) block.finish(0);
}

LORA_EXPAND(bf16, w4, 4, 4, 2, )
LORA_EXPAND(bf16, w8, 8, 2, 1, )
LORA_EXPAND(f16, w4, 4, 4, 2, )
LORA_EXPAND(f16, w8, 8, 2, 1, )
