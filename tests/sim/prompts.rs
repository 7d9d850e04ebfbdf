//! What the requests of a simulated life ask for: prompts that begin alike, that go on behind deposits, and that are
//! composed of pieces. Adapters are `adapters.rs`'s.

use mneme::engine::{Piece, SharedPrefix};

use super::sharing::Asked;
use crate::support::random::Random;
use crate::support::tiny_model::VOCAB;

const DOMAINS: [&str; 4] = ["", "", "a", "b"];

/// Tokens of a composed prompt before its first piece, and between two, at most.
const MAX_HEAD: usize = 20;
const MAX_BETWEEN: usize = 8;

const MAX_PIECES: usize = 3;

/// Where prompts come from.
pub struct Prompts {
    /// Tokens of a prompt at most.
    most: usize,
    /// Beginnings that many prompts have.
    shared: Vec<Vec<u32>>,
    /// Prompts and outputs that are over.
    past: Vec<Vec<u32>>,
    /// What was deposited, for others to continue.
    deposited: Vec<Asked>,
    /// One prompt in so many is composed.
    composed_once_in: usize,
}

impl Prompts {
    pub fn new(random: &mut Random, max_model_len: usize) -> Self {
        let shared = (0..3).map(|_| random.tokens(max_model_len / 2, VOCAB)).collect();
        let composed_once_in = [2, 4, 8][random.below(3)];
        Self { most: max_model_len - 1, shared, past: vec![], deposited: vec![], composed_once_in }
    }

    pub fn domain(&self, random: &mut Random) -> String {
        DOMAINS[random.below(DOMAINS.len())].to_owned()
    }

    pub fn add_past(&mut self, tokens: Vec<u32>) {
        self.past.push(tokens);
    }

    pub fn add_deposited(&mut self, asked: Asked) {
        self.deposited.push(asked);
    }

    /// A beginning of a prompt: nothing, what others begin with too, or what is over already, now and then with one token
    /// changed.
    fn beginning(&self, random: &mut Random) -> Vec<u32> {
        let mut beginning = match random.below(6) {
            0..=1 => vec![],
            at @ 2..=3 => self.shared[at - 2].clone(),
            _ if self.past.is_empty() => self.shared[2].clone(),
            _ => self.past[random.below(self.past.len())].clone(),
        };
        if !beginning.is_empty() && random.once_in(2) {
            beginning.truncate(random.within(1, beginning.len()));
        }
        beginning.truncate(self.most);
        if !beginning.is_empty() && random.once_in(4) {
            let at = random.below(beginning.len());
            beginning[at] = random.below(VOCAB) as u32;
        }
        beginning
    }

    /// Something deposited that leaves room in a prompt of `most` tokens, now and then.
    fn base(&self, random: &mut Random, most: usize) -> Option<&Asked> {
        if self.deposited.is_empty() || random.once_in(2) {
            return None;
        }
        let base = &self.deposited[random.below(self.deposited.len())];
        (base.num_prompt <= most).then_some(base)
    }

    /// What to ask for, composed or not.
    pub fn ask_any(&self, random: &mut Random) -> Asked {
        if random.once_in(self.composed_once_in) { self.ask_composed(random) } else { self.ask(random) }
    }

    /// What to ask for, in which domain, whether behind something deposited.
    pub fn ask(&self, random: &mut Random) -> Asked {
        let domain = DOMAINS[random.below(DOMAINS.len())].to_owned();
        let base = self.base(random, self.most);
        let mut tokens = match base {
            Some(base) => base.prompt().to_vec(),
            None => self.beginning(random),
        };
        let room = self.most - tokens.len();
        if base.is_some() && random.once_in(2) {
            // What several ask behind the same deposit.
            tokens.extend(&self.shared[0][..self.shared[0].len().min(room)]);
        } else if room > 0 {
            let least = usize::from(tokens.is_empty());
            let num_own = random.within(least, room);
            tokens.extend(random.tokens(num_own, VOCAB));
        }
        let shared = base.and_then(|base| prefix(base, random));
        Asked { num_prompt: tokens.len(), tokens, domain, shared, ..Asked::default() }
    }

    /// Something that came in a file, in a domain that nobody else has.
    pub fn ask_imported(&self, random: &mut Random) -> Asked {
        let num_tokens = random.within(1, self.most);
        let tokens = random.tokens(num_tokens, VOCAB);
        let domain = format!("import/{}", random.next());
        Asked { num_prompt: num_tokens, tokens, domain, ..Asked::default() }
    }

    /// A prompt of some texts that others have as well, each computed behind another head, and what is its own.
    fn ask_composed(&self, random: &mut Random) -> Asked {
        let domain = DOMAINS[random.below(DOMAINS.len())].to_owned();
        let base = self.base(random, self.most / 2);
        let num_head = random.below(MAX_HEAD);
        let mut tokens = base.map_or_else(|| random.tokens(num_head, VOCAB), |base| base.prompt().to_vec());
        let shared = base.and_then(|base| prefix(base, random));
        let mut pieces = vec![];
        for _ in 0..random.within(1, MAX_PIECES) {
            let piece = self.piece(random, tokens.len());
            if tokens.len() + piece.num_tokens + MAX_BETWEEN > self.most {
                break;
            }
            tokens.extend_from_slice(&piece.source[piece.source_start..][..piece.num_tokens]);
            pieces.push(piece);
            let num_between = random.below(MAX_BETWEEN);
            tokens.extend(random.tokens(num_between, VOCAB));
        }
        tokens.extend(random.tokens(1, VOCAB));
        Asked { num_prompt: tokens.len(), tokens, domain, shared, pieces, ..Asked::default() }
    }

    /// A piece at `start`: of something deposited, or of a text that others have behind other heads.
    fn piece(&self, random: &mut Random, start: usize) -> Piece {
        let (source, source_start, num_tokens, domain) = match self.base(random, self.most) {
            Some(base) => {
                let source_start = random.below(base.num_prompt);
                let num_tokens = random.within(1, base.num_prompt - source_start);
                (base.prompt().to_vec(), source_start, num_tokens, base.domain.clone())
            }
            None => {
                let text = &self.shared[random.below(self.shared.len())];
                let (source_start, num_tokens) = (random.below(3), random.within(1, text.len()));
                let mut source: Vec<u32> = (0..source_start as u32).chain(text.iter().copied()).collect();
                source.truncate(random.within(source_start + num_tokens, source.len()));
                (source, source_start, num_tokens, ["", "a"][random.below(2)].to_owned())
            }
        };
        let num_recomputed = [0, 0, 4, random.below(40)][random.below(4)];
        let num_chosen = [0, 0, 1, random.below(40)][random.below(4)];
        Piece { start, num_tokens, source, source_start, domain, num_recomputed, num_chosen }
    }
}

/// Who continues a deposit may know its domain, or not.
fn prefix(base: &Asked, random: &mut Random) -> Option<SharedPrefix> {
    let is_known = base.shared.is_none() && !random.once_in(4);
    is_known.then(|| SharedPrefix { num_tokens: base.num_prompt, domain: base.domain.clone() })
}
