//! A portable file of KV blocks: one safetensors file that says all that is needed to believe the blocks somewhere else.
//! Decides nothing, and opens no file: whoever has a reader or a writer brings it.
//!
//! ```json
//! {"__metadata__": {"format": "mneme.cube", "version": "1", "digest": "<BLAKE3 of the other fields>", "note": "...",
//!                   "layout": "...", "block_size": "16", "block_bytes": "368640", "tokens": "1 5 9 2 4",
//!                   "hashes": "<64 hex digits per block>", "digests": "<the same>"},
//!  "blocks": {"dtype": "U8", "shape": [2, 368640], "data_offsets": [0, 737280]}}
//! ```
//!
//! The blocks follow in order of position, the last one possibly of fewer tokens. `note` is a text of whoever writes the
//! file. Without blocks there is the note alone, and no tensor. The digests are those of segments, over hash, tokens and
//! bytes.

use std::borrow::Cow;
use std::io::{Read, Write};

use serde::{Deserialize, Serialize};

use super::store::{BlockFormat, block_digest};
use crate::kv::BlockHash;
use crate::{Error, Result, invalid, malformed, unsupported};

const FORMAT_NAME: &str = "mneme.cube";
const VERSION: &str = "1";
const LENGTH_BYTES: usize = 8;
const HEX_BYTES: usize = 64;

/// Bytes of a header at most, the note included.
pub const MAX_HEADER_BYTES: usize = 64 << 20;

/// What a file says before its blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Archive {
    /// Whatever its writer wants its reader to know.
    pub note: String,
    /// What blocks follow.
    pub blocks: Option<ArchivedBlocks>,
}

/// What a file says about its blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArchivedBlocks {
    /// Of every block.
    pub format: BlockFormat,
    /// Of all blocks, in order of position.
    pub tokens: Vec<u32>,
    /// Name and digest of each block.
    pub records: Vec<(BlockHash, [u8; 32])>,
}

#[derive(Serialize, Deserialize)]
struct HeaderJson<'a> {
    #[serde(rename = "__metadata__", borrow)]
    metadata: MetadataJson<'a>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    blocks: Option<TensorJson<'a>>,
}

/// Fields that a later version may lack have defaults, so that the version is what decides.
#[derive(Serialize, Deserialize)]
struct MetadataJson<'a> {
    #[serde(borrow)]
    format: Cow<'a, str>,
    #[serde(borrow)]
    version: Cow<'a, str>,
    #[serde(borrow, default)]
    digest: Cow<'a, str>,
    #[serde(borrow, default)]
    note: Cow<'a, str>,
    #[serde(borrow, default)]
    layout: Cow<'a, str>,
    #[serde(borrow, default)]
    block_size: Cow<'a, str>,
    #[serde(borrow, default)]
    block_bytes: Cow<'a, str>,
    #[serde(borrow, default)]
    tokens: Cow<'a, str>,
    #[serde(borrow, default)]
    hashes: Cow<'a, str>,
    #[serde(borrow, default)]
    digests: Cow<'a, str>,
}

#[derive(Serialize, Deserialize)]
struct TensorJson<'a> {
    #[serde(borrow)]
    dtype: Cow<'a, str>,
    shape: [u64; 2],
    data_offsets: [u64; 2],
}

impl MetadataJson<'_> {
    /// Of all other fields, each with its length.
    fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new_derive_key("mneme cube file v1");
        let Self { note, layout, block_size, block_bytes, tokens, hashes, digests, .. } = self;
        for field in [note, layout, block_size, block_bytes, tokens, hashes, digests] {
            hasher.update(&(field.len() as u64).to_le_bytes()).update(field.as_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }
}

impl ArchivedBlocks {
    /// The tokens of a block.
    pub fn tokens_of(&self, block: usize) -> &[u32] {
        let start = block * self.format.block_size;
        &self.tokens[start..self.tokens.len().min(start + self.format.block_size)]
    }

    /// Whether `bytes` are those of a block.
    ///
    /// # Errors
    /// `Format` when they are not.
    pub fn check(&self, block: usize, bytes: &[u8]) -> Result<()> {
        let (hash, digest) = &self.records[block];
        match block_digest(hash, self.tokens_of(block), bytes) == *digest {
            true => Ok(()),
            false => Err(malformed!("block {block} of the file is damaged: its digest is wrong")),
        }
    }

    /// Bytes of all blocks.
    pub fn num_bytes(&self) -> u64 {
        self.records.len() as u64 * self.format.block_bytes as u64
    }

    /// # Errors
    /// `Invalid` for a format that cannot be, and unless there is a block for all tokens.
    fn check_counts(&self) -> Result<()> {
        self.format.check()?;
        let num_wanted = self.tokens.len().div_ceil(self.format.block_size);
        if self.tokens.is_empty() || self.records.len() != num_wanted {
            let (num_tokens, num_blocks) = (self.tokens.len(), self.records.len());
            return Err(invalid!("{num_tokens} tokens have {num_wanted} blocks, not {num_blocks}"));
        }
        Ok(())
    }
}

impl Archive {
    /// Writes all that stands before the blocks.
    ///
    /// # Errors
    /// `Invalid` when it is longer than any reader takes, `Io` when it cannot be written.
    pub fn write_header(&self, out: &mut dyn Write) -> Result<()> {
        let header = self.encode()?;
        out.write_all(&header).map_err(|source| Error::Io { context: "cannot write the cube's file".into(), source })
    }

    /// Bytes of the whole file.
    ///
    /// # Errors
    /// As [`Archive::write_header`].
    pub fn num_bytes(&self) -> Result<u64> {
        Ok(self.encode()?.len() as u64 + self.blocks.as_ref().map_or(0, ArchivedBlocks::num_bytes))
    }

    fn encode(&self) -> Result<Vec<u8>> {
        if let Some(blocks) = &self.blocks {
            blocks.check_counts()?;
        }
        let mut text = serde_json::to_vec(&self.json()).expect("a header has only plain fields");
        // Numbers behind the header begin at multiples of eight.
        text.resize(text.len().next_multiple_of(LENGTH_BYTES), b' ');
        if text.len() > MAX_HEADER_BYTES {
            return Err(invalid!(
                "the cube takes {} bytes beside its blocks, {MAX_HEADER_BYTES} are allowed",
                text.len()
            ));
        }
        Ok([&(text.len() as u64).to_le_bytes()[..], &text].concat())
    }

    fn json(&self) -> HeaderJson<'_> {
        let hex = |bytes: &[u8; 32]| blake3::Hash::from(*bytes).to_hex().to_string();
        let mut metadata = MetadataJson {
            format: FORMAT_NAME.into(),
            version: VERSION.into(),
            digest: Cow::default(),
            note: self.note.as_str().into(),
            layout: Cow::default(),
            block_size: Cow::default(),
            block_bytes: Cow::default(),
            tokens: Cow::default(),
            hashes: Cow::default(),
            digests: Cow::default(),
        };
        if let Some(ArchivedBlocks { format, tokens, records }) = &self.blocks {
            metadata.layout = format.layout.as_str().into();
            metadata.block_size = format.block_size.to_string().into();
            metadata.block_bytes = format.block_bytes.to_string().into();
            metadata.tokens = tokens.iter().map(u32::to_string).collect::<Vec<_>>().join(" ").into();
            metadata.hashes = records.iter().map(|(hash, _)| hex(hash.as_bytes())).collect::<String>().into();
            metadata.digests = records.iter().map(|(_, digest)| hex(digest)).collect::<String>().into();
        }
        metadata.digest = metadata.digest().into();
        let blocks = self.blocks.as_ref().map(|blocks| TensorJson {
            dtype: "U8".into(),
            shape: [blocks.records.len() as u64, blocks.format.block_bytes as u64],
            data_offsets: [0, blocks.num_bytes()],
        });
        HeaderJson { metadata, blocks }
    }

    /// Reads all that stands before the blocks, and nothing else.
    ///
    /// # Errors
    /// `Format` for what is no such file or a damaged one, `Unsupported` for one of a newer version, `Io` when it cannot
    /// be read.
    pub fn read_header(reader: &mut dyn Read) -> Result<Self> {
        let mut length = [0; LENGTH_BYTES];
        read_exact(reader, &mut length)?;
        let num_bytes = usize::try_from(u64::from_le_bytes(length)).unwrap_or(usize::MAX);
        if num_bytes > MAX_HEADER_BYTES {
            return Err(malformed!("its header has {num_bytes} bytes, a cube's at most {MAX_HEADER_BYTES}"));
        }
        let mut text = Vec::new();
        let read = reader.take(num_bytes as u64).read_to_end(&mut text);
        read.map_err(|source| Error::Io { context: "cannot read the cube's file".into(), source })?;
        if text.len() < num_bytes {
            return Err(cut_off());
        }
        Self::parse(&text)
    }

    fn parse(text: &[u8]) -> Result<Self> {
        let header: HeaderJson<'_> =
            serde_json::from_slice(text).map_err(|e| malformed!("it is no cube's file: {e}"))?;
        let metadata = &header.metadata;
        if metadata.format != FORMAT_NAME {
            return Err(malformed!("its format is {:?}, not {FORMAT_NAME:?}", shortened(&metadata.format)));
        }
        if metadata.version != VERSION {
            let found = shortened(&metadata.version);
            return Err(unsupported!("it is of version {found:?}, this build reads {VERSION:?}: use a newer build"));
        }
        if metadata.digest != metadata.digest() {
            return Err(malformed!("its header is damaged: the digest is wrong"));
        }
        if header.blocks.is_none() && !metadata.hashes.is_empty() {
            return Err(malformed!("it names blocks and has none"));
        }
        let blocks = header.blocks.as_ref().map(|tensor| parse_blocks(metadata, tensor)).transpose()?;
        Ok(Self { note: metadata.note.clone().into_owned(), blocks })
    }
}

fn parse_blocks(metadata: &MetadataJson<'_>, tensor: &TensorJson<'_>) -> Result<ArchivedBlocks> {
    let format = BlockFormat {
        block_bytes: parse_number(&metadata.block_bytes)?,
        block_size: parse_number(&metadata.block_size)?,
        layout: metadata.layout.clone().into_owned(),
    };
    let tokens = metadata.tokens.split(' ').map(parse_number).collect::<Result<Vec<u32>>>()?;
    let (hashes, digests) = (parse_hex("hashes", &metadata.hashes)?, parse_hex("digests", &metadata.digests)?);
    if hashes.len() != digests.len() {
        return Err(malformed!("it has {} hashes and {} digests", hashes.len(), digests.len()));
    }
    let records = hashes.into_iter().map(BlockHash::from_bytes).zip(digests).collect();
    let blocks = ArchivedBlocks { format, tokens, records };
    blocks.check_counts().map_err(|e| malformed!("{e}"))?;
    let shape = [blocks.records.len() as u64, blocks.format.block_bytes as u64];
    if tensor.dtype != "U8" || tensor.shape != shape || tensor.data_offsets != [0, blocks.num_bytes()] {
        let (dtype, found, offsets) = (shortened(&tensor.dtype), tensor.shape, tensor.data_offsets);
        return Err(malformed!("blocks are {dtype} {found:?} at {offsets:?}, wanted U8 {shape:?} from 0 on"));
    }
    Ok(blocks)
}

fn parse_hex(what: &str, text: &str) -> Result<Vec<[u8; 32]>> {
    if !text.len().is_multiple_of(HEX_BYTES) {
        return Err(malformed!("{what} have {} digits, no multiple of {HEX_BYTES}", text.len()));
    }
    let parse = |digits: &[u8]| blake3::Hash::from_hex(digits).map(Into::into);
    let parsed = text.as_bytes().chunks_exact(HEX_BYTES).map(parse);
    parsed.collect::<std::result::Result<_, _>>().map_err(|e| malformed!("{what} are not hexadecimal: {e}"))
}

fn parse_number<T: std::str::FromStr>(text: &str) -> Result<T> {
    let number = if text.bytes().all(|digit| digit.is_ascii_digit()) { text.parse().ok() } else { None };
    number.ok_or_else(|| malformed!("{:?} is no number of the wanted size", shortened(text)))
}

/// Fills `bytes` with what follows in the file.
///
/// # Errors
/// `Format` when the file ends before, `Io` when it cannot be read.
pub fn read_exact(reader: &mut dyn Read, bytes: &mut [u8]) -> Result<()> {
    reader.read_exact(bytes).map_err(|source| match source.kind() {
        std::io::ErrorKind::UnexpectedEof => cut_off(),
        _ => Error::Io { context: "cannot read the cube's file".into(), source },
    })
}

fn cut_off() -> Error {
    malformed!("the file ends too early")
}

/// Text from a file as a message may show it.
fn shortened(text: &str) -> String {
    text.chars().take(40).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample() -> Archive {
        let format = BlockFormat { block_bytes: 24, block_size: 4, layout: "test \"1\"".into() };
        let tokens = vec![1, 5, 9, 70_000, 2, 4];
        let root = BlockHash::root(b"model", b"team");
        let (full, tail) = root.blocks_of(&tokens, 4);
        let blocks = full.into_iter().chain(tail).enumerate();
        let record = |(at, hash): (usize, BlockHash)| {
            (hash, block_digest(&hash, &tokens[at * 4..tokens.len().min(at * 4 + 4)], &bytes(at)))
        };
        let records = blocks.map(record).collect();
        Archive { note: "{\"name\":\"ana/a\"}".into(), blocks: Some(ArchivedBlocks { format, tokens, records }) }
    }

    fn bytes(block: usize) -> Vec<u8> {
        vec![block as u8 + 1; 24]
    }

    fn encoded(archive: &Archive) -> Vec<u8> {
        let mut out = Vec::new();
        archive.write_header(&mut out).unwrap();
        out
    }

    #[test]
    fn what_was_written_is_read() {
        for archive in [sample(), Archive { note: "text alone".into(), blocks: None }] {
            let file = encoded(&archive);
            assert!(file.len().is_multiple_of(8));
            let read = Archive::read_header(&mut &file[..]).unwrap();
            assert_eq!(read, archive);
            assert_eq!(read.num_bytes().unwrap(), file.len() as u64 + if archive.blocks.is_some() { 48 } else { 0 });
            if let Some(blocks) = &read.blocks {
                assert!(blocks.check(0, &bytes(0)).is_ok() && blocks.check(1, &bytes(1)).is_ok());
                assert!(blocks.check(0, &bytes(1)).is_err());
            }
        }
    }

    /// Any safetensors reader finds the blocks.
    #[test]
    fn it_is_a_safetensors_file() {
        let archive = sample();
        let file = [encoded(&archive), bytes(0), bytes(1)].concat();
        let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
        let blocks = tensors.tensor("blocks").unwrap();
        assert_eq!((blocks.shape(), blocks.data()), (&[2, 24][..], &[bytes(0), bytes(1)].concat()[..]));
        let alone = encoded(&Archive { note: "text".into(), blocks: None });
        assert!(safetensors::SafeTensors::deserialize(&alone).unwrap().is_empty());
    }

    #[test]
    fn every_flipped_bit_of_a_header_is_noticed() {
        let file = encoded(&sample());
        for bit in 0..8 * file.len() {
            let mut damaged = file.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let read = Archive::read_header(&mut &damaged[..]);
            // Spaces at the end mean nothing.
            assert!(read.is_err() || read.unwrap() == sample(), "bit {bit}");
        }
        for len in 0..file.len() {
            assert!(matches!(Archive::read_header(&mut &file[..len]), Err(Error::Format(_))), "{len} bytes");
        }
    }

    #[test]
    fn counts_that_cannot_be_are_refused() {
        let changes: [fn(&mut ArchivedBlocks); 5] = [
            |blocks| blocks.records.truncate(1),
            |blocks| blocks.tokens.clear(),
            |blocks| blocks.format.block_bytes = usize::MAX,
            |blocks| blocks.format.block_size = 0,
            |blocks| blocks.records.push(blocks.records[0]),
        ];
        for change in changes {
            let mut archive = sample();
            change(archive.blocks.as_mut().unwrap());
            assert!(archive.write_header(&mut Vec::new()).is_err());
            // As somebody else might have written it.
            let text = serde_json::to_vec(&archive_json(&archive)).unwrap();
            assert!(Archive::parse(&text).is_err());
        }
        let long = [&u64::MAX.to_le_bytes()[..], b"{}"].concat();
        assert!(Archive::read_header(&mut &long[..]).is_err());
    }

    /// Without the overflow that a size from a hostile file would make here.
    fn archive_json(archive: &Archive) -> serde_json::Value {
        let mut safe = archive.clone();
        let blocks = safe.blocks.as_mut().unwrap();
        blocks.format.block_bytes = blocks.format.block_bytes.min(1 << 40);
        serde_json::to_value(safe.json()).unwrap()
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..400), len in 0..400u64) {
            let _ = Archive::parse(&bytes);
            let _ = Archive::read_header(&mut &[&len.to_le_bytes()[..], &bytes].concat()[..]);
        }
    }
}
