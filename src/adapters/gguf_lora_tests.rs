//! GGUF adapters against the same adapters as PEFT keeps them, and what is refused.

use half::{bf16, f16};
use proptest::prelude::*;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;

use super::super::format::{Adapter, MAX_RANK};
use super::*;
use crate::Error;
use crate::gguf::writer::Writer;

const LLAMA: GgufConventions = GgufConventions { architecture: "llama", interleaved_heads: Some([4, 2]) };
const SHAPES: BaseShapes = BaseShapes {
    num_layers: 2,
    hidden_size: 32,
    intermediate_size: 64,
    q_size: 32,
    kv_size: 16,
    vocab_size: 96,
    gguf: LLAMA,
};

/// How a test stores a tensor.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Storage {
    F32,
    F16,
    Bf16,
    /// Every block has this scale, so numbers are whole multiples of it.
    Q8,
}

const SCALE: f32 = 0.125;

impl Storage {
    fn code(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Bf16 => 30,
            Self::Q8 => 8,
        }
    }

    fn encode(self, numbers: &[f32]) -> Vec<u8> {
        let block = |block: &[f32]| {
            let codes = block.iter().map(|number| (number / SCALE) as i8 as u8);
            f16::from_f32(SCALE).to_le_bytes().into_iter().chain(codes).collect::<Vec<_>>()
        };
        match self {
            Self::F32 => numbers.iter().flat_map(|number| number.to_le_bytes()).collect(),
            Self::F16 => numbers.iter().flat_map(|number| f16::from_f32(*number).to_le_bytes()).collect(),
            Self::Bf16 => numbers.iter().flat_map(|number| bf16::from_f32(*number).to_le_bytes()).collect(),
            Self::Q8 => numbers.chunks_exact(32).flat_map(block).collect(),
        }
    }

    fn peft(self) -> Dtype {
        match self {
            Self::F32 | Self::Q8 => Dtype::F32,
            Self::F16 => Dtype::F16,
            Self::Bf16 => Dtype::BF16,
        }
    }
}

/// A factor: its numbers in the model's order.
#[derive(Clone)]
struct Factor {
    name: String,
    rows: usize,
    columns: usize,
    numbers: Vec<f32>,
}

/// Every row another one.
fn factor(name: String, rows: usize, columns: usize) -> Factor {
    let number = |at: usize| ((at * 7 + at / columns * 11) % 200) as f32 * SCALE - 12.0;
    Factor { name, rows, columns, numbers: (0..rows * columns).map(number).collect() }
}

/// A row for each token.
fn by_token(a: &Factor) -> Factor {
    let number = |at: usize| a.numbers[at % a.rows * a.columns + at / a.rows];
    let numbers = (0..a.numbers.len()).map(number).collect();
    Factor { name: a.name.clone(), rows: a.columns, columns: a.rows, numbers }
}

/// As llama.cpp's converter has them: of each head the halves' rows in turn.
fn interleaved(factor: &Factor, num_heads: usize) -> Vec<f32> {
    let half = factor.rows / num_heads / 2;
    let rows = (0..num_heads)
        .flat_map(|head| (0..half).flat_map(move |pair| [0, 1].map(|which| head * 2 * half + which * half + pair)));
    rows.flat_map(|row| factor.numbers[row * factor.columns..(row + 1) * factor.columns].to_vec()).collect()
}

fn places() -> Vec<Place> {
    SHAPES.places().collect()
}

fn factors(module: Module, rank: usize) -> [Factor; 2] {
    let names = if module == Module::Embedding { ["_embedding_A", "_embedding_B"] } else { ["_A.weight", "_B.weight"] };
    let [a, b] = names.map(|part| format!("lora{part}"));
    [factor(a, rank, SHAPES.inputs(module)), factor(b, SHAPES.outputs(module), rank)]
}

fn head(architecture: &str, alpha: f32) -> Writer {
    Writer::new()
        .string("general.type", "adapter")
        .string("general.architecture", architecture)
        .string("adapter.type", "lora")
        .entry(ALPHA, 6, &alpha.to_le_bytes())
}

fn with_factor(writer: Writer, name: &str, factor: &Factor, numbers: &[f32], storage: Storage) -> Writer {
    writer.tensor(name, &[factor.columns as u64, factor.rows as u64], storage.code(), &storage.encode(numbers))
}

/// All modules as llama.cpp's converter would write them.
fn gguf_file(base: &GgufConventions, rank: usize, alpha: f32, storage: Storage) -> Vec<u8> {
    let mut writer = head(base.architecture, alpha);
    for (layer, module) in places() {
        let [a, b] = factors(module, rank);
        let is_whole = matches!(module, Module::Embedding | Module::Head);
        let prefix = if is_whole { String::new() } else { format!("blk.{layer}.") };
        let name = format!("{prefix}{}.weight", module.gguf_name());
        let a = if module == Module::Embedding { by_token(&a) } else { a };
        let stored = match (module, base.interleaved_heads) {
            (Module::Q, Some([num_heads, _])) | (Module::K, Some([_, num_heads])) => interleaved(&b, num_heads),
            _ => b.numbers.clone(),
        };
        writer = with_factor(writer, &format!("{name}.lora_a"), &a, &a.numbers, storage);
        writer = with_factor(writer, &format!("{name}.lora_b"), &b, &stored, storage);
    }
    writer.finish()
}

/// The same as PEFT would.
fn peft(rank: usize, alpha: f32, storage: Storage) -> Adapter {
    let float = if storage == Storage::Q8 { Storage::F32 } else { storage };
    let mut tensors = Vec::new();
    for (layer, module) in places() {
        for factor in factors(module, rank) {
            let name = format!("base_model.model.{}.{}", module.full_name(layer), factor.name);
            tensors.push((name, factor.rows, factor.columns, float.encode(&factor.numbers)));
        }
    }
    let views = tensors.iter().map(|(name, rows, columns, bytes)| {
        (name.clone(), TensorView::new(storage.peft(), vec![*rows, *columns], bytes).unwrap())
    });
    let weights = safetensors::serialize(views, None).unwrap();
    let config = json!({"peft_type": "LORA", "r": rank, "lora_alpha": alpha});
    Adapter::parse(config.to_string().as_bytes(), weights, &SHAPES).unwrap()
}

fn refusal(file: Vec<u8>) -> String {
    match Adapter::parse_gguf(file, &SHAPES) {
        Ok(_) => panic!("it was taken"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn the_same_numbers_are_the_same_adapter_in_either_format() {
    for storage in [Storage::F32, Storage::F16, Storage::Bf16, Storage::Q8] {
        let (rank, alpha) = (32, 12.0);
        let read = Adapter::parse_gguf(gguf_file(&LLAMA, rank, alpha, storage), &SHAPES).unwrap();
        let wanted = peft(rank, alpha, storage);
        assert_eq!(read.digest(), wanted.digest(), "{storage:?}");
        assert_eq!((read.max_rank(), read.update(1, Module::K).unwrap().scaling), (rank, 0.375));
        for (layer, module) in places() {
            let (found, wanted) = (read.update(layer, module).unwrap(), wanted.update(layer, module).unwrap());
            assert!(found.a.bytes() == wanted.a.bytes() && found.b.bytes() == wanted.b.bytes(), "{layer} {module:?}");
        }
    }
}

/// Other architectures keep their rows, and another order of rows is another adapter.
#[test]
fn only_files_of_the_llama_architecture_have_rows_in_another_order() {
    let qwen = GgufConventions { architecture: "qwen2", interleaved_heads: None };
    let shapes = BaseShapes { gguf: qwen, ..SHAPES };
    let read = Adapter::parse_gguf(gguf_file(&qwen, 4, 8.0, Storage::Bf16), &shapes).unwrap();
    assert_eq!(read.digest(), peft(4, 8.0, Storage::Bf16).digest());
    let unturned = gguf_file(&GgufConventions { interleaved_heads: None, ..LLAMA }, 4, 8.0, Storage::Bf16);
    assert_ne!(Adapter::parse_gguf(unturned, &SHAPES).unwrap().digest(), read.digest());
}

#[test]
fn without_an_alpha_products_are_added_as_they_are() {
    let scaling = |file| Adapter::parse_gguf(file, &SHAPES).unwrap().update(0, Module::Q).unwrap().scaling;
    assert_eq!(scaling(gguf_file(&LLAMA, 4, 0.0, Storage::F32)), 1.0);
    assert_eq!(scaling(gguf_file(&LLAMA, 4, -2.0, Storage::F32)), -0.5);
    let mut writer = Writer::new().string("general.type", "adapter").string("general.architecture", "llama");
    writer = writer.string("adapter.type", "lora");
    let [a, b] = factors(Module::Q, 4);
    writer = with_factor(writer, "blk.0.attn_q.weight.lora_a", &a, &a.numbers, Storage::F32);
    assert_eq!(scaling(with_factor(writer, "blk.0.attn_q.weight.lora_b", &b, &b.numbers, Storage::F32).finish()), 1.0);
}

#[test]
fn other_kinds_of_files_are_refused_by_what_they_say() {
    let [a, b] = factors(Module::V, 4);
    let whole = |writer: Writer| {
        let writer = with_factor(writer, "blk.0.attn_v.weight.lora_a", &a, &a.numbers, Storage::F32);
        with_factor(writer, "blk.0.attn_v.weight.lora_b", &b, &b.numbers, Storage::F32).finish()
    };
    assert!(Adapter::parse_gguf(whole(head("llama", 8.0)), &SHAPES).is_ok());
    let named = |kind: &str, method: &str| {
        let writer = Writer::new().string("general.architecture", "llama");
        whole(writer.string("general.type", kind).string("adapter.type", method))
    };
    let tokens = [&4u32.to_le_bytes()[..], &1u64.to_le_bytes(), &7u32.to_le_bytes()].concat();
    for (file, words) in [
        (whole(head("gemma3", 8.0)), &["gemma3", "llama", "another base model"][..]),
        (whole(head("llama", f32::NAN)), &["factor"]),
        (whole(Writer::new().string("general.architecture", "llama")), &["general.type", "no adapter"]),
        (named("model", "lora"), &["\"model\"", "no adapter"]),
        (named("adapter", "control_vector"), &["control_vector"]),
        (whole(head("llama", 8.0).entry("adapter.alora.invocation_tokens", 9, &tokens)), &["alora"]),
        (head("llama", 8.0).finish(), &["no lora_a"]),
        (whole(Writer::new().string("general.type", "adapter").string("adapter.type", "lora")), &["architecture"]),
    ] {
        let message = refusal(file);
        assert!(words.iter().all(|word| message.contains(word)), "{message}, wanted {words:?}");
    }
}

#[test]
fn tensors_that_do_not_belong_there_are_refused_by_name() {
    let sized = |name: &str, rows: usize, columns: usize| (name.to_owned(), factor(String::new(), rows, columns));
    let (a, b) = (sized("blk.0.attn_q.weight.lora_a", 4, 32), sized("blk.0.attn_q.weight.lora_b", 32, 4));
    let large = MAX_RANK + 1;
    let cases = [
        (vec![a.clone()], "lora_A and no lora_B"),
        (vec![b.clone()], "lora_B and no lora_A"),
        (vec![sized(&a.0, 5, 32), b.clone()], "lora_A has 5"),
        (vec![sized(&a.0, 4, 64), b.clone()], "another base model"),
        (vec![a.clone(), sized(&b.0, 48, 4)], "another base model"),
        (vec![sized(&a.0, large, 32), sized(&b.0, 32, large)], "512"),
        (vec![sized("blk.2.attn_q.weight.lora_a", 4, 32), sized("blk.2.attn_q.weight.lora_b", 32, 4)], "2 layers"),
        (vec![a.clone(), b.clone(), sized("blk.00.attn_q.weight.lora_a", 4, 32)], "attn_q"),
        (vec![a.clone(), b.clone(), sized("blk.0.attn_q.weight", 4, 32)], "lora_a and lora_b of"),
        (vec![a.clone(), b.clone(), sized("blk.0.attn_qkv.weight.lora_a", 4, 32)], "lora_a and lora_b of"),
        (vec![a.clone(), b.clone(), sized("blk.0.attn_q.bias.lora_a", 4, 32)], "biases"),
        (vec![a.clone(), b.clone(), sized("blk.0.attn_norm.weight", 1, 32)], "norms"),
        (vec![a.clone(), b.clone(), sized("token_embd.weight.lora_a", 32, 4)], "for each of 96 tokens"),
        (vec![a.clone(), b.clone(), sized("token_embd.weight.lora_a", 96, large)], "at most 512"),
        (vec![a, b, sized("output.weight.lora_a", 4, 32)], "lora_A and no lora_B"),
    ];
    for (tensors, word) in cases {
        let writer = tensors.iter().fold(head("llama", 8.0), |writer, (name, factor)| {
            with_factor(writer, name, factor, &factor.numbers, Storage::F32)
        });
        let message = refusal(writer.finish());
        assert!(message.contains(word), "{message}, wanted {word}");
    }
    let vector = head("llama", 8.0).tensor("blk.0.attn_q.weight.lora_a", &[128], 0, &[0; 512]);
    assert!(refusal(vector.finish()).contains("two extents"));
    let deep = head("llama", 8.0).tensor("blk.0.attn_q.weight.lora_a", &[32, 2, 2], 0, &[0; 512]);
    assert!(refusal(deep.finish()).contains("two extents"));
    let quantised = head("llama", 8.0).tensor("blk.0.attn_q.weight.lora_a", &[32, 4], 2, &[0; 72]);
    assert!(refusal(quantised.finish()).contains("q8_0"));
}

#[test]
fn nan_and_infinity_are_refused_in_every_type() {
    for (code, row, bad) in [
        (0, vec![0u8; 128], f32::NAN.to_le_bytes().to_vec()),
        (0, vec![0; 128], f32::INFINITY.to_le_bytes().to_vec()),
        (1, vec![0; 64], f16::NAN.to_le_bytes().to_vec()),
        (30, vec![0; 64], bf16::NEG_INFINITY.to_le_bytes().to_vec()),
        (8, vec![1; 34], f16::NAN.to_le_bytes().to_vec()),
        (8, vec![1; 34], f16::INFINITY.to_le_bytes().to_vec()),
    ] {
        let mut bytes = row.repeat(4);
        bytes[3 * row.len()..3 * row.len() + bad.len()].copy_from_slice(&bad);
        let b = factor(String::new(), 32, 4);
        let writer = head("llama", 8.0).tensor("blk.1.attn_q.weight.lora_a", &[32, 4], code, &bytes);
        let file = with_factor(writer, "blk.1.attn_q.weight.lora_b", &b, &b.numbers, Storage::F32).finish();
        assert!(refusal(file).contains("NaN or infinity"), "type {code}");
    }
}

#[test]
fn files_are_read_by_their_path_whole_or_not_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("style.gguf");
    let read = |max_bytes| Adapter::read(&path, &SHAPES, max_bytes).map(|adapter| adapter.digest());
    assert!(matches!(read(1 << 20), Err(Error::NotFound(_))));
    let file = gguf_file(&LLAMA, 4, 8.0, Storage::F16);
    std::fs::write(&path, &file).unwrap();
    assert_eq!(read(file.len() as u64).unwrap(), peft(4, 8.0, Storage::F16).digest());
    assert!(read(file.len() as u64 - 1).unwrap_err().to_string().contains("more than"));
    std::fs::write(&path, "not an adapter").unwrap();
    assert!(read(1 << 20).unwrap_err().to_string().contains("not a GGUF file"));
}

#[test]
fn files_that_are_cut_short_or_count_too_much_are_refused() {
    let whole = gguf_file(&LLAMA, 4, 8.0, Storage::F32);
    for length in (0..whole.len()).step_by(97) {
        assert!(Adapter::parse_gguf(whole[..length].to_vec(), &SHAPES).is_err(), "cut to {length}");
    }
    for (place, count) in [(8, u64::MAX), (8, 1 << 40), (8, 29), (16, u64::MAX), (16, 3)] {
        let mut file = whole.clone();
        file[place..place + 8].copy_from_slice(&count.to_le_bytes());
        assert!(Adapter::parse_gguf(file, &SHAPES).is_err(), "{count} at {place}");
    }
}

proptest! {
    #[test]
    fn damaged_files_never_panic(
        edits in prop::collection::vec((0usize..4096, any::<u8>()), 1..8),
    ) {
        let mut file = gguf_file(&LLAMA, 4, 8.0, Storage::F32);
        for (place, value) in edits {
            file[place] = value;
        }
        let _ = Adapter::parse_gguf(file, &SHAPES);
    }
}
