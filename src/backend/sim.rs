//! A deterministic double for whole-engine tests: it checks where things are instead of computing them.
//!
//! Every row of activations carries one number, its payload, in its first eight bytes. Embedding turns a token id into
//! a payload, the KV store writes it into the block that the slot mapping names, and attention replaces a row's payload
//! by a hash of all payloads it finds *through the block table*. A block mapped, swapped, shared or freed wrongly
//! therefore changes the next token, which is the payload modulo the vocabulary. [`mix`] and [`rotated`] are all a test
//! needs to predict it without any of this code.
//!
//! Copies on a copy stream run only when somebody waits for them or, one at a time, asks whether they are done. Transfers
//! of a [`SimBackend::slow`] take a while, each another one, so that copies overtake each other, and so may its steps. Blocks
//! that land layer by layer do so on a copy stream: whose step does not wait for a layer's event finds what was there before.

mod checks;
mod device;
mod lora;
mod matrix;
mod payload;
#[cfg(test)]
mod tests;
mod transfer;

pub use device::{SimBuffer, SimEvent, SimMemory, SimStream};
pub use lora::{SimLora, SimLoraLoader, lora_tag};
pub use matrix::{MERGED, SimMatrix};
pub use payload::{deviation, mix, rotated};
pub use transfer::SimTransfer;

use std::ops::Range;
use std::sync::Arc;

use checks::{check_copies, check_queries, expect_shape};
use device::SimTensor;
use payload::{indices, payload_offset, payloads, read_u64, set_payloads, write_u64};
use transfer::Delays;

use super::{
    Activation, AttentionMetadata, AttentionShape, Backend, DType, Device, HeadTransform, HostTensor, KvLayer, KvOrder,
    LoraBatch, LoraSite, Norm, RopeConfig, RotatedCopies, SamplingBatch, ScaledUpdate, Tensor, check_softcap,
};
use crate::telemetry::Degradations;
use crate::{Error, Result};

/// The double.
#[derive(Default)]
pub struct SimBackend {
    delays: Option<Arc<Delays>>,
    memory: SimMemory,
    degradations: Degradations,
}

impl SimBackend {
    /// A double whose transfers dawdle, how long follows from `seed` and their order. With an even `seed` a step takes the
    /// longer the more tokens it has.
    pub fn slow(seed: u64) -> Self {
        Self { delays: Some(Arc::new(Delays::new(seed))), ..Self::default() }
    }

    /// All its memory, for who looks what is left there.
    pub fn memory(&self) -> SimMemory {
        self.memory.clone()
    }
}

impl Backend for SimBackend {
    type Matrix = SimMatrix;
    type RopeTable = ();
    type LoraLoader = SimLoraLoader;

    fn name(&self) -> String {
        "sim".into()
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

    fn load_matrix(&self, parts: &[HostTensor], _dtype: Option<DType>) -> Result<SimMatrix> {
        let columns = parts.first().map_or(0, HostTensor::columns);
        Ok(SimMatrix::base(parts.iter().map(HostTensor::rows).sum(), columns))
    }

    fn load_vector(&self, parts: &[HostTensor], _convert: &dyn Fn(f32) -> f32) -> Result<SimTensor> {
        let columns = parts.iter().map(|part| part.rows() * part.columns()).sum();
        Ok(Tensor::new(self.allocate(columns * 4)?, 0, 1, columns, DType::F32))
    }

    fn load_rope(&self, _config: &RopeConfig, _max_positions: usize) -> Result<()> {
        Ok(())
    }

    fn create_lora_loader(&self) -> Result<SimLoraLoader> {
        Ok(SimLoraLoader)
    }

    fn embed(&self, _: &SimStream, table: &SimMatrix, ids: &SimTensor, _scale: f32, out: &SimTensor) -> Result<()> {
        expect_shape("embedding output", out, ids.columns(), table.columns)?;
        if let Some(id) = indices(ids).into_iter().find(|&id| usize::try_from(id).is_ok_and(|id| id >= table.rows)) {
            return Err(Error::Device(format!("token id {id} is outside a vocabulary of {}", table.rows)));
        }
        set_payloads(out, indices(ids).into_iter().map(|id| mix(0, id as u64)));
        self.delays.iter().for_each(|delays| delays.compute(ids.columns()));
        Ok(())
    }

    fn linear(
        &self,
        _: &SimStream,
        x: &SimTensor,
        weight: &SimMatrix,
        _bias: Option<&SimTensor>,
        out: &SimTensor,
    ) -> Result<()> {
        expect_shape("projection input", x, x.rows(), weight.columns)?;
        expect_shape("projection output", out, x.rows(), weight.rows)?;
        let rows: Vec<u64> = payloads(x).into_iter().map(|row| weight.apply(row)).collect::<Result<_>>()?;
        set_payloads(out, rows);
        Ok(())
    }

    fn merged_bytes(&self, weight: &SimMatrix) -> Result<usize> {
        Ok(weight.rows * weight.columns * 2)
    }

    fn allocate_merged(&self, weight: &SimMatrix) -> Result<SimMatrix> {
        Ok(weight.empty_copy())
    }

    fn merge_rows(
        &self,
        _: &SimStream,
        weight: &SimMatrix,
        updates: &[ScaledUpdate<'_, SimLora>],
        rows: Range<usize>,
        target: &mut SimMatrix,
    ) -> Result<()> {
        let updates = updates.iter().map(|scaled| (scaled.update.tag(), scaled.scale.to_bits())).collect();
        target.merge(weight, updates, rows)
    }

    fn add_lora(
        &self,
        _: &SimStream,
        x: &SimTensor,
        batch: &LoraBatch<'_, Self>,
        site: LoraSite,
        out: &SimTensor,
    ) -> Result<()> {
        batch.check()?;
        expect_shape("projection output", out, x.rows(), out.columns())?;
        let (rows, scales, mut all) = (indices(&batch.rows), indices(&batch.scales), payloads(out));
        for group in batch.groups {
            let Some(tag) = group.adapter.get(site).map(SimLora::tag) else { continue };
            for at in group.entries.clone() {
                let row = &mut all[rows[at] as usize];
                *row = mix(*row, mix(tag, u64::from(scales[at] as u32)));
            }
        }
        set_payloads(out, all);
        Ok(())
    }

    fn rms_norm(&self, _: &SimStream, x: &SimTensor, _norm: &Norm<'_, SimBuffer>, out: &SimTensor) -> Result<()> {
        set_payloads(out, payloads(x));
        Ok(())
    }

    fn add_rms_norm(
        &self,
        _: &SimStream,
        residual: &SimTensor,
        delta: &SimTensor,
        _norm: &Norm<'_, SimBuffer>,
        out: &SimTensor,
    ) -> Result<()> {
        expect_shape("residual", residual, delta.rows(), delta.columns())?;
        let delta = payloads(delta);
        set_payloads(residual, delta.iter().copied());
        set_payloads(out, delta);
        Ok(())
    }

    fn rope_and_store_kv(
        &self,
        _: &SimStream,
        qkv: &SimTensor,
        _heads: &HeadTransform<'_, Self>,
        kv: &KvLayer<'_, SimBuffer>,
        metadata: &AttentionMetadata<SimBuffer>,
    ) -> Result<()> {
        let positions = indices(&metadata.positions).into_iter().map(i64::from);
        let slots = indices(&metadata.slot_mapping);
        let rows: Vec<u64> = payloads(qkv).into_iter().zip(positions).map(|(row, at)| rotated(row, at)).collect();
        set_payloads(qkv, rows.iter().copied());
        let mut blocks = kv.blocks.lock();
        for (row, slot) in rows.into_iter().zip(slots) {
            if let Ok(slot) = usize::try_from(slot) {
                write_u64(&mut blocks, payload_offset(kv, slot), row);
            }
        }
        Ok(())
    }

    fn attention(
        &self,
        _: &SimStream,
        _qkv: &SimTensor,
        shape: &AttentionShape,
        kv: &KvLayer<'_, SimBuffer>,
        metadata: &AttentionMetadata<SimBuffer>,
        out: &SimTensor,
    ) -> Result<()> {
        let (starts, lens) = (indices(&metadata.cu_seqlens_q), indices(&metadata.context_lens));
        let (positions, tables) = (indices(&metadata.positions), indices(&metadata.block_tables));
        let max_blocks = metadata.block_tables.columns();
        let blocks = kv.blocks.lock();
        let block_size = kv.layout.block_size();
        let mut hashes = Vec::with_capacity(metadata.num_tokens);
        for sequence in 0..metadata.num_seqs {
            let table = &tables[sequence * max_blocks..(sequence + 1) * max_blocks];
            let positions = &positions[starts[sequence] as usize..starts[sequence + 1] as usize];
            check_queries(positions, lens[sequence])?;
            for end in positions.iter().map(|position| *position as usize + 1) {
                let start = end - shape.window.unwrap_or(end).min(end);
                let slots = (start..end).map(|at| table[at / block_size] as usize * block_size + at % block_size);
                hashes.push(slots.fold(0, |hash, slot| mix(hash, read_u64(&blocks, payload_offset(kv, slot)))));
            }
        }
        drop(blocks);
        set_payloads(out, hashes);
        Ok(())
    }

    fn rotate_gather(
        &self,
        _: &SimStream,
        kv: &KvLayer<'_, SimBuffer>,
        copies: &RotatedCopies<SimBuffer>,
        _rope: &(),
    ) -> Result<()> {
        copies.check()?;
        let (sources, targets) = (indices(&copies.source_slots), indices(&copies.target_slots));
        check_copies(&sources, &targets, kv.layout.block_size())?;
        let mut blocks = kv.blocks.lock();
        for ((source, target), delta) in sources.into_iter().zip(targets).zip(indices(&copies.position_deltas)) {
            let stored = read_u64(&blocks, payload_offset(kv, source as usize));
            write_u64(&mut blocks, payload_offset(kv, target as usize), rotated(stored, i64::from(delta)));
        }
        Ok(())
    }

    fn kv_deviation(
        &self,
        _: &SimStream,
        qkv: &SimTensor,
        _shape: &AttentionShape,
        kv: &KvLayer<'_, SimBuffer>,
        slots: &SimTensor,
        out: &SimTensor,
    ) -> Result<()> {
        expect_shape("slots", slots, 1, qkv.rows())?;
        expect_shape("deviations", out, 1, qkv.rows())?;
        let blocks = kv.blocks.lock();
        let deviation = |(row, slot): (u64, i32)| match usize::try_from(slot) {
            Ok(slot) => deviation(row, read_u64(&blocks, payload_offset(kv, slot))),
            Err(_) => f32::INFINITY,
        };
        let found: Vec<u8> =
            payloads(qkv).into_iter().zip(indices(slots)).map(deviation).flat_map(f32::to_le_bytes).collect();
        drop(blocks);
        let start = out.offset_bytes();
        out.buffer().lock()[start..start + found.len()].copy_from_slice(&found);
        Ok(())
    }

    fn gated_activation(
        &self,
        _: &SimStream,
        gate_up: &SimTensor,
        _activation: Activation,
        out: &SimTensor,
    ) -> Result<()> {
        expect_shape("gated activation", out, gate_up.rows(), gate_up.columns() / 2)?;
        set_payloads(out, payloads(gate_up));
        Ok(())
    }

    /// A row stays what it is.
    fn softcap(&self, _: &SimStream, x: &SimTensor, cap: f32) -> Result<()> {
        expect_shape("numbers to be capped", x, x.rows(), x.columns())?;
        check_softcap(cap)
    }

    fn gather_rows(&self, _: &SimStream, x: &SimTensor, rows: &SimTensor, out: &SimTensor) -> Result<()> {
        let all = payloads(x);
        set_payloads(out, indices(rows).into_iter().map(|row| all[row as usize]));
        Ok(())
    }

    /// A row is one token's.
    fn sample(
        &self,
        stream: &SimStream,
        logits: &SimTensor,
        sampling: &SamplingBatch<SimBuffer>,
        out: &SimTensor,
    ) -> Result<()> {
        sampling.check(logits.rows(), logits.columns())?;
        self.argmax(stream, logits, out)
    }

    fn argmax(&self, _: &SimStream, x: &SimTensor, out: &SimTensor) -> Result<()> {
        let tokens: Vec<u8> =
            payloads(x).into_iter().flat_map(|payload| ((payload % x.columns() as u64) as i32).to_le_bytes()).collect();
        let start = out.offset_bytes();
        out.buffer().lock()[start..start + tokens.len()].copy_from_slice(&tokens);
        Ok(())
    }
}
