//! The header of a MemCube: what it is, where it comes from, who may use it and how long it lives.
//!
//! A cube has an id for life and a name that can change. Its versions are immutable in what they hold; what governs it
//! (name, access, lifetime, priority) belongs to the cube and is kept in the newest version's manifest.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use uuid::Uuid;

use super::acl::{Access, Acl, Principal};
use super::label::Labels;
use super::name::{CubeName, Version};
use super::payload::Payload;
use super::timestamp::Timestamp;
use crate::{Error, Result, invalid, malformed};

/// Most parents of one cube.
pub(super) const MAX_PARENTS: usize = 64;

/// A cube's identity for life: a UUIDv7.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct CubeId(Uuid);

/// One version of a cube.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cube {
    /// The cube's identity; all versions share it.
    pub id: CubeId,
    /// Which version.
    pub version: Version,
    /// What it is called.
    pub name: CubeName,
    /// The cubes it was made from.
    pub parents: Vec<CubeId>,
    /// When the cube was made.
    pub created_at: Timestamp,
    /// When anything about it was last changed.
    pub updated_at: Timestamp,
    /// Where its content came from.
    pub origin: Origin,
    /// What its content is about.
    pub semantic_type: Option<SemanticType>,
    /// Free words beside it.
    pub tags: Labels,
    /// What governs it.
    pub governance: Governance,
    /// What this version holds.
    #[serde(serialize_with = "serialize_shared", deserialize_with = "deserialize_shared")]
    pub payload: Arc<Payload>,
}

/// Who may use a cube, how long it lives and how hard it is held on to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Governance {
    /// Whose it is.
    pub owner: Principal,
    /// Who else may use it.
    pub acl: Acl,
    /// Lifetime from the moment it was set.
    pub ttl_s: Option<u64>,
    /// When that ends.
    pub expires_at: Option<Timestamp>,
    /// How fast its heat decays.
    pub half_life_s: Option<u64>,
    /// How hard its blocks are held on to.
    pub priority: Priority,
    /// Words for what must be handled with care.
    pub sensitivity: Labels,
    /// Zero its memory when it is freed.
    pub erase_on_free: bool,
    /// Immutable, and exempt from expiry.
    pub frozen: bool,
}

/// Where a cube's content came from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// Somebody wrote it.
    #[default]
    UserInput,
    /// A model wrote it.
    Inference,
    /// It was found somewhere.
    Retrieval,
    /// It was trained.
    Finetuning,
    /// It came in a file.
    Import,
}

/// What a cube's content is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SemanticType {
    /// Instructions.
    Prompt,
    /// Something that is so.
    Fact,
    /// What somebody likes.
    Preference,
    /// A field of knowledge.
    Domain,
    /// How to do something.
    Skill,
    /// A conversation.
    Session,
}

/// How hard a cube's blocks are held on to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "PrioritySpelling", into = "PrioritySpelling")]
pub enum Priority {
    /// 0 goes first, 9 last.
    Level(PriorityLevel),
    /// Never evicted.
    Pinned,
}

/// 0 to 9.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PriorityLevel(u8);

/// A [`Priority`] as it is written: a number, or `"pinned"`.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a priority from 0 to 9 or \"pinned\"")]
enum PrioritySpelling {
    Level(u8),
    Word(PriorityWord),
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum PriorityWord {
    Pinned,
}

impl CubeId {
    /// A new one; later ones are greater.
    pub fn generate() -> Self {
        Self(Uuid::now_v7())
    }
}

impl Cube {
    /// Whether `principal` may have `access`.
    pub fn allows(&self, principal: &Principal, access: Access) -> bool {
        self.governance.acl.allows(&self.governance.owner, principal, access)
    }

    /// Whether its lifetime is over at `now`.
    pub fn has_expired(&self, now: Timestamp) -> bool {
        !self.governance.frozen && self.governance.expires_at.is_some_and(|end| end <= now)
    }
}

impl Governance {
    /// A private cube of `owner` that lives until it is deleted.
    pub fn of(owner: Principal) -> Self {
        Self {
            owner,
            acl: Acl::Private,
            ttl_s: None,
            expires_at: None,
            half_life_s: None,
            priority: Priority::default(),
            sensitivity: Labels::default(),
            erase_on_free: false,
            frozen: false,
        }
    }

    /// How hard the blocks are held on to: those of a frozen cube like those of a pinned one.
    pub fn hold(&self) -> Priority {
        if self.frozen { Priority::Pinned } else { self.priority }
    }

    /// Sets the lifetime, beginning at `now`.
    pub(super) fn start_ttl(&mut self, ttl_s: Option<u64>, now: Timestamp) {
        self.ttl_s = ttl_s;
        self.expires_at = ttl_s.map(|seconds| now.after(Duration::from_secs(seconds)));
    }
}

impl Priority {
    /// `level` from 0 to 9.
    pub fn level(level: u8) -> Result<Self> {
        match level {
            0..=9 => Ok(Self::Level(PriorityLevel(level))),
            _ => Err(invalid!("a priority is a number from 0 to 9 or \"pinned\", not {level}")),
        }
    }
}

impl PriorityLevel {
    /// The number.
    pub fn get(self) -> u8 {
        self.0
    }
}

impl Default for Priority {
    fn default() -> Self {
        Self::Level(PriorityLevel(5))
    }
}

impl TryFrom<PrioritySpelling> for Priority {
    type Error = Error;

    fn try_from(spelling: PrioritySpelling) -> Result<Self> {
        match spelling {
            PrioritySpelling::Level(level) => Self::level(level),
            PrioritySpelling::Word(PriorityWord::Pinned) => Ok(Self::Pinned),
        }
    }
}

impl From<Priority> for PrioritySpelling {
    fn from(priority: Priority) -> Self {
        match priority {
            Priority::Level(level) => Self::Level(level.0),
            Priority::Pinned => Self::Word(PriorityWord::Pinned),
        }
    }
}

impl FromStr for CubeId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let id = Uuid::try_parse(text).ok().filter(|id| id.get_version_num() == 7).map(Self);
        id.filter(|id| id.to_string() == text).ok_or_else(|| malformed!("'{text:.40}' is no cube id (a UUIDv7)"))
    }
}

impl fmt::Display for CubeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

impl From<CubeId> for String {
    fn from(id: CubeId) -> Self {
        id.to_string()
    }
}

impl TryFrom<String> for CubeId {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

fn serialize_shared<S: Serializer>(payload: &Arc<Payload>, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    payload.as_ref().serialize(serializer)
}

fn deserialize_shared<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Arc<Payload>, D::Error> {
    Payload::deserialize(deserializer).map(Arc::new)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn priorities_are_numbers_or_a_word() {
        let read = |text: &str| serde_json::from_str::<Priority>(text);
        assert_eq!(read("9").unwrap(), Priority::level(9).unwrap());
        assert_eq!(read("\"pinned\"").unwrap(), Priority::Pinned);
        assert_eq!(serde_json::to_string(&Priority::Pinned).unwrap(), "\"pinned\"");
        assert_eq!(serde_json::to_string(&Priority::default()).unwrap(), "5");
        for wrong in ["10", "-1", "\"9\"", "null", "1.5"] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn ids_have_one_spelling() {
        let id = CubeId::generate();
        assert_eq!(id.to_string().parse::<CubeId>().unwrap(), id);
        let text = id.to_string();
        for wrong in [text.to_uppercase(), text.replace('-', ""), format!("{{{text}}}"), Uuid::new_v4().to_string()] {
            assert!(wrong.parse::<CubeId>().is_err(), "{wrong}");
        }
    }
}
