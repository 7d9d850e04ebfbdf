//! Token ids to text, one token at a time, for one output sequence.
//!
//! Text is handed out as soon as nothing can change it: bytes of an unfinished character are held back, and so is
//! anything that may turn out to be the beginning of a stop string. All pieces joined equal [`Tokenizer::decode`] of all
//! tokens. Token-level stops (EOS) are left to the engine.

use std::sync::Arc;

use super::Tokenizer;

/// What a [`Detokenizer`] leaves out and where it stops.
#[derive(Debug, Clone, Default)]
pub struct DetokenizerOptions {
    /// Leave special tokens out of the text.
    pub skip_special: bool,
    /// Texts that end the output; empty ones are ignored.
    pub stop: Vec<String>,
    /// Emit the stop string itself before stopping.
    pub include_stop: bool,
}

/// What one token added to the output.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Piece {
    /// Text that is safe to send; often empty.
    pub text: String,
    /// Index in [`DetokenizerOptions::stop`] of the stop string that is now complete. Nothing follows it.
    pub stop: Option<usize>,
}

/// The growing text of one sequence.
#[derive(Clone)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    options: DetokenizerOptions,
    /// The bytes of a character whose end has not come yet.
    partial: Vec<u8>,
    /// Text that may be the beginning of a stop string.
    held: String,
    at_start: bool,
    stopped: bool,
}

impl Detokenizer {
    /// A detokenizer with nothing decoded yet.
    pub fn new(tokenizer: Arc<Tokenizer>, options: DetokenizerOptions) -> Self {
        let at_start = tokenizer.strips_leading_space();
        Self { tokenizer, options, partial: Vec::new(), held: String::new(), at_start, stopped: false }
    }

    /// Adds one token. After a stop string matched, further tokens add nothing; nor does an id without a token, which a model
    /// with more output rows than the vocabulary has may give.
    pub fn push(&mut self, token: u32) -> Piece {
        if self.stopped || (self.options.skip_special && self.tokenizer.is_special(token)) {
            return Piece::default();
        }
        let mut bytes = self.tokenizer.token_bytes(token);
        if self.at_start && !bytes.is_empty() {
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
            self.at_start = false;
        }
        self.partial.extend_from_slice(bytes);
        self.read_characters();
        self.emit()
    }

    /// Ends the sequence: whatever was held back is emitted.
    pub fn flush(&mut self) -> Piece {
        if self.stopped {
            return Piece::default();
        }
        if !self.partial.is_empty() {
            self.held.push_str(&String::from_utf8_lossy(&self.partial));
            self.partial.clear();
        }
        let mut piece = self.emit();
        if !self.stopped {
            piece.text.push_str(&std::mem::take(&mut self.held));
            self.stopped = true;
        }
        piece
    }

    /// Moves all complete characters from `partial` to `held`, invalid bytes as U+FFFD.
    fn read_characters(&mut self) {
        let mut read = 0;
        for chunk in self.partial.utf8_chunks() {
            let invalid = chunk.invalid();
            self.held.push_str(chunk.valid());
            read += chunk.valid().len();
            if !invalid.is_empty() {
                if read + invalid.len() == self.partial.len() && may_continue(invalid) {
                    break;
                }
                self.held.push(char::REPLACEMENT_CHARACTER);
                read += invalid.len();
            }
        }
        self.partial.drain(..read);
    }

    /// Takes from `held` what no stop string can claim any more.
    fn emit(&mut self) -> Piece {
        if let Some(found) = self.find_stop() {
            let end = if self.options.include_stop { found.end } else { found.start };
            self.held.truncate(end);
            self.stopped = true;
            self.partial.clear();
            return Piece { text: std::mem::take(&mut self.held), stop: Some(found.index) };
        }
        let kept = self.held.split_off(self.held.len() - self.possible_stop_bytes());
        Piece { text: std::mem::replace(&mut self.held, kept), stop: None }
    }

    /// The stop string that is complete first; of several that end together the longest. That does not depend on how
    /// the text was cut into tokens.
    fn find_stop(&self) -> Option<FoundStop> {
        let stops = self.options.stop.iter().enumerate().filter(|(_, stop)| !stop.is_empty());
        let found = stops.filter_map(|(index, stop)| {
            let start = self.held.find(stop.as_str())?;
            Some(FoundStop { index, start, end: start + stop.len() })
        });
        found.min_by_key(|found| (found.end, found.start))
    }

    /// Length of the longest end of `held` that begins a stop string.
    fn possible_stop_bytes(&self) -> usize {
        let longest = self.options.stop.iter().map(String::len).max().unwrap_or(0);
        let from = self.held.len().saturating_sub(longest);
        let begins_stop = |end: &str| self.options.stop.iter().any(|stop| stop.starts_with(end));
        let starts = (from..self.held.len()).filter(|start| self.held.is_char_boundary(*start));
        starts.map(|start| &self.held[start..]).find(|end| begins_stop(end)).map_or(0, str::len)
    }
}

struct FoundStop {
    index: usize,
    start: usize,
    end: usize,
}

/// Whether `bytes`, which are not UTF-8, may be the beginning of a character.
fn may_continue(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|error| error.valid_up_to() == 0 && error.error_len().is_none())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::text::tokenizer::samples;

    fn detokenizer(tokenizer: &Arc<Tokenizer>, skip_special: bool, stop: &[&str], include_stop: bool) -> Detokenizer {
        let stop = stop.iter().map(|stop| stop.to_string()).collect();
        Detokenizer::new(tokenizer.clone(), DetokenizerOptions { skip_special, stop, include_stop })
    }

    /// All text, and the stop that ended it.
    fn run(mut detokenizer: Detokenizer, ids: &[u32]) -> (String, Option<usize>) {
        let mut text = String::new();
        for id in ids {
            let piece = detokenizer.push(*id);
            text.push_str(&piece.text);
            if piece.stop.is_some() {
                return (text, piece.stop);
            }
        }
        let last = detokenizer.flush();
        (text + &last.text, last.stop)
    }

    fn spelled(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
        text.bytes().map(|byte| samples::byte_id(tokenizer, byte)).collect()
    }

    #[test]
    fn characters_come_out_whole() {
        let tokenizer = samples::byte_level();
        let mut detokenizer = detokenizer(&tokenizer, false, &[], false);
        let pieces: Vec<_> = "a\u{6771}\u{1F600}"
            .bytes()
            .map(|byte| detokenizer.push(samples::byte_id(&tokenizer, byte)).text)
            .collect();
        assert_eq!(pieces, ["a", "", "", "\u{6771}", "", "", "", "\u{1F600}"]);
    }

    #[test]
    fn stops_across_token_borders_are_found_and_held() {
        let tokenizer = samples::byte_level();
        let mut stopping = detokenizer(&tokenizer, false, &["END"], false);
        let mut texts = Vec::new();
        for byte in "aEEND".bytes() {
            let piece = stopping.push(samples::byte_id(&tokenizer, byte));
            texts.push((piece.text, piece.stop));
        }
        let wanted = [("a", None), ("", None), ("E", None), ("", None), ("", Some(0))];
        assert_eq!(texts, wanted.map(|(text, stop)| (text.to_owned(), stop)));
        assert_eq!(stopping.push(samples::byte_id(&tokenizer, b'x')), Piece::default());
        assert_eq!(stopping.flush(), Piece::default());
    }

    #[test]
    fn the_stop_itself_is_emitted_on_request() {
        let tokenizer = samples::byte_level();
        let ids = spelled(&tokenizer, "one\n\ntwo");
        assert_eq!(run(detokenizer(&tokenizer, false, &["x", "\n\n"], false), &ids), ("one".into(), Some(1)));
        assert_eq!(run(detokenizer(&tokenizer, false, &["x", "\n\n"], true), &ids), ("one\n\n".into(), Some(1)));
    }

    #[test]
    fn an_unfinished_stop_is_flushed() {
        let tokenizer = samples::byte_level();
        let ids = spelled(&tokenizer, "one\n");
        assert_eq!(run(detokenizer(&tokenizer, false, &["\n\n", ""], false), &ids), ("one\n".into(), None));
    }

    #[test]
    fn the_first_complete_stop_wins() {
        let tokenizer = samples::byte_level();
        let ids = spelled(&tokenizer, "xabcd");
        assert_eq!(run(detokenizer(&tokenizer, false, &["abcd", "bc", "abc"], false), &ids), ("x".into(), Some(2)));
    }

    #[test]
    fn a_leading_space_is_stripped_once() {
        let tokenizer = samples::sentence_piece(true);
        let id = |text: &str| tokenizer.id_of(text).unwrap();
        let ids = [id("<s>"), id("\u{2581}a"), id("\u{2581}a")];
        assert_eq!(run(detokenizer(&tokenizer, true, &[], false), &ids).0, "a a");
        let fallback = [id("<0x20>"), id("\u{2581}a")];
        assert_eq!(run(detokenizer(&tokenizer, true, &[], false), &fallback).0, " a");
    }

    #[test]
    fn ids_without_a_token_add_nothing() {
        let tokenizer = samples::byte_level();
        let mut ids = spelled(&tokenizer, "a\u{6771}b");
        for at in [0, 2, 5, 7] {
            ids.insert(at, tokenizer.vocab_size() as u32 + at as u32);
        }
        assert_eq!(run(detokenizer(&tokenizer, true, &["b"], true), &ids), ("a\u{6771}b".into(), Some(0)));
    }

    proptest! {
        #[test]
        fn pieces_join_to_the_whole(
            picks in prop::collection::vec(any::<prop::sample::Index>(), 0..40),
            which in 0..3usize,
            skip_special in any::<bool>(),
        ) {
            let tokenizer = match which {
                0 => samples::byte_level(),
                1 => samples::sentence_piece(true),
                _ => samples::sentence_piece(false),
            };
            let ids: Vec<u32> = picks.iter().map(|pick| pick.index(tokenizer.vocab_size()) as u32).collect();
            // A stop string that cannot occur still makes text wait; it must all come out in the end.
            let never = "a\u{1}";
            let (text, stop) = run(detokenizer(&tokenizer, skip_special, &[never], false), &ids);
            let whole = tokenizer.decode(&ids, skip_special).unwrap();
            prop_assume!(!whole.contains(never));
            prop_assert_eq!(text, whole);
            prop_assert_eq!(stop, None);
        }

        #[test]
        fn stops_do_not_depend_on_token_borders(
            text in "[ab]{0,12}",
            stops in prop::collection::vec("[ab]{1,4}", 1..4),
            include_stop in any::<bool>(),
        ) {
            let tokenizer = samples::byte_level();
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let bytes = run(detokenizer(&tokenizer, false, &stops, include_stop), &spelled(&tokenizer, &text));
            let merged = tokenizer.encode(&text, false).unwrap();
            prop_assert_eq!(&bytes, &run(detokenizer(&tokenizer, false, &stops, include_stop), &merged));
            // A stop is complete at the first place where the text so far ends with it.
            let end = (0..=text.len()).find(|end| stops.iter().any(|stop| text[..*end].ends_with(stop)));
            prop_assert_eq!(bytes.1.is_some(), end.is_some());
            if let (Some(end), Some(index)) = (end, bytes.1) {
                let longest = stops.iter().filter(|stop| text[..end].ends_with(**stop)).map(|s| s.len()).max();
                prop_assert_eq!(Some(stops[index].len()), longest);
                let cut = if include_stop { end } else { end - stops[index].len() };
                prop_assert_eq!(&bytes.0, &text[..cut]);
            } else {
                prop_assert_eq!(&bytes.0, &text);
            }
        }
    }
}
