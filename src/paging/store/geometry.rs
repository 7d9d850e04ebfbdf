//! How large things are: a segment, the bound, and the part of it that compaction needs for its copy.

use super::StoreConfig;
use super::format::{BlockFormat, MAX_SLOTS};
use crate::{Result, invalid};

/// Parts of the bound: one is kept free for the copy that compaction makes before it removes what it copied.
const NUM_PARTS: u64 = 4;

/// The sizes that follow from a [`StoreConfig`].
pub(super) struct Geometry {
    pub(super) format: BlockFormat,
    /// Blocks of a full segment.
    pub(super) num_slots: u32,
    max_bytes: u64,
}

impl Geometry {
    /// # Errors
    /// `Invalid` for a format no file can have, or a bound that does not hold four segments of one block.
    pub(super) fn new(config: &StoreConfig) -> Result<Self> {
        config.format.check()?;
        let (format, max_bytes) = (config.format.clone(), config.max_bytes);
        let smallest = format.file_bytes(1);
        if smallest > max_bytes / NUM_PARTS {
            let wanted = smallest * NUM_PARTS;
            return Err(invalid!(
                "a disk tier of blocks of {} bytes needs at least {wanted} bytes, not {max_bytes}: \
                 allow more, or turn it off",
                format.block_bytes
            ));
        }
        let wanted = config.segment_bytes.max(smallest).min(max_bytes / NUM_PARTS);
        Ok(Self { num_slots: slots_within(&format, MAX_SLOTS, wanted), format, max_bytes })
    }

    /// Bytes on disk at most, while compaction runs.
    pub(super) fn max_bytes(&self) -> u64 {
        self.max_bytes
    }

    /// Bytes on disk at most before a block is written: a full segment less.
    pub(super) fn resting_bytes(&self) -> u64 {
        self.max_bytes - self.format.file_bytes(self.num_slots)
    }

    /// Blocks that a segment file of `bytes` holds, at most a full segment's.
    pub(super) fn slots_within(&self, bytes: u64) -> u32 {
        slots_within(&self.format, self.num_slots, bytes)
    }

    /// Blocks that fit in all, about.
    pub(super) fn num_blocks(&self) -> u64 {
        self.max_bytes / self.format.stride()
    }
}

fn slots_within(format: &BlockFormat, most: u32, bytes: u64) -> u32 {
    let (mut low, mut high) = (0, most);
    while low < high {
        let middle = (low + high).div_ceil(2);
        if format.file_bytes(middle) <= bytes { low = middle } else { high = middle - 1 }
    }
    low
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(max_bytes: u64, segment_bytes: u64) -> Result<Geometry> {
        let format = BlockFormat { block_bytes: 4096, block_size: 4, layout: "test".into() };
        Geometry::new(&StoreConfig { format, max_bytes, segment_bytes })
    }

    #[test]
    fn a_segment_leaves_room_for_its_copy() {
        for max_bytes in [40_000u64, 100_000, 1 << 20, 1 << 30] {
            let geometry = geometry(max_bytes, 64 << 10).unwrap();
            let full = geometry.format.file_bytes(geometry.num_slots);
            assert!(full <= max_bytes / 4 && full <= 64 << 10, "{full}");
            assert_eq!(geometry.resting_bytes(), max_bytes - full);
            assert_eq!(geometry.slots_within(full), geometry.num_slots);
            assert_eq!(geometry.slots_within(full - 1), geometry.num_slots - 1);
        }
        assert_eq!(geometry(1 << 30, 0).unwrap().num_slots, 1);
        assert!(geometry(20_000, 64 << 10).is_err());
    }
}
