//! Random LoRA adapters for tiny models, written the way PEFT and llama.cpp do.

use std::collections::BTreeMap;
use std::path::Path;

use half::bf16;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::random::Random;
use super::tiny_gguf::{gguf_name, interleaved, text};
use super::tiny_model::TinyModel;

/// Every module that adapters change.
pub const ALL: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

/// The embedding, which [`ALL`] has not.
pub const EMBEDDING: &str = "model.embed_tokens";
/// The output projection.
pub const HEAD: &str = "lm_head";

/// A row-major matrix of numbers that bf16 holds.
#[derive(Clone)]
pub struct Matrix {
    pub rows: usize,
    pub columns: usize,
    pub values: Vec<f32>,
}

impl Matrix {
    fn transposed(&self) -> Self {
        let (rows, columns) = (self.columns, self.rows);
        let values = (0..rows * columns).map(|at| self.values[at % columns * rows + at / columns]).collect();
        Self { rows, columns, values }
    }
}

/// An adapter in memory: `A` and `B` by the name of their module.
#[derive(Clone)]
pub struct TinyAdapter {
    pub rank: usize,
    pub alpha: f64,
    pub updates: BTreeMap<String, (Matrix, Matrix)>,
}

impl TinyAdapter {
    /// Updates of `modules`, as `(name, outputs, inputs)`, about as large as weights are.
    pub fn new(modules: &[(String, usize, usize)], rank: usize, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let alpha = 2.0 * rank as f64;
        let mut matrix = |rows: usize, columns: usize, scale: f64| {
            let number = |_| bf16::from_f64(scale * random.normal()).to_f32();
            Matrix { rows, columns, values: (0..rows * columns).map(number).collect() }
        };
        let updates = modules.iter().map(|(name, outputs, inputs)| {
            let a = matrix(rank, *inputs, 1.0 / (*inputs as f64).sqrt());
            (name.clone(), (a, matrix(*outputs, rank, 0.3 / (rank as f64).sqrt())))
        });
        Self { rank, alpha, updates: updates.collect() }
    }

    /// Updates of these modules in every layer of a model.
    pub fn of(model: &TinyModel, modules: &[&str], rank: usize, seed: u64) -> Self {
        let named = (0..model.family.num_layers()).flat_map(|layer| {
            modules.iter().map(move |module| {
                let name = format!("model.layers.{layer}.{module}");
                let weight = model.tensor(&format!("{name}.weight"));
                (name, weight.rows, weight.columns)
            })
        });
        Self::new(&named.collect::<Vec<_>>(), rank, seed)
    }

    /// `W += scale * alpha / rank * B A` in f64; of the embedding, whose rows are inputs, the transposed.
    pub fn merge_into(&self, model: &mut TinyModel, scale: f64) {
        if self.updates.contains_key(EMBEDDING) || self.updates.contains_key(HEAD) {
            // From now on the two are different.
            let embedding = model.tensor(&format!("{EMBEDDING}.weight")).clone();
            model.tensors.entry(format!("{HEAD}.weight")).or_insert(embedding);
        }
        for (name, (a, b)) in &self.updates {
            let is_lookup = name == EMBEDDING;
            let weight = model.tensors.get_mut(&format!("{name}.weight")).unwrap();
            for row in 0..weight.rows {
                for column in 0..weight.columns {
                    let (output, input) = if is_lookup { (column, row) } else { (row, column) };
                    let product = |at: usize| {
                        f64::from(b.values[output * self.rank + at]) * f64::from(a.values[at * a.columns + input])
                    };
                    let sum: f64 = (0..self.rank).map(product).sum();
                    let value = &mut weight.values[row * weight.columns + column];
                    *value = (f64::from(*value) + scale * self.alpha / self.rank as f64 * sum) as f32;
                }
            }
        }
    }

    /// A folder of its own.
    pub fn write(&self) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        self.write_into(folder.path());
        folder
    }

    /// Both files, in bf16.
    pub fn write_into(&self, folder: &Path) {
        let config = json!({"peft_type": "LORA", "r": self.rank, "lora_alpha": self.alpha, "bias": "none"});
        std::fs::write(folder.join("adapter_config.json"), config.to_string()).unwrap();
        let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
        for (name, (a, b)) in &self.updates {
            for (half, matrix) in [("A", a), ("B", b)] {
                let start = data.len();
                data.extend(matrix.values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()));
                let shape = [matrix.rows, matrix.columns];
                let facts = json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, data.len()]});
                let part =
                    if name == EMBEDDING { format!("lora_embedding_{half}") } else { format!("lora_{half}.weight") };
                header.insert(format!("base_model.model.{name}.{part}"), facts);
            }
        }
        let mut text = Value::Object(header).to_string();
        text.push_str(&" ".repeat(text.len().next_multiple_of(8) - text.len()));
        let file = [&(text.len() as u64).to_le_bytes()[..], text.as_bytes(), &data].concat();
        std::fs::write(folder.join("adapter_model.safetensors"), file).unwrap();
    }

    /// One GGUF file in bf16 for a model of the Llama architecture with heads of `head_dim`.
    pub fn write_gguf(&self, path: &Path, head_dim: usize) {
        let (mut table, mut data, mut metadata) = (Vec::new(), Vec::new(), Vec::new());
        for (key, value) in [("general.type", "adapter"), ("general.architecture", "llama"), ("adapter.type", "lora")] {
            text(&mut metadata, key);
            metadata.extend(8u32.to_le_bytes());
            text(&mut metadata, value);
        }
        text(&mut metadata, "adapter.lora.alpha");
        metadata.extend(6u32.to_le_bytes());
        metadata.extend((self.alpha as f32).to_le_bytes());
        for (name, (a, b)) in &self.updates {
            let b_values = interleaved(name, &b.values, b.columns, head_dim);
            // Of the embedding there is a row for each token.
            let rows_of_tokens = a.transposed();
            let a = if name == EMBEDDING { &rows_of_tokens } else { a };
            for (half, matrix, values) in [("a", a, &a.values), ("b", b, &b_values)] {
                text(&mut table, &format!("{}.weight.lora_{half}", gguf_name(name)));
                table.extend(2u32.to_le_bytes());
                [matrix.columns, matrix.rows].iter().for_each(|&extent| table.extend((extent as u64).to_le_bytes()));
                table.extend(30u32.to_le_bytes());
                table.extend((data.len() as u64).to_le_bytes());
                data.extend(values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()));
                data.resize(data.len().next_multiple_of(32), 0);
            }
        }
        let mut file = b"GGUF\x03\0\0\0".to_vec();
        file.extend((2 * self.updates.len() as u64).to_le_bytes());
        file.extend(4u64.to_le_bytes());
        file.extend(metadata);
        file.extend(table);
        file.resize(file.len().next_multiple_of(32), 0);
        file.extend(data);
        std::fs::write(path, file).unwrap();
    }
}
