//! What composed prompts take beside ordinary steps: copies of stored tokens into their blocks, and passes through the
//! lowest layers that show which copies are far from what belongs there. Which tokens these are is the sequences' to say.

use super::inputs::{ALIGNED_NUMBERS, StepInputs};
use super::{ModelRunner, merged_rows};
use crate::Result;
use crate::backend::{Backend, DType, LoraBatch, RotatedCopies, Tensor};
use crate::engine::composition::Move;
use crate::engine::residency::Residency;
use crate::engine::scheduler::{ScheduledSequence, SchedulerLimits};
use crate::engine::sequence::Sequence;
use crate::models::{Adapted, ProbeBatch};

/// Arrays of copies into a composed prompt.
const NUM_MOVE_ARRAYS: usize = 3;

/// Buffers of these copies and passes.
pub(super) struct CompositionBuffers<B: Backend> {
    /// Slots and distances of what is copied.
    moves: StepInputs<B>,
    /// `[1, T]` f32.
    deviations: Tensor<B::Buffer>,
    host_deviations: B::HostBuffer,
}

impl<B: Backend> CompositionBuffers<B> {
    pub(super) fn new(backend: &B, limits: &SchedulerLimits) -> Result<Self> {
        let max_tokens = limits.max_num_batched_tokens;
        let bytes = max_tokens * size_of::<f32>();
        Ok(Self {
            moves: StepInputs::new(backend, NUM_MOVE_ARRAYS * (limits.max_model_len + ALIGNED_NUMBERS))?,
            deviations: Tensor::new(backend.allocate(bytes)?, 0, 1, max_tokens, DType::F32),
            host_deviations: backend.allocate_host(bytes)?,
        })
    }
}

impl<B: Backend> ModelRunner<B> {
    /// Copies what composed prompts take from their pieces into the blocks of those that are about to be computed.
    pub(super) fn gather(&mut self, running: &[Box<Sequence>], scheduled: &[ScheduledSequence]) -> Result<()> {
        let block_size = self.kv.layout.block_size();
        for entry in scheduled {
            if let Some(moves) = running[entry.index].pending_moves(block_size) {
                self.gather_one(moves)?;
            }
        }
        Ok(())
    }

    /// Waits for the copies, because the next ones are written to the same arrays.
    fn gather_one(&mut self, moves: impl Iterator<Item = Move>) -> Result<()> {
        let inputs = &mut self.composition.moves;
        inputs.len = 0;
        let moves: Vec<Move> = moves.collect();
        let arrays = [(); NUM_MOVE_ARRAYS].map(|()| inputs.reserve(1, moves.len()));
        for (at, found) in moves.iter().enumerate() {
            let numbers = [found.source_slot as i32, found.target_slot as i32, found.position_delta as i32];
            for ((_, range), number) in arrays.iter().zip(numbers) {
                inputs.numbers()[range.start + at] = number;
            }
        }
        let [source_slots, target_slots, position_deltas] = arrays.map(|(tensor, _)| tensor);
        let uploaded = 0..inputs.len * size_of::<i32>();
        self.backend.upload(&self.stream, &inputs.host, &inputs.device, uploaded)?;
        let copies = RotatedCopies { source_slots, target_slots, position_deltas };
        self.model.rotate_gather(&self.backend, &self.stream, &self.kv, &copies)?;
        let done = self.backend.record(&self.stream)?;
        self.backend.synchronize(&done)
    }

    /// Takes the next tokens of composed prompts through the lowest layers and waits for their deviations.
    pub(in crate::engine) fn probe(
        &mut self,
        running: &[Box<Sequence>],
        probing: &[ScheduledSequence],
        residency: &Residency,
    ) -> Result<()> {
        if probing.is_empty() {
            return Ok(());
        }
        self.gather(running, probing)?;
        self.inputs.len = 0;
        let batch = self.write_probe(running, probing);
        let adapted = self.write_adapters(running, probing, residency);
        let uploaded = 0..self.inputs.len * size_of::<i32>();
        self.backend.upload(&self.stream, &self.inputs.host, &self.inputs.device, uploaded)?;
        let groups = self.lora.groups();
        let lora = adapted.map(|(rows, scales)| LoraBatch { rows, scales, groups });
        let merged = merged_rows(self.merged.as_ref(), running, probing);
        let adapted = (lora.is_some() || merged.is_some()).then(|| Adapted { lora, head: None, merged });
        self.model.probe(&self.backend, &self.stream, &batch, adapted.as_ref(), &self.kv, &self.workspace)?;
        drop(adapted);
        self.lora.clear();
        let host = &mut self.composition.host_deviations;
        self.backend.download(&self.stream, &batch.deviations, host, 0)?;
        let done = self.backend.record(&self.stream)?;
        self.backend.synchronize(&done)
    }

    fn write_probe(&mut self, running: &[Box<Sequence>], probing: &[ScheduledSequence]) -> ProbeBatch<B::Buffer> {
        let (attention, input_ids) = self.write_tokens(running, probing, None);
        let num_tokens = attention.num_tokens;
        let (slots, slots_at) = self.inputs.reserve(1, num_tokens);
        let (no_slots, no_slots_at) = self.inputs.reserve(1, num_tokens);
        let block_size = self.kv.layout.block_size();
        let numbers = self.inputs.numbers();
        numbers[no_slots_at].fill(-1);
        let slot = |sequence: &Sequence, at: usize| match sequence.is_gathered(at) {
            true => (sequence.blocks[at / block_size].index() * block_size + at % block_size) as i32,
            false => -1,
        };
        let tokens = probing.iter().flat_map(|entry| {
            let sequence = &running[entry.index];
            sequence.next_positions().take(entry.num_tokens).map(move |at| slot(sequence, at))
        });
        numbers[slots_at].iter_mut().zip(tokens).for_each(|(number, slot)| *number = slot);
        let layer = self.model.config().probe_layer();
        let deviations = self.composition.deviations.buffer().clone();
        let deviations = Tensor::new(deviations, 0, 1, num_tokens, DType::F32);
        ProbeBatch { input_ids, attention, layer, slots, no_slots, deviations }
    }

    /// Deviations of the tokens that were last probed, in order.
    pub(in crate::engine) fn deviations(&self) -> &[f32] {
        bytemuck::cast_slice(self.composition.host_deviations.as_ref())
    }
}
