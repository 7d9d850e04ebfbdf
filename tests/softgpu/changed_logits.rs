//! Rows of logits that requests change or ask about stay on the device: it gives the tokens, and the bits of logprobs, that
//! the host gives when the rows are brought to it.

use std::path::Path;
use std::sync::Arc;

use mneme::backend::DType;
use mneme::backend::cuda::CudaBackend;
use mneme::engine::{OutputStream, SamplingParams};
use mneme::text::{Grammar, GrammarEngine, GrammarState, Tokenizer};

use crate::invariance::fingerprint;
use crate::support::byte_tokenizer::{self, EOS};
use crate::support::engine::{Output, Setup, TestEngine, collect, greedy};
use crate::support::random::Random;
use crate::support::softgpu;
use crate::support::tiny_model::{Family, TinyModel, VOCAB};

/// Tokens of an answer, where nothing ends it before.
const LENGTH: usize = 14;

/// Of bytes and two control tokens: fewer than the model has.
fn grammar(grammar: &Grammar) -> GrammarState {
    let (file, config) = byte_tokenizer::files();
    let tokenizer = Tokenizer::from_json(file.as_bytes(), Some(config.as_bytes())).unwrap();
    GrammarEngine::new(Arc::new(tokenizer)).unwrap().compile(grammar).unwrap()
}

fn sampled(seed: u64) -> SamplingParams {
    SamplingParams { temperature: 1.2, seed: Some(seed), max_tokens: LENGTH, ..Default::default() }
}

fn penalised(params: SamplingParams) -> SamplingParams {
    SamplingParams { repetition_penalty: 1.4, frequency_penalty: 0.6, presence_penalty: -0.3, ..params }
}

/// Changes of every kind, alone and together.
fn changed() -> Vec<SamplingParams> {
    let biases = vec![(7, 1.5), (9, -4.0), (7, 1.25), (u32::MAX, 5.0), (250, 2.0), (VOCAB as u32, 9.0)];
    let bad_words = [(0..150).map(|id| vec![id]).collect::<Vec<_>>(), vec![vec![200, 201], vec![]]].concat();
    let json = Some(grammar(&Grammar::JsonObject));
    let digits = Some(grammar(&Grammar::Regex("[0-9]{3,}".into())));
    let allowed = Some(vec![5, 9, 48, 49, 200, 250, 299, 5000]);
    let stops: Vec<u32> = (0..VOCAB as u32 / 2).collect();
    vec![
        greedy(LENGTH),
        SamplingParams { top_k: 40, top_p: 0.9, min_p: 0.01, ..sampled(1) },
        penalised(greedy(LENGTH)),
        SamplingParams { top_k: 30, ..penalised(sampled(2)) },
        SamplingParams { logit_bias: biases.clone(), ..sampled(3) },
        SamplingParams { allowed_token_ids: allowed.clone(), ..greedy(LENGTH) },
        SamplingParams { allowed_token_ids: Some(vec![5000]), ..sampled(4) },
        SamplingParams { bad_words: bad_words.clone(), ..sampled(5) },
        SamplingParams { stop_token_ids: stops.clone(), min_tokens: 6, ..greedy(LENGTH) },
        SamplingParams { grammar: json.clone(), ..greedy(LENGTH) },
        SamplingParams { grammar: json, logit_bias: biases.clone(), ..penalised(sampled(6)) },
        SamplingParams {
            grammar: digits,
            allowed_token_ids: allowed,
            logit_bias: biases,
            bad_words,
            stop_token_ids: stops,
            min_tokens: 4,
            ..penalised(sampled(7))
        },
    ]
}

/// What the host does on every device: each of its tokens needs a row of logits there.
fn left_to_the_host() -> Vec<SamplingParams> {
    let biases = (0..5000).map(|id| (id, (id % 7) as f32 * 0.1)).collect();
    vec![
        SamplingParams { typical_p: 0.6, ..sampled(8) },
        SamplingParams { logit_bias: biases, ..greedy(LENGTH) },
        SamplingParams { logprobs: Some(21), ..penalised(greedy(LENGTH)) },
    ]
}

/// What all of them give at once, and how many tokens the host chose.
fn run(backend: CudaBackend, model: &Path, requests: &[SamplingParams]) -> (Vec<Output>, u64) {
    let setup = Setup { kv_dtype: DType::BF16, eos_token_ids: vec![EOS], ..Setup::default() };
    let engine = TestEngine::start(backend, model, setup);
    let mut random = Random::new(9);
    let submit = |params: &SamplingParams| engine.submit(&random.tokens(25, VOCAB), params.clone());
    let streams: Vec<OutputStream> = requests.iter().map(submit).collect();
    let outputs = streams.into_iter().map(collect).collect();
    (outputs, engine.stop().metrics().host_sampled_tokens.get())
}

fn check(requests: &[SamplingParams]) -> u64 {
    let model = TinyModel::new(Family::Llama, 23).write();
    let (found, num_on_host) = run(softgpu::backend(DType::BF16), model.path(), requests);
    let (wanted, _) = run(softgpu::backend(DType::BF16).without_logit_edits(), model.path(), requests);
    for (at, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
        assert_eq!(fingerprint(found), fingerprint(wanted), "request {at}");
        assert_eq!(found.reason, wanted.reason, "request {at}");
        let is_asked = requests[at].logprobs.is_some();
        assert_eq!(found.logprobs.len(), if is_asked { found.tokens.len() } else { 0 }, "request {at}");
    }
    num_on_host
}

#[test]
fn changed_logits_give_the_hosts_tokens() {
    assert_eq!(check(&changed()), 0, "rows were brought to the host");
}

#[test]
fn logprobs_have_the_hosts_bits() {
    let mut requests = changed();
    let num_tops = [0, 5, 20, 1];
    requests.iter_mut().zip(num_tops.into_iter().cycle()).for_each(|(params, count)| params.logprobs = Some(count));
    assert_eq!(check(&requests), 0, "rows were brought to the host");
}

/// Beside others that are not; and a prompt of which logprobs are wanted, behind which the host chooses one token.
#[test]
fn some_rows_are_brought_to_the_host() {
    let asked = SamplingParams { prompt_logprobs: Some(2), logprobs: Some(2), ..penalised(greedy(LENGTH)) };
    let requests = [left_to_the_host(), changed().split_off(8), vec![asked]].concat();
    assert_eq!(check(&requests), (left_to_the_host().len() * LENGTH) as u64 + 1);
}
