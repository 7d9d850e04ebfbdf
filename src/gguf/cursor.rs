//! Reading little-endian fields from a byte slice whose declared lengths cannot be trusted.

use std::ops::Range;

use crate::{Error, Result, malformed};

/// A position in a GGUF header. Every read is checked against the bytes that are really there.
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, position: 0 }
    }

    pub(super) fn position(&self) -> usize {
        self.position
    }

    pub(super) fn remaining(&self) -> usize {
        self.bytes.len() - self.position
    }

    /// The range of the next `count` bytes, stepped over.
    pub(super) fn take(&mut self, count: usize, what: &str) -> Result<Range<usize>> {
        if count > self.remaining() {
            return Err(self.short(count, what));
        }
        let start = self.position;
        self.position += count;
        Ok(start..self.position)
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A count of things that take at least `least_bytes` each, refused when the file cannot hold that many.
    pub(super) fn count(&mut self, least_bytes: usize, what: &str) -> Result<usize> {
        let count = self.u64(what)?;
        let possible = self.remaining() / least_bytes;
        match usize::try_from(count) {
            Ok(count) if count <= possible => Ok(count),
            _ => Err(malformed!(
                "GGUF: {what} says {count}, but the {} bytes left hold at most {possible}; the file is cut short or damaged",
                self.remaining()
            )),
        }
    }

    /// The range of a length-prefixed string of at most `limit_bytes`.
    pub(super) fn string(&mut self, limit_bytes: usize, what: &str) -> Result<Range<usize>> {
        let length = self.count(1, what)?;
        if length > limit_bytes {
            return Err(malformed!("GGUF: {what} is {length} bytes long, the limit is {limit_bytes}"));
        }
        self.take(length, what)
    }

    /// The text of a length-prefixed string of at most `limit_bytes`.
    pub(super) fn text(&mut self, limit_bytes: usize, what: &str) -> Result<&'a str> {
        let range = self.string(limit_bytes, what)?;
        std::str::from_utf8(&self.bytes[range]).map_err(|e| malformed!("GGUF: {what} is not UTF-8: {e}"))
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let range = self.take(N, what)?;
        let mut out = [0; N];
        out.copy_from_slice(&self.bytes[range]);
        Ok(out)
    }

    fn short(&self, wanted: usize, what: &str) -> Error {
        let (position, found) = (self.position, self.remaining());
        malformed!("GGUF: {what} at byte {position} needs {wanted} bytes, found {found}; the file is cut short")
    }
}
