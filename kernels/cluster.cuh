// Clusters of Hopper: blocks that run at the same time, wait for each other and read each other's shared memory.

// Blocks of a cluster, which follow each other in x.
constexpr int CLUSTER = 8;

// Waits for all threads of the cluster, and shows each what the others have written, into shared memory too.
__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The block's number in its cluster.
__device__ __forceinline__ int cluster_rank() {
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return static_cast<int>(rank);
}

// Where block `rank` of the cluster has what lies at `address` of this block's shared memory.
__device__ __forceinline__ u32 peer_address(u32 address, int rank) {
    u32 peer;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(peer) : "r"(address), "r"(rank));
    return peer;
}

// Reads 16 bytes at such an address.
__device__ __forceinline__ float4 load16_peer(u32 peer) {
    float4 x;
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "r"(peer)
                 : "memory");
    return x;
}
