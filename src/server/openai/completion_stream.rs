//! A completion as chunks: one per token, then one with the reason it ended, then the token counts if asked for.

use std::ops::ControlFlow;

use serde::Serialize;
use utoipa::ToSchema;

use super::choice::{ChoiceEvent, Finish, FinishKind, StopReason};
use super::completion_logprobs::CompletionLogprobs;
use super::completions::CompletionPlan;
use super::memory::MemoryAnswer;
use super::save::SavedCube;
use super::usage::{Usage, UsageCounter};
use crate::engine::request::TokenLogprobs;
use crate::server::AppRef;
use crate::server::error::ApiError;
use crate::server::sse::{ChunkWriter, Chunks};

/// One `data:` line of a streamed completion.
#[derive(Serialize, ToSchema)]
pub(in crate::server) struct CompletionChunk<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: &'a [CompletionChunkChoice<'a>],
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Usage>,
    /// In the last chunk, when there are token counts or something was to be saved.
    #[serde(skip_serializing_if = "Option::is_none")]
    memory: Option<MemoryAnswer>,
}

/// What a chunk adds to a choice.
#[derive(Serialize, ToSchema, Default)]
struct CompletionChunkChoice<'a> {
    index: usize,
    text: &'a str,
    logprobs: Option<CompletionLogprobs>,
    finish_reason: Option<FinishKind>,
    stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<&'a [u32]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [u32]>,
}

/// Writes the chunks of one call.
pub(super) struct CompletionStream {
    app: AppRef,
    plan: CompletionPlan,
    usage: UsageCounter,
    /// Per choice, where its next token begins in its text.
    offsets: Vec<usize>,
    saved: Option<SavedCube>,
}

impl CompletionStream {
    pub(super) fn new(app: &AppRef, plan: CompletionPlan) -> Self {
        let usage = UsageCounter::new(&plan.generation);
        let offsets = vec![0; plan.generation.num_choices()];
        Self { app: app.clone(), plan, usage, offsets, saved: None }
    }

    fn chunk<'a>(&'a self, choices: &'a [CompletionChunkChoice], usage: Option<Usage>) -> CompletionChunk<'a> {
        let head = &self.plan.call.head;
        CompletionChunk {
            id: &head.id,
            object: "text_completion",
            created: head.created,
            model: &head.model,
            choices,
            usage,
            memory: None,
        }
    }

    fn push_choice(&self, chunks: &mut Chunks, choice: CompletionChunkChoice) {
        let usage = self.plan.call.usage.in_every_chunk.then(|| self.usage.usage());
        chunks.push(&self.chunk(&[choice], usage));
    }

    /// The prompt, when it is to be shown.
    fn write_prompt(
        &mut self,
        index: usize,
        prompt_logprobs: &[Option<TokenLogprobs>],
        chunks: &mut Chunks,
    ) -> Result<(), ApiError> {
        let prompt = self.plan.generation.prompt_of(index);
        let show = self.plan.show;
        let prompt_token_ids = self.plan.call.return_token_ids.then_some(prompt);
        if !show.echo && prompt_token_ids.is_none() {
            return Ok(());
        }
        let tokenizer = &self.app.model.tokenizer;
        let text = if show.echo { self.plan.echo_text(&self.app.model, index)? } else { String::new() };
        let logprobs = (show.echo && show.logprobs).then(|| {
            let mut lists = CompletionLogprobs::default();
            self.offsets[index] = lists.push_prompt(tokenizer, prompt, prompt_logprobs);
            lists
        });
        let choice = CompletionChunkChoice { index, text: &text, logprobs, prompt_token_ids, ..Default::default() };
        self.push_choice(chunks, choice);
        Ok(())
    }

    fn write_token(
        &mut self,
        index: usize,
        id: u32,
        text: &str,
        logprobs: Option<&TokenLogprobs>,
        chunks: &mut Chunks,
    ) {
        self.usage.add_tokens(1);
        let logprobs = logprobs.filter(|_| self.plan.show.logprobs).map(|logprobs| {
            let mut lists = CompletionLogprobs::default();
            let offset = &mut self.offsets[index];
            *offset = lists.push(&self.app.model.tokenizer, id, Some(logprobs), *offset);
            lists
        });
        let ids = [id];
        let token_ids = self.plan.call.return_token_ids.then_some(ids.as_slice());
        self.push_choice(chunks, CompletionChunkChoice { index, text, logprobs, token_ids, ..Default::default() });
    }

    fn write_finish(&self, index: usize, text: &str, finish: Finish, chunks: &mut Chunks) {
        let Finish { reason, stop_reason } = finish;
        let choice =
            CompletionChunkChoice { index, text, finish_reason: Some(reason), stop_reason, ..Default::default() };
        self.push_choice(chunks, choice);
    }
}

impl ChunkWriter for CompletionStream {
    type Event = (usize, ChoiceEvent);

    fn write(&mut self, (index, event): Self::Event, chunks: &mut Chunks) -> ControlFlow<()> {
        match event {
            ChoiceEvent::Started { cached_tokens, reuse, prompt_logprobs } => {
                self.usage.add_started(index, cached_tokens, &reuse);
                if let Err(error) = self.write_prompt(index, &prompt_logprobs, chunks) {
                    chunks.push_error(&error);
                    return ControlFlow::Break(());
                }
            }
            ChoiceEvent::Token { id, text, logprobs } => {
                self.write_token(index, id, &text, logprobs.as_deref(), chunks);
            }
            ChoiceEvent::Finished { text, finish } => self.write_finish(index, &text, finish, chunks),
            ChoiceEvent::Failed(error) => {
                chunks.push_error(&error);
                return ControlFlow::Break(());
            }
            ChoiceEvent::Saved(saved) => self.saved = Some(*saved),
        }
        ControlFlow::Continue(())
    }

    fn end(&mut self, chunks: &mut Chunks) {
        let saved = self.saved.take();
        let usage = self.plan.call.usage.at_end.then(|| self.usage.usage());
        if usage.is_some() || saved.is_some() {
            let memory = self.plan.call.memory_answer(&self.usage, saved);
            chunks.push(&CompletionChunk { memory, ..self.chunk(&[], usage) });
        }
    }
}
