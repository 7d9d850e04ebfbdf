//! Owns what may follow `--model`: its syntax, and which reading wins when several are possible.
//!
//! Finding or fetching what a reference names is `resolver`'s.

use std::path::{Path, PathBuf};

use super::catalog::{self, Artifact};
use crate::{Result, invalid};

/// A parsed `--model` value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelRef {
    /// A directory with `config.json` and safetensors weights.
    Directory(PathBuf),
    /// A GGUF file.
    GgufFile(PathBuf),
    /// A Hugging Face repository.
    Repo {
        /// `org/name`.
        id: String,
        /// Branch, tag or commit.
        revision: String,
        /// What of the repository is wanted.
        file: RepoFile,
    },
    /// A short name of the catalog.
    ShortName(&'static Artifact),
}

/// What of a Hugging Face repository is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RepoFile {
    /// The safetensors checkpoint: configuration, tokenizer and weights.
    Checkpoint,
    /// The GGUF file with this path.
    Gguf(String),
    /// The one GGUF file whose name has this quantization, such as `Q4_K_M`.
    Quantization(String),
}

/// The branch used when a reference names none.
pub(super) const DEFAULT_REVISION: &str = "main";

impl ModelRef {
    /// Parses what the user typed; reads the file system, never the network.
    ///
    /// A short name wins over a file of the same name, so that a command means the same in every folder; write `./NAME`
    /// for the file. An existing path wins over a repository id.
    ///
    /// # Errors
    /// `Invalid` or `NotFound`, listing what is accepted.
    pub fn parse(text: &str) -> Result<Self> {
        let typed = text.trim();
        if typed.is_empty() || typed.contains('\0') || typed.len() > 4096 {
            return Err(invalid!("--model needs {ACCEPTED}; found an empty or over-long value"));
        }
        if let Some(artifact) = catalog::find(typed) {
            return Ok(ModelRef::ShortName(artifact));
        }
        if let Some((_, id)) = catalog::repo_names().iter().find(|(name, _)| *name == typed) {
            return Ok(checkpoint(id, DEFAULT_REVISION));
        }
        match parse_path(typed)? {
            Some(reference) => Ok(reference),
            None => parse_repo(typed),
        }
    }
}

const ACCEPTED: &str = "a directory, a .gguf file, a Hugging Face repository (org/name, org/name@revision, \
                        org/name:Q4_K_M or org/name/file.gguf) or a short name";

fn checkpoint(id: &str, revision: &str) -> ModelRef {
    ModelRef::Repo { id: id.to_owned(), revision: revision.to_owned(), file: RepoFile::Checkpoint }
}

fn is_gguf_name(name: &str) -> bool {
    name.len() > 5 && name.to_ascii_lowercase().ends_with(".gguf")
}

/// A reference to something on disk; `None` when the text may still be a repository.
fn parse_path(typed: &str) -> Result<Option<ModelRef>> {
    let path = Path::new(typed);
    if path.is_dir() {
        return Ok(Some(ModelRef::Directory(path.to_path_buf())));
    }
    if path.exists() {
        return if is_gguf_name(typed) {
            Ok(Some(ModelRef::GgufFile(path.to_path_buf())))
        } else {
            Err(invalid!("{typed} is a file but not a .gguf file; --model takes {ACCEPTED}"))
        };
    }
    let only_a_path = path.is_absolute() || typed.starts_with('.') || typed.starts_with('~');
    if only_a_path || (is_gguf_name(typed) && typed.split('/').count() < 3) {
        return Err(crate::Error::NotFound(format!("there is no file or directory {typed}")));
    }
    Ok(None)
}

fn parse_repo(typed: &str) -> Result<ModelRef> {
    let (location, revision) = typed.split_once('@').unwrap_or((typed, DEFAULT_REVISION));
    let (location, quantization) = match location.split_once(':') {
        Some((location, quantization)) => (location, Some(quantization)),
        None => (location, None),
    };
    let mut pieces = location.splitn(3, '/');
    let (Some(org), Some(name)) = (pieces.next(), pieces.next()) else { return Err(unknown_name(typed)) };
    let file = match (pieces.next(), quantization) {
        (None, None) => RepoFile::Checkpoint,
        (None, Some(quantization)) if is_plain(quantization, "") => RepoFile::Quantization(quantization.to_owned()),
        (Some(file), None) if is_gguf_name(file) && is_plain(file, "/") => RepoFile::Gguf(file.to_owned()),
        _ => return Err(invalid!("{typed} is no model; --model takes {ACCEPTED}")),
    };
    if !is_plain(org, "") || !is_plain(name, "") || !is_plain(revision, "/") {
        return Err(invalid!("{typed} is no repository id; --model takes {ACCEPTED}"));
    }
    Ok(ModelRef::Repo { id: format!("{org}/{name}"), revision: revision.to_owned(), file })
}

/// Whether `text` may become part of an address and of a path in the cache: no empty piece, none that climbs.
pub(super) fn is_plain(text: &str, separator: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c) || separator.contains(c);
    text.len() <= 200
        && text.chars().all(allowed)
        && text.split('/').all(|piece| !piece.is_empty() && !piece.starts_with('.') && !piece.contains(".."))
}

fn unknown_name(typed: &str) -> crate::Error {
    let known = catalog::names().collect::<Vec<_>>().join(", ");
    let near = catalog::near_misses(typed);
    let hint = if near.is_empty() { String::new() } else { format!(" Did you mean {}?", near.join(" or ")) };
    crate::Error::NotFound(format!(
        "no model is called {typed:?}.{hint} --model takes {ACCEPTED}. Short names: {known}."
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repo(id: &str, revision: &str, file: RepoFile) -> ModelRef {
        ModelRef::Repo { id: id.into(), revision: revision.into(), file }
    }

    #[test]
    fn names_and_repositories_parse() {
        let cases = [
            ("smollm2-135m-instruct", ModelRef::ShortName(catalog::find("smollm2-135m-instruct").unwrap())),
            (" gemma-3-270m ", ModelRef::ShortName(catalog::find("gemma-3-270m").unwrap())),
            ("smollm2-135m-instruct-hub", repo("HuggingFaceTB/SmolLM2-135M-Instruct", "main", RepoFile::Checkpoint)),
            ("org/name", repo("org/name", "main", RepoFile::Checkpoint)),
            ("org/name@v1.0", repo("org/name", "v1.0", RepoFile::Checkpoint)),
            ("org/name@refs/pr/3", repo("org/name", "refs/pr/3", RepoFile::Checkpoint)),
            ("org/name:Q4_K_M", repo("org/name", "main", RepoFile::Quantization("Q4_K_M".into()))),
            ("org/name:Q8_0@v2", repo("org/name", "v2", RepoFile::Quantization("Q8_0".into()))),
            ("org/name/a.Q4.gguf", repo("org/name", "main", RepoFile::Gguf("a.Q4.gguf".into()))),
            ("org/name/sub/a.gguf@v2", repo("org/name", "v2", RepoFile::Gguf("sub/a.gguf".into()))),
        ];
        for (typed, expected) in cases {
            assert_eq!(ModelRef::parse(typed).unwrap(), expected, "{typed}");
        }
    }

    #[test]
    fn paths_parse_and_win_over_repositories() {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("model.GGUF");
        let other = folder.path().join("model.bin");
        std::fs::write(&model, b"x").unwrap();
        std::fs::write(&other, b"x").unwrap();
        let parse = |path: &Path| ModelRef::parse(path.to_str().unwrap());
        assert_eq!(parse(folder.path()).unwrap(), ModelRef::Directory(folder.path().into()));
        assert_eq!(parse(&model).unwrap(), ModelRef::GgufFile(model.clone()));
        assert!(parse(&other).unwrap_err().to_string().contains("not a .gguf file"));
        // Tests run in the package's folder, where this is a directory of two pieces, like a repository id.
        assert_eq!(ModelRef::parse("src/hub").unwrap(), ModelRef::Directory("src/hub".into()));
    }

    #[test]
    fn what_is_no_model_is_refused() {
        for typed in [
            "",
            "  ",
            "../x/y",
            "/nowhere/at/all",
            "./a.gguf",
            "a.gguf",
            "org/a.gguf",
            "~/m.gguf",
            "org/",
            "/name",
            "org/../name",
            "org/..",
            "org//x.gguf",
            "org/name/",
            "org/name/readme.md",
            "org/name/../x.gguf",
            "org/name@",
            "org/name@../../x",
            "org/name:",
            "org/name:a/b",
            "org/na me",
            "org/name?x=1",
            "a\0b/c",
        ] {
            assert!(ModelRef::parse(typed).is_err(), "{typed:?}");
        }
        assert!(ModelRef::parse(&"x/".repeat(5000)).is_err());
    }

    #[test]
    fn an_unknown_name_lists_what_is_near() {
        let message = ModelRef::parse("smollm-135m-instruct").unwrap_err().to_string();
        assert!(message.contains("Did you mean smollm2-135m-instruct"), "{message}");
        assert!(message.contains("a directory, a .gguf file"), "{message}");
        let message = ModelRef::parse("zzz").unwrap_err().to_string();
        assert!(!message.contains("Did you mean") && message.contains("gemma-3-270m"), "{message}");
    }
}
