//! Blocks on their way from the host's memory that a step may begin to use before all their bytes are there: it waits, on
//! the device, for one layer after the other.

use super::KvLayout;
use crate::Result;

/// A block to be brought up from the host's memory.
pub struct LandingBlock<'a, H> {
    /// All bytes of it.
    pub source: &'a H,
    /// Where it goes, in bytes.
    pub target_offset: usize,
}

/// Blocks on their way: an event for every few layers, the lowest first.
#[derive(Debug)]
pub struct Landing<E> {
    events: Vec<E>,
    layers_per_event: usize,
}

impl<E> Landing<E> {
    /// Event `i` is that of layers `[i * layers_per_event, (i + 1) * layers_per_event)`, and behind those before it.
    ///
    /// # Panics
    /// Without a layer per event.
    pub fn new(events: Vec<E>, layers_per_event: usize) -> Self {
        assert!(layers_per_event > 0, "an event is that of a layer at least");
        Self { events, layers_per_event }
    }

    /// What is to be waited for before the bytes of `layer` are touched, by who has waited for those of the layers below:
    /// `None` where that is enough.
    pub fn event_before(&self, layer: usize) -> Option<&E> {
        let is_first = layer.is_multiple_of(self.layers_per_event);
        self.events.get(layer / self.layers_per_event).filter(|_| is_first)
    }

    /// What `queue(first, end)` returns for every few layers of `layout`, at most `max_events` of them.
    pub(super) fn queue(
        layout: &KvLayout,
        max_events: usize,
        mut queue: impl FnMut(usize, usize) -> Result<E>,
    ) -> Result<Self> {
        let num_layers = layout.num_layers();
        let layers_per_event = num_layers.div_ceil(max_events);
        let firsts = (0..num_layers).step_by(layers_per_event);
        let events =
            firsts.map(|first| queue(first, (first + layers_per_event).min(num_layers))).collect::<Result<_>>()?;
        Ok(Self::new(events, layers_per_event))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::DType;

    #[test]
    fn every_layer_has_waited_for_its_own_event() {
        for (num_layers, max_events) in [(1, 8), (2, 8), (8, 8), (9, 8), (30, 8), (30, 1)] {
            let layout = KvLayout::new(num_layers, 1, 16, 16, DType::BF16).unwrap();
            let landing = Landing::queue(&layout, max_events, |first, end| Ok(first..end)).unwrap();
            assert!(landing.events.len() <= max_events);
            let mut waited = 0..0;
            for layer in 0..num_layers {
                if let Some(event) = landing.event_before(layer) {
                    assert_eq!(
                        (event.start, layer),
                        (waited.end, waited.end),
                        "events come in order, and none too early"
                    );
                    waited = event.clone();
                }
                assert!(waited.contains(&layer));
            }
            assert_eq!(waited.end, num_layers);
        }
    }
}
