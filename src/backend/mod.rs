//! The seam between the engine and a device.

pub mod cpu;
mod dtype;
mod host_tensor;

pub use cpu::dequantize::dequantize_row;
pub use dtype::DType;
pub use host_tensor::{HostTensor, RowOrder, SharedBytes};
