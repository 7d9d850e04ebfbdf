//! Where a Hugging Face checkpoint folder keeps its chat template.

use std::io::ErrorKind;
use std::path::Path;

use serde_json::Value;

use crate::{Error, Result, malformed};

/// The template of the checkpoint in `folder`: `chat_template.jinja`, or `chat_template` in `tokenizer_config.json` (of
/// several the one named `default`). `None` when there is neither.
pub fn template_in_folder(folder: &Path) -> Result<Option<String>> {
    if let Some(source) = read_if_there(&folder.join("chat_template.jinja"))? {
        return Ok(Some(source));
    }
    let path = folder.join("tokenizer_config.json");
    let Some(config) = read_if_there(&path)? else { return Ok(None) };
    let config: Value = serde_json::from_str(&config).map_err(|e| malformed!("cannot read {}: {e}", path.display()))?;
    match &config["chat_template"] {
        Value::Null => Ok(None),
        Value::String(source) => Ok(Some(source.clone())),
        Value::Array(named) => Ok(default_of(named)),
        other => Err(malformed!("{}: chat_template should be text or a list, found {other}", path.display())),
    }
}

fn default_of(named: &[Value]) -> Option<String> {
    let default = named.iter().find(|template| template["name"] == "default")?;
    default["template"].as_str().map(str::to_owned)
}

fn read_if_there(path: &Path) -> Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("read", path, error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_are_found_where_checkpoints_keep_them() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        let found = || template_in_folder(folder.path());
        assert_eq!(found().unwrap(), None);
        write("tokenizer_config.json", r#"{"bos_token": "<s>"}"#);
        assert_eq!(found().unwrap(), None);
        write("tokenizer_config.json", r#"{"chat_template": "one"}"#);
        assert_eq!(found().unwrap().as_deref(), Some("one"));
        let named = r#"{"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "two"}]}"#;
        write("tokenizer_config.json", named);
        assert_eq!(found().unwrap().as_deref(), Some("two"));
        write("chat_template.jinja", "three");
        assert_eq!(found().unwrap().as_deref(), Some("three"));
        std::fs::remove_file(folder.path().join("chat_template.jinja")).unwrap();
        write("tokenizer_config.json", "{");
        assert!(found().unwrap_err().to_string().contains("tokenizer_config.json"));
        write("tokenizer_config.json", r#"{"chat_template": 3}"#);
        assert!(found().is_err());
    }
}
