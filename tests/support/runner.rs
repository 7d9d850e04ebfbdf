//! A model with its cache, without an engine: what a test asks of a model step by step, on any device.

use std::ops::Range;

use half::{bf16, f16};
use mneme::backend::{AttentionMetadata, Backend, DType, KvLayer, RotatedCopies, SequenceRuns, StreamKind, Tensor};
use mneme::models::{Checkpoint, ForwardBatch, KvCache, Model, ProbeBatch, StepLimits, Workspace};

use super::fp8;
use super::tiny_model::{Family, TinyModel};

pub const BLOCK_SIZE: usize = 16;
pub const NUM_BLOCKS: usize = 16;

/// The most of a step; longer than the sliding window.
pub const NUM_TOKENS: usize = 100;

/// Positions that there are angles for.
pub const MAX_POSITIONS: usize = 1024;

/// A model with its cache: one sequence lies in its blocks from the first on.
pub struct Runner<B: Backend> {
    backend: B,
    stream: B::Stream,
    checkpoint: Checkpoint,
    model: Model<B>,
    kv: KvCache<B::Buffer>,
    workspace: Workspace<B::Buffer>,
}

impl<B: Backend> Runner<B> {
    /// A tiny model of a family, always the same, with an empty cache.
    pub fn new(backend: B, family: Family, kv_dtype: DType) -> Self {
        let written = TinyModel::new(family, 21).write();
        let checkpoint = Checkpoint::open(written.path()).unwrap();
        let model = Model::load(&backend, &checkpoint, None, MAX_POSITIONS).unwrap();
        let layout = model.kv_layout(&backend, BLOCK_SIZE, kv_dtype).unwrap();
        let limits = StepLimits { max_tokens: NUM_TOKENS, max_logits: NUM_TOKENS };
        Self {
            stream: backend.create_stream(StreamKind::Compute).unwrap(),
            kv: KvCache::new(&backend, layout, NUM_BLOCKS).unwrap(),
            workspace: Workspace::new(&backend, model.config(), limits).unwrap(),
            backend,
            checkpoint,
            model,
        }
    }

    /// Waits for the device.
    fn synchronize(&self) {
        self.backend.synchronize(&self.backend.record(&self.stream).unwrap()).unwrap();
    }

    /// Index numbers on the device.
    fn indices(&self, values: &[i32]) -> Tensor<B::Buffer> {
        let bytes = 4 * values.len();
        let mut host = self.backend.allocate_host(bytes).unwrap();
        host.as_mut()[..bytes].copy_from_slice(bytemuck::cast_slice(values));
        let buffer = self.backend.allocate(bytes).unwrap();
        self.backend.upload(&self.stream, &host, &buffer, 0..bytes).unwrap();
        self.synchronize();
        Tensor::new(buffer, 0, 1, values.len(), DType::I32)
    }

    fn numbers(&self, values: impl IntoIterator<Item = usize>) -> Tensor<B::Buffer> {
        self.indices(&values.into_iter().map(|value| value as i32).collect::<Vec<_>>())
    }

    fn download(&self, tensor: &Tensor<B::Buffer>) -> Vec<u8> {
        let mut host = self.backend.allocate_host(tensor.num_bytes()).unwrap();
        self.backend.download(&self.stream, tensor, &mut host, 0).unwrap();
        self.synchronize();
        host.as_ref()[..tensor.num_bytes()].to_vec()
    }

    /// All blocks.
    pub fn cache(&self) -> Vec<u8> {
        let numbers = NUM_BLOCKS * self.block_bytes() / 4;
        self.download(&Tensor::new(self.kv.blocks.clone(), 0, 1, numbers, DType::F32))
    }

    pub fn block_bytes(&self) -> usize {
        self.kv.layout.block_bytes()
    }

    pub fn num_layers(&self) -> usize {
        self.checkpoint.config().num_layers
    }

    pub fn probe_layer(&self) -> usize {
        self.checkpoint.config().probe_layer()
    }

    /// Copies tokens from slots to slots, each so many positions on.
    pub fn try_copy(&self, sources: &[i32], targets: &[i32], deltas: &[i32]) -> mneme::Result<()> {
        let copies = self.copies(sources, targets, deltas);
        self.model.rotate_gather(&self.backend, &self.stream, &self.kv, &copies)?;
        // Before the index arrays go.
        self.synchronize();
        Ok(())
    }

    /// The same, all so many positions on.
    pub fn copy(&self, sources: &[usize], targets: &[usize], delta: i32) {
        let [sources, targets] =
            [sources, targets].map(|slots| slots.iter().map(|slot| *slot as i32).collect::<Vec<_>>());
        self.try_copy(&sources, &targets, &vec![delta; sources.len()]).unwrap();
    }

    /// The same layer by layer, each by the angles that the configuration gives it.
    pub fn copy_by_layers(&self, sources: &[i32], targets: &[i32], deltas: &[i32]) {
        let (config, copies) = (self.checkpoint.config(), self.copies(sources, targets, deltas));
        for layer in 0..config.num_layers {
            let sliding = config.sliding.as_ref().filter(|sliding| sliding.layers[layer]);
            let rope = sliding.map_or(&config.rope, |sliding| &sliding.rope);
            let table = self.backend.load_rope(rope, MAX_POSITIONS).unwrap();
            let kv = KvLayer { blocks: &self.kv.blocks, layout: &self.kv.layout, layer };
            self.backend.rotate_gather(&self.stream, &kv, &copies, &table).unwrap();
            self.synchronize();
        }
    }

    fn copies(&self, sources: &[i32], targets: &[i32], deltas: &[i32]) -> RotatedCopies<B::Buffer> {
        RotatedCopies {
            source_slots: self.indices(sources),
            target_slots: self.indices(targets),
            position_deltas: self.indices(deltas),
        }
    }

    /// Logits of the tokens at these positions of the sequence, bytes of a row each.
    pub fn forward(&self, tokens: &[u32], positions: &[usize]) -> Vec<Vec<u8>> {
        let num_tokens = positions.len();
        let batch = ForwardBatch {
            input_ids: self.numbers(positions.iter().map(|position| tokens[*position] as usize)),
            attention: self.attention(positions),
            output_rows: self.numbers(0..num_tokens),
            num_logits: num_tokens,
            landings: &[],
        };
        self.model.forward(&self.backend, &self.stream, &batch, None, &self.kv, &self.workspace).unwrap();
        let logits = self.download(&self.workspace.logits(num_tokens));
        logits.chunks_exact(logits.len() / num_tokens).map(<[u8]>::to_vec).collect()
    }

    fn attention(&self, positions: &[usize]) -> AttentionMetadata<B::Buffer> {
        let num_tokens = positions.len();
        let context_len = positions.last().unwrap() + 1;
        AttentionMetadata {
            num_seqs: 1,
            num_tokens,
            max_query_len: num_tokens,
            max_context_len: context_len,
            runs: SequenceRuns::of([(num_tokens, context_len)]),
            cu_seqlens_q: self.numbers([0, num_tokens]),
            context_lens: self.numbers([context_len]),
            block_tables: self.numbers(0..NUM_BLOCKS),
            positions: self.numbers(positions.iter().copied()),
            slot_mapping: self.numbers(positions.iter().copied()),
        }
    }

    /// How far the tokens at these places are from what lies there.
    pub fn probe(&self, tokens: &[u32], places: Range<usize>) -> Vec<f32> {
        let num_tokens = places.len();
        let positions: Vec<usize> = places.collect();
        let batch = ProbeBatch {
            input_ids: self.numbers(positions.iter().map(|at| tokens[*at] as usize)),
            attention: self.attention(&positions),
            layer: self.probe_layer(),
            slots: self.numbers(positions.iter().copied()),
            no_slots: self.indices(&vec![-1; num_tokens]),
            deviations: Tensor::new(self.backend.allocate(4 * num_tokens).unwrap(), 0, 1, num_tokens, DType::F32),
        };
        self.model.probe(&self.backend, &self.stream, &batch, None, &self.kv, &self.workspace).unwrap();
        let bytes = self.download(&batch.deviations);
        bytes.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
    }

    /// Keys and values that one layer keeps of the token in a slot.
    pub fn stored(&self, layer: usize, slot: usize) -> Vec<f64> {
        self.stored_in(&self.cache(), layer, slot)
    }

    /// The same in blocks that were there at another time.
    pub fn stored_in(&self, cache: &[u8], layer: usize, slot: usize) -> Vec<f64> {
        let layout = &self.kv.layout;
        let block = &cache[slot / BLOCK_SIZE * layout.block_bytes()..][..layout.block_bytes()];
        let token = slot % BLOCK_SIZE;
        let places = (0..layout.num_kv_heads()).flat_map(|head| {
            (0..layout.head_dim()).flat_map(move |dim| {
                let k = layout.k_tile_offset(layer, head) + layout.k_offset(token, dim);
                [k, layout.v_tile_offset(layer, head) + layout.v_offset(token, dim)]
            })
        });
        let number = |at: usize| match layout.dtype() {
            DType::BF16 => bf16::from_le_bytes([block[at], block[at + 1]]).to_f64(),
            DType::F16 => f16::from_le_bytes([block[at], block[at + 1]]).to_f64(),
            DType::F8E4M3 => f64::from(fp8::decode(block[at])),
            _ => f64::from(f32::from_le_bytes(block[at..at + 4].try_into().unwrap())),
        };
        places.map(number).collect()
    }
}
