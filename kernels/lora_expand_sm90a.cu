// The second half of low-rank updates for steps of many rows, for Hopper, by clusters: arguments, results and bits as
// in lora_expand.cu, for no more than MAX_PIECES pieces.
//
// Eight blocks that have the same columns are a cluster. Where the pieces with any of these columns have no more than
// eight stages of 16 ranks together, each block reads b for 64 of the 512 columns, and they copy from each other what
// they lack: so b is read once for eight blocks, which may then have few rows each and be many. Otherwise a block
// brings b for itself, as in lora_expand.cu.
//   _c8: warps of a block; there is room for 128 ranks.
// Grid (ceil(num_rows / block_rows) filled up to a multiple of 8, ceil(num_outputs / 512)), block 256. This file is
// compiled for compute capability 9.0 alone.

#include "common.cuh"
#include "cluster.cuh"
#include "lora_expand.cuh"

// What lies in the warps' slots of b before any strip is looked at: all of it, if there is room.
struct AllOfB {
    static constexpr bool IS_NONE = false;
    int first_slot;  // of the piece of the lane's number
    int num_slots;   // of all pieces
    bool has_room;

    __device__ __forceinline__ bool is_there() const { return has_room; }
    __device__ __forceinline__ int slot(const Cursor& at) const {
        return __shfl_sync(ALL_LANES, first_slot, at.piece()) + at.rank / STAGE_RANKS;
    }
};

// Gives stages of the pieces that have any of the block's columns slots in order: the same in all blocks of a cluster,
// whatever rows they have.
template <class Block> __device__ __forceinline__ AllOfB number_slots(const Block& block, int room) {
    const int lane = threadIdx.x % 32, first_column = blockIdx.y * Block::columns;
    AllOfB b = {0, 0, false};
    for (int p = 0; p < block.num_loaded; p++) {
        const LoraPiece& piece = block.shared.pieces[p];
        if (lane == p) b.first_slot = b.num_slots;
        if (piece.first_column >= first_column + Block::columns) continue;
        if (piece.first_column + piece.num_columns <= first_column) continue;
        b.num_slots += ceil_div(piece.rank, STAGE_RANKS);
    }
    b.has_room = b.num_slots <= room;
    return b;
}

// Brings the columns of one warp, the one with the block's number in the cluster, into that warp's slots.
template <class Block> __device__ __forceinline__ void load_share(const Block& block, const AllOfB& b) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first_column = blockIdx.y * Block::columns + cluster_rank() * WARP_COLUMNS;
    const u32 slots = shared_address(Block::slots_of(cluster_rank()));
    for (int slot = warp; slot < b.num_slots; slot += Block::threads / 32) {
        // The piece is the last that begins no later: one that has no slots begins where the next does.
        const int p = 31 - __clz(__ballot_sync(ALL_LANES, lane < block.num_loaded && b.first_slot <= slot));
        const int first_rank = (slot - __shfl_sync(ALL_LANES, b.first_slot, p)) * STAGE_RANKS;
        block.load_b(block.shared.pieces[p], first_rank, first_column, slots + slot * B_BYTES);
    }
    commit_copies();
    wait_for_copies<0>();
}

// Copies what the warp has slots for from the block of the cluster that has read it, to the same place.
__device__ __forceinline__ void copy_slots(u8* slots, const AllOfB& b) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp == cluster_rank()) return;
    const u32 peer = peer_address(shared_address(slots), warp);
    for (int slot = 0; slot < b.num_slots; slot++) {
        float4 vectors[B_BYTES / 512];
#pragma unroll
        for (int i = 0; i < B_BYTES / 512; i++) vectors[i] = load16_peer(peer + slot * B_BYTES + i * 512 + lane * 16);
#pragma unroll
        for (int i = 0; i < B_BYTES / 512; i++) {
            *reinterpret_cast<float4*>(slots + slot * B_BYTES + i * 512 + lane * 16) = vectors[i];
        }
    }
}

template <class T, int WARPS, int B_SLOTS>
__device__ __forceinline__ void lora_expand(T* out, const float* shrunk, const LoraPiece* table, const int* rows,
                                            int num_outputs, int first_row, int num_rows, int shrunk_stride,
                                            int num_pieces, int block_rows, u64 page_bytes) {
    static_assert(WARPS == CLUSTER, "each block of a cluster reads b for one warp");
    __shared__ Shared shared;
    Expand<T, WARPS, B_SLOTS> block = {out, shrunk, rows, num_outputs, first_row, shrunk_stride, page_bytes, shared};
    block.begin(num_rows, block_rows);
    // Behind the last row a block has none, and its share of b like the others.
    block.end_row = max(block.block_row, block.end_row);
    block.load_pieces(table, num_pieces);
    const AllOfB b = number_slots(block, B_SLOTS);
    if (b.has_room) {
        load_share(block, b);
        cluster_barrier();
        if (block.num_strips() > 0) copy_slots(block.b_ring, b);
        // No block ends while others read what it has.
        cluster_barrier();
    }
    block.walk_runs(true, b);
}

LORA_EXPAND(bf16, c8, 8, 8, 1, __cluster_dims__(CLUSTER, 1, 1))
LORA_EXPAND(f16, c8, 8, 8, 1, __cluster_dims__(CLUSTER, 1, 1))
