//! What of a cube travels in a file: its content, what it is valid for and what describes it. Who owns it, who may use it
//! and how long it lives is decided where it arrives.

use std::io::{Read, Write};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::changes::CubeChanges;
use super::cube::{Cube, Origin, SemanticType};
use super::digest::Digest;
use super::label::Labels;
use super::name::{CubeName, Version};
use super::payload::{Activation, Binding, Blocks, Payload, Twin};
use super::timestamp::Timestamp;
use crate::kv::BlockHash;
use crate::paging::{Archive, ArchivedBlocks, BlockFormat, BlockStore, Found, PinnedBlocks, Stored, read_exact};
use crate::{Error, Result, malformed};

/// A cube as its file describes it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortableCube {
    /// What it was called.
    pub name: CubeName,
    /// Which version of it this is.
    pub version: Version,
    /// When it was made.
    pub created_at: Timestamp,
    /// Where its content came from, before it travelled.
    pub origin: Origin,
    /// What its content is about.
    pub semantic_type: Option<SemanticType>,
    /// Free words beside it.
    pub tags: Labels,
    /// Words for what must be handled with care.
    pub sensitivity: Labels,
    /// Zero its memory when it is freed.
    pub erase_on_free: bool,
    /// The text.
    pub twin: Option<Twin>,
    /// What its blocks are valid for; a cube without blocks has none.
    pub binding: Option<Binding>,
}

/// A cube on its way out of a vault, which is known to be whole.
pub struct Outgoing {
    archive: Archive,
    store: Option<Arc<BlockStore>>,
}

/// A cube on its way in: its description has been read, and its blocks follow in the reader.
pub struct Incoming<R> {
    /// What the file says.
    pub cube: PortableCube,
    blocks: Option<ArchivedBlocks>,
    reader: R,
}

impl PortableCube {
    fn of(cube: &Cube) -> Self {
        let activation = cube.payload.activation();
        Self {
            name: cube.name.clone(),
            version: cube.version,
            created_at: cube.created_at,
            origin: cube.origin,
            semantic_type: cube.semantic_type,
            tags: cube.tags.clone(),
            sensitivity: cube.governance.sensitivity.clone(),
            erase_on_free: cube.governance.erase_on_free,
            twin: cube.payload.twin().cloned(),
            binding: activation.map(|activation| activation.binding().clone()),
        }
    }

    /// What describes the cube where it arrives.
    pub fn changes(&self) -> CubeChanges {
        CubeChanges {
            semantic_type: Some(self.semantic_type),
            tags: Some(self.tags.clone()),
            sensitivity: Some(self.sensitivity.clone()),
            erase_on_free: Some(self.erase_on_free),
            ..CubeChanges::default()
        }
    }
}

impl Outgoing {
    /// A cube with its blocks in `store`, which a cube of text needs not. [`Error::Conflict`] when some are not there.
    pub fn new(cube: &Cube, store: Option<Arc<BlockStore>>) -> Result<Self> {
        if let Some(parameter) = cube.payload.parameter() {
            let (name, source) = (&cube.name, parameter.source.as_str());
            return Err(Error::Conflict(format!(
                "Cube `{name}` is an adapter, which lies in files of its own ({source}); copy those and make a cube of them."
            )));
        }
        let note = serde_json::to_string(&PortableCube::of(cube)).expect("headers have text keys only");
        let Some(activation) = cube.payload.activation() else {
            return Ok(Self { archive: Archive { note, blocks: None }, store: None });
        };
        let lost = || {
            Error::Conflict(format!("Some blocks of cube `{}` are not on disk; use it once and try again.", cube.name))
        };
        let store = store.ok_or_else(lost)?;
        let records = cube.payload.blocks().map(|hash| Some((*hash, store.digest(hash)?))).collect::<Option<Vec<_>>>();
        let (format, tokens) = (store.format().clone(), activation.token_ids().to_vec());
        let records = records.filter(|records| records.len() == tokens.len().div_ceil(format.block_size));
        let blocks = ArchivedBlocks { format, tokens, records: records.ok_or_else(lost)? };
        Ok(Self { archive: Archive { note, blocks: Some(blocks) }, store: Some(store) })
    }

    /// Bytes of the file.
    pub fn num_bytes(&self) -> Result<u64> {
        self.archive.num_bytes()
    }

    /// Writes the file, a block at a time. An error says that what was written is worth nothing.
    pub fn write(&self, out: &mut dyn Write) -> Result<()> {
        self.archive.write_header(out)?;
        let (Some(blocks), Some(store)) = (&self.archive.blocks, &self.store) else { return Ok(()) };
        let mut bytes = vec![0; blocks.format.block_bytes];
        for (number, (hash, _)) in blocks.records.iter().enumerate() {
            match store.read(hash, blocks.tokens_of(number), &mut bytes) {
                Found::Whole => blocks.check(number, &bytes)?,
                Found::Missing => return Err(Error::NotFound(format!("block {number} went away meanwhile"))),
                Found::Damaged(why) => return Err(malformed!("block {number} is damaged: {why}")),
            }
            let written = out.write_all(&bytes);
            written.map_err(|source| Error::Io { context: "cannot write the cube's file".into(), source })?;
        }
        Ok(())
    }
}

impl<R: Read> Incoming<R> {
    /// Reads what stands before the blocks. [`Error::Format`] for what is no cube's file.
    pub fn open(mut reader: R) -> Result<Self> {
        let Archive { note, blocks } = Archive::read_header(&mut reader)?;
        let cube: PortableCube =
            serde_json::from_str(&note).map_err(|e| malformed!("the cube in the file is not understood: {e}"))?;
        if cube.binding.is_some() != blocks.is_some() || (blocks.is_none() && cube.twin.is_none()) {
            return Err(malformed!("the file has neither a text nor blocks with what they are valid for"));
        }
        Ok(Self { cube, blocks, reader })
    }

    /// The tokens of its blocks.
    pub fn token_ids(&self) -> Option<&[u32]> {
        self.blocks.as_ref().map(|blocks| &blocks.tokens[..])
    }

    /// What its blocks are.
    pub fn format(&self) -> Option<&BlockFormat> {
        self.blocks.as_ref().map(|blocks| &blocks.format)
    }

    /// Stores the blocks, under names of a cache domain that only this content has: what a foreign file says that the KV of
    /// some tokens is, is believed by those who name the cube and by nobody else. They are durable when this returns, and
    /// stay at least as long as the hold on them. A cube of text has none. `namespace` keeps those apart who must not
    /// learn of each other's imports.
    ///
    /// # Errors
    /// `Format` for a damaged file, `Exhausted` when the store has no room for it, `Invalid` when the store is one for
    /// other blocks.
    pub fn store(mut self, store: &Arc<BlockStore>, namespace: &str) -> Result<(Payload, PinnedBlocks)> {
        let mut pins = PinnedBlocks::new(Arc::clone(store));
        let (Some(binding), Some(blocks)) = (self.cube.binding.take(), self.blocks.take()) else {
            return Ok((self.into_plaintext()?, pins));
        };
        let domain = domain_of(namespace, &blocks);
        let root = BlockHash::root(binding.identity.as_bytes(), domain.as_bytes());
        let (full, tail) = root.blocks_of(&blocks.tokens, blocks.format.block_size);
        let mut bytes = vec![0; blocks.format.block_bytes];
        for (number, hash) in full.iter().chain(&tail).enumerate() {
            read_exact(&mut self.reader, &mut bytes)?;
            blocks.check(number, &bytes)?;
            pins.add(*hash);
            if store.write(*hash, blocks.tokens_of(number), &bytes)? == Stored::NoRoom {
                return Err(Error::Exhausted(
                    "The vault has no room for these blocks; delete cubes, or give it more with --vault-size-bytes."
                        .into(),
                ));
            }
        }
        if self.reader.read(&mut [0]).is_ok_and(|num_bytes| num_bytes > 0) {
            return Err(malformed!("something follows the last block"));
        }
        store.seal()?;
        store.announce(pins.hashes());
        let num_bytes = blocks.num_bytes();
        let binding = Binding { domain: domain.parse()?, ..binding };
        let activation = Activation::new(self.cube.twin, binding, blocks.tokens, Blocks { full, tail, num_bytes })?;
        Ok((Payload::Activation(Box::new(activation)), pins))
    }

    /// The text alone.
    pub fn into_plaintext(self) -> Result<Payload> {
        self.cube.twin.map(Payload::Plaintext).ok_or_else(|| malformed!("the file has no text"))
    }
}

/// The same for the same content in the same namespace. No namespace has a slash in it.
fn domain_of(namespace: &str, blocks: &ArchivedBlocks) -> String {
    let mut hasher = blake3::Hasher::new_derive_key("mneme imported blocks v1");
    hasher.update(&(namespace.len() as u64).to_le_bytes()).update(namespace.as_bytes());
    for (hash, digest) in &blocks.records {
        hasher.update(hash.as_bytes()).update(digest);
    }
    format!("import/{}", Digest::from_bytes(hasher.finalize().into()))
}
