//! Attention over a paged cache, and the kernels that write the cache.

use mneme::Result;
use mneme::backend::{
    AttentionMetadata, AttentionShape, Backend, DType, HeadTransform, KvLayer, KvLayout, RopeConfig, RopeScaling,
    RotatedCopies, SequenceRuns, Tensor,
};

use super::bench::{Bench, Sink, Work};
use super::measure::Effort;

/// Layers that take turns; their caches lie in the same blocks.
const NUM_LAYERS: usize = 4;
const BLOCK_SIZE: usize = 16;
const THETA: f64 = 10_000.0;

/// A cache in which each sequence has as many blocks as it needs.
struct Cache<B: Backend> {
    layout: KvLayout,
    blocks: B::Buffer,
    rope: B::RopeTable,
    context_len: usize,
    blocks_per_sequence: usize,
}

impl<B: Backend> Cache<B> {
    fn new(bench: &Bench<B>, layout: KvLayout, context_len: usize) -> Result<Self> {
        let (dtype, num_sequences) = (layout.dtype(), bench.batch_size);
        // Copies go to as many tokens again.
        let blocks_per_sequence = context_len.div_ceil(BLOCK_SIZE);
        let num_blocks = (num_sequences * blocks_per_sequence).max(2 * bench.num_tokens.div_ceil(BLOCK_SIZE));
        let blocks = bench.tensor(num_blocks, layout.block_bytes() / dtype.block_bytes(), dtype)?;
        let rope = RopeConfig { head_dim: layout.head_dim(), theta: THETA, scaling: RopeScaling::Plain };
        let rope = bench.backend.load_rope(&rope, context_len.max(bench.num_tokens))?;
        let blocks = Tensor::buffer(&blocks).clone();
        Ok(Self { layout, blocks, rope, context_len, blocks_per_sequence })
    }

    /// Bytes of keys and values of one token of a layer.
    fn kv_bytes(&self) -> usize {
        2 * self.layout.num_kv_heads() * self.layout.head_dim() * self.layout.dtype().block_bytes()
    }

    fn layer(&self, turn: usize) -> KvLayer<'_, B::Buffer> {
        KvLayer { blocks: &self.blocks, layout: &self.layout, layer: turn % NUM_LAYERS }
    }

    /// A step of `num_sequences` sequences that has the last `num_queries` tokens of each.
    fn step(&self, bench: &Bench<B>, num_sequences: usize, num_queries: usize) -> Result<AttentionMetadata<B::Buffer>> {
        let per_sequence = self.blocks_per_sequence;
        let positions: Vec<usize> = (self.context_len - num_queries..self.context_len).collect();
        let each = |number: &dyn Fn(usize, usize) -> usize| -> Vec<usize> {
            (0..num_sequences).flat_map(|at| positions.iter().map(move |position| number(at, *position))).collect()
        };
        // Neighbours in a sequence are none in memory.
        let block = |sequence: usize, index: usize| index * num_sequences + sequence;
        let slot = |sequence: usize, position: usize| {
            block(sequence, position / BLOCK_SIZE) * BLOCK_SIZE + position % BLOCK_SIZE
        };
        let starts: Vec<usize> = (0..=num_sequences).map(|at| at * num_queries).collect();
        let tables: Vec<usize> =
            (0..num_sequences).flat_map(|at| (0..per_sequence).map(move |index| block(at, index))).collect();
        let tables = bench.indices(&tables)?;
        let tables = Tensor::new(tables.buffer().clone(), 0, num_sequences, per_sequence, tables.dtype());
        Ok(AttentionMetadata {
            num_seqs: num_sequences,
            num_tokens: num_sequences * num_queries,
            max_query_len: num_queries,
            max_context_len: self.context_len,
            runs: SequenceRuns::of(vec![(num_queries, self.context_len); num_sequences]),
            cu_seqlens_q: bench.indices(&starts)?,
            context_lens: bench.indices(&vec![self.context_len; num_sequences])?,
            block_tables: tables,
            positions: bench.indices(&each(&|_, position| position))?,
            slot_mapping: bench.indices(&each(&slot))?,
        })
    }
}

/// Keys that some of the last queries of a context sees.
fn seen_by_any(context_len: usize, num_queries: usize, window: Option<usize>) -> usize {
    window.map_or(context_len, |window| context_len.min(num_queries - 1 + window))
}

/// Pairs of one of the last queries of a context and a key that it sees.
fn num_pairs(context_len: usize, num_queries: usize, window: Option<usize>) -> usize {
    (context_len - num_queries + 1..=context_len).map(|seen| seen.min(window.unwrap_or(seen))).sum()
}

impl<B: Backend> Bench<B> {
    /// Decode of a batch and prefill of one sequence, over all and in a window, moving a cube's tokens and comparing them: in every type that the device can keep the
    /// cache as beside its activations.
    pub(super) fn attention(&self, context_len: usize, effort: &Effort, sink: Sink<'_>) -> Result<()> {
        let context_len = context_len.max(self.num_tokens);
        for layout in self.layouts()? {
            let cache = Cache::new(self, layout, context_len)?;
            self.reserve(&cache.layout, context_len)?;
            self.store(&cache, self.batch_size, 1, effort, sink)?;
            self.store(&cache, 1, self.num_tokens, effort, sink)?;
            for window in [None, Some(context_len / 4)] {
                self.attend(&cache, self.batch_size, 1, window, effort, sink)?;
                self.attend(&cache, 1, self.num_tokens, window, effort, sink)?;
            }
            self.rotate_gather(&cache, effort, sink)?;
            self.kv_deviation(&cache, effort, sink)?;
        }
        Ok(())
    }

    fn layouts(&self) -> Result<Vec<KvLayout>> {
        let (num_kv_heads, head_dim) = (self.dimensions.num_kv_heads, self.dimensions.head_dim);
        let of = |dtype| {
            KvLayout::with_order(self.backend.kv_order(), NUM_LAYERS, num_kv_heads, head_dim, BLOCK_SIZE, dtype)
        };
        let own = of(self.backend.kv_dtype())?;
        let fp8 = of(DType::F8E4M3).ok().filter(|layout| self.backend.check_kv_layout(layout).is_ok());
        Ok([Some(own), fp8].into_iter().flatten().collect())
    }

    fn shape(&self, window: Option<usize>) -> AttentionShape {
        let dimensions = self.dimensions;
        AttentionShape {
            num_heads: dimensions.num_heads,
            num_kv_heads: dimensions.num_kv_heads,
            head_dim: dimensions.head_dim,
            scale: 1.0 / (dimensions.head_dim as f32).sqrt(),
            softcap: None,
            window,
        }
    }

    fn store(
        &self,
        cache: &Cache<B>,
        num_sequences: usize,
        num_queries: usize,
        effort: &Effort,
        sink: Sink<'_>,
    ) -> Result<()> {
        let step = cache.step(self, num_sequences, num_queries)?;
        let (num_tokens, q_size, dtype) = (step.num_tokens, self.dimensions.q_size(), cache.layout.dtype());
        let qkv = self.activations(num_tokens, self.dimensions.qkv_size())?;
        let heads = HeadTransform { shape: self.shape(None), q_norm: None, k_norm: None, rope: &cache.rope };
        let work = Work {
            name: "rope_and_store_kv",
            shape: format!("[{num_tokens}, {}], {dtype}", qkv.columns()),
            // Queries and keys are read and written, values read; keys and values are written to the cache.
            bytes: 2 * qkv.num_bytes() - qkv.num_bytes() * (qkv.columns() - q_size) / 2 / qkv.columns()
                + num_tokens * cache.kv_bytes(),
            flops: 0,
        };
        let launch = |turn| self.backend.rope_and_store_kv(&self.stream, &qkv, &heads, &cache.layer(turn), &step);
        self.measure(effort, work, &launch, sink)
    }

    fn attend(
        &self,
        cache: &Cache<B>,
        num_sequences: usize,
        num_queries: usize,
        window: Option<usize>,
        effort: &Effort,
        sink: Sink<'_>,
    ) -> Result<()> {
        let step = cache.step(self, num_sequences, num_queries)?;
        let num_tokens = step.num_tokens;
        let (shape, q_size, dtype) = (self.shape(window), self.dimensions.q_size(), cache.layout.dtype());
        let qkv = self.activations(num_tokens, self.dimensions.qkv_size())?;
        let out = self.activations(num_tokens, q_size)?;
        let name = if num_queries == 1 { "attention decode" } else { "attention prefill" };
        let of = window.map_or_else(String::new, |window| format!(", window {window}"));
        let work = Work {
            name,
            shape: format!("{num_sequences} x {num_queries} over {}{of}, {dtype}", cache.context_len),
            bytes: num_sequences * seen_by_any(cache.context_len, num_queries, window) * cache.kv_bytes()
                + 2 * num_tokens * q_size * self.activation_bytes(),
            flops: 4 * num_sequences * num_pairs(cache.context_len, num_queries, window) * q_size,
        };
        let launch = |turn| self.backend.attention(&self.stream, &qkv, &shape, &cache.layer(turn), &step, &out);
        self.measure(effort, work, &launch, sink)
    }

    /// As blended prompts choose what they compute again.
    fn kv_deviation(&self, cache: &Cache<B>, effort: &Effort, sink: Sink<'_>) -> Result<()> {
        let num_tokens = self.num_tokens.min(cache.context_len);
        let qkv = self.activations(num_tokens, self.dimensions.qkv_size())?;
        let slots = self.indices(&(0..num_tokens).collect::<Vec<_>>())?;
        let out = self.tensor(1, num_tokens, DType::F32)?;
        let kv_columns = qkv.columns() - self.dimensions.q_size();
        let work = Work {
            name: "kv_deviation",
            shape: format!("{num_tokens} tokens, {}", cache.layout.dtype()),
            bytes: num_tokens * (cache.kv_bytes() + kv_columns * self.activation_bytes()),
            flops: 0,
        };
        let launch =
            |turn| self.backend.kv_deviation(&self.stream, &qkv, &self.shape(None), &cache.layer(turn), &slots, &out);
        self.measure(effort, work, &launch, sink)
    }

    fn rotate_gather(&self, cache: &Cache<B>, effort: &Effort, sink: Sink<'_>) -> Result<()> {
        let num_copies = self.num_tokens.next_multiple_of(BLOCK_SIZE).min(cache.context_len / 2);
        let first_target = num_copies.next_multiple_of(BLOCK_SIZE);
        let copies = RotatedCopies {
            source_slots: self.indices(&(0..num_copies).collect::<Vec<_>>())?,
            target_slots: self.indices(&(first_target..first_target + num_copies).collect::<Vec<_>>())?,
            position_deltas: self.indices(&vec![1; num_copies])?,
        };
        let work = Work {
            name: "rotate_gather",
            shape: format!("{num_copies} tokens, {}", cache.layout.dtype()),
            bytes: 2 * num_copies * cache.kv_bytes(),
            flops: 0,
        };
        let launch = |turn| self.backend.rotate_gather(&self.stream, &cache.layer(turn), &copies, &cache.rope);
        self.measure(effort, work, &launch, sink)
    }
}
