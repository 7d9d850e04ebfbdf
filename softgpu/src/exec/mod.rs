//! Running decoded kernels: registers, lane arithmetic, memory, warps, blocks, grids.

pub mod alu;
pub mod async_copy;
mod async_proxy;
pub mod atomic;
pub mod block;
pub mod cluster;
pub mod convert;
pub mod isa;
mod lane_ops;
pub mod lanes;
pub mod launch;
pub mod load_store;
pub mod mma;
pub mod operands;
mod peer_reads;
pub mod shared;
pub mod simd;
mod tile;
mod together;
pub mod warp;
pub mod warpgroup;
