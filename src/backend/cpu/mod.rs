//! The CPU backend: the reference, and the embedded default.

mod isa;
mod pool;

pub use isa::Isa;
pub use pool::ThreadPool;
