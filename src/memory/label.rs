//! Short texts that describe: tags, and the names of dtypes, architectures and domains.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{Error, Result, invalid};

/// Longest label, in bytes.
const MAX_LABEL_BYTES: usize = 256;
/// Most labels of one kind on a cube.
const MAX_LABELS: usize = 64;

/// Up to 256 bytes of text without control characters.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Label(String);

/// A set of labels, sorted: at most 64.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<Label>", into = "Vec<Label>")]
pub struct Labels(Vec<Label>);

impl Label {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Labels {
    /// In order.
    pub fn iter(&self) -> impl Iterator<Item = &Label> {
        self.0.iter()
    }

    /// Whether `text` is one of them.
    pub fn has(&self, text: &str) -> bool {
        self.0.binary_search_by(|label| label.as_str().cmp(text)).is_ok()
    }
}

impl FromStr for Label {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let is_short = text.len() <= MAX_LABEL_BYTES && !text.chars().any(char::is_control);
        let fault = || invalid!("a tag or name has at most {MAX_LABEL_BYTES} bytes and no control characters");
        is_short.then(|| Self(text.to_owned())).ok_or_else(fault)
    }
}

impl TryFrom<Vec<Label>> for Labels {
    type Error = Error;

    fn try_from(mut labels: Vec<Label>) -> Result<Self> {
        labels.sort();
        labels.dedup();
        if labels.iter().any(|label| label.0.is_empty()) {
            return Err(invalid!("a tag must not be empty"));
        }
        match labels.len() {
            0..=MAX_LABELS => Ok(Self(labels)),
            len => Err(invalid!("{len} tags were given, {MAX_LABELS} are allowed")),
        }
    }
}

impl From<Labels> for Vec<Label> {
    fn from(labels: Labels) -> Self {
        labels.0
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<Label> for String {
    fn from(label: Label) -> Self {
        label.0
    }
}

impl TryFrom<String> for Label {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_short_plain_and_few() {
        let label = |text: &str| text.parse::<Label>();
        assert!(label("\u{e9}t\u{e9}").is_ok());
        assert!(label(&"x".repeat(257)).is_err() && label("a\nb").is_err());
        let labels = Labels::try_from(vec![label("b").unwrap(), label("a").unwrap(), label("b").unwrap()]).unwrap();
        assert_eq!(labels.iter().map(Label::as_str).collect::<Vec<_>>(), ["a", "b"]);
        assert!(labels.has("a") && !labels.has("c"));
        assert!(Labels::try_from(vec![label("").unwrap()]).is_err());
        assert!(Labels::try_from((0..65).map(|i| label(&i.to_string()).unwrap()).collect::<Vec<_>>()).is_err());
    }
}
