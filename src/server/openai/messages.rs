//! Chat messages on their way into a prompt: checked, rendered by the model's template, tokenized.

use serde::Deserialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::link::LinkedContent;
use super::memory::CallMemory;
use super::prompt::Prompts;
use crate::memory::{ChatSetting, CubePrompt, Twin, cube_prompt, cube_prompt_text};
use crate::server::App;
use crate::server::error::ApiError;
use crate::server::limits::check_len;

/// The fields that make a chat's prompt.
#[derive(Debug, Deserialize, ToSchema)]
pub(in crate::server) struct ChatPromptRequest {
    /// The conversation so far.
    #[schema(value_type = Vec<ChatMessage>, min_items = 1)]
    messages: Vec<Map<String, Value>>,
    /// End the prompt with the beginning of the assistant's turn; on unless turned off or the last message goes on.
    add_generation_prompt: Option<bool>,
    /// Let the model go on with the last message instead of answering it.
    continue_final_message: Option<bool>,
    /// Add the tokens that texts begin with; off unless turned on, since templates write them.
    add_special_tokens: Option<bool>,
    /// Further variables for the template.
    #[schema(value_type = Option<Object>)]
    chat_template_kwargs: Option<Map<String, Value>>,
}

/// A message; the template may read further fields.
#[derive(ToSchema)]
#[expect(dead_code, reason = "documents the messages, which the template reads")]
struct ChatMessage {
    role: String,
    /// Text, or a list of text parts.
    #[schema(value_type = Option<Object>)]
    content: Option<Value>,
}

/// Checked messages.
pub(in crate::server) struct ChatPrompt {
    messages: Vec<Value>,
    add_generation_prompt: bool,
    /// The text that the prompt must end with.
    continued: Option<String>,
    add_special_tokens: bool,
    variables: Map<String, Value>,
}

impl ChatPromptRequest {
    pub(in crate::server) fn check(self, app: &App) -> Result<ChatPrompt, ApiError> {
        check_len("messages", self.messages.len(), app.config.request_limits.max_messages)?;
        if self.messages.is_empty() {
            return Err(ApiError::invalid_field("messages", "messages must not be empty."));
        }
        for (index, message) in self.messages.iter().enumerate() {
            check_message(index, message)?;
        }
        let goes_on = self.continue_final_message.unwrap_or(false);
        let add_generation_prompt = self.add_generation_prompt.unwrap_or(!goes_on);
        if goes_on && add_generation_prompt {
            let message = "continue_final_message and add_generation_prompt cannot both be true.";
            return Err(ApiError::invalid_field("continue_final_message", message));
        }
        let continued = if goes_on { Some(final_text(&self.messages)?) } else { None };
        Ok(ChatPrompt {
            messages: self.messages.into_iter().map(Value::Object).collect(),
            add_generation_prompt,
            continued,
            add_special_tokens: self.add_special_tokens.unwrap_or(false),
            variables: self.chat_template_kwargs.unwrap_or_default(),
        })
    }
}

fn check_message(index: usize, message: &Map<String, Value>) -> Result<(), ApiError> {
    let field = |name: &str| format!("messages[{index}].{name}");
    if !message.get("role").is_some_and(Value::is_string) {
        let field = field("role");
        return Err(ApiError::invalid_field(&field, format!("{field} must be a string.")));
    }
    match message.get("content") {
        None | Some(Value::Null | Value::String(_)) => Ok(()),
        Some(Value::Array(parts)) if parts.iter().all(Value::is_object) => Ok(()),
        Some(_) => {
            let field = field("content");
            Err(ApiError::invalid_field(&field, format!("{field} must be a string or a list of parts.")))
        }
    }
}

/// The end of the last message, for a prompt that stops there.
fn final_text(messages: &[Map<String, Value>]) -> Result<String, ApiError> {
    let text = match messages.last().and_then(|message| message.get("content")) {
        Some(Value::String(text)) => Some(text.as_str()),
        Some(Value::Array(parts)) => parts.last().and_then(|part| part["text"].as_str()),
        _ => None,
    };
    let text = text.map(str::trim).filter(|text| !text.is_empty());
    text.map(str::to_owned).ok_or_else(|| {
        let message = "continue_final_message needs a last message with text.";
        ApiError::invalid_field("continue_final_message", message)
    })
}

impl ChatPrompt {
    /// Renders and tokenizes behind the cubes of a call.
    pub(super) fn tokenize_behind(
        self,
        app: &App,
        memory: Option<&CallMemory>,
        tools: Option<&Value>,
    ) -> Result<Prompts, ApiError> {
        let Some(memory) = memory else { return Ok(Prompts::alone(vec![self.tokenize(app, tools)?])) };
        if let Some(ids) = memory.token_ids() {
            return Ok(Prompts::behind(ids, vec![self.tokenize(app, tools)?]));
        }
        if self.continued.is_some() {
            let message = "continue_final_message cannot be combined with memory cubes.";
            return Err(ApiError::invalid_field("continue_final_message", message));
        }
        match (memory.twin(), memory.linked()) {
            (Some(twin), _) => self.behind_twin(app, twin, tools),
            (None, contents) => self.behind_linked(app, memory, contents.unwrap_or_default(), tools),
        }
    }

    /// Where linked cubes stand in a chat depends on what they are.
    fn behind_linked(
        self,
        app: &App,
        memory: &CallMemory,
        contents: &[LinkedContent],
        tools: Option<&Value>,
    ) -> Result<Prompts, ApiError> {
        let is_text = |content: &LinkedContent| matches!(content, LinkedContent::Text(_));
        let is_ids = |content: &LinkedContent| *content == LinkedContent::TokenIds;
        let messages: Option<Vec<Map<String, Value>>> = contents.iter().try_fold(Vec::new(), |mut all, content| {
            let LinkedContent::Messages(twin) = content else { return None };
            all.extend_from_slice(twin.messages()?);
            Some(all)
        });
        match (contents, messages) {
            ([LinkedContent::Text(text), ..], _) if contents.iter().all(is_text) => {
                self.behind_texts(app, memory, text, tools)
            }
            (_, Some(messages)) => self.behind_messages(app, memory, messages, tools),
            _ if contents.iter().all(is_ids) => {
                let rest = self.tokenize(app, tools)?;
                memory.link(&app.model.tokenizer, Vec::new(), vec![rest])
            }
            _ => {
                let message = "In a chat the cubes to link are all of text, all of messages or all of token ids: texts stand in \
                               the system message, the others before it.";
                Err(ApiError::invalid_field("memory", message))
            }
        }
    }

    /// The cubes' messages stand before those of the call.
    fn behind_messages(
        self,
        app: &App,
        memory: &CallMemory,
        messages: Vec<Map<String, Value>>,
        tools: Option<&Value>,
    ) -> Result<Prompts, ApiError> {
        let (template, tokenizer) = (app.model.template.as_ref().ok_or_else(no_template)?, &app.model.tokenizer);
        let setting =
            ChatSetting { tools, add_generation_prompt: self.add_generation_prompt, variables: &self.variables };
        let CubePrompt { rest, .. } = cube_prompt_text(template, &Twin::Messages(messages), &self.messages, setting)
            .map_err(|error| ApiError::from(error).with_param("messages"))?;
        memory.link(tokenizer, Vec::new(), vec![tokenizer.encode(&rest, false)?])
    }

    /// The cubes' texts stand where the template writes the first of them.
    fn behind_texts(
        self,
        app: &App,
        memory: &CallMemory,
        text: &str,
        tools: Option<&Value>,
    ) -> Result<Prompts, ApiError> {
        let (template, tokenizer) = (app.model.template.as_ref().ok_or_else(no_template)?, &app.model.tokenizer);
        let setting =
            ChatSetting { tools, add_generation_prompt: self.add_generation_prompt, variables: &self.variables };
        let twin = Twin::Text(text.to_owned());
        let CubePrompt { cube, rest } = cube_prompt_text(template, &twin, &self.messages, setting)
            .map_err(|error| ApiError::from(error).with_param("messages"))?;
        let head = cube.strip_suffix(text).ok_or_else(|| {
            let message = "This model's chat template does not write a text as it is, so its KV cannot be linked.";
            ApiError::invalid_field("memory.compose", message)
        })?;
        memory.link(tokenizer, tokenizer.encode(head, false)?, vec![tokenizer.encode(&rest, false)?])
    }

    fn behind_twin(self, app: &App, twin: &Twin, tools: Option<&Value>) -> Result<Prompts, ApiError> {
        let template = app.model.template.as_ref().ok_or_else(no_template)?;
        let setting =
            ChatSetting { tools, add_generation_prompt: self.add_generation_prompt, variables: &self.variables };
        let CubePrompt { cube, rest } = cube_prompt(template, &app.model.tokenizer, twin, &self.messages, setting)
            .map_err(|error| ApiError::from(error).with_param("messages"))?;
        Ok(Prompts::behind(&cube, vec![rest]))
    }

    /// Renders and tokenizes.
    pub(in crate::server) fn tokenize(self, app: &App, tools: Option<&Value>) -> Result<Vec<u32>, ApiError> {
        let template = app.model.template.as_ref().ok_or_else(no_template)?;
        let messages = Value::Array(self.messages);
        let mut text = template
            .render(&messages, tools, self.add_generation_prompt, &self.variables)
            .map_err(|error| ApiError::from(error).with_param("messages"))?;
        if let Some(end) = &self.continued {
            cut_after(&mut text, end)?;
        }
        Ok(app.model.tokenizer.encode(&text, self.add_special_tokens)?)
    }
}

fn no_template() -> ApiError {
    ApiError::bad_request("This model has no chat template; use /v1/completions instead of a chat.")
}

/// Removes what the template wrote after the last message.
fn cut_after(text: &mut String, end: &str) -> Result<(), ApiError> {
    let start = text.rfind(end).ok_or_else(|| {
        let message = "continue_final_message: the chat template does not write the last message as it is.";
        ApiError::invalid_field("continue_final_message", message)
    })?;
    text.truncate(start + end.len());
    Ok(())
}
