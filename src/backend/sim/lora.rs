//! Adapters of the double: a tag an update, of all its numbers.

use super::super::{LoraLoader, LoraPart};
use super::payload::mix;
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

/// Brings adapters to the double.
pub struct SimLoraLoader;

impl LoraLoader for SimLoraLoader {
    /// The update's tag.
    type Lora = u64;

    fn load(&self, parts: &[LoraPart]) -> Result<u64> {
        parts.iter().try_for_each(LoraPart::check)?;
        Ok(lora_tag(parts))
    }
}
