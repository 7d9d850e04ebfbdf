//! GGUF parsing against another reader, and against damaged files.

use std::sync::Arc;

use candle_core::quantized::gguf_file::{Content, Value};
use proptest::prelude::*;

use super::writer::Writer;
use super::*;
use crate::backend::DType;

fn sample() -> Vec<u8> {
    let bytes: Vec<u8> = (0..=255).cycle().take(4 * 3 * 2).collect();
    Writer::new()
        .string("general.architecture", "llama")
        .entry("llama.block_count", 4, &30u32.to_le_bytes())
        .entry("wide", 10, &7u64.to_le_bytes())
        .entry("negative", 5, &(-4i32).to_le_bytes())
        .entry("eps", 6, &1e-5f32.to_le_bytes())
        .entry("flag", 7, &[1])
        .strings("tokens", &["a", "", "\u{e9}"])
        .floats("scores", &[0.5, -1.0])
        .tensor("matrix", &[3, 2], 0, &bytes)
        .tensor("vector", &[32], 8, &[7; 34])
        .finish()
}

fn parse(bytes: Vec<u8>) -> Result<Gguf> {
    Gguf::parse(Arc::new(bytes))
}

fn message(bytes: Vec<u8>) -> String {
    parse(bytes).err().expect("the file is refused").to_string()
}

#[test]
fn agrees_with_candle_on_a_small_file() {
    let bytes = sample();
    let ours = parse(bytes.clone()).unwrap();
    let theirs = Content::read(&mut std::io::Cursor::new(&bytes)).unwrap();
    assert_eq!(ours.keys().count(), theirs.metadata.len());
    for (key, value) in &theirs.metadata {
        match value {
            Value::String(text) => assert_eq!(&ours.get_str(key).unwrap(), text),
            Value::U32(value) => assert_eq!(ours.get_u32(key).unwrap(), *value),
            Value::U64(value) => assert_eq!(ours.get_u64(key).unwrap(), *value),
            Value::I32(value) => assert_eq!(ours.get_i32(key).unwrap(), *value),
            Value::F32(value) => assert_eq!(ours.get_f32(key).unwrap(), *value),
            Value::Bool(value) => assert_eq!(ours.get_bool(key).unwrap(), *value),
            Value::Array(values) if key == "tokens" => {
                let wanted: Vec<_> = values.iter().map(|v| v.to_string().unwrap().clone()).collect();
                assert_eq!(ours.get_str_array(key).unwrap(), wanted);
            }
            Value::Array(values) => {
                let wanted: Vec<_> = values.iter().map(|v| v.to_f32().unwrap()).collect();
                assert_eq!(ours.get_f32_array(key).unwrap(), wanted);
            }
            other => panic!("the sample has no {other:?}"),
        }
    }
    assert_eq!(ours.tensors().count(), theirs.tensor_infos.len());
    for (name, info) in &theirs.tensor_infos {
        let tensor = ours.tensor(name).unwrap();
        let start = (theirs.tensor_data_offset + info.offset) as usize;
        assert_eq!(tensor.bytes(), &bytes[start..start + tensor.bytes().len()]);
        assert_eq!(tensor.rows() * tensor.columns(), info.shape.elem_count());
    }
}

#[test]
fn dims_are_reversed_and_vectors_have_one_row() {
    let gguf = parse(sample()).unwrap();
    let matrix = gguf.tensor("matrix").unwrap();
    assert_eq!((matrix.rows(), matrix.columns(), matrix.dtype()), (2, 3, DType::F32));
    let vector = gguf.tensor("vector").unwrap();
    assert_eq!((vector.rows(), vector.columns(), vector.dtype()), (1, 32, DType::Q8_0));
    assert_eq!(vector.bytes(), &[7; 34]);
}

#[test]
fn getters_name_key_wanted_and_found() {
    let gguf = parse(sample()).unwrap();
    let missing = gguf.get_u32("llama.nothing").unwrap_err().to_string();
    assert!(missing.contains("llama.nothing") && missing.contains("32-bit unsigned"), "{missing}");
    let wrong = gguf.get_u32("general.architecture").unwrap_err().to_string();
    assert!(wrong.contains("general.architecture") && wrong.contains("String"), "{wrong}");
    let negative = gguf.get_u32("negative").unwrap_err().to_string();
    assert!(negative.contains("negative") && negative.contains("I32"), "{negative}");
    let array = gguf.get_str("tokens").unwrap_err().to_string();
    assert!(array.contains("array of 3 String"), "{array}");
    let scalar = gguf.get_f32_array("eps").unwrap_err().to_string();
    assert!(scalar.contains("an array of a floating-point number") && scalar.contains("F32"), "{scalar}");
    assert_eq!(gguf.find_u32("llama.nothing").unwrap(), None);
    assert!(gguf.find_bool("eps").is_err());
    assert_eq!(gguf.get_u32("wide").unwrap(), 7);
}

#[test]
fn every_truncation_is_refused() {
    let bytes = sample();
    for length in 0..bytes.len() {
        assert!(parse(bytes[..length].to_vec()).is_err(), "cut to {length} of {} bytes", bytes.len());
    }
}

#[test]
fn bad_magic_and_versions_are_named() {
    let mut bytes = sample();
    bytes[4..8].copy_from_slice(&1u32.to_le_bytes());
    assert!(message(bytes.clone()).contains("version 1"));
    bytes[4..8].copy_from_slice(&3u32.to_be_bytes());
    assert!(message(bytes.clone()).contains("big-endian"));
    bytes[0] = b'X';
    assert!(message(bytes).contains("not a GGUF file"));
}

#[test]
fn huge_counts_are_refused() {
    for place in [8, 16] {
        for count in [u64::MAX, 1 << 40, 1 << 20] {
            let mut bytes = sample();
            bytes[place..place + 8].copy_from_slice(&count.to_le_bytes());
            assert!(parse(bytes).is_err(), "count {count} at {place}");
        }
    }
    let mut payload = 8u32.to_le_bytes().to_vec();
    payload.extend(u64::MAX.to_le_bytes());
    assert!(message(Writer::new().entry("tokens", 9, &payload).finish()).contains("tokens"));
    let mut payload = 10u32.to_le_bytes().to_vec();
    payload.extend((u64::MAX / 8 + 1).to_le_bytes());
    assert!(parse(Writer::new().entry("wide", 9, &payload).finish()).is_err());
}

#[test]
fn deep_nesting_is_refused() {
    let mut payload = vec![];
    for _ in 0..10_000 {
        payload.extend(9u32.to_le_bytes());
        payload.extend(1u64.to_le_bytes());
    }
    assert!(message(Writer::new().entry("deep", 9, &payload).finish()).contains("nests"));
}

#[test]
fn duplicates_are_refused() {
    let twice = Writer::new().entry("a", 7, &[1]).entry("a", 7, &[1]).finish();
    assert!(message(twice).contains("occurs twice"));
    let twice = Writer::new().tensor("t", &[1], 0, &[0; 4]).tensor("t", &[1], 0, &[0; 4]).finish();
    assert!(message(twice).contains("occurs twice"));
}

#[test]
fn bad_tensor_places_are_refused() {
    let data = |writer: Writer| {
        let mut bytes = writer.finish();
        bytes.extend([0; 256]);
        bytes
    };
    let overlap = Writer::new().info("a", &[16], 0, 0).info("b", &[16], 0, 32);
    assert!(message(data(overlap)).contains("share bytes"));
    let unaligned = Writer::new().info("a", &[1], 0, 4);
    assert!(message(data(unaligned)).contains("multiple of 32"));
    let overflow = Writer::new().info("a", &[16], 0, u64::MAX - 31);
    assert!(message(data(overflow)).contains("overflows"));
    let outside = Writer::new().info("a", &[16], 0, 1 << 20);
    assert!(message(data(outside)).contains("cut short"));
    let product = Writer::new().info("a", &[1 << 40, 1 << 40], 0, 0);
    assert!(message(data(product)).contains("overflows"));
    let ragged = Writer::new().info("a", &[33], 8, 0);
    assert!(message(data(ragged)).contains("multiple of 32 columns"));
    let empty = Writer::new().info("a", &[0], 0, 0);
    assert!(message(data(empty)).contains("dimension of 0"));
    let flat = Writer::new().info("a", &[], 0, 0);
    assert!(message(data(flat)).contains("0 dimensions"));
}

#[test]
fn unknown_tensor_types_are_unsupported() {
    let error = parse(Writer::new().tensor("blk.0.w", &[256], 10, &[0; 84]).finish()).err().unwrap();
    assert!(matches!(error, crate::Error::Unsupported(_)));
    let text = error.to_string();
    assert!(text.contains("blk.0.w") && text.contains("q2_k"), "{text}");
}

#[test]
fn bad_alignment_is_refused() {
    let zero = Writer::new().entry("general.alignment", 4, &0u32.to_le_bytes()).finish();
    assert!(message(zero).contains("power of two"));
}

/// Touches everything a parsed file offers, so that a lazy decoder cannot hide a panic.
fn exercise(gguf: &Gguf) {
    for key in gguf.keys() {
        let _ = (gguf.get_u32(key), gguf.get_i32(key), gguf.get_f32(key), gguf.get_bool(key), gguf.get_str(key));
        let _ = (gguf.get_str_array(key), gguf.get_f32_array(key), gguf.get_u64_array(key));
    }
    for (name, info) in gguf.tensors() {
        let tensor = gguf.tensor(name).expect("a tensor that parsed can be viewed");
        assert_eq!(tensor.bytes().len(), info.range.len());
    }
    let _ = gguf.vocabulary();
}

proptest! {
    #[test]
    fn mutations_never_panic(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut bytes = sample();
        for (place, value) in edits {
            let place = place.index(bytes.len());
            bytes[place] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        if let Ok(gguf) = parse(bytes) {
            exercise(&gguf);
        }
    }

    #[test]
    fn random_headers_never_panic(tail in prop::collection::vec(any::<u8>(), 0..300)) {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(tail);
        if let Ok(gguf) = parse(bytes) {
            exercise(&gguf);
        }
    }
}
