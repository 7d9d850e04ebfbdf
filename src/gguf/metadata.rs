//! The key-value part of a GGUF header: where each value lies, and typed access to it.
//!
//! Parsing records types and byte ranges only; values are decoded when asked for, so memory stays proportional to the
//! number of keys however long an array claims to be.

use std::collections::HashMap;
use std::ops::Range;

use super::cursor::Cursor;
use crate::{Error, Result, malformed};

const MAX_ENTRIES: usize = 1 << 16;
const MAX_KEY_BYTES: usize = u16::MAX as usize;
const MAX_STRING_BYTES: usize = 64 << 20;
const MAX_ARRAY_DEPTH: usize = 4;
const LEAST_ENTRY_BYTES: usize = 8 + 4 + 1;

/// The type of a metadata value, numbered as in the GGUF specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ValueType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl ValueType {
    fn from_code(code: u32, key: &str) -> Result<Self> {
        use ValueType::*;
        const ALL: [ValueType; 13] = [U8, I8, U16, I16, U32, I32, F32, Bool, String, Array, U64, I64, F64];
        let found = usize::try_from(code).ok().and_then(|index| ALL.get(index));
        found.copied().ok_or_else(|| malformed!("GGUF: {key:?} has value type {code}, known are 0 to 12"))
    }

    /// Bytes of one value, `None` for those that carry their own length.
    fn fixed_bytes(self) -> Option<usize> {
        match self {
            ValueType::U8 | ValueType::I8 | ValueType::Bool => Some(1),
            ValueType::U16 | ValueType::I16 => Some(2),
            ValueType::U32 | ValueType::I32 | ValueType::F32 => Some(4),
            ValueType::U64 | ValueType::I64 | ValueType::F64 => Some(8),
            ValueType::String | ValueType::Array => None,
        }
    }

    fn least_bytes(self) -> usize {
        match self {
            ValueType::Array => 12,
            other => other.fixed_bytes().unwrap_or(8),
        }
    }
}

/// Where one value lies. For a string `range` is its text, for an array its elements.
#[derive(Debug, Clone)]
struct Entry {
    kind: ValueType,
    element: Option<(ValueType, usize)>,
    range: Range<usize>,
}

impl Entry {
    fn describe(&self) -> String {
        match self.element {
            Some((element, length)) => format!("an array of {length} {element:?}"),
            None => format!("{:?}", self.kind),
        }
    }
}

/// The keys of a GGUF file and where their values are.
#[derive(Debug, Default)]
pub(super) struct Metadata {
    entries: HashMap<String, Entry>,
}

impl Metadata {
    pub(super) fn parse(cursor: &mut Cursor<'_>, num_entries: usize) -> Result<Self> {
        if num_entries > MAX_ENTRIES || num_entries > cursor.remaining() / LEAST_ENTRY_BYTES {
            return Err(malformed!("GGUF: {num_entries} metadata entries are more than the file can hold"));
        }
        let mut entries = HashMap::new();
        for _ in 0..num_entries {
            let key = cursor.text(MAX_KEY_BYTES, "a metadata key")?;
            let kind = ValueType::from_code(cursor.u32(key)?, key)?;
            let entry = read_entry(cursor, kind, key)?;
            if entries.insert(key.to_owned(), entry).is_some() {
                return Err(malformed!("GGUF: metadata key {key:?} occurs twice"));
            }
        }
        Ok(Self { entries })
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    pub(super) fn contains(&self, key: &str) -> bool {
        self.entries.contains_key(key)
    }

    /// The value of `key` decoded by `T`, `None` when the key is absent.
    pub(super) fn get<T: FromValue>(&self, bytes: &[u8], key: &str) -> Result<Option<T>> {
        let Some(entry) = self.entries.get(key) else { return Ok(None) };
        let wrong = || mismatch(key, T::WANTED, &entry.describe());
        if entry.kind == ValueType::Array {
            return Err(wrong());
        }
        T::from_value(entry.kind, &bytes[entry.range.clone()]).map(Some).ok_or_else(wrong)
    }

    /// The elements of the array `key` decoded by `T`, `None` when the key is absent.
    pub(super) fn get_array<T: FromValue>(&self, bytes: &[u8], key: &str) -> Result<Option<Vec<T>>> {
        let Some(entry) = self.entries.get(key) else { return Ok(None) };
        let wrong = || mismatch(key, &format!("an array of {}", T::WANTED), &entry.describe());
        let Some((element, length)) = entry.element.filter(|(kind, _)| *kind != ValueType::Array) else {
            return Err(wrong());
        };
        let payload = &bytes[entry.range.clone()];
        let mut cursor = Cursor::new(payload);
        let mut out = Vec::with_capacity(length);
        for _ in 0..length {
            let range = read_scalar(&mut cursor, element, key)?;
            out.push(T::from_value(element, &payload[range]).ok_or_else(wrong)?);
        }
        Ok(Some(out))
    }
}

fn mismatch(key: &str, wanted: &str, found: &str) -> Error {
    malformed!("GGUF: {key:?} should be {wanted}, found {found}")
}

fn read_entry(cursor: &mut Cursor<'_>, kind: ValueType, key: &str) -> Result<Entry> {
    if kind != ValueType::Array {
        return Ok(Entry { kind, element: None, range: read_scalar(cursor, kind, key)? });
    }
    let (element, length) = read_array_head(cursor, key)?;
    let start = cursor.position();
    skip_elements(cursor, element, length, key, 1)?;
    Ok(Entry { kind, element: Some((element, length)), range: start..cursor.position() })
}

fn read_scalar(cursor: &mut Cursor<'_>, kind: ValueType, key: &str) -> Result<Range<usize>> {
    match kind.fixed_bytes() {
        Some(count) => cursor.take(count, key),
        None => cursor.string(MAX_STRING_BYTES, key),
    }
}

fn read_array_head(cursor: &mut Cursor<'_>, key: &str) -> Result<(ValueType, usize)> {
    let element = ValueType::from_code(cursor.u32(key)?, key)?;
    let length = cursor.count(element.least_bytes(), key)?;
    Ok((element, length))
}

fn skip_elements(cursor: &mut Cursor<'_>, element: ValueType, length: usize, key: &str, depth: usize) -> Result<()> {
    if let Some(count) = element.fixed_bytes() {
        let total = count.checked_mul(length).ok_or_else(|| malformed!("GGUF: array {key:?} overflows"))?;
        return cursor.take(total, key).map(drop);
    }
    if depth > MAX_ARRAY_DEPTH {
        return Err(malformed!("GGUF: {key:?} nests arrays deeper than {MAX_ARRAY_DEPTH}"));
    }
    for _ in 0..length {
        if element == ValueType::String {
            cursor.string(MAX_STRING_BYTES, key)?;
        } else {
            let (inner, inner_length) = read_array_head(cursor, key)?;
            skip_elements(cursor, inner, inner_length, key, depth + 1)?;
        }
    }
    Ok(())
}

/// A Rust type that metadata values can be read as. Integers convert between widths when the value fits.
pub(super) trait FromValue: Sized {
    /// How an error names the type.
    const WANTED: &'static str;
    /// Decodes `bytes`; `None` when the stored type or value does not fit.
    fn from_value(kind: ValueType, bytes: &[u8]) -> Option<Self>;
}

impl FromValue for u32 {
    const WANTED: &'static str = "a 32-bit unsigned integer";
    fn from_value(kind: ValueType, bytes: &[u8]) -> Option<Self> {
        integer(kind, bytes)?.try_into().ok()
    }
}

impl FromValue for i32 {
    const WANTED: &'static str = "a 32-bit integer";
    fn from_value(kind: ValueType, bytes: &[u8]) -> Option<Self> {
        integer(kind, bytes)?.try_into().ok()
    }
}

impl FromValue for u64 {
    const WANTED: &'static str = "a 64-bit unsigned integer";
    fn from_value(kind: ValueType, bytes: &[u8]) -> Option<Self> {
        integer(kind, bytes)?.try_into().ok()
    }
}

impl FromValue for f32 {
    const WANTED: &'static str = "a floating-point number";
    fn from_value(kind: ValueType, bytes: &[u8]) -> Option<Self> {
        match kind {
            ValueType::F32 => Some(f32::from_le_bytes(bytes.try_into().ok()?)),
            ValueType::F64 => Some(f64::from_le_bytes(bytes.try_into().ok()?) as f32),
            _ => None,
        }
    }
}

impl FromValue for bool {
    const WANTED: &'static str = "a boolean";
    fn from_value(kind: ValueType, bytes: &[u8]) -> Option<Self> {
        match (kind, bytes) {
            (ValueType::Bool, [0]) => Some(false),
            (ValueType::Bool, [1]) => Some(true),
            _ => None,
        }
    }
}

impl FromValue for String {
    const WANTED: &'static str = "UTF-8 text";
    fn from_value(kind: ValueType, bytes: &[u8]) -> Option<Self> {
        if kind != ValueType::String {
            return None;
        }
        std::str::from_utf8(bytes).ok().map(str::to_owned)
    }
}

fn integer(kind: ValueType, bytes: &[u8]) -> Option<i128> {
    Some(match kind {
        ValueType::U8 => u8::from_le_bytes(bytes.try_into().ok()?).into(),
        ValueType::I8 => i8::from_le_bytes(bytes.try_into().ok()?).into(),
        ValueType::U16 => u16::from_le_bytes(bytes.try_into().ok()?).into(),
        ValueType::I16 => i16::from_le_bytes(bytes.try_into().ok()?).into(),
        ValueType::U32 => u32::from_le_bytes(bytes.try_into().ok()?).into(),
        ValueType::I32 => i32::from_le_bytes(bytes.try_into().ok()?).into(),
        ValueType::U64 => u64::from_le_bytes(bytes.try_into().ok()?).into(),
        ValueType::I64 => i64::from_le_bytes(bytes.try_into().ok()?).into(),
        _ => return None,
    })
}
