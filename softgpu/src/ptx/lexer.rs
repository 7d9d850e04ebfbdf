//! PTX text to tokens.

use super::PtxError;

/// One token: a word (`ld.global.v4.f32`, `%r1`, `0f3F800000`), a quoted string or a punctuation mark.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Token<'a> {
    Word(&'a str),
    Text(&'a str),
    Mark(char),
}

fn is_word(c: u8) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, b'_' | b'$' | b'%' | b'.')
}

/// Splits `text` into tokens with their 1-based lines.
pub(super) fn tokens(text: &str) -> Result<Vec<(Token<'_>, u32)>, PtxError> {
    let bytes = text.as_bytes();
    let (mut at, mut line, mut out) = (0, 1, Vec::new());
    while at < bytes.len() {
        match bytes[at] {
            b'\n' => (at, line) = (at + 1, line + 1),
            c if c.is_ascii_whitespace() || c == 0 => at += 1,
            b'/' if bytes.get(at + 1) == Some(&b'/') => at += line_length(&bytes[at..]),
            b'/' if bytes.get(at + 1) == Some(&b'*') => {
                let end = text[at..].find("*/").ok_or_else(|| PtxError::new(line, "comment without end"))?;
                line += text[at..at + end].matches('\n').count() as u32;
                at += end + 2;
            }
            b'"' => {
                let end = text[at + 1..].find('"').ok_or_else(|| PtxError::new(line, "string without end"))?;
                out.push((Token::Text(&text[at + 1..at + 1 + end]), line));
                at += end + 2;
            }
            c if is_word(c) => {
                let end = at + word_length(&bytes[at..]);
                out.push((Token::Word(&text[at..end]), line));
                at = end;
            }
            c if c.is_ascii() => {
                out.push((Token::Mark(c as char), line));
                at += 1;
            }
            _ => return Err(PtxError::new(line, "character outside ASCII")),
        }
    }
    Ok(out)
}

fn line_length(bytes: &[u8]) -> usize {
    bytes.iter().position(|&c| c == b'\n').unwrap_or(bytes.len())
}

/// Length of the word at the start; `::` belongs to it (`L1::no_allocate`), a single colon ends a label.
fn word_length(bytes: &[u8]) -> usize {
    let mut n = 0;
    while n < bytes.len() {
        if is_word(bytes[n]) {
            n += 1;
        } else if bytes[n] == b':' && bytes.get(n + 1) == Some(&b':') {
            n += 2;
        } else {
            break;
        }
    }
    n
}
