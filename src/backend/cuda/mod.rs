//! The CUDA backend: the kernels of `kernels/` behind the [`Backend`](super::Backend) trait.
//!
//! The driver is loaded at run time, so this is part of every build and costs nothing where there is no driver.
//! Activations, weights and the KV cache are bf16 or f16; quantised weights stay quantised; the residual stream, norms and
//! logits are f32.

mod attention;
mod backend;
mod compose;
mod copies;
mod cublaslt;
mod cublaslt_library;
mod device;
mod driver;
#[cfg_attr(not(feature = "flash-attn"), path = "no_flash_attention.rs")]
mod flash_attention;
mod gemm_kernels;
mod graphs;
mod kernels;
mod launch;
mod logits;
mod lora;
mod lora_kernels;
mod lora_loader;
mod lora_merge;
mod memory;
mod modules;
mod norm;
mod quantised;
mod records;
mod staging;
mod stream;
mod transfer;
mod upload;
mod watch;
mod weights;

pub use backend::CudaBackend;
pub(super) use cublaslt_library::cublaslt_version;
pub(super) use driver::find_gpus;
pub(super) use flash_attention::flash_attention_version;
pub use lora_loader::{CudaLora, CudaLoraLoader, PackedCudaLora};
pub use memory::{CudaBuffer, CudaHostBuffer};
pub(super) use modules::{MIN_DRIVER, kernel_source};
pub use stream::{CudaEvent, CudaStream};
pub use transfer::CudaTransfer;
pub use watch::CopyPatience;
pub use weights::{CudaMatrix, CudaRopeTable};
