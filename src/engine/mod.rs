//! The engine: requests in, tokens out, one thread that owns scheduler, pools and block tables.

pub mod handle;
pub mod request;

pub use handle::{EngineHandle, EngineInfo, OutputStream, SubmitError};
pub use request::{FinishReason, GenerateRequest, OutputEvent, SamplingParams, Task, TokenLogprob, TokenLogprobs};
