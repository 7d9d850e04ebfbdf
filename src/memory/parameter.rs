//! What a parameter cube holds: which adapter, by its content, and where that is read. The numbers stay in the adapter's
//! own files; a vault has no copy of them.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::digest::Digest;
use super::label::Label;
use super::payload::Binding;
use crate::{Error, Result, invalid};

/// Longest path of an adapter, in bytes.
const MAX_SOURCE_BYTES: usize = 4096;

/// An adapter: what it is and where it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parameter {
    /// Of its factors and numbers: the adapter's identity, whatever its files are called.
    pub digest: Digest,
    /// Its folder or file.
    pub source: AdapterSource,
    /// Digest of the weights that it was registered for.
    pub weights: Digest,
    /// The family of that model.
    pub architecture: Label,
    /// The largest rank of its updates.
    pub rank: u32,
    /// Bytes of its files' numbers.
    pub num_bytes: u64,
}

/// An absolute path without control characters, of at most 4096 bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct AdapterSource(String);

impl AdapterSource {
    /// The path.
    pub fn path(&self) -> &Path {
        Path::new(&self.0)
    }

    /// As it is written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Parameter {
    /// Refuses a model of other weights than the adapter was registered for, though the shapes may be the same.
    pub fn check_base(&self, name: &impl std::fmt::Display, model: &Binding) -> Result<()> {
        if self.weights == model.weights {
            return Ok(());
        }
        let (architecture, weights) = (self.architecture.as_str(), self.weights);
        Err(Error::Conflict(format!(
            "The adapter of cube `{name}` was registered for another model ({architecture}, weights {weights}); make the \
             cube anew for this one."
        )))
    }

    /// Bytes it takes in memory, about.
    pub(super) fn num_index_bytes(&self) -> usize {
        size_of::<Self>() + self.source.0.len()
    }
}

impl TryFrom<String> for AdapterSource {
    type Error = Error;

    fn try_from(path: String) -> Result<Self> {
        let is_plain = path.len() <= MAX_SOURCE_BYTES && !path.chars().any(char::is_control);
        match is_plain && Path::new(&path).is_absolute() {
            true => Ok(Self(path)),
            false => Err(invalid!(
                "'{:.80}' is no place for an adapter: an absolute path of at most {MAX_SOURCE_BYTES} bytes is wanted",
                path.escape_debug().to_string()
            )),
        }
    }
}

impl TryFrom<&Path> for AdapterSource {
    type Error = Error;

    fn try_from(path: &Path) -> Result<Self> {
        let text =
            path.to_str().ok_or_else(|| invalid!("{} is no UTF-8 text, so no cube can name it", path.display()))?;
        Self::try_from(text.to_owned())
    }
}

impl From<AdapterSource> for String {
    fn from(source: AdapterSource) -> Self {
        source.0
    }
}

#[cfg(test)]
mod tests {
    use super::super::samples;
    use super::*;

    #[test]
    fn sources_are_absolute_paths() {
        assert_eq!(AdapterSource::try_from("/a/b.gguf".to_owned()).unwrap().path(), Path::new("/a/b.gguf"));
        for wrong in ["", "a/b", "./a", "/a\nb", &format!("/{}", "a".repeat(MAX_SOURCE_BYTES))] {
            assert!(AdapterSource::try_from(wrong.to_owned()).is_err(), "{wrong:.40}");
        }
    }

    #[test]
    fn an_adapter_belongs_to_the_weights_it_was_registered_for() {
        let parameter = samples::parameter_payload("/adapters/style");
        let parameter = parameter.parameter().unwrap();
        let same = samples::binding();
        assert!(parameter.check_base(&"ana/style", &same).is_ok());
        let other = Binding { weights: Digest::of(b"other weights"), ..same };
        let refused = parameter.check_base(&"ana/style", &other).unwrap_err().to_string();
        assert!(refused.contains("ana/style") && refused.contains("another model"), "{refused}");
    }
}
