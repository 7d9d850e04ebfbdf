//! Finding the end of a JSON object in text that is still arriving.

/// Counts brackets, outside strings, over bytes seen so far.
#[derive(Debug, Clone, Default)]
pub(super) struct JsonScanner {
    scanned: usize,
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl JsonScanner {
    /// Whether nothing was scanned yet.
    pub(super) fn is_fresh(&self) -> bool {
        self.scanned == 0
    }

    /// Goes on through `text`, which starts with `{` and only ever grows. Returns the length of the object once it is
    /// complete. Whether it is valid JSON is for a parser to say.
    pub(super) fn object_end(&mut self, text: &str) -> Option<usize> {
        for byte in &text.as_bytes()[self.scanned..] {
            self.scanned += 1;
            self.step(*byte);
            if self.depth == 0 {
                return Some(self.scanned);
            }
        }
        None
    }

    fn step(&mut self, byte: u8) {
        if self.in_string {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => self.in_string = false,
                _ => {}
            }
            return;
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' => self.depth = self.depth.saturating_sub(1),
            _ => {}
        }
    }
}
