//! Moves KV blocks between tiers: device, host memory, disk. Knows blocks by content and bytes, and no requests.

mod archive;
pub mod faulty;
mod files;
mod host;
mod io;
pub mod page_cache;
mod pager;
mod rates;
mod store;

pub use archive::{Archive, ArchivedBlocks, MAX_HEADER_BYTES, read_exact};
pub use files::{FileHandle, Files, SystemFiles};
pub use io::{DeviceLanding, Ticket};
pub use pager::{Completion, OpenedVault, Pager, VaultOpener};
pub use rates::Rates;
pub use store::{BlockFormat, BlockStore, Found, OpenReport, PinnedBlocks, StoreConfig, StoreStats, Stored};

use crate::backend::KvLayout;

/// Where a block can lie, fastest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tier {
    /// The memory that kernels read.
    Device,
    /// The host's memory.
    Host,
    /// Files of the vault.
    Disk,
}

/// What a [`Pager`] is started with.
pub struct PagingConfig {
    /// Bytes of a block.
    pub block_bytes: usize,
    /// Tokens of a block.
    pub block_size: usize,
    /// Where the numbers of a block lie, so that of partial blocks nothing else goes to disk; where there are none, nobody
    /// needs to know.
    pub layout: Option<KvLayout>,
    /// Blocks of the host tier; 0 for none.
    pub num_host_blocks: usize,
    /// Bytes of it that are page-locked at a time; 0 for 64 MiB.
    pub host_slab_bytes: usize,
    /// Threads that copy.
    pub num_threads: usize,
    /// Opens the disk tier; none without it.
    pub open: Option<VaultOpener>,
}
