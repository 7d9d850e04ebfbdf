//! What is read from an adapter's files, and what is refused.

use half::{bf16, f16};
use serde_json::{Value, json};

use super::super::base::GgufConventions;
use super::*;

const GGUF: GgufConventions = GgufConventions { architecture: "llama", interleaved_heads: None };
const SHAPES: BaseShapes = BaseShapes {
    num_layers: 2,
    hidden_size: 8,
    intermediate_size: 12,
    q_size: 16,
    kv_size: 4,
    vocab_size: 20,
    gguf: GGUF,
};

struct Tensor {
    name: String,
    dtype: &'static str,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

fn name(layer: usize, module: &str, half: &str) -> String {
    format!("base_model.model.model.layers.{layer}.{module}.lora_{half}.weight")
}

fn tensor(name: String, rows: usize, columns: usize) -> Tensor {
    let bytes = (0..rows * columns).flat_map(|at| bf16::from_f32(at as f32 / 16.0 - 1.0).to_le_bytes()).collect();
    Tensor { name, dtype: "BF16", shape: vec![rows, columns], bytes }
}

fn pair(layer: usize, module: Module, rank: usize) -> [Tensor; 2] {
    let a = tensor(name(layer, module.name(), "A"), rank, SHAPES.inputs(module));
    [a, tensor(name(layer, module.name(), "B"), SHAPES.outputs(module), rank)]
}

fn all_modules(rank: usize) -> Vec<Tensor> {
    let places = (0..2).flat_map(|layer| Module::ALL.map(|module| (layer, module)));
    places.flat_map(|(layer, module)| pair(layer, module, rank)).collect()
}

fn file(tensors: &[Tensor]) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for tensor in tensors {
        let start = data.len();
        data.extend(&tensor.bytes);
        let facts = json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, data.len()]});
        header.insert(tensor.name.clone(), facts);
    }
    let mut text = Value::Object(header).to_string();
    text.push_str(&" ".repeat(text.len().next_multiple_of(8) - text.len()));
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes(), &data].concat()
}

fn config(changes: Value) -> Vec<u8> {
    let mut config = json!({"peft_type": "LORA", "r": 4, "lora_alpha": 6, "bias": "none", "use_dora": false,
        "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": null, "layer_replication": null});
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    config.to_string().into_bytes()
}

fn parse(changes: Value, tensors: &[Tensor]) -> Result<Adapter> {
    Adapter::parse(&config(changes), file(tensors), &SHAPES)
}

fn refusal(changes: Value, tensors: &[Tensor]) -> String {
    match parse(changes, tensors) {
        Ok(_) => panic!("it was taken"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn every_module_rank_and_factor_is_found() {
    let adapter = parse(json!({}), &all_modules(4)).unwrap();
    for layer in 0..2 {
        for module in Module::ALL {
            let update = adapter.update(layer, module).unwrap();
            assert_eq!((update.a.rows(), update.a.columns()), (4, SHAPES.inputs(module)));
            assert_eq!((update.b.rows(), update.b.columns()), (SHAPES.outputs(module), 4));
            assert_eq!(update.scaling, 1.5);
        }
    }
    assert!(adapter.update(2, Module::Q).is_none());
    assert_eq!(adapter.max_rank(), 4);
    assert_eq!(parse(json!({"use_rslora": true}), &all_modules(4)).unwrap().update(0, Module::Q).unwrap().scaling, 3.0);
}

#[test]
fn patterns_give_modules_ranks_and_factors_of_their_own() {
    let tensors: Vec<Tensor> =
        [pair(0, Module::Q, 2), pair(1, Module::Q, 2), pair(0, Module::Down, 512), pair(1, Module::Down, 4)]
            .into_iter()
            .flatten()
            .collect();
    let changes = json!({
        "rank_pattern": {"q_proj": 2, "^model.layers.0.mlp.down_proj": 512},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 20, "q_proj": 8},
    });
    let adapter = parse(changes, &tensors).unwrap();
    let scaling = |layer, module| adapter.update(layer, module).unwrap().scaling;
    assert_eq!(scaling(0, Module::Q), 4.0);
    assert_eq!(scaling(1, Module::Q), 10.0);
    assert_eq!(scaling(0, Module::Down), 6.0 / 512.0);
    assert_eq!(scaling(1, Module::Down), 1.5);
    assert!(adapter.update(0, Module::V).is_none());
    // A name that only ends like the pattern is another name.
    let other = refusal(json!({"rank_pattern": {"proj": 2}}), &pair(0, Module::Q, 2));
    assert!(other.contains("rank 4"), "{other}");
    let regex = refusal(json!({"rank_pattern": {".*q_proj": 2}}), &pair(0, Module::Q, 2));
    assert!(regex.contains("regular expression"), "{regex}");
}

fn around_layers(rank: usize) -> Vec<Tensor> {
    let prefix = "base_model.model";
    vec![
        tensor(format!("{prefix}.model.embed_tokens.lora_embedding_A"), rank, SHAPES.vocab_size),
        tensor(format!("{prefix}.model.embed_tokens.lora_embedding_B"), SHAPES.hidden_size, rank),
        tensor(format!("{prefix}.lm_head.lora_A.weight"), rank, SHAPES.hidden_size),
        tensor(format!("{prefix}.lm_head.lora_B.weight"), SHAPES.vocab_size, rank),
    ]
}

#[test]
fn embedding_and_output_projection_are_modules_too() {
    let mut tensors = around_layers(4);
    let adapter = parse(json!({"alpha_pattern": {"lm_head": 2, "embed_tokens": 20}}), &tensors).unwrap();
    let (embedding, head) = (adapter.update(0, Module::Embedding).unwrap(), adapter.update(0, Module::Head).unwrap());
    assert_eq!((embedding.a.columns(), embedding.b.rows(), embedding.scaling), (20, 8, 5.0));
    assert_eq!((head.a.columns(), head.b.rows(), head.scaling), (8, 20, 0.5));
    let digest = adapter.digest();
    // PEFT writes the base's own beside them.
    tensors.push(tensor("base_model.model.model.embed_tokens.base_layer.weight".into(), 20, 8));
    tensors.push(tensor("base_model.model.lm_head.base_layer.weight".into(), 20, 8));
    let changes = json!({"alpha_pattern": {"lm_head": 2, "embed_tokens": 20}, "ensure_weight_tying": false});
    assert_eq!(parse(changes, &tensors).unwrap().digest(), digest);
    tensors[5] = tensor("base_model.model.lm_head.base_layer.weight".into(), 21, 8);
    assert!(refusal(json!({}), &tensors).contains("another vocabulary"));
    assert!(refusal(json!({"ensure_weight_tying": true}), &around_layers(4)).contains("ensure_weight_tying"));
    assert!(parse(json!({"ensure_weight_tying": true}), &all_modules(4)).is_ok());
    let mut short = around_layers(4);
    short[0] = tensor("base_model.model.model.embed_tokens.lora_embedding_A".into(), 4, 19);
    assert!(refusal(json!({}), &short).contains("another base model"));
    assert!(refusal(json!({}), &around_layers(4)[1..]).contains("lora_B and no lora_A"));
}

#[test]
fn all_float_types_are_read() {
    let mut tensors = pair(0, Module::V, 4);
    tensors[0] = Tensor {
        dtype: "F32",
        bytes: 1.25f32.to_le_bytes().repeat(32),
        ..tensor(name(0, "self_attn.v_proj", "A"), 4, 8)
    };
    tensors[1] = Tensor {
        dtype: "F16",
        bytes: f16::from_f32(-2.0).to_le_bytes().repeat(16),
        ..tensor(name(0, "self_attn.v_proj", "B"), 4, 4)
    };
    let adapter = parse(json!({}), &tensors).unwrap();
    let update = adapter.update(0, Module::V).unwrap();
    assert_eq!((update.a.dtype(), update.b.dtype()), (DType::F32, DType::F16));
    tensors[1] = Tensor { dtype: "I16", ..tensor(name(0, "self_attn.v_proj", "B"), 4, 4) };
    assert!(refusal(json!({}), &tensors).contains("I16"));
}

#[test]
fn other_kinds_of_adapters_are_refused_by_name() {
    for (changes, word) in [
        (json!({"use_dora": true}), "DoRA"),
        (json!({"peft_type": "IA3"}), "IA3"),
        (json!({"bias": "lora_only"}), "bias"),
        (json!({"lora_bias": true}), "bias"),
        (json!({"modules_to_save": ["score"]}), "score"),
        (json!({"fan_in_fan_out": true}), "fan_in_fan_out"),
        (json!({"layer_replication": [[0, 2]]}), "layer_replication"),
        (json!({"alora_invocation_tokens": [1]}), "alora"),
        (json!({"trainable_token_indices": [1]}), "trainable_token_indices"),
        (json!({"target_parameters": ["x"]}), "target_parameters"),
        (json!({"init_lora_weights": "pissa_niter_4"}), "pissa"),
        (json!({"use_qalora": true}), "use_qalora"),
        (json!({"r": null}), "rank"),
        (json!({"lora_alpha": null}), "lora_alpha"),
        (json!({"r": "eight"}), "configuration"),
        (json!({"alpha_pattern": {"q_proj": "x"}}), "alpha_pattern"),
    ] {
        let message = refusal(changes, &all_modules(4));
        assert!(message.contains(word), "{message}, wanted {word}");
    }
    for (name, word) in [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", "DoRA"),
        ("base_model.model.lm_head.lora_embedding_A", "lm_head"),
        ("base_model.model.model.embed_tokens.lora_A.weight", "embed_tokens"),
        ("base_model.model.model.embed_tokens.weight", "embed_tokens"),
        ("base_model.model.model.layers.0.self_attn.q_proj.bias", "biases"),
        ("base_model.model.model.layers.00.self_attn.q_proj.lora_A.weight", "projections"),
        ("base_model.model.model.layers.0.mlp.router.lora_A.weight", "projections"),
    ] {
        let mut tensors = all_modules(4);
        tensors.push(tensor(name.into(), 4, 8));
        let message = refusal(json!({}), &tensors);
        assert!(message.contains(word) && message.contains(name), "{message}, wanted {word}");
    }
}

#[test]
fn halves_ranks_and_shapes_that_do_not_fit_are_refused() {
    let one = |change: fn(&mut Vec<Tensor>)| {
        let mut tensors = all_modules(4);
        change(&mut tensors);
        refusal(json!({}), &tensors)
    };
    for (message, words) in [
        (one(|all| drop(all.remove(0))), &["lora_B and no lora_A", "layers.0.self_attn.q_proj"][..]),
        (one(|all| drop(all.remove(1))), &["lora_A and no lora_B"][..]),
        (one(|all| all[0] = tensor(name(0, "self_attn.q_proj", "A"), 5, 8)), &["rank 4", "lora_A has 5"][..]),
        (one(|all| all[1] = tensor(name(0, "self_attn.q_proj", "B"), 16, 3)), &["rank 4", "lora_B has 3"][..]),
        (one(|all| all[0] = tensor(name(0, "self_attn.q_proj", "A"), 4, 9)), &["another base model", "[16, 9]"][..]),
        (one(|all| all[1] = tensor(name(0, "self_attn.q_proj", "B"), 17, 4)), &["another base model"][..]),
        (
            one(|all| {
                all[0].name = name(2, "self_attn.q_proj", "A");
                all[1].name = name(2, "self_attn.q_proj", "B");
            }),
            &["2 layers"][..],
        ),
        (one(|all| all.clear()), &["no lora_A"][..]),
        (one(|all| all[0].shape = vec![4, 2, 4]), &["two extents"][..]),
    ] {
        assert!(words.iter().all(|word| message.contains(word)), "{message}, wanted {words:?}");
    }
    let large = refusal(json!({"r": 513}), &pair(0, Module::Q, 513));
    assert!(large.contains("512"), "{large}");
    let none = refusal(json!({"r": 0}), &pair(0, Module::Q, 0));
    assert!(none.contains("rank 0"), "{none}");
}

#[test]
fn a_tensor_under_two_names_is_refused() {
    let mut tensors = all_modules(4);
    tensors.push(tensor("model.layers.0.self_attn.q_proj.lora_A.weight".into(), 4, 8));
    assert!(refusal(json!({}), &tensors).contains("twice"));
}

#[test]
fn nan_and_infinity_are_refused_in_every_type() {
    let numbers: [(&str, Vec<u8>); 6] = [
        ("F32", f32::NAN.to_le_bytes().to_vec()),
        ("F32", f32::NEG_INFINITY.to_le_bytes().to_vec()),
        ("F16", f16::NAN.to_le_bytes().to_vec()),
        ("F16", f16::INFINITY.to_le_bytes().to_vec()),
        ("BF16", bf16::NAN.to_le_bytes().to_vec()),
        ("BF16", bf16::NEG_INFINITY.to_le_bytes().to_vec()),
    ];
    for (dtype, bad) in numbers {
        let mut tensors = all_modules(4);
        let mut bytes = vec![0; 32 * bad.len()];
        bytes[17 * bad.len()..18 * bad.len()].copy_from_slice(&bad);
        tensors[0] = Tensor { dtype, bytes, ..tensor(name(0, "self_attn.q_proj", "A"), 4, 8) };
        assert!(refusal(json!({}), &tensors).contains("NaN or infinity"), "{dtype}");
    }
    assert!(refusal(json!({"lora_alpha": 1e300}), &all_modules(4)).contains("factor"));
}

#[test]
fn hostile_headers_are_refused_and_never_panic() {
    let whole = file(&all_modules(4));
    let mut files: Vec<Vec<u8>> = (0..whole.len()).step_by(41).map(|len| whole[..len].to_vec()).collect();
    files.push([&u64::MAX.to_le_bytes()[..], &whole[8..]].concat());
    files.push([&(1u64 << 40).to_le_bytes()[..], &whole[8..]].concat());
    files.push([&whole[..], &[0; 8]].concat());
    let with_header = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes(), &[0; 64]].concat();
    for text in [
        r#"{"a":{"dtype":"F32","shape":[18446744073709551615,18446744073709551615],"data_offsets":[0,64]}}"#,
        r#"{"a":{"dtype":"F32","shape":[4,4],"data_offsets":[64,0]}}"#,
        r#"{"a":{"dtype":"F32","shape":[4,4],"data_offsets":[0,18446744073709551615]}}"#,
        r#"{"a":{"dtype":"F32","shape":[4,4],"data_offsets":[0,64]},"b":{"dtype":"F32","shape":[4,4],"data_offsets":[0,64]}}"#,
        "[]",
        "{",
    ] {
        files.push(with_header(text));
    }
    for bytes in files {
        assert!(Adapter::parse(&config(json!({})), bytes, &SHAPES).is_err());
    }
}

#[test]
fn the_digest_is_that_of_the_content() {
    let digest = |changes: Value, tensors: &[Tensor]| parse(changes, tensors).unwrap().digest();
    let base = digest(json!({}), &all_modules(4));
    let mut reversed = all_modules(4);
    reversed.reverse();
    assert_eq!(digest(json!({"lora_dropout": 0.1, "inference_mode": true}), &reversed), base);
    // The same factor in other words.
    assert_eq!(digest(json!({"use_rslora": true, "lora_alpha": 3}), &all_modules(4)), base);
    let mut other = all_modules(4);
    other[5].bytes[3] ^= 1;
    for changed in [
        digest(json!({"lora_alpha": 7}), &all_modules(4)),
        digest(json!({}), &other),
        digest(json!({}), &all_modules(4)[2..]),
        digest(json!({"alpha_pattern": {"q_proj": 5}}), &all_modules(4)),
    ] {
        assert_ne!(changed, base);
    }
}

#[test]
fn folders_are_read_whole_or_not_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let read = |max_bytes| Adapter::read(folder.path(), &SHAPES, max_bytes).map(|adapter| adapter.digest());
    assert!(matches!(read(1 << 20), Err(Error::NotFound(_))));
    fs::write(folder.path().join("adapter_config.json"), config(json!({}))).unwrap();
    assert!(matches!(read(1 << 20), Err(Error::NotFound(_))));
    let weights = file(&all_modules(4));
    fs::write(folder.path().join("adapter_model.safetensors"), &weights).unwrap();
    let digest = read(weights.len() as u64).unwrap();
    assert_eq!(digest, parse(json!({}), &all_modules(4)).unwrap().digest());
    assert!(read(weights.len() as u64 - 1).unwrap_err().to_string().contains("more than"));
    fs::remove_file(folder.path().join("adapter_config.json")).unwrap();
    fs::create_dir(folder.path().join("adapter_config.json")).unwrap();
    assert!(read(1 << 20).unwrap_err().to_string().contains("plain file"));
}
