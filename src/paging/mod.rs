//! Moves KV blocks between tiers: device, host memory, disk. Knows blocks by content and bytes, and no requests.

mod files;

pub use files::{FileHandle, Files, SystemFiles};
