//! What a checkpoint brings along besides weights: vocabulary, chat template, generation defaults.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use mneme::engine::SamplingParams;
use mneme::gguf::Gguf;
use mneme::models::Checkpoint;
use mneme::text::chat_template::template_in_folder;
use mneme::text::{ChatTemplate, Tokenizer};
use serde::Deserialize;

/// The text side of a model.
pub(crate) struct TextAssets {
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) template: Option<Arc<ChatTemplate>>,
    pub(crate) eos_token_ids: Vec<u32>,
    /// Used where a request says nothing.
    pub(crate) default_sampling: SamplingParams,
}

/// The fields of `generation_config.json` that change what is sampled.
#[derive(Debug, Default, Deserialize)]
struct GenerationConfig {
    eos_token_id: Option<OneOrMany>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<usize>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

impl TextAssets {
    /// Reads them from the checkpoint's metadata or from the files beside it.
    pub(crate) fn load(checkpoint: &Checkpoint) -> anyhow::Result<Self> {
        match checkpoint.gguf() {
            Some(gguf) => Self::from_gguf(gguf),
            None => Self::from_directory(checkpoint.path()),
        }
    }

    fn from_gguf(gguf: &Gguf) -> anyhow::Result<Self> {
        let tokenizer = Tokenizer::from_gguf(gguf.vocabulary()?)?;
        let template = gguf.chat_template()?;
        Self::assemble(tokenizer, template.as_deref(), GenerationConfig::default())
    }

    fn from_directory(directory: &Path) -> anyhow::Result<Self> {
        let tokenizer = Tokenizer::from_json_file(&directory.join("tokenizer.json"))?;
        let template = template_in_folder(directory)?;
        let generation = match read_optional(&directory.join("generation_config.json"))? {
            Some(text) => serde_json::from_str(&text).context("generation_config.json is malformed")?,
            None => GenerationConfig::default(),
        };
        Self::assemble(tokenizer, template.as_deref(), generation)
    }

    fn assemble(tokenizer: Tokenizer, template: Option<&str>, generation: GenerationConfig) -> anyhow::Result<Self> {
        let text_of = |id: Option<u32>| id.map(|id| tokenizer.token_text(id));
        let (bos, eos) = (text_of(tokenizer.bos_id()), text_of(tokenizer.eos_id()));
        let template = template
            .map(|source| ChatTemplate::new(Some(source), bos.as_deref(), eos.as_deref()).map(Arc::new))
            .transpose()?;
        let mut eos_token_ids = tokenizer.end_ids().to_vec();
        match generation.eos_token_id {
            Some(OneOrMany::One(id)) => eos_token_ids.push(id),
            Some(OneOrMany::Many(ref ids)) => eos_token_ids.extend(ids),
            None => {}
        }
        eos_token_ids.sort_unstable();
        eos_token_ids.dedup();
        Ok(Self { tokenizer: Arc::new(tokenizer), template, eos_token_ids, default_sampling: generation.sampling() })
    }
}

impl GenerationConfig {
    fn sampling(&self) -> SamplingParams {
        let plain = SamplingParams::default();
        SamplingParams {
            temperature: self.temperature.unwrap_or(plain.temperature),
            top_p: self.top_p.unwrap_or(plain.top_p),
            top_k: self.top_k.unwrap_or(plain.top_k),
            min_p: self.min_p.unwrap_or(plain.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(plain.repetition_penalty),
            ..plain
        }
    }
}

fn read_optional(path: &Path) -> anyhow::Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}
