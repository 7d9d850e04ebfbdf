//! Prompts in which the KV of cubes is taken from where it was computed: every text is tokenized alone, so that its tokens
//! are the same whatever stands around it.

use crate::Result;
use crate::engine::request::Piece;
use crate::memory::completion_cube_tokens;
use crate::text::Tokenizer;

/// What separates texts in one prompt.
const SEPARATOR: &str = "\n\n";

/// How much of a piece is computed in the prompt although its KV is there.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Recomputed {
    /// So many tokens at its beginning.
    pub(super) num_first: usize,
    /// And this share of its tokens, 0 to 1: those that deviate most.
    pub(super) share: f64,
}

/// The text of a cube on its way into a prompt.
pub(super) struct LinkedText<'a> {
    pub(super) text: &'a str,
    /// The tokens whose KV the cube has, which may end with those of the text.
    pub(super) stored: &'a [u32],
    /// The cache domain of the cube's blocks or, where it has none, of the caller.
    pub(super) domain: &'a str,
    /// What of it is computed again, when its KV is moved; otherwise all is.
    pub(super) recomputed: Option<Recomputed>,
}

/// Appends the texts to `prompt`, which is what stands before them, and says which parts are moved there. A cube's own
/// blocks are taken when its tokens end with those of the text; otherwise the text is computed once behind a BOS.
pub(super) fn append_texts(
    tokenizer: &Tokenizer,
    prompt: &mut Vec<u32>,
    texts: &[LinkedText<'_>],
) -> Result<Vec<Piece>> {
    let mut pieces = Vec::with_capacity(texts.len());
    for (number, LinkedText { text, stored, domain, recomputed }) in texts.iter().enumerate() {
        if number > 0 {
            prompt.extend(tokenizer.encode(SEPARATOR, false)?);
        }
        let tokens = tokenizer.encode(text, false)?;
        let source = if stored.ends_with(&tokens) { stored.to_vec() } else { completion_cube_tokens(tokenizer, text)? };
        if let Some(Recomputed { num_first, share }) = *recomputed {
            pieces.push(Piece {
                start: prompt.len(),
                num_tokens: tokens.len(),
                source_start: source.len() - tokens.len(),
                source,
                domain: (*domain).to_owned(),
                num_recomputed: num_first,
                num_chosen: (share * tokens.len() as f64).round() as usize,
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
            let recomputed = Some(Recomputed { num_first: 3, share: 0.5 });
            let text = |stored, recomputed| LinkedText { text: "ab", stored, domain: "team", recomputed };
            let texts = [text(&stored[..], recomputed), text(&[], None), text(&[], recomputed)];
            let mut prompt = vec![5, 6];
            let pieces = append_texts(&tokenizer, &mut prompt, &texts).unwrap();
            let [first, second] = &pieces[..] else { panic!("{pieces:?}") };
            assert_eq!((first.start, first.source_start, &first.source), (2, 3, &stored));
            let alone = completion_cube_tokens(&tokenizer, "ab").unwrap();
            assert_eq!((&second.source, second.source_start), (&alone, alone.len() - second.num_tokens));
            for piece in &pieces {
                let here = &prompt[piece.start..][..piece.num_tokens];
                assert_eq!(here, &piece.source[piece.source_start..][..piece.num_tokens]);
                assert_eq!((piece.domain.as_str(), piece.num_recomputed), ("team", 3));
                assert_eq!(piece.num_chosen, piece.num_tokens.div_ceil(2));
            }
            let separator = tokenizer.encode(SEPARATOR, false).unwrap();
            assert_eq!(prompt.len(), 2 + 3 * first.num_tokens + 2 * separator.len());
        }
    }
}
