//! The same from the metadata of a GGUF file, and what the file calls its tensors.

use super::config::{Architecture, ModelConfig, SlidingWindow};
use crate::backend::{Activation, RopeConfig, RopeScaling, dequantize_row};
use crate::gguf::Gguf;
use crate::{Result, malformed, unsupported};

impl ModelConfig {
    /// Reads the metadata of a GGUF file.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self> {
        GgufConfig::new(gguf)?.normalise()?.validate()
    }

    /// Numbers of query heads and of key heads where GGUF files keep the rows of q and k in the order of ggml's
    /// interleaved RoPE: those of the Llama architecture do.
    pub fn interleaved_heads(&self) -> Option<[usize; 2]> {
        (self.architecture == Architecture::Llama).then_some([self.num_heads, self.num_kv_heads])
    }
}

impl Architecture {
    /// What GGUF files call it in `general.architecture`.
    pub fn gguf_name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Gemma2 => "gemma2",
            Self::Gemma3 => "gemma3",
        }
    }
}

struct GgufConfig<'a> {
    gguf: &'a Gguf,
    prefix: String,
    architecture: Architecture,
}

impl<'a> GgufConfig<'a> {
    fn new(gguf: &'a Gguf) -> Result<Self> {
        let prefix = gguf.get_str("general.architecture")?;
        let architecture = Architecture::ALL.into_iter().find(|known| known.gguf_name() == prefix);
        let architecture = architecture.ok_or_else(|| {
            let known = Architecture::ALL.map(Architecture::gguf_name).join(", ");
            unsupported!("GGUF architecture {prefix:?} is not supported; {known} are")
        })?;
        Ok(Self { gguf, prefix, architecture })
    }

    fn size(&self, key: &str) -> Result<usize> {
        Ok(self.gguf.get_u32(&format!("{}.{key}", self.prefix))? as usize)
    }

    fn find_size(&self, key: &str) -> Result<Option<usize>> {
        Ok(self.gguf.find_u32(&format!("{}.{key}", self.prefix))?.map(|value| value as usize))
    }

    fn find_number(&self, key: &str) -> Result<Option<f32>> {
        self.gguf.find_f32(&format!("{}.{key}", self.prefix))
    }

    fn normalise(self) -> Result<ModelConfig> {
        let gemma = self.architecture.is_gemma();
        let hidden_size = self.size("embedding_length")?;
        let num_heads = self.size("attention.head_count")?;
        let head_dim = self.find_size("attention.key_length")?.unwrap_or(hidden_size / num_heads.max(1));
        let num_layers = self.size("block_count")?;
        let embedding = self.gguf.tensor_info("token_embd.weight");
        let embedding = embedding.ok_or_else(|| malformed!("GGUF: no tensor named \"token_embd.weight\""))?;
        let epsilon = self.find_number("attention.layer_norm_rms_epsilon")?;
        Ok(ModelConfig {
            architecture: self.architecture,
            hidden_size,
            intermediate_size: self.size("feed_forward_length")?,
            num_layers,
            num_heads,
            num_kv_heads: self.find_size("attention.head_count_kv")?.unwrap_or(num_heads),
            head_dim,
            vocab_size: embedding.rows(),
            tie_word_embeddings: self.gguf.tensor_info("output.weight").is_none(),
            max_position_embeddings: self.size("context_length")?,
            rms_norm_eps: epsilon.unwrap_or(1e-6),
            norm_offset: if gemma { 1.0 } else { 0.0 },
            embedding_scale: if gemma { (hidden_size as f32).sqrt() } else { 1.0 },
            attention_scale: self.attention_scale(num_layers, hidden_size / num_heads.max(1), head_dim),
            attention_softcap: self.softcap("attn_logit_softcapping")?,
            logit_softcap: self.softcap("final_logit_softcapping")?,
            activation: if gemma { Activation::GeluTanh } else { Activation::Silu },
            rope: self.rope(head_dim)?,
            sliding: if gemma { Some(self.sliding(num_layers, head_dim)?) } else { None },
        })
    }

    /// What Hugging Face calls `query_pre_attn_scalar` is not in these files. It is the size of a head but in the largest Gemmas,
    /// which are known by their layers: there a head's share of the features.
    fn attention_scale(&self, num_layers: usize, head_share: usize, head_dim: usize) -> f32 {
        let base = match (self.architecture, num_layers) {
            (Architecture::Gemma2, 46) | (Architecture::Gemma3, 62) => head_share,
            _ => head_dim,
        };
        (base as f32).sqrt().recip()
    }

    /// A Gemma's soft cap. Gemma 2 is not what it was trained to be without its two, which the first files of it lack.
    fn softcap(&self, key: &str) -> Result<Option<f32>> {
        let found = self.find_number(key)?;
        match found {
            Some(_) if !self.architecture.is_gemma() => {
                Err(unsupported!("\"{}.{key}\" in a GGUF file is not supported; Gemma's is", self.prefix))
            }
            None if self.architecture == Architecture::Gemma2 => Err(malformed!(
                "GGUF: no number \"{}.{key}\"; convert the model again, with a newer converter",
                self.prefix
            )),
            found => Ok(found),
        }
    }

    fn rope(&self, head_dim: usize) -> Result<RopeConfig> {
        let theta = self.find_number("rope.freq_base")?.unwrap_or(10_000.0);
        Ok(RopeConfig { head_dim, theta: f64::from(theta), scaling: self.rope_scaling()? })
    }

    fn rope_scaling(&self) -> Result<RopeScaling> {
        if let Some(factor) = self.find_number("rope.scaling.attn_factor")?.filter(|factor| *factor != 1.0) {
            return Err(unsupported!("a GGUF file with RoPE attention factor {factor} is not supported; only 1 is"));
        }
        if self.gguf.tensor_info("rope_freqs.weight").is_some() {
            let tensor = self.gguf.tensor("rope_freqs.weight")?;
            let mut factors = vec![0.0; tensor.rows() * tensor.columns()];
            dequantize_row(tensor.dtype(), tensor.bytes(), &mut factors);
            return Ok(RopeScaling::Factors(factors));
        }
        match self.gguf.find_str(&format!("{}.rope.scaling.type", self.prefix))?.as_deref() {
            None | Some("none") => Ok(RopeScaling::Plain),
            Some("linear") => {
                let factor = self.find_number("rope.scaling.factor")?.unwrap_or(1.0);
                Ok(RopeScaling::Linear { factor: f64::from(factor) })
            }
            Some(other) => Err(unsupported!("RoPE scaling {other:?} of a GGUF file is not supported; linear is")),
        }
    }

    fn sliding(&self, num_layers: usize, head_dim: usize) -> Result<SlidingWindow> {
        let period = self.find_size("attention.sliding_window_pattern")?;
        let period = period.unwrap_or(self.architecture.default_window_period());
        let plain = |theta: f32| RopeConfig { head_dim, theta: f64::from(theta), scaling: RopeScaling::Plain };
        Ok(SlidingWindow {
            window: self.size("attention.sliding_window")?,
            layers: SlidingWindow::periodic(num_layers, period),
            rope: match self.find_number("rope.freq_base_swa")? {
                Some(theta) => plain(theta),
                None if self.architecture == Architecture::Gemma2 => self.rope(head_dim)?,
                None => plain(10_000.0),
            },
        })
    }
}

/// What a GGUF file calls the tensor that Hugging Face checkpoints call `name`, without the `model.` prefix's layer
/// part: `model.layers.3.self_attn.q_proj.weight` is `blk.3.attn_q.weight`.
pub(super) fn gguf_name(architecture: Architecture, name: &str) -> Option<String> {
    match name {
        "model.embed_tokens.weight" => return Some("token_embd.weight".into()),
        "model.norm.weight" => return Some("output_norm.weight".into()),
        "lm_head.weight" => return Some("output.weight".into()),
        _ => {}
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (stem, kind) = rest.rsplit_once('.')?;
    Some(format!("blk.{layer}.{}.{kind}", gguf_stem(architecture, stem)?))
}

fn gguf_stem(architecture: Architecture, stem: &str) -> Option<&'static str> {
    let gemma = architecture.is_gemma();
    Some(match stem {
        "input_layernorm" => "attn_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "self_attn.q_norm" => "attn_q_norm",
        "self_attn.k_norm" => "attn_k_norm",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        "post_attention_layernorm" if gemma => "post_attention_norm",
        "post_attention_layernorm" | "pre_feedforward_layernorm" => "ffn_norm",
        "post_feedforward_layernorm" => "post_ffw_norm",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::gguf::writer::Writer;

    /// The metadata of a Gemma with so many layers, and more.
    fn gemma(name: &str, num_layers: u32, numbers: &[(&str, f32)]) -> Result<ModelConfig> {
        let mut writer = Writer::new().string("general.architecture", name);
        for (key, value) in [
            ("embedding_length", 64),
            ("attention.head_count", 2),
            ("attention.key_length", 16),
            ("block_count", num_layers),
            ("feed_forward_length", 64),
            ("context_length", 64),
            ("attention.sliding_window", 8),
        ] {
            writer = writer.entry(&format!("{name}.{key}"), 4, &u32::to_le_bytes(value));
        }
        for (key, value) in numbers {
            writer = writer.entry(&format!("{name}.{key}"), 6, &value.to_le_bytes());
        }
        let bytes = writer.tensor("token_embd.weight", &[64, 2], 0, &[0; 512]).finish();
        ModelConfig::from_gguf(&Gguf::parse(Arc::new(bytes)).unwrap())
    }

    #[test]
    fn gemma2_needs_its_caps() {
        let caps = [("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0)];
        let config = gemma("gemma2", 3, &caps).unwrap();
        assert_eq!((config.attention_softcap, config.logit_softcap), (Some(50.0), Some(30.0)));
        assert_eq!(config.sliding.unwrap().layers, [true, false, true]);
        let error = gemma("gemma2", 3, &caps[..1]).unwrap_err().to_string();
        assert!(error.contains("gemma2.final_logit_softcapping") && error.contains("convert"), "{error}");
        assert_eq!(gemma("gemma3", 3, &[]).unwrap().attention_softcap, None);
    }

    /// Scores of the largest Gemmas are scaled by a head's share of the features, of which there is nothing in the file.
    #[test]
    fn the_largest_gemmas_have_a_scale_of_their_own() {
        let caps = [("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0)];
        for (name, layers, wanted) in
            [("gemma2", 46, 32f32), ("gemma2", 42, 16.0), ("gemma3", 62, 32.0), ("gemma3", 48, 16.0)]
        {
            assert_eq!(gemma(name, layers, &caps).unwrap().attention_scale, wanted.sqrt().recip(), "{name} {layers}");
        }
    }

    /// Stored keys are moved by rotations, which change no length; and angles must be proportional to the position.
    #[test]
    fn rope_scalings_that_cannot_be_moved_are_refused() {
        let error = |key: &str, code: u32, payload: &[u8]| {
            let mut writer = Writer::new().string("general.architecture", "llama");
            for key in
                ["embedding_length", "attention.head_count", "block_count", "feed_forward_length", "context_length"]
            {
                writer = writer.entry(&format!("llama.{key}"), 4, &64u32.to_le_bytes());
            }
            let bytes = writer.entry(key, code, payload).tensor("token_embd.weight", &[64, 2], 0, &[0; 512]).finish();
            ModelConfig::from_gguf(&Gguf::parse(Arc::new(bytes)).unwrap()).map_err(|error| error.to_string())
        };
        let factor = |factor: f32| error("llama.rope.scaling.attn_factor", 6, &factor.to_le_bytes());
        assert!(factor(1.19).unwrap_err().contains("attention factor 1.19"));
        assert!(factor(1.0).err().is_none_or(|error| !error.contains("attention factor")));
        let kind = [&4u64.to_le_bytes()[..], b"yarn"].concat();
        assert!(error("llama.rope.scaling.type", 8, &kind).unwrap_err().contains("yarn"));
    }
}
