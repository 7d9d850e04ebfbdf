//! The CPU backend: the reference, and the embedded default.

mod activation;
mod argmax;
mod attention;
mod attention_tile;
mod disjoint;
mod exp;
mod isa;
mod kv_arena;
mod kv_store;
mod norm;
mod pool;
mod rope;
mod simd;
#[cfg(target_arch = "x86_64")]
mod simd_avx2;
#[cfg(target_arch = "x86_64")]
mod simd_avx512;

pub use activation::{GateKind, gated};
pub use argmax::argmax;
pub use attention::{AttentionBatch, AttentionScratch, attention};
pub use isa::Isa;
pub use kv_arena::KvArena;
pub use kv_store::{KvStoreBatch, rope_and_store_kv};
pub use norm::{add_rms_norm, rms_norm};
pub use pool::ThreadPool;
pub use rope::{RopeScaling, RopeTable};
