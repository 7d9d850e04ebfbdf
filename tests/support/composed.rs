//! Prompts with pieces whose KV is computed elsewhere, and calls with them.

use mneme::engine::{GenerateRequest, OutputStream, Piece, SamplingParams, Task, TokenLogprobs};

use super::engine::{Output, TestEngine, collect, request};
use super::random::Random;
use super::tiny_model::VOCAB;

pub fn sampling(max_tokens: usize) -> SamplingParams {
    SamplingParams { temperature: 0.0, max_tokens, logprobs: Some(3), ..Default::default() }
}

pub fn submit(engine: &TestEngine, prompt: &[u32], pieces: Vec<Piece>, max_tokens: usize) -> OutputStream {
    let task = Task::Generate(Box::new(sampling(max_tokens)));
    engine.handle.submit(GenerateRequest { pieces, ..request(prompt, task) }).unwrap()
}

pub fn run(engine: &TestEngine, prompt: &[u32], pieces: &[Piece], max_tokens: usize) -> Output {
    collect(submit(engine, prompt, pieces.to_vec(), max_tokens))
}

/// Tokens and log-probabilities, by their bits.
pub fn bits(output: &Output) -> (Vec<u32>, Vec<(u32, u32)>) {
    let row = |row: &TokenLogprobs| -> Vec<(u32, u32)> {
        row.top.iter().chain([&row.chosen]).map(|top| (top.id, top.logprob.to_bits())).collect()
    };
    (output.tokens.clone(), output.logprobs.iter().flat_map(row).collect())
}

/// A prompt: a head, texts of these lengths with a few tokens between, a tail. The texts' sources have a head of their
/// own, one token long.
pub fn composed(random: &mut Random, lens: &[usize], num_recomputed: usize) -> (Vec<u32>, Vec<Piece>) {
    let mut prompt = random.tokens(5, VOCAB);
    let mut pieces = vec![];
    for &num_tokens in lens {
        let source = random.tokens(1 + num_tokens, VOCAB);
        let (start, domain) = (prompt.len(), String::new());
        prompt.extend_from_slice(&source[1..]);
        prompt.extend(random.tokens(2, VOCAB));
        pieces.push(Piece { start, num_tokens, source, source_start: 1, domain, num_recomputed, num_chosen: 0 });
    }
    prompt.extend(random.tokens(4, VOCAB));
    (prompt, pieces)
}

/// The same pieces, of which so many tokens each are computed because they deviate most.
pub fn blended(pieces: &[Piece], num_chosen: usize) -> Vec<Piece> {
    pieces.iter().map(|piece| Piece { num_chosen, ..piece.clone() }).collect()
}
