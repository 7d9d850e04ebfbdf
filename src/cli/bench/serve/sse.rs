//! Server-sent events (WHATWG HTML, 9.2) as far as OpenAI's APIs use them: the `data` of each event.

/// A longer line is no chunk of text.
const MAX_LINE_BYTES: usize = 4 << 20;

/// Puts lines together from pieces of a body.
#[derive(Default)]
pub(super) struct SseDecoder {
    line: Vec<u8>,
}

impl SseDecoder {
    /// Hands the value of every `data:` line that is now complete to `on_data`.
    pub(super) fn push(
        &mut self,
        bytes: &[u8],
        mut on_data: impl FnMut(&str) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            anyhow::ensure!(self.line.len() + piece.len() <= MAX_LINE_BYTES, "the server sent a line without end");
            self.line.extend_from_slice(piece);
            if piece.ends_with(b"\n") {
                if let Some(data) = data_of(&self.line)? {
                    on_data(data)?;
                }
                self.line.clear();
            }
        }
        Ok(())
    }
}

/// The value of a `data:` line; other lines (comments, names, separators) carry nothing.
fn data_of(line: &[u8]) -> anyhow::Result<Option<&str>> {
    let line = std::str::from_utf8(line).map_err(|_| anyhow::anyhow!("the server sent a line that is not UTF-8"))?;
    let data = line.trim_end_matches(['\n', '\r']).strip_prefix("data:");
    Ok(data.map(|data| data.strip_prefix(' ').unwrap_or(data)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_make_lines() {
        let body = ": keep-alive\n\ndata: {\"a\":1}\r\n\r\nevent: x\ndata:{\"b\":\"\u{e9}\"}\n\ndata: [DONE]\n\n";
        for size in [1, 2, 3, 7, body.len()] {
            let (mut decoder, mut found) = (SseDecoder::default(), Vec::new());
            for piece in body.as_bytes().chunks(size) {
                let keep = |data: &str| {
                    found.push(data.to_owned());
                    Ok(())
                };
                decoder.push(piece, keep).unwrap();
            }
            assert_eq!(found, ["{\"a\":1}", "{\"b\":\"\u{e9}\"}", "[DONE]"], "pieces of {size} bytes");
        }
    }

    #[test]
    fn endless_lines_and_bad_text_are_refused() {
        let mut decoder = SseDecoder::default();
        let long = vec![b'x'; MAX_LINE_BYTES + 1];
        assert!(decoder.push(&long, |_| Ok(())).is_err());
        assert!(SseDecoder::default().push(b"data: \xff\n", |_| Ok(())).is_err());
    }
}
