//! The rules of the tree: who may import whom, what every file opens with, where `unsafe` may be.

#![allow(missing_docs, clippy::unwrap_used)]

use std::path::{Path, PathBuf};

/// Rows from the bottom up; a module imports only from rows below its own, or from itself.
const ROWS: [&[&str]; 8] = [
    &["error", "config", "telemetry", "planted"],
    &["backend", "kv", "text"],
    &["gguf"],
    &["paging", "models", "adapters", "hub"],
    &["memory"],
    &["engine"],
    &["server"],
    &["cli"],
];

/// Where `unsafe` is allowed, from `src/`.
const UNSAFE: [&str; 4] = ["backend/cpu/", "backend/cuda/", "models/weights.rs", "paging/"];

/// Names that say nothing.
const VAGUE: [&str; 5] = ["utils", "common", "helpers", "types", "misc"];

/// Names at the crate's root that are no modules: re-exports and macros of `error`.
const ROOT_ITEMS: [&str; 6] = ["Error", "Result", "invalid", "malformed", "unsupported", "self"];

fn row_of(module: &str) -> Option<usize> {
    ROWS.iter().position(|row| row.contains(&module))
}

/// Text without comments, and without the contents of strings and characters.
fn code_of(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let skipped = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if let Some(raw) = rest.strip_prefix("r#\"") {
            raw.find("\"#").map_or(rest.len(), |at| at + 5)
        } else if rest.starts_with("r\"") && !code.ends_with(|last: char| last.is_alphanumeric() || last == '_') {
            rest[2..].find('"').map_or(rest.len(), |at| at + 3)
        } else if first == '"' {
            end_of_string(rest)
        } else if rest.starts_with("'\"'") || rest.starts_with("'\\") {
            1 + rest[1..].char_indices().skip(1).find(|(_, found)| *found == '\'').map_or(0, |(at, _)| at) + 1
        } else {
            0
        };
        if skipped == 0 {
            code.push(first);
            rest = &rest[first.len_utf8()..];
        } else {
            code.extend(rest[..skipped].chars().filter(|skipped| *skipped == '\n'));
            code.push(' ');
            rest = &rest[skipped..];
        }
    }
    code
}

fn end_of_string(text: &str) -> usize {
    let mut escaped = false;
    for (at, found) in text.char_indices().skip(1) {
        match found {
            '"' if !escaped => return at + 1,
            _ => escaped = found == '\\' && !escaped,
        }
    }
    text.len()
}

/// Code without its test modules: `#[cfg(test)]` and the item behind it.
fn without_tests(code: &str) -> String {
    let mut kept = String::new();
    let mut rest = code;
    while let Some(at) = rest.find("#[cfg(test)]") {
        kept.push_str(&rest[..at]);
        rest = &rest[at..];
        let end = match (rest.find('{'), rest.find(';')) {
            (Some(open), semicolon) if semicolon.is_none_or(|semicolon| open < semicolon) => matching(rest, open),
            (_, semicolon) => semicolon.map_or(rest.len(), |at| at + 1),
        };
        rest = &rest[end..];
    }
    kept + rest
}

/// The end of the braces that open at `open`.
fn matching(code: &str, open: usize) -> usize {
    let mut depth = 0usize;
    for (at, found) in code[open..].char_indices() {
        match found {
            '{' => depth += 1,
            '}' if depth == 1 => return open + at + 1,
            '}' => depth -= 1,
            _ => {}
        }
    }
    code.len()
}

/// The names right behind every `root::`, braces opened: `crate::{a::B, c}` has `a` and `c`.
fn names_behind(code: &str, root: &str) -> Vec<String> {
    let mut names = Vec::new();
    for (at, _) in code.match_indices(&format!("{root}::")) {
        let is_word = code[..at].ends_with(|last: char| last.is_alphanumeric() || last == '_' || last == ':');
        if is_word {
            continue;
        }
        let rest = &code[at + root.len() + 2..];
        if rest.starts_with('{') {
            names.extend(split_group(&rest[1..matching(rest, 0) - 1]));
        } else {
            names.push(first_name(rest));
        }
    }
    names
}

fn split_group(group: &str) -> Vec<String> {
    let mut depth = 0;
    let parts = group.split(|found| {
        match found {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        found == ',' && depth == 0
    });
    parts.map(first_name).filter(|name| !name.is_empty()).collect()
}

fn first_name(text: &str) -> String {
    text.trim_start().chars().take_while(|found| found.is_alphanumeric() || *found == '_').collect()
}

/// The module of a file, by its path from `src/`; the crate's roots have none.
fn module_of(path: &str) -> Option<&str> {
    let name = path.split('/').next()?.trim_end_matches(".rs");
    (name != "lib" && name != "main").then_some(name)
}

/// The chain of `super`s that leaves the module of a file: `super::super` for `engine/step.rs`.
fn path_to_root(path: &str) -> String {
    let depth = path.trim_end_matches("/mod.rs").split('/').count();
    vec!["super"; depth].join("::")
}

/// What is wrong with the imports of one file.
fn import_faults(path: &str, text: &str) -> Vec<String> {
    let Some(module) = module_of(path) else { return vec![] };
    let Some(row) = row_of(module) else { return vec![format!("{path}: module {module} has no row in the table")] };
    let code = code_of(text);
    let mut names = names_behind(&code, "crate");
    names.extend(names_behind(&code, "mneme"));
    names.extend(names_behind(&code, &path_to_root(path)).into_iter().filter(|name| row_of(name).is_some()));
    names.sort();
    names.dedup();
    let is_fault = |name: &String| {
        name != module && !ROOT_ITEMS.contains(&name.as_str()) && row_of(name).is_none_or(|other| other >= row)
    };
    names.into_iter().filter(is_fault).map(|name| format!("{path}: {module} imports {name}")).collect()
}

/// What else is wrong with one file.
fn form_faults(path: &str, text: &str) -> Vec<String> {
    let mut faults = Vec::new();
    if !text.starts_with("//!") {
        faults.push(format!("{path}: does not open with //!"));
    }
    if path.split('/').any(|part| VAGUE.contains(&part.trim_end_matches(".rs"))) {
        faults.push(format!("{path}: the name says nothing"));
    }
    let code = code_of(text);
    let is_unsafe = code.split(|found: char| !found.is_alphanumeric() && found != '_');
    if is_unsafe.into_iter().any(|word| word == "unsafe" || word == "unsafe_code")
        && !UNSAFE.iter().any(|allowed| path.starts_with(allowed))
    {
        faults.push(format!("{path}: unsafe code outside {UNSAFE:?}"));
    }
    let is_test = path.ends_with("tests.rs") || path.contains("/tests/");
    if !is_test && without_tests(&code).contains(".unwrap()") {
        faults.push(format!("{path}: unwrap() outside tests"));
    }
    faults
}

fn sources() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (mut folders, mut files) = (vec![root.clone()], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path: PathBuf = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(&root).unwrap().to_str().unwrap().replace('\\', "/");
                files.push((name, std::fs::read_to_string(&path).unwrap()));
            }
        }
    }
    files
}

fn faults(check: impl Fn(&str, &str) -> Vec<String>) -> String {
    let files = sources();
    assert!(files.len() > 50, "only {} files found", files.len());
    files.iter().flat_map(|(path, text)| check(path, text)).collect::<Vec<_>>().join("\n")
}

#[test]
fn modules_import_only_rows_below() {
    let faults = faults(import_faults);
    assert!(faults.is_empty(), "\n{faults}");
}

#[test]
fn files_keep_the_form() {
    let faults = faults(form_faults);
    assert!(faults.is_empty(), "\n{faults}");
}

#[test]
fn planted_imports_are_found() {
    for (path, text, wanted) in [
        ("kv/pool.rs", "use crate::engine::Engine;", 1),
        ("kv/pool.rs", "use crate::backend::DType;", 1),
        ("kv/pool.rs", "use crate::kv::BlockId;\nuse crate::{Error, Result, invalid};", 0),
        ("engine/step.rs", "use crate::{kv::BlockId, server::{Limits, routes}, models::Model};", 1),
        ("engine/step.rs", "fn f() { let x = crate::server::Limits::new(); }", 1),
        ("engine/step.rs", "use super::super::server::Limits;", 1),
        ("engine/mod.rs", "use super::{kv::BlockId, server::Limits};", 1),
        ("engine/step.rs", "use super::handle::{EngineHandle, server};", 0),
        ("engine/step.rs", "// crate::server is above\nconst TEXT: &str = \"crate::server::x\";", 0),
        ("engine/step.rs", "use crate::models::Model;\nuse crate::telemetry::EngineMetrics;", 0),
        ("models/llama.rs", "use crate::hub::resolve;", 1),
        ("models/llama.rs", "use crate::gguf::Gguf;", 0),
        ("gguf/mod.rs", "use crate::models::ModelConfig;", 1),
        ("server/mod.rs", "use mneme::cli::run;", 1),
        ("cli/serve.rs", "use mneme::{engine::Engine, server::Config};", 0),
        ("error.rs", "use crate::telemetry::EngineMetrics;", 1),
        ("novel/mod.rs", "//! A module nobody put into the table.", 1),
        ("engine/step.rs", "use crate::novel::Thing;", 1),
        ("lib.rs", "pub use crate::engine::Engine;", 0),
    ] {
        let found = import_faults(path, text);
        assert_eq!(found.len(), wanted, "{path}: {text}: {found:?}");
    }
}

#[test]
fn planted_faults_of_form_are_found() {
    for (path, text, wanted) in [
        ("engine/step.rs", "//! Fine.\nfn f() {}", 0),
        ("engine/step.rs", "use std::fmt;", 1),
        ("engine/utils.rs", "//! Names.", 1),
        ("helpers/mod.rs", "//! Names.", 1),
        ("engine/step.rs", "//! A.\nfn f() { unsafe { g() } }", 1),
        ("engine/step.rs", "//! A.\n#![allow(unsafe_code)]", 1),
        ("engine/step.rs", "//! An unsafe word.\n// unsafe\nconst A: &str = \"unsafe \\\" unsafe\";", 0),
        ("backend/cpu/simd.rs", "//! A.\nfn f() { unsafe { g() } }", 0),
        ("models/weights.rs", "//! A.\n#![allow(unsafe_code)]", 0),
        ("engine/step.rs", "//! A.\nfn f() { g().unwrap() }", 1),
        ("engine/step.rs", "//! A.\n#[cfg(test)]\nmod tests { fn f() { g().unwrap() } }", 0),
        ("engine/step.rs", "//! A.\n#[cfg(test)]\nmod tests { fn f() { g('\\'', '\"') } }\nfn h() { g().unwrap() }", 1),
        ("engine/step.rs", "//! A.\n#[cfg(test)]\nmod tests;\nfn h() { g().unwrap() }", 1),
        ("gguf/tests.rs", "//! A.\nfn f() { g().unwrap() }", 0),
        ("engine/step.rs", "//! A.\nfn f() { g(r#\"a \" .unwrap() unsafe\"#) }", 0),
    ] {
        let found = form_faults(path, text);
        assert_eq!(found.len(), wanted, "{path}: {text}: {found:?}");
    }
}
