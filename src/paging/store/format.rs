//! What the bytes of a segment file mean: one safetensors file of many blocks. Writes nothing itself and decides nothing.
//!
//! A segment holds one tensor, `blocks`, of bytes, shape `[num_blocks, stride]`; block `i` is the first `block_bytes` of
//! row `i`, and a row begins on a 4 KiB boundary of the file. `__metadata__` says in which layout the numbers lie, how
//! many tokens a block has, and per row its block hash, digest and token ids:
//!
//! ```json
//! {"__metadata__": {"format": "mneme.segment", "version": "1", "layout": "...", "block_size": "16",
//!                   "block_bytes": "368640", "hashes": "<64 hex digits per row>", "digests": "<the same>",
//!                   "tokens": "1 5 9;2 4"},
//!  "blocks": {"dtype": "U8", "shape": [2, 368640], "data_offsets": [0, 737280]}}
//! ```
//!
//! One tensor rather than one per block: the header stays small, and rows cannot overlap. A digest covers hash, tokens
//! and bytes, so a row answers for itself, whatever file it is found in.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use crate::kv::BlockHash;
use crate::paging::FileHandle;
use crate::{Error, Result, invalid, malformed, unsupported};

/// Blocks begin at multiples of this in a file, so that they can be mapped and read past the page cache.
pub(super) const ALIGNMENT: u64 = 4096;

/// Blocks in one segment at most: it bounds what a header costs to reserve, to read and to keep.
pub(super) const MAX_SLOTS: u32 = 1024;

const MAX_BLOCK_BYTES: usize = 1 << 30;
const MAX_BLOCK_SIZE: usize = 4096;
const MAX_LAYOUT_BYTES: usize = 1024;
const MAX_HEADER_BYTES: u64 = 64 << 20;

const LENGTH_BYTES: u64 = 8;
const HEX_BYTES: usize = 64;
const FORMAT_NAME: &str = "mneme.segment";
const VERSION: &str = "1";

/// What all blocks of a store have in common. Blocks of different formats never meet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockFormat {
    /// Bytes of a block.
    pub block_bytes: usize,
    /// Tokens of a full block.
    pub block_size: usize,
    /// How numbers lie in a block (order, types, shape), as a name that is recorded in every file and compared, never
    /// guessed.
    pub layout: String,
}

/// A BLAKE3 digest of what a block holds.
pub(super) type Digest = [u8; 32];

/// What a segment says about one row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BlockRecord {
    pub(super) hash: BlockHash,
    pub(super) digest: Digest,
    pub(super) tokens: Vec<u32>,
}

/// What a segment says about itself.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) format: BlockFormat,
    /// Bytes of the file before row 0.
    pub(super) region_bytes: u64,
    pub(super) records: Vec<BlockRecord>,
    /// Rows that the header names and the file, cut off, no longer has.
    pub(super) num_missing: usize,
}

impl BlockFormat {
    /// # Errors
    /// `Invalid` for a format that no file can have.
    pub(in crate::paging) fn check(&self) -> Result<()> {
        if self.block_bytes == 0 || self.block_bytes > MAX_BLOCK_BYTES {
            return Err(invalid!("a block has 1 to {MAX_BLOCK_BYTES} bytes, not {}", self.block_bytes));
        }
        if self.block_size == 0 || self.block_size > MAX_BLOCK_SIZE {
            return Err(invalid!("a block has 1 to {MAX_BLOCK_SIZE} tokens, not {}", self.block_size));
        }
        if self.layout.len() > MAX_LAYOUT_BYTES {
            return Err(invalid!("a layout's name has at most {MAX_LAYOUT_BYTES} bytes, not {}", self.layout.len()));
        }
        Ok(())
    }

    /// Bytes from one row to the next.
    pub(super) fn stride(&self) -> u64 {
        (self.block_bytes as u64).next_multiple_of(ALIGNMENT)
    }

    /// The folder for blocks of this format, below the store's.
    pub(super) fn folder_name(&self) -> String {
        let mut hasher = blake3::Hasher::new_derive_key("mneme block format folder v1");
        hasher.update(&(self.block_bytes as u64).to_le_bytes());
        hasher.update(&(self.block_size as u64).to_le_bytes());
        hasher.update(self.layout.as_bytes());
        format!("kv-{}", &hasher.finalize().to_hex()[..16])
    }

    /// Bytes to reserve before row 0 for the header of `num_slots` rows, whatever their tokens are.
    pub(super) fn region_bytes(&self, num_slots: u32) -> u64 {
        let digits = u32::MAX.to_string().len() + 1;
        let per_slot = 2 * HEX_BYTES + self.block_size * digits;
        // Eight numbers of at most 20 digits stand where the empty header has "0".
        let fixed = header_text(self, &[]).len() + 8 * 20;
        (LENGTH_BYTES + (fixed + per_slot * num_slots as usize) as u64).next_multiple_of(ALIGNMENT)
    }

    /// Bytes of a file with room for `num_slots` rows, all used.
    pub(super) fn file_bytes(&self, num_slots: u32) -> u64 {
        self.region_bytes(num_slots) + u64::from(num_slots) * self.stride()
    }
}

/// What must be found again for a block to be believed. Bytes of another block, file or format never have it.
pub(in crate::paging) fn digest_of(hash: &BlockHash, tokens: &[u32], bytes: &[u8]) -> Digest {
    let mut hasher = blake3::Hasher::new_derive_key("mneme segment block v1");
    hasher.update(hash.as_bytes());
    hasher.update(&(tokens.len() as u64).to_le_bytes());
    for token in tokens {
        hasher.update(&token.to_le_bytes());
    }
    hasher.update(bytes);
    hasher.finalize().into()
}

#[derive(Serialize, Deserialize)]
struct HeaderJson<'a> {
    #[serde(rename = "__metadata__", borrow)]
    metadata: MetadataJson<'a>,
    #[serde(borrow)]
    blocks: TensorJson<'a>,
}

/// Fields that a later version may lack have defaults, so that the version is what decides.
#[derive(Serialize, Deserialize)]
struct MetadataJson<'a> {
    #[serde(borrow)]
    format: Cow<'a, str>,
    #[serde(borrow)]
    version: Cow<'a, str>,
    #[serde(borrow, default)]
    layout: Cow<'a, str>,
    #[serde(borrow, default)]
    block_size: Cow<'a, str>,
    #[serde(borrow, default)]
    block_bytes: Cow<'a, str>,
    #[serde(borrow, default)]
    hashes: Cow<'a, str>,
    #[serde(borrow, default)]
    digests: Cow<'a, str>,
    #[serde(borrow, default)]
    tokens: Cow<'a, str>,
}

#[derive(Serialize, Deserialize)]
struct TensorJson<'a> {
    #[serde(borrow)]
    dtype: Cow<'a, str>,
    shape: [u64; 2],
    data_offsets: [u64; 2],
}

/// The first `region_bytes` of a segment: length, header, spaces.
pub(super) fn encode_header(format: &BlockFormat, records: &[BlockRecord], region_bytes: u64) -> Vec<u8> {
    let text = header_text(format, records);
    let header_bytes = region_bytes - LENGTH_BYTES;
    assert!(text.len() as u64 <= header_bytes, "the reserved region holds the longest header");
    let mut region = Vec::with_capacity(region_bytes as usize);
    region.extend_from_slice(&header_bytes.to_le_bytes());
    region.extend_from_slice(text.as_bytes());
    region.resize(region_bytes as usize, b' ');
    region
}

fn header_text(format: &BlockFormat, records: &[BlockRecord]) -> String {
    let (mut hashes, mut digests, mut tokens) = (String::new(), String::new(), String::new());
    for (slot, record) in records.iter().enumerate() {
        hashes.push_str(&blake3::Hash::from(*record.hash.as_bytes()).to_hex());
        digests.push_str(&blake3::Hash::from(record.digest).to_hex());
        tokens.push_str(if slot > 0 { ";" } else { "" });
        for (at, token) in record.tokens.iter().enumerate() {
            let separator = if at > 0 { " " } else { "" };
            write!(tokens, "{separator}{token}").expect("a string takes all that is written");
        }
    }
    let num_blocks = records.len() as u64;
    let header = HeaderJson {
        metadata: MetadataJson {
            format: FORMAT_NAME.into(),
            version: VERSION.into(),
            layout: format.layout.as_str().into(),
            block_size: format.block_size.to_string().into(),
            block_bytes: format.block_bytes.to_string().into(),
            hashes: hashes.into(),
            digests: digests.into(),
            tokens: tokens.into(),
        },
        blocks: TensorJson {
            dtype: "U8".into(),
            shape: [num_blocks, format.stride()],
            data_offsets: [0, num_blocks * format.stride()],
        },
    };
    serde_json::to_string(&header).expect("a header has only plain fields")
}

/// Why a file's header is of no use.
#[derive(Debug)]
pub(super) enum HeaderFault {
    /// The file could not be read.
    Io(std::io::Error),
    /// It is no segment, or a damaged one.
    Damaged(Error),
    /// It is a segment of a version this build does not know.
    Unknown(Error),
}

/// Reads the header of a segment and nothing else of it. Of a file that was cut off, the records of the rows that are
/// left.
pub(super) fn read_header(file: &dyn FileHandle) -> std::result::Result<Header, HeaderFault> {
    let file_bytes = file.num_bytes().map_err(HeaderFault::Io)?;
    let mut length = [0; LENGTH_BYTES as usize];
    let damaged = |error| HeaderFault::Damaged(error);
    if file_bytes < LENGTH_BYTES {
        return Err(damaged(malformed!("it has {file_bytes} bytes, a segment at least {LENGTH_BYTES}")));
    }
    file.read_at(&mut length, 0).map_err(HeaderFault::Io)?;
    let header_bytes = u64::from_le_bytes(length);
    if header_bytes > MAX_HEADER_BYTES.min(file_bytes - LENGTH_BYTES) {
        return Err(damaged(malformed!("its header has {header_bytes} bytes, the file {file_bytes}")));
    }
    let mut text = vec![0; header_bytes as usize];
    file.read_at(&mut text, LENGTH_BYTES).map_err(HeaderFault::Io)?;
    let mut header = parse_header(&text).map_err(|error| match error {
        Error::Unsupported(_) => HeaderFault::Unknown(error),
        _ => HeaderFault::Damaged(error),
    })?;
    let num_whole = (file_bytes - header.region_bytes) / header.format.stride();
    let num_whole = usize::try_from(num_whole).unwrap_or(usize::MAX).min(header.records.len());
    header.num_missing = header.records.len() - num_whole;
    header.records.truncate(num_whole);
    Ok(header)
}

/// # Errors
/// `Unsupported` for a version this build does not know, `Format` for anything else that is not a segment's header.
pub(super) fn parse_header(text: &[u8]) -> Result<Header> {
    let header: HeaderJson<'_> =
        serde_json::from_slice(text).map_err(|e| malformed!("its header is no segment's: {e}"))?;
    let metadata = &header.metadata;
    if metadata.format != FORMAT_NAME {
        return Err(malformed!("its format is {:?}, not {FORMAT_NAME:?}", shortened(&metadata.format)));
    }
    if metadata.version != VERSION {
        let found = shortened(&metadata.version);
        return Err(unsupported!("it is of version {found:?}, this build reads {VERSION:?}: use a newer build"));
    }
    let format = BlockFormat {
        block_bytes: parse_number(&metadata.block_bytes)?,
        block_size: parse_number(&metadata.block_size)?,
        layout: metadata.layout.clone().into_owned(),
    };
    format.check().map_err(|e| malformed!("{e}"))?;
    check_tensor(&header.blocks, &format)?;
    let region_bytes = LENGTH_BYTES + text.len() as u64;
    if !region_bytes.is_multiple_of(ALIGNMENT) {
        return Err(malformed!("its blocks begin at byte {region_bytes}, no multiple of {ALIGNMENT}"));
    }
    let records = parse_records(metadata, header.blocks.shape[0] as usize, format.block_size)?;
    Ok(Header { format, region_bytes, records, num_missing: 0 })
}

fn check_tensor(tensor: &TensorJson<'_>, format: &BlockFormat) -> Result<()> {
    let [num_blocks, stride] = tensor.shape;
    if tensor.dtype != "U8" || num_blocks > u64::from(MAX_SLOTS) || stride != format.stride() {
        let (wanted, dtype) = (format.stride(), shortened(&tensor.dtype));
        return Err(malformed!("blocks are {dtype} {:?}, wanted U8 [0..={MAX_SLOTS}, {wanted}]", tensor.shape));
    }
    if tensor.data_offsets != [0, num_blocks * stride] {
        return Err(malformed!("blocks lie at {:?}, wanted [0, {}]", tensor.data_offsets, num_blocks * stride));
    }
    Ok(())
}

fn parse_records(metadata: &MetadataJson<'_>, num_blocks: usize, block_size: usize) -> Result<Vec<BlockRecord>> {
    let hashes = parse_hex("hashes", &metadata.hashes, num_blocks)?;
    let digests = parse_hex("digests", &metadata.digests, num_blocks)?;
    let num_different = hashes.iter().collect::<HashSet<_>>().len();
    if num_different != num_blocks {
        return Err(malformed!("it has {num_blocks} blocks under {num_different} hashes"));
    }
    let mut tokens = metadata.tokens.split(';');
    let mut records = Vec::with_capacity(num_blocks);
    for (hash, digest) in hashes.into_iter().zip(digests) {
        let text = tokens.next().ok_or_else(|| malformed!("it has tokens of fewer than {num_blocks} blocks"))?;
        records.push(BlockRecord {
            hash: BlockHash::from_bytes(hash),
            digest,
            tokens: parse_tokens(text, block_size)?,
        });
    }
    if tokens.next().is_some_and(|rest| num_blocks > 0 || !rest.is_empty()) {
        return Err(malformed!("it has tokens of more than {num_blocks} blocks"));
    }
    Ok(records)
}

fn parse_hex(what: &str, text: &str, num_blocks: usize) -> Result<Vec<[u8; 32]>> {
    if text.len() != num_blocks * HEX_BYTES {
        return Err(malformed!("{what} have {} digits, wanted {}", text.len(), num_blocks * HEX_BYTES));
    }
    let parse = |digits: &[u8]| blake3::Hash::from_hex(digits).map(Into::into);
    let parsed = text.as_bytes().chunks_exact(HEX_BYTES).map(parse);
    parsed.collect::<std::result::Result<_, _>>().map_err(|e| malformed!("{what} are not hexadecimal: {e}"))
}

fn parse_tokens(text: &str, block_size: usize) -> Result<Vec<u32>> {
    let tokens = text.split(' ').take(block_size + 1).map(parse_number).collect::<Result<Vec<u32>>>()?;
    if tokens.len() > block_size {
        return Err(malformed!("a block has more than {block_size} tokens"));
    }
    Ok(tokens)
}

fn parse_number<T: std::str::FromStr>(text: &str) -> Result<T> {
    let number = if text.bytes().all(|digit| digit.is_ascii_digit()) { text.parse().ok() } else { None };
    number.ok_or_else(|| malformed!("{:?} is no number of the wanted size", shortened(text)))
}

/// Text from a file as a message may show it.
fn shortened(text: &str) -> String {
    text.chars().take(40).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;
    use crate::paging::Files;
    use crate::paging::faulty::FaultyFiles;

    fn format() -> BlockFormat {
        BlockFormat { block_bytes: 5000, block_size: 4, layout: "a \"layout\"\n".into() }
    }

    fn records(count: u32) -> Vec<BlockRecord> {
        let root = BlockHash::root(b"format", b"");
        let record = |number: u32| {
            let tokens: Vec<u32> = (0..=number % 4).map(|at| u32::MAX - number - at).collect();
            BlockRecord { hash: root.child(&[number]), digest: digest_of(&root, &tokens, b""), tokens }
        };
        (0..count).map(record).collect()
    }

    fn text(count: u32) -> String {
        let region = encode_header(&format(), &records(count), format().region_bytes(count));
        assert!(region.len().is_multiple_of(ALIGNMENT as usize));
        String::from_utf8(region[8..].to_vec()).unwrap()
    }

    #[test]
    fn a_header_reads_back() {
        for count in [0, 1, 7, MAX_SLOTS] {
            let text = text(count);
            let header = parse_header(text.as_bytes()).unwrap();
            assert_eq!(header.records, records(count));
            assert_eq!(header.format, format());
            assert_eq!(header.region_bytes, 8 + text.len() as u64);
        }
    }

    #[test]
    fn the_longest_header_fits_its_region() {
        let format = BlockFormat { layout: "\u{1}".repeat(MAX_LAYOUT_BYTES), ..format() };
        let longest = BlockRecord { tokens: vec![u32::MAX; 4], ..records(1).remove(0) };
        for count in [1, 2, 100, 1024] {
            encode_header(&format, &vec![longest.clone(); count as usize], format.region_bytes(count));
        }
    }

    #[test]
    fn hostile_headers_are_refused() {
        let good = text(3);
        let hash = blake3::Hash::from(*records(1)[0].hash.as_bytes()).to_hex();
        let other = blake3::Hash::from(*records(2)[1].hash.as_bytes()).to_hex();
        for (from, to) in [
            (r#""format":"mneme.segment""#, r#""format":"mneme.sediment""#),
            (r#""dtype":"U8""#, r#""dtype":"I8""#),
            ("[3,8192]", "[4,8192]"),
            ("[3,8192]", "[2,8192]"),
            ("[3,8192]", "[1152921504606846976,8192]"),
            ("[3,8192]", "[3,8191]"),
            ("[3,8192]", "[24576]"),
            ("[0,24576]", "[0,24575]"),
            ("[0,24576]", "[8192,24576]"),
            ("[0,24576]", "[0,-1]"),
            (r#""block_size":"4""#, r#""block_size":"0""#),
            (r#""block_size":"4""#, r#""block_size":"+4""#),
            (r#""block_size":"4""#, r#""block_size":"18446744073709551616""#),
            (r#""block_size":"4""#, r#""block_size":"2""#),
            (r#""block_bytes":"5000""#, r#""block_bytes":"9000""#),
            (r#""block_bytes":"5000""#, r#""block_bytes":"""#),
            (r#""tokens":""#, r#""tokens":"1;"#),
            (r#""tokens":""#, r#""tokens":"4294967296 "#),
            (r#""tokens":""#, r#""tokens":" "#),
            (r#""digests":""#, r#""digests":"0"#),
            (r#""hashes":""#, r#""hashes":"","hashes":""#),
            ("}}", r#"},"blocks":{"dtype":"U8","shape":[3,8192],"data_offsets":[0,24576]}}"#),
            (hash.as_str(), other.as_str()),
            (hash.as_str(), &"g".repeat(64)),
            ("}}", "}"),
            ("}}", "}} x"),
        ] {
            let bad = good.replacen(from, to, 1);
            assert_ne!(bad, good, "{from} is not there");
            // Padding keeps the alignment, so that it is not what refuses.
            let bad = format!("{:width$}", bad.trim_end(), width = good.len());
            assert!(matches!(parse_header(bad.as_bytes()), Err(Error::Format(_))), "{from} -> {to}");
        }
        assert!(parse_header(&good.as_bytes()[..good.len() - 1]).is_err(), "blocks must be aligned");
        assert!(parse_header("[".repeat(4088).as_bytes()).is_err());
        let later = good.replacen(r#""version":"1""#, r#""version":"2""#, 1);
        assert!(matches!(parse_header(later.as_bytes()), Err(Error::Unsupported(_))));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn mutated_files_are_refused_or_consistent(
            edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
            length in prop::option::of(any::<u64>()),
            num_bytes in any::<prop::sample::Index>(),
        ) {
            let (format, path) = (format(), Path::new("/segment"));
            let mut bytes = encode_header(&format, &records(3), format.region_bytes(3));
            if let Some(length) = length {
                bytes[..8].copy_from_slice(&(length >> (length % 64)).to_le_bytes());
            }
            for (at, value) in edits {
                // Most of the region is padding: edit the text before it.
                bytes[at.index(900)] = value;
            }
            bytes.resize(num_bytes.index(5 * 8192), 0);
            let files = FaultyFiles::new(0);
            files.plant(path, &bytes);
            if let Ok(header) = read_header(&*files.open(path).unwrap()) {
                let end = header.region_bytes + header.records.len() as u64 * header.format.stride();
                prop_assert!(end <= bytes.len() as u64 && header.records.len() + header.num_missing == 3);
            }
        }
    }

    #[test]
    fn a_digest_depends_on_everything() {
        let root = BlockHash::root(b"format", b"");
        let digest = digest_of(&root, &[1, 2], b"bytes");
        assert_ne!(digest, digest_of(&root.child(&[1]), &[1, 2], b"bytes"));
        assert_ne!(digest, digest_of(&root, &[1, 3], b"bytes"));
        assert_ne!(digest, digest_of(&root, &[1], b"\x02\0\0\0bytes"), "tokens and bytes do not run into each other");
        assert_ne!(digest, digest_of(&root, &[1, 2], b"bytez"));
    }
}
