//! An adapter's files, read whole: `adapter_config.json` and `adapter_model.safetensors` as PEFT writes them, or one GGUF
//! file (`gguf_lora.rs`).
//!
//! A file is copied before it is looked at, so that whatever happens to it later changes nothing; everything is checked
//! before anything is used.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorInfo};

use super::base::{BaseShapes, Module};
use super::gguf_lora;
use super::peft_config::PeftConfig;
use crate::backend::{DType, HostTensor, SharedBytes};
use crate::{Error, Result, malformed, unsupported};

/// The largest rank of an update.
pub const MAX_RANK: usize = 512;

/// The largest file of weights that is read unless told otherwise.
pub const MAX_ADAPTER_BYTES: u64 = 2 << 30;

const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// Names and shapes of the modules of a thousand layers take less.
const MAX_HEADER_BYTES: u64 = 16 << 20;

/// What an adapter is, whatever its name and wherever its files: BLAKE3 over the numbers and factors of its updates.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AdapterDigest(pub [u8; 32]);

impl fmt::Display for AdapterDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        blake3::Hash::from(self.0).to_hex().fmt(f)
    }
}

impl fmt::Debug for AdapterDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, ..] = self.0;
        write!(f, "AdapterDigest({a:02x}{b:02x}{c:02x}{d:02x}..)")
    }
}

/// The update of one module: `W + scaling * B A`.
#[derive(Clone)]
pub struct Update {
    /// `[rank, inputs]`.
    pub a: HostTensor,
    /// `[outputs, rank]`.
    pub b: HostTensor,
    /// The adapter's own factor.
    pub scaling: f32,
}

impl Update {
    pub(super) fn new(a: HostTensor, b: HostTensor, scaling: f32) -> Result<Self> {
        match scaling.is_finite() {
            true => Ok(Self { a, b, scaling }),
            false => Err(malformed!("{}: alpha and rank give the factor {scaling}", a.name())),
        }
    }
}

/// A module of a layer.
pub(super) type Place = (usize, Module);

/// An adapter that fits its model, in memory.
pub struct Adapter {
    digest: AdapterDigest,
    updates: BTreeMap<Place, Update>,
    num_bytes: usize,
}

/// What was found of a module.
#[derive(Default)]
pub(super) struct Halves {
    a: Option<HostTensor>,
    b: Option<HostTensor>,
}

/// One of the two factors.
#[derive(Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub(super) enum Half {
    A,
    B,
}

impl Halves {
    /// Adds a factor, of which there is one.
    pub(super) fn insert(&mut self, half: Half, tensor: HostTensor) -> Result<()> {
        let slot = if half == Half::A { &mut self.a } else { &mut self.b };
        match slot.replace(tensor) {
            Some(other) => Err(malformed!("the adapter has {:?} twice, under different names", other.name())),
            None => Ok(()),
        }
    }
}

impl Adapter {
    /// Reads a folder as PEFT writes it, or a GGUF file. Weights of more than `max_bytes` are refused.
    ///
    /// # Errors
    /// `NotFound` when a file is missing, `Format` when one is damaged or does not fit the model, `Unsupported` when it
    /// holds something other than a plain LoRA.
    pub fn read(path: &Path, shapes: &BaseShapes, max_bytes: u64) -> Result<Self> {
        if path.is_file() {
            return Self::parse_gguf(read_file(path, max_bytes)?, shapes);
        }
        let config = read_file(&path.join("adapter_config.json"), MAX_CONFIG_BYTES)?;
        let weights = read_file(&path.join("adapter_model.safetensors"), max_bytes)?;
        Self::parse(&config, weights, shapes)
    }

    /// The same from the bytes of a GGUF file.
    pub fn parse_gguf(file: Vec<u8>, shapes: &BaseShapes) -> Result<Self> {
        let num_bytes = file.len();
        Ok(Self::new(gguf_lora::read_updates(file, shapes)?, num_bytes))
    }

    /// The same from the bytes of PEFT's files.
    pub fn parse(config: &[u8], weights: Vec<u8>, shapes: &BaseShapes) -> Result<Self> {
        let config = std::str::from_utf8(config).map_err(|_| malformed!("adapter_config.json is not UTF-8"))?;
        let config = PeftConfig::parse(config)?;
        let num_bytes = weights.len();
        let mut updates = BTreeMap::new();
        for (place, halves) in read_halves(weights, shapes)? {
            let name = place.1.full_name(place.0);
            let (a, b) = join(place, halves, Some(config.rank(&name)), shapes)?;
            updates.insert(place, Update::new(a, b, config.scaling(&name))?);
        }
        config.check_tying(updates.keys().any(|(_, module)| matches!(module, Module::Embedding | Module::Head)))?;
        if updates.is_empty() {
            return Err(malformed!("adapter_model.safetensors has no lora_A and lora_B of any module"));
        }
        Ok(Self::new(updates, num_bytes))
    }

    fn new(updates: BTreeMap<Place, Update>, num_bytes: usize) -> Self {
        Self { digest: digest(&updates), updates, num_bytes }
    }

    /// Its identity.
    pub fn digest(&self) -> AdapterDigest {
        self.digest
    }

    /// The update of a module, if the adapter has one.
    pub fn update(&self, layer: usize, module: Module) -> Option<&Update> {
        self.updates.get(&(layer, module))
    }

    /// Bytes of its weights.
    pub fn num_bytes(&self) -> usize {
        self.num_bytes
    }

    /// The largest rank of its updates.
    pub fn max_rank(&self) -> usize {
        self.updates.values().map(|update| update.a.rows()).max().unwrap_or(0)
    }
}

fn read_file(path: &Path, max_bytes: u64) -> Result<Vec<u8>> {
    let error = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::NotFound => Error::NotFound(format!("there is no file {}", path.display())),
        _ => Error::io("read", path, error),
    };
    let found = fs::metadata(path).map_err(error)?;
    if !found.is_file() {
        return Err(malformed!("{} is not a plain file", path.display()));
    }
    if found.len() > max_bytes {
        let bytes = found.len();
        return Err(malformed!("{} has {bytes} bytes, more than the {max_bytes} allowed", path.display()));
    }
    let mut bytes = Vec::with_capacity(found.len() as usize);
    // It may grow meanwhile.
    File::open(path).and_then(|file| file.take(max_bytes).read_to_end(&mut bytes)).map_err(error)?;
    Ok(bytes)
}

/// All tensors of a file, by module.
fn read_halves(bytes: Vec<u8>, shapes: &BaseShapes) -> Result<BTreeMap<Place, Halves>> {
    let header_bytes = bytes.first_chunk().map(|length| u64::from_le_bytes(*length));
    if let Some(length) = header_bytes.filter(|length| *length > MAX_HEADER_BYTES) {
        return Err(malformed!("the header of adapter_model.safetensors claims {length} bytes"));
    }
    let (header_bytes, metadata) = SafeTensors::read_metadata(&bytes)
        .map_err(|error| malformed!("adapter_model.safetensors is not a safetensors file: {error}"))?;
    let source: SharedBytes = Arc::new(bytes);
    let mut found: BTreeMap<Place, Halves> = BTreeMap::new();
    for (name, info) in metadata.tensors() {
        if is_base_layer(&name, info, shapes)? {
            continue;
        }
        let (place, half) = parse_name(&name)?;
        let tensor = host_tensor(&name, info, &source, header_bytes + 8)?;
        found.entry(place).or_default().insert(half, tensor)?;
    }
    Ok(found)
}

/// Whether a tensor is the base's embedding or output projection, which PEFT writes beside updates of these. It was frozen
/// while the adapter was trained; only its shape says whether the vocabulary was another one.
fn is_base_layer(name: &str, info: &TensorInfo, shapes: &BaseShapes) -> Result<bool> {
    let inner = name.strip_prefix("base_model.model.").unwrap_or(name);
    if !matches!(inner, "model.embed_tokens.base_layer.weight" | "lm_head.base_layer.weight") {
        return Ok(false);
    }
    match info.shape == [shapes.vocab_size, shapes.hidden_size] {
        true => Ok(true),
        false => Err(malformed!(
            "{name} is {:?}, in the model [{}, {}]: the adapter was made for another vocabulary",
            info.shape,
            shapes.vocab_size,
            shapes.hidden_size
        )),
    }
}

/// `base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight`, with or without the first two and with or without
/// the adapter's name before `weight`; `base_model.model.model.embed_tokens.lora_embedding_A`, which is no module's weight.
fn parse_name(name: &str) -> Result<(Place, Half)> {
    let inner = name.strip_prefix("base_model.model.").unwrap_or(name);
    for (marker, half) in [(".lora_embedding_A", Half::A), (".lora_embedding_B", Half::B)] {
        if matches!(inner.split_once(marker), Some(("model.embed_tokens", "" | ".default"))) {
            return Ok(((0, Module::Embedding), half));
        }
    }
    for (marker, half) in [(".lora_A.", Half::A), (".lora_B.", Half::B)] {
        let Some((module, last)) = inner.split_once(marker) else { continue };
        let Some(place) = parse_module(module).filter(|_| matches!(last, "weight" | "default.weight")) else {
            continue;
        };
        return Ok((place, half));
    }
    let advice = match () {
        () if name.contains("lora_magnitude_vector") => "DoRA adapters are not supported",
        () if name.ends_with("bias") => "biases are not supported",
        () => "updates of q, k, v, o, gate, up and down projections, of embed_tokens and of lm_head are",
    };
    Err(unsupported!("the adapter has a tensor {name:?}; {advice}"))
}

fn parse_module(name: &str) -> Option<Place> {
    if name == "lm_head" {
        return Some((0, Module::Head));
    }
    let (layer, module) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let is_plain = layer.bytes().all(|byte| byte.is_ascii_digit()) && (layer == "0" || !layer.starts_with('0'));
    Some((layer.parse().ok().filter(|_| is_plain)?, Module::from_name(module)?))
}

fn host_tensor(name: &str, info: &TensorInfo, source: &SharedBytes, data_start: usize) -> Result<HostTensor> {
    let dtype = match info.dtype {
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        other => return Err(unsupported!("tensor {name:?} is {other:?}; F32, F16 and BF16 are supported")),
    };
    let [rows, columns] = info.shape[..] else {
        return Err(malformed!("tensor {name:?} has shape {:?}, wanted two extents", info.shape));
    };
    let range = data_start + info.data_offsets.0..data_start + info.data_offsets.1;
    let tensor = HostTensor::new(name, source.clone(), range, dtype, rows, columns)?;
    expect_finite(&tensor)?;
    Ok(tensor)
}

/// An error when a number of a tensor in f32, f16 or bf16 is none.
pub(super) fn expect_finite(tensor: &HostTensor) -> Result<()> {
    match is_finite(tensor) {
        true => Ok(()),
        false => Err(malformed!("tensor {:?} holds NaN or infinity", tensor.name())),
    }
}

/// Whether no exponent is all ones.
fn is_finite(tensor: &HostTensor) -> bool {
    let halves = |exponent: u16| {
        let mut words = tensor.bytes().chunks_exact(2).map(|word| u16::from_le_bytes([word[0], word[1]]));
        words.all(|word| word & exponent != exponent)
    };
    match tensor.dtype() {
        DType::BF16 => halves(0x7f80),
        DType::F16 => halves(0x7c00),
        _ => {
            let mut words = tensor.bytes().chunks_exact(4);
            words.all(|word| f32::from_le_bytes([word[0], word[1], word[2], word[3]]).is_finite())
        }
    }
}

/// The halves of one module, after a look at each other, at the rank that is `said` elsewhere, and at the model.
pub(super) fn join(
    place: Place,
    halves: Halves,
    said: Option<usize>,
    shapes: &BaseShapes,
) -> Result<(HostTensor, HostTensor)> {
    let (layer, module) = place;
    let name = place.1.full_name(place.0);
    if layer >= shapes.num_layers {
        return Err(malformed!("the adapter changes {name}, the model has {} layers", shapes.num_layers));
    }
    let (a, b) = match halves {
        Halves { a: Some(a), b: Some(b) } => (a, b),
        Halves { a: Some(_), .. } => return Err(malformed!("{name} has lora_A and no lora_B")),
        Halves { .. } => return Err(malformed!("{name} has lora_B and no lora_A")),
    };
    let rank = said.unwrap_or_else(|| b.columns());
    if (a.rows(), b.columns()) != (rank, rank) {
        let (found_a, found_b) = (a.rows(), b.columns());
        return Err(malformed!("{name}: wanted rank {rank}, lora_A has {found_a} and lora_B has {found_b}"));
    }
    if rank == 0 || rank > MAX_RANK {
        return Err(unsupported!("{name} has rank {rank}; 1 to {MAX_RANK} are supported"));
    }
    let (inputs, outputs) = (shapes.inputs(module), shapes.outputs(module));
    if (a.columns(), b.rows()) != (inputs, outputs) {
        let (found_inputs, found_outputs) = (a.columns(), b.rows());
        return Err(malformed!(
            "{name} is [{outputs}, {inputs}] in the model, the adapter is for [{found_outputs}, {found_inputs}]: it was \
             made for another base model"
        ));
    }
    Ok((a, b))
}

fn digest(updates: &BTreeMap<Place, Update>) -> AdapterDigest {
    let mut hasher = blake3::Hasher::new_derive_key("mneme lora adapter v1");
    for ((layer, module), update) in updates {
        let Update { a, b, scaling } = update;
        let kind = format!("{layer} {} {} {} {:08x}\n", module.name(), a.dtype(), b.dtype(), scaling.to_bits());
        hasher.update(kind.as_bytes());
        for tensor in [a, b] {
            hasher.update(&(tensor.rows() as u64).to_le_bytes());
            hasher.update(&(tensor.columns() as u64).to_le_bytes());
            hasher.update(tensor.bytes());
        }
    }
    AdapterDigest(hasher.finalize().into())
}

#[cfg(test)]
#[path = "format_tests.rs"]
mod tests;
