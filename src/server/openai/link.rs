//! Prompts in which the KV of cubes is taken from where it was computed: every text is tokenized alone, so that its tokens
//! are the same whatever stands around it; messages and token ids are the tokens that the cube has.

use crate::Result;
use crate::engine::request::Piece;
use crate::memory::{Twin, completion_cube_tokens};
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

/// What of a cube stands in a prompt.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum LinkedContent {
    /// Its text.
    Text(String),
    /// The tokens it has of its messages.
    Messages(Twin),
    /// Its tokens, whatever they are.
    TokenIds,
}

/// A cube on its way into a prompt.
pub(super) struct LinkedCube<'a> {
    pub(super) content: &'a LinkedContent,
    /// The tokens whose KV the cube has, which may end with those of the text.
    pub(super) stored: &'a [u32],
    /// The cache domain of the cube's blocks or, where it has none, of the caller.
    pub(super) domain: &'a str,
    /// What of it is computed again, when its KV is moved; otherwise all is.
    pub(super) recomputed: Option<Recomputed>,
}

/// Appends the cubes to `prompt`, which is what stands before them, and says which parts are moved there. A cube's own
/// blocks are taken when its tokens end with those of the text; otherwise the text is computed once behind a BOS. Two texts
/// are separated. Where messages or token ids begin with a BOS and something stands before them, the BOS is left out.
pub(super) fn append_cubes(
    tokenizer: &Tokenizer,
    prompt: &mut Vec<u32>,
    cubes: &[LinkedCube<'_>],
) -> Result<Vec<Piece>> {
    let mut pieces = Vec::with_capacity(cubes.len());
    let is_text = |number: usize| matches!(cubes[number].content, LinkedContent::Text(_));
    for (number, LinkedCube { content, stored, domain, recomputed }) in cubes.iter().enumerate() {
        if number > 0 && is_text(number - 1) && is_text(number) {
            prompt.extend(tokenizer.encode(SEPARATOR, false)?);
        }
        let (source, tokens) = match content {
            LinkedContent::Text(text) => source_of_text(tokenizer, text, stored)?,
            LinkedContent::Messages(_) | LinkedContent::TokenIds => {
                let has_bos = !prompt.is_empty() && stored.first().copied() == tokenizer.bos_id();
                (stored.to_vec(), stored[usize::from(has_bos)..].to_vec())
            }
        };
        if let Some(Recomputed { num_first, share }) = recomputed.filter(|_| !tokens.is_empty()) {
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

/// What the KV of a text is taken from, and the text's own tokens at its end.
fn source_of_text(tokenizer: &Tokenizer, text: &str, stored: &[u32]) -> Result<(Vec<u32>, Vec<u32>)> {
    let tokens = tokenizer.encode(text, false)?;
    let source = if stored.ends_with(&tokens) { stored.to_vec() } else { completion_cube_tokens(tokenizer, text)? };
    Ok((source, tokens))
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
            let content = LinkedContent::Text("ab".into());
            let text = |stored, recomputed| LinkedCube { content: &content, stored, domain: "team", recomputed };
            let texts = [text(&stored[..], recomputed), text(&[], None), text(&[], recomputed)];
            let mut prompt = vec![5, 6];
            let pieces = append_cubes(&tokenizer, &mut prompt, &texts).unwrap();
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

    #[test]
    fn token_ids_stand_as_they_are_and_a_bos_only_at_the_beginning() {
        for tokenizer in [byte_level(), sentence_piece(true)] {
            let Some(bos) = tokenizer.bos_id() else { continue };
            let recomputed = Some(Recomputed { num_first: 0, share: 0.0 });
            let (ids, text) = (LinkedContent::TokenIds, LinkedContent::Text("ab".into()));
            let stored = [bos, 7, 8];
            let cube = |content, stored, recomputed| LinkedCube { content, stored, domain: "team", recomputed };
            let cubes = [
                cube(&ids, &stored[..], recomputed),
                cube(&ids, &stored[..], recomputed),
                cube(&text, &[], None),
                cube(&ids, &stored[1..], recomputed),
                cube(&ids, &stored[..1], recomputed),
            ];
            let mut prompt = vec![];
            let pieces = append_cubes(&tokenizer, &mut prompt, &cubes).unwrap();
            let written = tokenizer.encode("ab", false).unwrap();
            assert_eq!(prompt, [&[bos, 7, 8, 7, 8][..], &written, &[7, 8]].concat());
            let found: Vec<_> =
                pieces.iter().map(|piece| (piece.start, piece.num_tokens, piece.source_start)).collect();
            assert_eq!(found, [(0, 3, 0), (3, 2, 1), (5 + written.len(), 2, 0)], "of a BOS alone nothing is left");
        }
    }
}
