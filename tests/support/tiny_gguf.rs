//! The tiny Llama and Gemma 2 as GGUF files: a small writer for f32, q8_0 and q4_0 tensors, and for others through candle.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>. As llama.cpp's converter does, the rows of Llama's q
//! and k are stored so that the two halves of each head alternate, and Gemma's norms with the one that is added to them.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use half::f16;
use mneme::backend::{DType, dequantize_row};

use super::tiny_model::{
    EPSILON, Family, GEMMA2_CAPS, HEAD_DIM, NUM_HEADS, NUM_KV_HEADS, TinyModel, WINDOW, Weights, Written,
};

const ALIGNMENT: usize = 32;

/// How a tensor is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    F32,
    Q8_0,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q4K,
    Q5K,
    Q6K,
}

impl Storage {
    fn code(self) -> u32 {
        match self {
            Storage::F32 => 0,
            Storage::Q4_0 => 2,
            Storage::Q4_1 => 3,
            Storage::Q5_0 => 6,
            Storage::Q5_1 => 7,
            Storage::Q8_0 => 8,
            Storage::Q4K => 12,
            Storage::Q5K => 13,
            Storage::Q6K => 14,
        }
    }

    /// What candle and mneme call the formats that are not written here.
    fn names(self) -> (GgmlDType, DType) {
        match self {
            Storage::F32 => (GgmlDType::F32, DType::F32),
            Storage::Q8_0 => (GgmlDType::Q8_0, DType::Q8_0),
            Storage::Q4_0 => (GgmlDType::Q4_0, DType::Q4_0),
            Storage::Q4_1 => (GgmlDType::Q4_1, DType::Q4_1),
            Storage::Q5_0 => (GgmlDType::Q5_0, DType::Q5_0),
            Storage::Q5_1 => (GgmlDType::Q5_1, DType::Q5_1),
            Storage::Q4K => (GgmlDType::Q4K, DType::Q4K),
            Storage::Q5K => (GgmlDType::Q5K, DType::Q5K),
            Storage::Q6K => (GgmlDType::Q6K, DType::Q6K),
        }
    }

    pub fn encode(self, values: &[f32]) -> Vec<u8> {
        match self {
            Storage::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            Storage::Q8_0 => values.chunks(32).flat_map(|block| q8_0(block).0).collect(),
            Storage::Q4_0 => values.chunks(32).flat_map(|block| q4_0(block).0).collect(),
            _ => {
                let values = Tensor::from_slice(values, values.len(), &Device::Cpu).unwrap();
                QTensor::quantize(&values, self.names().0).unwrap().data().unwrap().into_owned()
            }
        }
    }

    /// What a reader gets back.
    fn rounded(self, values: &[f32]) -> Vec<f32> {
        match self {
            Storage::F32 => values.to_vec(),
            Storage::Q8_0 => values.chunks(32).flat_map(|block| q8_0(block).1).collect(),
            Storage::Q4_0 => values.chunks(32).flat_map(|block| q4_0(block).1).collect(),
            _ => {
                let mut rounded = vec![0.0; values.len()];
                dequantize_row(self.names().1, &self.encode(values), &mut rounded);
                rounded
            }
        }
    }
}

/// Bytes of a block and the numbers they stand for.
fn q8_0(block: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let most = block.iter().fold(0.0f32, |most, value| most.max(value.abs()));
    let scale = f16::from_f32(most / 127.0);
    let codes: Vec<i8> = block.iter().map(|value| code(*value, scale.to_f32(), 127.0) as i8).collect();
    let bytes = scale.to_le_bytes().into_iter().chain(codes.iter().map(|code| *code as u8)).collect();
    (bytes, codes.iter().map(|code| f32::from(*code) * scale.to_f32()).collect())
}

fn q4_0(block: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let most = block.iter().fold(0.0f32, |most, value| most.max(value.abs()));
    let scale = f16::from_f32(most / 7.0);
    let codes: Vec<u8> = block.iter().map(|value| (code(*value, scale.to_f32(), 7.0) + 8.0) as u8).collect();
    let pairs = (0..16).map(|at| codes[at] | codes[at + 16] << 4);
    let bytes = scale.to_le_bytes().into_iter().chain(pairs).collect();
    (bytes, codes.iter().map(|code| (f32::from(*code) - 8.0) * scale.to_f32()).collect())
}

fn code(value: f32, scale: f32, most: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { (value / scale).round().clamp(-most, most) }
}

impl TinyModel {
    /// The model a reader of `write_gguf(storage_of)` sees.
    pub fn quantised(&self, storage_of: impl Fn(&str) -> Storage) -> Self {
        let mut model = self.clone();
        for (name, weights) in &mut model.tensors {
            weights.values = storage_of(name).rounded(&weights.values);
        }
        model
    }

    pub fn write_gguf(&self, storage_of: impl Fn(&str) -> Storage) -> Written {
        assert!(matches!(self.family, Family::Llama | Family::Gemma2), "the writer knows two families");
        let (mut table, mut data) = (Vec::new(), Vec::new());
        for (name, weights) in &self.tensors {
            let storage = storage_of(name);
            text(&mut table, &name_in(self.family, name));
            let dims = if weights.rows == 1 { vec![weights.columns] } else { vec![weights.columns, weights.rows] };
            table.extend((dims.len() as u32).to_le_bytes());
            dims.iter().for_each(|&dim| table.extend((dim as u64).to_le_bytes()));
            table.extend(storage.code().to_le_bytes());
            table.extend((data.len() as u64).to_le_bytes());
            data.extend(storage.encode(&self.numbers_in(name, weights)));
            data.resize(data.len().next_multiple_of(ALIGNMENT), 0);
        }
        let (num_entries, metadata) = metadata(self);
        let mut file = b"GGUF".to_vec();
        file.extend(3u32.to_le_bytes());
        file.extend((self.tensors.len() as u64).to_le_bytes());
        file.extend((num_entries as u64).to_le_bytes());
        file.extend(metadata);
        file.extend(table);
        file.resize(file.len().next_multiple_of(ALIGNMENT), 0);
        file.extend(data);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tiny.gguf");
        std::fs::write(&path, file).unwrap();
        Written::new(folder, path)
    }
}

impl TinyModel {
    /// What a converter writes of a tensor.
    fn numbers_in(&self, name: &str, weights: &Weights) -> Vec<f32> {
        match self.family {
            Family::Gemma2 if name.contains("norm") => weights.values.iter().map(|value| value + 1.0).collect(),
            Family::Gemma2 => weights.values.clone(),
            _ => interleaved(name, &weights.values, weights.columns, self.head_dim()),
        }
    }
}

pub(super) fn text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

fn metadata(model: &TinyModel) -> (usize, Vec<u8>) {
    let (mut bytes, gemma) = (Vec::new(), model.family == Family::Gemma2);
    let prefix = if gemma { "gemma2" } else { "llama" };
    text(&mut bytes, "general.architecture");
    bytes.extend(8u32.to_le_bytes());
    text(&mut bytes, prefix);
    let mut sizes = vec![
        ("embedding_length", model.tensor("model.embed_tokens.weight").columns),
        ("feed_forward_length", model.tensor("model.layers.0.mlp.down_proj.weight").columns),
        ("block_count", model.family.num_layers()),
        ("attention.head_count", NUM_HEADS),
        ("attention.head_count_kv", NUM_KV_HEADS),
        ("context_length", 4096),
    ];
    let theta = if gemma { 100_000.0 } else { 10_000.0 };
    let mut numbers = vec![("attention.layer_norm_rms_epsilon", EPSILON as f32), ("rope.freq_base", theta)];
    if gemma {
        sizes.extend([("attention.key_length", HEAD_DIM), ("attention.sliding_window", WINDOW)]);
        let [attention, logits] = GEMMA2_CAPS.map(|cap| cap as f32);
        numbers.extend([("attn_logit_softcapping", attention), ("final_logit_softcapping", logits)]);
    }
    for (key, value) in &sizes {
        text(&mut bytes, &format!("{prefix}.{key}"));
        bytes.extend(4u32.to_le_bytes());
        bytes.extend((*value as u32).to_le_bytes());
    }
    for (key, value) in &numbers {
        text(&mut bytes, &format!("{prefix}.{key}"));
        bytes.extend(6u32.to_le_bytes());
        bytes.extend(value.to_le_bytes());
    }
    (1 + sizes.len() + numbers.len(), bytes)
}

fn name_in(family: Family, name: &str) -> String {
    let gemma = [
        ("pre_feedforward_layernorm", "ffn_norm"),
        ("post_feedforward_layernorm", "post_ffw_norm"),
        ("post_attention_layernorm", "post_attention_norm"),
    ];
    let known: &[_] = if family == Family::Gemma2 { &gemma } else { &[] };
    gguf_name(&known.iter().fold(name.to_owned(), |name, (from, to)| name.replace(from, to)))
}

pub(super) fn gguf_name(name: &str) -> String {
    let whole = [
        ("model.embed_tokens", "token_embd"),
        ("lm_head", "output"),
        ("model.norm", "output_norm"),
        ("model.layers", "blk"),
    ];
    let parts = [
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    whole.iter().chain(&parts).fold(name.to_owned(), |name, (from, to)| name.replace(from, to))
}

/// Rows of `columns` numbers in the order in which files of the Llama architecture have those of q and k.
pub(super) fn interleaved(name: &str, values: &[f32], columns: usize, head_dim: usize) -> Vec<f32> {
    if !name.contains("q_proj") && !name.contains("k_proj") {
        return values.to_vec();
    }
    let row = |row: usize| &values[row * columns..(row + 1) * columns];
    let source_of = |at: usize| at / head_dim * head_dim + at % 2 * (head_dim / 2) + at % head_dim / 2;
    (0..values.len() / columns).flat_map(|at| row(source_of(at)).to_vec()).collect()
}
