//! The [`Backend`] trait over the kernels of this module.
//!
//! Kernels run on the calling thread and the pool before the call returns; the pool and the scratch space are one
//! lock's content, taken once per kernel and never contended: the engine thread is the only caller.

#![allow(unsafe_code)]

use std::ops::Range;
use std::sync::{Mutex, MutexGuard};

use super::copy_stream::{CpuEvent, CpuStream};
use super::memory::{CpuBuffer, CpuHostBuffer, numbers, numbers_mut, vector};
use super::transfer::CpuTransfer;
use super::weight_memory::WeightArena;
use super::{
    AttentionBatch, AttentionScratch, CpuLora, CpuLoraLoader, FeedForwardWeights, GateKind, GemmScratch, Isa, KvArena,
    KvDeviationBatch, KvStoreBatch, LoraInput, LoraRows, LoraScratch, LoraWork, PackedMatrix, RopeTable,
    RotateGatherBatch, Rows, RowsMut, SampleScratch, ThreadPool,
};
use crate::backend::{
    Activation, AttentionMetadata, AttentionShape, Backend, BufferCopy, DType, Device, GatedFeedForward, HeadTransform,
    HostTensor, KvLayer, KvOrder, LoraAdapter, LoraBatch, LoraSite, Norm, RopeConfig, RotatedCopies, RowSampling,
    SamplingBatch, ScaledUpdate, StepBounds, StreamKind, Tensor, check_softcap, dequantize_row,
};
use crate::telemetry::Degradations;
use crate::{Result, invalid};

type CpuTensor = Tensor<CpuBuffer>;

/// Kernels for one instruction set on a fixed number of threads.
pub struct CpuBackend {
    isa: Isa,
    workers: Mutex<Workers>,
    degradations: Degradations,
}

struct Workers {
    pool: ThreadPool,
    weights: WeightArena,
    /// Of copies with adapters merged into them. The last mapping of a copy that has gone stays for the next one.
    merged_weights: WeightArena,
    gemm: GemmScratch,
    attention: AttentionScratch,
    lora: LoraScratch,
    sampling: Vec<SampleScratch>,
}

impl CpuBackend {
    /// A backend with `num_threads` threads, the caller's included.
    pub fn new(isa: Isa, num_threads: usize) -> Result<Self> {
        if !isa.is_available() {
            return Err(invalid!("this machine has no {isa}; the best it has is {}", Isa::best()));
        }
        let pool = ThreadPool::new(num_threads);
        let workers = Workers {
            pool,
            weights: WeightArena::default(),
            merged_weights: WeightArena::default(),
            gemm: GemmScratch::default(),
            attention: AttentionScratch::default(),
            lora: LoraScratch::default(),
            sampling: Vec::new(),
        };
        Ok(Self { isa, workers: Mutex::new(workers), degradations: Degradations::default() })
    }

    fn workers(&self) -> MutexGuard<'_, Workers> {
        self.workers.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl CpuBackend {
    /// `out[r] += scale * scaling * (x[r] A^T) B^T` with that update of each adapter.
    fn add_products(
        &self,
        x: &CpuTensor,
        batch: &LoraBatch<'_, Self>,
        out: &CpuTensor,
        update_of: impl Fn(&LoraAdapter<CpuLora>) -> Option<&CpuLora> + Sync,
    ) -> Result<()> {
        x.expect("projection input", out.rows(), x.columns(), DType::F32)?;
        // SAFETY: the tensors are different buffers, and work before this call is done.
        let input = LoraInput::Rows { x: unsafe { numbers(x) }, num_inputs: x.columns() };
        self.add_updates(input, batch, out, update_of)
    }

    fn add_updates(
        &self,
        input: LoraInput<'_>,
        batch: &LoraBatch<'_, Self>,
        out: &CpuTensor,
        update_of: impl Fn(&LoraAdapter<CpuLora>) -> Option<&CpuLora> + Sync,
    ) -> Result<()> {
        batch.check()?;
        out.expect("rows with adapters", out.rows(), out.columns(), DType::F32)?;
        // SAFETY: the tensors are different buffers, and work before this call is done.
        let (rows, scales) = unsafe { (numbers::<i32>(&batch.rows), numbers::<f32>(&batch.scales)) };
        expect_indices("adapted row", rows, out.rows())?;
        let group = |index: usize| {
            let group = &batch.groups[index];
            update_of(&group.adapter).map(|update| LoraRows { update, entries: group.entries.clone() })
        };
        // SAFETY: as above.
        let sums = unsafe { numbers_mut(out) };
        let work = LoraWork { input, rows, scales, group, num_groups: batch.groups.len() };
        let Workers { pool, lora, .. } = &mut *self.workers();
        super::add_lora(pool, self.isa, lora, &work, sums, out.columns());
        Ok(())
    }
}

fn expect_indices(what: &str, indices: &[i32], below: usize) -> Result<()> {
    match indices.iter().find(|&&index| usize::try_from(index).map_or(true, |index| index >= below)) {
        Some(index) => Err(invalid!("{what} {index} is not in [0, {below})")),
        None => Ok(()),
    }
}

impl Device for CpuBackend {
    type Buffer = CpuBuffer;
    type HostBuffer = CpuHostBuffer;
    type Stream = CpuStream;
    type Event = CpuEvent;
    type Transfer = CpuTransfer;

    fn degradations(&self) -> &Degradations {
        &self.degradations
    }

    fn allocate(&self, bytes: usize) -> Result<CpuBuffer> {
        CpuBuffer::allocate(bytes)
    }

    fn allocate_host(&self, bytes: usize) -> Result<CpuHostBuffer> {
        CpuHostBuffer::allocate(bytes)
    }

    fn create_transfer(&self) -> Result<CpuTransfer> {
        Ok(CpuTransfer)
    }

    fn create_stream(&self, kind: StreamKind) -> Result<CpuStream> {
        CpuStream::new(kind)
    }

    fn upload(
        &self,
        _stream: &CpuStream,
        source: &CpuHostBuffer,
        target: &CpuBuffer,
        range: Range<usize>,
    ) -> Result<()> {
        // SAFETY: work before it on the stream is done, and the host side is borrowed.
        let bytes = unsafe { target.bytes_mut(range.start, range.len()) };
        bytes.copy_from_slice(&source.as_ref()[range]);
        Ok(())
    }

    fn download(
        &self,
        _stream: &CpuStream,
        source: &CpuTensor,
        target: &mut CpuHostBuffer,
        target_offset: usize,
    ) -> Result<()> {
        // SAFETY: work before it on the stream is done.
        let bytes = unsafe { source.buffer().bytes(source.offset_bytes(), source.num_bytes()) };
        target.as_mut()[target_offset..target_offset + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn copy(&self, stream: &CpuStream, copy: &BufferCopy<'_, CpuBuffer>) -> Result<()> {
        for (what, buffer, offset) in
            [("source", copy.source, copy.source_offset), ("target", copy.target, copy.target_offset)]
        {
            if offset > buffer.len() || copy.bytes > buffer.len() - offset {
                return Err(invalid!("copy {what} {offset}+{} lies outside {} bytes", copy.bytes, buffer.len()));
            }
        }
        stream.copy(copy)
    }

    fn record(&self, stream: &CpuStream) -> Result<CpuEvent> {
        Ok(stream.record())
    }

    fn wait(&self, _stream: &CpuStream, event: &CpuEvent) -> Result<()> {
        event.synchronize();
        Ok(())
    }

    fn is_complete(&self, event: &CpuEvent) -> Result<bool> {
        Ok(event.is_complete())
    }

    fn synchronize(&self, event: &CpuEvent) -> Result<()> {
        event.synchronize();
        Ok(())
    }
}

impl Backend for CpuBackend {
    type Matrix = PackedMatrix;
    type RopeTable = RopeTable;
    type LoraLoader = CpuLoraLoader;

    fn name(&self) -> String {
        format!("cpu-{}", self.isa)
    }

    fn activation_dtype(&self) -> DType {
        DType::F32
    }

    fn kv_order(&self) -> KvOrder {
        KvOrder::Pairs
    }

    fn kv_dtype(&self) -> DType {
        DType::BF16
    }

    fn load_matrix(&self, parts: &[HostTensor], dtype: Option<DType>) -> Result<PackedMatrix> {
        let Workers { pool, weights, gemm, lora, .. } = &mut *self.workers();
        let matrix = PackedMatrix::pack_in(weights, parts, dtype, pool)?;
        gemm.note(self.isa, &matrix);
        lora.note(self.isa, matrix.num_columns());
        Ok(matrix)
    }

    fn load_vector(&self, parts: &[HostTensor], convert: &dyn Fn(f32) -> f32) -> Result<CpuTensor> {
        let mut values = Vec::new();
        for part in parts {
            let start = values.len();
            values.resize(start + part.rows() * part.columns(), 0.0);
            dequantize_row(part.dtype(), part.bytes(), &mut values[start..]);
        }
        values.iter_mut().for_each(|value| *value = convert(*value));
        vector(&values)
    }

    fn load_rope(&self, config: &RopeConfig, max_positions: usize) -> Result<RopeTable> {
        RopeTable::new(config, max_positions)
    }

    fn create_lora_loader(&self) -> Result<CpuLoraLoader> {
        Ok(CpuLoraLoader)
    }

    fn reserve(&self, bounds: &StepBounds<'_>) -> Result<()> {
        let Workers { pool, gemm, attention, lora, weights: _, merged_weights: _, sampling: _ } = &mut *self.workers();
        gemm.reserve(bounds.max_tokens, pool.num_threads());
        lora.reserve(bounds.max_tokens);
        attention.reserve(self.isa, pool.num_threads(), bounds);
        Ok(())
    }

    fn embed(
        &self,
        _stream: &CpuStream,
        table: &PackedMatrix,
        ids: &CpuTensor,
        scale: f32,
        out: &CpuTensor,
    ) -> Result<()> {
        out.expect("embedding output", ids.columns(), table.num_columns(), DType::F32)?;
        // SAFETY: the tensors are different buffers, and work before this call is done.
        let (ids, out) = unsafe { (numbers::<i32>(ids), numbers_mut::<f32>(out)) };
        expect_indices("token id", ids, table.num_rows())?;
        super::embed(&mut self.workers().pool, table, ids, scale, out);
        Ok(())
    }

    fn linear(
        &self,
        _stream: &CpuStream,
        x: &CpuTensor,
        weight: &PackedMatrix,
        bias: Option<&CpuTensor>,
        out: &CpuTensor,
    ) -> Result<()> {
        let (inputs, outputs) = (weight.num_columns(), weight.num_rows());
        x.expect("projection input", x.rows(), inputs, DType::F32)?;
        out.expect("projection output", x.rows(), outputs, DType::F32)?;
        if let Some(bias) = bias {
            bias.expect("projection bias", 1, outputs, DType::F32)?;
        }
        let Workers { pool, gemm, .. } = &mut *self.workers();
        // SAFETY: the tensors are different buffers, and work before this call is done.
        let (rows, out, bias) = unsafe { (numbers(x), numbers_mut(out), bias.map(|bias| numbers(bias))) };
        let (rows, out) =
            (Rows { data: rows, num_rows: x.rows(), stride: inputs }, RowsMut { data: out, stride: outputs });
        super::gemm(pool, self.isa, rows, weight, bias, out, gemm);
        Ok(())
    }

    fn add_lora(
        &self,
        _stream: &CpuStream,
        x: &CpuTensor,
        batch: &LoraBatch<'_, Self>,
        site: LoraSite,
        out: &CpuTensor,
    ) -> Result<()> {
        self.add_products(x, batch, out, |adapter| adapter.get(site))
    }

    fn add_lora_embedding(
        &self,
        _stream: &CpuStream,
        ids: &CpuTensor,
        batch: &LoraBatch<'_, Self>,
        factor: f32,
        out: &CpuTensor,
    ) -> Result<()> {
        ids.expect("tokens", 1, out.rows(), DType::I32)?;
        let embedding = |adapter: &'_ LoraAdapter<CpuLora>| adapter.embedding().map(CpuLora::num_inputs);
        let Some(vocab_size) = batch.groups.iter().find_map(|group| embedding(&group.adapter)) else { return Ok(()) };
        // SAFETY: the tensors are different buffers, and work before this call is done.
        let ids = unsafe { numbers::<i32>(ids) };
        expect_indices("token id", ids, vocab_size)?;
        self.add_updates(LoraInput::Tokens { ids, factor, vocab_size }, batch, out, |adapter| adapter.embedding())
    }

    fn add_lora_head(
        &self,
        _stream: &CpuStream,
        x: &CpuTensor,
        batch: &LoraBatch<'_, Self>,
        out: &CpuTensor,
    ) -> Result<()> {
        self.add_products(x, batch, out, |adapter| adapter.head())
    }

    fn merged_bytes(&self, weight: &PackedMatrix) -> Result<usize> {
        super::lora_merge::check(weight)?;
        Ok(weight.num_bytes())
    }

    fn allocate_merged(&self, weight: &PackedMatrix) -> Result<PackedMatrix> {
        super::lora_merge::check(weight)?;
        weight.zeroed_like(&mut self.workers().merged_weights)
    }

    fn merge_rows(
        &self,
        _stream: &CpuStream,
        weight: &PackedMatrix,
        updates: &[ScaledUpdate<'_, CpuLora>],
        rows: Range<usize>,
        target: &mut PackedMatrix,
    ) -> Result<()> {
        super::lora_merge::merge_rows(&mut self.workers().pool, self.isa, weight, updates, rows, target)
    }

    fn rms_norm(&self, _stream: &CpuStream, x: &CpuTensor, norm: &Norm<'_, CpuBuffer>, out: &CpuTensor) -> Result<()> {
        norm.weight.expect("norm weight", 1, x.columns(), DType::F32)?;
        out.expect("norm output", x.rows(), x.columns(), DType::F32)?;
        // SAFETY: three different buffers, and work before this call is done.
        let (rows, weight, out) = unsafe { (numbers(x), numbers(norm.weight), numbers_mut(out)) };
        super::rms_norm(&mut self.workers().pool, self.isa, rows, weight, norm.epsilon, out);
        Ok(())
    }

    fn add_rms_norm(
        &self,
        _stream: &CpuStream,
        residual: &CpuTensor,
        delta: &CpuTensor,
        norm: &Norm<'_, CpuBuffer>,
        out: &CpuTensor,
    ) -> Result<()> {
        let (rows, columns) = (residual.rows(), residual.columns());
        delta.expect("residual update", rows, columns, DType::F32)?;
        norm.weight.expect("norm weight", 1, columns, DType::F32)?;
        out.expect("norm output", rows, columns, DType::F32)?;
        let pool = &mut self.workers().pool;
        // SAFETY: four different buffers, and work before this call is done.
        let (residual, delta, weight, out) =
            unsafe { (numbers_mut(residual), numbers(delta), numbers(norm.weight), numbers_mut(out)) };
        super::add_rms_norm(pool, self.isa, residual, delta, weight, norm.epsilon, out);
        Ok(())
    }

    fn rope_and_store_kv(
        &self,
        _stream: &CpuStream,
        qkv: &CpuTensor,
        heads: &HeadTransform<'_, Self>,
        kv: &KvLayer<'_, CpuBuffer>,
        metadata: &AttentionMetadata<CpuBuffer>,
    ) -> Result<()> {
        check_heads(qkv, &heads.shape, kv, metadata)?;
        // SAFETY: metadata, weights, activations and KV blocks are different buffers, and work before is done.
        let (positions, slots) = unsafe { (numbers::<i32>(&metadata.positions), numbers(&metadata.slot_mapping)) };
        expect_indices("position", positions, heads.rope.max_len())?;
        let batch = KvStoreBatch {
            num_q_heads: heads.shape.num_heads,
            positions,
            slot_mapping: slots,
            // SAFETY: as above.
            q_norm: heads.q_norm.as_ref().map(|norm| unsafe { numbers(norm.weight) }),
            // SAFETY: as above.
            k_norm: heads.k_norm.as_ref().map(|norm| unsafe { numbers(norm.weight) }),
            eps: heads.q_norm.as_ref().or(heads.k_norm.as_ref()).map_or(0.0, |norm| norm.epsilon),
            table: heads.rope,
            layer: kv.layer,
        };
        // SAFETY: as above.
        let (qkv, arena) = unsafe { (numbers_mut(qkv), arena(kv)) };
        super::rope_and_store_kv(&mut self.workers().pool, self.isa, qkv, &batch, &arena);
        Ok(())
    }

    fn attention(
        &self,
        _stream: &CpuStream,
        qkv: &CpuTensor,
        shape: &AttentionShape,
        kv: &KvLayer<'_, CpuBuffer>,
        metadata: &AttentionMetadata<CpuBuffer>,
        out: &CpuTensor,
    ) -> Result<()> {
        check_heads(qkv, shape, kv, metadata)?;
        out.expect("attention output", qkv.rows(), shape.num_heads * shape.head_dim, DType::F32)?;
        // SAFETY: metadata, activations and KV blocks are different buffers, and work before is done.
        let batch = unsafe {
            AttentionBatch {
                qkv: numbers(qkv),
                num_q_heads: shape.num_heads,
                cu_seqlens_q: numbers(&metadata.cu_seqlens_q),
                positions: numbers(&metadata.positions),
                context_lens: numbers(&metadata.context_lens),
                block_tables: numbers(&metadata.block_tables),
                max_blocks: metadata.block_tables.columns(),
                layer: kv.layer,
                scale: shape.scale,
                softcap: shape.softcap,
                window: shape.window,
            }
        };
        let Workers { pool, attention, .. } = &mut *self.workers();
        // SAFETY: as above.
        let (arena, out) = unsafe { (arena(kv), numbers_mut(out)) };
        super::attention(pool, self.isa, attention, &batch, &arena, out);
        Ok(())
    }

    fn rotate_gather(
        &self,
        _stream: &CpuStream,
        kv: &KvLayer<'_, CpuBuffer>,
        copies: &RotatedCopies<CpuBuffer>,
        rope: &RopeTable,
    ) -> Result<()> {
        copies.check()?;
        check_order(kv)?;
        // SAFETY: index arrays and KV blocks are different buffers, and work before is done.
        let (batch, arena) = unsafe {
            let batch = RotateGatherBatch {
                source_slots: numbers(&copies.source_slots),
                target_slots: numbers(&copies.target_slots),
                position_deltas: numbers(&copies.position_deltas),
                table: rope,
                layer: kv.layer,
            };
            (batch, arena(kv))
        };
        let num_slots = arena.num_blocks() * kv.layout.block_size();
        expect_indices("source slot", batch.source_slots, num_slots)?;
        expect_indices("target slot", batch.target_slots, num_slots)?;
        let max_len = rope.max_len();
        if let Some(delta) = batch.position_deltas.iter().find(|delta| delta.unsigned_abs() as usize >= max_len) {
            return Err(invalid!("a key cannot be moved by {delta} positions: the model has {max_len}"));
        }
        super::rotate_gather(&mut self.workers().pool, self.isa, &batch, &arena);
        Ok(())
    }

    fn kv_deviation(
        &self,
        _stream: &CpuStream,
        qkv: &CpuTensor,
        shape: &AttentionShape,
        kv: &KvLayer<'_, CpuBuffer>,
        slots: &CpuTensor,
        out: &CpuTensor,
    ) -> Result<()> {
        shape.check(qkv, kv.layout, qkv.rows(), DType::F32)?;
        check_order(kv)?;
        slots.expect("slots", 1, qkv.rows(), DType::I32)?;
        out.expect("deviations", 1, qkv.rows(), DType::F32)?;
        // SAFETY: four different buffers, and work before is done.
        let (batch, arena, out) = unsafe {
            let batch = KvDeviationBatch {
                qkv: numbers(qkv),
                num_q_heads: shape.num_heads,
                slots: numbers(slots),
                layer: kv.layer,
            };
            (batch, arena(kv), numbers_mut(out))
        };
        super::kv_deviation(&mut self.workers().pool, &batch, &arena, out);
        Ok(())
    }

    fn gated_activation(
        &self,
        _stream: &CpuStream,
        gate_up: &CpuTensor,
        activation: Activation,
        out: &CpuTensor,
    ) -> Result<()> {
        let features = gate_up.columns() / 2;
        out.expect("gated activation", gate_up.rows(), features, DType::F32)?;
        // SAFETY: two different buffers, and work before this call is done.
        let (gate_up, out) = unsafe { (numbers(gate_up), numbers_mut(out)) };
        super::gated(&mut self.workers().pool, self.isa, gate_up, gate_kind(activation), features, out);
        Ok(())
    }

    fn feed_forward(
        &self,
        _stream: &CpuStream,
        x: &CpuTensor,
        layer: &GatedFeedForward<'_, Self>,
        out: &CpuTensor,
    ) -> Result<()> {
        let GatedFeedForward { gate_up, activation, down, sums, activated } = *layer;
        let features = gate_up.num_rows() / 2;
        x.expect("feed-forward input", x.rows(), gate_up.num_columns(), DType::F32)?;
        sums.expect("gate and up", x.rows(), gate_up.num_rows(), DType::F32)?;
        activated.expect("gated activation", x.rows(), features, DType::F32)?;
        out.expect("feed-forward output", x.rows(), down.num_rows(), DType::F32)?;
        if gate_up.num_rows() != 2 * features || down.num_columns() != features {
            let (wanted, found) = (gate_up.num_rows(), down.num_columns());
            return Err(invalid!("a gate and an up for each input of down: {wanted} of them for {found}"));
        }
        let Workers { pool, gemm, .. } = &mut *self.workers();
        // SAFETY: four different buffers, and work before this call is done.
        let (data, sums, activated, out) =
            unsafe { (numbers(x), numbers_mut(sums), numbers_mut(activated), numbers_mut(out)) };
        let rows = Rows { data, num_rows: x.rows(), stride: x.columns() };
        let weights = FeedForwardWeights { gate_up, kind: gate_kind(activation), down };
        super::feed_forward(pool, self.isa, rows, weights, [sums, activated, out], gemm);
        Ok(())
    }

    fn softcap(&self, _stream: &CpuStream, x: &CpuTensor, cap: f32) -> Result<()> {
        x.expect("numbers to be capped", x.rows(), x.columns(), DType::F32)?;
        check_softcap(cap)?;
        // SAFETY: work before this call is done.
        let x = unsafe { numbers_mut(x) };
        super::softcap(&mut self.workers().pool, self.isa, x, cap);
        Ok(())
    }

    fn gather_rows(&self, _stream: &CpuStream, x: &CpuTensor, indices: &CpuTensor, out: &CpuTensor) -> Result<()> {
        let columns = x.columns();
        out.expect("gathered rows", indices.columns(), columns, DType::F32)?;
        // SAFETY: three different buffers, and work before this call is done.
        let (rows, indices, out) = unsafe { (numbers::<f32>(x), numbers::<i32>(indices), numbers_mut::<f32>(out)) };
        expect_indices("row", indices, x.rows())?;
        for (&index, target) in indices.iter().zip(out.chunks_exact_mut(columns)) {
            target.copy_from_slice(&rows[index as usize * columns..][..columns]);
        }
        Ok(())
    }

    fn argmax(&self, _stream: &CpuStream, x: &CpuTensor, out: &CpuTensor) -> Result<()> {
        out.expect("argmax output", 1, x.rows(), DType::I32)?;
        // SAFETY: two different buffers, and work before this call is done.
        let (rows, indices) = unsafe { (numbers(x), numbers_mut(out)) };
        super::argmax(&mut self.workers().pool, self.isa, rows, x.columns(), indices);
        Ok(())
    }

    fn sample(
        &self,
        _stream: &CpuStream,
        logits: &CpuTensor,
        sampling: &SamplingBatch<CpuBuffer>,
        out: &CpuTensor,
    ) -> Result<()> {
        sampling.check(logits.rows(), logits.columns())?;
        if sampling.masks.is_some() {
            return Err(invalid!("the CPU draws without masks: the host changes its rows"));
        }
        out.expect("sampled tokens", 1, logits.rows(), DType::I32)?;
        // SAFETY: other buffers than the output's, and work before this call is done.
        let (rows, tokens) = unsafe { (numbers(logits), numbers_mut(out)) };
        // SAFETY: as above.
        let of_row = unsafe { sampling_of_rows(sampling) };
        let Workers { pool, sampling: scratch, .. } = &mut *self.workers();
        super::sample(pool, self.isa, scratch, rows, logits.columns(), &of_row, tokens);
        Ok(())
    }
}

fn gate_kind(activation: Activation) -> GateKind {
    match activation {
        Activation::Silu => GateKind::SiLu,
        Activation::GeluTanh => GateKind::GeluTanh,
    }
}

/// How each row is drawn from.
///
/// # Safety
/// Nobody writes the arrays while the function lives.
unsafe fn sampling_of_rows(sampling: &SamplingBatch<CpuBuffer>) -> impl Fn(usize) -> RowSampling + Sync + '_ {
    // SAFETY: the caller's promise.
    let (temperatures, top_ps, min_ps) = unsafe {
        (numbers::<f32>(&sampling.temperatures), numbers::<f32>(&sampling.top_ps), numbers::<f32>(&sampling.min_ps))
    };
    // SAFETY: the caller's promise.
    let (top_ks, seeds, indices) = unsafe {
        (numbers::<u32>(&sampling.top_ks), numbers::<u32>(&sampling.seeds), numbers::<u32>(&sampling.indices))
    };
    let whole = |halves: &[u32], row: usize| u64::from(halves[2 * row]) | u64::from(halves[2 * row + 1]) << 32;
    move |row| RowSampling {
        temperature: temperatures[row],
        top_k: top_ks[row],
        top_p: top_ps[row],
        min_p: min_ps[row],
        seed: whole(seeds, row),
        index: whole(indices, row),
    }
}

fn check_heads(
    qkv: &CpuTensor,
    shape: &AttentionShape,
    kv: &KvLayer<'_, CpuBuffer>,
    metadata: &AttentionMetadata<CpuBuffer>,
) -> Result<()> {
    metadata.check()?;
    shape.check(qkv, kv.layout, metadata.num_tokens, DType::F32)?;
    check_order(kv)
}

fn check_order(kv: &KvLayer<'_, CpuBuffer>) -> Result<()> {
    match kv.layout.order() {
        KvOrder::Pairs => Ok(()),
        order => Err(invalid!("the CPU keeps the KV cache in pairs, not {order:?}")),
    }
}

/// # Safety
/// Nobody else touches the blocks of the step while the arena lives. Transfers may touch others.
unsafe fn arena<'a>(kv: &KvLayer<'a, CpuBuffer>) -> KvArena<'a> {
    // SAFETY: the buffer outlives the borrow, and the caller's promise.
    unsafe { KvArena::from_raw(kv.blocks.start(), kv.blocks.len(), *kv.layout) }
}
