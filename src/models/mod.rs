//! Model families over [`Backend`](crate::backend::Backend), and the checkpoint formats they are read from. Knows no
//! MemCube and no scheduler.

mod batch;
mod config;
mod dummy;
mod gemma;
mod gguf_config;
mod hf_config;
mod identity;
mod layers;
mod llama;
mod merged;
mod model;
mod weights;

pub use batch::{ForwardBatch, KvCache, ProbeBatch, StepLimits, Workspace};
pub use config::{Architecture, ModelConfig, SlidingWindow};
pub use identity::{WeightsDigest, weights_digest};
pub use merged::{Adapted, MergedCopy, MergedRows, ScaledAdapter};
pub use model::Model;
pub use weights::Checkpoint;
