//! Making room: what goes, what is copied, and the rewriting of segments that are mostly dead or small. Runs under the
//! store's writer lock; readers go on meanwhile.

use std::io;
use std::path::Path;

use super::format::{BlockRecord, digest_of, read_header};
use super::geometry::Geometry;
use super::index::{ForeignSegment, Index, LiveBlock, PINNED_LEVEL};
use super::segment::{SegmentId, SegmentWriter};
use super::{BlockStore, Writer, is_passing};
use crate::kv::BlockHash;

/// Segments weighed for one eviction at most, by each of two orders: fewest live rows, longest unused.
const NUM_WEIGHED: usize = 16;

/// So many small segments are merged: every seal may leave one.
const NUM_SMALL: usize = 8;

/// A segment to be rewritten: what is kept of it.
pub(super) struct Rewrite {
    pub(super) id: SegmentId,
    pub(super) retained: Vec<BlockHash>,
}

/// The segment whose loss costs least.
struct Victim {
    rewrite: Rewrite,
    /// Of the blocks that would be evicted, what the least is worth; 0 when none would be.
    least_value: f64,
    /// What they are worth per byte freed.
    cost: f64,
}

/// On whose behalf room is made.
#[derive(Clone, Copy)]
struct Newcomer {
    value: f64,
    /// Blocks that are held on to less hard than this may go.
    level: u8,
}

impl Newcomer {
    /// Nobody is the reason when the bound was lowered.
    fn new(index: &Index, candidate: Option<&BlockHash>) -> Self {
        match candidate {
            Some(hash) => Self { value: index.candidate_value(hash), level: index.candidate_level(hash).unwrap_or(0) },
            None => Self { value: 1.0, level: PINNED_LEVEL },
        }
    }

    fn may_displace(self, block: &LiveBlock) -> bool {
        !block.is_pinned && block.level.is_none_or(|level| level < self.level)
    }
}

enum Step {
    Done,
    RemoveForeign(ForeignSegment),
    Rewrite(Rewrite),
    Refuse,
}

impl BlockStore {
    /// Frees room for `needed_bytes` on behalf of a block that is not stored yet, or of nobody; whether there is room.
    pub(super) fn make_room(&self, writer: &mut Writer, needed_bytes: u64, candidate: Option<&BlockHash>) -> bool {
        loop {
            let mut index = self.index();
            let before_bytes = index.total_bytes();
            let step = next_step(&mut index, &self.geometry, needed_bytes, candidate);
            drop(index);
            match step {
                Step::Done => return true,
                Step::Refuse => return false,
                Step::RemoveForeign(segment) => self.remove_foreign(&segment),
                Step::Rewrite(rewrite) => self.rewrite(writer, &[rewrite]),
            }
            if self.index().total_bytes() >= before_bytes {
                return false;
            }
        }
    }

    /// Merges segments that are under half live, and small ones once there are many, into one.
    pub(super) fn tidy(&self, writer: &mut Writer) {
        let rewrites = untidy(&self.index(), &self.geometry);
        if !rewrites.is_empty() {
            self.rewrite(writer, &rewrites);
        }
    }

    fn rewrite(&self, writer: &mut Writer, rewrites: &[Rewrite]) {
        match self.copy_retained(writer, rewrites) {
            Ok(copy) => {
                let sources: Vec<SegmentId> = rewrites.iter().map(|rewrite| rewrite.id).collect();
                let copy = copy.as_ref().map(|copy| (copy.id(), copy.extent(), copy.records()));
                let doomed = self.index().finish_rewrite(copy, &sources);
                self.remove_segments(&doomed);
            }
            Err(e) => self.degrade("compact", &self.folder, &e),
        }
    }

    /// Copies what is to be kept into a sealed segment; `None` if that is nothing. After an error nothing has changed.
    pub(super) fn copy_retained(&self, writer: &mut Writer, rewrites: &[Rewrite]) -> io::Result<Option<SegmentWriter>> {
        let num_slots: usize = rewrites.iter().map(|rewrite| rewrite.retained.len()).sum();
        if num_slots == 0 {
            return Ok(None);
        }
        let format = &self.geometry.format;
        let (id, num_slots) = (writer.take_id(), num_slots as u32);
        let copied = SegmentWriter::create(&*self.files, &self.folder, format, id, num_slots).and_then(|mut copy| {
            for rewrite in rewrites {
                self.copy_segment(rewrite, &mut copy)?;
            }
            if copy.records().is_empty() {
                self.discard(&copy.path(), copy.extent().bytes);
                return Ok(None);
            }
            copy.seal(&*self.files)?;
            Ok(Some(copy))
        });
        copied.inspect_err(|_| {
            let names = [id.partial_name(), id.file_name()].map(|name| self.folder.join(name));
            let is_gone = names.iter().any(|path| self.files.remove(path).is_ok());
            self.index().add_leftover(if is_gone { 0 } else { format.file_bytes(num_slots) });
        })
    }

    /// Blocks are checked on the way: a copy never makes damage look whole.
    fn copy_segment(&self, rewrite: &Rewrite, copy: &mut SegmentWriter) -> io::Result<()> {
        if rewrite.retained.is_empty() {
            return Ok(());
        }
        let path = self.folder.join(rewrite.id.file_name());
        let source = match self.files.open(&path) {
            Err(e) if is_passing(&e) => return Err(e),
            opened => opened.ok(),
        };
        let records = source.as_deref().and_then(|source| read_header(source).ok()).map(|header| header.records);
        let mut bytes = vec![0; self.geometry.format.block_bytes];
        for hash in &rewrite.retained {
            let Some(located) = self.index().locate(hash).filter(|located| located.place.segment == rewrite.id) else {
                continue;
            };
            let record = records.as_ref().and_then(|records| records.get(located.place.slot as usize));
            let read = source.as_ref().map(|source| source.read_at(&mut bytes, located.offset));
            match (record, read) {
                (Some(record), Some(Ok(()))) if is_whole(record, hash, &bytes) => {
                    copy.append(record.clone(), &bytes)?;
                }
                _ => {
                    self.drop_damaged(hash, &located.place, "it cannot be read while it is moved");
                }
            }
        }
        Ok(())
    }

    /// The room counts as free only when the removal is durable: a file that a crash brought back would break the bound.
    pub(super) fn remove_segments(&self, doomed: &[(SegmentId, u64)]) {
        if doomed.is_empty() {
            return;
        }
        let removed = doomed.iter().try_for_each(|(id, _)| remove(self, &self.folder.join(id.file_name())));
        match removed.and_then(|()| self.files.sync_folder(&self.folder)) {
            Ok(()) => self.index().forget_leftover(doomed.iter().map(|(_, bytes)| bytes).sum()),
            Err(e) => self.degrade("remove a segment of", &self.folder, &e),
        }
    }

    fn remove_foreign(&self, segment: &ForeignSegment) {
        let folder = segment.path.parent().unwrap_or(&self.folder);
        match remove(self, &segment.path).and_then(|()| self.files.sync_folder(folder)) {
            Ok(()) => self.index().forget_leftover(segment.bytes),
            Err(e) => self.degrade("remove a segment of", folder, &e),
        }
    }
}

fn remove(store: &BlockStore, path: &Path) -> io::Result<()> {
    store.files.remove(path).or_else(|e| if e.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(e) })
}

fn is_whole(record: &BlockRecord, hash: &BlockHash, bytes: &[u8]) -> bool {
    record.hash == *hash && digest_of(hash, &record.tokens, bytes) == record.digest
}

fn next_step(index: &mut Index, geometry: &Geometry, needed_bytes: u64, candidate: Option<&BlockHash>) -> Step {
    let is_degraded = index.degraded.is_some();
    if is_degraded && candidate.is_some() {
        return Step::Refuse;
    }
    if index.total_bytes() + needed_bytes <= geometry.resting_bytes() {
        return Step::Done;
    }
    if is_degraded {
        return Step::Refuse;
    }
    let newcomer = Newcomer::new(index, candidate);
    let value = newcomer.value;
    let is_hopeless = candidate.is_some() && index.is_below_floor(value);
    let victim = if is_hopeless { None } else { cheapest(index, geometry, newcomer) };
    if let Some(Victim { rewrite, .. }) = victim.as_ref().filter(|victim| victim.cost == 0.0) {
        return Step::Rewrite(Rewrite { id: rewrite.id, retained: rewrite.retained.clone() });
    }
    if let Some(segment) = index.take_foreign() {
        return Step::RemoveForeign(segment);
    }
    match victim {
        Some(victim) if candidate.is_none() || value > victim.least_value => Step::Rewrite(victim.rewrite),
        victim => {
            if let Some(victim) = victim {
                index.set_floor(victim.least_value);
            }
            index.counters.rejected += u64::from(candidate.is_some());
            Step::Refuse
        }
    }
}

/// Of the segments worth a look, the one that costs least per byte. A block must be worth more than the newcomer to be
/// copied instead of evicted.
fn cheapest(index: &Index, geometry: &Geometry, newcomer: Newcomer) -> Option<Victim> {
    let victims = worth_a_look(index).into_iter().filter_map(|id| weigh(index, geometry, id, newcomer));
    victims.min_by(|a, b| a.cost.total_cmp(&b.cost))
}

/// Sealed segments of which something can be freed.
fn worth_a_look(index: &Index) -> Vec<SegmentId> {
    let sealed = index.segments().filter(|(_, segment)| segment.handle.is_none());
    let mut ids: Vec<_> = sealed
        .filter(|(_, segment)| (segment.num_pinned as usize) < segment.hashes.len().max(1))
        .map(|(id, segment)| (segment.num_live as usize * 1024 / segment.hashes.len().max(1), segment.last_use, id))
        .collect();
    ids.sort_unstable();
    let mut chosen: Vec<SegmentId> = ids.iter().take(NUM_WEIGHED).map(|(_, _, id)| *id).collect();
    ids.sort_unstable_by_key(|(_, last_use, id)| (*last_use, *id));
    chosen.extend(ids.iter().take(NUM_WEIGHED).map(|(_, _, id)| *id));
    chosen
}

fn weigh(index: &Index, geometry: &Geometry, id: SegmentId, newcomer: Newcomer) -> Option<Victim> {
    let segment = index.segment(id)?;
    let limit = slots_of_copy(index, geometry);
    let (held, mut loose): (Vec<_>, Vec<_>) =
        index.live_blocks(id).into_iter().partition(|block| !newcomer.may_displace(block));
    if held.len() > limit {
        return None;
    }
    loose.sort_by(|a, b| b.value.total_cmp(&a.value));
    let room = (segment.hashes.len() / 2).min(limit).saturating_sub(held.len());
    let num_kept = loose.iter().take(room).take_while(|block| block.value > newcomer.value).count();
    let evicted = loose.split_off(num_kept);
    let retained: Vec<BlockHash> = held.iter().chain(&loose).map(|block| block.hash).collect();
    let after_bytes = if retained.is_empty() { 0 } else { geometry.format.file_bytes(retained.len() as u32) };
    let freed_bytes = segment.bytes.checked_sub(after_bytes).filter(|&bytes| bytes > 0)?;
    let cost = evicted.iter().map(|block| block.value).sum::<f64>() / freed_bytes as f64;
    let least_value = evicted.last().map_or(0.0, |block| block.value);
    Some(Victim { rewrite: Rewrite { id, retained }, least_value, cost })
}

/// Blocks that a copy may have: at most a full segment's, and no more than fit beside all there is now.
fn slots_of_copy(index: &Index, geometry: &Geometry) -> usize {
    geometry.slots_within(geometry.max_bytes().saturating_sub(index.total_bytes())) as usize
}

/// Segments to merge into one, all their live blocks kept.
fn untidy(index: &Index, geometry: &Geometry) -> Vec<Rewrite> {
    if index.degraded.is_some() {
        return Vec::new();
    }
    let sealed = index.segments().filter(|(_, segment)| segment.handle.is_none());
    let mut sizes: Vec<_> = sealed
        .map(|(id, segment)| (segment.num_live, segment.num_live as usize * 2 < segment.hashes.len(), id))
        .collect();
    sizes.retain(|(num_live, is_sparse, _)| *is_sparse || num_live * 2 <= geometry.num_slots);
    sizes.sort_unstable();
    if sizes.iter().filter(|(_, is_sparse, _)| !is_sparse).count() < NUM_SMALL {
        sizes.retain(|(_, is_sparse, _)| *is_sparse);
    }
    let mut room = slots_of_copy(index, geometry);
    let fitting = sizes.into_iter().take_while(|(num_live, _, _)| {
        let fits = *num_live as usize <= room;
        room = room.saturating_sub(*num_live as usize);
        fits
    });
    let chosen: Vec<_> = fitting.take(NUM_SMALL).collect();
    if let [(_, false, _)] = chosen[..] {
        return Vec::new();
    }
    let retained = |id| index.live_blocks(id).into_iter().map(|block| block.hash).collect();
    chosen.into_iter().map(|(_, _, id)| Rewrite { id, retained: retained(id) }).collect()
}
