//! The CPU backend: the reference, and the embedded default.
//!
//! Kernels are plain functions over slices; [`CpuBackend`] ties them to the [`Backend`](super::Backend) trait.

mod activation;
#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod amx_feed_forward;
#[cfg(target_arch = "x86_64")]
mod amx_gemm;
#[cfg(target_arch = "x86_64")]
mod amx_vector;
mod argmax;
mod attention;
#[cfg(target_arch = "x86_64")]
mod attention_amx;
#[cfg(target_arch = "x86_64")]
mod attention_bf16;
#[cfg(target_arch = "x86_64")]
mod attention_dot;
mod attention_fold;
mod attention_tile;
mod backend;
#[cfg(target_arch = "x86_64")]
mod bf16_rounding;
mod copy_stream;
pub(super) mod dequantize;
mod disjoint;
mod embed;
mod exp;
mod feed_forward;
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
mod kv_arena;
mod kv_deviation;
mod kv_store;
mod line;
mod log_sum_exp;
mod lora;
mod lora_matrix;
mod lora_merge;
#[cfg(target_arch = "x86_64")]
mod lora_pairs;
mod lora_panels;
mod lora_plain;
mod lora_tokens;
mod memory;
mod norm;
mod packed;
mod pool;
#[cfg(target_arch = "x86_64")]
mod quant_avx2;
#[cfg(target_arch = "x86_64")]
mod quant_avx512;
mod quant_feed_forward;
mod quant_gemm;
mod quant_tile;
mod quantize;
mod rope;
mod rotate_gather;
mod sample;
mod simd;
#[cfg(target_arch = "x86_64")]
mod simd_avx2;
#[cfg(target_arch = "x86_64")]
mod simd_avx512;
mod softcap;
mod transfer;
mod weight_memory;

pub use activation::{GateKind, gated};
pub use argmax::argmax;
pub use attention::{AttentionBatch, AttentionScratch, attention};
pub use backend::CpuBackend;
pub use embed::embed;
pub use feed_forward::{FeedForwardWeights, feed_forward};
pub use gemm::{GemmScratch, gemm};
pub use input_tiles::{Rows, RowsMut};
pub use isa::Isa;
pub use kv_arena::KvArena;
pub use kv_deviation::{KvDeviationBatch, kv_deviation};
pub use kv_store::{KvStoreBatch, rope_and_store_kv};
pub use log_sum_exp::log_sum_exp;
pub use lora::{LoraInput, LoraRows, LoraScratch, LoraWork, add_lora};
pub use lora_matrix::{CpuLora, CpuLoraLoader, PackedCpuLora};
pub use norm::{add_rms_norm, rms_norm};
pub use packed::PackedMatrix;
pub use pool::ThreadPool;
pub use rope::RopeTable;
pub use rotate_gather::{RotateGatherBatch, rotate_gather};
pub use sample::{SampleScratch, sample, sample_row};
pub use softcap::softcap;
pub use transfer::CpuTransfer;
