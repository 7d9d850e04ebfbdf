//! `config.json` of a Hugging Face model directory.

use serde::Deserialize;
use serde_json::Value;

use super::config::{Architecture, ModelConfig, SlidingWindow};
use crate::backend::{Activation, RopeConfig, RopeScaling};
use crate::{Result, malformed, unsupported};

/// The fields mneme reads; the others do not change what is computed.
#[derive(Debug, Deserialize)]
struct HfConfig {
    model_type: String,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: usize,
    max_position_embeddings: usize,
    #[serde(default = "default_norm_eps")]
    rms_norm_eps: f32,
    rope_theta: Option<f64>,
    rope_scaling: Option<Value>,
    rope_parameters: Option<Value>,
    rope_local_base_freq: Option<f64>,
    hidden_act: Option<String>,
    hidden_activation: Option<String>,
    query_pre_attn_scalar: Option<f32>,
    sliding_window: Option<usize>,
    #[serde(default)]
    use_sliding_window: bool,
    sliding_window_pattern: Option<usize>,
    layer_types: Option<Vec<String>>,
    attn_logit_softcapping: Option<f32>,
    final_logit_softcapping: Option<f32>,
    #[serde(default)]
    mlp_bias: bool,
    tie_word_embeddings: Option<bool>,
}

fn default_norm_eps() -> f32 {
    1e-6
}

impl ModelConfig {
    /// Reads the text of a `config.json`.
    pub fn from_hf_json(text: &str) -> Result<Self> {
        let mut json: Value =
            serde_json::from_str(text).map_err(|error| malformed!("config.json is not JSON: {error}"))?;
        if let Some(text_config) = json.get_mut("text_config") {
            json = text_config.take();
        }
        let config: HfConfig = serde_json::from_value(json)
            .map_err(|error| malformed!("config.json does not describe a decoder: {error}"))?;
        config.check_supported()?;
        config.normalise()?.validate()
    }
}

impl HfConfig {
    fn architecture(&self) -> Result<Architecture> {
        match self.model_type.as_str() {
            "llama" => Ok(Architecture::Llama),
            "qwen2" => Ok(Architecture::Qwen2),
            "qwen3" => Ok(Architecture::Qwen3),
            "gemma2" => Ok(Architecture::Gemma2),
            "gemma3" | "gemma3_text" => Ok(Architecture::Gemma3),
            other => Err(unsupported!(
                "model_type {other:?} is not supported; llama, qwen2, qwen3, gemma2 and gemma3_text are"
            )),
        }
    }

    fn check_supported(&self) -> Result<()> {
        let is_capped = self.attn_logit_softcapping.is_some() || self.final_logit_softcapping.is_some();
        if is_capped && !self.architecture()?.is_gemma() {
            return Err(unsupported!("logit softcapping in a model of type {:?}; Gemma has it", self.model_type));
        }
        if self.mlp_bias {
            return Err(unsupported!("models with mlp_bias are not supported"));
        }
        if self.use_sliding_window {
            return Err(unsupported!("Qwen models with use_sliding_window are not supported"));
        }
        Ok(())
    }

    fn normalise(self) -> Result<ModelConfig> {
        let architecture = self.architecture()?;
        let gemma = architecture.is_gemma();
        let num_heads = self.num_attention_heads.max(1);
        let head_dim = self.head_dim.unwrap_or(if gemma { 256 } else { self.hidden_size / num_heads });
        let scale_base = self.query_pre_attn_scalar.filter(|_| gemma).unwrap_or(head_dim as f32);
        Ok(ModelConfig {
            architecture,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_layers: self.num_hidden_layers,
            num_heads: self.num_attention_heads,
            num_kv_heads: self.num_key_value_heads.unwrap_or(self.num_attention_heads),
            head_dim,
            vocab_size: self.vocab_size,
            // The defaults of the families' own configuration classes.
            tie_word_embeddings: self.tie_word_embeddings.unwrap_or(gemma),
            max_position_embeddings: self.max_position_embeddings,
            rms_norm_eps: self.rms_norm_eps,
            norm_offset: if gemma { 1.0 } else { 0.0 },
            embedding_scale: if gemma { (self.hidden_size as f32).sqrt() } else { 1.0 },
            attention_scale: scale_base.sqrt().recip(),
            attention_softcap: self.attn_logit_softcapping,
            logit_softcap: self.final_logit_softcapping,
            activation: self.activation()?,
            rope: self.rope("full_attention", head_dim)?,
            sliding: if gemma { Some(self.sliding(architecture, head_dim)?) } else { None },
        })
    }

    fn activation(&self) -> Result<Activation> {
        match self.hidden_activation.as_deref().or(self.hidden_act.as_deref()) {
            None if self.architecture()?.is_gemma() => Ok(Activation::GeluTanh),
            Some("silu") | None => Ok(Activation::Silu),
            Some("gelu_pytorch_tanh") => Ok(Activation::GeluTanh),
            Some(other) => Err(unsupported!("activation {other:?} is not supported; silu and gelu_pytorch_tanh are")),
        }
    }

    fn sliding(&self, architecture: Architecture, head_dim: usize) -> Result<SlidingWindow> {
        let period = self.sliding_window_pattern.unwrap_or(architecture.default_window_period());
        let layers = match &self.layer_types {
            Some(types) => types.iter().map(|kind| kind == "sliding_attention").collect(),
            None => SlidingWindow::periodic(self.num_hidden_layers, period),
        };
        let rope = match self.rope_parameters_of("sliding_attention") {
            Some(_) => self.rope("sliding_attention", head_dim)?,
            None if architecture == Architecture::Gemma2 => self.rope("full_attention", head_dim)?,
            None => RopeConfig {
                head_dim,
                theta: self.rope_local_base_freq.unwrap_or(10_000.0),
                scaling: RopeScaling::Plain,
            },
        };
        Ok(SlidingWindow { window: self.sliding_window.unwrap_or(4096), layers, rope })
    }

    /// Newer files keep the angles in `rope_parameters`, per layer type where a model has several.
    fn rope_parameters_of(&self, layer_type: &str) -> Option<&Value> {
        self.rope_parameters.as_ref()?.get(layer_type)
    }

    fn rope(&self, layer_type: &str, head_dim: usize) -> Result<RopeConfig> {
        let parameters = self.rope_parameters_of(layer_type).or(self.rope_parameters.as_ref());
        let theta = parameters.and_then(|found| found.get("rope_theta")?.as_f64()).or(self.rope_theta);
        let scaling = parameters.or(self.rope_scaling.as_ref()).filter(|found| !found.is_null());
        Ok(RopeConfig {
            head_dim,
            theta: theta.unwrap_or(10_000.0),
            scaling: scaling.map_or(Ok(RopeScaling::Plain), rope_scaling)?,
        })
    }
}

fn rope_scaling(json: &Value) -> Result<RopeScaling> {
    let kind = json.get("rope_type").or(json.get("type")).and_then(Value::as_str).unwrap_or("default");
    let number = |key: &str| {
        let found = json.get(key).and_then(Value::as_f64).filter(|value| *value > 0.0);
        found.ok_or_else(|| malformed!("config.json: RoPE scaling {kind:?} needs a positive number {key:?}"))
    };
    match kind {
        "default" => Ok(RopeScaling::Plain),
        "linear" => Ok(RopeScaling::Linear { factor: number("factor")? }),
        "llama3" => Ok(RopeScaling::Llama3 {
            factor: number("factor")?,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
            original_max_position: number("original_max_position_embeddings")?,
        }),
        other => Err(unsupported!("RoPE scaling {other:?} is not supported; default, linear and llama3 are")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA: &str = r#"{"model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 100000.0"#;

    #[test]
    fn older_and_newer_rope_fields_mean_the_same() {
        let older = ModelConfig::from_hf_json(&format!("{LLAMA}, \"rope_scaling\": null}}")).unwrap();
        let newer = format!("{LLAMA}, \"rope_parameters\": {{\"rope_type\": \"default\", \"rope_theta\": 100000.0}}}}");
        let newer = ModelConfig::from_hf_json(&newer).unwrap();
        assert_eq!(older.rope, newer.rope);
        assert_eq!((older.head_dim, older.attention_scale), (16, 0.25));
    }

    #[test]
    fn llama3_scaling_needs_all_its_numbers() {
        let text = format!("{LLAMA}, \"rope_scaling\": {{\"rope_type\": \"llama3\", \"factor\": 8.0}}}}");
        let error = ModelConfig::from_hf_json(&text).unwrap_err().to_string();
        assert!(error.contains("low_freq_factor"), "{error}");
    }

    /// Stored keys are moved by rotations, which needs angles that are proportional to the position.
    #[test]
    fn scalings_that_depend_on_the_length_are_refused() {
        for kind in ["dynamic", "yarn", "longrope"] {
            let text = format!("{LLAMA}, \"rope_scaling\": {{\"rope_type\": \"{kind}\", \"factor\": 8.0}}}}");
            let error = ModelConfig::from_hf_json(&text).unwrap_err().to_string();
            assert!(error.contains(kind) && error.contains("llama3"), "{error}");
        }
    }

    const GEMMA2: &str = r#"{"model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216,
        "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256000,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "rope_theta": 20000.0, "sliding_window": 4096,
        "query_pre_attn_scalar": 144, "hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0}"#;

    #[test]
    fn gemma2_is_capped_and_every_other_layer_slides() {
        let config = ModelConfig::from_hf_json(GEMMA2).unwrap();
        assert_eq!((config.attention_softcap, config.logit_softcap), (Some(50.0), Some(30.0)));
        assert_eq!((config.attention_scale, config.embedding_scale, config.norm_offset), (1.0 / 12.0, 48.0, 1.0));
        let sliding = config.sliding.unwrap();
        assert_eq!((sliding.window, sliding.layers), (4096, vec![true, false, true, false]));
        assert_eq!(sliding.rope, config.rope);
        assert!(config.tie_word_embeddings && config.activation == Activation::GeluTanh);
        let uncapped = GEMMA2.replace("50.0", "null").replace("30.0", "null").replace("\"gelu_pytorch_tanh\"", "null");
        let config = ModelConfig::from_hf_json(&uncapped).unwrap();
        assert_eq!((config.attention_softcap, config.logit_softcap), (None, None));
        assert_eq!(config.activation, Activation::GeluTanh);
    }

    #[test]
    fn caps_of_other_families_and_impossible_ones_are_refused() {
        for name in ["attn_logit_softcapping", "final_logit_softcapping"] {
            let error = ModelConfig::from_hf_json(&format!("{LLAMA}, \"{name}\": 30.0}}")).unwrap_err().to_string();
            assert!(error.contains("llama"), "{error}");
        }
        for cap in ["0.0", "-1.0"] {
            let error = ModelConfig::from_hf_json(&GEMMA2.replace("50.0", cap)).unwrap_err().to_string();
            assert!(error.contains("soft cap"), "{error}");
        }
    }

    #[test]
    fn impossible_and_unknown_models_are_refused() {
        for (from, to, wanted) in [
            ("\"llama\"", "\"mamba\"", "model_type"),
            ("\"num_key_value_heads\": 2", "\"num_key_value_heads\": 3", "do not divide"),
            ("\"hidden_size\": 64", "\"hidden_size\": 0", "hidden_size"),
            ("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 99999999", "num_hidden_layers"),
        ] {
            let text = format!("{}}}", LLAMA.replace(from, to));
            let error = ModelConfig::from_hf_json(&text).unwrap_err().to_string();
            assert!(error.contains(wanted), "{error}");
        }
    }
}
