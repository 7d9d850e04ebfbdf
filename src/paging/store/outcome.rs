//! What a store answers: to opening, reading, writing, and in figures.

/// What opening a store found.
#[derive(Debug, Clone, Default)]
pub struct OpenReport {
    /// Segments of the store's format.
    pub num_segments: usize,
    /// Blocks that can be read.
    pub num_blocks: usize,
    /// Files of other formats, and damaged ones.
    pub num_foreign_segments: usize,
    /// Files that were not finished when their process died, removed.
    pub num_partial_removed: usize,
    /// Bytes of all files.
    pub bytes: u64,
    /// What is wrong with which file; a hundred at most.
    pub faults: Vec<String>,
}

/// What became of a read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// The bytes are the block's.
    Whole,
    /// There is no such block, or not with these tokens.
    Missing,
    /// There was one, its bytes are wrong or cannot be read, and it is forgotten now.
    Damaged(String),
}

/// What became of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// It is there now.
    New,
    /// It was there before.
    Present,
    /// All else is worth more or pinned, or the store is degraded.
    NoRoom,
}

/// A store in figures.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StoreStats {
    /// Bytes of all files.
    pub bytes: u64,
    /// Bytes of the blocks that can be read.
    pub live_bytes: u64,
    /// Bytes of other formats' files and of damaged ones.
    pub foreign_bytes: u64,
    /// Blocks that can be read.
    pub blocks: u64,
    /// Segments they lie in.
    pub segments: u64,
    /// Blocks found damaged since opening.
    pub damaged: u64,
    /// Blocks evicted since opening.
    pub evicted: u64,
    /// Blocks turned away since opening because others were worth more.
    pub rejected: u64,
    /// Times segments were rewritten since opening.
    pub compactions: u64,
    /// Whether nothing is written any more, because the disk failed.
    pub degraded: bool,
}
