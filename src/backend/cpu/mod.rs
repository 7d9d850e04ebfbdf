//! The CPU backend: the reference, and the embedded default.

pub(super) mod dequantize;
#[cfg(target_arch = "x86_64")]
mod float_avx2;
#[cfg(target_arch = "x86_64")]
mod float_avx512;
mod float_gemm;
mod float_tile;
mod gemm;
#[cfg(test)]
mod gemm_tests;
mod input_tiles;
mod isa;
mod packed;
mod pool;
#[cfg(target_arch = "x86_64")]
mod quant_avx2;
#[cfg(target_arch = "x86_64")]
mod quant_avx512;
mod quant_gemm;
mod quant_tile;
mod quantize;

pub use gemm::{GemmScratch, gemm};
pub use input_tiles::{Rows, RowsMut};
pub use isa::Isa;
pub use packed::PackedMatrix;
pub use pool::ThreadPool;
