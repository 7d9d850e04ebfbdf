//! LoRA adapters: what their files say, whether they fit a model, what they are identified by, and how they come onto a
//! device. Which request uses which, where they are kept, and under which names, is for others to know.

mod base;
mod device;
mod format;
mod fuse;
mod gguf_lora;
mod host;
mod low_rank;
mod peft_config;
mod peft_writer;

pub use base::{BaseShapes, GgufConventions, Module};
pub use device::PackedAdapter;
pub use format::{Adapter, AdapterDigest, MAX_ADAPTER_BYTES, MAX_RANK};
pub use fuse::{FuseMethod, Fused, MAX_PARTS, Part, fuse};
pub use host::HostCopies;
