//! A checkpoint on disk: its files mapped, its tensors found by their Hugging Face names.

#![allow(unsafe_code)]

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use safetensors::tensor::{Dtype, Metadata};
use serde::Deserialize;

use super::config::ModelConfig;
use super::dummy::DummyWeights;
use super::gguf_config::gguf_name;
use crate::backend::{DType, HostTensor, RowOrder, SharedBytes};
use crate::gguf::Gguf;
use crate::{Error, Result, malformed, unsupported};

/// Larger JSON files beside a model are not read.
const MAX_JSON_BYTES: u64 = 256 << 20;

const EMBEDDING: &str = "model.embed_tokens.weight";

/// An open checkpoint. Tensors are views into mapped files; nothing is read before it is used.
pub struct Checkpoint {
    path: PathBuf,
    config: ModelConfig,
    embedding_name: &'static str,
    files: Files,
}

enum Files {
    Gguf(Box<Gguf>),
    Safetensors(Vec<Shard>),
    Dummy(DummyWeights),
}

struct Shard {
    path: PathBuf,
    bytes: SharedBytes,
    data_start: usize,
    metadata: Metadata,
}

/// A tensor as its file describes it.
pub(super) struct StoredTensor {
    pub(super) name: String,
    /// Type and shape.
    pub(super) kind: String,
    pub(super) source: SharedBytes,
    pub(super) range: Range<usize>,
}

impl StoredTensor {
    pub(super) fn bytes(&self) -> &[u8] {
        &(*self.source).as_ref()[self.range.clone()]
    }
}

fn stored_in_gguf(gguf: &Gguf) -> Vec<StoredTensor> {
    let stored = gguf.tensors().map(|(name, info)| StoredTensor {
        name: name.to_owned(),
        kind: format!("{} {:?}", info.dtype, info.dims),
        source: gguf.shared_bytes().clone(),
        range: info.range.clone(),
    });
    stored.collect()
}

impl Shard {
    fn stored_tensors(&self) -> impl Iterator<Item = StoredTensor> {
        self.metadata.tensors().into_iter().map(|(name, info)| {
            let (start, end) = info.data_offsets;
            let range = self.data_start + start..self.data_start + end;
            StoredTensor { name, kind: format!("{:?} {:?}", info.dtype, info.shape), source: self.bytes.clone(), range }
        })
    }
}

impl Checkpoint {
    /// Opens a `.gguf` file, or a directory with `config.json` and safetensors files.
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_dir() { Self::open_directory(path) } else { Self::open_gguf(path) }
    }

    fn open_gguf(path: &Path) -> Result<Self> {
        let gguf = Gguf::parse(map_file(path)?).map_err(|error| in_file(path, error))?;
        let config = ModelConfig::from_gguf(&gguf).map_err(|error| in_file(path, error))?;
        Ok(Self { path: path.to_owned(), config, embedding_name: EMBEDDING, files: Files::Gguf(Box::new(gguf)) })
    }

    /// The model of a directory's `config.json` with weights drawn by a seed; its own are not looked at.
    ///
    /// # Errors
    /// Those of reading the file.
    pub fn open_dummy(directory: &Path, seed: u64) -> Result<Self> {
        let config_path = directory.join("config.json");
        let text = read_text(&config_path)?;
        let config = ModelConfig::from_hf_json(&text).map_err(|error| in_file(&config_path, error))?;
        let files = Files::Dummy(DummyWeights::new(&config_path, text, seed));
        Ok(Self { path: directory.to_owned(), config, embedding_name: EMBEDDING, files })
    }

    fn open_directory(path: &Path) -> Result<Self> {
        let config_path = path.join("config.json");
        let config =
            ModelConfig::from_hf_json(&read_text(&config_path)?).map_err(|error| in_file(&config_path, error))?;
        let shards = shard_names(path)?.iter().map(|name| open_shard(&path.join(name))).collect::<Result<_>>()?;
        Ok(Self { path: path.to_owned(), config, embedding_name: EMBEDDING, files: Files::Safetensors(shards) })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files its weights lie in.
    pub fn weight_files(&self) -> Vec<PathBuf> {
        match &self.files {
            Files::Gguf(_) => vec![self.path.clone()],
            Files::Safetensors(shards) => shards.iter().map(|shard| shard.path.clone()).collect(),
            Files::Dummy(weights) => vec![weights.config_path().to_owned()],
        }
    }

    /// Every tensor as it is stored, whether the model uses it or not, in order of name.
    pub(super) fn stored_tensors(&self) -> Vec<StoredTensor> {
        let mut tensors: Vec<StoredTensor> = match &self.files {
            Files::Gguf(gguf) => stored_in_gguf(gguf),
            Files::Safetensors(shards) => shards.iter().flat_map(Shard::stored_tensors).collect(),
            Files::Dummy(weights) => vec![weights.stored()],
        };
        tensors.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        tensors
    }

    /// What it says about the model.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Uses the output projection as embedding too. GGUF files of tied models may carry a second copy of the embedding
    /// for the output, quantised less; without this each copy is used for its own purpose.
    pub fn tie_embedding_to_output(&mut self) {
        if !self.config.tie_word_embeddings {
            self.config.tie_word_embeddings = true;
            self.embedding_name = "lm_head.weight";
        }
    }

    /// The tensor that holds the embedding.
    pub fn embedding_name(&self) -> &'static str {
        self.embedding_name
    }

    /// The GGUF file, when it is one.
    pub fn gguf(&self) -> Option<&Gguf> {
        match &self.files {
            Files::Gguf(gguf) => Some(gguf),
            Files::Safetensors(_) | Files::Dummy(_) => None,
        }
    }

    /// What stored norm weights already carry of the constant that is added to them: all of it in GGUF files.
    pub fn stored_norm_offset(&self) -> f32 {
        match self.files {
            Files::Gguf(_) => self.config.norm_offset,
            Files::Safetensors(_) | Files::Dummy(_) => 0.0,
        }
    }

    /// Tensor `name`, by its Hugging Face name, with its shape checked.
    ///
    /// # Errors
    /// `Format` when the checkpoint lacks it or has another one of that name.
    pub fn matrix(&self, name: &str, rows: usize, columns: usize) -> Result<HostTensor> {
        if let Files::Dummy(weights) = &self.files {
            return weights.tensor(&self.config, name, rows, columns);
        }
        let path = self.path.display();
        let missing = || malformed!("{path}: the checkpoint has no tensor {name:?}");
        let tensor = self.find_tensor(name)?.ok_or_else(missing)?;
        if (tensor.rows(), tensor.columns()) != (rows, columns) {
            let (found_rows, found_columns) = (tensor.rows(), tensor.columns());
            return Err(malformed!(
                "{}: tensor {name:?} is [{found_rows}, {found_columns}], config wants [{rows}, {columns}]",
                self.path.display()
            ));
        }
        Ok(tensor)
    }

    /// A vector with its length checked.
    pub fn vector(&self, name: &str, len: usize) -> Result<HostTensor> {
        self.matrix(name, 1, len)
    }

    /// Whether it has tensor `name`.
    pub fn has_tensor(&self, name: &str) -> Result<bool> {
        match &self.files {
            Files::Dummy(_) => Ok(DummyWeights::has(&self.config, name)),
            Files::Safetensors(_) | Files::Gguf(_) => Ok(self.find_tensor(name)?.is_some()),
        }
    }

    /// Tensor `name`, or `None` when no file has it.
    fn find_tensor(&self, name: &str) -> Result<Option<HostTensor>> {
        match &self.files {
            Files::Safetensors(shards) => find_in_shards(shards, name),
            Files::Gguf(gguf) => self.find_in_gguf(gguf, name),
            Files::Dummy(_) => Ok(None),
        }
    }

    fn find_in_gguf(&self, gguf: &Gguf, name: &str) -> Result<Option<HostTensor>> {
        let architecture = self.config.architecture;
        let Some(gguf_name) = gguf_name(architecture, name).filter(|found| gguf.tensor_info(found).is_some()) else {
            return Ok(None);
        };
        let tensor = gguf.tensor(&gguf_name).map_err(|error| in_file(&self.path, error))?;
        Ok(Some(match interleaved_heads(&self.config, name) {
            Some(num_heads) if tensor.rows().is_multiple_of(num_heads * 2) => {
                tensor.with_row_order(RowOrder::InterleavedHalves { num_heads })
            }
            Some(_) => return Err(malformed!("{}: {name} has {} rows", self.path.display(), tensor.rows())),
            None => tensor,
        }))
    }
}

/// Heads of the rows of a tensor that GGUF files keep in another order.
fn interleaved_heads(config: &ModelConfig, name: &str) -> Option<usize> {
    let [num_heads, num_kv_heads] = config.interleaved_heads()?;
    if name.contains("self_attn.q_proj") {
        Some(num_heads)
    } else if name.contains("self_attn.k_proj") {
        Some(num_kv_heads)
    } else {
        None
    }
}

fn find_in_shards(shards: &[Shard], name: &str) -> Result<Option<HostTensor>> {
    for shard in shards {
        if let Some(info) = shard.metadata.info(name) {
            let dtype = match info.dtype {
                Dtype::F32 => DType::F32,
                Dtype::F16 => DType::F16,
                Dtype::BF16 => DType::BF16,
                other => return Err(unsupported!("tensor {name:?} is {other:?}; F32, F16 and BF16 are supported")),
            };
            let (rows, columns) = match info.shape.as_slice() {
                [len] => (1, *len),
                [rows, columns] => (*rows, *columns),
                other => return Err(malformed!("tensor {name:?} has shape {other:?}, wanted one or two extents")),
            };
            let (start, end) = info.data_offsets;
            let range = shard.data_start + start..shard.data_start + end;
            return HostTensor::new(name, shard.bytes.clone(), range, dtype, rows, columns).map(Some);
        }
    }
    Ok(None)
}

#[derive(Deserialize)]
struct ShardIndex {
    weight_map: HashMap<String, String>,
}

fn shard_names(directory: &Path) -> Result<Vec<String>> {
    let index_path = directory.join("model.safetensors.index.json");
    if !index_path.exists() {
        return Ok(vec!["model.safetensors".into()]);
    }
    let index: ShardIndex = serde_json::from_str(&read_text(&index_path)?)
        .map_err(|error| malformed!("{}: not a shard index: {error}", index_path.display()))?;
    let mut names: Vec<String> = index.weight_map.into_values().collect();
    names.sort();
    names.dedup();
    match names.iter().find(|name| Path::new(name).file_name().is_none_or(|file| file != name.as_str())) {
        Some(name) => Err(malformed!("{}: shard {name:?} is not a plain file name", index_path.display())),
        None => Ok(names),
    }
}

fn open_shard(path: &Path) -> Result<Shard> {
    let bytes = map_file(path)?;
    let (header_bytes, metadata) = safetensors::SafeTensors::read_metadata((*bytes).as_ref())
        .map_err(|error| malformed!("{}: not a safetensors file: {error}", path.display()))?;
    Ok(Shard { path: path.to_owned(), bytes, data_start: header_bytes + 8, metadata })
}

/// Maps a file for reading.
pub(super) fn map_file(path: &Path) -> Result<SharedBytes> {
    let file = File::open(path).map_err(|error| Error::io("open", path, error))?;
    // SAFETY: the mapping is read-only and private to us. A file that is truncated while it is mapped faults; model
    // files are replaced by renaming, never rewritten in place, by every tool that writes them.
    let mapping = unsafe { Mmap::map(&file) }.map_err(|error| Error::io("map", path, error))?;
    Ok(Arc::new(mapping))
}

/// A text file of bounded size.
pub(super) fn read_text(path: &Path) -> Result<String> {
    let size = std::fs::metadata(path).map_err(|error| Error::io("read", path, error))?.len();
    if size > MAX_JSON_BYTES {
        return Err(malformed!("{}: {size} bytes is more than the {MAX_JSON_BYTES} allowed", path.display()));
    }
    std::fs::read_to_string(path).map_err(|error| Error::io("read", path, error))
}

fn in_file(path: &Path, error: Error) -> Error {
    match error {
        Error::Format(message) => malformed!("{}: {message}", path.display()),
        Error::Unsupported(message) => unsupported!("{}: {message}", path.display()),
        other => other,
    }
}
