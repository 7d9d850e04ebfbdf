//! The seam between the engine and a device.

pub mod cpu;
mod dtype;
mod host_tensor;
mod layout;

pub use dtype::DType;
pub use host_tensor::{HostTensor, RowOrder, SharedBytes};
pub use layout::{BLOCK_ALIGNMENT, KvLayout, LANE_TOKENS};
