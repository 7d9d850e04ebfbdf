//! Steps in which every sequence goes on by one token, so that they are like the step before: a device may keep them.

use super::ModelRunner;
use super::outputs::{is_embedding, output_range};
use crate::backend::{Backend, DecodeShape};
use crate::engine::scheduler::ScheduledSequence;
use crate::engine::sequence::Sequence;

impl<B: Backend> ModelRunner<B> {
    /// The shape that the step is given to be like others; `None` when it is no plain decode step, or the device keeps none.
    pub(super) fn repeated_shape(
        &self,
        running: &[Box<Sequence>],
        scheduled: &[ScheduledSequence],
    ) -> Option<DecodeShape> {
        let mut shape =
            DecodeShape { num_seqs: scheduled.len(), max_blocks: 0, max_context_len: 0, adapters: 0, merged: None };
        for entry in scheduled {
            let sequence = &running[entry.index];
            if !goes_on_by_one(sequence, entry.num_tokens) {
                return None;
            }
            shape.max_blocks = shape.max_blocks.max(sequence.blocks.len());
            shape.max_context_len = shape.max_context_len.max(sequence.end_of_next(1));
        }
        let shape = self.backend.repeated_shape(shape)?;
        Some(shape.at_most(self.max_blocks, self.limits.max_model_len))
    }
}

/// Whether a sequence has one token that logits are wanted of.
fn goes_on_by_one(sequence: &Sequence, num_tokens: usize) -> bool {
    num_tokens == 1 && !is_embedding(sequence) && output_range(sequence, num_tokens) == (0..1)
}
