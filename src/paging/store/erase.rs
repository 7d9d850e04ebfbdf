//! Erasing blocks: their segments are written anew without them, and what held them is overwritten before it is removed.
//! Rows of copies that were evicted or moved away long ago count as well, as far as their files are still there.

use std::collections::HashSet;
use std::io;

use super::format::BlockRecord;
use super::reclaim::Rewrite;
use super::segment::SegmentId;
use super::{BlockStore, Writer};
use crate::kv::BlockHash;
use crate::{Error, Result};

impl BlockStore {
    /// Overwrites blocks wherever they lie in files of this format, and forgets them. That is durable when this returns.
    /// Whether no file of another format says that it has some of them: those are overwritten by who has that format open.
    ///
    /// # Errors
    /// `Io` when some of them may be there still; nobody finds them until the store is opened again.
    pub fn erase(&self, hashes: &[BlockHash]) -> Result<bool> {
        let hashes: HashSet<BlockHash> = hashes.iter().copied().collect();
        let mut writer = self.writer();
        let failed = |e| Error::io("erase blocks in", &self.folder, e);
        self.index().forget(&hashes);
        if writer.open.as_ref().is_some_and(|open| holds(open.segment.records(), &hashes)) {
            self.seal_open(&mut writer)?;
        }
        let segments = self.index().segments_with(&hashes);
        segments.into_iter().try_for_each(|id| self.erase_in(&mut writer, id, &hashes)).map_err(failed)?;
        Ok(!self.index().is_foreign(&hashes))
    }

    fn erase_in(&self, writer: &mut Writer, id: SegmentId, hashes: &HashSet<BlockHash>) -> io::Result<()> {
        let retained = self.index().live_blocks(id).into_iter().map(|block| block.hash).collect();
        let copy = self.copy_retained(writer, &[Rewrite { id, retained }])?;
        let rows = self.index().rows_of(id, hashes);
        let copy = copy.as_ref().map(|copy| (copy.id(), copy.extent(), copy.records()));
        let doomed = self.index().finish_rewrite(copy, &[id]);
        let file = self.files.open_to_change(&self.folder.join(id.file_name()))?;
        let zeros = vec![0; self.geometry.format.block_bytes];
        rows.into_iter().try_for_each(|offset| file.write_at(&zeros, offset))?;
        file.sync()?;
        self.remove_segments(&doomed);
        Ok(())
    }
}

fn holds(records: &[BlockRecord], hashes: &HashSet<BlockHash>) -> bool {
    records.iter().any(|record| hashes.contains(&record.hash))
}
