//! An engine that answers from a script, and a byte-level vocabulary to go with it.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc;

use crossbeam::channel::Receiver;
use mneme::engine::handle::{EngineHandle, EngineInfo, Submission};
use mneme::engine::request::{
    FinishReason, GenerateRequest, OutputEvent, Reuse, SamplingParams, Task, TokenLogprob, TokenLogprobs,
};
use mneme::telemetry::EngineMetrics;
use mneme::text::Tokenizer;

use crate::support::byte_tokenizer;
pub(crate) use crate::support::byte_tokenizer::BOS;

pub(crate) const MAX_MODEL_LEN: usize = 256;
pub(crate) const HIDDEN_SIZE: usize = 8;
pub(crate) const CACHED_TOKENS: usize = 2;
pub(crate) const VOCAB_SIZE: usize = 258;

/// What the engine does with every request.
#[derive(Clone)]
pub(crate) enum Script {
    /// Generates these bytes, then EOS.
    Say(Vec<u8>),
    /// Generates the prompt again.
    Echo,
    /// Sends `Started` and a token, then nothing until the request is cancelled, which it reports.
    Hang(mpsc::Sender<String>),
    /// Generates one token, then fails.
    Fail(FinishReason),
    /// Generates one token, then drops the request.
    Vanish,
    /// Takes nothing from its queue.
    Sleep,
}

impl Script {
    pub(crate) fn say(text: &str) -> Self {
        Self::Say(text.as_bytes().to_vec())
    }
}

pub(crate) struct FakeEngine {
    pub(crate) handle: EngineHandle,
    /// What was submitted.
    pub(crate) requests: Receiver<GenerateRequest>,
}

/// Starts the engine; it ends with its last handle.
pub(crate) fn start(script: Script, queue_len: usize) -> FakeEngine {
    let (submit, submissions) = crossbeam::channel::bounded::<Submission>(queue_len);
    let (report, requests) = crossbeam::channel::unbounded();
    let info = EngineInfo {
        max_model_len: MAX_MODEL_LEN,
        vocab_size: VOCAB_SIZE,
        hidden_size: HIDDEN_SIZE,
        block_size: 16,
        num_blocks: 64,
        num_multiplied: 1,
    };
    let metrics = Arc::new(EngineMetrics::new("tiny", info.block_size, info.num_blocks));
    let (waker, _) = crossbeam::channel::bounded(1);
    let handle = EngineHandle::new(submit, waker, info, metrics, Arc::new(AtomicBool::new(false)));
    if matches!(script, Script::Sleep) {
        // The queue must outlive this function, and nobody may read it.
        std::mem::forget(submissions);
        return FakeEngine { handle, requests };
    }
    std::thread::spawn(move || {
        std::thread::scope(|scope| {
            for submission in submissions {
                if let Script::Hang(cancelled) = script.clone() {
                    scope.spawn(move || hang(submission, &cancelled));
                    continue;
                }
                run(&script, &submission);
                report.send(submission.request).ok();
            }
        });
    });
    FakeEngine { handle, requests }
}

fn hang(submission: Submission, cancelled: &mpsc::Sender<String>) {
    submission.sink.send(OutputEvent::Started {
        cached_tokens: 0,
        reuse: Reuse::default(),
        prompt_logprobs: Vec::new(),
    });
    submission.sink.send(OutputEvent::Token { id: b'x'.into(), logprobs: None });
    while !submission.sink.is_cancelled() {
        std::thread::yield_now();
    }
    cancelled.send(submission.request.id).ok();
}

fn run(script: &Script, submission: &Submission) {
    let request = &submission.request;
    match &request.task {
        Task::Embed => embed(submission),
        Task::Deposit { .. } => panic!("cubes have an engine of their own here"),
        Task::Generate(sampling) => {
            start_output(submission, sampling);
            match script {
                Script::Say(bytes) => generate(submission, sampling, bytes.iter().map(|byte| u32::from(*byte))),
                Script::Echo => generate(submission, sampling, request.prompt.iter().copied()),
                Script::Fail(reason) => {
                    send_token(submission, sampling, b'x'.into());
                    submission.sink.send(OutputEvent::Finished(reason.clone()));
                }
                Script::Vanish => send_token(submission, sampling, b'x'.into()),
                Script::Hang(_) | Script::Sleep => unreachable!("these never come here"),
            }
        }
    }
}

fn start_output(submission: &Submission, sampling: &SamplingParams) {
    let prompt = &submission.request.prompt;
    let prompt_logprobs = match sampling.prompt_logprobs {
        None => Vec::new(),
        Some(num) => prompt.iter().enumerate().map(|(index, id)| (index > 0).then(|| logprobs_of(*id, num))).collect(),
    };
    submission.sink.send(OutputEvent::Started {
        cached_tokens: CACHED_TOKENS,
        reuse: Reuse::default(),
        prompt_logprobs,
    });
}

fn generate(submission: &Submission, sampling: &SamplingParams, ids: impl Iterator<Item = u32>) {
    let mut num_left = sampling.max_tokens.min(MAX_MODEL_LEN - submission.request.prompt.len());
    for id in ids {
        if sampling.stop_token_ids.contains(&id) {
            return submission.sink.send(OutputEvent::Finished(FinishReason::Stop { token: Some(id) }));
        }
        if num_left == 0 {
            return submission.sink.send(OutputEvent::Finished(FinishReason::Length));
        }
        num_left -= 1;
        send_token(submission, sampling, id);
    }
    submission.sink.send(OutputEvent::Finished(FinishReason::Stop { token: None }));
}

fn send_token(submission: &Submission, sampling: &SamplingParams, id: u32) {
    let logprobs = sampling.logprobs.map(|num| Box::new(logprobs_of(id, num)));
    submission.sink.send(OutputEvent::Token { id, logprobs });
}

/// The token itself is the likeliest; the others are impossible.
fn logprobs_of(id: u32, num_top: usize) -> TokenLogprobs {
    let other = |rank: u32| (id + rank - 1) % VOCAB_SIZE as u32;
    let entry =
        |rank: u32| TokenLogprob { id: other(rank), logprob: if rank == 1 { -0.5 } else { f32::NEG_INFINITY }, rank };
    TokenLogprobs { chosen: entry(1), top: (1..=num_top as u32).map(entry).collect() }
}

fn embed(submission: &Submission) {
    let vector = (0..HIDDEN_SIZE).map(|index| index as f32 + 1.0).collect();
    submission.sink.send(OutputEvent::Embedding(vector));
    submission.sink.send(OutputEvent::Finished(FinishReason::Stop { token: None }));
}

/// A vocabulary of all bytes and two control tokens.
pub(crate) fn tokenizer() -> Tokenizer {
    let (file, config) = byte_tokenizer::files();
    Tokenizer::from_json(file.as_bytes(), Some(config.as_bytes())).expect("the vocabulary is sound")
}
