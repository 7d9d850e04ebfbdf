//! A Hugging Face folder: one of its files is the input, the others are sound.

#![no_main]

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use mneme::models::Checkpoint;

const CONFIG: &str = r#"{"model_type": "llama", "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1,
    "num_attention_heads": 2, "vocab_size": 4, "max_position_embeddings": 8}"#;
const INDEX: &str = r#"{"weight_map": {"model.norm.weight": "model.safetensors"}}"#;
const TENSORS: &[u8] = b"\x40\0\0\0\0\0\0\0\
    {\"model.norm.weight\":{\"dtype\":\"F16\",\"shape\":[4],\"data_offsets\":[0,8]}}01234567";

const FILES: [&str; 3] = ["config.json", "model.safetensors.index.json", "model.safetensors"];

const NAMES: [&str; 4] =
    ["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"];

/// A folder in memory where there is one.
fn folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let memory = Path::new("/dev/shm");
        let parent = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        let folder = parent.join(format!("mneme-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder can be made");
        folder
    })
}

fuzz_target!(|input: &[u8]| {
    let Some((which, input)) = input.split_first() else { return };
    let which = usize::from(*which) % FILES.len();
    for (at, (name, sound)) in FILES.iter().zip([CONFIG.as_bytes(), INDEX.as_bytes(), TENSORS]).enumerate() {
        std::fs::write(folder().join(name), if at == which { input } else { sound }).expect("files can be written");
    }
    let Ok(checkpoint) = Checkpoint::open(folder()) else { return };
    for name in NAMES {
        let Ok(Some(tensor)) = checkpoint.find_tensor(name) else { continue };
        assert!(tensor.bytes().len() <= input.len().max(TENSORS.len()));
        let _ = checkpoint.matrix(name, 4, 4);
    }
});
