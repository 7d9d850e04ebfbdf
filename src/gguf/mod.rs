//! Reading GGUF (versions 2 and 3, little-endian) from bytes that may be hostile.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>. Nothing is allocated by a declared length
//! before that length was compared with the bytes that are there. Opening and reading the file is left to who loads
//! weights or adapters; so is the meaning of keys and tensor names.

mod cursor;
mod metadata;
mod tensors;
mod vocabulary;
#[cfg(test)]
pub(crate) mod writer;

use std::collections::HashMap;

use self::cursor::Cursor;
use self::metadata::{FromValue, Metadata};
pub use self::tensors::TensorInfo;
use crate::backend::{HostTensor, SharedBytes};
use crate::{Result, malformed, unsupported};

const MAGIC: u32 = u32::from_le_bytes(*b"GGUF");
const DEFAULT_ALIGNMENT: u32 = 32;
const MAX_ALIGNMENT: u32 = 1 << 20;

/// A GGUF file: its metadata, and its tensors as views into the bytes.
pub struct Gguf {
    bytes: SharedBytes,
    version: u32,
    alignment: usize,
    metadata: Metadata,
    tensors: HashMap<String, TensorInfo>,
}

/// Generates `get_x` (the key must be there) and `find_x` (`None` when it is not) for one type.
macro_rules! getters {
    ($($get:ident, $find:ident, $get_array:ident, $find_array:ident: $type:ty;)*) => {$(
        #[doc = concat!("The value of `key` as `", stringify!($type), "`; an error when absent or of another type.")]
        pub fn $get(&self, key: &str) -> Result<$type> {
            self.require(key, self.$find(key)?)
        }

        #[doc = concat!("The value of `key` as `", stringify!($type), "`, `None` when absent.")]
        pub fn $find(&self, key: &str) -> Result<Option<$type>> {
            self.metadata.get(self.bytes(), key)
        }

        #[doc = concat!("The array `key` of `", stringify!($type), "`; an error when absent or of another type.")]
        pub fn $get_array(&self, key: &str) -> Result<Vec<$type>> {
            self.require(key, self.$find_array(key)?)
        }

        #[doc = concat!("The array `key` of `", stringify!($type), "`, `None` when absent.")]
        pub fn $find_array(&self, key: &str) -> Result<Option<Vec<$type>>> {
            self.metadata.get_array(self.bytes(), key)
        }
    )*};
}

impl Gguf {
    /// Parses the header in `bytes`, which are the whole file. Errors say what is wrong and where.
    pub fn parse(bytes: SharedBytes) -> Result<Self> {
        let file = (*bytes).as_ref();
        let mut cursor = Cursor::new(file);
        let version = read_version(&mut cursor)?;
        let num_tensors = cursor.count(1, "the number of tensors")?;
        let num_entries = cursor.count(1, "the number of metadata entries")?;
        let metadata = Metadata::parse(&mut cursor, num_entries)?;
        let mut tensors = tensors::parse(&mut cursor, num_tensors)?;
        let alignment = read_alignment(&metadata, file)?;
        let data_start = cursor.position().next_multiple_of(alignment);
        tensors::place(&mut tensors, data_start, alignment, file.len())?;
        Ok(Self { version, alignment, metadata, tensors, bytes })
    }

    /// The format version, 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Bytes that tensor data is aligned to.
    pub fn alignment(&self) -> usize {
        self.alignment
    }

    /// All metadata keys, in no particular order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.metadata.keys()
    }

    /// Whether the metadata has `key`, of whatever type.
    pub fn contains_key(&self, key: &str) -> bool {
        self.metadata.contains(key)
    }

    getters! {
        get_u32, find_u32, get_u32_array, find_u32_array: u32;
        get_i32, find_i32, get_i32_array, find_i32_array: i32;
        get_u64, find_u64, get_u64_array, find_u64_array: u64;
        get_f32, find_f32, get_f32_array, find_f32_array: f32;
        get_bool, find_bool, get_bool_array, find_bool_array: bool;
        get_str, find_str, get_str_array, find_str_array: String;
    }

    /// All tensors with their names, in no particular order.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &TensorInfo)> {
        self.tensors.iter().map(|(name, info)| (name.as_str(), info))
    }

    /// Shape, type and place of tensor `name`, if the file has it.
    pub fn tensor_info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// Tensor `name` as `[rows, columns]`: ggml's first extent is the columns, all others together the rows.
    pub fn tensor(&self, name: &str) -> Result<HostTensor> {
        let info = self.tensors.get(name).ok_or_else(|| {
            malformed!(
                "GGUF: no tensor named {name:?} among {}; this is not the model it claims to be",
                self.tensors.len()
            )
        })?;
        let source = self.bytes.clone();
        HostTensor::new(name, source, info.range.clone(), info.dtype, info.rows(), info.columns())
    }

    /// The whole file.
    pub(crate) fn shared_bytes(&self) -> &SharedBytes {
        &self.bytes
    }

    fn bytes(&self) -> &[u8] {
        (*self.bytes).as_ref()
    }

    fn require<T: Wanted>(&self, key: &str, found: Option<T>) -> Result<T> {
        found.ok_or_else(|| malformed!("GGUF: metadata key {key:?} is missing, wanted {}", T::wanted()))
    }
}

/// How an error names the type of a missing value.
trait Wanted {
    fn wanted() -> String;
}

impl<T: FromValue> Wanted for T {
    fn wanted() -> String {
        T::WANTED.to_owned()
    }
}

impl<T: FromValue> Wanted for Vec<T> {
    fn wanted() -> String {
        format!("an array of {}", T::WANTED)
    }
}

fn read_version(cursor: &mut Cursor<'_>) -> Result<u32> {
    let magic = cursor.u32("the magic number")?;
    if magic != MAGIC {
        return Err(malformed!("not a GGUF file: it starts with {:?}, wanted \"GGUF\"", magic.to_le_bytes()));
    }
    match cursor.u32("the version")? {
        version @ (2 | 3) => Ok(version),
        version if matches!(version.swap_bytes(), 1..=3) => {
            Err(unsupported!("GGUF: the file is big-endian; convert it to little-endian"))
        }
        version => Err(unsupported!("GGUF: version {version} is not supported, wanted 2 or 3")),
    }
}

fn read_alignment(metadata: &Metadata, file: &[u8]) -> Result<usize> {
    let alignment = metadata.get::<u32>(file, "general.alignment")?.unwrap_or(DEFAULT_ALIGNMENT);
    if !alignment.is_power_of_two() || alignment > MAX_ALIGNMENT {
        return Err(malformed!("GGUF: general.alignment is {alignment}, wanted a power of two up to {MAX_ALIGNMENT}"));
    }
    Ok(alignment as usize)
}

#[cfg(test)]
mod tests;
