//! Random prompts that anyone with the same seed gets again.

use super::random::Random;

/// Short common words: nearly all vocabularies spell each, with the space before it, as one token.
const WORDS: [&str; 48] = [
    "the", "of", "and", "to", "in", "for", "is", "on", "that", "by", "this", "with", "you", "it", "not", "or", "be",
    "are", "from", "at", "as", "your", "all", "have", "new", "more", "an", "was", "we", "will", "home", "can", "us",
    "about", "if", "page", "my", "has", "search", "free", "but", "our", "one", "other", "do", "no", "time", "they",
];

/// The shape of the prompts.
#[derive(Debug, Clone, Copy)]
pub(super) struct PromptShape {
    /// Tokens that all prompts begin with.
    pub(super) prefix_len: usize,
    /// Tokens of its own that each prompt has after them.
    pub(super) input_len: usize,
    pub(super) seed: u64,
}

impl PromptShape {
    /// Tokens of a prompt.
    pub(super) fn len(&self) -> usize {
        self.prefix_len.saturating_add(self.input_len)
    }

    /// Prompt number `index`, drawn from `ids`, which is not empty.
    pub(super) fn token_ids(&self, ids: &[u32], index: usize) -> Vec<u32> {
        self.draws(index, ids.len()).map(|pick| ids[pick]).collect()
    }

    /// Prompt number `index` as text: about as many tokens, one per word.
    pub(super) fn text(&self, index: usize) -> String {
        let words: Vec<&str> = self.draws(index, WORDS.len()).map(|pick| WORDS[pick]).collect();
        words.join(" ")
    }

    fn draws(&self, index: usize, bound: usize) -> impl Iterator<Item = usize> {
        let draw = move |mut random: Random, len| (0..len).map(move |_| random.below(bound));
        let prefix = draw(Random::new(self.seed, 0), self.prefix_len);
        prefix.chain(draw(Random::new(self.seed, 1 + index as u64), self.input_len))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_share_their_prefix_and_nothing_else() {
        let shape = PromptShape { prefix_len: 5, input_len: 20, seed: 3 };
        let ids: Vec<u32> = (100..200).collect();
        let [first, second] = [0, 1].map(|index| shape.token_ids(&ids, index));
        assert_eq!(first.len(), shape.len());
        assert_eq!(first[..5], second[..5]);
        assert_ne!(first[5..], second[5..]);
        assert_eq!(first, shape.token_ids(&ids, 0));
        assert!(first.iter().all(|id| ids.contains(id)));
        assert_eq!(shape.text(1).split(' ').count(), 25);
    }
}
