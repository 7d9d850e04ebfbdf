//! 32-byte digests as files and answers spell them: 64 lower-case hexadecimal digits.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::adapters::AdapterDigest;
use crate::kv::BlockHash;
use crate::{Error, Result, malformed};

/// A BLAKE3 digest: of weights, of a tokenizer, of a file, of an adapter.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest([u8; 32]);

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(blake3::hash(bytes).into())
    }

    /// A digest that was computed elsewhere.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

impl FromStr for Digest {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let fault = || malformed!("'{text:.70}' is no digest of 64 lower-case hexadecimal digits");
        let digits = text.as_bytes();
        let mut bytes = [0; 32];
        if digits.len() != 64 {
            return Err(fault());
        }
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            let (high, low) = (digit(pair[0]).ok_or_else(fault)?, digit(pair[1]).ok_or_else(fault)?);
            *byte = high << 4 | low;
        }
        Ok(Self(bytes))
    }
}

fn digit(character: u8) -> Option<u8> {
    match character {
        b'0'..=b'9' => Some(character - b'0'),
        b'a'..=b'f' => Some(character - b'a' + 10),
        _ => None,
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

impl TryFrom<String> for Digest {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<AdapterDigest> for Digest {
    fn from(digest: AdapterDigest) -> Self {
        Self(digest.0)
    }
}

impl From<BlockHash> for Digest {
    fn from(hash: BlockHash) -> Self {
        Self(*hash.as_bytes())
    }
}

impl From<Digest> for BlockHash {
    fn from(digest: Digest) -> Self {
        BlockHash::from_bytes(digest.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_come_back_and_nothing_else_is_read() {
        let digest = Digest::of(b"mneme");
        assert_eq!(digest.to_string().parse::<Digest>().unwrap(), digest);
        assert_eq!(Digest::from(BlockHash::from(digest)), digest);
        let text = digest.to_string();
        for wrong in ["", &text[1..], &text.to_uppercase(), &format!("{text}0"), &"\u{e9}".repeat(32), &"g".repeat(64)]
        {
            assert!(wrong.parse::<Digest>().is_err(), "{wrong}");
        }
    }
}
