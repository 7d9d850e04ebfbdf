//! Where the double puts payloads, and what it refuses.

use super::super::{KvLayout, SequenceRuns, StreamKind};
use super::*;

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
        let buffer = SimBuffer::new(bytes);
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
            runs: SequenceRuns::of([(num_tokens, context_len as usize)]),
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
        let shape =
            AttentionShape { num_heads: 1, num_kv_heads: 1, head_dim: 16, scale: 1.0, softcap: None, window: None };
        let heads = HeadTransform { shape, q_norm: None, k_norm: None, rope: &() };
        let metadata = self.step(positions, slots, &[0, 1]);
        self.backend.rope_and_store_kv(&self.stream, &qkv, &heads, &self.kv(), &metadata).unwrap();
        qkv
    }

    fn attend(&self, positions: &[i32], table: &[i32], window: Option<usize>) -> Result<Vec<u64>> {
        let (qkv, out) = (self.rows(&vec![0; positions.len()]), self.rows(&vec![0; positions.len()]));
        let shape = AttentionShape { num_heads: 1, num_kv_heads: 1, head_dim: 16, scale: 1.0, softcap: None, window };
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
        let shape =
            AttentionShape { num_heads: 1, num_kv_heads: 1, head_dim: 16, scale: 1.0, softcap: None, window: None };
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
