//! Prompts in which the KV of cubes is taken from where it was computed: every text is tokenized alone, so that its tokens
//! are the same whatever stands around it.

use crate::Result;
use crate::engine::request::Piece;
use crate::memory::completion_cube_tokens;
use crate::text::Tokenizer;

/// What separates texts in one prompt.
const SEPARATOR: &str = "\n\n";

/// Tokens that are computed in the prompt at the beginning of every piece, unless a call says otherwise.
pub(super) const DEFAULT_RECOMPUTED: usize = 16;

/// The most a call can ask for.
pub(super) const MAX_RECOMPUTED: usize = 4096;

/// The text of a cube on its way into a prompt.
pub(super) struct LinkedText<'a> {
    pub(super) text: &'a str,
    /// The tokens whose KV the cube has, which may end with those of the text.
    pub(super) stored: &'a [u32],
    /// The cache domain of the cube's blocks or, where it has none, of the caller.
    pub(super) domain: &'a str,
    /// Whether its KV is moved, and not computed again.
    pub(super) is_linked: bool,
}

/// Appends the texts to `prompt`, which is what stands before them, and says which parts are moved there. A cube's own
/// blocks are taken when its tokens end with those of the text; otherwise the text is computed once behind a BOS.
pub(super) fn append_texts(
    tokenizer: &Tokenizer,
    prompt: &mut Vec<u32>,
    texts: &[LinkedText<'_>],
    num_recomputed: usize,
) -> Result<Vec<Piece>> {
    let mut pieces = Vec::with_capacity(texts.len());
    for (number, LinkedText { text, stored, domain, is_linked }) in texts.iter().enumerate() {
        if number > 0 {
            prompt.extend(tokenizer.encode(SEPARATOR, false)?);
        }
        let tokens = tokenizer.encode(text, false)?;
        let source = if stored.ends_with(&tokens) { stored.to_vec() } else { completion_cube_tokens(tokenizer, text)? };
        if *is_linked {
            pieces.push(Piece {
                start: prompt.len(),
                num_tokens: tokens.len(),
                source_start: source.len() - tokens.len(),
                source,
                domain: (*domain).to_owned(),
                num_recomputed,
            });
        }
        prompt.extend(tokens);
    }
    Ok(pieces)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::tokenizer::samples::{byte_level, sentence_piece};

    #[test]
    fn every_piece_has_the_tokens_of_its_source() {
        for tokenizer in [byte_level(), sentence_piece(true), sentence_piece(false)] {
            let stored = [vec![1, 2, 3], tokenizer.encode("ab", false).unwrap()].concat();
            let text = |stored, is_linked| LinkedText { text: "ab", stored, domain: "team", is_linked };
            let texts = [text(&stored[..], true), text(&[], false), text(&[], true)];
            let mut prompt = vec![5, 6];
            let pieces = append_texts(&tokenizer, &mut prompt, &texts, 3).unwrap();
            let [first, second] = &pieces[..] else { panic!("{pieces:?}") };
            assert_eq!((first.start, first.source_start, &first.source), (2, 3, &stored));
            let alone = completion_cube_tokens(&tokenizer, "ab").unwrap();
            assert_eq!((&second.source, second.source_start), (&alone, alone.len() - second.num_tokens));
            for piece in &pieces {
                let here = &prompt[piece.start..][..piece.num_tokens];
                assert_eq!(here, &piece.source[piece.source_start..][..piece.num_tokens]);
                assert_eq!((piece.domain.as_str(), piece.num_recomputed), ("team", 3));
            }
            let separator = tokenizer.encode(SEPARATOR, false).unwrap();
            assert_eq!(prompt.len(), 2 + 3 * first.num_tokens + 2 * separator.len());
        }
    }
}
