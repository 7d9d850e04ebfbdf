//! What a request puts into a cube: text, messages or token ids, on their way to a payload.

use serde::Deserialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::object::Work;
use super::service;
use super::service::{BlockRequest, BlockSource, CubeService};
use crate::engine::request::SharedPrefix;
use crate::memory::{
    Activation, Binding, Blocks, ChatSetting, Digest, Payload, Priority, Twin, chat_cube_tokens,
    completion_cube_tokens, cube_prompt,
};
use crate::server::App;
use crate::server::config::ServedModel;
use crate::server::error::ApiError;
use crate::server::limits::check_len;
use crate::server::openai::check_token_ids;
use crate::text::ChatTemplate;

/// What a cube is to hold: one of the three.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct ContentRequest {
    /// A text. In a chat it stands at the start of the system message.
    text: Option<String>,
    /// A conversation; it stands before the messages of a request.
    #[schema(value_type = Option<Vec<Object>>)]
    messages: Option<Vec<Map<String, Value>>>,
    /// The beginning of a prompt, token by token.
    token_ids: Option<Vec<u32>>,
    /// Whether the tokens are those of a chat or of a plain completion; a chat when the model has a template.
    target: Option<Target>,
}

/// What kind of request a cube is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Target {
    /// Prompts that the chat template makes.
    Chat,
    /// Prompts as they are.
    Completion,
}

/// How what is computed for a cube is kept.
pub(super) struct Keeping {
    /// The cache domain.
    pub(super) domain: String,
    /// Whether it would survive a crash when it is there.
    pub(super) durable: bool,
    pub(super) erase_on_free: bool,
    pub(super) priority: Priority,
}

/// Checked content.
#[derive(Debug, Clone)]
pub(super) enum Content {
    Written(Twin, Target),
    Tokens(Vec<u32>),
}

/// Tokens with what they were made from, not yet run through the model.
pub(super) struct TokenizedContent {
    twin: Option<Twin>,
    token_ids: Vec<u32>,
    /// Digest of the chat template, if it took part.
    template: Option<Digest>,
    /// How many of the tokens a cube has already.
    num_stored: usize,
}

impl ContentRequest {
    /// Refuses anything but exactly one content.
    pub(super) fn check(self, app: &App) -> Result<Content, ApiError> {
        let default = if app.model.template.is_some() { Target::Chat } else { Target::Completion };
        let target = self.target.unwrap_or(default);
        let content = match (self.text, self.messages, self.token_ids) {
            (Some(text), None, None) => Content::Written(Twin::Text(text), target),
            (None, Some(messages), None) => {
                check_messages(&messages, app)?;
                Content::Written(Twin::Messages(messages), Target::Chat)
            }
            (None, None, Some(token_ids)) => {
                check_token_ids("token_ids", &token_ids, vocab_size(app))?;
                Content::Tokens(token_ids)
            }
            _ => {
                let message = "Give exactly one of text, messages and token_ids.";
                return Err(ApiError::invalid_field("text", message));
            }
        };
        match content.is_empty() {
            true => Err(ApiError::invalid_field(content.field(), format!("{} must not be empty.", content.field()))),
            false => Ok(content),
        }
    }
}

fn vocab_size(app: &App) -> usize {
    app.model.engine.info().vocab_size.min(app.model.tokenizer.vocab_size())
}

fn check_messages(messages: &[Map<String, Value>], app: &App) -> Result<(), ApiError> {
    check_len("messages", messages.len(), app.config.request_limits.max_messages)?;
    match messages.iter().position(|message| !message.get("role").is_some_and(Value::is_string)) {
        None => Ok(()),
        Some(index) => {
            let field = format!("messages[{index}].role");
            Err(ApiError::invalid_field(&field, format!("{field} must be a string.")))
        }
    }
}

impl Content {
    /// The request field it came in.
    pub(super) fn field(&self) -> &'static str {
        match self {
            Self::Written(Twin::Text(_), _) => "text",
            Self::Written(Twin::Messages(_), _) => "messages",
            Self::Tokens(_) => "token_ids",
        }
    }

    fn is_empty(&self) -> bool {
        match self {
            Self::Written(Twin::Text(text), _) => text.is_empty(),
            Self::Written(Twin::Messages(messages), _) => messages.is_empty(),
            Self::Tokens(token_ids) => token_ids.is_empty(),
        }
    }

    /// The text alone, for a cube without KV.
    pub(super) fn into_plaintext(self) -> Result<Payload, ApiError> {
        match self {
            Self::Written(twin, _) => Ok(Payload::Plaintext(twin)),
            Self::Tokens(_) => {
                Err(ApiError::invalid_field("token_ids", "A plaintext cube has text or messages, not token_ids."))
            }
        }
    }

    /// The tokens of a cube that holds this.
    pub(super) fn tokenize(self, app: &App) -> Result<TokenizedContent, ApiError> {
        let (field, model) = (self.field(), &app.model);
        let tokenized = match self {
            Self::Tokens(token_ids) => TokenizedContent { twin: None, token_ids, template: None, num_stored: 0 },
            Self::Written(twin, target) => {
                let token_ids = tokens_of(model, &twin, target).map_err(|error| error.with_param(field))?;
                let template = service(app)?.engine.binding()?.template.filter(|_| target == Target::Chat);
                TokenizedContent { twin: Some(twin), token_ids, template, num_stored: 0 }
            }
        };
        check_context(field, tokenized, app)
    }

    /// The tokens of `cube` with this behind it: the cube's own tokens stay as they are.
    pub(super) fn tokenize_behind(self, cube: &Activation, app: &App) -> Result<TokenizedContent, ApiError> {
        let (field, model) = (self.field(), &app.model);
        let template = cube.binding().template;
        let (twin, suffix) = match (cube.twin(), self) {
            (None, Self::Tokens(suffix)) => (None, suffix),
            (None, Self::Written(Twin::Text(text), _)) => (None, model.tokenizer.encode(&text, false)?),
            (Some(Twin::Text(text)), Self::Written(Twin::Text(suffix), _)) => {
                (Some(Twin::Text(format!("{text}{suffix}"))), model.tokenizer.encode(&suffix, false)?)
            }
            (Some(twin @ Twin::Messages(messages)), Self::Written(Twin::Messages(suffix), _)) => {
                let suffix_ids = messages_behind(model, twin, &suffix)?;
                (Some(Twin::Messages([messages.as_slice(), &suffix].concat())), suffix_ids)
            }
            (twin, _) => return Err(mixed(field, twin)),
        };
        let token_ids = [cube.token_ids(), &suffix].concat();
        let num_stored = cube.token_ids().len();
        check_context(field, TokenizedContent { twin, token_ids, template, num_stored }, app)
    }

    /// The text of `cube` with this behind it.
    pub(super) fn behind_plaintext(self, cube: &Twin) -> Result<Twin, ApiError> {
        let field = self.field();
        match (cube, self) {
            (Twin::Text(text), Self::Written(Twin::Text(suffix), _)) => Ok(Twin::Text(format!("{text}{suffix}"))),
            (Twin::Messages(messages), Self::Written(Twin::Messages(suffix), _)) => {
                Ok(Twin::Messages([messages.as_slice(), &suffix].concat()))
            }
            (twin, _) => Err(mixed(field, Some(twin))),
        }
    }
}

fn mixed(field: &str, twin: Option<&Twin>) -> ApiError {
    let wanted = match twin {
        Some(Twin::Text(_)) => "text",
        Some(Twin::Messages(_)) => "messages",
        None => "text or token_ids",
    };
    ApiError::invalid_field(field, format!("This cube takes {wanted}, not {field}."))
}

fn template_of(model: &ServedModel) -> Result<&ChatTemplate, ApiError> {
    let message = "This model has no chat template; use text with target=\"completion\".";
    model.template.as_deref().ok_or_else(|| ApiError::bad_request(message))
}

fn tokens_of(model: &ServedModel, twin: &Twin, target: Target) -> Result<Vec<u32>, ApiError> {
    match (twin, target) {
        (Twin::Text(text), Target::Completion) => Ok(completion_cube_tokens(&model.tokenizer, text)?),
        _ => Ok(chat_cube_tokens(template_of(model)?, &model.tokenizer, twin)?),
    }
}

/// The tokens that `suffix` adds to a conversation.
fn messages_behind(model: &ServedModel, twin: &Twin, suffix: &[Map<String, Value>]) -> Result<Vec<u32>, ApiError> {
    let variables = Map::new();
    let setting = ChatSetting { tools: None, add_generation_prompt: false, variables: &variables };
    let suffix: Vec<Value> = suffix.iter().cloned().map(Value::Object).collect();
    Ok(cube_prompt(template_of(model)?, &model.tokenizer, twin, &suffix, setting)?.rest)
}

/// A cube must leave room for a prompt.
fn check_context(field: &str, tokenized: TokenizedContent, app: &App) -> Result<TokenizedContent, ApiError> {
    let (num, max) = (tokenized.token_ids.len(), app.model.engine.info().max_model_len);
    match num {
        0 => Err(ApiError::invalid_field(field, format!("{field} makes no token."))),
        num if num < max => Ok(tokenized),
        _ => {
            let message = format!(
                "This model's maximum context length is {max} tokens. However, your {field} resulted in {num} tokens. \
                 Please reduce the length of the {field}."
            );
            Err(ApiError::invalid_field(field, message).with_code("context_length_exceeded"))
        }
    }
}

impl TokenizedContent {
    /// Tokens that were made elsewhere, by the same vocabulary and under the same template.
    pub(super) fn of_tokens(
        twin: Option<Twin>,
        token_ids: Vec<u32>,
        template: Option<Digest>,
        app: &App,
    ) -> Result<Self, ApiError> {
        check_token_ids("token_ids", &token_ids, vocab_size(app))?;
        check_context("token_ids", Self { twin, token_ids, template, num_stored: 0 }, app)
    }

    /// Runs the model as far as blocks are missing.
    pub(super) async fn materialize(
        self,
        service: &CubeService,
        keeping: Keeping,
    ) -> Result<(Payload, Work), ApiError> {
        let Keeping { domain, durable, erase_on_free, priority } = keeping;
        let known = service.engine.binding()?;
        let binding = Binding { template: self.template, domain: domain.parse()?, ..known };
        let shared_prefix =
            (self.num_stored > 0).then(|| SharedPrefix { num_tokens: self.num_stored, domain: domain.clone() });
        let source = shared_prefix.map(|prefix| BlockSource { domain: domain.clone(), shared_prefix: Some(prefix) });
        let wanted = BlockRequest {
            token_ids: self.token_ids.clone(),
            domain,
            durable,
            source,
            erase_on_free,
            priority,
            is_background: false,
        };
        let found = service.engine.materialize(wanted).await?;
        let work = Work::of(&found);
        let blocks = Blocks { full: found.blocks, tail: found.tail, num_bytes: found.bytes };
        let activation = Activation::new(self.twin, binding, self.token_ids, blocks)?;
        Ok((Payload::Activation(Box::new(activation)), work))
    }
}
