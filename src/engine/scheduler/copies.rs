//! Copies between tiers, as the queues see them: what sequences wait for, what arrives, what goes down.

use super::super::sequence::Sequence;
use super::super::tiers::{Arrival, Fetchable, Plan, Tiers};
use super::Scheduler;
use crate::kv::BlockHash;
use crate::{Error, Result};

impl Scheduler {
    pub(super) fn plan_fetch(&mut self, sequence: &mut Sequence) -> Plan {
        let num_shareable = sequence.num_shareable_blocks(self.limits.block_size);
        self.tiers.plan(sequence, num_shareable)
    }

    pub(super) fn start_fetch(&mut self, sequence: Box<Sequence>, found: Fetchable) {
        self.tiers.start_fetch(&mut self.pool, sequence, found);
        self.promised.extend(self.tiers.last_promised());
    }

    /// Takes note of what has become of copies between tiers. Sequences whose blocks are there wait in the queue again;
    /// the model's identity is returned when it has become known.
    ///
    /// # Errors
    /// When blocks did not come up that steps may have used already.
    pub(in super::super) fn absorb_arrivals(&mut self) -> Result<Option<Vec<u8>>> {
        let mut identity = None;
        while let Some(arrival) = self.tiers.poll(&mut self.pool) {
            match arrival {
                Arrival::Ready(mut sequence, promised) => {
                    self.break_promises(&promised);
                    sequence.note_attached(self.limits.block_size);
                    self.add(sequence);
                }
                Arrival::Attached(mut sequence) => {
                    sequence.note_attached(self.limits.block_size);
                    self.add(sequence);
                }
                Arrival::Landed(promised) | Arrival::Abandoned(promised) => self.break_promises(&promised),
                // Of a device's own copies none fails without the device: nothing that it has computed since is sure.
                Arrival::NeverLanded => {
                    return Err(Error::Device(
                        "KV blocks did not come up from the host, behind a step that waited for them; start again"
                            .into(),
                    ));
                }
                Arrival::Ended(mut sequence) => self.release(&mut sequence),
                Arrival::Opened(found) => identity = Some(found),
            }
        }
        self.pump_copies();
        Ok(identity)
    }

    /// Starts as many copies down as may be under way, and zeroing what is to be zeroed.
    pub(in super::super) fn pump_copies(&mut self) {
        self.tiers.pump_saves(&mut self.pool);
        self.tiers.pump_wipes(&mut self.pool);
    }

    fn break_promises(&mut self, promised: &[BlockHash]) {
        for hash in promised {
            self.promised.remove(hash);
        }
    }

    /// Copies between tiers, and what they cost.
    pub(in super::super) fn tiers(&self) -> &Tiers {
        &self.tiers
    }

    /// The same, to change.
    pub(in super::super) fn tiers_mut(&mut self) -> &mut Tiers {
        &mut self.tiers
    }
}
