//! What cubes are called: `namespace/path`, and `namespace/path@version` for one version.
//!
//! A name is a key and a piece of a URL, never a piece of a file name. It is made of lower-case letters, digits, `-`,
//! `_` and `.`; upper case is refused instead of folded, so that no two names differ by case only. `@`, `+` and `:` stay
//! free for the places that put names side by side.

use std::borrow::Borrow;
use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{Error, Result, invalid};

/// Longest name, in bytes.
const MAX_NAME_BYTES: usize = 200;
/// Longest part between two slashes, in bytes.
const MAX_PART_BYTES: usize = 64;
/// Most parts, the namespace counted.
const MAX_PARTS: usize = 8;

/// Words that end a URL behind a cube's name; a name that ended with one could not be told from a request.
const RESERVED: [&str; 22] = [
    "append", "demote", "describe", "distill", "events", "export", "fork", "freeze", "fuse", "import", "lineage",
    "merge", "pin", "promote", "rename", "restore", "search", "snapshot", "unfreeze", "unpin", "verify", "versions",
];

/// A checked name: a namespace, a slash and a path of one to seven parts.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct CubeName(String);

/// The number of a version, from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Version(NonZeroU32);

/// A cube, or one version of it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct CubeAddress {
    /// Which cube.
    pub name: CubeName,
    /// Which version; the newest when left out.
    pub version: Option<Version>,
}

impl CubeName {
    /// The whole name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What is before the first slash.
    pub fn namespace(&self) -> &str {
        self.0.split_once('/').expect("a name has a slash").0
    }

    /// What is behind the first slash.
    pub fn path(&self) -> &str {
        self.0.split_once('/').expect("a name has a slash").1
    }
}

impl Version {
    /// The first.
    pub const FIRST: Self = Self(NonZeroU32::MIN);

    /// The version with this number; `None` for 0.
    pub fn new(number: u32) -> Option<Self> {
        NonZeroU32::new(number).map(Self)
    }

    /// The number.
    pub fn get(self) -> u32 {
        self.0.get()
    }

    /// The next one; `None` when there are no more numbers.
    pub fn next(self) -> Option<Self> {
        self.0.checked_add(1).map(Self)
    }
}

impl Borrow<str> for CubeName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl From<CubeName> for CubeAddress {
    fn from(name: CubeName) -> Self {
        Self { name, version: None }
    }
}

impl FromStr for CubeName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        check(text).map_err(|fault| invalid!("'{}' is no cube name: {fault}", shown(text)))?;
        Ok(Self(text.to_owned()))
    }
}

impl FromStr for CubeAddress {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let Some((name, version)) = text.split_once('@') else {
            return Ok(Self { name: text.parse()?, version: None });
        };
        let is_number = !version.is_empty() && !version.starts_with('0') && version.bytes().all(|b| b.is_ascii_digit());
        let number = version.parse().ok().filter(|_| is_number).and_then(Version::new);
        let fault = || invalid!("'{}' is no version of a cube: expected a number from 1 behind the @", shown(version));
        Ok(Self { name: name.parse()?, version: Some(number.ok_or_else(fault)?) })
    }
}

/// What is wrong with a name.
fn check(text: &str) -> std::result::Result<(), String> {
    if text.len() > MAX_NAME_BYTES {
        return Err(format!("it has {} bytes, {MAX_NAME_BYTES} are allowed", text.len()));
    }
    let parts: Vec<&str> = text.split('/').collect();
    if !(2..=MAX_PARTS).contains(&parts.len()) {
        return Err(format!("expected namespace/path with 2 to {MAX_PARTS} parts, found {}", parts.len()));
    }
    parts.iter().try_for_each(|part| check_part(part))?;
    match parts.last().filter(|last| RESERVED.contains(last)) {
        Some(last) => Err(format!("the last part must not be '{last}', which is an action; choose another")),
        None => Ok(()),
    }
}

fn check_part(part: &str) -> std::result::Result<(), String> {
    if part.is_empty() {
        return Err("a part is empty".to_owned());
    }
    if part.len() > MAX_PART_BYTES {
        return Err(format!("a part has {} bytes, {MAX_PART_BYTES} are allowed", part.len()));
    }
    if part.bytes().any(|byte| byte.is_ascii_uppercase()) {
        return Err("names have lower-case letters only".to_owned());
    }
    let is_word = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    if let Some(wrong) = part.chars().find(|c| !c.is_ascii() || !(is_word(*c as u8) || "-_.".contains(*c))) {
        return Err(format!("{wrong:?} is not allowed; letters, digits, '-', '_' and '.' are"));
    }
    let edges = [part.as_bytes()[0], part.as_bytes()[part.len() - 1]];
    if !is_word(edges[0]) || edges[1] == b'.' {
        return Err("a part begins with a letter or a digit and does not end with '.'".to_owned());
    }
    if part.contains("..") { Err("'..' is not allowed".to_owned()) } else { Ok(()) }
}

/// Foreign text, short and without control characters.
fn shown(text: &str) -> String {
    text.chars().take(60).flat_map(char::escape_debug).collect()
}

impl fmt::Display for CubeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for CubeAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.version {
            Some(version) => write!(f, "{}@{version}", self.name),
            None => self.name.fmt(f),
        }
    }
}

impl From<CubeName> for String {
    fn from(name: CubeName) -> Self {
        name.0
    }
}

impl TryFrom<String> for CubeName {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_are_namespace_and_path() {
        let name: CubeName = "ana/notes/2026-01.md".parse().unwrap();
        assert_eq!((name.namespace(), name.path()), ("ana", "notes/2026-01.md"));
        for name in ["a/b", "0/1", "a-b_c.d/e", "a/b/c/d/e/f/g/h", &format!("{0}/{0}", "x".repeat(64))] {
            assert!(name.parse::<CubeName>().is_ok(), "{name}");
        }
    }

    #[test]
    fn names_that_escape_confuse_or_collide_are_refused() {
        let long = format!("{0}/{0}/{0}/{0}", "x".repeat(50));
        for name in [
            "",
            "a",
            "a/",
            "/a",
            "a//b",
            "../a",
            "a/..",
            "a/../b",
            "a/b..c",
            "./a",
            "a/.b",
            "a/b.",
            "A/b",
            "a/B",
            "a b/c",
            "a/b\0",
            "a/b\n",
            "a\\b/c",
            "a/b%2f",
            "a/b@1",
            "a/b+c",
            "a/b:c",
            "a/\u{e9}",
            "a/\u{202e}b",
            "a/-b",
            "a/_b",
            "a/b/c/d/e/f/g/h/i",
            "a/lineage",
            "a/b/append",
            &long,
            &format!("a/{}", "x".repeat(65)),
        ] {
            let error = name.parse::<CubeName>().unwrap_err().to_string();
            assert!(!error.contains(|c: char| c.is_control()) && error.len() < 300, "{error}");
        }
    }

    #[test]
    fn a_version_stands_behind_an_at() {
        let address: CubeAddress = "ana/profile@3".parse().unwrap();
        assert_eq!((address.name.as_str(), address.version.map(Version::get)), ("ana/profile", Some(3)));
        assert_eq!(address.to_string(), "ana/profile@3");
        for wrong in
            ["ana/profile@", "ana/profile@0", "ana/profile@01", "ana/profile@+1", "ana/profile@1@2", "a/b@4294967296"]
        {
            assert!(wrong.parse::<CubeAddress>().is_err(), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_accepted_stays_in_its_folder(text in "[ -~\\n\u{e9}]{0,40}|[a-z./]{1,12}/[a-z./]{1,12}") {
            if let Ok(name) = text.parse::<CubeName>() {
                let path = std::path::Path::new(name.as_str());
                let is_plain = |part| matches!(part, std::path::Component::Normal(_));
                prop_assert!(path.is_relative() && path.components().all(is_plain));
                prop_assert_eq!(format!("{}/{}", name.namespace(), name.path()), text);
            }
        }
    }
}
