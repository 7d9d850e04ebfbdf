//! The tokenizer section of a GGUF file, as the text layer wants it.

use super::Gguf;
use crate::Result;
use crate::text::GgufVocabulary;

impl Gguf {
    /// The vocabulary and everything else the file says about tokenization.
    pub fn vocabulary(&self) -> Result<GgufVocabulary> {
        Ok(GgufVocabulary {
            model: self.get_str("tokenizer.ggml.model")?,
            pre: self.find_str("tokenizer.ggml.pre")?,
            tokens: self.get_str_array("tokenizer.ggml.tokens")?,
            scores: self.find_f32_array("tokenizer.ggml.scores")?.unwrap_or_default(),
            token_types: self.find_i32_array("tokenizer.ggml.token_type")?.unwrap_or_default(),
            merges: self.find_str_array("tokenizer.ggml.merges")?.unwrap_or_default(),
            bos_id: self.find_u32("tokenizer.ggml.bos_token_id")?,
            eos_id: self.find_u32("tokenizer.ggml.eos_token_id")?,
            eot_id: self.find_u32("tokenizer.ggml.eot_token_id")?,
            unk_id: self.find_u32("tokenizer.ggml.unknown_token_id")?,
            pad_id: self.find_u32("tokenizer.ggml.padding_token_id")?,
            add_bos: self.find_bool("tokenizer.ggml.add_bos_token")?,
            add_eos: self.find_bool("tokenizer.ggml.add_eos_token")?,
            add_space_prefix: self.find_bool("tokenizer.ggml.add_space_prefix")?,
        })
    }

    /// The chat template the file carries, if any.
    pub fn chat_template(&self) -> Result<Option<String>> {
        self.find_str("tokenizer.chat_template")
    }
}
