//! Tiny random models of every family, written the way Hugging Face publishes them.
//!
//! Weights are seeded and rounded to bf16, so the file holds exactly the numbers the reference computes with. Their
//! scale keeps logits a few units apart.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::bf16;
use mneme::backend::DType;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::random::Random;

pub const VOCAB: usize = 300;
pub const HIDDEN: usize = 64;
pub const INTERMEDIATE: usize = 96;
pub const NUM_HEADS: usize = 4;
pub const NUM_KV_HEADS: usize = 2;
pub const HEAD_DIM: usize = 16;
pub const WINDOW: usize = 32;
pub const EPSILON: f64 = 1e-5;
/// What the attention scores and the logits of the tiny Gemma 2 stay inside of: most are beyond.
pub const GEMMA2_CAPS: [f64; 2] = [2.0, 3.0];

/// How wide a model is.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    hidden: usize,
    intermediate: usize,
    head_dim: usize,
}

const TINY: Sizes = Sizes { hidden: HIDDEN, intermediate: INTERMEDIATE, head_dim: HEAD_DIM };
/// Rows of whole blocks of 256.
const WIDE: Sizes = Sizes { hidden: 256, intermediate: 512, head_dim: 64 };

/// What kind of decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    Llama,
    /// Llama with an output projection of its own and Llama 3.1's RoPE scaling.
    Llama3,
    Qwen2,
    Qwen3,
    /// Every second layer sees everything.
    Gemma2,
    Gemma3,
    /// Gemma 3 with fewer layers, every second of which sees everything: for devices on which a layer takes long.
    ShortGemma3,
}

impl Family {
    pub const ALL: [Family; 6] =
        [Family::Llama, Family::Llama3, Family::Qwen2, Family::Qwen3, Family::Gemma2, Family::Gemma3];

    /// The same without a long one.
    pub const SHORT: [Family; 6] =
        [Family::Llama, Family::Llama3, Family::Qwen2, Family::Qwen3, Family::Gemma2, Family::ShortGemma3];

    /// One more than it takes to see everything once.
    pub fn num_layers(self) -> usize {
        1 + self.window_period().unwrap_or(1)
    }

    /// Of so many layers the last sees everything; `None` where all do.
    pub fn window_period(self) -> Option<usize> {
        match self {
            Family::Gemma3 => Some(6),
            Family::Gemma2 | Family::ShortGemma3 => Some(2),
            _ => None,
        }
    }

    /// Bytes of a block of keys and values, as engines lay it out.
    pub fn block_bytes(self, kv_dtype: DType, block_size: usize) -> usize {
        let numbers = self.num_layers() * 2 * NUM_KV_HEADS * HEAD_DIM * block_size;
        (numbers * kv_dtype.block_bytes()).next_multiple_of(4096)
    }

    pub fn is_gemma(self) -> bool {
        self.window_period().is_some()
    }

    pub fn has_head_norms(self) -> bool {
        matches!(self, Family::Qwen3 | Family::Gemma3 | Family::ShortGemma3)
    }
}

/// Numbers of one tensor, `[rows, columns]`; vectors have one row.
#[derive(Debug, Clone)]
pub struct Weights {
    pub rows: usize,
    pub columns: usize,
    pub values: Vec<f32>,
}

/// A model in memory.
#[derive(Clone)]
pub struct TinyModel {
    pub family: Family,
    pub tensors: BTreeMap<String, Weights>,
}

/// A model in a temporary folder.
pub struct Written {
    _folder: TempDir,
    path: PathBuf,
}

impl Written {
    pub(super) fn new(folder: TempDir, path: PathBuf) -> Self {
        Self { _folder: folder, path }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Of a Hugging Face directory.
    pub fn change_config(&self, change: impl FnOnce(&mut serde_json::Map<String, Value>)) {
        let path = self.path.join("config.json");
        let mut config = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        change(&mut config);
        std::fs::write(&path, Value::Object(config).to_string()).unwrap();
    }
}

impl TinyModel {
    pub fn new(family: Family, seed: u64) -> Self {
        Self::with_sizes(family, seed, TINY)
    }

    /// A Llama wide enough for every quantised format; for `write_gguf` alone.
    pub fn wide(seed: u64) -> Self {
        Self::with_sizes(Family::Llama, seed, WIDE)
    }

    fn with_sizes(family: Family, seed: u64, sizes: Sizes) -> Self {
        let mut maker = Maker { random: Random::new(seed), sizes, tensors: BTreeMap::new() };
        maker.matrix("model.embed_tokens.weight", VOCAB, sizes.hidden, 0.3);
        maker.norm(family, "model.norm.weight", sizes.hidden);
        if family == Family::Llama3 {
            maker.matrix("lm_head.weight", VOCAB, sizes.hidden, 0.3);
        }
        for layer in 0..family.num_layers() {
            maker.layer(family, &format!("model.layers.{layer}"));
        }
        Self { family, tensors: maker.tensors }
    }

    pub fn tensor(&self, name: &str) -> &Weights {
        self.tensors.get(name).unwrap_or_else(|| panic!("no tensor {name}"))
    }

    /// Numbers of a head.
    pub fn head_dim(&self) -> usize {
        self.tensor("model.layers.0.self_attn.q_proj.weight").rows / NUM_HEADS
    }

    pub fn config(&self) -> Value {
        let mut config = json!({
            "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": self.family.num_layers(),
            "num_attention_heads": NUM_HEADS, "num_key_value_heads": NUM_KV_HEADS, "head_dim": HEAD_DIM,
            "vocab_size": VOCAB, "max_position_embeddings": 4096, "rms_norm_eps": EPSILON, "hidden_act": "silu",
        });
        let own = match self.family {
            Family::Llama => json!({"model_type": "llama", "rope_theta": 10_000.0, "tie_word_embeddings": true}),
            Family::Llama3 => json!({"model_type": "llama", "rope_theta": 500_000.0, "tie_word_embeddings": false,
                "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
            Family::Qwen2 => json!({"model_type": "qwen2", "rope_theta": 1_000_000.0, "tie_word_embeddings": true}),
            Family::Qwen3 => json!({"model_type": "qwen3", "rope_theta": 1_000_000.0, "tie_word_embeddings": true}),
            Family::Gemma2 => json!({"model_type": "gemma2", "rope_theta": 100_000.0, "sliding_window": WINDOW,
                "query_pre_attn_scalar": 24, "hidden_activation": "gelu_pytorch_tanh",
                "attn_logit_softcapping": GEMMA2_CAPS[0], "final_logit_softcapping": GEMMA2_CAPS[1]}),
            Family::Gemma3 | Family::ShortGemma3 => json!({"model_type": "gemma3_text", "rope_theta": 1_000_000.0,
                "rope_local_base_freq": 10_000.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0},
                "sliding_window": WINDOW, "sliding_window_pattern": self.family.window_period(), "query_pre_attn_scalar": 24,
                "hidden_activation": "gelu_pytorch_tanh"}),
        };
        config.as_object_mut().unwrap().extend(own.as_object().unwrap().clone());
        config
    }

    /// A Hugging Face directory with one safetensors file in bf16.
    pub fn write(&self) -> Written {
        let folder = tempfile::tempdir().unwrap();
        self.write_config(folder.path());
        self.write_shard(&folder.path().join("model.safetensors"), |_| true);
        let path = folder.path().to_owned();
        Written::new(folder, path)
    }

    /// The same in two shards with an index.
    pub fn write_sharded(&self) -> Written {
        let folder = tempfile::tempdir().unwrap();
        self.write_config(folder.path());
        let shard_of = |name: &str| if name.contains("layers.0.") { 1 } else { 2 };
        let file_of = |shard: usize| format!("model-{shard:05}-of-00002.safetensors");
        for shard in [1, 2] {
            self.write_shard(&folder.path().join(file_of(shard)), |name| shard_of(name) == shard);
        }
        let map: BTreeMap<&String, String> = self.tensors.keys().map(|name| (name, file_of(shard_of(name)))).collect();
        let index = json!({"metadata": {"total_size": 0}, "weight_map": map});
        std::fs::write(folder.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
        let path = folder.path().to_owned();
        Written::new(folder, path)
    }

    fn write_config(&self, folder: &Path) {
        std::fs::write(folder.join("config.json"), self.config().to_string()).unwrap();
    }

    fn write_shard(&self, path: &Path, belongs: impl Fn(&str) -> bool) {
        let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
        for (name, weights) in self.tensors.iter().filter(|(name, _)| belongs(name)) {
            let start = data.len();
            data.extend(weights.values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()));
            let shape =
                if weights.rows == 1 { json!([weights.columns]) } else { json!([weights.rows, weights.columns]) };
            header.insert(name.clone(), json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, data.len()]}));
        }
        let mut text = Value::Object(header).to_string();
        text.push_str(&" ".repeat(text.len().next_multiple_of(8) - text.len()));
        let file = [&(text.len() as u64).to_le_bytes()[..], text.as_bytes(), &data].concat();
        std::fs::write(path, file).unwrap();
    }
}

struct Maker {
    random: Random,
    sizes: Sizes,
    tensors: BTreeMap<String, Weights>,
}

impl Maker {
    fn layer(&mut self, family: Family, prefix: &str) {
        let Sizes { hidden, intermediate, head_dim } = self.sizes;
        let (q_size, kv_size) = (NUM_HEADS * head_dim, NUM_KV_HEADS * head_dim);
        for (part, rows, columns, gain) in [
            ("self_attn.q_proj", q_size, hidden, 1.2),
            ("self_attn.k_proj", kv_size, hidden, 1.2),
            ("self_attn.v_proj", kv_size, hidden, 1.5),
            ("self_attn.o_proj", hidden, q_size, 1.5),
            ("mlp.gate_proj", intermediate, hidden, 1.5),
            ("mlp.up_proj", intermediate, hidden, 1.5),
            ("mlp.down_proj", hidden, intermediate, 1.5),
        ] {
            self.matrix(&format!("{prefix}.{part}.weight"), rows, columns, gain / (columns as f64).sqrt());
        }
        if family == Family::Qwen2 {
            for (part, size) in [("q_proj", q_size), ("k_proj", kv_size), ("v_proj", kv_size)] {
                self.matrix(&format!("{prefix}.self_attn.{part}.bias"), 1, size, 0.5);
            }
        }
        let mut norms = vec!["input_layernorm", "post_attention_layernorm"];
        if family.is_gemma() {
            norms.extend(["pre_feedforward_layernorm", "post_feedforward_layernorm"]);
        }
        for norm in norms {
            self.norm(family, &format!("{prefix}.{norm}.weight"), hidden);
        }
        if family.has_head_norms() {
            self.norm(family, &format!("{prefix}.self_attn.q_norm.weight"), head_dim);
            self.norm(family, &format!("{prefix}.self_attn.k_norm.weight"), head_dim);
        }
    }

    fn matrix(&mut self, name: &str, rows: usize, columns: usize, scale: f64) {
        self.insert(name, rows, columns, 0.0, scale);
    }

    /// Gemma stores what is added to one. The tiny Gemma 2 multiplies what its few layers add to the embedding, or greedily
    /// it would repeat its last token for ever.
    fn norm(&mut self, family: Family, name: &str, len: usize) {
        let mean = match family {
            Family::Gemma2 if name.contains(".post_") => 4.0,
            _ if family.is_gemma() => 0.0,
            _ => 1.0,
        };
        self.insert(name, 1, len, mean, 0.2);
    }

    fn insert(&mut self, name: &str, rows: usize, columns: usize, mean: f64, scale: f64) {
        let number = |_| bf16::from_f64(mean + scale * self.random.normal()).to_f32();
        let values = (0..rows * columns).map(number).collect();
        self.tensors.insert(name.to_owned(), Weights { rows, columns, values });
    }
}
