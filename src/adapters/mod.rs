//! LoRA adapters: what their files say, whether they fit a model, what they are identified by, and how they come onto a
//! device. Which request uses which, and under which names, is for others to know.

mod base;
mod device;
mod format;
mod fuse;
mod low_rank;
mod peft_config;
mod peft_writer;

pub use base::{BaseShapes, Module};
pub use device::load_onto;
pub use format::{Adapter, AdapterDigest, MAX_ADAPTER_BYTES, MAX_RANK};
pub use fuse::{FuseMethod, Fused, MAX_PARTS, Part, fuse};
