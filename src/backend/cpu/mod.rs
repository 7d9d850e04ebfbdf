//! The CPU backend: the reference, and the embedded default.

pub(super) mod dequantize;
mod float_tile;
mod gemm;
#[cfg(target_arch = "x86_64")]
mod gemm_avx2;
#[cfg(target_arch = "x86_64")]
mod gemm_avx512;
#[cfg(test)]
mod gemm_tests;
mod input_tiles;
mod isa;
mod packed;
mod pool;

pub use gemm::{GemmScratch, gemm};
pub use input_tiles::{Rows, RowsMut};
pub use isa::Isa;
pub use packed::PackedMatrix;
pub use pool::ThreadPool;
