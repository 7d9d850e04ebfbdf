//! Adapters of the double: a tag an update, of all its numbers.

use super::super::{LoraLoader, LoraPages, LoraPart, PageImage, RowRun};
use super::device::SimBuffer;
use super::payload::{PAYLOAD_BYTES, mix, read_u64};
use crate::Result;

/// What an adapter's update of one projection leaves of itself: a row with payload `p` to which it is added with `scale`
/// has [`mix`]`(p, mix(tag, scale's bits))` afterwards.
pub fn lora_tag(parts: &[LoraPart]) -> u64 {
    parts.iter().fold(0, |tag, part| {
        let facts = [part.scaling.to_bits().into(), part.first_column as u64];
        let bytes = part.a.bytes().iter().chain(part.b.bytes()).map(|byte| u64::from(*byte));
        facts.into_iter().chain(bytes).fold(tag, mix)
    })
}

/// Arranges adapters for the double.
pub struct SimLoraLoader;

/// An update of one projection: its rows say nothing but its tag, again and again.
pub struct SimLora {
    arena: SimBuffer,
    /// Where rows begin, and how long they are.
    rows: Vec<(usize, usize)>,
}

impl LoraLoader for SimLoraLoader {
    type Buffer = SimBuffer;
    /// As many rows of the same lengths as other devices have.
    type Packed = Vec<RowRun>;
    type Lora = SimLora;

    fn pack(&self, parts: &[LoraPart], image: &mut PageImage) -> Result<Vec<RowRun>> {
        parts.iter().try_for_each(LoraPart::check)?;
        let tag = lora_tag(parts).to_le_bytes();
        let mut runs = Vec::with_capacity(2 * parts.len());
        for part in parts {
            for (name, columns) in [(part.a.name(), part.a.columns()), (part.b.name(), part.b.rows())] {
                let run = image.reserve(name, part.a.rows(), (2 * columns).next_multiple_of(2 * PAYLOAD_BYTES))?;
                for row in 0..run.num_rows {
                    image
                        .row_mut(&run, row)
                        .chunks_exact_mut(PAYLOAD_BYTES)
                        .for_each(|word| word.copy_from_slice(&tag));
                }
                runs.push(run);
            }
        }
        Ok(runs)
    }

    fn place(&self, packed: &Vec<RowRun>, pages: &LoraPages<SimBuffer>) -> Result<SimLora> {
        let places = |run: &RowRun| {
            let row_bytes = run.row_bytes;
            (0..run.num_rows).map(|row| (pages.offset(run, row), row_bytes)).collect::<Vec<_>>()
        };
        Ok(SimLora { arena: pages.arena().clone(), rows: packed.iter().flat_map(places).collect() })
    }
}

impl SimLora {
    /// The tag that all rows hold; another one when any of them has not been written, or has been overwritten.
    pub(super) fn tag(&self) -> u64 {
        let arena = self.arena.lock();
        let words = |&(start, bytes): &(usize, usize)| (start..start + bytes).step_by(PAYLOAD_BYTES);
        let mut all = self.rows.iter().flat_map(words).map(|at| read_u64(&arena, at));
        let first = all.next().unwrap_or(0);
        all.fold(first, |tag, word| if word == tag { tag } else { mix(tag, word) })
    }
}
