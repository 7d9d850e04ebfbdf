//! Moves KV blocks between tiers: device, host memory, disk. Knows blocks by content and bytes, and no requests.

pub mod faulty;
mod files;
mod store;

pub use files::{FileHandle, Files, SystemFiles};
pub use store::{BlockFormat, BlockStore, Found, OpenReport, StoreConfig, StoreStats, Stored};
