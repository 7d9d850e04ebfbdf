//! The engine: requests in, tokens out, one thread that owns scheduler, pools and block tables.

mod adapter_io;
mod adapter_store;
mod adapters;
mod composition;
mod constraints;
mod credit;
mod deposit;
mod erasure;
mod fetch;
mod generation;
pub mod handle;
mod logprobs;
mod lora_groups;
mod merge;
mod output;
mod probe;
pub mod request;
mod residency;
mod runner;
mod sampling;
mod scheduler;
mod sequence;
mod step;
mod tiers;

pub use adapter_store::{AdapterSpace, AdapterStore, DEFAULT_ADAPTER_HOST_BYTES};
pub use adapters::{AdapterLoader, AppliedAdapter, LoadedAdapter, MAX_APPLIED, base_shapes};
pub use handle::{EngineHandle, EngineInfo, OutputStream, SubmitError};
pub use merge::{MergeConfig, MergeRule};
pub use request::{
    BACKGROUND, Deposited, FetchDecision, FinishReason, GenerateRequest, OutputEvent, Piece, Reuse, SamplingParams,
    SharedPrefix, Task, TokenLogprob, TokenLogprobs,
};
pub use scheduler::SchedulerLimits;
pub use step::{Engine, EngineConfig};
pub use tiers::TierConfig;
