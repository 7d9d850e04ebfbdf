//! Contexts, queries and the filler, as token ids that anyone with the same seed gets again, and their cache domains.

use mneme::engine::SharedPrefix;

use super::cell::Cell;
use super::session::Prompt;
use crate::cli::bench::prompts::PromptShape;

/// Numbers of drawn texts: contexts and queries count from here, the filler is alone.
const FILLER: usize = 0;
const FIRST_CONTEXT: usize = 1 << 16;
const FIRST_QUERY: usize = 1 << 17;

/// Draws everything that is asked.
#[derive(Debug)]
pub(super) struct PromptSource {
    /// Tokens to draw from; not empty.
    ids: Vec<u32>,
    seed: u64,
    block_size: usize,
    /// The domain of contexts and filler, another one in every run.
    domain: String,
    num_asked: usize,
}

impl PromptSource {
    pub(super) fn new(ids: Vec<u32>, seed: u64, block_size: usize, run: &str) -> Self {
        Self { ids, seed, block_size, domain: format!("bench-{run}"), num_asked: 0 }
    }

    pub(super) fn domain(&self) -> &str {
        &self.domain
    }

    fn draw(&self, number: usize, input_len: usize) -> Vec<u32> {
        PromptShape { prefix_len: 0, input_len, seed: self.seed }.token_ids(&self.ids, number)
    }

    /// A context of `len` tokens; another length is another text.
    pub(super) fn context(&self, len: usize) -> Vec<u32> {
        self.draw(FIRST_CONTEXT + len, len)
    }

    /// The filler's first `len` tokens.
    pub(super) fn filler(&self, len: usize) -> Vec<u32> {
        self.draw(FILLER, len)
    }

    /// A prompt that takes all of a cell's blocks, so that nothing else stays on the device.
    pub(super) fn flush(&self, cell: Cell) -> Prompt {
        let len = cell.num_blocks(self.block_size) * self.block_size - 1;
        Prompt { tokens: self.filler(len), domain: self.domain.clone(), shared: None }
    }

    /// The context alone, to bring it up.
    pub(super) fn context_prompt(&self, cell: Cell) -> Prompt {
        // One token more than the shared blocks: the last token of a prompt is always computed.
        let mut tokens = self.context(cell.context_len);
        tokens.truncate(cell.num_shared(self.block_size));
        tokens.push(self.ids[0]);
        Prompt { tokens, domain: self.domain.clone(), shared: None }
    }

    /// Context and query; the context can be found, the query cannot, since nobody else has its domain.
    pub(super) fn question(&mut self, cell: Cell) -> Prompt {
        let shared = SharedPrefix { num_tokens: cell.num_shared(self.block_size), domain: self.domain.clone() };
        Prompt { shared: Some(shared), ..self.reference(cell) }
    }

    /// The same tokens, nothing of which can be found.
    pub(super) fn reference(&mut self, cell: Cell) -> Prompt {
        self.num_asked += 1;
        let mut tokens = self.context(cell.context_len);
        tokens.extend(self.draw(FIRST_QUERY + cell.query_len, cell.query_len));
        Prompt { tokens, domain: format!("{}-{}", self.domain, self.num_asked), shared: None }
    }

    /// Context and query in the shared domain, with a first token that no other prompt has had there.
    pub(super) fn control(&mut self, cell: Cell, round: usize) -> Prompt {
        let mut prompt = self.reference(cell);
        let first = self.ids.iter().position(|id| *id == prompt.tokens[0]).unwrap_or(0);
        prompt.tokens[0] = self.ids[(first + 1 + round) % self.ids.len()];
        prompt.domain = self.domain.clone();
        prompt
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CELL: Cell = Cell { context_len: 40, query_len: 9 };

    fn source() -> PromptSource {
        PromptSource::new((100..200).collect(), 3, 16, "run")
    }

    #[test]
    fn questions_share_their_context_and_nothing_else() {
        let mut source = source();
        let [first, second] = [0, 1].map(|_| source.question(CELL));
        assert_eq!((first.tokens.len(), &first.tokens), (49, &second.tokens));
        assert_ne!(first.domain, second.domain);
        assert_eq!(first.shared, second.shared);
        assert_eq!(first.shared.unwrap().num_tokens, 32);
        assert_eq!(source.context_prompt(CELL).tokens[..32], first.tokens[..32]);
        assert!(source.reference(CELL).shared.is_none());
    }

    #[test]
    fn a_control_has_a_first_token_of_its_own() {
        let mut source = source();
        let reference = source.reference(CELL);
        let firsts: Vec<u32> = (0..3).map(|round| source.control(CELL, round).tokens[0]).collect();
        assert!(!firsts.contains(&reference.tokens[0]) && firsts[0] != firsts[1] && firsts[1] != firsts[2]);
        assert_eq!(source.control(CELL, 0).tokens[1..], reference.tokens[1..]);
    }

    #[test]
    fn a_flush_takes_every_block_and_is_the_beginning_of_the_filler() {
        let source = source();
        let flush = source.flush(CELL);
        assert_eq!(flush.tokens.len(), 4 * 16 - 1);
        assert_eq!(flush.tokens, source.filler(500)[..63]);
    }
}
