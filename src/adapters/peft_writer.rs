//! A fused adapter as PEFT would write it: `adapter_config.json` and `adapter_model.safetensors`.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Map, Value, json};

use super::base::Module;
use super::fuse::Fused;
use crate::{Error, Result, invalid};

impl Fused {
    /// Writes both files into `folder`, which is made and must not be there yet. `base_model` is noted in the
    /// configuration.
    ///
    /// # Errors
    /// `Invalid` when there is such a folder, `Io` when it cannot be written.
    pub fn write(&self, folder: &Path, base_model: &str) -> Result<()> {
        if folder.exists() {
            return Err(invalid!("{} is there already; name a folder that is not", folder.display()));
        }
        fs::create_dir_all(folder).map_err(|error| Error::io("create", folder, error))?;
        let (weights, config) = (folder.join("adapter_model.safetensors"), folder.join("adapter_config.json"));
        let bytes = self.weights()?;
        fs::write(&weights, bytes).map_err(|error| Error::io("write", &weights, error))?;
        let text = format!("{:#}\n", self.config(base_model));
        fs::write(&config, text).map_err(|error| Error::io("write", &config, error))
    }

    fn weights(&self) -> Result<Vec<u8>> {
        let failed = |error| Error::Format(format!("the fused adapter cannot be written: {error}"));
        let mut tensors = Vec::with_capacity(2 * self.updates.len());
        for ((layer, module), update) in &self.updates {
            let name = format!("base_model.model.{}", module.full_name(*layer));
            let [name_of_a, name_of_b] = match module {
                Module::Embedding => ["lora_embedding_A", "lora_embedding_B"],
                _ => ["lora_A.weight", "lora_B.weight"],
            };
            let (inputs, outputs) = (self.shapes.inputs(*module), self.shapes.outputs(*module));
            let a = TensorView::new(Dtype::F32, vec![update.rank, inputs], bytemuck::cast_slice(&update.a));
            let b = TensorView::new(Dtype::F32, vec![outputs, update.rank], bytemuck::cast_slice(&update.b));
            tensors.push((format!("{name}.{name_of_a}"), a.map_err(failed)?));
            tensors.push((format!("{name}.{name_of_b}"), b.map_err(failed)?));
        }
        safetensors::serialize(tensors, None).map_err(failed)
    }

    /// The factor of every update is 1, since alpha is the rank.
    fn config(&self, base_model: &str) -> Value {
        let rank = self.max_rank();
        let others = self.updates.iter().filter(|(_, update)| update.rank != rank);
        let pattern: Map<String, Value> =
            others.map(|((layer, module), update)| (module.full_name(*layer), json!(update.rank))).collect();
        let last = |name: &'static str| name.rsplit('.').next().unwrap_or(name);
        let modules: BTreeSet<&str> = self.updates.keys().map(|(_, module)| last(module.name())).collect();
        json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": pattern,
            "alpha_pattern": pattern,
            "target_modules": modules,
            "bias": "none",
            "lora_dropout": 0.0,
            "fan_in_fan_out": false,
            "use_rslora": false,
            "use_dora": false,
            "modules_to_save": null,
            "init_lora_weights": true,
            "inference_mode": true,
        })
    }
}
