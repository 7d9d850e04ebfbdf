//! Running decoded kernels: registers, lane arithmetic, memory, warps, blocks, grids.

pub mod alu;
pub mod block;
pub mod convert;
pub mod isa;
pub mod lanes;
pub mod launch;
pub mod load_store;
pub mod mma;
pub mod shared;
pub mod simd;
pub mod warp;
