//! Sampling parameters, as a caller sees them.

use mneme::engine::{FinishReason, SamplingParams};

use crate::support::engine::{Output, Setup, TestEngine, collect, greedy, limits};
use crate::support::random::Random;
use crate::support::tiny_model::{Family, TinyModel, VOCAB, Written};

fn model() -> Written {
    TinyModel::new(Family::Llama, 2).write()
}

fn prompt(len: usize) -> Vec<u32> {
    Random::new(len as u64).tokens(len, VOCAB)
}

fn run(engine: &TestEngine, sampling: SamplingParams) -> Output {
    collect(engine.submit(&prompt(20), sampling))
}

/// A token of the greedy output that did not occur before, and where.
fn fresh_token(tokens: &[u32]) -> (usize, u32) {
    let at = (3..tokens.len()).find(|&at| !tokens[..at].contains(&tokens[at])).expect("the output varies");
    (at, tokens[at])
}

#[test]
fn a_seed_decides_what_is_drawn() {
    let engine = crate::start(model().path(), Setup::default());
    let sampled = |seed: u64| SamplingParams { seed: Some(seed), max_tokens: 20, ..Default::default() };
    let first = run(&engine, sampled(7)).tokens;
    let others: Vec<_> = (0..6).map(|seed| engine.submit(&prompt(30), sampled(seed))).collect();
    assert_eq!(run(&engine, sampled(7)).tokens, first);
    others.into_iter().for_each(|stream| drop(collect(stream)));
    assert_ne!(run(&engine, sampled(8)).tokens, first);
    let fresh = SamplingParams { max_tokens: 20, ..Default::default() };
    assert_ne!(run(&engine, fresh.clone()).tokens, run(&engine, fresh).tokens, "requests without a seed differ");
}

/// The device draws where nobody looks at the logits, else the host.
#[test]
fn who_looks_at_logprobs_changes_no_draw() {
    let engine = crate::start(model().path(), Setup::default());
    for (temperature, top_k, top_p, min_p) in
        [(1.0, 0, 1.0, 0.0), (0.7, 0, 0.8, 0.0), (1.5, 40, 1.0, 0.0), (2.0, 100, 0.95, 0.05), (0.5, 1, 1.0, 0.0)]
    {
        let sampling =
            SamplingParams { seed: Some(11), temperature, top_k, top_p, min_p, max_tokens: 20, ..Default::default() };
        let watched = run(&engine, SamplingParams { logprobs: Some(1), ..sampling.clone() });
        assert_eq!(
            run(&engine, sampling.clone()).tokens,
            watched.tokens,
            "{temperature}, top-k {top_k}, top-p {top_p}, min-p {min_p}"
        );
    }
}

#[test]
fn logprobs_describe_the_sampled_token() {
    let engine = crate::start(model().path(), Setup::default());
    let sampling = SamplingParams {
        seed: Some(3),
        temperature: 1.5,
        max_tokens: 20,
        logprobs: Some(VOCAB),
        logit_bias: vec![(5, 3.0)],
        frequency_penalty: 0.5,
        ..Default::default()
    };
    let output = run(&engine, sampling.clone());
    assert_eq!(output.logprobs.len(), 20);
    for (token, logprobs) in output.tokens.iter().zip(&output.logprobs) {
        assert_eq!(logprobs.chosen.id, *token);
        assert!(logprobs.top.contains(&logprobs.chosen), "the same numbers wherever the token is listed");
        let total: f64 = logprobs.top.iter().map(|top| f64::from(top.logprob).exp()).sum();
        assert!((total - 1.0).abs() < 1e-4, "probabilities add up to {total}");
        assert!(logprobs.top.is_sorted_by(|a, b| a.logprob >= b.logprob));
        assert_eq!(logprobs.top[0].rank, 1);
    }
    let unasked = run(&engine, SamplingParams { logprobs: None, ..sampling.clone() });
    assert_eq!((unasked.tokens, unasked.logprobs.len()), (output.tokens, 0));
    let greedy = run(&engine, SamplingParams { logprobs: Some(2), ..greedy(10) });
    assert!(greedy.logprobs.iter().all(|logprobs| logprobs.chosen == logprobs.top[0]));
}

#[test]
fn prompt_logprobs_are_the_logprobs_of_feeding_the_prompt() {
    let engine = crate::start(model().path(), Setup::default());
    let generated = run(&engine, SamplingParams { logprobs: Some(2), ..greedy(10) });
    let longer = [prompt(20), generated.tokens.clone()].concat();
    let fed = collect(engine.submit(&longer, SamplingParams { prompt_logprobs: Some(2), ..greedy(1) }));
    let fed: Vec<_> = fed.prompt_logprobs[20..].iter().map(|found| found.clone().unwrap()).collect();
    for (fed, generated) in fed.iter().zip(&generated.logprobs) {
        assert_eq!((fed.chosen, &fed.top), (generated.chosen, &generated.top));
    }
}

#[test]
fn stop_tokens_end_the_output_and_are_not_part_of_it() {
    let engine = crate::start(model().path(), Setup::default());
    let free = run(&engine, greedy(40));
    assert_eq!((free.tokens.len(), free.reason), (40, Some(FinishReason::Length)));
    let (at, stop) = fresh_token(&free.tokens);
    let stopped = run(&engine, SamplingParams { stop_token_ids: vec![299, stop], ..greedy(40) });
    assert_eq!(stopped.tokens, free.tokens[..at]);
    assert_eq!(stopped.reason, Some(FinishReason::Stop { token: Some(stop) }));
    let later = run(&engine, SamplingParams { stop_token_ids: vec![stop], min_tokens: at + 5, ..greedy(40) });
    assert!(later.tokens.len() >= at + 5, "{} tokens", later.tokens.len());
    assert_eq!(later.tokens[..at], free.tokens[..at]);
    assert!(!later.tokens.contains(&stop));
}

#[test]
fn eos_ends_the_output_unless_ignored() {
    let model = model();
    let engine = crate::start(model.path(), Setup::default());
    let free = run(&engine, greedy(40)).tokens;
    let (at, eos) = fresh_token(&free);
    let engine = crate::start(model.path(), Setup { eos_token_ids: vec![298, eos], ..Setup::default() });
    let ended = run(&engine, greedy(40));
    assert_eq!((ended.tokens, ended.reason), (free[..at].to_vec(), Some(FinishReason::Stop { token: None })));
    let ignored = run(&engine, SamplingParams { ignore_eos: true, ..greedy(40) });
    assert_eq!((ignored.tokens, ignored.reason), (free.clone(), Some(FinishReason::Length)));
    let least = run(&engine, SamplingParams { min_tokens: at + 2, ..greedy(40) });
    assert!(least.tokens.len() >= at + 2 && !least.tokens.contains(&eos));
}

#[test]
fn outputs_stay_within_the_context() {
    let engine = crate::start(model().path(), Setup::default());
    let room = 24;
    let long = prompt(limits().max_model_len - room);
    let output = collect(engine.submit(&long, greedy(usize::MAX)));
    assert_eq!((output.tokens.len(), output.reason), (room, Some(FinishReason::Length)));
    let none = collect(engine.submit(&long, greedy(0)));
    assert_eq!((none.tokens.len(), none.reason), (0, Some(FinishReason::Length)));
}

#[test]
fn biases_and_bounds_on_tokens_are_kept() {
    let engine = crate::start(model().path(), Setup::default());
    let free = run(&engine, greedy(12)).tokens;
    let biased = run(&engine, SamplingParams { logit_bias: vec![(7, 1000.0)], ..greedy(6) });
    assert_eq!(biased.tokens, [7; 6]);
    let allowed = SamplingParams { allowed_token_ids: Some(vec![5, 9, 250]), max_tokens: 30, ..Default::default() };
    let allowed = run(&engine, allowed).tokens;
    assert!(allowed.iter().all(|token| [5, 9, 250].contains(token)), "{allowed:?}");
    assert!(allowed.contains(&5) || allowed.contains(&250));
    let bad = run(&engine, SamplingParams { bad_words: vec![vec![free[0], free[1]]], ..greedy(12) }).tokens;
    assert_eq!(bad[0], free[0]);
    assert_ne!(bad[1], free[1]);
    let unknown = run(&engine, SamplingParams { logit_bias: vec![(u32::MAX, 5.0)], ..greedy(12) });
    assert_eq!(unknown.tokens, free, "a bias on a token that does not exist changes nothing");
}
