//! What each token adds to the output, as bytes.
//!
//! Byte-level vocabularies (GPT-2) spell every byte as a printable character; SentencePiece ones spell a space as
//! U+2581 and raw bytes as `<0xNN>`. Both spellings are undone here, once, when a tokenizer is built.

use crate::{Result, malformed};

/// The bytes of all tokens in one buffer.
pub(super) struct TokenBytes {
    bytes: Vec<u8>,
    /// `[vocab_size + 1]`, token `i` is `bytes[ends[i]..ends[i + 1]]`.
    ends: Vec<u32>,
}

impl TokenBytes {
    pub(super) fn with_capacity(num_tokens: usize) -> Self {
        let mut ends = Vec::with_capacity(num_tokens + 1);
        ends.push(0);
        Self { bytes: Vec::with_capacity(num_tokens * 6), ends }
    }

    pub(super) fn push(&mut self, piece: &[u8]) -> Result<()> {
        self.bytes.extend_from_slice(piece);
        let end = u32::try_from(self.bytes.len()).map_err(|_| malformed!("tokenizer: the vocabulary exceeds 4 GiB"))?;
        self.ends.push(end);
        Ok(())
    }

    pub(super) fn get(&self, id: u32) -> Option<&[u8]> {
        let id = id as usize;
        let (start, end) = (*self.ends.get(id)?, *self.ends.get(id + 1)?);
        Some(&self.bytes[start as usize..end as usize])
    }

    pub(super) fn len(&self) -> usize {
        self.ends.len() - 1
    }
}

/// How a vocabulary spells bytes.
pub(super) enum Spelling {
    /// GPT-2's table of printable characters.
    ByteLevel(Box<ByteTable>),
    /// Text with `space` for a space, and `<0xNN>` for single bytes if `byte_fallback`.
    SentencePiece { space: char, byte_fallback: bool },
}

impl Spelling {
    pub(super) fn byte_level() -> Self {
        Spelling::ByteLevel(Box::default())
    }

    /// The bytes that `token` stands for, appended to `target`.
    pub(super) fn undo(&self, token: &str, target: &mut Vec<u8>) {
        match self {
            Spelling::ByteLevel(table) => table.undo(token, target),
            Spelling::SentencePiece { space, byte_fallback } => {
                match Some(token).filter(|_| *byte_fallback).and_then(fallback_byte) {
                    Some(byte) => target.push(byte),
                    None => undo_spaces(token, *space, target),
                }
            }
        }
    }
}

fn undo_spaces(token: &str, space: char, target: &mut Vec<u8>) {
    for (index, part) in token.split(space).enumerate() {
        if index > 0 {
            target.push(b' ');
        }
        target.extend_from_slice(part.as_bytes());
    }
}

/// The byte that `<0xNN>` spells.
pub(super) fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() != 2 || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    u8::from_str_radix(digits, 16).ok()
}

/// GPT-2's mapping from characters back to bytes: printable Latin-1 stands for itself, the other 68 bytes were moved to
/// U+0100 and up, in order (Radford et al. 2019, `bytes_to_unicode`).
pub(super) struct ByteTable {
    bytes: [Option<u8>; 256 + 68],
}

impl Default for ByteTable {
    fn default() -> Self {
        let mut bytes = [None; 256 + 68];
        let mut moved = 256;
        for byte in 0..=255u8 {
            let printable = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
            let place = if printable { usize::from(byte) } else { moved };
            bytes[place] = Some(byte);
            moved += usize::from(!printable);
        }
        Self { bytes }
    }
}

impl ByteTable {
    /// A token with a character outside the table was added as plain text and stands for itself.
    fn undo(&self, token: &str, target: &mut Vec<u8>) {
        let start = target.len();
        for character in token.chars() {
            match self.bytes.get(character as usize).copied().flatten() {
                Some(byte) => target.push(byte),
                None => {
                    target.truncate(start);
                    target.extend_from_slice(token.as_bytes());
                    return;
                }
            }
        }
    }
}
