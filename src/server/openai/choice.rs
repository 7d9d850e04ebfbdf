//! One choice: engine events become pieces of text, stop strings end it.

use std::pin::Pin;

use futures_core::Stream;
use futures_util::StreamExt;
use serde::Serialize;
use utoipa::ToSchema;

use super::generation::{Generation, Outputs};
use super::save::SavedCube;
use crate::engine::handle::OutputStream;
use crate::engine::request::{FinishReason, OutputEvent, Reuse, TokenLogprobs};
use crate::server::AppRef;
use crate::server::error::ApiError;
use crate::text::Detokenizer;

/// What happens to a choice, in order: `Started`, `Token`s, then `Finished` or `Failed`. The only choice of a call that
/// wants it saved has `Saved` behind `Finished`.
pub(super) enum ChoiceEvent {
    /// The prompt has been computed.
    Started { cached_tokens: usize, reuse: Reuse, prompt_logprobs: Vec<Option<TokenLogprobs>> },
    /// A token, with the text that is now certain: less than the token's own when characters are unfinished or a stop
    /// string may have begun.
    Token { id: u32, text: String, logprobs: Option<Box<TokenLogprobs>> },
    /// The end, with the text that was held back until now.
    Finished { text: String, finish: Finish },
    /// The engine could not go on.
    Failed(ApiError),
    /// What became of `memory.save`.
    Saved(Box<SavedCube>),
}

/// How a choice ended.
#[derive(Debug, Clone)]
pub(super) struct Finish {
    pub(super) reason: FinishKind,
    pub(super) stop_reason: Option<StopReason>,
}

/// `finish_reason` in answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum FinishKind {
    /// The model ended, or a stop string or token came.
    Stop,
    /// `max_tokens` or the context is used up.
    Length,
    /// The model calls tools.
    ToolCalls,
}

/// What ended a choice, if it was in the request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(untagged)]
pub(super) enum StopReason {
    /// A token of `stop_token_ids`.
    Token(u32),
    /// A string of `stop`.
    Text(String),
}

/// The events of one choice, each with the choice's index.
pub(super) type ChoiceStream = Pin<Box<dyn Stream<Item = (usize, ChoiceEvent)> + Send>>;

/// A choice in progress.
pub(super) struct Choice {
    index: usize,
    app: AppRef,
    detokenizer: Detokenizer,
    stop: Vec<String>,
    /// The caller wants no tokens, only what the prompt says.
    prompt_only: bool,
    state: State,
}

enum State {
    Running(OutputStream),
    /// Only the end is left to tell.
    Ending(Finish),
    Ended,
}

impl Choice {
    pub(super) fn new(index: usize, app: &AppRef, generation: &Generation, stream: OutputStream) -> Self {
        let text = &generation.text;
        Self {
            index,
            app: app.clone(),
            detokenizer: Detokenizer::new(app.model.tokenizer.clone(), text.clone()),
            stop: text.stop.clone(),
            prompt_only: generation.sampling.max_tokens == 0,
            state: State::Running(stream),
        }
    }

    pub(super) fn into_stream(self) -> ChoiceStream {
        Box::pin(futures_util::stream::unfold(self, async |mut choice: Self| {
            let event = choice.next().await?;
            Some(((choice.index, event), choice))
        }))
    }

    async fn next(&mut self) -> Option<ChoiceEvent> {
        match std::mem::replace(&mut self.state, State::Ended) {
            State::Running(mut stream) => {
                let event = stream.next().await;
                Some(self.on_event(event, stream))
            }
            State::Ending(finish) => Some(ChoiceEvent::Finished { text: String::new(), finish }),
            State::Ended => None,
        }
    }

    /// Keeps `stream` while more can come; dropping it tells the engine to stop.
    fn on_event(&mut self, event: Option<OutputEvent>, stream: OutputStream) -> ChoiceEvent {
        match event {
            Some(OutputEvent::Started { cached_tokens, reuse, prompt_logprobs }) => {
                self.state = match self.prompt_only {
                    true => State::Ending(Finish { reason: FinishKind::Length, stop_reason: None }),
                    false => State::Running(stream),
                };
                ChoiceEvent::Started { cached_tokens, reuse, prompt_logprobs }
            }
            Some(OutputEvent::Token { id, logprobs }) => self.on_token(id, logprobs, stream),
            Some(OutputEvent::Finished(reason)) => self.on_finish(reason),
            Some(other @ (OutputEvent::Embedding(_) | OutputEvent::Deposited(_))) => {
                tracing::error!(?other, "the engine answered a generation with something else");
                ChoiceEvent::Failed(engine_failure())
            }
            None => {
                self.app.note_engine_end();
                ChoiceEvent::Failed(engine_failure())
            }
        }
    }

    fn on_token(&mut self, id: u32, logprobs: Option<Box<TokenLogprobs>>, stream: OutputStream) -> ChoiceEvent {
        let piece = self.detokenizer.push(id);
        self.state = match piece.stop {
            Some(index) => State::Ending(self.stopped_by(index)),
            None => State::Running(stream),
        };
        ChoiceEvent::Token { id, text: piece.text, logprobs }
    }

    fn stopped_by(&self, stop_index: usize) -> Finish {
        let stop_reason = Some(StopReason::Text(self.stop[stop_index].clone()));
        Finish { reason: FinishKind::Stop, stop_reason }
    }

    fn on_finish(&mut self, reason: FinishReason) -> ChoiceEvent {
        let piece = self.detokenizer.flush();
        let (kind, token) = match reason {
            FinishReason::Stop { token } => (FinishKind::Stop, token),
            FinishReason::Length => (FinishKind::Length, None),
            FinishReason::Abort => return ChoiceEvent::Failed(ApiError::unavailable("The server is shutting down.")),
            FinishReason::Error(error) => {
                tracing::error!(%error, "the engine gave up on a request");
                return ChoiceEvent::Failed(engine_failure());
            }
        };
        let finish = match piece.stop {
            Some(index) => self.stopped_by(index),
            None => Finish { reason: kind, stop_reason: token.map(StopReason::Token) },
        };
        ChoiceEvent::Finished { text: piece.text, finish }
    }
}

/// What the client learns of a failure whose cause is in the log.
pub(super) fn engine_failure() -> ApiError {
    ApiError::internal("The engine failed; the server's log says why.")
}

/// A choice that has ended.
pub(super) struct FinishedChoice {
    pub(super) text: String,
    pub(super) token_ids: Vec<u32>,
    /// One per token if asked for.
    pub(super) logprobs: Vec<TokenLogprobs>,
    pub(super) cached_tokens: usize,
    pub(super) reuse: Reuse,
    pub(super) prompt_logprobs: Vec<Option<TokenLogprobs>>,
    pub(super) finish: Finish,
    pub(super) saved: Option<Box<SavedCube>>,
}

#[derive(Default)]
struct GrowingChoice {
    text: String,
    token_ids: Vec<u32>,
    logprobs: Vec<TokenLogprobs>,
    cached_tokens: usize,
    reuse: Reuse,
    prompt_logprobs: Vec<Option<TokenLogprobs>>,
    finish: Option<Finish>,
    saved: Option<Box<SavedCube>>,
}

impl GrowingChoice {
    fn add(&mut self, event: ChoiceEvent) -> Result<(), ApiError> {
        match event {
            ChoiceEvent::Started { cached_tokens, reuse, prompt_logprobs } => {
                self.cached_tokens = cached_tokens;
                self.reuse = reuse;
                self.prompt_logprobs = prompt_logprobs;
            }
            ChoiceEvent::Token { id, text, logprobs } => {
                self.token_ids.push(id);
                self.text.push_str(&text);
                self.logprobs.extend(logprobs.map(|logprobs| *logprobs));
            }
            ChoiceEvent::Finished { text, finish } => {
                self.text.push_str(&text);
                self.finish = Some(finish);
            }
            ChoiceEvent::Failed(error) => return Err(error),
            ChoiceEvent::Saved(saved) => self.saved = Some(saved),
        }
        Ok(())
    }

    fn end(self) -> Result<FinishedChoice, ApiError> {
        let Self { text, token_ids, logprobs, cached_tokens, reuse, prompt_logprobs, finish, saved } = self;
        let finish = finish.ok_or_else(engine_failure)?;
        Ok(FinishedChoice { text, token_ids, logprobs, cached_tokens, reuse, prompt_logprobs, finish, saved })
    }
}

/// Waits for all choices, in the order of their indices.
pub(super) async fn collect(mut outputs: Outputs, num_choices: usize) -> Result<Vec<FinishedChoice>, ApiError> {
    let mut choices: Vec<GrowingChoice> = Vec::new();
    choices.resize_with(num_choices, GrowingChoice::default);
    while let Some((index, event)) = outputs.next().await {
        choices[index].add(event)?;
    }
    choices.into_iter().map(GrowingChoice::end).collect()
}
