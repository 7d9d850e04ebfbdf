//! What composing cached texts takes of a model: recomputing tokens anywhere in a sequence, and moving stored ones.

use std::ops::Range;

use half::bf16;
use mneme::backend::cpu::{CpuBackend, Isa};
use mneme::backend::{AttentionMetadata, Backend, DType, Device, KvLayer, RotatedCopies, StreamKind, Tensor};
use mneme::models::{Checkpoint, ForwardBatch, KvCache, Model, ProbeBatch, StepLimits, Workspace};

use crate::support::random::Random;
use crate::support::tiny_model::{Family, TinyModel, VOCAB};

pub(crate) const BLOCK_SIZE: usize = 16;
const NUM_BLOCKS: usize = 16;

/// Longer than the sliding window.
const NUM_TOKENS: usize = 100;

type Buffer = <CpuBackend as Device>::Buffer;

/// A model with its cache, without an engine.
pub(crate) struct Runner {
    backend: CpuBackend,
    stream: <CpuBackend as Device>::Stream,
    checkpoint: Checkpoint,
    model: Model<CpuBackend>,
    kv: KvCache<Buffer>,
    workspace: Workspace<Buffer>,
}

impl Runner {
    pub(crate) fn new(family: Family, isa: Isa, kv_dtype: DType) -> Self {
        let written = TinyModel::new(family, 21).write();
        let backend = CpuBackend::new(isa, 2).unwrap();
        let checkpoint = Checkpoint::open(written.path()).unwrap();
        let model = Model::load(&backend, &checkpoint, None, 1024).unwrap();
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

    fn indices(&self, values: &[i32]) -> Tensor<Buffer> {
        let mut host = self.backend.allocate_host(4 * values.len()).unwrap();
        host.as_mut()[..4 * values.len()].copy_from_slice(bytemuck::cast_slice(values));
        let buffer = self.backend.allocate(4 * values.len()).unwrap();
        self.backend.upload(&self.stream, &host, &buffer, 0..4 * values.len()).unwrap();
        Tensor::new(buffer, 0, 1, values.len(), DType::I32)
    }

    fn download(&self, tensor: &Tensor<Buffer>) -> Vec<u8> {
        let mut host = self.backend.allocate_host(tensor.num_bytes()).unwrap();
        self.backend.download(&self.stream, tensor, &mut host, 0).unwrap();
        host.as_ref()[..tensor.num_bytes()].to_vec()
    }

    fn cache(&self) -> Vec<u8> {
        let numbers = NUM_BLOCKS * self.kv.layout.block_bytes() / 4;
        self.download(&Tensor::new(self.kv.blocks.clone(), 0, 1, numbers, DType::F32))
    }

    /// Copies tokens from slots to slots, all so many positions on.
    pub(crate) fn copy(&self, sources: &[usize], targets: &[usize], position_delta: i32) {
        let numbers = |values: &[usize]| self.indices(&values.iter().map(|value| *value as i32).collect::<Vec<_>>());
        let copies = RotatedCopies {
            source_slots: numbers(sources),
            target_slots: numbers(targets),
            position_deltas: self.indices(&vec![position_delta; sources.len()]),
        };
        self.model.rotate_gather(&self.backend, &self.stream, &self.kv, &copies).unwrap();
    }

    /// Logits of the tokens at these positions of a sequence that lies in the first blocks, bytes of a row each.
    pub(crate) fn forward(&self, tokens: &[u32], positions: &[usize]) -> Vec<Vec<u8>> {
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
}

impl Runner {
    fn numbers(&self, values: impl Iterator<Item = usize>) -> Tensor<Buffer> {
        self.indices(&values.map(|value| value as i32).collect::<Vec<_>>())
    }

    fn attention(&self, positions: &[usize]) -> AttentionMetadata<Buffer> {
        let num_tokens = positions.len();
        let context_len = positions.last().unwrap() + 1;
        AttentionMetadata {
            num_seqs: 1,
            num_tokens,
            max_query_len: num_tokens,
            max_context_len: context_len,
            cu_seqlens_q: self.indices(&[0, num_tokens as i32]),
            context_lens: self.indices(&[context_len as i32]),
            block_tables: self.numbers(0..NUM_BLOCKS),
            positions: self.numbers(positions.iter().copied()),
            slot_mapping: self.numbers(positions.iter().copied()),
        }
    }

    /// How far the tokens at these places are from what lies there.
    pub(crate) fn probe(&self, tokens: &[u32], places: Range<usize>) -> Vec<f32> {
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

    pub(crate) fn probe_layer(&self) -> usize {
        self.checkpoint.config().probe_layer()
    }

    /// Keys and values that one layer keeps of the token in a slot.
    pub(crate) fn stored(&self, layer: usize, slot: usize) -> Vec<f64> {
        self.stored_in(&self.cache(), layer, slot)
    }

    fn stored_in(&self, cache: &[u8], layer: usize, slot: usize) -> Vec<f64> {
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
            _ => f64::from(f32::from_le_bytes(block[at..at + 4].try_into().unwrap())),
        };
        places.map(number).collect()
    }
}

/// A probe tells how far what is stored in its layer is from what computing everything would store, however it is cut; the
/// layers below have that afterwards, the others what they had.
#[test]
fn a_probe_compares_with_computing_everything() {
    for family in Family::ALL {
        for kv_dtype in [DType::BF16, DType::F32] {
            let runner = Runner::new(family, Isa::best(), kv_dtype);
            let layer = runner.probe_layer();
            assert_eq!(layer, if family == Family::Gemma3 { 6 } else { 1 });
            let all: Vec<usize> = (0..NUM_TOKENS).collect();
            let [tokens, others] = [7, 8].map(|seed| Random::new(seed).tokens(NUM_TOKENS, VOCAB));
            runner.forward(&tokens, &all);
            let wanted = runner.cache();
            let probe = |step: usize| -> (Vec<f32>, Vec<u8>) {
                runner.forward(&others, &all);
                let steps = (0..NUM_TOKENS).step_by(step);
                let found = steps.flat_map(|first| runner.probe(&tokens, first..NUM_TOKENS.min(first + step)));
                (found.collect(), runner.cache())
            };
            runner.forward(&others, &all);
            let before = runner.cache();
            let (deviations, after) = probe(NUM_TOKENS);
            for (at, found) in deviations.iter().enumerate() {
                for below in 0..runner.checkpoint.config().num_layers {
                    let fresh = if below < layer { &wanted } else { &before };
                    assert_eq!(runner.stored_in(&after, below, at), runner.stored_in(fresh, below, at), "{family:?}");
                }
                let [stored, fresh] = [&before, &wanted].map(|cache| runner.stored_in(cache, layer, at));
                let sum: f64 = stored.iter().zip(fresh).map(|(stored, fresh)| (stored - fresh).powi(2)).sum();
                assert!((f64::from(*found) - sum).abs() <= 1e-5 * sum, "{family:?} {at}: {found}, wanted {sum}");
                assert!(sum > 0.0);
            }
            assert!(probe(7) == (deviations, after), "{family:?} {kv_dtype}: in steps");
        }
    }
}

/// Every third token is forgotten and recomputed in one step: the cache and the logits of those tokens are what they
/// were, bit for bit.
#[test]
fn tokens_anywhere_in_a_sequence_are_recomputed() {
    for family in [Family::Llama3, Family::Qwen3, Family::Gemma3] {
        for (isa, kv_dtype) in Isa::available().map(|isa| (isa, DType::BF16)).chain([(Isa::best(), DType::F32)]) {
            let runner = Runner::new(family, isa, kv_dtype);
            let tokens = Random::new(4).tokens(NUM_TOKENS, VOCAB);
            let whole = runner.forward(&tokens, &(0..NUM_TOKENS).collect::<Vec<_>>());
            let cache = runner.cache();
            let some: Vec<usize> = (0..NUM_TOKENS).filter(|position| position % 3 == 1 && *position < 90).collect();
            let others = Random::new(5).tokens(NUM_TOKENS, VOCAB);
            runner.forward(&others, &some);
            assert!(runner.cache() != cache, "{family:?}: other tokens are in the cache now");
            let found = runner.forward(&tokens, &some);
            assert!(runner.cache() == cache, "{family:?} {isa}: recomputed keys and values");
            for (position, found) in some.iter().zip(&found) {
                assert!(*found == whole[*position], "{family:?} {isa}: logits of token {position}");
            }
        }
    }
}

/// All layers are moved, each by the angles of its own base and scaling.
#[test]
fn every_layer_is_moved_by_its_own_angles() {
    for family in [Family::Llama, Family::Llama3, Family::Gemma3] {
        let [found, wanted] = [(); 2].map(|()| Runner::new(family, Isa::best(), DType::BF16));
        let tokens = Random::new(6).tokens(NUM_TOKENS, VOCAB);
        let [before, _] = [&found, &wanted].map(|runner| {
            runner.forward(&tokens, &(0..NUM_TOKENS).collect::<Vec<_>>());
            runner.cache()
        });
        // To blocks behind the text, which take up seven, at other offsets.
        let copies = |runner: &Runner| RotatedCopies {
            source_slots: runner.indices(&(0..NUM_TOKENS as i32).collect::<Vec<_>>()),
            target_slots: runner.indices(&(0..NUM_TOKENS as i32).map(|at| 7 * 16 + 5 + at).collect::<Vec<_>>()),
            position_deltas: runner.indices(&vec![301; NUM_TOKENS]),
        };
        found.model.rotate_gather(&found.backend, &found.stream, &found.kv, &copies(&found)).unwrap();
        let config = wanted.checkpoint.config();
        for layer in 0..config.num_layers {
            let sliding = config.sliding.as_ref().filter(|sliding| sliding.layers[layer]);
            let rope = sliding.map_or(&config.rope, |sliding| &sliding.rope);
            let table = wanted.backend.load_rope(rope, 1024).unwrap();
            let kv = KvLayer { blocks: &wanted.kv.blocks, layout: &wanted.kv.layout, layer };
            wanted.backend.rotate_gather(&wanted.stream, &kv, &copies(&wanted), &table).unwrap();
        }
        assert!(found.cache() == wanted.cache(), "{family:?}");
        let text = 7 * found.kv.layout.block_bytes();
        assert!(found.cache()[..text] == before[..text], "{family:?}: the stored tokens are as they were");
        assert!(found.cache()[text..] != before[text..], "{family:?}: something was moved");
    }
}

/// Slots and deltas that do not exist are errors, before anything is written.
#[test]
fn impossible_copies_are_refused() {
    let runner = Runner::new(Family::Llama, Isa::best(), DType::BF16);
    let num_slots = (NUM_BLOCKS * BLOCK_SIZE) as i32;
    let run = |source: i32, target: i32, delta: &[i32]| {
        let copies = RotatedCopies {
            source_slots: runner.indices(&[source]),
            target_slots: runner.indices(&[target]),
            position_deltas: runner.indices(delta),
        };
        let done = runner.model.rotate_gather(&runner.backend, &runner.stream, &runner.kv, &copies);
        done.map_err(|error| error.to_string())
    };
    assert_eq!(run(0, 20, &[-1023]), Ok(()));
    assert!(run(-1, 20, &[0]).unwrap_err().contains("source slot -1"));
    assert!(run(0, num_slots, &[0]).unwrap_err().contains("target slot"));
    assert!(run(0, 20, &[-1024]).unwrap_err().contains("moved by -1024 positions"));
    assert!(run(0, 20, &[]).unwrap_err().contains("position_deltas"));
}
