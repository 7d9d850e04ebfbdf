//! A chat as chunks: the role, then text or tool calls, then the reason it ended, then the token counts if asked for.

use std::ops::ControlFlow;

use serde::Serialize;
use utoipa::ToSchema;

use super::SYSTEM_FINGERPRINT;
use super::chat::ChatPlan;
use super::choice::{ChoiceEvent, Finish, FinishKind, StopReason};
use super::logprobs::ChatLogprobs;
use super::memory::MemoryAnswer;
use super::save::SavedCube;
use super::tool_reader::{MessageDelta, ToolReader};
use super::tools::ToolCall;
use super::usage::{Usage, UsageCounter};
use crate::engine::request::TokenLogprobs;
use crate::server::AppRef;
use crate::server::sse::{ChunkWriter, Chunks};

/// One `data:` line of a streamed chat.
#[derive(Serialize, ToSchema)]
pub(in crate::server) struct ChatChunk<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'static str,
    choices: &'a [ChatChunkChoice<'a>],
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Usage>,
    /// In the last chunk, when there are token counts or something was to be saved.
    #[serde(skip_serializing_if = "Option::is_none")]
    memory: Option<MemoryAnswer>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [u32]>,
}

/// What a chunk adds to a choice.
#[derive(Serialize, ToSchema, Default)]
struct ChatChunkChoice<'a> {
    index: usize,
    delta: ChatDelta<'a>,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<FinishKind>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
}

/// What a chunk adds to a message.
#[derive(Serialize, ToSchema, Default)]
struct ChatDelta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<ToolCallDelta<'a>>,
}

/// A call; the index counts the message's calls.
#[derive(Serialize, ToSchema)]
struct ToolCallDelta<'a> {
    index: usize,
    #[serde(flatten)]
    call: &'a ToolCall,
}

/// Writes the chunks of one call.
pub(super) struct ChatStream {
    app: AppRef,
    plan: ChatPlan,
    usage: UsageCounter,
    choices: Vec<OpenChoice>,
    saved: Option<SavedCube>,
}

/// A choice on its way out.
struct OpenChoice {
    reader: ToolReader,
    /// Tokens whose text has not been sent yet.
    unsent: UnsentTokens,
}

#[derive(Default)]
struct UnsentTokens {
    logprobs: Vec<TokenLogprobs>,
    ids: Vec<u32>,
}

impl ChatStream {
    pub(super) fn new(app: &AppRef, plan: ChatPlan) -> Self {
        let open = |_| OpenChoice { reader: ToolReader::new(plan.tool_format), unsent: UnsentTokens::default() };
        let choices = (0..plan.generation.num_choices()).map(open).collect();
        Self { app: app.clone(), usage: UsageCounter::new(&plan.generation), plan, choices, saved: None }
    }

    fn chunk<'a>(&'a self, choices: &'a [ChatChunkChoice], usage: Option<Usage>) -> ChatChunk<'a> {
        let head = &self.plan.call.head;
        ChatChunk {
            id: &head.id,
            object: "chat.completion.chunk",
            created: head.created,
            model: &head.model,
            system_fingerprint: SYSTEM_FINGERPRINT,
            choices,
            usage,
            memory: None,
            prompt_token_ids: None,
        }
    }

    fn push_choice(&self, chunks: &mut Chunks, choice: ChatChunkChoice) {
        let usage = self.plan.call.usage.in_every_chunk.then(|| self.usage.usage());
        chunks.push(&self.chunk(&[choice], usage));
    }

    fn write_role(&self, index: usize, chunks: &mut Chunks) {
        let delta = ChatDelta { role: Some("assistant"), content: Some(""), tool_calls: Vec::new() };
        let choice = ChatChunkChoice { index, delta, ..Default::default() };
        let usage = self.plan.call.usage.in_every_chunk.then(|| self.usage.usage());
        let prompt_token_ids = self.plan.call.return_token_ids.then(|| self.plan.generation.prompt_of(index));
        chunks.push(&ChatChunk { prompt_token_ids, ..self.chunk(&[choice], usage) });
    }

    fn write_token(
        &mut self,
        index: usize,
        id: u32,
        text: String,
        logprobs: Option<Box<TokenLogprobs>>,
        chunks: &mut Chunks,
    ) {
        self.usage.add_tokens(1);
        let choice = &mut self.choices[index];
        if self.plan.logprobs {
            choice.unsent.logprobs.extend(logprobs.map(|logprobs| *logprobs));
        }
        if self.plan.call.return_token_ids {
            choice.unsent.ids.push(id);
        }
        let delta = choice.reader.push(text);
        self.write_delta(index, &delta, chunks);
    }

    /// Sends text and calls; a token that added neither waits for the next one.
    fn write_delta(&mut self, index: usize, delta: &MessageDelta, chunks: &mut Chunks) {
        if delta.is_empty() {
            return;
        }
        let first_call = self.choices[index].reader.num_calls() - delta.tool_calls.len();
        let tool_calls = delta.tool_calls.iter().enumerate();
        let tool_calls = tool_calls.map(|(nth, call)| ToolCallDelta { index: first_call + nth, call }).collect();
        let (logprobs, token_ids) = self.take_unsent(index);
        let content = (!delta.content.is_empty()).then_some(delta.content.as_str());
        let delta = ChatDelta { role: None, content, tool_calls };
        self.push_choice(chunks, ChatChunkChoice { index, delta, logprobs, token_ids, ..Default::default() });
    }

    fn take_unsent(&mut self, index: usize) -> (Option<ChatLogprobs>, Option<Vec<u32>>) {
        let UnsentTokens { logprobs, ids } = std::mem::take(&mut self.choices[index].unsent);
        let logprobs = (!logprobs.is_empty()).then(|| ChatLogprobs::new(&self.app.model.tokenizer, &logprobs));
        (logprobs, self.plan.call.return_token_ids.then_some(ids))
    }

    fn write_finish(&mut self, index: usize, text: String, finish: Finish, chunks: &mut Chunks) {
        let reader = &mut self.choices[index].reader;
        let mut delta = reader.push(text);
        delta.append(reader.flush());
        let finish_reason = Some(reader.finish_kind(finish.reason));
        self.write_delta(index, &delta, chunks);
        let (logprobs, token_ids) = self.take_unsent(index);
        let stop_reason = finish.stop_reason;
        let delta = ChatDelta::default();
        self.push_choice(chunks, ChatChunkChoice { index, delta, logprobs, finish_reason, stop_reason, token_ids });
    }
}

impl ChunkWriter for ChatStream {
    type Event = (usize, ChoiceEvent);

    fn write(&mut self, (index, event): Self::Event, chunks: &mut Chunks) -> ControlFlow<()> {
        match event {
            ChoiceEvent::Started { cached_tokens, reuse, .. } => {
                self.usage.add_started(index, cached_tokens, &reuse);
                self.write_role(index, chunks);
            }
            ChoiceEvent::Token { id, text, logprobs } => self.write_token(index, id, text, logprobs, chunks),
            ChoiceEvent::Finished { text, finish } => self.write_finish(index, text, finish, chunks),
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
            chunks.push(&ChatChunk { memory, ..self.chunk(&[], usage) });
        }
    }
}
