//! The names of blocks: by place ([`BlockId`]) and by content ([`BlockHash`]).

use std::fmt;

use crate::planted::{self, Bug};

/// A block's place in the device pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

impl BlockId {
    /// As an index into per-block arrays.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// What a full block holds: a BLAKE3 chain over token ids, rooted in everything else that decides its bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockHash([u8; 32]);

impl BlockHash {
    /// The root of a chain: `identity` names the model and the numerics, `domain` separates those who must not share.
    pub fn root(identity: &[u8], domain: &[u8]) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("mneme block chain root v1");
        let identity = if planted::is(Bug::IdentityIgnored) { b"" } else { identity };
        let domain = if planted::is(Bug::DomainIgnored) { b"" } else { domain };
        for part in [identity, domain] {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        Self(hasher.finalize().into())
    }

    /// The hash of the block that follows this one and holds `tokens`.
    pub fn child(&self, tokens: &[u32]) -> Self {
        let mut hasher = blake3::Hasher::new();
        if !planted::is(Bug::ParentIgnored) {
            hasher.update(&self.0);
        }
        for token in tokens {
            hasher.update(&token.to_le_bytes());
        }
        Self(hasher.finalize().into())
    }

    /// The hash of the `tokens` that follow and do not fill a block. No full block has it.
    pub fn tail(&self, tokens: &[u32]) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("mneme partial block v1");
        hasher.update(&self.0);
        for token in tokens {
            hasher.update(&token.to_le_bytes());
        }
        Self(hasher.finalize().into())
    }

    /// The hashes of all `tokens` that follow, in blocks of `block_size`: of the full ones, and of the partial one behind
    /// them.
    pub fn blocks_of(&self, tokens: &[u32], block_size: usize) -> (Vec<Self>, Option<Self>) {
        let blocks = tokens.chunks_exact(block_size);
        let rest = blocks.remainder();
        let full: Vec<Self> = blocks
            .scan(*self, |last, block| {
                *last = last.child(block);
                Some(*last)
            })
            .collect();
        let tail = (!rest.is_empty()).then(|| full.last().unwrap_or(self).tail(rest));
        (full, tail)
    }

    /// Where a chain goes on in another domain: nobody else's blocks follow from there.
    pub fn in_domain(&self, domain: &[u8]) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("mneme block chain domain v1");
        hasher.update(&self.0);
        hasher.update(domain);
        Self(hasher.finalize().into())
    }

    /// A hash that was written down.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, ..] = self.0;
        write!(f, "BlockHash({a:02x}{b:02x}{c:02x}{d:02x}..)")
    }
}

/// The blocks of one sequence, in order of position.
pub type BlockTable = Vec<BlockId>;
