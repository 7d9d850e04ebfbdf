//! A deterministic double for whole-engine tests: it checks where things are instead of computing them.
//!
//! Every row of activations carries one number, its payload, in its first eight bytes. Embedding turns a token id into
//! a payload, the KV store writes it into the block that the slot mapping names, and attention replaces a row's payload
//! by a hash of all payloads it finds *through the block table*. A block mapped, swapped, shared or freed wrongly
//! therefore changes the next token, which is the payload modulo the vocabulary. [`mix`] and [`rotated`] are all a test
//! needs to predict it without any of this code.
//!
//! Copies on a copy stream run only when somebody waits for them or, one at a time, asks whether they are done. Transfers
//! of a [`SimBackend::slow`] take a while, each another one, so that copies overtake each other.

use std::collections::{HashSet, VecDeque};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use super::{
    Activation, AttentionMetadata, AttentionShape, Backend, BufferCopy, DType, Device, HeadTransform, HostTensor,
    KvLayer, KvLayout, KvOrder, LoraBatch, LoraLoader, LoraPages, LoraPart, LoraSite, Norm, PageImage, RopeConfig,
    RotatedCopies, RowRun, ScaledUpdate, StreamKind, Tensor, Transfer,
};
use crate::{Error, Result, invalid};

const PAYLOAD_BYTES: usize = 8;

/// Combines two payloads (the finaliser of SplitMix64 over their combination).
pub fn mix(a: u64, b: u64) -> u64 {
    let mut z = a.rotate_left(23) ^ b.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What is stored of a token with payload `payload` at position `positions`; and of a stored token that is moved by so
/// many positions, because rotations add up: `rotated(rotated(x, a), b) == rotated(x, a + b)`.
pub fn rotated(payload: u64, positions: i64) -> u64 {
    payload.wrapping_add((positions as u64).wrapping_mul(0xa076_1d64_78bd_642f))
}

/// What is mixed in last where updates are merged: rounding the sum is not adding to what was rounded.
pub const MERGED: u64 = 0x6d65_7267_6564;

/// What an adapter's update of one projection leaves of itself: a row with payload `p` to which it is added with `scale`
/// has [`mix`]`(p, mix(tag, scale's bits))` afterwards.
pub fn lora_tag(parts: &[LoraPart]) -> u64 {
    parts.iter().fold(0, |tag, part| {
        let facts = [part.scaling.to_bits().into(), part.first_column as u64];
        let bytes = part.a.bytes().iter().chain(part.b.bytes()).map(|byte| u64::from(*byte));
        facts.into_iter().chain(bytes).fold(tag, mix)
    })
}

/// The double.
#[derive(Default)]
pub struct SimBackend {
    delays: Option<Arc<Delays>>,
}

impl SimBackend {
    /// A double whose transfers dawdle, how long follows from `seed` and their order.
    pub fn slow(seed: u64) -> Self {
        Self { delays: Some(Arc::new(Delays { seed, num_drawn: AtomicU64::new(0) })) }
    }
}

/// The longest a transfer waits at one point.
const MAX_DELAY: Duration = Duration::from_micros(300);

/// How long transfers wait before and after they touch device memory.
struct Delays {
    seed: u64,
    num_drawn: AtomicU64,
}

impl Delays {
    /// Most often hardly at all.
    fn wait(&self) {
        let drawn = mix(self.seed, self.num_drawn.fetch_add(1, Ordering::Relaxed));
        if drawn.is_multiple_of(4) {
            thread::sleep(MAX_DELAY.mul_f64((drawn >> 40) as f64 / (1u64 << 24) as f64));
        }
    }
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
    fn tag(&self) -> u64 {
        let arena = self.arena.lock();
        let words = |&(start, bytes): &(usize, usize)| (start..start + bytes).step_by(PAYLOAD_BYTES);
        let mut all = self.rows.iter().flat_map(words).map(|at| read_u64(&arena, at));
        let first = all.next().unwrap_or(0);
        all.fold(first, |tag, word| if word == tag { tag } else { mix(tag, word) })
    }
}

/// Memory of the double.
#[derive(Clone)]
pub struct SimBuffer(Arc<Mutex<Vec<u8>>>);

/// A stream of the double.
pub struct SimStream {
    kind: StreamKind,
    queue: Arc<Mutex<CopyQueue>>,
}

/// A point in a [`SimStream`].
pub struct SimEvent {
    queue: Arc<Mutex<CopyQueue>>,
    after: u64,
}

/// Transfers of the double.
#[derive(Default)]
pub struct SimTransfer {
    delays: Option<Arc<Delays>>,
}

impl SimTransfer {
    fn wait(&self) {
        self.delays.iter().for_each(|delays| delays.wait());
    }
}

impl Transfer for SimTransfer {
    type Buffer = SimBuffer;

    fn fill(
        &mut self,
        target: &SimBuffer,
        offset: usize,
        bytes: usize,
        write: &mut dyn FnMut(&mut [u8]) -> Result<()>,
    ) -> Result<()> {
        // Not under the lock: a slow file must not hold up a step.
        let mut staging = vec![0; bytes];
        self.wait();
        write(&mut staging)?;
        self.wait();
        target.lock()[offset..offset + bytes].copy_from_slice(&staging);
        Ok(())
    }

    /// A token's payloads are one per layer.
    fn clear_behind(layout: &KvLayout, block: &mut [u8], num_tokens: usize) {
        let block_size = layout.block_size();
        for (layer, token) in
            (0..layout.num_layers()).flat_map(|layer| (num_tokens..block_size).map(move |at| (layer, at)))
        {
            let start = (layer * block_size + token) * PAYLOAD_BYTES;
            block[start..start + PAYLOAD_BYTES].fill(0);
        }
    }

    fn show(
        &mut self,
        source: &SimBuffer,
        offset: usize,
        bytes: usize,
        read: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        self.wait();
        let staging = source.lock()[offset..offset + bytes].to_vec();
        self.wait();
        read(&staging)
    }
}

/// Shape of a projection; its numbers do not matter.
pub struct SimMatrix {
    rows: usize,
    columns: usize,
    /// What is merged into it, when it is a copy.
    merged: Option<SimMerged>,
}

/// Updates, and the rows that have them.
#[derive(Default)]
struct SimMerged {
    /// Tags, and the bits of their scales.
    updates: Vec<(u64, u32)>,
    num_rows: usize,
}

impl SimMatrix {
    fn base(rows: usize, columns: usize) -> Self {
        Self { rows, columns, merged: None }
    }

    /// What a row's payload is behind the product.
    fn apply(&self, payload: u64) -> Result<u64> {
        let Some(SimMerged { updates, num_rows }) = &self.merged else { return Ok(payload) };
        if *num_rows != self.rows {
            return Err(invalid!("{num_rows} of {} rows of a merged copy are written", self.rows));
        }
        let added = updates.iter().fold(payload, |row, (tag, scale)| mix(row, mix(*tag, u64::from(*scale))));
        Ok(mix(added, MERGED))
    }
}

#[derive(Default)]
struct CopyQueue {
    num_submitted: u64,
    num_done: u64,
    pending: VecDeque<PendingCopy>,
}

struct PendingCopy {
    source: SimBuffer,
    target: SimBuffer,
    source_range: Range<usize>,
    target_offset: usize,
}

impl CopyQueue {
    fn run_one(&mut self) {
        if let Some(copy) = self.pending.pop_front() {
            let bytes = copy.source.lock()[copy.source_range].to_vec();
            copy.target.lock()[copy.target_offset..copy.target_offset + bytes.len()].copy_from_slice(&bytes);
            self.num_done += 1;
        }
    }
}

impl SimBuffer {
    fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        lock(&self.0)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn read_u64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + PAYLOAD_BYTES].try_into().expect("eight bytes"))
}

fn write_u64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + PAYLOAD_BYTES].copy_from_slice(&value.to_le_bytes());
}

type SimTensor = Tensor<SimBuffer>;

fn payloads(tensor: &SimTensor) -> Vec<u64> {
    let bytes = tensor.buffer().lock();
    (0..tensor.rows()).map(|row| read_u64(&bytes, tensor.row(row).offset_bytes())).collect()
}

fn set_payloads(tensor: &SimTensor, values: impl IntoIterator<Item = u64>) {
    let mut bytes = tensor.buffer().lock();
    for (row, value) in values.into_iter().enumerate() {
        write_u64(&mut bytes, tensor.row(row).offset_bytes(), value);
    }
}

fn indices(tensor: &SimTensor) -> Vec<i32> {
    let bytes = tensor.buffer().lock();
    let start = tensor.offset_bytes();
    bytes[start..start + tensor.num_bytes()]
        .chunks_exact(4)
        .map(|word| i32::from_le_bytes(word.try_into().expect("four bytes")))
        .collect()
}

fn expect_shape(what: &str, tensor: &SimTensor, rows: usize, columns: usize) -> Result<()> {
    if (tensor.rows(), tensor.columns()) == (rows, columns) {
        return Ok(());
    }
    Err(invalid!("{what} is [{}, {}], wanted [{rows}, {columns}]", tensor.rows(), tensor.columns()))
}

impl Device for SimBackend {
    type Buffer = SimBuffer;
    type HostBuffer = Vec<u8>;
    type Stream = SimStream;
    type Event = SimEvent;
    type Transfer = SimTransfer;

    fn allocate(&self, bytes: usize) -> Result<SimBuffer> {
        Ok(SimBuffer(Arc::new(Mutex::new(vec![0; bytes]))))
    }

    fn allocate_host(&self, bytes: usize) -> Result<Vec<u8>> {
        Ok(vec![0; bytes])
    }

    fn create_transfer(&self) -> Result<SimTransfer> {
        Ok(SimTransfer { delays: self.delays.clone() })
    }

    fn create_stream(&self, kind: StreamKind) -> Result<SimStream> {
        Ok(SimStream { kind, queue: Arc::default() })
    }

    fn upload(&self, _stream: &SimStream, source: &Vec<u8>, target: &SimBuffer, range: Range<usize>) -> Result<()> {
        target.lock()[range.clone()].copy_from_slice(&source[range]);
        Ok(())
    }

    fn download(
        &self,
        _stream: &SimStream,
        source: &SimTensor,
        target: &mut Vec<u8>,
        target_offset: usize,
    ) -> Result<()> {
        let start = source.offset_bytes();
        let bytes = source.buffer().lock()[start..start + source.num_bytes()].to_vec();
        target[target_offset..target_offset + bytes.len()].copy_from_slice(&bytes);
        Ok(())
    }

    fn copy(&self, stream: &SimStream, copy: &BufferCopy<'_, SimBuffer>) -> Result<()> {
        let mut queue = lock(&stream.queue);
        queue.num_submitted += 1;
        queue.pending.push_back(PendingCopy {
            source: copy.source.clone(),
            target: copy.target.clone(),
            source_range: copy.source_offset..copy.source_offset + copy.bytes,
            target_offset: copy.target_offset,
        });
        if stream.kind == StreamKind::Compute {
            queue.run_one();
        }
        Ok(())
    }

    fn record(&self, stream: &SimStream) -> Result<SimEvent> {
        let after = lock(&stream.queue).num_submitted;
        Ok(SimEvent { queue: Arc::clone(&stream.queue), after })
    }

    fn wait(&self, _stream: &SimStream, event: &SimEvent) -> Result<()> {
        self.synchronize(event)
    }

    fn is_complete(&self, event: &SimEvent) -> Result<bool> {
        let mut queue = lock(&event.queue);
        queue.run_one();
        Ok(queue.num_done >= event.after)
    }

    fn synchronize(&self, event: &SimEvent) -> Result<()> {
        let mut queue = lock(&event.queue);
        while queue.num_done < event.after {
            queue.run_one();
        }
        Ok(())
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
        Ok(SimMatrix { merged: Some(SimMerged::default()), ..SimMatrix::base(weight.rows, weight.columns) })
    }

    fn merge_rows(
        &self,
        _: &SimStream,
        weight: &SimMatrix,
        updates: &[ScaledUpdate<'_, SimLora>],
        rows: Range<usize>,
        target: &mut SimMatrix,
    ) -> Result<()> {
        let Some(merged) = target.merged.as_mut().filter(|_| weight.merged.is_none()) else {
            return Err(invalid!("updates are merged into a copy of the base weights"));
        };
        let updates: Vec<_> = updates.iter().map(|scaled| (scaled.update.tag(), scaled.scale.to_bits())).collect();
        let is_next = merged.num_rows == rows.start && rows.end <= target.rows;
        if !is_next || !(rows.start == 0 || merged.updates == updates) {
            return Err(invalid!("rows {rows:?} do not follow the {} that are merged", merged.num_rows));
        }
        (merged.updates, merged.num_rows) = (updates, rows.end);
        Ok(())
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

    fn gather_rows(&self, _: &SimStream, x: &SimTensor, rows: &SimTensor, out: &SimTensor) -> Result<()> {
        let all = payloads(x);
        set_payloads(out, indices(rows).into_iter().map(|row| all[row as usize]));
        Ok(())
    }

    fn argmax(&self, _: &SimStream, x: &SimTensor, out: &SimTensor) -> Result<()> {
        let tokens: Vec<u8> =
            payloads(x).into_iter().flat_map(|payload| ((payload % x.columns() as u64) as i32).to_le_bytes()).collect();
        let start = out.offset_bytes();
        out.buffer().lock()[start..start + tokens.len()].copy_from_slice(&tokens);
        Ok(())
    }
}

/// How far a freshly computed token is from the stored one: nothing when they are the same, else a number in [1, 2) that
/// depends on both.
pub fn deviation(fresh: u64, stored: u64) -> f32 {
    if fresh == stored { 0.0 } else { 1.0 + (mix(fresh, stored) >> 41) as f32 / (1u64 << 23) as f32 }
}

fn check_queries(positions: &[i32], context_len: i32) -> Result<()> {
    let is_valid = positions.first().is_none_or(|first| *first >= 0)
        && positions.is_sorted_by(|a, b| a < b)
        && positions.last().is_none_or(|last| last + 1 == context_len);
    match is_valid {
        true => Ok(()),
        false => Err(invalid!("queries at {positions:?} are not in order and end a context of {context_len} tokens")),
    }
}

/// Targets differ and share no block with a source.
fn check_copies(sources: &[i32], targets: &[i32], block_size: usize) -> Result<()> {
    if let Some(slot) = sources.iter().chain(targets).find(|slot| **slot < 0) {
        return Err(invalid!("slot {slot} of a copy does not exist"));
    }
    let block = |slot: &i32| *slot as usize / block_size;
    let source_blocks: HashSet<usize> = sources.iter().map(block).collect();
    if let Some(slot) = targets.iter().find(|slot| source_blocks.contains(&block(slot))) {
        return Err(invalid!("slot {slot} is written in a block that is read by the same copy"));
    }
    match targets.iter().collect::<HashSet<_>>().len() == targets.len() {
        true => Ok(()),
        false => Err(invalid!("two tokens are copied to one slot")),
    }
}

/// Payloads lie `[layer][token]` at the beginning of a block.
fn payload_offset(kv: &KvLayer<'_, SimBuffer>, slot: usize) -> usize {
    let block_size = kv.layout.block_size();
    let (block, token) = (slot / block_size, slot % block_size);
    let within = (kv.layer * block_size + token) * PAYLOAD_BYTES;
    assert!(within + PAYLOAD_BYTES <= kv.layout.block_bytes(), "the double needs room for one payload per token");
    block * kv.layout.block_bytes() + within
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::KvLayout;

    /// A cache of a few blocks, and a stream.
    struct World {
        backend: SimBackend,
        stream: SimStream,
        layout: KvLayout,
        blocks: SimBuffer,
    }

    impl World {
        fn new() -> Self {
            let backend = SimBackend::default();
            let layout = KvLayout::new(2, 1, 16, 16, DType::BF16).unwrap();
            let stream = backend.create_stream(StreamKind::Compute).unwrap();
            let blocks = backend.allocate(8 * layout.block_bytes()).unwrap();
            Self { backend, stream, layout, blocks }
        }

        fn kv(&self) -> KvLayer<'_, SimBuffer> {
            KvLayer { blocks: &self.blocks, layout: &self.layout, layer: 1 }
        }

        fn indices(&self, values: &[i32]) -> SimTensor {
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            let buffer = SimBuffer(Arc::new(Mutex::new(bytes)));
            Tensor::new(buffer, 0, 1, values.len(), DType::I32)
        }

        fn rows(&self, values: &[u64]) -> SimTensor {
            let rows = Tensor::new(self.backend.allocate(values.len() * 192).unwrap(), 0, values.len(), 48, DType::F32);
            set_payloads(&rows, values.iter().copied());
            rows
        }

        fn step(&self, positions: &[i32], slots: &[i32], table: &[i32]) -> AttentionMetadata<SimBuffer> {
            let num_tokens = positions.len();
            let context_len = positions.last().map_or(0, |last| last + 1);
            AttentionMetadata {
                num_seqs: 1,
                num_tokens,
                max_query_len: num_tokens,
                max_context_len: context_len as usize,
                cu_seqlens_q: self.indices(&[0, num_tokens as i32]),
                context_lens: self.indices(&[context_len]),
                block_tables: self.indices(table),
                positions: self.indices(positions),
                slot_mapping: self.indices(slots),
            }
        }

        /// Stores tokens with these payloads and gives back qkv.
        fn store(&self, payloads: &[u64], positions: &[i32], slots: &[i32]) -> SimTensor {
            let qkv = self.rows(payloads);
            let shape = AttentionShape { num_heads: 1, num_kv_heads: 1, head_dim: 16, scale: 1.0, window: None };
            let heads = HeadTransform { shape, q_norm: None, k_norm: None, rope: &() };
            let metadata = self.step(positions, slots, &[0, 1]);
            self.backend.rope_and_store_kv(&self.stream, &qkv, &heads, &self.kv(), &metadata).unwrap();
            qkv
        }

        fn attend(&self, positions: &[i32], table: &[i32], window: Option<usize>) -> Result<Vec<u64>> {
            let (qkv, out) = (self.rows(&vec![0; positions.len()]), self.rows(&vec![0; positions.len()]));
            let shape = AttentionShape { num_heads: 1, num_kv_heads: 1, head_dim: 16, scale: 1.0, window };
            let metadata = self.step(positions, positions, table);
            self.backend.attention(&self.stream, &qkv, &shape, &self.kv(), &metadata, &out)?;
            Ok(payloads(&out))
        }

        fn gather(&self, sources: &[i32], targets: &[i32], deltas: &[i32]) -> Result<()> {
            let copies = RotatedCopies {
                source_slots: self.indices(sources),
                target_slots: self.indices(targets),
                position_deltas: self.indices(deltas),
            };
            self.backend.rotate_gather(&self.stream, &self.kv(), &copies, &())
        }

        fn stored(&self, slot: usize) -> u64 {
            read_u64(&self.blocks.lock(), payload_offset(&self.kv(), slot))
        }
    }

    #[test]
    fn moving_a_token_is_storing_it_elsewhere() {
        let world = World::new();
        for (position, delta) in [(0, 0), (0, 5), (7, -7), (100, 3000), (100, -99)] {
            world.store(&[42], &[position], &[3]);
            world.gather(&[3], &[70], &[delta]).unwrap();
            assert_eq!(world.stored(70), rotated(42, i64::from(position + delta)));
            assert_eq!(world.stored(3), rotated(42, i64::from(position)), "the original stays");
        }
        assert_ne!(rotated(42, 1), rotated(42, 2));
    }

    #[test]
    fn copies_onto_each_other_are_refused() {
        let world = World::new();
        for (sources, targets) in [([0, 1], [5, 40]), ([0, 1], [40, 40]), ([-1, 1], [40, 41]), ([0, 1], [40, -41])] {
            assert!(world.gather(&sources, &targets, &[0, 0]).is_err(), "{sources:?} to {targets:?}");
        }
        assert!(world.gather(&[0, 0], &[40, 41], &[1, 2]).is_ok());
    }

    #[test]
    fn a_query_sees_what_lies_before_it_whatever_else_is_new() {
        let world = World::new();
        let all: Vec<i32> = (0..32).collect();
        world.store(&(100..132).collect::<Vec<u64>>(), &all, &all);
        for window in [None, Some(1), Some(10)] {
            let whole = world.attend(&all, &[0, 1], window).unwrap();
            for some in [vec![31], vec![0, 5, 6, 20], vec![15, 16]] {
                let wanted: Vec<u64> = some.iter().map(|position| whole[*position as usize]).collect();
                assert_eq!(world.attend(&some, &[0, 1], window).unwrap(), wanted, "{window:?}");
            }
        }
        assert!(world.attend(&[5, 3], &[0, 1], None).unwrap_err().to_string().contains("[5, 3]"));
    }

    #[test]
    fn a_token_deviates_from_another_and_not_from_itself() {
        let world = World::new();
        let qkv = world.store(&[1, 2, 3, 4], &[0, 1, 2, 3], &[0, 1, 2, -1]);
        let moved = world.store(&[3], &[9], &[-1]);
        let deviations = |qkv: &SimTensor, slots: &[i32]| {
            let out = world.indices(&vec![0; slots.len()]);
            let shape = AttentionShape { num_heads: 1, num_kv_heads: 1, head_dim: 16, scale: 1.0, window: None };
            let slots = world.indices(slots);
            world.backend.kv_deviation(&world.stream, qkv, &shape, &world.kv(), &slots, &out).unwrap();
            indices(&out).into_iter().map(|bits| f32::from_bits(bits as u32)).collect::<Vec<f32>>()
        };
        assert_eq!(deviations(&qkv, &[0, 1, 2, -1]), [0.0, 0.0, 0.0, f32::INFINITY]);
        let others = deviations(&qkv, &[1, 0, 2, 0]);
        assert_eq!(others[0], deviation(rotated(1, 0), rotated(2, 1)));
        assert!(others[0] >= 1.0 && others[1] >= 1.0 && others[2] == 0.0 && others[3] >= 1.0, "{others:?}");
        world.gather(&[2], &[100], &[7]).unwrap();
        assert_eq!(deviations(&moved, &[100]), [0.0], "moved is as if computed there");
    }
}
