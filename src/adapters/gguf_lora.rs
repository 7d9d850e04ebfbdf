//! An adapter in one GGUF file, as llama.cpp's converter writes it: `blk.N.<module>.weight.lora_a` and `.lora_b`.
//!
//! What the file changes on the way from PEFT is undone, so that the same numbers are the same adapter: rows of q and k in
//! another order, names, quantised numbers. The converter knows one factor for all modules (`adapter.lora.alpha`) and
//! neither rsLoRA nor patterns; what the file says is what holds.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::base::{BaseShapes, GgufConventions, Module};
use super::format::{Half, Halves, MAX_RANK, Place, Update, expect_finite, join};
use crate::backend::{DType, HostTensor, RowOrder, SharedBytes, dequantize_row};
use crate::gguf::Gguf;
use crate::{Result, malformed, unsupported};

const ALPHA: &str = "adapter.lora.alpha";

/// The updates in the bytes of a file.
///
/// # Errors
/// `Format` when it is damaged or was made for another model, `Unsupported` when it holds something other than a plain
/// LoRA.
pub(super) fn read_updates(file: Vec<u8>, shapes: &BaseShapes) -> Result<BTreeMap<Place, Update>> {
    let gguf = Gguf::parse(Arc::new(file))?;
    check_kind(&gguf, &shapes.gguf)?;
    let alpha = gguf.find_f32(ALPHA)?.unwrap_or(0.0);
    let mut updates = BTreeMap::new();
    for (place, halves) in read_halves(&gguf, shapes)? {
        let (a, b) = join(place, halves, None, shapes)?;
        let (a, b) = (plain(&a)?, plain(&in_rows_of(place.1, b, &shapes.gguf)?)?);
        let scaling = scaling(alpha, b.columns());
        updates.insert(place, Update::new(a, b, scaling)?);
    }
    match updates.is_empty() {
        true => Err(malformed!("the GGUF file has no lora_a and lora_b of any module")),
        false => Ok(updates),
    }
}

/// As llama.cpp has it: without an alpha the product is added as it is.
fn scaling(alpha: f32, rank: usize) -> f32 {
    if alpha == 0.0 { 1.0 } else { (f64::from(alpha) / rank as f64) as f32 }
}

/// Whether it is an adapter, and for such a model.
fn check_kind(gguf: &Gguf, base: &GgufConventions) -> Result<()> {
    let kind = gguf.find_str("general.type")?;
    if kind.as_deref() != Some("adapter") {
        let found = kind.as_deref().unwrap_or("nothing");
        return Err(malformed!("the GGUF file's general.type is {found:?}, wanted \"adapter\": it is no adapter"));
    }
    let method = gguf.get_str("adapter.type")?;
    if method != "lora" {
        return Err(unsupported!("the GGUF file's adapter.type is {method:?}; only \"lora\" is supported"));
    }
    if gguf.contains_key("adapter.alora.invocation_tokens") {
        return Err(unsupported!("the adapter uses adapter.alora.invocation_tokens, which is not supported"));
    }
    let (found, wanted) = (gguf.get_str("general.architecture")?, base.architecture);
    match found == wanted {
        true => Ok(()),
        false => Err(malformed!(
            "the GGUF file's general.architecture is {found:?}, the model's {wanted:?}: the adapter was made for another \
             base model"
        )),
    }
}

fn read_halves(gguf: &Gguf, shapes: &BaseShapes) -> Result<BTreeMap<Place, Halves>> {
    let mut found: BTreeMap<Place, Halves> = BTreeMap::new();
    for (name, info) in gguf.tensors() {
        let (place, half) = parse_name(name)?;
        if info.dims.len() != 2 {
            return Err(malformed!("tensor {name:?} has shape {:?}, wanted two extents", info.dims));
        }
        if !matches!(info.dtype, DType::F32 | DType::F16 | DType::BF16 | DType::Q8_0) {
            let found = info.dtype;
            return Err(unsupported!("tensor {name:?} is {found}; f32, f16, bf16 and q8_0 are supported"));
        }
        let tensor = gguf.tensor(name)?;
        let is_lookup = place.1 == Module::Embedding && half == Half::A;
        let tensor = if is_lookup { transposed(&tensor, shapes.vocab_size)? } else { tensor };
        found.entry(place).or_default().insert(half, tensor)?;
    }
    Ok(found)
}

fn parse_name(name: &str) -> Result<(Place, Half)> {
    for (ending, half) in [(".weight.lora_a", Half::A), (".weight.lora_b", Half::B)] {
        if let Some(place) = name.strip_suffix(ending).and_then(parse_module) {
            return Ok((place, half));
        }
    }
    let advice = match () {
        () if name.contains("_norm.") => "norms are not supported",
        () if name.contains(".bias") => "biases are not supported",
        () => {
            "lora_a and lora_b of attn_q, attn_k, attn_v, attn_output, ffn_gate, ffn_up, ffn_down, token_embd and output are"
        }
    };
    Err(unsupported!("the adapter has a tensor {name:?}; {advice}"))
}

fn parse_module(name: &str) -> Option<Place> {
    if let Some(whole) = [Module::Embedding, Module::Head].into_iter().find(|module| module.gguf_name() == name) {
        return Some((0, whole));
    }
    let (layer, module) = name.strip_prefix("blk.")?.split_once('.')?;
    let is_plain = layer.bytes().all(|byte| byte.is_ascii_digit()) && (layer == "0" || !layer.starts_with('0'));
    Some((layer.parse().ok().filter(|_| is_plain)?, Module::from_gguf_name(module)?))
}

/// The embedding's `A`, of which files have a row for each of the `vocab_size` tokens, as `[rank, vocab_size]`.
fn transposed(tensor: &HostTensor, vocab_size: usize) -> Result<HostTensor> {
    let (name, rows, rank) = (tensor.name(), tensor.rows(), tensor.columns());
    if rows != vocab_size || rank > MAX_RANK {
        return Err(malformed!(
            "tensor {name:?} is [{rows}, {rank}], wanted a row of at most {MAX_RANK} numbers for each of {vocab_size} tokens"
        ));
    }
    let tensor = plain(tensor)?;
    let number_bytes = tensor.bytes().len() / (rows * rank);
    let mut bytes = vec![0; tensor.bytes().len()];
    for (at, number) in tensor.bytes().chunks_exact(number_bytes).enumerate() {
        let (token, row) = (at / rank, at % rank);
        bytes[(row * rows + token) * number_bytes..][..number_bytes].copy_from_slice(number);
    }
    let range = 0..bytes.len();
    HostTensor::new(name, Arc::new(bytes), range, tensor.dtype(), rank, rows)
}

/// `B` with its rows as they lie in the file known.
fn in_rows_of(module: Module, b: HostTensor, base: &GgufConventions) -> Result<HostTensor> {
    let num_heads = match (module, base.interleaved_heads) {
        (Module::Q, Some([num_heads, _])) | (Module::K, Some([_, num_heads])) => num_heads,
        _ => return Ok(b),
    };
    match b.rows().is_multiple_of(2 * num_heads) {
        true => Ok(b.with_row_order(RowOrder::InterleavedHalves { num_heads })),
        false => Err(malformed!("{} has {} rows, which are no pairs of {num_heads} heads", b.name(), b.rows())),
    }
}

/// The same numbers row by row in the model's order, in a type that PEFT has, none of them NaN or infinite.
fn plain(tensor: &HostTensor) -> Result<HostTensor> {
    let (rows, columns) = (tensor.rows(), tensor.columns());
    let (mut bytes, mut numbers) = (Vec::new(), vec![0.0; columns]);
    let is_quantised = tensor.dtype() == DType::Q8_0;
    for row in 0..rows {
        match is_quantised {
            false => bytes.extend_from_slice(tensor.row_bytes(row)),
            true => {
                dequantize_row(tensor.dtype(), tensor.row_bytes(row), &mut numbers);
                bytes.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
            }
        }
    }
    let dtype = if is_quantised { DType::F32 } else { tensor.dtype() };
    let (range, source): (_, SharedBytes) = (0..bytes.len(), Arc::new(bytes));
    let tensor = HostTensor::new(tensor.name(), source, range, dtype, rows, columns)?;
    expect_finite(&tensor)?;
    Ok(tensor)
}

#[cfg(test)]
#[path = "gguf_lora_tests.rs"]
mod tests;
