//! What a kernel did, counted.

use std::ops::AddAssign;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)+) => {
        /// Totals of one kernel over all its launches.
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Counters { $($(#[$doc])* pub $name: u64,)+ }

        impl Counters {
            /// Names and values in order.
            pub fn fields(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name)),+]
            }
        }

        impl AddAssign for Counters {
            fn add_assign(&mut self, other: Self) {
                $(self.$name += other.$name;)+
            }
        }
    };
}

counters! {
    /// Launches.
    launches,
    /// Blocks run.
    blocks,
    /// Instructions issued, one per warp.
    warp_instructions,
    /// Instructions times active lanes.
    lane_instructions,
    /// Global loads issued, one per warp.
    global_load_requests,
    /// 32-byte sectors that the loads touch, counted per request.
    global_load_sectors,
    /// Distinct bytes that the lanes ask for, counted per request.
    global_load_bytes,
    /// Bytes of 64-byte granules read at least once per launch: the least that could be moved.
    global_load_footprint_bytes,
    /// Global stores issued, one per warp.
    global_store_requests,
    /// 32-byte sectors that the stores touch, counted per request.
    global_store_sectors,
    /// Distinct bytes that the lanes write, counted per request.
    global_store_bytes,
    /// Bytes of 64-byte granules written at least once per launch.
    global_store_footprint_bytes,
    /// Shared loads and stores issued, one per warp. What `wgmma` reads is not among them: it is not known how often a device
    /// reads what four warps share.
    shared_requests,
    /// Passes over the 32 banks that they take; more than the ideal means bank conflicts.
    shared_wavefronts,
    /// Passes that they would take without bank conflicts.
    shared_wavefronts_ideal,
    /// Tensor-core instructions, one per warp.
    mma,
    /// Products and sums in these.
    mma_flops,
    /// Barriers completed, one per block; those of a cluster count for each of its blocks.
    barriers,
    /// Atomic operations, one per lane.
    atomics,
    /// Bytes moved by `cp.async`.
    async_copy_bytes,
    /// Bytes that lanes read of the shared memory of other blocks of their cluster.
    peer_load_bytes,
}

impl Counters {
    /// Active lanes over issued lanes, 0 to 1.
    pub fn simt_efficiency(&self) -> f64 {
        self.lane_instructions as f64 / (self.warp_instructions.max(1) * 32) as f64
    }

    /// Bytes asked for over bytes of the sectors touched by loads, 0 to 1.
    pub fn load_efficiency(&self) -> f64 {
        self.global_load_bytes as f64 / (self.global_load_sectors.max(1) * 32) as f64
    }
}
